"""Networks that one would take instead, for equal_time.py to train and clock.py to time: Fast-SCNN from scratch, U-Net
and DeepLabV3+ on EfficientNet-Lite0 with the same ImageNet weights as `--model.backbone efficientnet_lite0`.

They learn by the recipe of `routeseg train`, from the same crops: AdamW or SGD with the schedule, class balance,
average of the weights, precise statistics of BatchNorm, a frozen backbone at first, offsets of classes.

The networks follow their papers (Poudel et al. 2019; Ronneberger et al. 2015; Chen et al. 2018), with the widths of
decoders of segmentation_models.pytorch, which needs torchvision.

Legend: B images, K classes, H, W image size.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from routeseg.config import NetworkConfig
from routeseg.data.config import DataConfig
from routeseg.data.datamodule import SegmentationDataModule
from routeseg.data.subset import class_weights
from routeseg.labels import IGNORE
from routeseg.model.backbone import EfficientNetLite0
from routeseg.model.layers import InputNorm
from routeseg.training.offsets import offsets_of
from routeseg.training.recipe import Recipe
from routeseg.training.segmentation import freeze_stages
from routeseg.training.task import optimizer_of


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU: [B,c,h,w] -> [B,c',h/stride,w/stride]."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def separable(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(inputs, inputs, stride=stride, groups=inputs), conv(inputs, outputs, 1))


def resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class Bottleneck(nn.Module):
    """Inverted residual of Fast-SCNN."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int = 6) -> None:
        super().__init__()
        hidden = inputs * expand
        self.layers = nn.Sequential(
            conv(inputs, hidden, 1),
            conv(hidden, hidden, stride=stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.residual else self.layers(x)


class PyramidPooling(nn.Module):
    """Means over 1, 2, 3 and 6 parts of the sides, as adaptive pooling has them, which ONNX has not."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(conv(channels, channels // 4, 1) for _ in (1, 2, 3, 6))
        self.merge = conv(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = []
        for bins, part in zip((1, 2, 3, 6), self.parts, strict=True):
            down, across = (
                [(i * side // bins, -(-(i + 1) * side // bins)) for i in range(bins)] for side in map(int, x.shape[-2:])
            )
            rows = [torch.stack([x[..., a:b, c:d].mean((2, 3)) for c, d in across], -1) for a, b in down]
            pooled.append(resized(part(torch.stack(rows, -2)), x))
        return self.merge(torch.cat([x, *pooled], 1))


class FastSCNN(nn.Module):
    """Fast-SCNN: Poudel, Liwicki, Cipolla 2019, Table 1."""

    backbone = None

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.down = nn.Sequential(conv(3, 32, stride=2), separable(32, 48, 2), separable(48, 64, 2))
        blocks = [(64, 64, 2), (64, 64, 1), (64, 64, 1), (64, 96, 2), (96, 96, 1), (96, 96, 1), (96, 128, 1)]
        blocks += [(128, 128, 1), (128, 128, 1)]
        self.context = nn.Sequential(*(Bottleneck(*one) for one in blocks), PyramidPooling(128))
        self.coarse = nn.Sequential(conv(128, 128, groups=128), nn.Conv2d(128, 128, 1))
        self.fine = nn.Conv2d(64, 128, 1)
        self.head = nn.Sequential(separable(128, 128), separable(128, 128), nn.Dropout(0.1), nn.Conv2d(128, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x)
        coarse = self.coarse(resized(self.context(fine), fine))
        return resized(self.head(F.relu(self.fine(fine) + coarse)), x)


class OnLite0(nn.Module):
    """A network on EfficientNet-Lite0, whose first stage gives its features at half of the size, too."""

    def __init__(self) -> None:
        super().__init__()
        config = NetworkConfig(gate="fixed", depth=4, backbone="efficientnet_lite0")
        self.backbone = EfficientNetLite0(config)
        self.backbone.load_pretrained()
        del self.backbone.project

    def features(self, x: Tensor) -> list[Tensor]:
        """At 1/2, 1/4, 1/8, 1/16, 1/32: 16, 24, 40, 112, 320 channels."""
        first, block, *rest = self.backbone.stages[0]
        found = [block(first(x))]
        x = found[0]
        for layer in rest:
            x = layer(x)
        found.append(x)
        for stage in list(self.backbone.stages)[1:]:
            found.append(stage(found[-1]))
        return found


class UNet(OnLite0):
    """U-Net with a decoder of 256, 128, 64, 32 and 16 channels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        before, self.blocks = 320, nn.ModuleList()
        for skip, width in zip((112, 40, 24, 16, 0), (256, 128, 64, 32, 16), strict=True):
            self.blocks.append(nn.Sequential(conv(before + skip, width), conv(width, width)))
            before = width
        self.head = nn.Conv2d(before, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        *skips, out = self.features(x)
        for block, skip in zip(self.blocks, [*skips[::-1], None], strict=True):
            out = F.interpolate(out, scale_factor=2.0)
            out = block(out if skip is None else torch.cat([out, skip], 1))
        return self.head(out)


class DeepLabV3Plus(OnLite0):
    """DeepLabV3+ at output stride 16: separable ASPP of rates 12, 24, 36, 256 channels, 48 from 1/4."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.point = conv(112, 256, 1)
        self.rates = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(112, 112, 3, padding=rate, dilation=rate, groups=112, bias=False), conv(112, 256, 1)
            )
            for rate in (12, 24, 36)
        )
        self.mean = conv(112, 256, 1)
        self.merge, self.fine = conv(5 * 256, 256, 1), conv(24, 48, 1)
        self.refine, self.head = separable(256 + 48, 256), nn.Conv2d(256, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, fine, _, coarse, _ = self.features(x)
        mean = self.mean(coarse.mean((2, 3), keepdim=True)).expand(-1, -1, *coarse.shape[-2:])
        merged = self.merge(torch.cat([self.point(coarse), *(rate(coarse) for rate in self.rates), mean], 1))
        out = self.refine(torch.cat([resized(merged, fine), self.fine(fine)], 1))
        return resized(self.head(out), x)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "fast-scnn": FastSCNN,
    "u-net-lite0": UNet,
    "deeplabv3plus-lite0": DeepLabV3Plus,
}


class Baseline(nn.Module):
    """Images [B,3,H,W], uint8 or float in 0..1 -> logits [B,K,H,W]; padded to multiples of 32 as routeseg pads them."""

    def __init__(self, name: str, classes: int) -> None:
        super().__init__()
        self.network = NETWORKS[name](classes)
        mean, std = EfficientNetLite0.pixel_mean, EfficientNetLite0.pixel_std
        self.normalize = InputNorm(mean, std)
        self.register_buffer("offsets", torch.zeros(classes, 1, 1))

    @property
    def backbone(self) -> EfficientNetLite0 | None:
        return self.network.backbone

    def gate_parameters(self) -> list[nn.Parameter]:
        return []

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        x = F.pad(self.normalize(images), (0, -width % 32, 0, -height % 32))
        logits = self.network(x.contiguous(memory_format=torch.channels_last))[..., :height, :width]
        return logits if self.training else logits + self.offsets


class Training:
    """The recipe's steps for a baseline: what task.py does for networks of ours."""

    def __init__(self, model: Baseline, recipe: Recipe, weights: np.ndarray | None) -> None:
        self.model, self.recipe = model.to(memory_format=torch.channels_last), recipe
        self.weights = None if weights is None else torch.from_numpy(weights)
        self.optimizer, self.schedule = optimizer_of(model, recipe)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay or 0.0))

    def step(self, number: int, batch: dict[str, Tensor]) -> float:
        recipe, backbone = self.recipe, self.model.backbone
        self.model.train()
        if backbone is not None:
            backbone.stages.eval()
        freeze_stages(backbone, recipe, number)
        logits = self.model(batch["image"])
        loss = F.cross_entropy(logits, batch["labels"], self.weights, ignore_index=IGNORE)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.model)
        return loss.item()

    @torch.no_grad()
    def averaged(self, batches: Any) -> Baseline:
        """The averaged network, with BatchNorm's statistics from these batches."""
        model = self.average.module
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        model.train()
        if model.backbone is not None:
            model.backbone.stages.eval()
            norms = [norm for norm in norms if norm.training]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
        for batch in batches:
            model(batch["image"])
        return model.eval()


