"""Stem and grid of gated nodes: the part of a network that its task does not change. `_route` is the dense forward.

Legend: B images, H, W image size, K classes, L depth, S scales, C base channels.
    gates [B, L+1, S, 3]   activation of every edge, direction 0 up, 1 keep, 2 down
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from routeseg.architectures import architecture
from routeseg.collectives import anywhere
from routeseg.model.cell import RoutingNode
from routeseg.model.gate import ACTIVATIONS, GATE_BIAS, Gate
from routeseg.model.layers import CELL_OPERATIONS, InputNorm, Stem
from routeseg.space import DIRECTIONS, MIN_IMAGE_SIZE, SCALE_STEP, Node, Route, RoutingSpace, padded_size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class RoutingGrid(nn.Module, PyTorchModelHubMixin):
    """Stem and nodes, without what reads their features out: the segmenter adds a decoder, the classifier a head.

    Their tensors have the same names in both (`stem.*`, `nodes.*`). The arguments: see `DynamicRoutingNetwork`.
    Raises ValueError, naming the argument, where they make no network.
    """

    def __init__(
        self,
        num_classes: int,
        depth: int,
        num_scales: int,
        base_channels: int,
        stem_channels: int,
        cell_operations: Sequence[str],
        gate: str,
        small_gate: bool,
        route: str | Sequence[tuple[int, int, str]] | None,
        zeros_arrive: bool,
        class_names: Sequence[str] | None,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__()
        # The route of a static network has no dead ends, so that zeros could change nothing.
        self.space = RoutingSpace(depth, num_scales, zeros_arrive and route is None)
        _check_arguments(num_classes, base_channels, stem_channels, cell_operations, gate, class_names)
        self.num_classes = num_classes
        self.base_channels = base_channels
        self.stem_channels = stem_channels
        self.cell_operations = tuple(cell_operations)
        self.small_gate = small_gate
        self.gated = gate != "fixed"
        self.route = _own_route(self.space, gate, route)  # the edges that the network has
        self.class_names = tuple(class_names or (f"class {k}" for k in range(num_classes)))
        self.drop_path = 0.0  # p of the scheduled drop path at this step, set by the trainer
        self.synced = False  # SyncBatchNorm: all processes of a job run the same nodes in training, set by the trainer

        self.normalize = InputNorm(tuple(pixel_mean), tuple(pixel_std))
        self.stem = Stem(stem_channels, base_channels)
        directions: dict[Node, list[int]] = {}
        for layer, s, direction in self.route:
            directions.setdefault((layer, s), []).append(direction)
        self.nodes = nn.ModuleDict(
            {
                f"{layer}-{s}": RoutingNode(self.channels(s), out, self.cell_operations, gate, small_gate)
                for (layer, s), out in directions.items()
            }
        )
        if route is not None:  # saved as edges, so that a checkpoint depends on no drawing
            self.arguments["route"] = self.route.named_edges

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that make this network, as huggingface_hub keeps and saves them."""
        return cast(dict[str, Any], self._hub_mixin_config)

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Another input normalisation of RGB in 0..1, kept with the weights."""
        device = self.normalize.mean.device
        self.normalize = InputNorm(tuple(mean), tuple(std)).to(device)
        self.arguments.update(pixel_mean=tuple(mean), pixel_std=tuple(std))

    def channels(self, scale: int) -> int:
        """Channels of the nodes of a scale."""
        return self.base_channels * 2**scale

    def node(self, layer: int, scale: int) -> RoutingNode:
        """The node (layer, scale), one of `route.nodes`."""
        return cast(RoutingNode, self.nodes[f"{layer}-{scale}"])

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters of all gates (they may get their own learning rate)."""
        return [p for m in self.modules() if isinstance(m, Gate) for p in m.parameters()]

    def save(self, folder: str | Path) -> Path:
        """Writes `model.safetensors`, `config.json` and a model card into the folder, each file whole or not at all.

        `routeseg.load` reads it. Raises ValueError where the folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
                self.save_pretrained(scratch)
                for file in Path(scratch).iterdir():
                    file.chmod(0o644)
                    os.replace(file, folder / file.name)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"cannot write the checkpoint {folder}: {reason}. Choose another folder") from error
        return folder

    def _route(self, x: Tensor, given: Tensor | None, own: bool) -> tuple[list[Tensor], Tensor]:
        """From the stem's output [B,C,H/4,W/4] to what leaves each scale [B,C*2**s,h/2**s,w/2**s], and the gates."""
        space, batch = self.space, len(x)
        arrivals: list[Tensor | None] = [x] + [None] * (space.num_scales - 1)
        reached = [x.new_ones(batch, dtype=torch.bool)] + [x.new_zeros(batch, dtype=torch.bool)] * (
            space.num_scales - 1
        )
        weighted = self.gated or given is not None
        all_gates = []
        for layer in range(space.depth + 1):
            next_arrivals: list[Tensor | None] = [None] * space.num_scales
            next_reached = [torch.zeros_like(reached[0]) for _ in reached]
            layer_gates = []
            for scale in range(space.num_scales):
                features = arrivals[scale]
                if features is None or (layer, scale) not in self.route.nodes:  # not reached, or a free skip
                    layer_gates.append(torch.zeros(batch, len(DIRECTIONS), device=x.device))
                    _arrive(next_arrivals, scale, features)
                    next_reached[scale] = next_reached[scale] | reached[scale]
                    continue
                node = self.node(layer, scale)
                alpha = node.activations(features) if own else torch.ones(batch, 3, device=x.device)
                alpha = alpha * reached[scale][:, None]
                if given is not None:
                    alpha = alpha * given[:, layer, scale]
                layer_gates.append(alpha)
                sent = self._leave(node, layer, scale, features, alpha, reached[scale], weighted)
                for target, out, arrives in sent:
                    _arrive(next_arrivals, target, out)
                    next_reached[target] = next_reached[target] | arrives
            arrivals, reached = next_arrivals, next_reached
            all_gates.append(torch.stack(layer_gates, dim=1))
        return fill_missing(arrivals, x), torch.stack(all_gates, dim=1)

    def _leave(
        self,
        node: RoutingNode,
        layer: int,
        scale: int,
        features: Tensor,
        alpha: Tensor,
        reached: Tensor,
        weighted: bool,
    ) -> list[tuple[int, Tensor, Tensor]]:
        """Eq. 5 for a batch: a list of (target scale, what is sent there [B,C,h,w], which images send it [B]).

        Not `weighted`: every activation is 1, for all images that reach the node.
        """
        if weighted:
            is_open = alpha > 0
            runs = is_open.any(dim=1)
            drops = reached & ~runs
            # One transfer from the device: is the path open in some image; does some image drop the cell.
            flags = torch.cat((is_open.any(dim=0), drops.any()[None]))
            *used, some_drop = (anywhere(flags) if self.synced and self.training else flags).tolist()
            if not any(used):
                return [(scale, features, reached)]
        drop_path = self.drop_path * layer / self.space.depth if self.training else 0.0
        hidden = node.cell(features, drop_path)  # Eq. 1
        if not weighted:
            return [(scale + SCALE_STEP[d], node.transform(d, hidden), reached) for d in node.directions]
        sent = []
        for direction in node.directions:
            if used[direction] or self.space.zeros_arrive:
                out = alpha[:, direction, None, None, None].to(hidden.dtype) * node.transform(direction, hidden)
                arrives = runs if self.space.zeros_arrive else is_open[:, direction]
                sent.append((scale + SCALE_STEP[direction], out, arrives))
        if some_drop:  # an image that drops the cell keeps the input itself, for free
            sent.append((scale, torch.where(drops[:, None, None, None], features, 0.0), drops))
        return sent

    def _initialize(self) -> None:
        """Draws the weights; to be called once every part is there."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Gate):
                nn.init.normal_(module.score.weight, std=0.01)
                nn.init.constant_(module.score.bias, GATE_BIAS)


def prepare(model: RoutingGrid, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Normalised images, zero-padded right and below to the space's stride, and their own size (H, W).

    The padding depends on the image's size alone. Raises ValueError for images that are not [B,3,H,W], H, W >= 32.
    """
    height, width = check_images(images)
    padded_height, padded_width = padded_size(model.space, height, width)
    x = F.pad(model.normalize(images), (0, padded_width - width, 0, padded_height - height))
    return x.contiguous(memory_format=torch.channels_last), (height, width)


