"""What the choice of exits is worth: the same network at the same cost, once as its images choose and once not.

own        each image leaves where it decides to
shuffled   each image leaves where another one does: the mean over permutations
common     all images leave at one exit, or at one of two neighbours by chance: the line between their scores
oracle     each image leaves where what it really loses (`AllExits.lost`), plus a price for cost, is least. It needs
           the labels, and says what a better choice could reach

Legend: N images, K exits, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routeseg.evaluation.scores import count_pairs
from routeseg.model import DynamicRoutingNetwork, Segmentation
from routeseg.model.decoder import most_likely
from routeseg.model.request import exit_of
from routeseg.space import Route

SHUFFLES = 50
LARGEST_PRICE = 1e6  # beyond it nothing is left to choose: an image loses no more than there are images
HALVINGS = 60


@dataclass(frozen=True)
class AllExits:
    """What every exit makes of images, in pixels of each class, int64 [N,K,C].

    both    of the class by the labels and by the exit: the intersection
    either  by the labels or by the exit: the union
    labels  by the labels, [N,C]: only classes that labels have count (`Evaluation.iou`)
    """

    both: np.ndarray
    either: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, confusion: np.ndarray) -> AllExits:
        """From confusion matrices [N,K,C,C]."""
        both = np.diagonal(confusion, axis1=2, axis2=3)
        return cls(both, confusion.sum(2) + confusion.sum(3) - both, confusion[:, 0].sum(2))

    @classmethod
    def joined(cls, parts: Sequence[AllExits]) -> AllExits:
        """Those of all parts, one after the other."""
        both, either, labels = zip(*((part.both, part.either, part.labels) for part in parts), strict=True)
        return cls(np.concatenate(both), np.concatenate(either), np.concatenate(labels))

    def chosen(self, images: np.ndarray) -> AllExits:
        """Those of some images, a mask or indices."""
        return AllExits(self.both[images], self.either[images], self.labels[images])

    def lost(self) -> np.ndarray:
        """What each image takes away from the mIoU at each exit, float64 [N,K]: the change in the set's mIoU if this
        image alone leaves there, and all others at the middle exit. It is scaled such that the mean over many
        images that differ little is the difference of the set's mIoU at the middle exit to that at this one.
        """
        middle = self.both.shape[1] // 2
        there = self.labels.any(axis=0)
        both, either = self.both[..., there], self.either[..., there]
        total, among = both[:, middle].sum(0), either[:, middle].sum(0)
        swapped = total + both - both[:, middle, None], among + either - either[:, middle, None]
        return -len(both) * (swapped[0] / swapped[1] - total / among).mean(-1)


@dataclass(frozen=True)
class Worth:
    """mIoU of each way to choose, at the mean cost `spent`, a share of the full network's."""

    spent: float
    own: float
    shuffled: float
    common: float
    oracle: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"mIoU at {100 * self.spent:.1f} % of the cost: {100 * self.own:.1f} % as images choose, "
            f"{100 * self.shuffled:.1f} % with each other's exits, {100 * self.common:.1f} % with common ones, "
            f"{100 * self.oracle:.1f} % if the labels chose"
        )


@torch.no_grad()
def look_at_exits(
    model: DynamicRoutingNetwork, images: Iterable[dict[str, Any]], on_image: Callable[[], None] = lambda: None
) -> AllExits:
    """Runs a network with exits over images (as `evaluation_loader` gives them), once as far as each exit."""
    device = next(model.parameters()).device
    seen = []
    was_training = model.training
    model.eval()
    for image in images:
        on_image()
        if image["skipped"]:
            continue
        seen.append(score_exits(model.all_exits(image["image"].to(device))[0], image["labels"].to(device)))
    model.train(was_training)
    return AllExits.joined(seen)


def score_exits(result: Segmentation, labels: Tensor) -> AllExits:
    """What every exit makes of images, given what `all_exits` gives and labels [B,H,W]."""
    found = [most_likely(logits) for logits in (*result.earlier, result.logits)]
    classes = result.logits.shape[1]
    confusion = [[count_pairs(labels[i], one[i], classes).cpu().numpy() for one in found] for i in range(len(labels))]
    return AllExits.of(np.array(confusion))


def exits_of(model: DynamicRoutingNetwork, gates: np.ndarray) -> np.ndarray:
    """The exits [N] at which images left, from their gates [N,L+1,S,3]."""
    return np.array([exit_of(model.config, Route.from_gates(model.space, one)) for one in gates])


def worth_of_choice(seen: AllExits, exits: np.ndarray, costs: np.ndarray, seed: int = 0) -> Worth:
    """What leaving at these exits [N] is worth; `costs` of the routes, ascending, are shares of the full network's:
    [K], or [N,K] if images have several sizes."""
    rng, count = np.random.default_rng(seed), len(exits)
    costs = np.broadcast_to(costs, (count, costs.shape[-1]))
    spent = float(costs[np.arange(count), exits].mean())
    fixed = [mean_iou(seen, np.full(count, exit)) for exit in range(costs.shape[1])]
    return Worth(
        spent,
        mean_iou(seen, exits),
        float(np.mean([mean_iou(seen, rng.permutation(exits)) for _ in range(SHUFFLES)])),
        float(np.interp(spent, costs.mean(0), fixed)),
        mean_iou(seen, oracle(seen.lost(), costs, spent)),
    )


def mean_iou(seen: AllExits, exits: np.ndarray) -> float:
    """mIoU when each image leaves at its exit [N]."""
    both, either = (pixels[np.arange(len(exits)), exits].sum(0) for pixels in (seen.both, seen.either))
    there = seen.labels.any(axis=0)
    return float((both[there] / either[there]).mean())


def oracle(lost: np.ndarray, costs: np.ndarray, cost: float) -> np.ndarray:
    """The exits [N] of least loss [N,K] and price, at the price at which they cost so much in the mean; `costs` are
    [K] or [N,K]."""
    costs = np.broadcast_to(costs, lost.shape)

    def exits(price: float) -> np.ndarray:
        return (lost + price * costs).argmin(1)

    return exits(price_between(lambda price: float(costs[np.arange(len(lost)), exits(price)].mean()), cost)[1])


def price_between(spent: Callable[[float], float], cost: float) -> tuple[float, float]:
    """Two neighbouring prices: at the lower one more than the cost is spent, at the higher one no more. What is `spent`
    falls with the price."""
    low, high = -LARGEST_PRICE, LARGEST_PRICE
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > cost else (low, middle)
    return low, high
