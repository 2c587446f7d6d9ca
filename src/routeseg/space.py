"""The routing space (Sec. 3.1): a grid of nodes over layers and scales, and the edges between them. No torch here.

`step` is the one step of a walk through the grid: who runs, who passes its input on, who is reached in the next layer.

Legend: L depth, S number of scales, B images.
    node  (layer, scale)             layer 0..L, scale 0..S-1; scale s has 1 / (4 * 2**s) of the image's resolution
    edge  (layer, scale, direction)  leaves that node; direction UP (0), KEEP (1) or DOWN (2)
    gates [..., L+1, S, 3]           one activation per edge; 0 is closed
"""

from __future__ import annotations

import json
import math
import operator
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np

from routeseg.files import parse_json

UP, KEEP, DOWN = 0, 1, 2
DIRECTIONS = ("up", "keep", "down")
SCALE_STEP = {UP: -1, KEEP: 0, DOWN: 1}  # scales that an edge climbs down
STEM_STRIDE = 4  # the stem takes the image to 1/4 of its resolution
SMALL_GATE_FACTOR = 4  # the small gate looks at its input at 1/4 of the size
MIN_IMAGE_SIZE = 32
FIRST_LOOK = -1  # in the place of an exit: a place that was not looked at closer
# A factor of an image's sides; or two: of a first look, and of a closer one where that is unsure.
Size = float | tuple[float, float]
MAX_DEPTH, MAX_SCALES = 128, 6  # far beyond any network of the paper (33 and 4): what is larger is a mistake
MAX_EDGES = 3 * (MAX_DEPTH + 1) * MAX_SCALES

Node = tuple[int, int]
Edge = tuple[int, int, int]


@dataclass(frozen=True)
class RoutingSpace:
    """All nodes and edges a network of this depth may use.

    Layer 0 has one node (scale 0), each layer has one more, until there are `num_scales`. A node sends its output up
    (to scale s-1 of the next layer), keep (s) or down (s+1); the nodes of the last layer only keep, into the decoder.

    Raises ValueError if depth and scales make no network: the last layer must have every scale, and neither may be
    beyond MAX_DEPTH, MAX_SCALES.
    """

    depth: int = 16
    num_scales: int = 4

    def __post_init__(self) -> None:
        for name, value, most in (("depth", self.depth, MAX_DEPTH), ("num_scales", self.num_scales, MAX_SCALES)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} is {brief(value)}: it must be a whole number from 1 to {most}")
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

    def reached(self, gates: np.ndarray, zeros_arrive: bool = False) -> np.ndarray:
        """Which nodes something arrives at, given the gates [..., L+1, S, 3]: bool [..., L+1, S].

        zeros_arrive  closed paths of nodes that run send zeros (see `step`). Otherwise these are the nodes that the
                      stem's features arrive at. From each of them features go on to the decoder: the only dead ends
                      are nodes that are not reached
        """
        layers = [one.arrived for one in walk(self, gates, zeros_arrive)]
        absent = np.zeros_like(layers[0][0])
        rows = [np.stack([*flags, *[absent] * (self.num_scales - len(flags))], axis=-1) for flags in layers]
        return np.stack(rows, axis=-2)


Flag = TypeVar("Flag")  # of one image or of several: anything that has &, | and ~, such as arrays of bools


@dataclass(frozen=True)
class Step(Generic[Flag]):
    """What the nodes of a layer do, and which nodes they reach. Flags are by scale, for the layer's nodes alone.

    arrived  something arrived at the node
    runs     a path is open: the cell runs
    passes   no path is open: the cell is dropped, and the input goes on along keep, for free (Eq. 5)
    sends    (scale, direction) -> something leaves along this edge
    reached  something arrives at the node of this scale in the next layer; behind the last layer, in the decoder
    """

    arrived: tuple[Flag, ...]
    runs: tuple[Flag, ...]
    passes: tuple[Flag, ...]
    sends: Mapping[tuple[int, int], Flag]
    reached: tuple[Flag, ...]


def step(
    space: RoutingSpace, layer: int, arrived: Sequence[Any], is_open: Sequence[Sequence[Any]], zeros_arrive: bool
) -> Step[Any]:
    """A step of the walk through the grid (Eq. 5), for flags of any kind: bools of numpy or torch, values of a graph.

    arrived       by scale: has something arrived at the layer's node?
    is_open       by scale, then direction up, keep, down: would its gate open this path?
    zeros_arrive  what a closed path of a running node sends: nothing (False), or zeros that arrive, so that the next
                  node runs on them (True: the authors' networks)
    """
    scales = space.scales(layer)
    runs, passes, sends = [], [], {}
    reached: list[Any] = [None] * len(space.scales(min(layer + 1, space.depth)))

    def reach(scale: int, flag: Any) -> None:
        reached[scale] = flag if reached[scale] is None else reached[scale] | flag

    for scale in scales:
        up, keep, down = is_open[scale]
        legal = [(up, keep, down)[direction] for direction in space.directions(layer, scale)]
        some = legal[0]
        for flag in legal[1:]:
            some = some | flag
        runs.append(arrived[scale] & some)
        passes.append(arrived[scale] & ~some)
        for direction, flag in zip(space.directions(layer, scale), legal, strict=True):
            sends[scale, direction] = runs[scale] if zeros_arrive else arrived[scale] & flag
            reach(scale + SCALE_STEP[direction], sends[scale, direction])
        reach(scale, passes[scale])
    return Step(tuple(arrived[s] for s in scales), tuple(runs), tuple(passes), sends, tuple(reached))


