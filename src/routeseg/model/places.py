"""Places: squares of an image that leave the network at exits of their own (Eq. 5, place by place).

A place that has left keeps the features with which it left: at each scale the map that the next layer reads is, pixel
by pixel, what the layer computes where the place is still in, and the map before where it has left. Inside a layer
only pixels that run exist. A convolution or a resize there that reads beyond them finds the mean of the running pixels
around (`Running.filled`), so that nothing is computed for a neighbour's sake.

Legend: B images, H, W the padded size, b the side of a place in pixels, C channels, h, w the size of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class Running:
    """Which places of the images of a batch are still in.

    flags  bool [B,ceil(H/b),ceil(W/b)]
    size   (H, W)
    place  b, a multiple of the coarsest stride: so a place is whole pixels at every scale
    """

    def __init__(self, flags: Tensor, size: tuple[int, int], place: int) -> None:
        self.flags, self.size, self.place = flags, size, place
        self._masks: dict[int, Tensor] = {}
        self._around: dict[tuple[int, int], Tensor] = {}

    def mask(self, map: Tensor) -> Tensor:
        """The pixels of a map [B,C,h,w] that run: bool [B,1,h,w]."""
        height, width = map.shape[-2:]
        if height not in self._masks:
            self._masks[height] = enlarge(self.flags[:, None], self.place * height // self.size[0], (height, width))
        return self._masks[height]

    def filled(self, map: Tensor, reach: int = 1) -> Tensor:
        """A map [B,C,h,w] with the mean of the running pixels that are `reach` away, or nearer, where none runs; 0 if
        there are none."""
        mask = self.mask(map)
        key = (len(mask[0, 0]), reach)
        there = mask.to(map.dtype)
        if key not in self._around:
            self._around[key] = F.avg_pool2d(there, 2 * reach + 1, 1, reach).clamp(min=1e-6)
        around = F.avg_pool2d(map * there, 2 * reach + 1, 1, reach) / self._around[key]
        return torch.where(mask, map, around)

    def kept(self, new: Tensor, before: Tensor | None) -> Tensor:
        """What the next layer reads [B,C,h,w]: `new` where the place runs, what was there before where it has left;
        None is zeros."""
        return torch.where(self.mask(new), new, new.new_zeros(()) if before is None else before)


def enlarge(places: Tensor, factor: int, size: Sequence[int]) -> Tensor:
    """A value for each place [...,hb,wb] as one for each pixel of a map [...,h,w], of which a place has factor x
    factor; the last places may be smaller."""
    pixels = places.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    return pixels[..., : size[0], : size[1]]
