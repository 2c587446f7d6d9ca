"""What makes a network: all that is known of it but its weights. Checked once, when it is made; no torch here.

`config.json` of a checkpoint is this dataclass, and an exported file carries it in its metadata.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from routeseg.architectures import architecture
from routeseg.labels import Colour, default_palette
from routeseg.registry import BACKBONES, CHOICES, GATES, HEADS, OPERATIONS
from routeseg.space import (
    DOWN,
    MAX_DEPTH,
    MAX_EDGES,
    Route,
    RoutingSpace,
    Size,
    brief,
    padded_size,
    place_sides,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NO_GATE = "fixed"
# Far beyond any real network: what is larger is a mistake, and asks for more memory than there is.
MAX_CHANNELS, MAX_CLASSES, MAX_OPERATIONS = 1024, 1 << 15, 8
LEAST_PLACE, MAX_PLACE = 16, 1024  # pixels
MAX_SIZE, MAX_SIZES = 4.0, 16  # a factor of an image's sides, and how many of them
MAX_NAME = 256  # characters of a class name
MAX_PIXEL, MIN_STD = 1e6, 1e-6  # of the input normalisation
NamedEdge = tuple[int, int, str]
LATER = frozenset({"exits.gates.weights"})  # tensors that networks of before lack; all 1 in them


@dataclass(frozen=True)
class NetworkConfig:
    """What makes a network.

    num_classes      K
    depth            L, the layers after the first node
    num_scales       S, 1/4 of the image's resolution and S-1 halvings
    base_channels    C at scale 0, doubling with each scale; even
    stem_channels    width of the stem's first two convolutions
    cell_operations  names in registry.OPERATIONS, summed (Eq. 1)
    gate             a name in registry.GATES: soft (Eq. 4), softmax (one path leaves each node); or fixed: no gates,
                     all paths open
    small_gate       gates look at a quarter-size input (used with a budget)
    route            a static network: only the parts that this route uses exist. A name of
                     `architectures.DRAWN`, or its edges (layer, scale, "up" | "keep" | "down"). Needs gate "fixed"
    exits            layers behind which an image may leave the grid, for a network of any budget (model/exits.py): all
                     that lies behind them is closed then. The last layer is one of them in any case. Needs gate "fixed"
    choice           a name in registry.CHOICES, what decides at the exits (model/choice.py): loss, or entropy; by
                     default loss for whole images, entropy for places
    place            side of the squares of an image that leave by themselves (model/places.py), in pixels; a multiple
                     of the coarsest stride, and of 16. None: images leave as wholes
    sizes            at which a budget may have images looked at, factors of their sides, 1 among them; or two factors,
                     of a first look and of a closer one, at the places where the first is unsure (model/closer.py):
                     those need places and a backbone. None: images are looked at as they are
    backbone         a name in registry.BACKBONES: a pretrained network in the stem's place, whose stages run beside the
                     paths down the diagonal (model/backbone.py); stem_channels means nothing then
    head             a name in registry.HEADS: decoder (it segments), or classifier (of a whole image)
    zeros_arrive     closed paths send zeros that arrive, as in the authors' networks (`space.step`): those need it
    class_names      of each class; by default "class 0" and so on
    palette          RGB 0..255 of each class; by default far from each other; grey for a class 0 called background
    pixel_mean, pixel_std   input normalisation of RGB in 0..1

    Raises ValueError, naming the field, if they make no network.
    """

    num_classes: int = 19
    depth: int = 16
    num_scales: int = 4
    base_channels: int = 64
    stem_channels: int = 64
    cell_operations: Sequence[str] = ("sep_conv_3x3", "identity")
    gate: str = "soft"
    small_gate: bool = False
    route: str | Sequence[NamedEdge] | None = None
    exits: Sequence[int] | None = None
    choice: str | None = None
    place: int | None = None
    sizes: Sequence[Any] | None = None
    backbone: str | None = None
    head: str = "decoder"
    zeros_arrive: bool = False
    class_names: Sequence[str] = ()
    palette: Sequence[Colour] = ()
    pixel_mean: Sequence[float] = IMAGENET_MEAN
    pixel_std: Sequence[float] = IMAGENET_STD

    def __post_init__(self) -> None:
        space = RoutingSpace(self.depth, self.num_scales)
        for name, least, most in (
            ("num_classes", 1, MAX_CLASSES),
            ("base_channels", 2, MAX_CHANNELS),
            ("stem_channels", 1, MAX_CHANNELS),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name} is {brief(value)}: it must be a whole number from {least} to {most}")
        if self.base_channels % 2:
            raise ValueError(f"base_channels is {self.base_channels}: it must be even, a gate works on half of them")
        for name in ("small_gate", "zeros_arrive"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {brief(getattr(self, name))}: it must be true or false")
        self._set("cell_operations", _operations(self.cell_operations))
        if not isinstance(self.gate, str) or self.gate not in (*GATES, NO_GATE):
            raise ValueError(f"gate is {brief(self.gate)}: choose one of {', '.join((*GATES, NO_GATE))}")
        self._set("route", _route(space, self.gate, self.route))
        self._set("exits", _exits(space, self.gate, self.whole_route, self.exits))
        self._check_choice()
        if self.backbone is not None and (not isinstance(self.backbone, str) or self.backbone not in BACKBONES):
            raise ValueError(
                f"backbone is {brief(self.backbone)}: choose one of {', '.join(BACKBONES)}, or leave it out"
            )
        if not isinstance(self.head, str) or self.head not in HEADS:
            raise ValueError(f"head is {brief(self.head)}: choose one of {', '.join(HEADS)}")
        if self.backbone is not None and self.zeros_arrive:
            raise ValueError("zeros_arrive is for the authors' networks, which have no backbone: leave one of them out")
        # A static network has no dead ends, so zeros could change nothing.
        self._set("zeros_arrive", self.zeros_arrive and self.route is None)
        names = self.class_names or [f"class {k}" for k in range(self.num_classes)]
        self._set("class_names", _per_class("class_names", names, self.num_classes, _class_name))
        colours = self.palette or default_palette(self.class_names)
        self._set("palette", _per_class("palette", colours, self.num_classes, _colour))
        self._set("pixel_mean", _three_numbers("pixel_mean", self.pixel_mean))
        self._set("pixel_std", _three_numbers("pixel_std", self.pixel_std))
        if min(self.pixel_std) < MIN_STD:
            raise ValueError(f"pixel_std is {list(self.pixel_std)}: its numbers must be at least {MIN_STD:g}")

    def _check_choice(self) -> None:
        place, least = self.place, max(self.space.stride, LEAST_PLACE)
        if self.exits is None:
            for name in ("choice", "place", "sizes"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is {brief(getattr(self, name))}, but there are no exits: name some, or make it null"
                    )
            return
        if place is not None and (
            isinstance(place, bool) or not isinstance(place, int) or not 0 < place <= MAX_PLACE or place % least
        ):
            raise ValueError(f"place is {brief(place)}: it must be a multiple of {least} up to {MAX_PLACE}")
        self._set("sizes", _sizes(self.sizes))
        if any(isinstance(one, tuple) for one in self.sizes or ()) and (place is None or self.backbone is None):
            raise ValueError(
                f"sizes is {brief(self.sizes)}: a closer look needs a place and a backbone; leave the pairs out"
            )
        self._set("choice", self.choice or ("loss" if place is None else "entropy"))
        if not isinstance(self.choice, str) or self.choice not in CHOICES:
            raise ValueError(f"choice is {brief(self.choice)}: choose one of {', '.join(CHOICES)}")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, data: Any) -> NetworkConfig:
        """The inverse of `as_dict`; fields that are missing have their defaults.

        Raises ValueError, naming the field, if one is unknown or they make no network.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"it holds no object, but {brief(data)}")
        known = [one.name for one in fields(cls)]
        for name in data:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                raise ValueError(
                    f"there is no field {brief(name)}: " + (f"did you mean {near[0]}?" if near else "leave it out")
                )
        return cls(**data)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return asdict(self)

    @cached_property
    def space(self) -> RoutingSpace:
        """The grid of nodes and edges."""
        return RoutingSpace(self.depth, self.num_scales)

    @cached_property
    def whole_route(self) -> Route:
        """The edges that the network has: those of its route, or all."""
        if self.route is None:
            return Route.all_open(self.space)
        assert not isinstance(self.route, str)
        return Route.from_named_edges(self.space, self.route)

    @cached_property
    def mask(self) -> np.ndarray:
        """The edges that the network has, bool [1,L+1,S,3]: not to be written to."""
        return self.whole_route.to_gates()[None] > 0

    @cached_property
    def exit_routes(self) -> tuple[Route, ...]:
        """The routes of a network with exits, cheapest first: its own as far as each exit."""
        assert self.exits is not None
        return tuple(Route(self.space, [e for e in self.whole_route.edges if e[0] <= exit]) for exit in self.exits)

    @property
    def named_routes(self) -> dict[str, Route]:
        """The routes as far as each exit, as commands call them: exit-LAYER; none without exits."""
        return {} if self.exits is None else dict(zip((f"exit-{e}" for e in self.exits), self.exit_routes, strict=True))

    @cached_property
    def backbone_stages(self) -> int:
        """How many stages of its backbone the network has: the first, and one for each path down the diagonal."""
        if self.backbone is None:
            return 0
        count = 1
        while (count - 1, count - 1, DOWN) in self.whole_route.edges:
            count += 1
        return count

    def place_count(self, size: tuple[int, int]) -> int | None:
        """How many places an image (height, width) has; None if images leave as wholes."""
        if self.place is None:
            return None
        return math.prod(place_sides(padded_size(self.space, *size), self.place))

    @property
    def gated(self) -> bool:
        """Whether there are gates."""
        return self.gate != NO_GATE

    def channels(self, scale: int) -> int:
        """Channels of the maps of a scale."""
        return self.base_channels * 2**scale


