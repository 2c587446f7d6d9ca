"""Calibration of a network with exits (model/exits.py): what decides there, and what a budget costs.

What a rule is fitted to is the loss in mIoU, since that is what a network is judged by (`AllExits.lost`): an image of
rare classes may lose more by leaving early than one of which half the pixels are wrong.

The table of prices comes from other images, which the network was not trained on and whose labels are not read:
networks are overconfident on training images, so that new ones would cost more than was asked.

Legend: N images, K exits, F features of a glance, T prices of the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routeseg.budgets.worth import LARGEST_PRICE, AllExits, price_between, score_exits
from routeseg.collectives import gather
from routeseg.cost.macs import exit_costs, model_cost
from routeseg.data.subset import LEAST_IMAGES
from routeseg.model.exits import TABLE, Exits
from routeseg.model.grid import RoutedNetwork

WATCHED, LEAST_PRICE = 12, 1e-7  # prices at which places are watched; the least of them
WALKED = 40  # images at least in which they are, if there are so many
ROUNDING = 1e-9  # of a mean


@torch.no_grad()
def calibrate(
    model: RoutedNetwork,
    batches: Iterable[dict[str, Any]],
    others: Iterable[dict[str, Any]],
    on_batch: Callable[[], None] = lambda: None,
    least: int = LEAST_IMAGES,
) -> int:
    """Fits the exits of a network to images with labels: batches of image [B,3,H,W] and labels [B,H,W]; and its
    budgets to other images, of which only image is read. `on_batch` is called for each batch.

    In a job of several processes each brings its share, and all get the same. Returns the number of images with
    labels. Raises ValueError for a network without exits, and for fewer than `least` images.
    """
    exits = model.exits
    if exits is None:
        raise ValueError("the network has no exits, so there is nothing to calibrate: train one with --model.exits")
    was_training = model.training
    model.eval()
    found = copy.deepcopy(exits)  # all of it is new, or nothing
    try:
        count = _fit(model, found, readable(batches, on_batch), least)
        _set_budgets(model, found, lambda: readable(others, on_batch), least)
    finally:
        model.train(was_training)
    for own, new in zip(exits.calibration(), found.calibration(), strict=True):
        own.copy_(new)
    return count


def _fit(model: RoutedNetwork, exits: Exits, batches: Iterable[dict[str, Any]], least: int) -> int:
    """Fits the rule to images with labels, if there is anything to fit; the number of them."""
    if not exits.gates.fits:
        return 0
    seen: list[tuple[list[np.ndarray], AllExits]] = []
    for batch in batches:
        result, kept = model.all_exits(batch["image"].to(exits.costs.device))
        glances = [exits.see(exit, maps).double().cpu().numpy() for exit, maps in enumerate(kept)]
        scores = score_exits(result, batch["labels"].to(exits.costs.device))
        known = np.flatnonzero(scores.either.any(axis=(1, 2)))  # images with labels
        seen.append(([features[known] for features in glances], scores.chosen(known)))
    seen = [one for share in gather(seen) for one in share]
    count = sum(len(scores.both) for _, scores in seen)
    check_enough_images(count, least)
    losses = AllExits.joined([scores for _, scores in seen]).lost()
    exits.gates.fit([np.concatenate([glances[k] for glances, _ in seen]) for k in range(len(exits.decoders))], losses)
    return count


def _set_budgets(
    model: RoutedNetwork, exits: Exits, images: Callable[[], Iterator[dict[str, Any]]], least: int
) -> None:
    """Sets costs, prices and frequencies by where images leave, or their places."""
    seen, size = [], (0, 0)
    for batch in images():
        size = (batch["image"].shape[-2], batch["image"].shape[-1])
        kept = model.exit_features(batch["image"].to(exits.costs.device))
        seen.append([exits.see(exit, maps).cpu().numpy() for exit, maps in enumerate(kept)])
    own, shares = seen, gather((seen, size))
    seen, size = [one for share, _ in shares for one in share], max(size for _, size in shares)
    check_enough_images(sum(len(one[-1]) for one in seen), least, "images to set budgets with")
    costs = exit_costs(model, size) / model_cost(model, size).full
    if exits.place is not None:
        seen = [[values.ravel() for values in one] for one in seen]
    glances = [torch.from_numpy(np.concatenate(of_exit)) for of_exit in zip(*seen, strict=True)]
    table = price_table(lambda price: choose(exits, glances, costs, price), costs)
    if exits.place is not None:
        table = _walked(model, exits, images, table[0], costs, max(1, len(own) // WALKED))
    for buffer, values in zip((exits.costs, exits.prices, exits.frequencies), (costs, *table), strict=True):
        buffer.copy_(torch.from_numpy(values))


def _walked(
    model: RoutedNetwork,
    exits: Exits,
    images: Callable[[], Iterator[dict[str, Any]]],
    prices: np.ndarray,
    costs: np.ndarray,
    every: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The table of `price_table` for places. Those that have left change what the others see, so that one image of
    `every` so many runs at WATCHED of the prices [T], and frequencies between these are interpolated."""
    inner = prices[1:-1]
    watched = np.unique(np.maximum(inner[np.linspace(0, len(inner) - 1, WATCHED).astype(int)], LEAST_PRICE))
    found = []
    for number, batch in enumerate(images()):
        for price in watched if number % every == 0 else ():
            left = model(batch["image"].to(exits.costs.device), price=price).exits
            assert left is not None
            found.append(np.bincount(left.flatten().cpu().numpy(), minlength=len(exits.layers)) / left.numel())
    shares = gather(found)
    found = [one for share in shares for one in share]
    frequencies = np.array(found).reshape(-1, len(watched), len(costs)).mean(0)
    for row in range(1, len(watched)):  # chance may let a higher price cost more
        if frequencies[row] @ costs > frequencies[row - 1] @ costs:
            frequencies[row] = frequencies[row - 1]
    rows, steps = np.linspace(0, len(watched) - 1, TABLE - 2), np.arange(len(watched))
    between = np.stack([np.interp(rows, steps, column) for column in frequencies.T], axis=1)
    ends = np.eye(len(costs))[[-1, 0]]
    geometric = np.exp(np.interp(rows, steps, np.log(watched)))
    return np.array([0.0, *geometric, LARGEST_PRICE]), np.concatenate([ends[:1], between, ends[1:]])


