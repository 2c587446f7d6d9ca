"""Distillation (Hinton et al. 2015): a network also learns what a trained one says of each pixel.

Legend: B images, K classes, H, W crop size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from routeseg.engine import SkipEngine
from routeseg.labels import IGNORE
from routeseg.model import DynamicRoutingNetwork, checkpoints

STRIDE = 4  # one pixel of so many rows and columns is looked at, another one at each step: neighbours say the same


class Teacher:
    """The network of a checkpoint folder, all its layers, on the device of the images.

    Raises ValueError if the folder is no checkpoint, or has other classes than the network that is to learn.
    """

    def __init__(self, folder: str | Path, student: DynamicRoutingNetwork) -> None:
        self.network = checkpoints.load(folder)
        theirs, ours = self.network.config.class_names, student.config.class_names
        if theirs != ours:
            raise ValueError(
                f"recipe.teacher {folder} has other classes ({len(theirs)}, the first is {theirs[0]}) than the data "
                f"({len(ours)}, the first is {ours[0]}): take a network that was trained on the same classes"
            )
        self._engine: SkipEngine | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W] -> logits [B,K,H,W]."""
        if self._engine is None:
            self._engine = SkipEngine(self.network.to(images.device))
        route = None if self.network.exits is None else self.network.route
        logits: Tensor = self._engine(images, route).logits
        return logits


def distillation_loss(outputs: Sequence[Tensor], taught: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each output [B,K,H,W] with what the teacher says [B,K,H,W], added up: the mean over pixels
    that have a label [B,H,W], in every STRIDE-th row and column from a random one on."""
    top, left = torch.randint(STRIDE, (2,)).tolist()

    def sampled(map: Tensor) -> Tensor:
        return map[..., top::STRIDE, left::STRIDE]

    known = sampled(labels) != IGNORE
    shares = sampled(taught).float().softmax(1) * known[:, None]
    sums = [-(shares * sampled(logits).float().log_softmax(1)).sum() for logits in outputs]
    return torch.stack(sums).sum() / known.sum().clamp(min=1)
