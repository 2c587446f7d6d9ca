"""How multiply-accumulates (MACs) are counted: of a part of a network, for any image size, in any convention.

A part says what it costs as a sum of terms; nothing is measured here, and torch is not imported.

Legend: H, W (padded) image size; C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from routeseg.space import SMALL_GATE_FACTOR


@dataclass(frozen=True)
class Convention:
    """What is counted, in MACs per element of a map (or per MAC of a convolution).

    `authors_sizes`: the sizes that the authors' counter believes in. It takes the stem's first convolution for padded,
    though that has H/2 - 1 rows, not H/2. In the decoder it takes the image's height for its width.
    """

    conv: float = 1.0
    norm: float = 2.0
    relu: float = 1.0
    pool: float = 1.0
    resize: float = 0.0  # per output element of a bilinear resizing
    product: float = 0.0  # per element of a path's output, times its activation
    authors_sizes: bool = False


CONVENTIONS = {
    # As the authors count: without bilinear resizing and without the products with the gates.
    "authors": Convention(authors_sizes=True),
    # Everything a forward computes: a bilinear output element takes 4 MACs, a product with an activation 1.
    "full": Convention(resize=4.0, product=1.0),
    # Only the convolutions, as torch.utils.flop_counter sees them.
    "conv": Convention(norm=0.0, relu=0.0, pool=0.0),
}
UNITS = tuple(one.name for one in fields(Convention) if one.type == "float")

# A term is counted over a map that has the image's size divided by `stride`, except for
SMALL = "small"  # a quarter of that, as the small gate sees it, at least one pixel
UNPADDED = "unpadded"  # one row and column less
DECODER = "decoder"  # a map that the authors' counter takes for square
ONCE = "once"  # a single element
MAP = "map"
PLACES = (MAP, SMALL, UNPADDED, DECODER, ONCE)


@dataclass(frozen=True)
class Count:
    """`amount` of a unit of `Convention` for each element of a map. It has the image's size divided by `stride`."""

    unit: str
    amount: float
    stride: int
    place: str = MAP

    def elements(self, height: int, width: int, convention: Convention) -> float:
        """The elements of the map, for an image of this size."""
        if self.place == ONCE:
            return 1
        if self.place == DECODER and convention.authors_sizes:
            width = height
        h, w = height // self.stride, width // self.stride
        if self.place == SMALL:
            h, w = (max(1, side // SMALL_GATE_FACTOR) for side in (h, w))
        if self.place == UNPADDED and not convention.authors_sizes:
            h, w = h - 1, w - 1
        return h * w


@dataclass(frozen=True)
class Macs:
    """MACs of a part, for images of any size: `macs.count((H, W), convention)`. Sums of parts are sums of these."""

    terms: tuple[Count, ...] = ()

    def __add__(self, other: Macs) -> Macs:
        return Macs(self.terms + other.terms)

    def count(self, size: tuple[int, int], convention: Convention) -> float:
        """MACs at an image size (height, width) that the stride of the space divides."""
        return sum(
            getattr(convention, term.unit) * term.amount * term.elements(*size, convention) for term in self.terms
        )

    def as_json(self) -> list[list[Any]]:
        """The terms as JSON has them."""
        return [[term.unit, term.amount, term.stride, term.place] for term in self.terms]

    @classmethod
    def from_json(cls, rows: Any) -> Macs:
        """The inverse of `as_json`. Raises ValueError if it is none."""
        try:
            terms = tuple(Count(unit, amount, stride, place) for unit, amount, stride, place in rows)
        except TypeError as error:
            raise ValueError(f"costs of a part are damaged: {error}") from error
        for term in terms:
            numbers = all(isinstance(n, int | float) and not isinstance(n, bool) for n in (term.amount, term.stride))
            if not numbers or not (0 <= term.amount < math.inf and 1 <= term.stride) or term.stride != int(term.stride):
                raise ValueError(f"costs of a part are damaged: {term}")
            if term.unit not in UNITS or term.place not in PLACES:
                raise ValueError(f"costs of a part are damaged: {term}")
        return cls(terms)


NOTHING = Macs()


def each(unit: str, amount: float, stride: int, place: str = MAP) -> Macs:
    """So much of a unit for each element of a map."""
    return Macs((Count(unit, amount, stride, place),))


def conv_norm_macs(fan_in: int, channels: int, stride: int, relu: bool = True, place: str = MAP) -> Macs:
    """A convolution with `fan_in` weights for each output element, its norm and ReLU; `stride` is the output's."""
    terms = [Count("conv", fan_in * channels, stride, place), Count("norm", channels, stride, place)]
    return Macs(tuple(terms + [Count("relu", channels, stride, place)] * relu))


def separable(
    in_channels: int, out_channels: int, kernel: int, stride: int, relu: bool = True, place: str = MAP
) -> Macs:
    """A depthwise convolution, then a 1x1 convolution with norm and ReLU; `stride` is the output's."""
    return each("conv", in_channels * kernel**2, stride, place) + conv_norm_macs(
        in_channels, out_channels, stride, relu, place
    )


@dataclass(frozen=True)
class PartMacs:
    """MACs of the parts of a network.

    stem, head   always paid
    cell         by scale, for a node that runs
    gate         by scale, then by the number of directions (less one), for a node that something arrives at
    transform    by scale, then direction, for an open path
    stages       of a backbone: what the paths down the diagonal, from (0,0) on, cost beside their transforms
    decision     at an exit, for whoever decides there
    """

    stem: Macs
    head: Macs
    cell: tuple[Macs, ...]
    gate: tuple[tuple[Macs, ...], ...]
    transform: tuple[tuple[Macs, ...], ...]
    stages: tuple[Macs, ...] = ()
    decision: Macs = NOTHING

    def as_json(self) -> dict[str, Any]:
        """The parts as JSON has them."""

        def plain(part: Any) -> Any:
            return part.as_json() if isinstance(part, Macs) else [plain(one) for one in part]

        return {one.name: plain(getattr(self, one.name)) for one in fields(self)}

    @classmethod
    def from_json(cls, data: Any, num_scales: int) -> PartMacs:
        """The inverse of `as_json`. Raises ValueError if it is none, or lacks a scale."""

        def listed(rows: Any, count: int) -> Sequence[Any]:
            if not isinstance(rows, Sequence) or len(rows) != count:
                raise ValueError("costs of its parts are damaged")
            return rows

        def parts(rows: Any, count: int) -> tuple[Macs, ...]:
            return tuple(Macs.from_json(row) for row in listed(rows, count))

        try:
            return cls(
                Macs.from_json(data["stem"]),
                Macs.from_json(data["head"]),
                parts(data["cell"], num_scales),
                tuple(parts(row, 3) for row in listed(data["gate"], num_scales)),
                tuple(parts(row, 3) for row in listed(data["transform"], num_scales)),
                parts(data.get("stages", ()), len(data.get("stages", ()))),
                Macs.from_json(data.get("decision", ())),
            )
        except (KeyError, TypeError) as error:
            raise ValueError("costs of its parts are missing") from error
