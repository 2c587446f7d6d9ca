"""A budget as users name it: a share of the full network (40%, 0.4), MACs (0.5GMACs) or milliseconds (25ms).

A network with exits (model/exits.py) is asked for a share; `Asked.share` is the one that keeps a budget at an image
size. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from routeseg.cost.latency import LatencyTable
from routeseg.cost.macs import exit_costs
from routeseg.errors import NO_EXITS, BudgetNotKept

if TYPE_CHECKING:
    from routeseg.model.exits import Exits
    from routeseg.model.grid import RoutedNetwork

MMACS = 1e6
UNITS = {"": 1.0, "%": 0.01, "GMACS": 1e9, "MMACS": MMACS, "MS": 1.0}
FORMS = "give a share of the full network such as 40%, MACs such as 0.5GMACs, or milliseconds such as 25ms"


@dataclass(frozen=True)
class Asked:
    """A budget for the mean of the images, in one of three units: a share in 0..1, MACs, or milliseconds by a table.

    `Asked.parse("40%")`, `Asked.parse("25ms", LatencyTable.read(file), file)`.
    """

    value: float
    unit: Literal["share", "macs", "ms"]
    latency: LatencyTable | None = None
    file: str | Path = ""

    @classmethod
    def parse(cls, text: str, latency: LatencyTable | None = None, file: str | Path = "") -> Asked:
        """The budget that a text names. Raises ValueError if it names none, and for milliseconds without a table."""
        match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*(%|gmacs|mmacs|ms|)\s*", text, re.IGNORECASE)
        try:
            number = float(match[1]) if match else math.nan
        except ValueError:
            number = math.nan
        if match is None or not 0 < number < math.inf:
            raise ValueError(f"--budget is {text!r}: {FORMS}")
        unit = match[2].upper()
        value = number * UNITS[unit]
        if unit == "MS":
            if latency is None:
                raise ValueError(
                    f"--budget is {text!r}: milliseconds need --latency, a table of this machine. `routeseg profile "
                    "CHECKPOINT --size HEIGHTxWIDTH` writes one"
                )
            return cls(value, "ms", latency, file)
        if unit in ("", "%") and value > 1:
            raise ValueError(f"--budget is {text!r}, more than the full network: {FORMS}")
        return cls(value, "macs" if unit.endswith("MACS") else "share")

    def __str__(self) -> str:
        """The budget in words: the same for those that mean the same. A table counts by its times."""
        if self.unit == "share":
            return f"{100 * self.value:.6g}%"
        if self.latency is None:
            return f"{self.value / UNITS['GMACS']:.6g}GMACs"
        times = json.dumps([self.latency.fixed_ms, self.latency.part_ms.tolist()], sort_keys=True)
        return f"{self.value:.6g}ms by the table {hashlib.sha256(times.encode()).hexdigest()[:16]}"

    def share(self, network: RoutedNetwork, size: tuple[int, int]) -> float:
        """The share of the full network's MACs that keeps the budget for images (height, width).

        Raises BudgetNotKept for a budget that cannot be kept at this size, or that no table tells, and ValueError for a
        network without exits or calibration.
        """
        exits = check_exits(network)
        if self.unit == "share":
            return self.value
        if self.unit == "ms":
            assert self.latency is not None
            try:
                self.latency.check(network.config, size, self.file)
            except ValueError as error:
                raise BudgetNotKept(str(error)) from error
            costs = self.latency.of_exits(network.config)
            return exits.share_for(self.value, costs, " ms")
        costs = exit_costs(network, size) / MMACS
        return exits.share_for(self.value / MMACS, costs, " MMACs")


def check_exits(network: RoutedNetwork) -> Exits:
    """The exits of a network. Raises ValueError if it has none, and so takes no budget."""
    if network.exits is None:
        raise ValueError(NO_EXITS)
    return network.exits
