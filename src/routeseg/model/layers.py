"""The parts that have no choice to make: stem, separable convolution, the three scale transforms (Sec. 3.1).

Legend: B images, C channels, h, w the size of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routeseg import counting
from routeseg.counting import UNPADDED, Macs, each
from routeseg.model.places import Running
from routeseg.space import DOWN, KEEP, STEM_STRIDE, UP


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that in training, too, takes its running statistics for a single value of each channel, such as the one
    image of a batch that reaches a node of one pixel: that has no variance."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and single_value(input):
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def single_value(map: Tensor) -> bool:
    """Whether a map [B,C,h,w] has a single value of each channel."""
    return map.numel() == map.shape[1]


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, relu: bool = True
) -> nn.Sequential:
    """Convolution without bias or padding, BatchNorm and, if asked, ReLU: [B,C,h,w] -> [B,C',h/stride,w/stride]."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, bias=False),
        BatchNorm(out_channels),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


def running_statistics(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """The mean and the variance [C] that a BatchNorm of the network keeps: the tensors themselves, no copies."""
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var


def separable_conv(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, relu: bool = True
) -> nn.Sequential:
    """Depthwise convolution, then a 1x1 convolution with BatchNorm; the depthwise one has no norm of its own."""
    depthwise = nn.Conv2d(
        in_channels, in_channels, kernel_size, stride, padding=kernel_size // 2, groups=in_channels, bias=False
    )
    return nn.Sequential(depthwise, *conv_norm(in_channels, out_channels, relu=relu))


class Stem(nn.Sequential):
    """Image to the first node: [B,3,H,W] -> [B,C,H/4,W/4]. Three convolutions, the first and the last of stride 2.

    The first one is not padded, as in the authors' network: its output has H/2 - 1 rows, the stem's has H/4.
    """

    def __init__(self, stem_channels: int, base_channels: int) -> None:
        super().__init__(
            conv_norm(3, stem_channels, kernel_size=3, stride=2),
            separable_conv(stem_channels, stem_channels),
            separable_conv(stem_channels, base_channels, stride=2),
        )

    @staticmethod
    def macs(stem_channels: int, base_channels: int) -> Macs:
        """MACs for any image size."""
        # The last depthwise convolution has stride 2: both of its halves are counted at 1/4 of the resolution.
        return (
            counting.conv_norm_macs(3 * 9, stem_channels, 2, place=UNPADDED)
            + counting.separable(stem_channels, stem_channels, 3, 2, place=UNPADDED)
            + counting.separable(stem_channels, base_channels, 3, STEM_STRIDE)
        )


def upsample(features: Tensor, factor: int = 2) -> Tensor:
    """Bilinear, corners not aligned: [B,C,h,w] -> [B,C,h*factor,w*factor]."""
    return F.interpolate(features, scale_factor=float(factor), mode="bilinear", align_corners=False)


def widened(values: Tensor) -> Tensor:
    """Values in float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Transform(nn.Sequential):
    """T_j of Eq. 5: takes a node's output to the node one scale up, at the same scale (keep) or one scale down.

    up: [B,C,h,w] -> [B,C/2,2h,2w]; keep: the shape stays; down: [B,C,h,w] -> [B,2C,h/2,w/2]. `running` tells which
    pixels run (model/places.py); None: all.
    """

    def __init__(self, channels: int, direction: int) -> None:
        layers: dict[int, list[nn.Module]] = {
            UP: [nn.ReLU(), *conv_norm(channels, channels // 2), Upsample()],
            KEEP: [nn.ReLU()],
            DOWN: [Subsample(), nn.ReLU(), *conv_norm(channels, channels * 2)],
        }
        super().__init__(*layers[direction])

    def forward(self, features: Tensor, running: Running | None = None) -> Tensor:
        for layer in self:
            if running is not None and isinstance(layer, Upsample):
                features = running.filled(features)
            features = layer(features)
        return features

    @staticmethod
    def macs(channels: int, direction: int, stride: int) -> Macs:
        """MACs for any image size, and the product of the output with alpha_j; `stride` is that of the input's map."""
        relu = each("relu", channels, stride)
        if direction == KEEP:
            return relu + each("product", channels, stride)
        if direction == UP:
            conv = counting.conv_norm_macs(channels, channels // 2, stride)
            return (
                relu
                + conv
                + Macs(tuple(counting.Count(unit, channels // 2, stride // 2) for unit in ("resize", "product")))
            )
        assert direction == DOWN
        conv = counting.conv_norm_macs(channels, channels * 2, stride * 2)
        return relu + conv + each("product", channels * 2, stride * 2)


class Upsample(nn.Module):
    """`upsample` as a layer."""

    def forward(self, features: Tensor) -> Tensor:
        return upsample(features)


class Subsample(nn.Module):
    """Every second row and column: with a 1x1 convolution behind it, that convolution at stride 2.

    Written so because oneDNN's backward of a strided 1x1 convolution of 8 channels in channels_last crashes the
    process (torch 2.13, x86), and because the ReLU then only sees the pixels that are used.
    """

    def forward(self, features: Tensor) -> Tensor:
        return features[..., ::2, ::2]


class InputNorm(nn.Module):
    """The input normalisation, so that a checkpoint is complete in itself: (image - mean) / std per channel.

    Images are RGB, uint8 or float in 0..1. Mean and std are part of the configuration, not of the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255.0
        return (images.to(self.mean.dtype) - self.mean) / self.std