def walk(space: RoutingSpace, gates: np.ndarray, zeros_arrive: bool = False) -> Iterator[Step[np.ndarray]]:
    """The steps through all layers, given the gates [..., L+1, S, 3]; flags are bool [...]."""
    is_open = np.asarray(gates) > 0
    arrived: Sequence[np.ndarray] = [np.ones(is_open.shape[:-3], dtype=bool)]  # the stem's features
    for layer in range(space.depth + 1):
        by_scale = [[is_open[..., layer, scale, d] for d in (UP, KEEP, DOWN)] for scale in space.scales(layer)]
        one = step(space, layer, arrived, by_scale, zeros_arrive)
        yield one
        arrived = one.reached


@dataclass(frozen=True, init=False)
class Route:
    """Which edges of a RoutingSpace are open. Immutable, hashable, to and from JSON.

    A node that the route reaches and that has no open edge drops its cell and passes its input along keep, for free
    (Eq. 5): `skips` lists these. The number of open edges is `len(route)`.

    Raises ValueError, naming the edge, if the space does not have it, and TypeError for parts that are no integers.
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
        """The nodes that have an open edge, so that their cell runs if something arrives at them."""
        return frozenset(edge[:2] for edge in self.edges)

    @cached_property
    def reached(self) -> frozenset[Node]:
        """The nodes that features arrive at (`RoutingSpace.reached`)."""
        return frozenset((layer, s) for layer, s in np.argwhere(self.space.reached(self.to_gates())).tolist())

    @cached_property
    def skips(self) -> frozenset[Node]:
        """The nodes that pass their input along keep for free (Eq. 5)."""
        return self.reached - self.nodes

    @cached_property
    def dead_ends(self) -> frozenset[Edge]:
        """The open edges on no path from the stem to the decoder; a free skip counts as part of a path. They are the
        edges out of nodes that no features arrive at."""
        return frozenset(edge for edge in self.edges if edge[:2] not in self.reached)

    def pruned(self) -> Route:
        """The same route without its dead ends."""
        return Route(self.space, self.edges - self.dead_ends)

    def check(self) -> Route:
        """The route itself. Raises ValueError, naming an edge, if it has dead ends."""
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
        """The inverse of `named_edges`. Raises ValueError for an entry that is no edge, or not in the space."""
        listed: list[Edge] = []
        for edge in edges:
            try:
                layer, scale, name = edge
                listed.append((operator.index(layer), operator.index(scale), DIRECTIONS.index(name)))
            except (TypeError, ValueError) as error:
                raise ValueError(f'{brief(edge)} is no edge: give [layer, scale, "up" | "keep" | "down"]') from error
            if len(listed) > MAX_EDGES:
                raise ValueError(f"more than {MAX_EDGES} edges are listed: no space has so many")
        return cls(space, listed)

    def to_json(self) -> str:
        """A JSON object with `depth`, `num_scales` and `open`, the list of [layer, scale, "up" | "keep" | "down"]."""
        return json.dumps({"depth": self.space.depth, "num_scales": self.space.num_scales, "open": self.named_edges})

    @classmethod
    def from_json(cls, text: str | bytes) -> Route:
        """The inverse of `to_json`. Raises ValueError if the text is no route."""
        try:
            data = parse_json(text)
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


def is_diagonal(layer: int, scale: int, direction: int) -> bool:
    """Whether an edge is a step down the diagonal from (0,0): a stage of a backbone runs beside it."""
    return layer == scale and direction == DOWN


def padded_size(space: RoutingSpace, height: int, width: int) -> tuple[int, int]:
    """The size that is computed for an image of this size: the next multiples of the space's stride."""
    stride = space.stride
    return math.ceil(height / stride) * stride, math.ceil(width / stride) * stride


def place_sides(padded: tuple[int, int], place: int) -> tuple[int, int]:
    """How many places of `place` pixels a padded image (height, width) has along each side."""
    return math.ceil(padded[0] / place), math.ceil(padded[1] / place)


def seen_size(own: tuple[int, int], size: Size) -> tuple[int, int]:
    """The size (height, width) of an image whose sides are `size` times as long, but none below MIN_IMAGE_SIZE for
    that; that of the closer look, of two."""
    if isinstance(size, tuple):
        return seen_size(own, size[1])
    height, width = (min(max(round(side * size), MIN_IMAGE_SIZE), max(side, round(side * size))) for side in own)
    return height, width


def looks_of(size: Size) -> tuple[float, ...]:
    """The factors of the looks at an image, one or two."""
    return size if isinstance(size, tuple) else (size,)


def first_size(own: tuple[int, int], size: Size) -> tuple[int, int] | None:
    """The size (height, width) at which an image is looked at first, if it is looked at twice."""
    return seen_size(own, size[0]) if isinstance(size, tuple) else None


def size_words(size: Size) -> str:
    """A size as messages and files write it: 0.7, or 0.5-1."""
    return "-".join(f"{one:g}" for one in looks_of(size))


def over_pixels(
    places: np.ndarray, place: int, own: tuple[int, int], seen: tuple[int, int] | None = None
) -> np.ndarray:
    """A value for each place [hb,wb] as one for each pixel [H,W] of an image of this size.

    place  side of a place in pixels
    seen   (h, w), the size of the image of which a place is so many pixels; None: its own
    """
    rows, columns = (
        ((np.arange(side) + 0.5) * there / (side * place)).astype(int)
        for side, there in zip(own, seen or own, strict=True)
    )
    pixels: np.ndarray = places[rows][:, columns]
    return pixels


def brief(value: Any) -> str:
    """A value as messages show it: 80 characters at most, however large it is."""
    text = reprlib.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