def _operations(names: Any) -> tuple[str, ...]:
    """Checked `cell_operations`."""
    listed = _list("cell_operations", names, MAX_OPERATIONS)
    unknown = [name for name in listed if not isinstance(name, str) or name not in OPERATIONS]
    if unknown or not listed:
        raise ValueError(f"cell_operations is {brief(names)}: choose at least one of {', '.join(OPERATIONS)}")
    if len(set(listed)) != len(listed):
        raise ValueError(f"cell_operations {listed} names an operation twice")
    return tuple(listed)


def _route(space: RoutingSpace, gate: str, route: Any) -> tuple[NamedEdge, ...] | None:
    """Checked `route`, as edges: so a checkpoint does not depend on how a known network is drawn."""
    if route is None:
        return None
    if gate != NO_GATE:
        raise ValueError(f"a network of a fixed route has no gates: set gate to {NO_GATE}, or leave route out")
    if isinstance(route, str):
        return tuple(architecture(route, space).named_edges)
    edges = Route.from_named_edges(space, _list("route", route, MAX_EDGES))
    if not len(edges):
        raise ValueError("route has no edges: give at least one, or leave route out for the whole space")
    return tuple(edges.check().named_edges)


def _exits(space: RoutingSpace, gate: str, whole: Route, exits: Any) -> tuple[int, ...] | None:
    """Checked `exits`, in order, with the last layer."""
    if exits is None:
        return None
    if gate != NO_GATE:
        raise ValueError(f"a network with exits has no gates beside them: set gate to {NO_GATE}, or leave exits out")
    listed = _list("exits", exits, MAX_DEPTH + 1)
    if any(isinstance(one, bool) or not isinstance(one, int) or not 0 <= one <= space.depth for one in listed):
        raise ValueError(f"exits is {brief(exits)}: its layers must be whole numbers from 0 to {space.depth}")
    found = tuple(sorted({*listed, space.depth}))
    layers = {layer for layer, _ in whole.nodes}
    for before, after in zip((-1, *found), found, strict=False):
        if not layers & set(range(before + 1, after + 1)):
            raise ValueError(
                f"exits is {brief(exits)}: the route has no open path in the layers {before + 1} to {after}"
            )
    if len(found) < 2:
        raise ValueError(f"exits is {brief(exits)}: name a layer before the last one, {space.depth}")
    return found


