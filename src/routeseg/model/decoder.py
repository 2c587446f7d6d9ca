"""The fixed decoder: from the coarsest scale to the finest, then to classes at the input size.

Legend: B images, C base channels, K classes, H, W the (padded) image size, L depth, S scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routeseg import counting
from routeseg.config import NetworkConfig
from routeseg.counting import DECODER, Macs, each
from routeseg.errors import DIVERGED
from routeseg.model.graph import Graph
from routeseg.model.head import GLANCE, Head
from routeseg.model.layers import conv_norm, upsample, widened
from routeseg.model.places import Running
from routeseg.space import STEM_STRIDE

Vector = np.ndarray  # one value per channel, float64 [C]: a map that is the same everywhere


@dataclass(frozen=True)
class Segmentation:
    """What a forward returns, always.

    logits  [B,K,H,W] at the size of the images given
    gates   [B,L+1,S,3] in [0,1] (those of soft gates are below 1): exactly 0 on illegal edges, closed paths and nodes
            that nothing reached. `routeseg.model_cost` turns them into MACs, `Route.from_gates` into a route.
    earlier in training, of a network with exits: the logits of each exit before the last
    exits   where places have decided: the exit at which each of them left, int64 [B,h/b,w/b] (rounded up); else None.
            FIRST_LOOK: the first look was enough
    seen    (h, w), the size at which the images were looked at, if it is not their own
    first   (h, w) of a first look at all of them, if there was one (model/closer.py)
    """

    logits: Tensor
    gates: Tensor
    earlier: tuple[Tensor, ...] = ()
    exits: Tensor | None = None
    seen: tuple[int, int] | None = None
    first: tuple[int, int] | None = None

    @property
    def labels(self) -> Tensor:
        """The most likely class of every pixel, int64 [B,H,W]."""
        return most_likely(self.logits)

    def labelled(self) -> Labelled:
        """Without logits. Raises ValueError if they are not finite, nor the gates."""
        if not (_finite(self.logits) and _finite(self.gates)):
            raise ValueError(DIVERGED)
        return Labelled(self.labels, self.gates, self.exits, self.seen, self.first)


@dataclass(frozen=True)
class Labelled:
    """What an engine gives to those who want labels alone: the most likely class of every pixel, uint8 [B,H,W] (int64
    of more than 256 classes), and the rest as in `Segmentation`."""

    labels: Tensor
    gates: Tensor
    exits: Tensor | None = None
    seen: tuple[int, int] | None = None
    first: tuple[int, int] | None = None


def _finite(values: Tensor) -> bool:
    """Whether all are. Their sum tells it, in a tenth of the time, unless it overflows."""
    return bool(values.sum().isfinite() or values.isfinite().all())


def most_likely(scores: Tensor) -> Tensor:
    """The class of the highest score, [B,K,H,W] -> int64 [B,H,W]; in a sixth of the time of `argmax` on a CPU."""
    return scores.max(dim=1).indices


torch.export.register_dataclass(Segmentation)  # so that `torch.export` takes a network as it is


class Decoder(Head):
    """Features of every scale, scale s [B, C*2**s, H/(4*2**s), W/(4*2**s)] -> logits [B,K,H,W]."""

    key = "decoder"
    segments = True
    task = "image-segmentation"

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.channels = channels = [config.channels(s) for s in range(config.num_scales)]
        self.merge = nn.ModuleList(conv_norm(c, channels[max(s - 1, 0)]) for s, c in enumerate(channels))
        self.predictor = nn.Conv2d(config.base_channels, config.num_classes, 3, padding=1)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.predictor.weight, std=0.01)

    def class_bias(self) -> Tensor | None:
        return self.predictor.bias

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        scores = self.coarse(features)
        return upsample(scores if self.training else widened(scores), STEM_STRIDE)  # classes are told apart in float32

    def coarse(self, features: Sequence[Tensor], running: Running | None = None) -> Tensor:
        total: Tensor | None = None
        for scale in reversed(range(len(self.merge))):
            x = features[scale] if total is None else features[scale] + total
            total = self.merge[scale](x)
            if scale > 0:
                total = upsample(total if running is None else running.filled(total))
        assert total is not None
        return self.predictor(total if running is None else running.filled(total))

    def glance(self, features: Sequence[Tensor | None], even: bool = False) -> Tensor:
        scale, some = next((s, map) for s, map in enumerate(features) if map is not None)
        height, width = (side << scale for side in some.shape[-2:])
        running: Tensor | None = None
        for scale in reversed(range(len(self.merge))):
            map = features[scale] if scale < len(features) else None
            factor = max(GLANCE >> scale, 1) if even else GLANCE
            if map is None:
                sides = [-(-(side >> scale) // factor) for side in (height, width)]
                x = some.new_zeros(len(some), self.channels[scale], *sides)
            else:  # what lies beyond the edge does not count
                x = F.avg_pool2d(map, factor, ceil_mode=True, count_include_pad=False)
            if running is not None:
                grows = running.shape[-2:] != x.shape[-2:]
                larger = F.interpolate(running, scale_factor=2.0) if grows else running
                x = x + larger[..., : x.shape[-2], : x.shape[-1]]
            running = self.merge[scale](x)
        assert running is not None
        return F.conv2d(running, self.glance_weight, self.predictor.bias)

    @property
    def glance_weight(self) -> Tensor:
        """The predictor's weights for small maps, [K,C,1,1]: a pixel's neighbours are far away there, so all taps read
        the pixel."""
        return self.predictor.weight.sum((2, 3), keepdim=True)

    def result(self, output: Tensor, gates: Tensor, size: tuple[int, int]) -> Segmentation:
        return Segmentation(output[..., : size[0], : size[1]], gates)

    @classmethod
    def glance_macs(cls, config: NetworkConfig) -> Macs:
        total, finest = Macs(), STEM_STRIDE * GLANCE
        for scale in range(config.num_scales):
            channels, stride = config.channels(scale), max(STEM_STRIDE * 2**scale, finest)
            total += counting.conv_norm_macs(channels, channels // 2 if scale else channels, stride, place=DECODER)
        return total + each("conv", config.base_channels * config.num_classes, finest, DECODER)

    @classmethod
    def macs(cls, config: NetworkConfig) -> Macs:
        total = Macs()
        for scale in range(config.num_scales):
            channels, stride = config.channels(scale), STEM_STRIDE * 2**scale
            out = channels // 2 if scale else channels
            total += counting.conv_norm_macs(channels, out, stride, place=DECODER)
            if scale:
                total += each("resize", out, stride // 2, DECODER)
        total += each("conv", config.base_channels * 9 * config.num_classes, STEM_STRIDE, DECODER)
        return total + each("resize", config.num_classes, 1, DECODER)

    def onnx(self, graph: Graph, maps: Sequence[str | None]) -> str:
        running: str | Vector | None = None
        for scale in reversed(range(len(maps))):
            running = self.onnx_merge(graph, scale, maps[scale], running)
        assert isinstance(running, str)  # something reaches some scale
        return self.onnx_predict(graph, running)

    def onnx_merge(
        self, graph: Graph, scale: int, x: str | None, running: str | Vector | None, grows: bool = True
    ) -> str | Vector:
        """A step of the decoder: what arrives at a scale (None: zeros) and what comes from the coarser one -> the next.

        A scale that nothing arrives at is the same everywhere, so it stays a vector and writes no map.
        """
        block, name = cast(nn.Sequential, self.merge[scale]), f"{self.key}.merge.{scale}"
        conv = cast(nn.Conv2d, block[0])
        assert conv.bias is not None
        if x is None and not isinstance(running, str):
            vector = np.zeros(conv.in_channels) if running is None else running
            weight, bias = conv.weight.double().numpy()[..., 0, 0], conv.bias.double().numpy()
            return np.maximum(weight @ vector + bias, 0.0)
        if isinstance(running, np.ndarray):
            running = graph.constant(running.reshape(1, -1, 1, 1))
        both = [part for part in (x, running) if part is not None]
        out = graph.sequence(block, name, both[0] if len(both) == 1 else graph.op("Add", *both))
        return graph.resize(out, 2) if grows and scale > 0 else out

    def onnx_predict(self, graph: Graph, x: str) -> str:
        """The end of the decoder: [B,C,H/4,W/4] -> logits [B,K,H,W]."""
        return graph.resize(graph.conv(self.predictor, f"{self.key}.predictor", x), STEM_STRIDE)

    def onnx_glance(self, graph: Graph, maps: Sequence[str | None], even: bool = False) -> str:
        finest, some = next((s, map) for s, map in enumerate(maps) if map is not None)
        running: str | Vector | None = None
        for scale in reversed(range(len(self.merge))):
            map, factor = maps[scale], max(GLANCE >> scale, 1) if even else GLANCE
            if map is not None:
                end = [0, 0, factor - 1, factor - 1]  # what lies beyond the edge does not count
                map = graph.op("AveragePool", map, kernel_shape=[factor] * 2, strides=[factor] * 2, pads=end)
            if isinstance(running, str):
                if not even or 2 << scale > GLANCE:
                    twice = graph.constant([1, 1, 2, 2])
                    nearest = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
                    running = graph.op("Resize", running, "", twice, mode="nearest", **nearest)
                if map is not None:
                    size = graph.size(map)
                else:  # the side of an image / that of a pixel of the glance, rounded up
                    size, pixel = graph.op("Mul", graph.size(some), graph.integers([1 << finest])), factor << scale
                    size = graph.op("Div", graph.op("Add", size, graph.integers([pixel - 1])), graph.integers([pixel]))
                running = graph.op("Slice", running, graph.integers([0, 0]), size, graph.integers([2, 3]))
            running = self.onnx_merge(graph, scale, map, running, grows=False)
        assert isinstance(running, str)  # something reaches some scale
        weight, bias = self.glance_weight.detach().numpy(), self.predictor.bias
        assert bias is not None
        return graph.op("Conv", running, graph.constant(weight), graph.constant(bias.detach().numpy()))
