"""Several passes over one image, averaged: multi-scale, flip, sliding window (test-time augmentation).

Nothing of it is in the network: a forward is called on other views of the image, and its class probabilities are
laid back over it.

Legend: K classes, H, W size of the image, h, w size of a view of it, L depth, S scales of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from routeseg.cost.macs import CostTable, spent_macs
from routeseg.evaluation.windows import OVERLAP, starts
from routeseg.model import Segmentation
from routeseg.model.decoder import most_likely
from routeseg.space import MIN_IMAGE_SIZE

Forward = Callable[[Tensor], Segmentation]
MAX_SCALE = 16
View = tuple[int, int, bool]  # top and left of a window in the scaled image, and whether it is mirrored


class Passes(NamedTuple):
    """n passes at one size (h, w): what they opened, [n,L+1,S,3]; where places left, [n,hb,wb], if they did so by
    themselves; and the size at which the network looked at them, if it chose another, and first, if it did so twice."""

    size: tuple[int, int]
    gates: Tensor
    exits: Tensor | None = None
    seen: tuple[int, int] | None = None
    first: tuple[int, int] | None = None

    def cost_macs(self, table: Callable[[tuple[int, int]], CostTable]) -> float:
        """What they cost together, by the tables of all sizes."""
        return float(spent_macs(self, self.size, table).sum())


@dataclass(frozen=True)
class Averaged:
    """What all passes over one image say together.

    scores  [1,K,H,W]: the logits of a single pass over the whole image as it is; otherwise class probabilities,
            float32, the mean over windows, flips and scales
    passes  what the network saw and did, for each scale
    """

    scores: Tensor
    passes: tuple[Passes, ...]

    @property
    def labels(self) -> Tensor:
        """The most likely class of every pixel, int64 [1,H,W]."""
        return most_likely(self.scores)

    @property
    def gates(self) -> Tensor:
        """The mean activations over the passes, [L+1,S,3]."""
        return torch.cat([one.gates for one in self.passes]).mean(dim=0)

    @property
    def count(self) -> int:
        """How often the network ran."""
        return sum(len(one.gates) for one in self.passes)


@dataclass(frozen=True)
class MultiPass:
    """A forward over several views of an image: `MultiPass(engine, scales=[0.75, 1, 1.25], flip=True)(image)`.

    forward  the network in eval mode, or an engine built from it
    scales   factors by which the image is resized, bilinearly; the probabilities are resized back
    flip     each view mirrored too
    window   (height, width) of the windows that slide over the scaled image, for images too large for the memory.
             They cover it all; the last ones are moved back to its edge. A side of the image that is shorter is
             taken whole. None: no windows
    overlap  least overlap of neighbouring windows, as a share of the window
    batch    how many views of one scale run at once

    Raises ValueError for settings that make no sense. Without scales, flip and window it is the forward itself.
    """

    forward: Forward
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    window: tuple[int, int] | None = None
    overlap: float = OVERLAP
    batch: int = 1

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < factor <= MAX_SCALE for factor in self.scales):
            raise ValueError(
                f"scales is {list(self.scales)}: give factors above 0 and up to {MAX_SCALE}, such as [0.75,1.0,1.25]"
            )
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales is {list(self.scales)}: give each factor once")
        if self.window is not None and min(self.window) < MIN_IMAGE_SIZE:
            raise ValueError(
                f"the window is {_size(self.window)}: the network takes {MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE} or more"
            )
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap is {self.overlap}: it is a share of the window, from 0 to below 1")
        if self.batch < 1:
            raise ValueError(f"{self.batch} windows at once: it must be at least 1")

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Averaged:
        """Segments one image [1,3,H,W], RGB, uint8 or float in 0..1.

        Raises ValueError for several images, and if a scale makes it smaller than the network takes.
        """
        if image.ndim != 4 or len(image) != 1:
            raise ValueError(f"the image has shape {list(image.shape)}: give one image [1,3,H,W]")
        height, width = image.shape[-2:]
        if self._is_plain(height, width):
            result = self.forward(image)
            seen = Passes((height, width), result.gates, result.exits, result.seen, result.first)
            return Averaged(result.logits, (seen,))
        mean: Tensor | None = None
        passes = []
        for factor in self.scales:
            scaled = _resize(image, (round(height * factor), round(width * factor)), factor)
            probabilities, seen = self._at_one_scale(scaled)
            passes.append(seen)
            if probabilities.shape[-2:] != (height, width):
                probabilities = F.interpolate(probabilities, (height, width), mode="bilinear")
            mean = probabilities if mean is None else mean.add_(probabilities)
        assert mean is not None
        return Averaged(mean.div_(len(self.scales)), tuple(passes))

    def _is_plain(self, height: int, width: int) -> bool:
        """Whether the one view is the image itself."""
        whole = self.window is None or (height <= self.window[0] and width <= self.window[1])
        return whole and not self.flip and list(self.scales) == [1.0]

    def _at_one_scale(self, image: Tensor) -> tuple[Tensor, Passes]:
        """A scaled image [1,3,h',w'] -> mean probabilities [1,K,h',w'], and all views of it."""
        height, width = image.shape[-2:]
        window = self.window or (height, width)
        h, w = min(window[0], height), min(window[1], width)
        total: Tensor | None = None
        cover = torch.zeros(height, width, device=image.device)
        gates: list[Tensor] = []
        exits: list[Tensor | None] = []
        all_views = self._views((height, width), (h, w))
        for first in range(0, len(all_views), self.batch):
            views = all_views[first : first + self.batch]
            crops = [_mirror(image[..., top : top + h, left : left + w], flip) for top, left, flip in views]
            result = self.forward(torch.cat(crops))
            gates.append(result.gates)
            exits.append(result.exits)
            for logits, (top, left, flip) in zip(result.logits, views, strict=True):
                probabilities = _mirror(logits.float().softmax(dim=0), flip)  # [K,h,w]
                if total is None:
                    total = probabilities.new_zeros(1, len(probabilities), height, width)
                total[0, :, top : top + h, left : left + w] += probabilities
                cover[top : top + h, left : left + w] += 1
        assert total is not None
        places = [one for one in exits if one is not None]
        where = torch.cat(places) if places else None
        return total.div_(cover), Passes((h, w), torch.cat(gates), where, result.seen, result.first)

    def _views(self, size: tuple[int, int], window: tuple[int, int]) -> list[View]:
        tops, lefts = (starts(side, part, self.overlap) for side, part in zip(size, window, strict=True))
        return list(product(tops, lefts, (False, True) if self.flip else (False,)))


def _resize(image: Tensor, size: tuple[int, int], factor: float) -> Tensor:
    """The image [1,3,H,W] at this size, float in 0..1; at its own size, as it is."""
    if size == tuple(image.shape[-2:]):
        return image
    if min(size) < MIN_IMAGE_SIZE:
        raise ValueError(
            f"scale {factor:g} makes an image of {_size(image.shape[-2:])} {_size(size)}: the network takes "
            f"{MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE} or more, leave the scale out"
        )
    values = image if image.is_floating_point() else image.float() / 255
    return F.interpolate(values, size, mode="bilinear")


def _mirror(x: Tensor, flip: bool) -> Tensor:
    return x.flip(-1) if flip else x


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
