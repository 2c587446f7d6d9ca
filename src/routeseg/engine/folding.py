"""A network's own walk with folded weights, in any precision: on GPUs, and where no kernels know the network."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from routeseg.errors import NOT_FINITE
from routeseg.model.decoder import Labelled
from routeseg.model.gate import Gate
from routeseg.model.grid import RoutedNetwork
from routeseg.model.layers import running_statistics
from routeseg.model.request import Request

Network = TypeVar("Network", bound=RoutedNetwork)


class FoldedForward:
    """A network's forward on PyTorch's operations, with its BatchNorm folded, in channels_last.

    dtype  of weights and feature maps. What normalises images, scores paths and decides at exits is in float32 or more
    """

    def __init__(self, model: RoutedNetwork, dtype: torch.dtype) -> None:
        self.model = fold_batch_norm(model)
        exact = {self.model.normalize, *(gate.score for gate in self.model.modules() if isinstance(gate, Gate))}
        if self.model.exits is not None:
            exact |= {self.model.exits, *self.model.exits.gates.modules()}
        wide = torch.promote_types(dtype, torch.float32)
        for module in self.model.modules():
            own = wide if module in exact else dtype
            module._apply(lambda x, own=own: x.to(own) if x.is_floating_point() else x, recurse=False)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    def __call__(self, images: Tensor, request: Request) -> Any:
        """What the head makes of images [B,3,H,W].

        Raises ValueError for images on a CPU with values that are not finite.
        """
        if images.device.type == "cpu" and images.is_floating_point() and not torch.isfinite(images).all():
            raise ValueError(NOT_FINITE)
        return self.model.answer(images, request)

    def labels(self, images: Tensor, request: Request) -> Labelled:
        """The most likely classes. Raises as `__call__`, and ValueError if scores are not finite."""
        return self(images, request).labelled()


def fold_batch_norm(model: Network) -> Network:
    """A copy in eval mode whose convolutions carry the BatchNorm behind them; computed in float64."""
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    for sequence in [m for m in folded.modules() if isinstance(m, nn.Sequential)]:
        for position in range(1, len(sequence)):
            conv, norm = sequence[position - 1], sequence[position]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.modules.batchnorm._BatchNorm):
                mean, variance = running_statistics(norm)
                scale = norm.weight.double() / torch.sqrt(variance.double() + norm.eps)
                shift = norm.bias.double() - mean.double() * scale
                dtype = conv.weight.dtype
                conv.weight = nn.Parameter(
                    (conv.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype), requires_grad=False
                )
                conv.bias = nn.Parameter(shift.to(dtype), requires_grad=False)
                sequence[position] = nn.Identity()
    return folded