def train(name: str, data: DataConfig, recipe: Recipe) -> Baseline:
    """A network after the steps of a recipe."""
    torch.manual_seed(recipe.seed)
    module = SegmentationDataModule(data, recipe.iterations, recipe.seed)
    training = Training(
        Baseline(name, len(module.classes)),
        recipe,
        class_weights(module.train_data, recipe.class_balance) if recipe.class_balance else None,
    )
    for number, batch in enumerate(module.train_dataloader()):
        loss = training.step(number, batch)
        if (number + 1) % recipe.log_every == 0:
            print(f"{name} {number + 1} of {recipe.iterations}: loss {loss:.3f}", flush=True)
    model = training.averaged(module.norm_dataloader(0, recipe.precise_bn_batches))
    if recipe.class_offsets:
        for offsets in offsets_of(lambda image: [model(image)], module.calibration_dataloader("train")):
            model.offsets += offsets[:, None, None]
    return model


@lru_cache
def macs(name: str, classes: int, height: int, width: int) -> float:
    """Of an image of this size, padded as the network pads it."""
    model = Baseline(name, classes).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, height, width))
    return counter.get_total_flops() / 2


def folded(model: Baseline) -> Baseline:
    """The network with its BatchNorm in the convolutions."""
    for layers in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        for place in range(1, len(layers)):
            before, norm = layers[place - 1], layers[place]
            if isinstance(before, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                layers[place - 1], layers[place] = fuse_conv_bn_eval(before, norm), nn.Identity()
    return model


def in_onnx_runtime(name: str, classes: int, height: int, width: int, threads: int) -> Callable[[np.ndarray], Any]:
    """What makes an image float32 [1,3,H,W] of this size in 0..1 the most likely class of each pixel, with weights as
    they are before a training."""
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the older way to export, which is enough for these
        model, image = Labels(folded(Baseline(name, classes).eval())), torch.rand(1, 3, height, width)
        torch.onnx.export(model, (image,), file, dynamo=False, opset_version=17)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {session.get_inputs()[0].name: pixels})


class Labels(nn.Module):
    """Images [B,3,H,W] -> the most likely class of each pixel, uint8 [B,H,W]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).argmax(1).to(torch.uint8)
