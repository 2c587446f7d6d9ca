"""What a route costs: multiply-accumulates (MACs) of every node and edge.

All of it is a pure function of (space, widths, classes, image size) and gates or a route; nothing is measured here, and
torch is not imported.

Legend: L depth, S scales, B images.
    gates [B, L+1, S, 3]   activation of every edge, direction 0 up, 1 keep, 2 down
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from routeseg.space import DOWN, KEEP, SMALL_GATE_FACTOR, STEM_STRIDE, UP, Route, RoutingSpace

if TYPE_CHECKING:
    from torch import Tensor

    from routeseg.description import NetworkDescription
    from routeseg.model.classifier import DynamicRoutingClassifier
    from routeseg.model.grid import RoutingGrid


@dataclass(frozen=True)
class Convention:
    """What is counted, in MACs per element of a map (or per MAC of a convolution).

    `authors_sizes`: the sizes that the authors' counter believes in. It takes the stem's first convolution for padded
    (it has H/2 - 1 rows, not H/2), and in the decoder the image's height for its width.
    """

    conv: float = 1.0
    norm: float = 2.0
    relu: float = 1.0
    pool: float = 1.0
    resize: float = 0.0  # per output element of a bilinear resizing
    gate_product: float = 0.0  # per element of a path's output, times its activation
    authors_sizes: bool = False


CONVENTIONS = {
    # As the authors count, who leave out bilinear resizing and the products with the gates.
    "authors": Convention(authors_sizes=True),
    # Everything a forward computes: a bilinear output element takes 4 MACs, a product with an activation 1.
    "full": Convention(resize=4.0, gate_product=1.0),
    # Only the convolutions, as torch.utils.flop_counter sees them.
    "conv": Convention(norm=0.0, relu=0.0, pool=0.0),
}


@dataclass(frozen=True)
class CostTable:
    """MACs of each part at one image size, float64.

    stem, decoder   always paid
    gate [L+1,S]    paid by every node that is reached (0 in a network without gates)
    cell [L+1,S]    paid by every node with an open path
    edge [L+1,S,3]  paid by every open path
    """

    space: RoutingSpace
    stem: float
    decoder: float
    gate: np.ndarray
    cell: np.ndarray
    edge: np.ndarray

    @property
    def full(self) -> float:
        """Cost with every path open."""
        return float(self.stem + self.decoder + self.gate.sum() + self.cell.sum() + self.edge.sum())

    @property
    def budgeted(self) -> float:
        """The part that the budget speaks of: all cells and transforms (the denominator of Eq. 9)."""
        return float(self.cell.sum() + self.edge.sum())

    def of_gates(self, gates: Tensor | np.ndarray) -> np.ndarray:
        """Real cost of each image from its gates [B,L+1,S,3] (or [L+1,S,3]): MACs, float64 [B] (or a scalar array)."""
        values = gates.detach().cpu().numpy() if hasattr(gates, "detach") else np.asarray(gates)
        reached = self.space.reached(values)
        open_edges = (values > 0) & reached[..., None]
        return (
            self.stem
            + self.decoder
            + (reached * self.gate).sum((-1, -2))
            + (open_edges.any(-1) * self.cell).sum((-1, -2))
            + (open_edges * self.edge).sum((-1, -2, -3))
        )

    def of_route(self, route: Route, count_gates: bool = False) -> float:
        """Cost of a fixed route in MACs. Its gates need not run, so they are counted only if asked: those of every node
        that it reaches, as a network forced to it pays them."""
        table = self if count_gates else replace(self, gate=np.zeros_like(self.gate))
        return float(table.of_gates(route.to_gates()))

    def expected(self, gates: Tensor) -> Tensor:
        """Eq. 7 summed over the space: max_j(alpha_j) C(cell) + sum_j alpha_j C(T_j); MACs [B], differentiable."""
        cell, edge = gates.new_tensor(self.cell), gates.new_tensor(self.edge)
        return (gates.amax(-1) * cell).sum((-1, -2)) + (gates * edge).sum((-1, -2, -3))

    def as_authors_report(self) -> CostTable:
        """What the authors' own counter leaves out set to 0: cell and gate of node (0,0), keep of the last layer."""
        gate, cell, edge = self.gate.copy(), self.cell.copy(), self.edge.copy()
        gate[0, 0] = cell[0, 0] = edge[-1] = 0.0
        return replace(self, gate=gate, cell=cell, edge=edge)


