"""The gates (Sec. 3.2, Eq. 2-4): one activation per direction, per image. The paper's is the soft conditional gate;
"softmax", where one path wins, is the alternative that its ablation argues against.

Legend: B images, C channels, h, w the size of a feature map, D legal directions of the node (1 to 3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routeseg.model.layers import conv_norm
from routeseg.space import SMALL_GATE_FACTOR

GATE_BIAS = 1.5  # tanh(1.5) = 0.905: every path starts open


class Gate(nn.Module):
    """Features [B,C,h,w] -> activations alpha [B,D] in [0,1).

    activation  "soft" or "softmax", see ACTIVATIONS
    small       X is first resized by 1/4 (bilinear), so that the gate costs a sixteenth
    """

    def __init__(self, channels: int, num_directions: int, activation: str = "soft", small: bool = False) -> None:
        super().__init__()
        self.activation, self.small = activation, small
        self.squeeze = conv_norm(channels, channels // 2)
        self.score = nn.Linear(channels // 2, num_directions)
        nn.init.constant_(self.score.bias, GATE_BIAS)

    def forward(self, features: Tensor) -> Tensor:
        if self.small:
            features = shrink(features)
        hidden = self.squeeze(features)
        scores = self.score(hidden.mean(dim=(2, 3)))  # Eq. 2-3: [B,C/2] -> [B,D]
        return activate(scores, self.activation)


def activate(scores: Tensor, activation: str) -> Tensor:
    """Activations in [0,1) of scores [B,D], float32; a score of -infinity closes a path."""
    return ACTIVATIONS[activation](scores.float()).clamp(max=1.0 - torch.finfo(torch.float32).eps)


def soft_gate(scores: Tensor) -> Tensor:
    """Eq. 4: max(0, tanh(G)) of scores [B,D]; directions are independent of each other, several or none may be open."""
    return torch.tanh(scores).clamp(min=0.0)


def softmax_gate(scores: Tensor) -> Tensor:
    """Softmax over the directions [B,D], of which only the largest stays open: one path leaves the node, and no cell is
    ever dropped."""
    alpha = torch.softmax(scores, dim=1)
    winner = F.one_hot(alpha.argmax(dim=1), alpha.shape[1])
    return alpha * winner


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"soft": soft_gate, "softmax": softmax_gate}


def shrink(features: Tensor) -> Tensor:
    """Bilinear resizing to a quarter, at least one pixel: [B,C,h,w] -> [B,C,h/4,w/4]."""
    h, w = features.shape[-2:]
    if min(h, w) >= SMALL_GATE_FACTOR:  # the step is 4 pixels also where 4 does not divide the size
        return F.interpolate(features, scale_factor=1 / SMALL_GATE_FACTOR, mode="bilinear", align_corners=False)
    return F.interpolate(features, size=shrunk_size(h, w)[:2], mode="bilinear", align_corners=False)


def shrunk_size(h: int, w: int) -> tuple[int, int, float, float]:
    """The size that `shrink` makes of h x w, and its steps: pixels from one output row to the next, and column."""
    small = [max(1, side // SMALL_GATE_FACTOR) for side in (h, w)]
    whole = min(h, w) >= SMALL_GATE_FACTOR
    steps = [SMALL_GATE_FACTOR if whole else side / out for side, out in zip((h, w), small, strict=True)]
    return small[0], small[1], steps[0], steps[1]
