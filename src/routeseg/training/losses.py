"""What may be changed in the loss of a pixel, beside the weights of classes: hard pixels alone, and Dice.

Legend: B images, K classes, H, W crop size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from routeseg.labels import IGNORE


@torch.no_grad()
def hardest(logits: Tensor, labels: Tensor, share: float) -> Tensor:
    """1 for this share of the labelled pixels [B,H,W], those with the highest cross-entropy, and 0 for the others:
    online hard example mining (Shrivastava et al. 2016), over the batch. Pixels at the threshold all count.

    logits [B,K,H,W], labels [B,H,W]; share 0..1.
    """
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    known = losses[labels != IGNORE]
    if not known.numel():
        return torch.zeros_like(losses)
    kept = max(1, round(share * known.numel()))
    threshold = known.kthvalue(known.numel() - kept + 1).values
    return (losses >= threshold).to(losses.dtype)


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - Dice of logits [B,K,H,W] and labels [B,H,W], the mean over the classes that an image has, then over images
    (kornia's; Milletari et al. 2016)."""
    from kornia.losses import dice_loss as loss

    return loss(logits, labels.long(), average="macro", ignore_index=IGNORE)
