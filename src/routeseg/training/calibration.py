"""Calibration of a network with exits (model/exits.py): what each exit expects, and what a budget costs.

What an exit expects is the loss in mIoU, since that is what a network is judged by (`AllExits.lost`): an image of rare
classes may lose more by leaving early than one of which half the pixels are wrong.

Predictions are a ridge regression, whose strength the left-out pictures decide. The table of prices comes from other
pictures, which the network was not trained on and whose labels are not read: of those that it knows it is surer than of
new ones, which would cost more than was asked.

Legend: N pictures, K exits, F features of a glance, T prices of the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from routeseg.collectives import gather
from routeseg.cost.macs import exit_costs
from routeseg.data.subset import LEAST_PICTURES
from routeseg.evaluation.choice import LARGEST_PRICE, AllExits, price_between, score_exits
from routeseg.model.exits import TABLE, Exits
from routeseg.model.grid import RoutedNetwork

RIDGES = 10.0 ** np.arange(-2, 7)  # strengths, for standardised features
LEAST_SPREAD = 1e-2  # of a feature over the pictures, as a share of the largest: a class that hardly occurs
ROUNDING = 1e-9  # of a mean


@torch.no_grad()
def calibrate(
    model: RoutedNetwork,
    batches: Iterable[dict[str, Any]],
    others: Iterable[dict[str, Any]],
    on_batch: Callable[[], None] = lambda: None,
    least: int = LEAST_PICTURES,
) -> int:
    """Fits the exits of a network to pictures with labels: batches of image [B,3,H,W] and labels [B,H,W]; and its
    budgets to other pictures, of which only image is read. `on_batch` is called for each batch.

    In a job of several processes each brings its share, and all get the same. Returns the number of pictures with
    labels. Raises ValueError for a network without exits, and for fewer than `least` pictures.
    """
    exits = model.exits
    if exits is None:
        raise ValueError("the network has no exits, so there is nothing to calibrate: train one with --model.exits")
    was_training = model.training
    model.eval()
    found = copy.deepcopy(exits)  # all of it is new, or nothing
    try:
        count = _fit(model, found, readable(batches, on_batch), least)
        _set_budgets(model, found, readable(others, on_batch), least)
    finally:
        model.train(was_training)
    for own, new in zip(exits.calibration(), found.calibration(), strict=True):
        own.copy_(new)
    return count


def _fit(model: RoutedNetwork, exits: Exits, batches: Iterable[dict[str, Any]], least: int) -> int:
    """Sets what each exit expects; the number of pictures with labels."""
    seen: list[tuple[list[np.ndarray], AllExits]] = []
    for batch in batches:
        result, kept = model.all_exits(batch["image"].to(exits.costs.device))
        glances = [exits.glance(exit, maps).double().cpu().numpy() for exit, maps in enumerate(kept)]
        scores = score_exits(result, batch["labels"].to(exits.costs.device))
        known = np.flatnonzero(scores.either.any(axis=(1, 2)))  # pictures with labels
        seen.append(([features[known] for features in glances], scores.chosen(known)))
    seen = [one for share in gather(seen) for one in share]
    count = sum(len(scores.both) for _, scores in seen)
    check_enough_pictures(count, least)
    losses = AllExits.joined([scores for _, scores in seen]).lost()
    for exit, gate in enumerate(exits.gates):
        center, weight = ridge(np.concatenate([glances[exit] for glances, _ in seen]), losses[:, exit:])
        for name, value in (("center", center), ("weight", weight), ("bias", losses[:, exit:].mean(0))):
            getattr(gate, name).copy_(torch.from_numpy(value))
    return count


def _set_budgets(model: RoutedNetwork, exits: Exits, batches: Iterable[dict[str, Any]], least: int) -> None:
    """Sets costs, prices and frequencies by what the exits expect of pictures."""
    predicted, size = [], (0, 0)
    for batch in batches:
        size = (batch["image"].shape[-2], batch["image"].shape[-1])
        kept = model.exit_features(batch["image"].to(exits.costs.device))
        predicted.append([exits.expected(exit, maps).double().cpu().numpy() for exit, maps in enumerate(kept)])
    shares = gather((predicted, size))
    predicted, size = [one for share, _ in shares for one in share], max(size for _, size in shares)
    check_enough_pictures(sum(len(one[-1]) for one in predicted), least, "pictures to set budgets with")
    costs = exit_costs(model, size)
    costs /= costs[-1]
    prices, frequencies = price_table([np.concatenate(of_exit) for of_exit in zip(*predicted, strict=True)], costs)
    for buffer, values in ((exits.costs, costs), (exits.prices, prices), (exits.frequencies, frequencies)):
        buffer.copy_(torch.from_numpy(values))


def check_enough_pictures(count: int, least: int, kind: str = "pictures with labels") -> None:
    """Raises ValueError if there are too few pictures for a calibration."""
    if count < least:
        raise ValueError(f"{count} {kind} are too few to calibrate a network with exits: give {least} or more")


def readable(batches: Iterable[dict[str, Any]], on_batch: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """The batches whose images could be read; `on_batch` is called for each."""
    for batch in batches:
        on_batch()
        if not torch.as_tensor(batch["skipped"]).any():
            yield batch


def ridge(features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A ridge regression of targets [N,J] on features [N,F]: the features' centre [F], and weights [J,F].

    The strength is the one of RIDGES that predicts best each picture that is left out.
    """
    center, spread = features.mean(0), features.std(0)
    alive = spread > LEAST_SPREAD * spread.max()  # what hardly changes tells nothing
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=alive)
    mean = targets.mean(0)
    left, singular, right = np.linalg.svd((features - center) * scale, full_matrices=False)
    along = left.T @ (targets - mean)
    best: tuple[float, float] | None = None
    for strength in RIDGES:
        share = singular**2 / (singular**2 + strength)
        leverage = (left**2 @ share)[:, None]  # the mean stays: else predictions would vary where features tell nothing
        predicted = mean + left @ (share[:, None] * along)
        error = float((((targets - predicted) / np.maximum(1 - leverage, 1e-6)) ** 2).mean())  # of those left out
        if best is None or error < best[0]:
            best = (error, strength)
    assert best is not None
    weights = right.T @ ((singular / (singular**2 + best[1]))[:, None] * along)
    return center, (weights * scale[:, None]).T