def check_images(images: Tensor) -> tuple[int, int]:
    """The size (H, W) of images. Raises ValueError for images that are not [B,3,H,W], H, W >= 32."""
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"images have shape {list(images.shape)}: expected [B,3,H,W], RGB, with B at least 1")
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ValueError(f"images are {images.dtype}: give uint8, or floating point in 0..1")
    height, width = images.shape[-2:]
    if min(height, width) < MIN_IMAGE_SIZE:
        raise ValueError(f"images are {height}x{width}: the smallest size is {MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE}")
    return height, width


def _own_route(space: RoutingSpace, gate: str, route: str | Sequence[tuple[int, int, str]] | None) -> Route:
    """The edges of the network that these arguments describe."""
    if route is None:
        return Route.all_open(space)
    if gate != "fixed":
        raise ValueError(
            f"a network of a fixed route has no gates: set gate to fixed (it is {gate}), or leave route out"
        )
    if isinstance(route, str):
        return architecture(route, space)
    own = Route.from_named_edges(space, route)
    if not len(own):
        raise ValueError("route has no edges: give at least one, or leave route out for the whole space")
    return own.check()


def _arrive(arrivals: list[Tensor | None], scale: int, out: Tensor | None) -> None:
    """Adds to what arrives at a scale of the next layer."""
    if out is not None:
        before = arrivals[scale]
        arrivals[scale] = out if before is None else before + out


