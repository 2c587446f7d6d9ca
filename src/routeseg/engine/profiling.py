"""Measuring a LatencyTable (cost/latency.py) on this machine: a network runs as far as each of its exits.

An image that leaves at an exit as a whole gives one time of each stretch. Of a network whose places leave, two more
give the others: half of the places go on there, and an eighth; all others have left at the exit before. Likewise of two
looks (model/closer.py): the closer one sees nothing, all, half, and an eighth. Forwards run in turns, and the median of
each counts.

Legend: K exits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from routeseg.cost.latency import REPEATS, LatencyTable, network_shape
from routeseg.cost.macs import model_cost
from routeseg.engine import Precision, SkipEngine
from routeseg.engine.skip import Backend
from routeseg.files import sample
from routeseg.model import DynamicRoutingNetwork
from routeseg.model.grid import check_images
from routeseg.space import Size, seen_size, size_words
from routeseg.stopwatch import take_turns

MS = 1000.0
STAY = -1e6  # a price at which no image leaves early
PARTS = (0.5, 0.125)  # of the places that go on


def profile(
    model: DynamicRoutingNetwork,
    size: tuple[int, int],
    precision: Precision = "float32",
    repeats: int = REPEATS,
    backend: Backend = "auto",
    step: Callable[[], None] = lambda: None,
    look: Size = 1.0,
) -> LatencyTable:
    """The latency table of a network for images of this size, on the device where it is, with as many threads as
    PyTorch uses: from an image of bytes to its labels, or to the result of a head that segments nothing.

    repeats  how many rounds count, after one that does not; their medians are in the table
    backend  as SkipEngine takes it
    step     called after each of the 1 + repeats rounds
    look     the size in which the images are looked at, one of those that the network knows

    Raises ValueError for fewer than one repeat and for a size that the network does not know, and what SkipEngine
    raises.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: it must be at least 1")
    config, device = model.config, next(model.parameters()).device
    if look not in (config.sizes or (1.0,)):
        raise ValueError(f"the network knows no images at {size_words(look)} times their sides: --model.sizes")
    with Image.open(sample()) as file:
        pixels = np.array(file.convert("RGB").resize(size[::-1]))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device)  # uint8 [1,3,H,W]
    check_images(image)

    def median_ms(engine: SkipEngine, asked: Sequence[dict[str, Any]]) -> np.ndarray:
        """The milliseconds of each of these forwards."""

        run = engine.labels if model.head.segments else engine

        def forward(how: dict[str, Any]) -> None:
            run(image, size=look, **how)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)

        seconds = take_turns([*(partial(forward, how) for how in asked), step], repeats)
        return MS * np.median(seconds[:-1], axis=1)

    facts: dict[str, Any] = {"repeats": repeats}
    if config.exits is None:
        engine = SkipEngine(model, precision, backend)
        ms = median_ms(engine, [{"route": model.route}, {}][: 1 + config.gated])
        stretches = _stretches(ms[:1])
        if config.gated:
            cost = model_cost(model, size)
            share = float(cost.of_gates(engine(image).gates)[0] / cost.full)
            facts["own_gates"] = {"ms": float(ms[1]), "share_of_full": share}
    else:
        whole = np.eye(2 if isinstance(look, tuple) else len(config.exits))
        places = config.place_count(seen_size(size, look))
        parts = [part * whole[1:] + (1 - part) * whole[:-1] for part in PARTS]
        asked_for = np.concatenate([whole, *parts])
        engine = SkipEngine(_asking(model, look, asked_for), precision, backend)
        if places is None:
            asked: list[dict[str, Any]] = [{"route": route} for route in config.exit_routes]
            ms = median_ms(engine, [*asked, {"price": STAY}])
            decisions = np.minimum(np.arange(len(whole)) + 1, len(whole) - 1)  # on the way to each exit
            decision_ms = max(0.0, ms[-1] - ms[-2]) / decisions[-1]
            stretches = _stretches(ms[:-1] + decisions * decision_ms)
        else:
            prices = 1 + np.arange(len(asked_for))
            ms = median_ms(engine, [{"price": price, "per_image": True} for price in prices])
            part_ms = ms[len(whole) :].reshape(len(PARTS), -1)
            stretches = _stretches(ms[: len(whole)], part_ms, [round(part * places) / places for part in PARTS])
    if engine.precision_reason is not None:
        facts["precision_reason"] = engine.precision_reason
    return LatencyTable(size, str(device), engine.precision, network_shape(config), stretches, facts, look)


def _asking(model: DynamicRoutingNetwork, look: Size, frequencies: np.ndarray) -> DynamicRoutingNetwork:
    """A copy of a network with exits, calibrated or not, with a table of prices 1, 2, ... for this look: at each, these
    shares [T,K] of an image's places leave."""
    model = deepcopy(model)
    assert model.exits is not None
    table = model.exits.at(look)
    table.costs = table.costs.new_tensor(1 + np.arange(frequencies.shape[1]))
    table.prices = table.prices.new_tensor(1 + np.arange(len(frequencies)))
    table.frequencies = table.frequencies.new_tensor(frequencies)
    return model


def _stretches(
    whole_ms: np.ndarray, part_ms: np.ndarray | None = None, shares: Sequence[float] = (0.0, 0.0)
) -> np.ndarray:
    """The stretches [K,3] of a table, from the milliseconds of an image that leaves at each exit as a whole [K], and of
    one of which two shares, the larger first, go on behind each exit but the last [2,K-1] and leave at the next. Noise
    does not make a time negative."""
    whole_ms = np.maximum.accumulate(whole_ms)
    whole = np.diff(whole_ms, prepend=0.0)
    fixed, running = np.zeros_like(whole), whole.copy()
    larger, smaller = shares
    if part_ms is not None and larger > smaller > 0:
        some = (part_ms - whole_ms[:-1]).clip(0)
        running[1:] = ((some[0] - some[1]) / (larger - smaller)).clip(0)
        fixed[1:] = (some[1] - smaller * running[1:]).clip(0)
    return np.stack([fixed, running, whole], axis=1)
