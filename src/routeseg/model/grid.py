"""Stem, grid of gated nodes, and a head: any network of ours. `route` is the dense forward through the grid.

Legend: B images, H, W image size, L depth, S scales, C base channels; N is B, or 1 for what is the same for all images.
    gates [B, L+1, S, 3]   activation of every edge, direction 0 up, 1 keep, 2 down
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from routeseg.collectives import anywhere
from routeseg.config import NetworkConfig
from routeseg.counting import Macs, PartMacs
from routeseg.model.cell import RoutingNode
from routeseg.model.compute import PLAIN, Compute
from routeseg.model.gate import Gate
from routeseg.model.head import Head
from routeseg.model.layers import InputNorm, Stem, Transform
from routeseg.model.request import Activation, Request, Routes
from routeseg.registry import GATES, OPERATIONS
from routeseg.space import (
    DIRECTIONS,
    MIN_IMAGE_SIZE,
    SCALE_STEP,
    STEM_STRIDE,
    Node,
    Route,
    RoutingSpace,
    Step,
    padded_size,
    step,
)


class RoutedNetwork(nn.Module, PyTorchModelHubMixin):
    """Stem, nodes and a head: `RoutedNetwork(config)`, or the fields of a `NetworkConfig` by name.

    A kind of network is a subclass with a `Head`. The tensors of stem and nodes have the same names in all of them
    (`stem.*`, `nodes.*`); those of the head are named by its `key`.

    compute  how the parts are computed in training; None: PyTorch's operations, and what is fastest in a task's steps

    Raises ValueError, naming the field, if the fields make no network.
    """

    head_class: ClassVar[type[Head]]

    def __init__(self, network: NetworkConfig | None = None, /, **fields: Any) -> None:
        super().__init__()
        if network is not None and fields:
            raise ValueError(f"give a NetworkConfig or its fields, not both ({', '.join(fields)})")
        self.config = NetworkConfig.from_dict(fields) if network is None else network
        self.compute: Compute | None = None
        config = self.config
        self.normalize = InputNorm(config.pixel_mean, config.pixel_std)
        self.stem = Stem(config.stem_channels, config.base_channels)
        directions: dict[Node, list[int]] = {}
        for layer, s, direction in config.whole_route:
            directions.setdefault((layer, s), []).append(direction)
        gate = config.gate if config.gated else None
        self.nodes = nn.ModuleDict(
            {
                f"{layer}-{s}": RoutingNode(config.channels(s), out, config.cell_operations, gate, config.small_gate)
                for (layer, s), out in directions.items()
            }
        )
        self._modules[self.head_class.key] = self.head_class(config)  # `head` may be both its key and the property
        self._reset_parameters()

    @property
    def config(self) -> NetworkConfig:
        """What makes the network; saved as config.json."""
        return cast(NetworkConfig, self._hub_mixin_config)

    @config.setter
    def config(self, config: NetworkConfig) -> None:
        self._hub_mixin_config = config

    @property
    def space(self) -> RoutingSpace:
        """The grid of nodes and edges."""
        return self.config.space

    @property
    def route(self) -> Route:
        """The edges that the network has."""
        return self.config.whole_route

    @property
    def head(self) -> Head:
        """The part that reads out the features of all scales."""
        return cast(Head, self._modules[self.head_class.key])

    @property
    def macs(self) -> PartMacs:
        """What each part costs, for any image size."""
        return part_macs(self.config, self.head_class)

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Another input normalisation of RGB in 0..1, kept with the weights."""
        self.config = replace(self.config, pixel_mean=mean, pixel_std=std)
        self.normalize = InputNorm(self.config.pixel_mean, self.config.pixel_std).to(self.normalize.mean.device)

    def node(self, layer: int, scale: int) -> RoutingNode:
        """The node (layer, scale), one of `route.nodes`."""
        return cast(RoutingNode, self.nodes[f"{layer}-{scale}"])

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters of all gates (they may get their own learning rate)."""
        return [p for m in self.modules() if isinstance(m, Gate) for p in m.parameters()]

    def save(self, folder: str | Path) -> Path:
        """Writes `model.safetensors`, `config.json` and a model card into the folder, each file whole or not at all.

        `routeseg.load` reads it. Raises ValueError if the folder cannot be written.
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

    def forward(
        self, images: Tensor, route: Routes = None, activation: Activation = "one", drop_path: float = 0.0
    ) -> Any:
        """The head's result for images [B,3,H,W], RGB, uint8 or float in 0..1, any H, W from 32.

        route       None: the gates decide, per image. A Route: exactly its edges are open, for all images, as far as
                    something arrives at them (`Route.check` finds dead ends); or a sequence, one Route for each image.
        activation  of the open edges of a given route: "one", or "own", the network's own gates (an edge that they
                    close stays closed).
        drop_path   in training, the probability that an operation of the last layer is dropped. It is lower in the
                    other layers, in proportion to their number (scheduled drop path)

        The result for an image does not depend on the other images of the batch (in eval mode).
        Raises ValueError for images of another shape, and for a route of another space.
        """
        x, size = prepare(self, images)
        request = Request.of(self.config, len(images), route, activation)
        compute = self.compute if self.training and self.compute is not None else PLAIN
        if not compute.usable(self.config, x):
            compute = PLAIN
        features, gates = self.walk(compute.stem(self.stem, x), request, drop_path if self.training else 0.0, compute)
        return self.head.result(compute.head(self.head, features), gates, size)

    def walk(
        self, x: Tensor, request: Request, drop_path: float = 0.0, compute: Compute = PLAIN
    ) -> tuple[list[Any], Tensor]:
        """From the stem's output [B,C,H/4,W/4] to what leaves each scale [B,C*2**s,h/2**s,w/2**s], and the gates.

        A node runs for the whole batch as soon as one image runs it.
        """
        space, mask = self.space, torch.from_numpy(request.mask).to(x.device)
        asked = np.ones(len(request.mask), dtype=bool)
        arrived: Sequence[Any] = [x.new_ones(len(x), dtype=torch.bool) if request.gated else asked]
        arrivals: list[list[Any]] = [[x]] + [[] for _ in range(space.num_scales - 1)]
        gates = []
        for layer in range(space.depth + 1):
            maps = [compute.gather(some) if some else None for some in arrivals]
            if request.gated:
                alphas = self._activations(layer, maps, arrived, request, mask, compute)
            else:
                alphas = [request.mask[:, layer, s] & arrived[s][:, None] for s in space.scales(layer)]
            is_open = [[alpha[:, direction] > 0 for direction in range(len(DIRECTIONS))] for alpha in alphas]
            now = step(space, layer, arrived, is_open, self.config.zeros_arrive)
            some = self._for_some_image(now)
            arrivals = [[] for _ in range(space.num_scales)]
            for scale in space.scales(layer):
                features = maps[scale]
                if features is None:
                    continue
                if not some.runs[scale]:  # a free skip, for all images
                    arrivals[scale].append(compute.skip(features, None))
                    continue
                node = self.node(layer, scale)
                hidden = compute.cell(node, features, drop_path * layer / space.depth)
                for direction in node.directions:
                    if some.sends[scale, direction]:
                        alpha = alphas[scale][:, direction]
                        own = request.gated or not alpha.all()  # else the path is open for all images, and alpha is 1
                        sent = compute.send(node, direction, hidden, _on(x, alpha) if own else None)
                        arrivals[scale + SCALE_STEP[direction]].append(sent)
                if some.passes[scale]:  # an image that drops the cell keeps the input itself, for free
                    arrivals[scale].append(compute.skip(features, _on(x, now.passes[scale])))
            gates.append(alphas)
            arrived = now.reached
        maps = [compute.gather(some) if some else None for some in arrivals]
        return fill_missing(maps, x), _stack_gates(space, gates, x)

    def _activations(
        self,
        layer: int,
        maps: Sequence[Any],
        arrived: Sequence[Tensor],
        request: Request,
        mask: Tensor,
        compute: Compute,
    ) -> list[Tensor]:
        """alpha [B,3] of each node of the layer: 0 for an image that does not reach the node."""
        budget = None if request.budget is None else torch.from_numpy(request.budget).to(mask.device)
        alphas = []
        for scale in self.space.scales(layer):
            features = maps[scale]
            if features is None:
                alphas.append(torch.zeros(len(arrived[scale]), len(DIRECTIONS), device=mask.device))
            else:
                alpha = compute.activations(self.node(layer, scale), features, budget)
                alphas.append(alpha * arrived[scale][:, None] * mask[:, layer, scale])
        return alphas

    def _for_some_image(self, now: Step[Any]) -> Step[bool]:
        """Which flags of a step are set for some image of the batch: one transfer from the device at most.

        With SyncBatchNorm, for some image of some process: all processes must run the same nodes then.
        """
        flags = [*now.runs, *now.passes, *now.sends.values()]
        if isinstance(flags[0], np.ndarray):
            some = [bool(flag.any()) for flag in flags]
        else:
            found = torch.stack([flag.any() for flag in flags])
            some = (anywhere(found) if self.training and self.synced else found).tolist()
        n = len(now.runs)
        return Step((), tuple(some[:n]), tuple(some[n : 2 * n]), dict(zip(now.sends, some[2 * n :], strict=True)), ())

    @property
    def synced(self) -> bool:
        """Whether the processes of a job share the statistics of their batches."""
        return isinstance(cast(nn.Sequential, self.stem[0])[1], nn.SyncBatchNorm)

    def _reset_parameters(self) -> None:
        """Draws the weights, once every part is there; none on the meta device, where drawing imports the compiler."""
        if next(self.parameters()).is_meta:
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Gate):
                module.reset_parameters()
        self.head.reset_parameters()


