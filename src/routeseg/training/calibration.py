"""Calibration of a network with exits (model/exits.py): what each exit expects, and what a budget costs.

Predictions are a ridge regression, whose strength the left-out pictures decide. The table of prices is made with the
predictions for left-out pictures, too, as new pictures will have them.

Legend: N pictures, K exits, F pooled features, T prices of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routeseg.collectives import gather
from routeseg.cost.macs import exit_costs
from routeseg.evaluation.choice import LARGEST_PRICE, losses_of, price_between
from routeseg.model.exits import TABLE, Exits, pool
from routeseg.model.grid import RoutedNetwork

RIDGES = 10.0 ** np.arange(-2, 7)  # strengths, for standardised features
LEAST_PICTURES = 8
LEAST_SPREAD = 1e-4  # of a feature over the pictures, as a share of the largest
ROUNDING = 1e-9  # of a mean


@torch.no_grad()
def calibrate(
    model: RoutedNetwork, batches: Iterable[dict[str, Any]], on_batch: Callable[[], None] = lambda: None
) -> int:
    """Fits the exits of a network to pictures with labels: batches of image [B,3,H,W] and labels [B,H,W]. `on_batch` is
    called after each.

    In a job of several processes each brings its share, and all get the same. Returns the number of pictures.
    Raises ValueError for a network without exits, and for too few pictures.
    """
    exits = model.exits
    if exits is None:
        raise ValueError("the network has no exits, so there is nothing to calibrate: train one with --model.exits")
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    seen: list[tuple[list[np.ndarray], np.ndarray]] = []
    size = (0, 0)
    for batch in batches:
        on_batch()
        if torch.as_tensor(batch["skipped"]).any():
            continue
        size = (batch["image"].shape[-2], batch["image"].shape[-1])
        seen.append(_look(model, exits, batch["image"].to(device), batch["labels"].to(device)))
    model.train(was_training)
    shares = gather((seen, size))
    seen, size = [one for share, _ in shares for one in share], max(size for _, size in shares)
    losses = np.concatenate([loss for _, loss in seen]) if seen else np.zeros((0, len(exits.layers)))
    known = np.isfinite(losses).all(axis=1)
    losses = losses[known]
    check_enough_pictures(len(losses))
    left_out = []
    for exit in range(len(exits.gates)):
        pooled = np.concatenate([features[exit] for features, _ in seen])[known]
        center, weight, predicted = ridge(pooled, losses[:, exit:])
        gate = exits.gates[exit]
        for name, value in (("center", center), ("weight", weight), ("bias", losses[:, exit:].mean(0))):
            getattr(gate, name).copy_(torch.from_numpy(value))
        left_out.append(predicted)
    costs = exit_costs(model, size)
    costs /= costs[-1]
    prices, frequencies = price_table(left_out, costs)
    for buffer, values in ((exits.costs, costs), (exits.prices, prices), (exits.frequencies, frequencies)):
        buffer.copy_(torch.from_numpy(values))
    return len(losses)


def check_enough_pictures(count: int) -> None:
    """Raises ValueError if there are too few pictures with labels for a calibration."""
    if count < LEAST_PICTURES:
        raise ValueError(
            f"{count} pictures with labels are too few to calibrate a network with exits: give {LEAST_PICTURES} or more"
        )


def _look(model: RoutedNetwork, exits: Exits, images: Tensor, labels: Tensor) -> tuple[list[np.ndarray], np.ndarray]:
    """Pooled features at each exit but the last, [B,F], and the mean cross-entropy of each exit [B,K] (nan without
    labels), float64."""
    result, kept = model.all_exits(images)
    features = [pool([map for map in maps if map is not None]).double().cpu().numpy() for maps in kept]
    return features, losses_of(result, labels)


def ridge(features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A ridge regression of targets [N,J] on features [N,F]: the features' centre [F], weights [J,F], and the targets
    as they are predicted when the weights leave the picture itself out, [N,J].

    The strength is the one of RIDGES that predicts left-out pictures best.
    """
    center, spread = features.mean(0), features.std(0)
    alive = spread > LEAST_SPREAD * spread.max()  # what hardly changes tells nothing
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=alive)
    mean = targets.mean(0)
    left, singular, right = np.linalg.svd((features - center) * scale, full_matrices=False)
    along = left.T @ (targets - mean)
    best: tuple[float, float, np.ndarray] | None = None
    for strength in RIDGES:
        share = singular**2 / (singular**2 + strength)
        leverage = (left**2 @ share)[:, None]  # the mean stays: else predictions would vary where features tell nothing
        predicted = mean + left @ (share[:, None] * along)
        left_out = targets - (targets - predicted) / np.maximum(1 - leverage, 1e-6)
        error = float(((left_out - targets) ** 2).mean())
        if best is None or error < best[0]:
            best = (error, strength, left_out)
    assert best is not None
    weights = right.T @ ((singular / (singular**2 + best[1]))[:, None] * along)
    return center, (weights * scale[:, None]).T, best[2]


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
