"""The routing space (Sec. 3.1): a grid of nodes over layers and scales, and the edges between them. No torch here.

Legend: L depth, S number of scales, B images.
    node  (layer, scale)             layer 0..L, scale 0..S-1; scale s has 1 / (4 * 2**s) of the image's resolution
    edge  (layer, scale, direction)  leaves that node; direction UP (0), KEEP (1) or DOWN (2)
    gates [..., L+1, S, 3]           one activation per edge; 0 is closed
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

UP, KEEP, DOWN = 0, 1, 2
DIRECTIONS = ("up", "keep", "down")
SCALE_STEP = {UP: -1, KEEP: 0, DOWN: 1}  # scales that an edge climbs down
STEM_STRIDE = 4  # the stem takes the image to 1/4 of its resolution
SMALL_GATE_FACTOR = 4  # the small gate looks at its input at 1/4 of the size
MIN_IMAGE_SIZE = 32

Node = tuple[int, int]
Edge = tuple[int, int, int]


@dataclass(frozen=True)
class RoutingSpace:
    """All nodes and edges a network of this depth may use.

    Layer 0 has one node (scale 0), each layer has one more, until there are `num_scales`. A node sends its output up
    (to scale s-1 of the next layer), keep (s) or down (s+1); the nodes of the last layer only keep, into the decoder.

    zeros_arrive   what a closed path out of a node that runs is: nothing (False), or zeros that arrive, so that the
                   node behind it runs on them (True: the authors' network). Spaces that differ in this alone are equal

    Raises ValueError where depth and scales make no network: the last layer must have every scale.
    """

    depth: int = 16
    num_scales: int = 4
    zeros_arrive: bool = field(default=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("depth", self.depth), ("num_scales", self.num_scales)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: it must be a whole number of at least 1")
        if self.depth < self.num_scales - 1:
            raise ValueError(
                f"depth {self.depth} is too small for {self.num_scales} scales: the coarsest scale is first reached in "
                f"layer {self.num_scales - 1}. Use depth >= {self.num_scales - 1} or fewer scales"
            )

    @property
    def stride(self) -> int:
        """Image sizes are padded to a multiple of this (32 with four scales)."""
        return STEM_STRIDE * 2 ** (self.num_scales - 1)

    def scales(self, layer: int) -> range:
        """The scales that have a node in this layer."""
        return range(min(layer + 1, self.num_scales)) if 0 <= layer <= self.depth else range(0)

    def directions(self, layer: int, scale: int) -> tuple[int, ...]:
        """The legal directions out of a node, in the order up, keep, down."""
        if scale not in self.scales(layer):
            return ()
        if layer == self.depth:
            return (KEEP,)
        reach = {UP: scale > 0, KEEP: True, DOWN: scale < self.num_scales - 1}
        return tuple(d for d in (UP, KEEP, DOWN) if reach[d])

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Every node, layer by layer (62 at depth 16)."""
        return tuple((layer, s) for layer in range(self.depth + 1) for s in self.scales(layer))

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every legal edge, layer by layer."""
        return tuple((layer, s, d) for layer, s in self.nodes for d in self.directions(layer, s))

    @cached_property
    def legal(self) -> np.ndarray:
        """Mask of the legal edges, bool [L+1, S, 3]."""
        mask = np.zeros((self.depth + 1, self.num_scales, len(DIRECTIONS)), dtype=bool)
        mask[tuple(np.array(self.edges).T)] = True
        mask.flags.writeable = False
        return mask

    def reached(self, gates: np.ndarray) -> np.ndarray:
        """Which nodes something arrives at, given the gates [..., L+1, S, 3]: bool [..., L+1, S].

        These are the nodes that are fed; or, if zeros arrive, more: a reached node with an open path then sends
        alpha_j T_j(H) in every direction, be it 0 (Eq. 5 to the letter). A reached node without an open path passes its
        input along keep, for free, and sends nothing up or down.
        """
        if not self.zeros_arrive:
            return self.fed(gates)
        runs = np.any(np.asarray(gates) > 0, axis=-1)
        reached = np.zeros_like(runs)
        reached[..., 0, 0] = True
        for layer in range(self.depth):
            now, runs_now = reached[..., layer, :], runs[..., layer, :] & reached[..., layer, :]
            reached[..., layer + 1, :] |= now
            reached[..., layer + 1, :-1] |= runs_now[..., 1:]
            reached[..., layer + 1, 1:] |= runs_now[..., :-1]
        return reached

    def fed(self, gates: np.ndarray) -> np.ndarray:
        """Which nodes the stem's features arrive at, and not zeros alone, given the gates [..., L+1, S, 3]:
        bool [..., L+1, S].

        They travel along the open paths, and along keep out of a node that has none (Eq. 5). From every such node
        they go on to the decoder: a node that is not fed is the only kind of dead end there is.
        """
        is_open = np.asarray(gates) > 0
        runs = np.any(is_open, axis=-1)
        fed = np.zeros(runs.shape, dtype=bool)
        fed[..., 0, 0] = True
        for layer in range(self.depth):
            now = fed[..., layer, :, None] & is_open[..., layer, :, :]
            fed[..., layer + 1, :] |= now[..., KEEP] | (fed[..., layer, :] & ~runs[..., layer, :])
            fed[..., layer + 1, :-1] |= now[..., 1:, UP]
            fed[..., layer + 1, 1:] |= now[..., :-1, DOWN]
        return fed


@dataclass(frozen=True, init=False)
class Route:
    """Which edges of a RoutingSpace are open. Immutable, hashable, to and from JSON.

    A node that the route reaches and that has no open edge drops its cell and passes its input along keep, for free
    (Eq. 5): `skips` lists these. The number of open edges is `len(route)`.

    Raises ValueError, naming the edge, where the space does not have it, and TypeError for parts that are no integers.
    """

    space: RoutingSpace
    edges: frozenset[Edge]

    def __init__(self, space: RoutingSpace, edges: Iterable[Iterable[int]] = ()) -> None:
        chosen = frozenset(tuple(operator.index(part) for part in edge) for edge in edges)
        for edge in sorted(chosen - frozenset(space.edges)):
            raise ValueError(f"{edge_name(edge)} is no edge of {space}: {_why_illegal(space, edge)}")
        object.__setattr__(self, "space", space)
        object.__setattr__(self, "edges", chosen)

    @classmethod
    def all_open(cls, space: RoutingSpace) -> Route:
        """The route of the full network."""
        return cls(space, space.edges)

    @classmethod
    def from_gates(cls, space: RoutingSpace, gates: Any, threshold: float = 0.0) -> Route:
        """The edges whose activation is above the threshold; `gates` [L+1, S, 3] of one image."""
        values = np.asarray(gates)
        if values.shape != space.legal.shape:
            raise ValueError(f"gates have shape {values.shape}, the space needs {space.legal.shape}: give one image's")
        return cls(space, np.argwhere(values > threshold).tolist())

    def to_gates(self) -> np.ndarray:
        """Activation 1 on the open edges, float32 [L+1, S, 3]."""
        gates = np.zeros(self.space.legal.shape, dtype=np.float32)
        if self.edges:
            gates[tuple(np.array(sorted(self.edges)).T)] = 1.0
        return gates

    @cached_property
    def nodes(self) -> frozenset[Node]:
        """The nodes that have an open edge, so that their cell runs where something arrives at them."""
        return frozenset(edge[:2] for edge in self.edges)

    @cached_property
    def reached(self) -> frozenset[Node]:
        """The nodes that something arrives at (`RoutingSpace.reached`)."""
        return frozenset((layer, s) for layer, s in np.argwhere(self.space.reached(self.to_gates())).tolist())

    @cached_property
    def skips(self) -> frozenset[Node]:
        """The nodes that pass their input along keep for free (Eq. 5)."""
        return self.reached - self.nodes

    @cached_property
    def dead_ends(self) -> frozenset[Edge]:
        """The open edges that lie on no path from the stem to the decoder, free skips included: those out of nodes
        that no features arrive at (`RoutingSpace.fed`)."""
        fed = self.space.fed(self.to_gates())
        return frozenset(edge for edge in self.edges if not fed[edge[:2]])

    def pruned(self) -> Route:
        """The same route without its dead ends."""
        return Route(self.space, self.edges - self.dead_ends)

    def check(self) -> Route:
        """The route itself. Raises ValueError, naming an edge, where it has dead ends."""
        for edge in sorted(self.dead_ends):
            raise ValueError(
                f"{edge_name(edge)} is open, but no open path leads from the stem to node {edge[:2]} "
                f"({len(self.dead_ends)} such edges): open a path to it, or take the route's `pruned()`"
            )
        return self

    @property
    def named_edges(self) -> list[tuple[int, int, str]]:
        """The open edges as (layer, scale, "up" | "keep" | "down"), sorted."""
        return [(layer, scale, DIRECTIONS[direction]) for layer, scale, direction in sorted(self.edges)]

    @classmethod
    def from_named_edges(cls, space: RoutingSpace, edges: Iterable[Iterable[Any]]) -> Route:
        """The inverse of `named_edges`. Raises ValueError for an edge that is none, or is not in the space."""
        listed: list[Edge] = []
        for edge in edges:
            try:
                layer, scale, name = edge
                listed.append((operator.index(layer), operator.index(scale), DIRECTIONS.index(name)))
            except (TypeError, ValueError) as error:
                raise ValueError(f'{edge!r} is no edge: give [layer, scale, "up" | "keep" | "down"]') from error
        return cls(space, listed)

    def to_json(self) -> str:
        """A JSON object with `depth`, `num_scales` and `open`, the list of [layer, scale, "up" | "keep" | "down"]."""
        return json.dumps({"depth": self.space.depth, "num_scales": self.space.num_scales, "open": self.named_edges})

    @classmethod
    def from_json(cls, text: str) -> Route:
        """The inverse of `to_json`. Raises ValueError where the text is no route."""
        try:
            data = json.loads(text)
            space = RoutingSpace(data["depth"], data["num_scales"])
            return cls.from_named_edges(space, data["open"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"not a route: {error}. Expected a JSON object with depth, num_scales and open, "
                'a list of [layer, scale, "up" | "keep" | "down"]'
            ) from error

    def __len__(self) -> int:
        return len(self.edges)

    def __iter__(self) -> Iterator[Edge]:
        return iter(sorted(self.edges))

    def __contains__(self, edge: object) -> bool:
        return edge in self.edges


def padded_size(space: RoutingSpace, height: int, width: int) -> tuple[int, int]:
    """The size that is computed for an image of this size: the next multiples of the space's stride."""
    stride = space.stride
    return math.ceil(height / stride) * stride, math.ceil(width / stride) * stride


def edge_name(edge: tuple[int, ...]) -> str:
    """An edge as messages call it: edge (3, 1, 2) (down)."""
    name = DIRECTIONS[edge[2]] if len(edge) == 3 and edge[2] in range(3) else "?"
    return f"edge {tuple(edge)} ({name})"


def _why_illegal(space: RoutingSpace, edge: tuple[int, ...]) -> str:
    if len(edge) != 3 or edge[2] not in range(3):
        return "an edge is (layer, scale, direction), direction 0 up, 1 keep, 2 down"
    layer, scale, _ = edge
    if not 0 <= layer <= space.depth:
        return f"layers run from 0 to {space.depth}. Was the route drawn for another depth?"
    if scale not in space.scales(layer):
        return f"layer {layer} has scales 0 to {len(space.scales(layer)) - 1}"
    legal = ", ".join(DIRECTIONS[d] for d in space.directions(layer, scale))
    return f"node ({layer}, {scale}) only has {legal}"