def part_macs(config: NetworkConfig, head: type[Head]) -> PartMacs:
    """What each part of a network costs, for any image size."""
    cell, gate, transform = [], [], []
    for scale in range(config.num_scales):
        channels, stride = config.channels(scale), STEM_STRIDE * 2**scale
        cell.append(sum((OPERATIONS[name].macs(channels, stride) for name in config.cell_operations), start=Macs()))
        counts = range(1, len(DIRECTIONS) + 1)
        gate.append(
            tuple(
                GATES[config.gate].macs(channels, count, config.small_gate, stride) if config.gated else Macs()
                for count in counts
            )
        )
        transform.append(tuple(Transform.macs(channels, direction, stride) for direction in range(len(DIRECTIONS))))
    stem = Stem.macs(config.stem_channels, config.base_channels)
    return PartMacs(stem, head.macs(config), tuple(cell), tuple(gate), tuple(transform))


def prepare(model: RoutedNetwork, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
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


def fill_missing(maps: Sequence[Any], stem: Tensor) -> list[Any]:
    """What leaves the grid: zeros for a scale that no image reached."""
    batch, channels, h, w = stem.shape
    return [
        stem.new_zeros(batch, channels * 2**s, h // 2**s, w // 2**s) if x is None else x for s, x in enumerate(maps)
    ]


def _on(x: Tensor, values: Tensor | np.ndarray) -> Tensor:
    """A value for each image [N], on the device of x."""
    return torch.from_numpy(values).to(x.device) if isinstance(values, np.ndarray) else values


def _stack_gates(space: RoutingSpace, gates: Sequence[Sequence[Tensor | np.ndarray]], x: Tensor) -> Tensor:
    """The activations of all layers, by scale [N,3] each, as float32 [B,L+1,S,3]."""
    if isinstance(gates[0][0], np.ndarray):
        known = np.zeros((len(gates[0][0]), *space.legal.shape), dtype=np.float32)
        for layer, alphas in enumerate(gates):
            known[:, layer, : len(alphas)] = np.stack(alphas, axis=1)
        return torch.from_numpy(known).to(x.device).expand(len(x), -1, -1, -1).contiguous()
    layers = [torch.stack([torch.as_tensor(alpha) for alpha in alphas], dim=1) for alphas in gates]
    return torch.stack([F.pad(layer, (0, 0, 0, space.num_scales - layer.shape[1])) for layer in layers], dim=1)
