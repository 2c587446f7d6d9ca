"""BatchNorm folded into the convolutions before it."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from routeseg.model.grid import RoutedNetwork
from routeseg.model.layers import running_statistics

Network = TypeVar("Network", bound=RoutedNetwork)


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