def choose(predicted: list[np.ndarray], costs: np.ndarray, price: float) -> np.ndarray:
    """The exits [N] at which pictures leave at a price, given the losses [N,K-k] predicted at each exit k < K-1."""
    at = np.full(len(predicted[0]), len(predicted))
    for exit in reversed(range(len(predicted))):
        total = predicted[exit] + price * costs[exit:]
        at[total[:, 0] <= total[:, 1:].min(axis=1)] = exit
    return at


def price_table(predicted: list[np.ndarray], costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prices [T], ascending, and how often pictures leave at each exit, [T,K].

    Their mean costs are evenly spaced from the dearest route to the cheapest. The first and the last price are beyond
    all others: there every picture, also a new one, takes the dearest route or the cheapest.
    """

    def mean(price: float) -> float:
        return float(costs[choose(predicted, costs, price)].mean())

    targets = np.linspace(costs[-1], costs[0], TABLE - 2)
    first, _ = price_between(mean, targets[0] * (1 - ROUNDING))  # the last price at which all take the dearest route
    others = [price_between(mean, target)[1] for target in targets[1:]]
    ascending = np.array([-LARGEST_PRICE, first, *others, LARGEST_PRICE])
    frequencies = [
        np.bincount(choose(predicted, costs, price), minlength=len(costs)) / len(predicted[0]) for price in ascending
    ]
    return ascending, np.array(frequencies)