def fill_missing(arrivals: Sequence[Tensor | None], stem: Tensor) -> list[Tensor]:
    """What leaves the grid: zeros for a scale that no image reached."""
    batch, channels, h, w = stem.shape
    return [
        stem.new_zeros(batch, channels * 2**s, h // 2**s, w // 2**s) if x is None else x for s, x in enumerate(arrivals)
    ]


def _check_arguments(
    num_classes: int,
    base_channels: int,
    stem_channels: int,
    cell_operations: Sequence[str],
    gate: str,
    class_names: Sequence[str] | None,
) -> None:
    for name, value, least in (
        ("num_classes", num_classes, 1),
        ("base_channels", base_channels, 2),
        ("stem_channels", stem_channels, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}: it must be a whole number of at least {least}")
    if base_channels % 2:
        raise ValueError(f"base_channels is {base_channels}: it must be even, a gate works on half of them")
    unknown = [name for name in cell_operations if name not in CELL_OPERATIONS]
    if unknown or not cell_operations:
        raise ValueError(
            f"cell_operations {list(cell_operations)}: choose at least one of {', '.join(CELL_OPERATIONS)}"
        )
    if len(set(cell_operations)) != len(cell_operations):
        raise ValueError(f"cell_operations {list(cell_operations)} names an operation twice")
    if gate not in (*ACTIVATIONS, "fixed"):
        raise ValueError(f"gate is {gate!r}: choose one of {', '.join(ACTIVATIONS)}, fixed")
    check_per_class("class_names", class_names, num_classes)


def check_per_class(name: str, items: Sequence[Any] | None, num_classes: int) -> None:
    """Raises ValueError, naming the argument, where a list has not one entry for each class."""
    if items is not None and len(items) != num_classes:
        raise ValueError(f"{name} has {len(items)} entries for {num_classes} classes")