def check_enough_images(count: int, least: int, kind: str = "images with labels") -> None:
    """Raises ValueError if there are too few images for a calibration."""
    if count < least:
        raise ValueError(f"{count} {kind} are too few to calibrate a network with exits: give {least} or more")


def readable(batches: Iterable[dict[str, Any]], on_batch: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """The batches whose images could be read; `on_batch` is called for each."""
    for batch in batches:
        on_batch()
        if not torch.as_tensor(batch["skipped"]).any():
            yield batch


def choose(exits: Exits, seen: Sequence[Tensor], costs: np.ndarray, price: float) -> np.ndarray:
    """The exits [N] at which images leave at a price, given what decides [N,...] at each exit k < K-1."""
    at, asked = np.full(len(seen[0]), len(seen)), torch.full((len(seen[0]),), price)
    for exit in reversed(range(len(seen))):
        at[exits.gates.leaves(exit, seen[exit], asked, torch.from_numpy(costs)).numpy()] = exit
    return at


def price_table(at: Callable[[float], np.ndarray], costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prices [T], ascending, and how often images leave at each exit, [T,K], given the exits [N] at a price.

    Their mean costs are evenly spaced from the dearest route to the cheapest. The first and the last price are beyond
    all others: there every image, also a new one, takes the dearest route or the cheapest.
    """
    at = cache(at)  # searches begin at the same prices

    def mean(price: float) -> float:
        return float(costs[at(price)].mean())

    targets = np.linspace(costs[-1], costs[0], TABLE - 2)
    first, _ = price_between(mean, targets[0] * (1 - ROUNDING))  # the last price at which all take the dearest route
    others = [price_between(mean, target)[1] for target in targets[1:]]
    ascending = np.array([-LARGEST_PRICE, first, *others, LARGEST_PRICE])
    found = [at(price) for price in ascending]
    return ascending, np.array([np.bincount(exits, minlength=len(costs)) / len(exits) for exits in found])