def cost_table(
    space: RoutingSpace,
    image_size: tuple[int, int],
    num_classes: int = 19,
    base_channels: int = 64,
    stem_channels: int = 64,
    cell_operations: tuple[str, ...] = ("sep_conv_3x3", "identity"),
    gated: bool = True,
    small_gate: bool = False,
    convention: str = "authors",
) -> CostTable:
    """MACs of every node and edge for an image of size (height, width), padded to the space's stride.

    `convention` is "authors" (checked against their network), "full" or "conv": see `CONVENTIONS` and docs/cost.md.
    Raises ValueError for another one.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"cost convention {convention!r}: choose one of {', '.join(CONVENTIONS)}")
    count = _Counter(CONVENTIONS[convention])
    height, width = (-(-size // space.stride) * space.stride for size in image_size)

    shape = (space.depth + 1, space.num_scales)
    gate, cell, edge = np.zeros(shape), np.zeros(shape), np.zeros((*shape, 3))
    for layer, scale in space.nodes:
        channels = base_channels * 2**scale
        h, w = height // (STEM_STRIDE * 2**scale), width // (STEM_STRIDE * 2**scale)
        pixels = h * w
        directions = space.directions(layer, scale)
        cell[layer, scale] = sum(count.operation(name, channels, pixels) for name in cell_operations)
        if gated:
            gate[layer, scale] = count.gate(channels, (h, w), len(directions), small_gate)
        for direction in directions:
            edge[layer, scale, direction] = count.transform(direction, channels, pixels)
    return CostTable(
        space=space,
        stem=count.stem(stem_channels, base_channels, height, width),
        decoder=count.decoder(space.num_scales, base_channels, num_classes, height, width),
        gate=gate,
        cell=cell,
        edge=edge,
    )


def model_cost(
    model: RoutingGrid | NetworkDescription, image_size: tuple[int, int], convention: str = "authors"
) -> CostTable:
    """The cost table of a network, or of what its description tells, at an image size (height, width); of a static one,
    with its own parts alone."""
    whole = cost_table(
        model.space,
        image_size,
        num_classes=model.num_classes,
        base_channels=model.base_channels,
        stem_channels=model.stem_channels,
        cell_operations=model.cell_operations,
        gated=model.gated,
        small_gate=model.small_gate,
        convention=convention,
    )
    own = model.route.to_gates() > 0
    return replace(whole, cell=whole.cell * own.any(-1), edge=whole.edge * own)


def classifier_cost(
    model: DynamicRoutingClassifier, image_size: tuple[int, int], convention: str = "authors"
) -> CostTable:
    """The same for a classifier: its head stands in the place of the decoder."""
    whole = model_cost(model, image_size, convention)
    height, width = (-(-side // model.space.stride) * model.space.stride for side in image_size)
    count = _Counter(CONVENTIONS[convention])
    head = count.head(model.space.num_scales, model.base_channels, model.num_classes, height, width)
    return replace(whole, decoder=head)


class _Counter:
    """MACs of the parts of the network, in a convention. `pixels` are those of the part's input map."""

    def __init__(self, convention: Convention) -> None:
        self.unit = convention

    def conv_norm(self, fan_in: int, channels: int, pixels: int, relu: bool = True) -> float:
        """A convolution of `fan_in` weights per output element, its norm and ReLU; `pixels` of the output."""
        unit = self.unit
        return pixels * channels * (unit.conv * fan_in + unit.norm + unit.relu * relu)

    def separable(self, channels: int, out: int, kernel: int, pixels: int, relu: bool = True) -> float:
        depthwise = pixels * channels * kernel**2 * self.unit.conv
        return depthwise + self.conv_norm(channels, out, pixels, relu)

    def operation(self, name: str, channels: int, pixels: int) -> float:
        """An operation of a cell (Eq. 1)."""
        if name == "identity":
            return 0.0
        kernel = int(name.rsplit("x", 1)[1])  # sep_conv_3x3, sep_conv_5x5
        return sum(self.separable(channels, channels, kernel, pixels, relu) for relu in (True, False))

    def gate(self, channels: int, size: tuple[int, int], directions: int, small: bool) -> float:
        """Eq. 2-3 at a map of size (h, w); the small gate first resizes it by 1/4, to at least one pixel."""
        h, w = (max(1, side // SMALL_GATE_FACTOR) for side in size) if small else size
        pixels = h * w
        total = pixels * channels * self.unit.resize if small else 0.0
        hidden = channels // 2
        return (
            total
            + self.conv_norm(channels, hidden, pixels)
            + pixels * hidden * self.unit.pool
            + hidden * directions * self.unit.conv
        )

    def transform(self, direction: int, channels: int, pixels: int) -> float:
        """T_j of Eq. 5, and the product of its output with alpha_j where the convention counts it."""
        unit = self.unit
        relu = pixels * channels * unit.relu
        if direction == KEEP:
            return relu + pixels * channels * unit.gate_product
        if direction == UP:
            up = pixels * 4 * (channels // 2)
            return relu + self.conv_norm(channels, channels // 2, pixels) + up * (unit.resize + unit.gate_product)
        assert direction == DOWN
        down = self.conv_norm(channels, channels * 2, pixels // 4)
        return relu + down + pixels // 4 * channels * 2 * unit.gate_product

    def stem(self, stem_channels: int, base_channels: int, height: int, width: int) -> float:
        trim = 0 if self.unit.authors_sizes else 1
        half = (height // 2 - trim) * (width // 2 - trim)
        quarter = height * width // STEM_STRIDE**2
        # The last depthwise convolution has stride 2: both of its halves are counted at 1/4 of the resolution.
        return (
            self.conv_norm(3 * 9, stem_channels, half)
            + self.separable(stem_channels, stem_channels, 3, half)
            + self.separable(stem_channels, base_channels, 3, quarter)
        )

    def decoder(self, num_scales: int, base_channels: int, num_classes: int, height: int, width: int) -> float:
        if self.unit.authors_sizes:
            width = height
        total = 0.0
        for scale in range(num_scales):
            pixels = height * width // (STEM_STRIDE * 2**scale) ** 2
            channels = base_channels * 2**scale
            out = channels // 2 if scale else channels
            total += self.conv_norm(channels, out, pixels)
            if scale:
                total += 4 * pixels * out * self.unit.resize
        quarter = height * width // STEM_STRIDE**2
        total += quarter * base_channels * 9 * num_classes * self.unit.conv
        return total + height * width * num_classes * self.unit.resize

    def head(self, num_scales: int, base_channels: int, num_classes: int, height: int, width: int) -> float:
        """The head of a classifier: a 1x1 convolution at each scale, the mean over the coarsest map, a linear layer."""
        total, channels, pixels = 0.0, base_channels, 0
        for scale in range(num_scales):
            coarser = min(scale + 1, num_scales - 1)
            out, pixels = base_channels * 2**coarser, height * width // (STEM_STRIDE * 2**coarser) ** 2
            total += self.conv_norm(channels, out, pixels)
            channels = out
        return total + pixels * channels * self.unit.pool + channels * num_classes * self.unit.conv
