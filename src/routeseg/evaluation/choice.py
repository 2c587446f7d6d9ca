"""What the choice of exits is worth: the same network at the same cost, once as its images choose and once not.

own        each picture leaves where it decides to
shuffled   each picture leaves where another one does: the mean over permutations
common     all pictures leave at one exit, or at one of two neighbours by chance: the line between their scores
oracle     each picture leaves where its own cross-entropy, plus a price for cost, is least. It needs the labels, and
           says what a better choice could reach

Legend: N pictures, K exits, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from routeseg.evaluation.scores import count_pairs
from routeseg.labels import IGNORE
from routeseg.model import DynamicRoutingNetwork, Segmentation
from routeseg.model.request import exit_of
from routeseg.space import Route

SHUFFLES = 50
LARGEST_PRICE = 1e4  # beyond it nothing is left to choose: cross-entropies are small numbers
HALVINGS = 60


@dataclass(frozen=True)
class AllExits:
    """What every exit makes of pictures: confusion matrices [N,K,C,C], and mean cross-entropies [N,K]; nan for a
    picture without labels."""

    confusion: np.ndarray
    loss: np.ndarray


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
    model: DynamicRoutingNetwork, pictures: Iterable[dict[str, Any]], on_picture: Callable[[], None] = lambda: None
) -> AllExits:
    """Runs a network with exits over pictures (as `evaluation_loader` gives them), once as far as each exit."""
    device, classes = next(model.parameters()).device, model.config.num_classes
    confusion, losses = [], []
    was_training = model.training
    model.eval()
    for picture in pictures:
        on_picture()
        if picture["skipped"]:
            continue
        labels = picture["labels"].to(device)
        result, _ = model.all_exits(picture["image"].to(device))
        logits = [*result.earlier, result.logits]
        confusion.append([count_pairs(labels, one.argmax(1), classes).cpu().numpy() for one in logits])
        losses.append(losses_of(result, labels)[0])
    model.train(was_training)
    return AllExits(np.array(confusion), np.array(losses))


def losses_of(result: Segmentation, labels: Tensor) -> np.ndarray:
    """The mean cross-entropy of images at each exit, given what `all_exits` gives and labels [B,H,W]: float64 [B,K],
    nan without labels."""
    losses = []
    for logits in (*result.earlier, result.logits):
        pixels = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none").flatten(1).double()
        losses.append(pixels.sum(1) / (labels != IGNORE).flatten(1).sum(1))
    return torch.stack(losses, dim=1).cpu().numpy()


def exits_of(model: DynamicRoutingNetwork, gates: np.ndarray) -> np.ndarray:
    """The exits [N] at which pictures left, from their gates [N,L+1,S,3]."""
    return np.array([exit_of(model.config, Route.from_gates(model.space, one)) for one in gates])


def worth_of_choice(seen: AllExits, exits: np.ndarray, costs: np.ndarray, seed: int = 0) -> Worth:
    """What leaving at these exits [N] is worth; `costs` [K] of the routes, ascending, are shares of the full
    network's."""
    rng, count = np.random.default_rng(seed), len(exits)
    spent = float(costs[exits].mean())
    fixed = [mean_iou(seen.confusion, np.full(count, exit)) for exit in range(len(costs))]
    return Worth(
        spent,
        mean_iou(seen.confusion, exits),
        float(np.mean([mean_iou(seen.confusion, rng.permutation(exits)) for _ in range(SHUFFLES)])),
        float(np.interp(spent, costs, fixed)),
        mean_iou(seen.confusion, oracle(seen.loss, costs, spent)),
    )


def mean_iou(confusion: np.ndarray, exits: np.ndarray) -> float:
    """mIoU when each picture leaves at its exit [N]; confusion matrices [N,K,C,C]."""
    total = confusion[np.arange(len(exits)), exits].sum(0)
    both = np.diag(total)
    either = total.sum(0) + total.sum(1) - both
    return float((both[either > 0] / either[either > 0]).mean())


def oracle(loss: np.ndarray, costs: np.ndarray, cost: float) -> np.ndarray:
    """The exits [N] of least cross-entropy and price, at the price at which they cost so much in the mean."""

    def exits(price: float) -> np.ndarray:
        return (loss + price * costs).argmin(1)

    return exits(price_between(lambda price: float(costs[exits(price)].mean()), cost)[1])


def price_between(spent: Callable[[float], float], cost: float) -> tuple[float, float]:
    """Two neighbouring prices: at the lower one more than the cost is spent, at the higher one no more. What is `spent`
    falls with the price."""
    low, high = -LARGEST_PRICE, LARGEST_PRICE
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > cost else (low, middle)
    return low, high
