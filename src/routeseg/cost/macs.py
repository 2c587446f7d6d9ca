"""What a route costs: multiply-accumulates (MACs) of every node and edge.

All of it is a pure function of what a network is made of, the image size, and gates or a route. Nothing is measured
here, and torch is not imported. Each part says itself what it costs (`macs`); counting.py says how that is counted.

Legend: L depth, S scales, B images.
    gates [B, L+1, S, 3]   activation of every edge, direction 0 up, 1 keep, 2 down
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from routeseg.config import NetworkConfig
from routeseg.counting import CONVENTIONS, PartMacs
from routeseg.space import DOWN, Route, RoutingSpace, Size, first_size, padded_size, seen_size

if TYPE_CHECKING:
    from torch import Tensor

    from routeseg.description import NetworkDescription
    from routeseg.model.grid import RoutedNetwork


@dataclass(frozen=True)
class CostTable:
    """MACs of each part at one image size, float64.

    stem, head      always paid
    gate [L+1,S]    paid by every node that something arrives at (0 in a network without gates)
    cell [L+1,S]    paid by every node with an open path
    edge [L+1,S,3]  paid by every open path
    zeros_arrive    zeros of closed paths arrive, too (`space.step`)
    exits [K]       cost of an image that leaves at an exit by its own choice: the route as far as there, and the
                    decisions on the way; None without exits
    """

    space: RoutingSpace
    stem: float
    head: float
    gate: np.ndarray
    cell: np.ndarray
    edge: np.ndarray
    zeros_arrive: bool = False
    exits: np.ndarray | None = None

    @property
    def full(self) -> float:
        """Cost with every path open."""
        return float(self.stem + self.head + self.gate.sum() + self.cell.sum() + self.edge.sum())

    @property
    def budgeted(self) -> float:
        """The cost that the budget is about: all cells and transforms (the denominator of Eq. 9)."""
        return float(self.cell.sum() + self.edge.sum())

    def of_gates(self, gates: Tensor | np.ndarray) -> np.ndarray:
        """Real cost of each image from its gates [B,L+1,S,3] (or [L+1,S,3]): MACs, float64 [B] (or a scalar array)."""
        values = gates.detach().cpu().numpy() if hasattr(gates, "detach") else np.asarray(gates)
        reached = self.space.reached(values, self.zeros_arrive)
        open_edges = (values > 0) & reached[..., None]
        return (
            self.stem
            + self.head
            + (reached * self.gate).sum((-1, -2))
            + (open_edges.any(-1) * self.cell).sum((-1, -2))
            + (open_edges * self.edge).sum((-1, -2, -3))
        )

    def of_result(
        self, gates: Tensor | np.ndarray, exits: Tensor | np.ndarray | None, first: CostTable | None = None
    ) -> np.ndarray:
        """Real cost of images from what a forward returns, MACs, float64 [B]: gates [B,L+1,S,3] and, if places have
        left by themselves, where: [B,hb,wb]. Each place pays its share of the image; `first` is the table of a first
        look, which all of them pay."""
        if exits is None:
            return self.of_gates(gates)
        places = exits.cpu().numpy() if hasattr(exits, "cpu") else np.asarray(exits)
        return self.of_exits(first)[places].mean((-1, -2))

    def of_exits(self, first: CostTable | None = None) -> np.ndarray:
        """What leaving at each exit costs, MACs, float64 [K]. With the table of a first look [K+1]: what places that
        are looked at closer pay, and at last, as FIRST_LOOK reads it, what those do for which it was enough."""
        assert self.exits is not None
        if first is None:
            return self.exits
        return np.append(np.full(len(self.exits), first.full + self.full), first.full)

    def of_route(self, route: Route, count_gates: bool = False) -> float:
        """Cost of a fixed route in MACs. Its gates need not run, so they are counted only if asked: then those of every
        node that it reaches."""
        table = self if count_gates else replace(self, gate=np.zeros_like(self.gate))
        return float(table.of_gates(route.to_gates()))

    def expected(self, gates: Tensor) -> Tensor:
        """Eq. 7 summed over the space: max_j(alpha_j) C(cell) + sum_j alpha_j C(T_j); MACs [B], differentiable."""
        cell, edge = gates.new_tensor(self.cell), gates.new_tensor(self.edge)
        return (gates.amax(-1) * cell).sum((-1, -2)) + (gates * edge).sum((-1, -2, -3))


class Outcome(Protocol):
    """What a forward made of images: gates [B,L+1,S,3]; where places left, [B,hb,wb], if they did so by themselves; and
    the sizes at which it looked at them, if not their own, and first, if twice."""

    @property
    def gates(self) -> Any: ...
    @property
    def exits(self) -> Any: ...
    @property
    def seen(self) -> tuple[int, int] | None: ...
    @property
    def first(self) -> tuple[int, int] | None: ...


def spent_macs(made: Outcome, own: tuple[int, int], table: Callable[[tuple[int, int]], CostTable]) -> np.ndarray:
    """Real cost of images (height, width), MACs, float64 [B], by what a forward made of them; `table` is of a size."""
    first = None if made.first is None else table(made.first)
    return table(made.seen or own).of_result(made.gates, made.exits, first)


def model_cost(
    network: RoutedNetwork | NetworkDescription | NetworkConfig,
    image_size: tuple[int, int],
    convention: str = "authors",
) -> CostTable:
    """The cost table at an image size (height, width), padded to the space's stride.

    `network` is a network, its description, or a configuration. A static network pays for the parts that it has.
    `convention` is "authors" (checked against their network), "full" or "conv": see `CONVENTIONS` and
    docs/inference.md. Raises ValueError for another one.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"cost convention {convention!r}: choose one of {', '.join(CONVENTIONS)}")
    if isinstance(network, NetworkConfig):
        from routeseg.model.grid import part_macs  # parts need torch; descriptions bring their MACs

        config, macs = network, part_macs(network)
    else:
        config, macs = network.config, network.macs
    return _table(config, macs, padded_size(config.space, *image_size), convention)


