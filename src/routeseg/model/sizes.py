"""Sizes: how closely an image is looked at. A smaller image costs less with all layers, and a larger one may show more.

Legend: B images, K classes, H, W size of the image, h, w the size at which it is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from routeseg.model.decoder import Segmentation
from routeseg.space import seen_size


def look(images: Tensor, size: float, run: Callable[[Tensor], Segmentation]) -> Segmentation:
    """What `run` makes of images [B,3,H,W] whose sides are `size` times as long, with logits [B,K,H,W]."""
    own = (images.shape[-2], images.shape[-1])
    if (seen := seen_size(own, size)) == own:
        return run(images)
    found = run(resized(images, seen))
    logits, *earlier = (
        F.interpolate(one, own, mode="bilinear", align_corners=False) for one in (found.logits, *found.earlier)
    )
    return replace(found, logits=logits, earlier=tuple(earlier), seen=seen)


def resized(images: Tensor, seen: tuple[int, int]) -> Tensor:
    """Images [B,3,H,W], uint8 or floating point, of another size [B,3,h,w]: bilinear, over all pixels that a smaller
    one stands for."""
    if images.dtype == torch.uint8:
        images = images.float() / 255
    return F.interpolate(images, seen, mode="bilinear", align_corners=False, antialias=True)
