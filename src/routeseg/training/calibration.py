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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routeseg.collectives import gather
from routeseg.cost.macs import exit_costs, model_cost
from routeseg.data.subset import LEAST_PICTURES
from routeseg.evaluation.choice import LARGEST_PRICE, AllExits, price_between, score_exits
from routeseg.model.exits import TABLE, Exits
from routeseg.model.grid import RoutedNetwork

PLACE_PRICES = (1e-7, 1e-5, *np.geomspace(3e-4, 0.9, 12))  # of places, as shares of the entropy of all classes alike
ROUNDING = 1e-9  # of a mean


@torch.no_grad()
def calibrate(
    model: RoutedNetwork,
    batches: Iterable[dict[str, Any]],
    others: Iterable[dict[str, Any]],
    on_batch: Callable[[], None] = lambda: None,
) -> int:
    """Fits the exits of a network to images with labels: batches of image [B,3,H,W] and labels [B,H,W]; and its
    budgets to other images, of which only image is read. `on_batch` is called for each batch.

    In a job of several processes each brings its share, and all get the same. Returns the number of images with
    labels. Raises ValueError for a network without exits, and for too few images.
    """
    exits = model.exits
    if exits is None:
        raise ValueError("the network has no exits, so there is nothing to calibrate: train one with --model.exits")
    was_training = model.training
    model.eval()
    found = copy.deepcopy(exits)  # all of it is new, or nothing
    try:
        count = _fit(model, found, readable(batches, on_batch))
        _set_budgets(model, found, readable(others, on_batch))
    finally:
        model.train(was_training)
    for own, new in zip(exits.calibration(), found.calibration(), strict=True):
        own.copy_(new)
    return count


def _fit(model: RoutedNetwork, exits: Exits, batches: Iterable[dict[str, Any]]) -> int:
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
    check_enough_pictures(count)
    losses = AllExits.joined([scores for _, scores in seen]).lost()
    exits.gates.fit([np.concatenate([glances[k] for glances, _ in seen]) for k in range(len(exits.decoders))], losses)
    return count


def _set_budgets(model: RoutedNetwork, exits: Exits, batches: Iterable[dict[str, Any]]) -> None:
    """Sets costs, prices and frequencies by where images leave."""
    look = _images_leave if exits.place is None else _places_leave
    seen, size = [], (0, 0)
    for batch in batches:
        size = (batch["image"].shape[-2], batch["image"].shape[-1])
        seen.append(look(model, exits, batch["image"].to(exits.costs.device)))
    shares = gather((seen, size))
    seen, size = [one for share, _ in shares for one in share], max(size for _, size in shares)
    check_enough_pictures(sum(len(one[-1]) for one in seen), "images to set budgets with")
    costs = exit_costs(model, size)
    costs /= model_cost(model, size).full
    if exits.place is None:
        glances = [torch.from_numpy(np.concatenate(of_exit)) for of_exit in zip(*seen, strict=True)]
        prices, frequencies = price_table(lambda price: choose(exits, glances, costs, price), costs)
    else:
        prices, frequencies = _between(place_prices(model), np.concatenate(seen).mean(0), costs)
    for buffer, values in ((exits.costs, costs), (exits.prices, prices), (exits.frequencies, frequencies)):
        buffer.copy_(torch.from_numpy(values))


def _images_leave(model: RoutedNetwork, exits: Exits, images: Tensor) -> list[np.ndarray]:
    """What decides about images at each exit but the last, [B,...]: all layers run."""
    return [exits.see(exit, maps).cpu().numpy() for exit, maps in enumerate(model.exit_features(images))]


def _places_leave(model: RoutedNetwork, exits: Exits, images: Tensor) -> np.ndarray:
    """The share of the places of images that leave at each exit at each of `place_prices`: [B,P,K]. Those that have
    left change what the others see, so that there is a forward for each price."""
    found = []
    for price in place_prices(model):
        left = model(images, price=price).exits
        assert left is not None
        counts = [np.bincount(one, minlength=len(exits.layers)) for one in left.flatten(1).cpu().numpy()]
        found.append(np.array(counts) / left[0].numel())
    return np.array(found).swapaxes(0, 1)


def place_prices(model: RoutedNetwork) -> np.ndarray:
    """Prices [P] at which places are watched, ascending; they are entropies."""
    return np.array(PLACE_PRICES) * np.log(model.config.num_classes)


def _between(prices: np.ndarray, frequencies: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A table [T], [T,K] from frequencies [P,K] at prices [P], and beyond them none or all leave at once."""
    for row in range(1, len(frequencies)):  # chance may let a higher price cost more
        if frequencies[row] @ costs > frequencies[row - 1] @ costs:
            frequencies[row] = frequencies[row - 1]
    inner = np.geomspace(prices[0], prices[-1], TABLE - 2)
    rows = np.stack([np.interp(np.log(inner), np.log(prices), column) for column in frequencies.T], axis=1)
    ends = np.eye(len(costs))[[-1, 0]]
    return np.array([0.0, *inner, LARGEST_PRICE]), np.concatenate([ends[:1], rows, ends[1:]])


def check_enough_pictures(count: int, kind: str = "images with labels") -> None:
    """Raises ValueError if there are too few images for a calibration."""
    if count < LEAST_PICTURES:
        raise ValueError(f"{count} {kind} are too few to calibrate a network with exits: give {LEAST_PICTURES} or more")


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

    def mean(price: float) -> float:
        return float(costs[at(price)].mean())

    targets = np.linspace(costs[-1], costs[0], TABLE - 2)
    first, _ = price_between(mean, targets[0] * (1 - ROUNDING))  # the last price at which all take the dearest route
    others = [price_between(mean, target)[1] for target in targets[1:]]
    ascending = np.array([-LARGEST_PRICE, first, *others, LARGEST_PRICE])
    found = [at(price) for price in ascending]
    return ascending, np.array([np.bincount(exits, minlength=len(costs)) / len(exits) for exits in found])