def _sizes(sizes: Any) -> tuple[Size, ...] | None:
    """Checked `sizes`, ascending, pairs behind all others."""
    if sizes is None:
        return None
    listed = [tuple(one) if isinstance(one, list) else one for one in _list("sizes", sizes, MAX_SIZES)]
    singles = [one for one in listed if not isinstance(one, tuple)]
    pairs = [one for one in listed if isinstance(one, tuple)]
    if not all(is_size(one) for one in listed) or 1 not in singles:
        raise ValueError(
            f"sizes is {brief(sizes)}: give factors of an image's sides, above 0 up to {MAX_SIZE:g}, 1 among them, or "
            "two, the smaller one first"
        )
    return (*sorted({float(one) for one in singles}), *sorted({(float(a), float(b)) for a, b in pairs}))


def is_size(size: Any) -> bool:
    """Whether it is a factor of an image's sides, or a smaller and a larger one."""
    if isinstance(size, tuple):
        return len(size) == 2 and all(is_size(one) and not isinstance(one, tuple) for one in size) and size[0] < size[1]
    return isinstance(size, int | float) and not isinstance(size, bool) and 0 < size <= MAX_SIZE


def _list(name: str, value: Any, most: int) -> list[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise ValueError(f"{name} is {brief(value)}: it must be a list")
    if len(value) > most:
        raise ValueError(f"{name} has {len(value)} entries, at most {most} make sense")
    return list(value)


def _per_class(name: str, value: Any, num_classes: int, check: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    """A checked entry for each class."""
    entries = _list(name, value, MAX_CLASSES)
    if len(entries) != num_classes:
        raise ValueError(f"{name} has {len(entries)} entries for {num_classes} classes")
    return tuple(check(f"{name}[{k}]", entry) for k, entry in enumerate(entries))


def _class_name(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise ValueError(f"{name} is {brief(value)}: it must be a text of at most {MAX_NAME} characters")
    return value


def _colour(name: str, value: Any) -> Colour:
    parts = _list(name, value, MAX_CLASSES)
    whole = all(isinstance(part, int) and not isinstance(part, bool) for part in parts)
    if len(parts) != 3 or not whole or not all(0 <= part <= 255 for part in parts):
        raise ValueError(f"{name} is {brief(value)}: a colour is three whole numbers from 0 to 255")
    return parts[0], parts[1], parts[2]


def _three_numbers(name: str, value: Any) -> tuple[float, float, float]:
    numbers = _list(name, value, MAX_CLASSES)
    real = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
    if len(numbers) != 3 or not real or not all(abs(number) <= MAX_PIXEL for number in numbers):  # NaN is not
        raise ValueError(
            f"{name} is {brief(value)}: it must be three numbers up to {MAX_PIXEL:g}, for red, green and blue"
        )
    return float(numbers[0]), float(numbers[1]), float(numbers[2])
