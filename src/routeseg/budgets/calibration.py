"""Calibration of a network with exits (model/exits.py): what decides there, and what a budget costs.

What a rule is fitted to is the loss in mIoU, since that is what a network is judged by (`AllExits.lost`): an image of
rare classes may lose more by leaving early than one of which half the pixels are wrong.

The table of prices comes from other images, which the network was not trained on and whose labels are not read:
networks are overconfident on training images, so that new ones would cost more than was asked.

Legend: N images, K exits, F features of a glance, T prices of the table.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from routeseg.budgets.worth import LARGEST_PRICE, AllExits, mean_iou, price_between, score_exits
from routeseg.collectives import gather
from routeseg.cost.macs import look_costs, model_cost
from routeseg.data.subset import LEAST_IMAGES
from routeseg.engine import SkipEngine
from routeseg.evaluation.scores import count_pairs
from routeseg.model import DynamicRoutingNetwork
from routeseg.model.choice import EntropyChoice
from routeseg.model.exits import TABLE, Exits, Priced
from routeseg.model.grid import RoutedNetwork
from routeseg.model.prices import PriceTable
from routeseg.model.sizes import look
from routeseg.space import FIRST_LOOK, Size

Network = TypeVar("Network", bound=RoutedNetwork)

WATCHED, LEAST_PRICE = 7, 1e-7  # prices at which places are watched; the least of them
# The same of closer looks, as shares of the largest entropy; at the last one no place is looked at again.
UNSURE = np.array([*np.geomspace(0.01, 2.5, WATCHED + 1), LARGEST_PRICE / 100])
WALKED = 60  # images at least in which they are, if there are so many
LEVELLED = 100  # images at least that tell which size is better
LEAST_SHARE = 0.05  # of a class that hardly occurs, as a share of what it would have if all occurred alike
ROUNDING = 1e-9  # of a mean


@torch.no_grad()
def calibrate(
    model: RoutedNetwork,
    batches: Iterable[dict[str, Any]],
    others: Iterable[dict[str, Any]],
    on_batch: Callable[[], None] = lambda: None,
    least: int = LEAST_IMAGES,
    walked: int = WALKED,
) -> int:
    """Fits the exits of a network to images with labels: batches of image [B,3,H,W] and labels [B,H,W]; and its
    budgets to other images, of which only image is read, unless budgets also choose a size. `on_batch` is
    called for each batch. Of the other images `walked` tell what prices bring, evenly spread.

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
        _set_budgets(model, found, lambda: readable(others, on_batch), least, walked)
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
    model: RoutedNetwork, exits: Exits, images: Callable[[], Iterator[dict[str, Any]]], least: int, walked: int
) -> None:
    """Sets the tables of prices of all sizes by where images leave, or their places."""
    if isinstance(exits.gates, EntropyChoice) and len(exits.sizes) > 1:
        exits.gates.weights.copy_(_class_weights(model.config.num_classes, images()))
    model = _with_exits(model, exits)
    seen, own = [], (0, 0)
    for batch in images():
        own = (batch["image"].shape[-2], batch["image"].shape[-1])
        seen.append(_glances(exits, model.exit_features(batch["image"].to(exits.costs.device))))
    every, shares = max(1, len(seen) // walked), gather((seen, own))
    seen, own = [one for share, _ in shares for one in share], max(size for _, size in shares)
    check_enough_images(sum(len(one[-1]) for one in seen), least, "images to set budgets with")

    def some() -> Iterator[dict[str, Any]]:
        return itertools.islice(images(), 0, None, every)

    of_images = [[_whole(values) for values in one] for one in seen]
    many = max(1, len(seen) // max(LEVELLED, walked))
    levels = _levels(model, exits.sizes, lambda: itertools.islice(images(), 0, None, many))
    for number, size in enumerate(exits.sizes):
        costs = look_costs(model, own, size) / model_cost(model, own).full
        if isinstance(size, tuple):
            watched = UNSURE * np.log(model.config.num_classes)
            table = _walked(model, exits, size, some, watched, costs)
            exits.at(size).table = _levelled(table, levels[number])
            continue
        looked = _looked(model, exits, size, some) if len(exits.sizes) > 1 else []
        whole = of_images if size == 1 else [one for one, _ in looked]
        glances = [np.concatenate(of) for of in zip(*whole, strict=True)]
        found = price_table(exits, glances, costs)
        scores = np.full(len(found[0]), np.nan)
        if looked:
            known = AllExits.joined([one for _, one in looked])
            scored = [np.concatenate(of) for of in zip(*(one for one, _ in looked), strict=True)]
            at = (choose(exits, scored, costs, price) for price in found[0])
            scores = np.array([_miou(known, exit) for exit in at])
        table = _levelled(PriceTable(costs, *found, scores), levels[number])
        if exits.place is None:
            exits.at(size).table = table
            continue
        cast(Priced, exits.wholes[exits.singles.index(size)]).table = table
        # Places that have left change what the others see, so that images run; dense glances tell the prices.
        flat = [np.concatenate([one[exit].ravel() for one in seen]) for exit in range(len(exits.decoders))]
        inner = price_table(exits, flat, costs)[0][1:-1]
        watched = np.unique(np.maximum(inner[np.linspace(0, len(inner) - 1, WATCHED).astype(int)], LEAST_PRICE))
        table = _walked(model, exits, size, some, watched, costs)
        exits.at(size).table = _levelled(table, levels[number])


def _class_weights(classes: int, images: Iterator[dict[str, Any]]) -> Tensor:
    """What a pixel of each class counts [C], 1 in the mean over the pixels: 1 / its share of the labels, since each
    class has the same part in the mIoU. All 1 without labels."""
    counts = np.zeros(classes)
    for batch in images:
        labels = batch["labels"].flatten()
        counts += np.bincount(labels[labels < classes].cpu().numpy(), minlength=classes)
    counts = np.sum(gather(counts), axis=0)
    if not counts.any():
        return torch.ones(classes)
    shares = counts / counts.sum()
    weights = 1 / np.maximum(shares, LEAST_SHARE / classes)
    return torch.from_numpy(weights / (weights @ shares)).float()


def _with_exits(model: RoutedNetwork, exits: Exits) -> RoutedNetwork:
    """The network with other exits; all else is its own."""
    other = copy.copy(model)
    other._modules = {**model._modules, "exits": exits}
    return other


def _levels(model: RoutedNetwork, looks: Sequence[Size], images: Callable[[], Iterator[dict[str, Any]]]) -> np.ndarray:
    """The mIoU of all layers in each size, of two in the closer one [Z]: what is measured, moved half of the way to a
    parabola over the logarithms of the sizes, for among sizes that are about as good the luckiest would be taken. NaN
    for one size, and without labels."""
    sizes, levels = [size for size in looks if isinstance(size, float)], np.full(len(looks), np.nan)
    if len(looks) == 1:
        return levels
    classes = model.config.num_classes
    engine = SkipEngine(cast(DynamicRoutingNetwork, model))
    pairs = np.zeros((len(sizes), classes, classes), dtype=np.int64)
    for batch in images():
        for number, size in enumerate(sizes):
            found = engine.labels(batch["image"].to(engine.device), model.route, size=size).labels.cpu()
            pairs[number] += count_pairs(batch["labels"], found.long(), classes).numpy()
    pairs = np.sum(gather(pairs), axis=0)
    if pairs.any():
        scores = np.array([_miou(AllExits.of(one[None, None]), np.array([0])) for one in pairs])
        closest = [size[1] if isinstance(size, tuple) else size for size in looks]
        smooth = np.polyfit(np.log(sizes), scores, min(2, len(sizes) - 1))
        known = dict(zip(sizes, (scores + np.polyval(smooth, np.log(sizes))) / 2, strict=True))
        levels = np.array([known.get(one, np.polyval(smooth, np.log(one))) for one in closest])
    return levels


def _levelled(table: PriceTable, level: float) -> PriceTable:
    """The table whose score of all layers is this one, known of more images than what leaving takes away from it; and
    whose scores fall with the price, for by chance some images score better if more of them leaves."""
    return table if np.isnan(level) else replace(table, scores=_falling(table.scores - table.scores[0] + level))


def _falling(values: np.ndarray) -> np.ndarray:
    """The nearest values that do not rise: neighbours that do are pooled."""
    means: list[float] = []
    counts: list[int] = []
    for value in values:
        means.append(float(value))
        counts.append(1)
        while len(means) > 1 and means[-1] > means[-2]:
            count = counts.pop() + counts[-1]
            means[-2:] = [(means[-2] * counts[-1] + means[-1] * (count - counts[-1])) / count]
            counts[-1] = count
    return np.repeat(means, counts)


def _whole(seen: np.ndarray) -> np.ndarray:
    """What decides about whole images [B,...], given the same of their places [B,...,hb,wb]; of images it is that."""
    return seen.mean((-2, -1)) if seen.ndim == 3 else seen


def _glances(exits: Exits, kept: Sequence[Sequence[Any]]) -> list[np.ndarray]:
    """What decides at each exit but the last, given the features that arrive there."""
    return [exits.see(exit, maps).cpu().numpy() for exit, maps in enumerate(kept)]


def _looked(
    model: RoutedNetwork, exits: Exits, size: float, images: Callable[[], Iterator[dict[str, Any]]]
) -> list[tuple[list[np.ndarray], AllExits]]:
    """What decides at each exit for each batch of images that are looked at in this size, and what each exit makes of
    them."""
    found = []
    for batch in images():
        kept: list[Sequence[Any]] = []

        def run(seen: Tensor, kept: list[Sequence[Any]] = kept) -> Any:
            result, features = model.all_exits(seen)
            kept += features
            return result

        result = look(batch["image"].to(exits.costs.device), size, run)
        scores = score_exits(result, batch["labels"].to(exits.costs.device))
        found.append(([_whole(values) for values in _glances(exits, kept)], scores))
    return [one for share in gather(found) for one in share]


def _walked(
    model: RoutedNetwork,
    exits: Exits,
    size: Size,
    images: Callable[[], Iterator[dict[str, Any]]],
    watched: np.ndarray,
    costs: np.ndarray,
) -> PriceTable:
    """The table of a network whose places leave, or are looked at closer: images run at some prices, looked at in this
    size, and what lies between these is interpolated. Scores only if the network knows several sizes."""
    scored = len(exits.sizes) > 1
    frequencies = np.zeros((len(watched), len(costs)))
    pairs = np.zeros((len(watched), model.config.num_classes, model.config.num_classes), dtype=np.int64)
    engine, count = SkipEngine(cast(DynamicRoutingNetwork, model)), 0
    for batch in images():
        count += len(batch["image"])
        for row, price in enumerate(watched):
            result = engine(batch["image"].to(exits.costs.device), price=price, size=size)
            assert result.exits is not None
            left = result.exits.flatten().cpu().numpy()
            if result.first is not None:
                left = (left != FIRST_LOOK).astype(np.int64)
            frequencies[row] += len(batch["image"]) * np.bincount(left, minlength=len(costs)) / len(left)
            if scored:
                pairs[row] += count_pairs(batch["labels"], result.labels.cpu(), model.config.num_classes).numpy()
    frequencies, pairs, count = (sum(some) for some in zip(*gather((frequencies, pairs, count)), strict=True))
    frequencies = frequencies / count
    for row in range(1, len(watched)):  # chance may let a higher price cost more
        if frequencies[row] @ costs > frequencies[row - 1] @ costs:
            frequencies[row] = frequencies[row - 1]
    scores = np.full(len(watched), np.nan)
    if scored:  # all images together, at each price
        scores = np.array([_miou(AllExits.of(pairs[None]), np.array([row])) for row in range(len(watched))])
    rows, steps = np.linspace(0, len(watched) - 1, TABLE - 2), np.arange(len(watched))
    between = np.stack([np.interp(rows, steps, column) for column in (*frequencies.T, scores)], axis=1)
    ends = np.eye(len(costs))[[-1, 0]]
    geometric = np.exp(np.interp(rows, steps, np.log(watched)))
    return PriceTable(
        costs,
        np.array([0.0, *geometric, LARGEST_PRICE]),
        np.concatenate([ends[:1], between[:, :-1], ends[1:]]),
        between[[0, *range(len(between)), -1], -1],
    )


def _miou(seen: AllExits, exits: np.ndarray) -> float:
    """`mean_iou`; NaN without labels."""
    return mean_iou(seen, exits) if seen.labels.any() else float("nan")


def with_sizes(model: Network, sizes: Sequence[float]) -> Network:
    """The network with other sizes at which budgets may have images looked at, not calibrated yet. Raises ValueError
    for a network without exits, and for no sizes."""
    found = type(model)(replace(model.config, sizes=sizes))
    weights, tables = found.state_dict(), ("exits.others.", "exits.wholes.")
    known = {key: one for key, one in model.state_dict().items() if key in weights and not key.startswith(tables)}
    found.load_state_dict(weights | known)
    return found.to(next(model.parameters()).device).train(model.training)


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


def choose(exits: Exits, seen: Sequence[np.ndarray], costs: np.ndarray, price: float) -> np.ndarray:
    """The exits [N] at which images leave at a price, given what decides [N,...] at each exit k < K-1."""
    at, asked = np.full(len(seen[0]), len(seen)), torch.full((len(seen[0]),), price)
    for exit in reversed(range(len(seen))):
        leaves = exits.gates.leaves(exit, torch.from_numpy(seen[exit]), asked, torch.from_numpy(costs))
        at[leaves.numpy()] = exit
    return at


def price_table(exits: Exits, seen: Sequence[np.ndarray], costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prices [T], ascending, and how often images leave at each exit, [T,K], given what decides [N,...] there.

    Their mean costs are evenly spaced from the dearest route to the cheapest. The first and the last price are beyond
    all others: there every image, also a new one, takes the dearest route or the cheapest.
    """
    at = cache(partial(choose, exits, seen, costs))  # searches begin at the same prices

    def mean(price: float) -> float:
        return float(costs[at(price)].mean())

    targets = np.linspace(costs[-1], costs[0], TABLE - 2)
    first, _ = price_between(mean, targets[0] * (1 - ROUNDING))  # the last price at which all take the dearest route
    others = [price_between(mean, target)[1] for target in targets[1:]]
    ascending = np.array([-LARGEST_PRICE, first, *others, LARGEST_PRICE])
    found = [at(price) for price in ascending]
    return ascending, np.array([np.bincount(exits, minlength=len(costs)) / len(exits) for exits in found])
