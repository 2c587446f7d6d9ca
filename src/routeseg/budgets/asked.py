"""A budget as users name it: a share of the full network (40%, 0.4), MACs (0.5GMACs) or milliseconds (25ms).

A network with exits (model/exits.py) knows prices; `Asked.look` is the one that keeps a budget at an image size, and
says in what size images are looked at. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from routeseg.cost.latency import WHOLE, LatencyTable, mean_ms, stretches_at
from routeseg.cost.macs import look_costs, model_cost
from routeseg.errors import NO_EXITS
from routeseg.space import MIN_IMAGE_SIZE, brief, padded_size, seen_size

if TYPE_CHECKING:
    from routeseg.description import NetworkDescription
    from routeseg.model.grid import RoutedNetwork
    from routeseg.model.prices import Look, Prices

MMACS = 1e6
MAX_SHARE = 10.0  # of the full network at the size of the image: larger ones may cost more
UNITS = {"": 1.0, "%": 0.01, "GMACS": 1e9, "MMACS": MMACS, "MS": 1.0}
FORMS = "give a share of the full network such as 40%, MACs such as 0.5GMACs, or milliseconds such as 25ms"


@dataclass(frozen=True)
class Asked:
    """A budget for the mean of the images, in one of three units: a share in 0..1, MACs, or milliseconds by tables.

    per_image  for each of them, of a network whose places leave by themselves
    fixed      the mean is what the tables say; else what was spent so far corrects it (keeping.py)

    `Asked.parse("40%")`, `Asked.parse(0.4)`, `Asked.parse("25ms", LatencyTable.read_all(file), file)`.
    """

    value: float
    unit: Literal["share", "macs", "ms"]
    latency: tuple[LatencyTable, ...] = ()
    file: str | Path = ""
    per_image: bool = False
    fixed: bool = False

    @classmethod
    def parse(cls, budget: Any, latency: LatencyTable | Sequence[LatencyTable] = (), file: str | Path = "") -> Asked:
        """The budget that a text names, or a number of any kind, which is a share. Raises ValueError if it names none,
        and for milliseconds without a table."""
        if not isinstance(budget, str):
            return cls(_share(budget), "share")
        text = budget
        match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*(%|gmacs|mmacs|ms|)\s*", text, re.IGNORECASE)
        try:
            number = float(match[1]) if match else math.nan
        except ValueError:
            number = math.nan
        if match is None or not 0 < number < math.inf:
            raise ValueError(f"budget is {text!r}: {FORMS}")
        unit = match[2].upper()
        value = number * UNITS[unit]
        if unit == "MS":
            if not latency:
                raise ValueError(
                    f"budget is {text!r}: milliseconds need --latency, a table of this machine. `routeseg profile "
                    "CHECKPOINT --size HEIGHTxWIDTH` writes one"
                )
            return cls(value, "ms", (latency,) if isinstance(latency, LatencyTable) else tuple(latency), file)
        if (unit == "" and value > 1) or (unit == "%" and value > MAX_SHARE):
            raise ValueError(f"budget is {text!r}, more than the full network: {FORMS}")
        return cls(value, "macs" if unit.endswith("MACS") else "share")

    def __str__(self) -> str:
        """The budget in words: the same for those that mean the same. A table counts by its times."""
        if self.per_image:
            return f"{replace(self, per_image=False)} for each image"
        if self.fixed:
            return f"{replace(self, fixed=False)} by the tables alone"
        if self.unit == "share":
            return f"{100 * self.value:.6g}%"
        if self.unit == "macs":
            return f"{self.value / UNITS['GMACS']:.6g}GMACs"
        tables = [[one.size, one.stretches_ms.tolist()] for one in self.latency]
        times = json.dumps(tables, sort_keys=True)
        return f"{self.value:.6g}ms by the table {hashlib.sha256(times.encode()).hexdigest()[:16]}"

    def costs(self, network: RoutedNetwork | NetworkDescription, size: tuple[int, int]) -> list[np.ndarray]:
        """What leaving at each exit costs, in the unit of the budget (MMACs), for images (height, width) that are
        looked at in each size that the network knows: float64 [Z][K]; of two looks, of the first one and of both.
        Infinity in milliseconds where no table tells.

        Raises ValueError for a network without exits, and for latency tables of another one.
        """
        prices = check_exits(network)
        if self.unit == "share":
            return [table.costs for table in prices.tables]
        if self.unit == "macs":
            return [look_costs(network, size, one) / MMACS for one in prices.sizes]
        return [
            np.full_like(table.costs, np.inf) if stretches is None else np.cumsum(stretches[:, WHOLE])
            for table, stretches in zip(prices.tables, self._stretches(network, size), strict=True)
        ]

    def _stretches(self, network: RoutedNetwork | NetworkDescription, size: tuple[int, int]) -> list[np.ndarray | None]:
        """Of images (height, width) in each size [Z] that the network knows; None: nobody measured it."""
        sizes = check_exits(network).sizes
        return [stretches_at(self.latency, network.config, size, self.file, one) for one in sizes]

    @property
    def amount(self) -> float:
        """The value, in the unit of `costs`."""
        return self.value / MMACS if self.unit == "macs" else self.value

    @property
    def unit_name(self) -> str:
        """The unit of `costs`, as messages write it behind a number."""
        return {"share": "", "macs": " MMACs", "ms": " ms"}[self.unit]

    def look(self, network: RoutedNetwork | NetworkDescription, size: tuple[int, int], at: float | None = None) -> Look:
        """The price that keeps the budget for images (height, width), and the size in which they are looked at; `at`:
        only in this one.

        Raises BudgetNotKept for a budget that cannot be kept at this size, and ValueError for a network without exits
        or calibration, and for latency tables of another one.
        """
        prices, means = check_exits(network), None
        if self.unit == "share":
            most = max(1.0, *(float(table.costs[-1]) for table in prices.tables))
            if self.value > most:
                largest = max(size for size in prices.sizes if isinstance(size, float))
                larger = f" on images of {largest:g} times the sides, the largest that it knows" if largest > 1 else ""
                raise ValueError(
                    f"budget is {self}, more than the full network costs{larger}, {100 * most:.0f}%: {FORMS}"
                )
            return prices.look_up(self.value, size=at)
        if self.unit == "ms":
            means = [
                None
                if stretches is None
                else mean_ms(stretches, table.frequencies, network.config.place_count(seen_size(size, one)))
                for one, table, stretches in zip(
                    prices.sizes, prices.tables, self._stretches(network, size), strict=True
                )
            ]
        return prices.look_up(self.amount, self.costs(network, size), self.unit_name, at, means)


def _share(number: Any) -> float:
    """A number of any kind as a share of the full network. Raises ValueError if it is none."""
    try:
        share = float(number)
    except (TypeError, ValueError, OverflowError):
        share = math.nan
    if isinstance(number, bool) or not 0 < share <= 1:
        percent = f'; {share:g} percent is the text "{share:g}%"' if 1 < share <= 100 else ""
        raise ValueError(
            f"budget is {brief(number)}: a number is a share of the full network, above 0 up to 1{percent}"
        )
    return share


def levels(network: RoutedNetwork | NetworkDescription, size: tuple[int, int]) -> np.ndarray:
    """What an image (height, width) of a network with exits can cost, as shares of the full network's: float64 [K],
    ascending. A budget between two of them is kept in the mean of many images."""
    height, width = (max(side, MIN_IMAGE_SIZE) for side in size)
    table = model_cost(network, padded_size(network.config.space, height, width))
    assert table.exits is not None
    return table.exits / table.full


def in_words(shares: np.ndarray) -> str:
    """Shares as percents."""
    return ", ".join(f"{100 * share:.3g}" for share in shares) + " %"


def check_exits(network: RoutedNetwork | NetworkDescription) -> Prices:
    """What prices cost in a network with exits. Raises ValueError if it has none, and so takes no budget."""
    if network.prices is None:
        raise ValueError(NO_EXITS)
    return network.prices