@lru_cache(maxsize=256)
def _table(config: NetworkConfig, macs: PartMacs, size: tuple[int, int], convention: str) -> CostTable:
    """`model_cost` at a padded size."""
    unit, space = CONVENTIONS[convention], config.space
    cell_macs = [part.count(size, unit) for part in macs.cell]
    gate_macs = [[part.count(size, unit) for part in row] for row in macs.gate]
    edge_macs = [[part.count(size, unit) for part in row] for row in macs.transform]
    shape = (space.depth + 1, space.num_scales)
    gate, cell, edge = np.zeros(shape), np.zeros(shape), np.zeros((*shape, 3))
    for layer, scale in space.nodes:
        directions = space.directions(layer, scale)
        cell[layer, scale] = cell_macs[scale]
        gate[layer, scale] = gate_macs[scale][len(directions) - 1]
        for direction in directions:
            edge[layer, scale, direction] = edge_macs[scale][direction]
    for scale, part in enumerate(macs.stages):  # a backbone's stage runs with the path down beside it
        edge[scale, scale, DOWN] += part.count(size, unit)
    there = config.whole_route.to_gates() > 0
    table = CostTable(
        space,
        macs.stem.count(size, unit),
        macs.head.count(size, unit),
        gate,
        cell * there.any(-1),
        edge * there,
        config.zeros_arrive,
    )
    if config.exits is None:
        return table
    routes = [table.of_route(route) for route in config.exit_routes]
    decisions = np.minimum(np.arange(1, len(routes) + 1), len(routes) - 1) * macs.decision.count(size, unit)
    return replace(table, exits=np.array(routes) + decisions)


def exit_costs(network: RoutedNetwork | NetworkDescription, image_size: tuple[int, int]) -> np.ndarray:
    """MACs of a network with exits for an image that leaves at each of them, float64 [K]. Of a network whose places
    decide the last is more than the full network's (`CostTable.exits`)."""
    table = model_cost(network, image_size)
    assert table.exits is not None
    return table.exits


def look_costs(network: RoutedNetwork | NetworkDescription, own: tuple[int, int], size: Size) -> np.ndarray:
    """MACs of the routes of a look at images (height, width) in a size: `exit_costs` [K]; or of two looks [2], of the
    first one alone, and both."""
    seen, first = seen_size(own, size), first_size(own, size)
    if first is None:
        return exit_costs(network, seen)
    return np.cumsum([model_cost(network, one).full for one in (first, seen)])
