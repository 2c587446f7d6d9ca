"""The budget: the cost that gates learn to respect (Sec. 3.3, Eq. 9-10).

Legend: B images.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # No `annotations` from __future__ in this file: to read the types of `Budget`, jsonargparse would import torch.
    from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """The cost that the gates learn to respect (Eq. 9-10), as in Dynamic-A: weight 0.8, target 0.1.

    weight  lambda_2; 0 is no budget (Dynamic-Raw)
    target  mu, the share of the space's cells and transforms to spend, as EXPECTED cost
    start   share of the training after which the budget starts
    ramp    share of the training over which it then grows to its full weight
    """

    weight: float = 0.0
    target: float = 0.1
    start: float = 0.4
    ramp: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"budget weight is {self.weight}: it must be a number of at least 0 (0 is no budget)")
        for name, value in (("target", self.target), ("start", self.start), ("ramp", self.ramp)):
            if not 0 <= value <= 1:
                raise ValueError(f"budget {name} is {value}: it is a share, from 0 to 1")

    def weight_at(self, progress: float) -> float:
        """lambda_2 when this share of the training (0..1) is done."""
        if progress < self.start:
            return 0.0
        return self.weight * min(1.0, (progress - self.start) / self.ramp) if self.ramp > 0 else self.weight


def budget_loss(expected_macs: "Tensor", full_macs: float, target: float) -> "Tensor":
    """Eq. 9: (mean expected cost of the images [B] / full cost - target)^2, a scalar."""
    return (expected_macs.mean() / full_macs - target) ** 2
