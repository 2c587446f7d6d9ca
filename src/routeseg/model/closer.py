"""A closer look: an image is looked at in a small size first, all layers, and then again in a larger one at the places
where the first look is unsure. All others keep what it made of them.

The second look is one with places (model/places.py) of which most have left before the first layer. What a convolution
or a resize there reads beyond those that run is what the first look had in the same spot of the network, enlarged: a
map of the same kind, of the same part of the image, at no cost. Features of small and large images are alike as far as
a network was trained on images of all sizes.

Legend: B images, H, W the padded size of the closer look, hb, wb its places, C channels, K classes, h, w the size of a
map of the closer look, h', w' of the first one; ratio: how many times as high, and as wide, the closer look is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from routeseg.model.places import Running
from routeseg.space import STEM_STRIDE

Ratio = tuple[float, float]


class First(Running):
    """The first look: all of it runs, and what a closer one may read is kept, in the order in which it comes up."""

    def __init__(self, images: int, device: torch.device) -> None:
        super().__init__(torch.ones(images, 1, 1, dtype=torch.bool, device=device), (1, 1), 1)
        self.maps: list[Tensor] = []

    def mask(self, map: Tensor) -> Tensor:
        return map.new_ones((len(map), 1, *map.shape[-2:]), dtype=torch.bool)

    def filled(self, map: Tensor, reach: int = 1) -> Tensor:
        self.maps.append(map)
        return map

    def kept(self, new: Tensor, before: Tensor | None) -> Tensor:
        return new


class Closer(Running):
    """The places of a closer look; `maps` are those that the first one kept."""

    def __init__(self, flags: Tensor, size: tuple[int, int], place: int, maps: Sequence[Tensor], ratio: Ratio) -> None:
        super().__init__(flags, size, place)
        self.maps, self.ratio = iter(maps), ratio

    def filled(self, map: Tensor, reach: int = 1) -> Tensor:
        return torch.where(self.mask(map), map, enlarged_by(next(self.maps), self.ratio, map.shape[-2:]))


def enlarged_by(map: Tensor, ratio: Ratio, size: Sequence[int]) -> Tensor:
    """A map [B,C,h',w'] of the first look as one of a closer look [B,C,h,w]: bilinear, the edge repeated beyond."""
    for axis, (factor, length) in enumerate(zip(ratio, size, strict=True), start=2):
        at = ((torch.arange(length, device=map.device) + 0.5) * (1 / factor) - 0.5).clamp(0, map.shape[axis] - 1)
        near = at.long()
        far = (near + 1).clamp(max=map.shape[axis] - 1)
        weight = (at - near).to(map.dtype).view((-1, 1) if axis == 2 else (-1,))
        map = (1 - weight) * map.index_select(axis, near) + weight * map.index_select(axis, far)
    return map


def over_places(values: Tensor, ratio: Ratio, place: int, places: Sequence[int]) -> Tensor:
    """The mean over each place of a closer look [B,hb,wb] of what the first look has at a quarter of its size
    [B,h',w']; 0 for a place of which it has nothing."""
    sums, counts = (values.new_zeros(len(values), places[0] * places[1]) for _ in range(2))
    rows, columns = (
        ((torch.arange(length, device=values.device) + 0.5) * STEM_STRIDE * factor / place).long().clamp(max=most - 1)
        for length, factor, most in zip(values.shape[1:], ratio, places, strict=True)
    )
    at = (rows[:, None] * places[1] + columns).flatten().expand(len(values), -1)
    sums.scatter_add_(1, at, values.flatten(1))
    counts.scatter_add_(1, at, torch.ones_like(at, dtype=counts.dtype))
    return (sums / counts.clamp(min=1)).view(-1, *places)
