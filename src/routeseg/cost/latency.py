"""What a route takes in milliseconds, predicted from a table of its parts (`routeseg profile`, profiling.py).

All nodes of a scale are alike, so a part has one time per scale. What a forward takes is the sum of its parts, for one
image at a time: those that always run, and each other part as often as the gates or the route have it run. Here
nothing is measured, and torch is not imported.

Legend: L depth, S scales, B images, P parts of a node.
    gates [B, L+1, S, 3]   activation of every edge, direction 0 up, 1 keep, 2 down
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from routeseg.config import NO_GATE, NetworkConfig
from routeseg.files import read_json, write_json
from routeseg.space import DOWN, KEEP, SCALE_STEP, UP, Route, RoutingSpace, is_diagonal, padded_size, walk

if TYPE_CHECKING:
    from torch import Tensor

    from routeseg.cost.macs import CostTable

# gate, cell      of a node, at its scale
# up, down        the transforms of its paths; keep has none
# sum             a sum of what arrives at a node is written (Eq. 5): not if a single map arrives with weight 1
# arrival         one map that enters such a sum, along keep or down
# halved          one that enters it along up, at half the size
# stage           of a backbone, beside the path down from this scale along the diagonal
PARTS = ("gate", "cell", "up", "down", "sum", "arrival", "halved", "stage")
GATE, CELL, SEND_UP, SEND_DOWN, SUM, ARRIVAL, HALVED, STAGE = range(len(PARTS))
STEM, DECODER, CALL = "stem", "decoder", "call"  # what runs in any case; call: checks, copies, results
STEM_AND_DECODER = "stem and decoder"  # if they cannot be told apart
FORMAT = 1  # of the file
# How a table is measured, unless somebody asks for more: so many routes test it, each runs so often.
ROUTES = 50
REPEATS = 11  # with 5, the median of a route was off by 6 % on a restless machine
GLANCE = "glance_ms"  # of the facts: what the decision at an exit takes
# Fields that the time does not depend on; decisions at exits are timed for themselves.
UNTIMED = ("gate", "exits", "choice", "place", "class_names", "palette", "pixel_mean", "pixel_std")


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of each part of a network, on one machine, for one image of one size.

    size       height, width of the image
    device     cpu, cuda, ...
    precision  of the weights and maps, as the engine ran
    network    what the times depend on (`network_shape`); `fingerprint` is made of it
    fixed_ms   name -> time of what runs in any case: stem, decoder and call; or all of it, if it was not told apart
    part_ms    [S,P], the columns of `PARTS`
    facts      how it was measured, how well it predicts, machine, date, versions: kept in the file
    """

    size: tuple[int, int]
    device: str
    precision: str
    network: dict[str, Any]
    fixed_ms: dict[str, float]
    part_ms: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def space(self) -> RoutingSpace:
        return RoutingSpace(self.network["depth"], self.network["num_scales"])

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell networks of other shapes apart; weights do not enter."""
        return hashlib.sha256(json.dumps(self.network, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """`latency_<device>_<HxW>_<precision>`, the file's name without its suffix."""
        return f"latency_{self.device}_{self.size[0]}x{self.size[1]}_{self.precision}".replace(":", "")

    def of_gates(self, gates: Tensor | np.ndarray) -> np.ndarray:
        """Milliseconds of each image, given the gates [B,L+1,S,3] (or [L+1,S,3]) that a forward returned: float64 [B]
        (or a scalar array). The gates' time is included. Raises ValueError for gates of another space."""
        values = gates.detach().cpu().numpy() if hasattr(gates, "detach") else np.asarray(gates)
        if values.shape[-3:] != self.space.legal.shape:
            raise ValueError(f"gates have shape {list(values.shape)}: the table is for {self.space}")
        if values.ndim == self.space.legal.ndim:
            return np.asarray(self._of_counts(node_counts(self.network, values, self.network["gated"])))
        return np.array([self.of_gates(one) for one in values])

    def of_route(self, route: Route, gates: bool = False) -> float:
        """Milliseconds of a route that is forced (`engine(images, route)`), or, with `gates`, that an image's gates
        open. Raises ValueError for a route of another space."""
        if route.space != self.space:
            raise ValueError(f"the route is drawn in {route.space}, the latency table is for {self.space}")
        return self._of_counts(route_counts(self.network, route, gates and self.network["gated"]))

    def of_exits(self, config: NetworkConfig) -> np.ndarray:
        """Milliseconds of an image that leaves at each exit, with the decisions on the way there: float64 [K]."""
        routes = config.exit_routes
        decisions = np.minimum(np.arange(len(routes)) + 1, len(routes) - 1)
        return np.array([self.of_route(route) for route in routes]) + decisions * float(self.facts.get(GLANCE, 0.0))

    def _of_counts(self, counts: np.ndarray) -> float:
        return sum(self.fixed_ms.values()) + float((counts.sum(0) * self.part_ms).sum())

    def check(self, config: NetworkConfig, name: str | Path) -> None:
        """Raises ValueError, naming the file, if the table belongs to another shape of network."""
        shape = network_shape(config)
        for key in shape:
            if shape[key] != self.network.get(key):
                raise ValueError(
                    f"{name} is the latency of another network: {key} is {self.network.get(key)} there, {shape[key]} "
                    "here. Measure this one: `routeseg profile`"
                )

    def as_dict(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "format": FORMAT,
            "size": list(self.size),
            "device": self.device,
            "precision": self.precision,
            "fingerprint": self.fingerprint,
            "network": self.network,
            "fixed_ms": self.fixed_ms,
            "scales_ms": [dict(zip(PARTS, row, strict=True)) for row in self.part_ms.tolist()],
            **self.facts,
        }

    def write(self, path: str | Path) -> None:
        write_json(path, self.as_dict())

    @classmethod
    def read(cls, path: str | Path) -> LatencyTable:
        """The inverse of `write`. Raises ValueError, naming the file, if it is damaged or no latency table."""
        remedy = "write it anew with `routeseg profile`"
        try:
            return cls.from_dict(read_json(path))
        except FileNotFoundError as error:
            raise ValueError(f"no latency table {path}: {remedy}") from error
        except (KeyError, TypeError, AttributeError, OSError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is no latency table, or damaged ({reason}): {remedy}") from error

    @classmethod
    def read_all(cls, path: str | Path) -> list[LatencyTable]:
        """The table of a file, or those of a folder, such as a checkpoint's. Raises ValueError if there is none."""
        if not Path(path).is_dir():
            return [cls.read(path)]
        if not (files := sorted(Path(path).glob("latency_*.json"))):
            raise ValueError(f"no latency table in {path}: `routeseg profile` writes one")
        return [cls.read(file) for file in files]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTable:
        """The inverse of `as_dict`. Raises ValueError, KeyError or TypeError if it is none."""
        rest = dict(data)
        form, scales, fingerprint = (rest.pop(key) for key in ("format", "scales_ms", "fingerprint"))
        size, device, precision, network, fixed_ms = (
            rest.pop(key) for key in ("size", "device", "precision", "network", "fixed_ms")
        )
        if form != FORMAT:
            raise ValueError(f"format {form!r}, known is {FORMAT}")
        height, width = (int(side) for side in size)
        table = cls(
            (height, width),
            str(device),
            str(precision),
            _checked(network),
            {str(name): float(ms) for name, ms in fixed_ms.items()},
            # Tables that were written before there were backbones lack the stages.
            np.array([[float((dict(stage=0.0) | row)[part]) for part in PARTS] for row in scales]).reshape(
                -1, len(PARTS)
            ),
            rest,
        )
        if len(table.part_ms) != table.space.num_scales:
            raise ValueError(f"times of {len(table.part_ms)} scales for {table.space}")
        if not all(math.isfinite(ms) and ms >= 0 for ms in [*table.fixed_ms.values(), *table.part_ms.flat]):
            raise ValueError("a time is negative or no number")
        if table.fingerprint != fingerprint:
            raise ValueError("network and fingerprint do not belong together")
        return table


def exit_ms(
    tables: Sequence[LatencyTable], config: NetworkConfig, size: tuple[int, int], name: str | Path
) -> np.ndarray:
    """Milliseconds of an image (height, width) that leaves at each exit, as `LatencyTable.of_exits`, from tables of any
    sizes: float64 [K]. Between two of them it is linear in the number of pixels; beyond the last one, all but the call
    itself grows as the pixels do. Raises ValueError, naming the file, if one belongs to another network."""

    def pixels(image: tuple[int, int]) -> int:
        return math.prod(padded_size(config.space, *image))

    for table in tables:
        table.check(config, name)
    known = {pixels(table.size): table for table in sorted(tables, key=lambda table: table.size == size)}
    asked, places = pixels(size), sorted(known)
    if places[0] <= asked <= places[-1]:
        times = [known[place].of_exits(config) for place in places]
        return np.array([np.interp(asked, places, exit) for exit in zip(*times, strict=True)])
    nearest = places[0] if asked < places[0] else places[-1]
    call = known[nearest].fixed_ms.get(CALL, 0.0)
    return call + (known[nearest].of_exits(config) - call) * asked / nearest


def _checked(network: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of a network from a file. Raises ValueError, KeyError or TypeError if it is none."""
    shape = dict(network)
    gate = {} if shape["gated"] else {"gate": NO_GATE}
    NetworkConfig.from_dict({name: value for name, value in shape.items() if name != "gated"} | gate)
    return shape


def network_shape(config: NetworkConfig) -> dict[str, Any]:
    """What the time of a forward depends on, as JSON has it: space, widths, operations, gates; not the weights."""
    shape = {name: value for name, value in config.as_dict().items() if name not in UNTIMED}
    if len(config.whole_route) == len(config.space.edges):
        shape["route"] = None
    return json.loads(json.dumps(shape | {"gated": config.gated}))


def node_counts(network: Mapping[str, Any], gates: np.ndarray, gated: bool) -> np.ndarray:
    """How often each part of each node runs, given the gates [L+1,S,3] of an image: float64 [L+1,S,P], columns as in
    `PARTS`. Parts run as in the skip engine; the sums that the decoder begins with belong to the decoder.

    network  its shape (`network_shape`)
    gated    the gates run
    """
    space = RoutingSpace(network["depth"], network["num_scales"])
    counts, has_backbone = np.zeros((*gates.shape[:2], len(PARTS))), network.get("backbone") is not None
    arriving: list[list[tuple[float, int]]] = [[] for _ in space.scales(space.depth)]  # weight, ARRIVAL or HALVED
    arriving[0].append((1.0, ARRIVAL))  # the stem's features
    for layer, now in enumerate(walk(space, gates, network["zeros_arrive"])):
        following: list[list[tuple[float, int]]] = [[] for _ in arriving]
        for scale in np.flatnonzero(now.arrived):
            count, alpha = counts[layer, scale], gates[layer, scale]
            if arriving[scale] != [(1.0, ARRIVAL)]:
                count[SUM] = 1
                for _, kind in arriving[scale]:
                    count[kind] += 1
            count[GATE] = gated
            if now.passes[scale]:  # dropped cell: the input itself is kept, for free
                following[scale].append((1.0, ARRIVAL))
                continue
            count[CELL], count[SEND_UP], count[SEND_DOWN] = 1, alpha[UP] > 0, alpha[DOWN] > 0
            for direction in np.flatnonzero(alpha > 0).tolist():
                kind = HALVED if direction == UP else ARRIVAL
                following[scale + SCALE_STEP[direction]].append((float(alpha[direction]), kind))
                if has_backbone and is_diagonal(layer, int(scale), direction):
                    count[STAGE] = 1
                    following[scale + 1].append((float(alpha[direction]), ARRIVAL))
        arriving = following
    return counts


def route_counts(network: Mapping[str, Any], route: Route, gated: bool) -> np.ndarray:
    """The same for a route. Its paths have weight 1 if it is forced, less if gates open it."""
    weight = 0.5 if gated else 1.0  # which weight below 1 does not matter
    return node_counts(network, weight * route.to_gates(), gated)


def by_part(table: LatencyTable, cost: CostTable) -> list[dict[str, Any]]:
    """Everything open, with its gates: a row for each part and scale with `part`, `scale` (None: the whole network),
    `gmacs` and `ms`. The last row is the total.

    down  with the stages of a backbone beside it
    keep  computes nothing but a ReLU; its milliseconds are those of all sums of what arrives at the scale
    """
    route = Route(table.space, [edge for edge in table.space.edges if cost.edge[edge] > 0])
    ms = (route_counts(table.network, route, table.network["gated"]).sum(0) * table.part_ms).T  # [P,S]
    fixed_macs = {STEM: cost.stem, DECODER: cost.head, STEM_AND_DECODER: cost.stem + cost.head}
    rows: list[tuple[str, int | None, float, float]] = [
        (name, None, fixed_macs.get(name, 0.0), time) for name, time in table.fixed_ms.items()
    ]
    edge = cost.edge.sum(0)
    for part, macs, times in (
        ("gates", cost.gate.sum(0), ms[GATE]),
        ("cells", cost.cell.sum(0), ms[CELL]),
        ("up", edge[:, UP], ms[SEND_UP]),
        ("keep, sums", edge[:, KEEP], ms[SUM] + ms[ARRIVAL] + ms[HALVED]),
        ("down", edge[:, DOWN], ms[SEND_DOWN] + ms[STAGE]),
    ):
        rows += [(part, scale, macs[scale], times[scale]) for scale in range(table.space.num_scales)]
    rows.append(("total", None, sum(row[2] for row in rows), sum(row[3] for row in rows)))
    return [
        {"part": part, "scale": scale, "gmacs": float(macs) / 1e9, "ms": float(time)}
        for part, scale, macs, time in rows
        if macs or time
    ]
