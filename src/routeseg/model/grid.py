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
from typing import Any, NamedTuple, Unpack, cast

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from routeseg.collectives import anywhere
from routeseg.config import NetworkConfig
from routeseg.counting import Macs, PartMacs
from routeseg.files import SAVING
from routeseg.model.backbone import Backbone
from routeseg.model.cell import RoutingNode
from routeseg.model.closer import Closer, First, enlarged_by, over_places
from routeseg.model.compute import PLAIN, Compute, choose, each, enlarged, fill_missing, rows_among
from routeseg.model.decoder import Segmentation
from routeseg.model.exits import Exits, Leaving, LeavingPlaces
from routeseg.model.gate import Gate
from routeseg.model.head import Head
from routeseg.model.layers import InputNorm, Stem, Transform, widened
from routeseg.model.places import Running
from routeseg.model.prices import Prices
from routeseg.model.request import Options, Request, Routes
from routeseg.model.sizes import look, resized
from routeseg.registry import BACKBONES, CHOICES, GATES, HEADS, OPERATIONS
from routeseg.space import (
    DIRECTIONS,
    FIRST_LOOK,
    MIN_IMAGE_SIZE,
    SCALE_STEP,
    STEM_STRIDE,
    Node,
    Route,
    RoutingSpace,
    Step,
    is_diagonal,
    padded_size,
    place_sides,
    seen_size,
    step,
)


class RoutedNetwork(nn.Module, PyTorchModelHubMixin):
    """Stem, nodes and a head: `RoutedNetwork(config)`, or the fields of a `NetworkConfig` by name.

    The tensors of stem and nodes have the same names whatever the head (`stem.*`, `nodes.*`); those of the head are
    named by its `key`.

    compute  how the parts are computed in training; None: PyTorch's operations, and what is fastest in a task's steps

    Raises ValueError, naming the field, if the fields make no network.
    """

    def __init__(self, network: NetworkConfig | None = None, /, **fields: Any) -> None:
        super().__init__()
        if network is not None and fields:
            raise ValueError(f"give a NetworkConfig or its fields, not both ({', '.join(fields)})")
        self.config = NetworkConfig.from_dict(fields) if network is None else network
        self.compute: Compute | None = None
        config = self.config
        self.normalize = InputNorm(config.pixel_mean, config.pixel_std)
        self.stem: Stem | Backbone
        if config.backbone is None:
            self.stem = Stem(config.stem_channels, config.base_channels)
        else:
            self.stem = BACKBONES[config.backbone](config)
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
        self.exits = None if config.exits is None else Exits(config, self.head_class)
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
    def head_class(self) -> type[Head]:
        """The class of the head."""
        return cast(type[Head], HEADS[self.config.head])

    @property
    def head(self) -> Head:
        """The part that reads out the features of all scales."""
        return cast(Head, self._modules[self.head_class.key])

    @property
    def backbone(self) -> Backbone | None:
        """The pretrained network in the stem's place, if there is one."""
        return self.stem if isinstance(self.stem, Backbone) else None

    def load_pretrained(self) -> None:
        """Takes over the published weights of the backbone, and the input normalisation that they know.

        Raises ValueError, with the remedy, if they are not installed, or if there is no backbone.
        """
        if self.backbone is None:
            raise ValueError("the network has no backbone, so there are no pretrained weights for it")
        self.backbone.load_pretrained()
        self.set_normalization(self.backbone.pixel_mean, self.backbone.pixel_std)

    @property
    def macs(self) -> PartMacs:
        """What each part costs, for any image size."""
        return part_macs(self.config)

    @property
    def prices(self) -> Prices | None:
        """What prices cost, of a network with exits."""
        return None if self.exits is None else self.exits.known

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
            with tempfile.TemporaryDirectory(dir=folder, prefix=SAVING) as scratch:
                self.save_pretrained(scratch)
                for file in Path(scratch).iterdir():
                    file.chmod(0o644)
                    os.replace(file, folder / file.name)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"cannot write the checkpoint {folder}: {reason}. Choose another folder") from error
        return folder

    def forward(
        self,
        images: Tensor,
        route: Routes = None,
        *,
        drop_path: float = 0.0,
        coarse: bool = False,
        **options: Unpack[Options],
    ) -> Any:
        """The head's result for images [B,3,H,W], RGB, uint8 or float in 0..1, any H, W from 32.

        route       None: the gates decide, per image. A Route: exactly its edges are open, for all images, as far as
                    something arrives at them (`Route.check` finds dead ends); or a sequence, one Route for each image.
        drop_path   in training, the probability that an operation of the last layer is dropped. It is lower in the
                    other layers, in proportion to their number (scheduled drop path)
        options     activation, budget, price, per_image, exits, size: see `Options`

        In training a network with exits gives the logits of all of them, unless routes are given.
        The result for an image does not depend on the other images of the batch (in eval mode).
        Raises ValueError for images of another shape, for a route of another space, and for a budget that the network
        cannot keep.
        """
        request = self.request(len(images), route, **options)
        return self.answer(images, request, drop_path if self.training else 0.0, coarse and self.training)

    def request(self, images: int, route: Routes = None, **options: Unpack[Options]) -> Request:
        """What a forward of so many images is asked, as `forward` takes it; raises what it raises."""
        looks_up = options.get("budget") is not None or options.get("per_image", False)
        return Request.of(self.config, images, route, self.prices if looks_up else None, **options)

    def answer(self, images: Tensor, request: Request, drop_path: float = 0.0, coarse: bool = False) -> Any:
        """The head's result for images [B,3,H,W] and a request; `forward` says what it is."""

        def run(images: Tensor) -> Any:
            leaving = None
            if self.exits is not None:
                size = padded_size(self.space, images.shape[-2], images.shape[-1])
                leaving = self.exits.leaving(request, len(images), size, self.training)
            return self._run(images, request, drop_path, leaving, coarse)

        check_images(images)
        if isinstance(request.size, tuple):
            first = seen_size((images.shape[-2], images.shape[-1]), request.size[0])
            return look(images, request.size[1], lambda closer: self._closer(images, first, closer, request))
        return look(images, request.size, run)

    def _closer(self, images: Tensor, first: tuple[int, int], closer: Tensor, request: Request) -> Segmentation:
        """A look at images [B,3,H,W] in this size, and another one at larger ones where it is unsure (closer.py)."""
        assert self.exits is not None and self.exits.place is not None
        place, seen = self.exits.place, (closer.shape[-2], closer.shape[-1])
        size, ratio = padded_size(self.space, *seen), (seen[0] / first[0], seen[1] / first[1])
        before = First(len(images), images.device)
        scores, gates = self._scores(resized(images, first), before)
        there = scores[..., : -(-first[0] // STEM_STRIDE), : -(-first[1] // STEM_STRIDE)]  # not of the padding
        unsure = self.exits.gates.unsure(there.float())
        need = over_places(unsure, ratio, place, place_sides(size, place))
        goes_on = self.exits.closer(need, request)
        known = enlarged_by(scores, ratio, [side // STEM_STRIDE for side in size])
        if goes_on.any():
            running = Closer(goes_on, size, place, before.maps, ratio)
            again, later = self._scores(closer, running)
            known = torch.where(running.mask(known), again, known)
            gates = torch.where(goes_on.flatten(1).any(1)[:, None, None, None], later, gates)
        found = self.head.result(enlarged(widened(known), size), gates, seen)
        exits = torch.where(goes_on, len(self.exits.layers) - 1, FIRST_LOOK)
        return replace(found, exits=exits, first=first)

    def _scores(self, images: Tensor, running: Running) -> tuple[Tensor, Tensor]:
        """The scores of the last decoder at a quarter of the size, where places run, all layers; and the gates."""
        assert self.exits is not None
        x = prepare(self, images)[0]
        leaving = LeavingPlaces(self.exits, x.new_zeros(len(x)), (x.shape[-2], x.shape[-1]), False)
        leaving.running = running
        stem, raw = self._stem(x, PLAIN, running)
        features, gates = self.walk(stem, Request(self.config.mask, gated=False), 0.0, PLAIN, leaving, raw)
        return PLAIN.head(self.head, features, True, running), gates

    def all_exits(self, images: Tensor) -> tuple[Segmentation, list[Sequence[Any]]]:
        """Of a network with exits: what it gives in training, in the mode that it is in, and the features that arrive
        at each exit but the last, by scale; None where nothing arrives."""
        assert self.exits is not None
        leaving = self._keeping(images)
        return self._run(images, Request(self.config.mask, gated=False), 0.0, leaving), leaving.kept

    def _keeping(self, images: Tensor) -> Leaving:
        """All layers for all images, and the features of each exit are kept."""
        assert self.exits is not None
        return Leaving(self.exits, np.full(len(images), len(self.exits.decoders)), keeps=True)

    def exit_features(self, images: Tensor) -> list[Sequence[Any]]:
        """The features of `all_exits` alone, without the layers behind them."""
        leaving = self._keeping(images)
        leaving.at -= 1  # no layer behind the last one but one
        stem, raw = self._stem(prepare(self, images)[0], PLAIN)
        self.walk(stem, Request(self.config.mask, gated=False), 0.0, PLAIN, leaving, raw)
        return leaving.kept

    def _run(
        self, images: Tensor, request: Request, drop_path: float, leaving: Leaving | None, coarse: bool = False
    ) -> Any:
        x, size = prepare(self, images)
        compute = self.compute if self.training and self.compute is not None else PLAIN
        if not compute.usable(self.config, x):
            compute = PLAIN
        stem, raw = self._stem(x, compute)
        features, gates = self.walk(stem, request, drop_path, compute, leaving, raw)
        if self.exits is None or leaving is None:
            output = compute.head(self.head, features, coarse)
            return self.head.result(output if self.training else widened(output), gates, size)
        return self.exits.result(self.head, leaving, stem, features, gates, size, compute, coarse)

    def _stem(self, x: Tensor, compute: Compute, running: Running | None = None) -> tuple[Tensor, Tensor | None]:
        """Prepared images [B,3,H,W] -> [B,C,H/4,W/4], and of a backbone its own features of the same size."""
        if self.backbone is None:
            return compute.stem(self.stem, x), None
        features = compute.stem(self.stem, x) if running is None else self.backbone.run(0, x, running)
        return self.backbone.project[0](features), features

    def walk(
        self,
        x: Tensor,
        request: Request,
        drop_path: float = 0.0,
        compute: Compute = PLAIN,
        leaving: Leaving | None = None,
        raw: Tensor | None = None,
    ) -> tuple[list[Any], Tensor]:
        """From the stem's output [B,C,H/4,W/4] to what leaves each scale [B,C*2**s,h/2**s,w/2**s], and the gates; `raw`
        are the features of a backbone's first stage.

        A gate is asked for exactly the images that reach its node, and a cell and a transform are computed for exactly
        those that run them. So in training BatchNorm normalises over these. If zeros arrive, each part is computed for
        the whole batch as soon as one image needs it, as in the authors' networks.
        """
        space, batch = self.space, len(x)
        # Of an image whose places run everything is computed, and what belongs to others is dropped again.
        together = self.config.zeros_arrive or (leaving is not None and leaving.running is not None)
        everyone = np.arange(batch)

        def places(flags: np.ndarray) -> np.ndarray:
            return everyone if together else np.flatnonzero(flags)

        arrived: Sequence[np.ndarray] = [np.ones(batch, dtype=bool)]
        arrivals: list[list[Arrival]] = [[Arrival(x, everyone)]] + [[] for _ in range(space.num_scales - 1)]
        pretrained = None if raw is None else Arrival(raw, everyone)
        gates = []
        maps: list[Any] = []
        for layer in range(space.depth + 1):
            there = [places(flags) for flags in arrived]
            before = maps
            maps = [_gather(compute, *one) if one[0] else None for one in zip(arrivals, there, strict=False)]
            still = None if leaving is None else leaving.running
            if still is not None:
                maps = _kept(compute, maps, before, still)
            scales = space.scales(layer)
            is_open = request.mask[:, layer, : len(scales)] & np.stack(arrived, axis=1)[..., None]
            if leaving is not None:
                is_open &= ~leaving(layer, maps, there, compute, x)[:, None, None]
                still = leaving.running
            alphas = torch.from_numpy(is_open).to(x.device)
            if request.gated:
                alphas = self._activations(layer, maps, there, request, compute, batch) * alphas
                is_open = (alphas.detach() > 0).cpu().numpy()  # the one transfer of the layer
            gates.append(alphas)
            flags = [[is_open[:, s, direction] for direction in range(len(DIRECTIONS))] for s in scales]
            now = step(space, layer, arrived, flags, self.config.zeros_arrive)
            some = self._for_some_image(now, x.device)
            arrivals = [[] for _ in range(space.num_scales)]
            for scale in scales:
                features = maps[scale]
                if features is None:
                    continue
                if some.runs[scale]:
                    node, running = self.node(layer, scale), places(now.runs[scale])
                    chosen = choose(compute, features, there[scale], running)
                    hidden = compute.cell(node, chosen, drop_path * layer / space.depth, still)
                    for direction in node.directions:
                        if some.sends[scale, direction]:
                            images = places(now.sends[scale, direction])
                            alpha = None  # 1 for all of them
                            if request.gated or not is_open[images, scale, direction].all():
                                alpha = alphas[torch.from_numpy(images).to(x.device), scale, direction]
                            chosen = choose(compute, hidden, running, images)
                            sent = compute.send(node, direction, chosen, alpha, still)
                            arrivals[scale + SCALE_STEP[direction]].append(Arrival(sent, images))
                            if pretrained is not None and is_diagonal(layer, scale, direction):
                                sent, pretrained = self._beside(scale + 1, pretrained, images, alpha, still)
                                arrivals[scale + 1].append(Arrival(sent, images))
                if some.passes[scale]:  # the images that drop the cell keep the input itself, for free
                    passes = now.passes[scale]
                    images = places(passes)
                    only = None if passes[images].all() else torch.from_numpy(passes).to(x.device)
                    chosen = choose(compute, features, there[scale], images)
                    arrivals[scale].append(Arrival(compute.skip(chosen, only), images))
            arrived = now.reached
        left = [_gather(compute, some, everyone) if some else None for some in arrivals]
        if leaving is not None and leaving.running is not None:
            left = _kept(compute, left, maps, leaving.running)
        return fill_missing(left, x), _stack_gates(space, gates)

    def _beside(
        self, stage: int, before: Arrival, images: np.ndarray, alpha: Tensor | None, running: Running | None
    ) -> tuple[Tensor, Arrival]:
        """What a stage of the backbone sends beside a path down the diagonal, and its features, given those before."""
        assert self.backbone is not None
        features = self.backbone.run(stage, choose(PLAIN, before.sent, before.images, images), running)
        sent = self.backbone.project[stage](features)
        return sent if alpha is None else each(alpha).to(sent.dtype) * sent, Arrival(features, images)

    def _activations(
        self,
        layer: int,
        maps: Sequence[Any],
        there: Sequence[np.ndarray],
        request: Request,
        compute: Compute,
        batch: int,
    ) -> Tensor:
        """alpha [B,S',3] of the nodes of the layer: 0 for an image that is not `there`, at the node."""
        device = next(self.parameters()).device
        alphas = []
        for scale in self.space.scales(layer):
            features = maps[scale]
            alpha = torch.zeros(batch, len(DIRECTIONS), device=device)
            if features is not None:
                images = torch.from_numpy(there[scale]).to(device)
                asked = compute.activations(self.node(layer, scale), features)
                alpha = asked if len(images) == batch else alpha.index_copy(0, images, asked)
            alphas.append(alpha)
        return torch.stack(alphas, dim=1)

    def _for_some_image(self, now: Step[np.ndarray], device: torch.device) -> Step[bool]:
        """Which flags of a step are set for some image of the batch.

        With SyncBatchNorm, for some image of some process: all processes must run the same nodes then.
        """
        some = [bool(flag.any()) for flag in (*now.runs, *now.passes, *now.sends.values())]
        if self.training and self.synced:
            some = anywhere(torch.tensor(some, device=device)).tolist()
        n = len(now.runs)
        return Step((), tuple(some[:n]), tuple(some[n : 2 * n]), dict(zip(now.sends, some[2 * n :], strict=True)), ())

    @property
    def synced(self) -> bool:
        """Whether the processes of a job share the statistics of their batches."""
        first = self.stem[0] if self.backbone is None else self.backbone.project[0]  # type: ignore[index]
        return isinstance(cast(nn.Sequential, first)[1], nn.SyncBatchNorm)

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
        for head in self.modules():
            if isinstance(head, Head):
                head.reset_parameters()


def part_macs(config: NetworkConfig) -> PartMacs:
    """What each part of a network costs, for any image size."""
    head = HEADS[config.head]
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
    if config.backbone is None:
        stem, stages = Stem.macs(config.stem_channels, config.base_channels), ()
    else:
        stem, *stages = BACKBONES[config.backbone].macs(config)
    decision = Macs() if config.choice is None else CHOICES[config.choice].macs(config, head)
    return PartMacs(stem, head.macs(config), tuple(cell), tuple(gate), tuple(transform), tuple(stages), decision)


def prepare(model: RoutedNetwork, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Normalised images, zero-padded right and below to the space's stride, in the dtype of the stem's weights, and
    their own size (H, W).

    The padding depends on the image's size alone. Raises ValueError for images that are not [B,3,H,W], H, W >= 32.
    """
    height, width = check_images(images)
    padded_height, padded_width = padded_size(model.space, height, width)
    x = F.pad(model.normalize(images), (0, padded_width - width, 0, padded_height - height))
    x = x.to(next(model.stem.parameters()).dtype)
    return x.contiguous(memory_format=torch.channels_last), (height, width)


def check_images(images: Tensor) -> tuple[int, int]:
    """The size (H, W) of images. Raises ValueError for what is no tensor [B,3,H,W], H, W >= 32."""
    if not isinstance(images, Tensor):
        raise ValueError(
            f"{type(images).__name__} is no tensor [B,3,H,W]: a `Segmenter` (`routeseg.load` gives one) takes files "
            "and arrays"
        )
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        one = "; of a single image `.predict(image)` takes [3,H,W]" if images.ndim == 3 else ""
        raise ValueError(f"images have shape {list(images.shape)}: expected [B,3,H,W], RGB, with B at least 1{one}")
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ValueError(f"images are {images.dtype}: give uint8, or floating point in 0..1")
    height, width = images.shape[-2:]
    if min(height, width) < MIN_IMAGE_SIZE:
        raise ValueError(f"images are {height}x{width}: the smallest size is {MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE}")
    return height, width


class Arrival(NamedTuple):
    """What is sent to a node, and the images that it is of: their places in the batch, in order."""

    sent: Any
    images: np.ndarray


def _kept(compute: Compute, maps: Sequence[Any], before: Sequence[Any], running: Running) -> list[Any]:
    """The maps that arrive at a layer: where a place has left, those of the layer before."""
    missing = [None] * (len(maps) - len(before))
    return [
        old if new is None else compute.kept(new, old, running)
        for new, old in zip(maps, [*before, *missing], strict=True)
    ]


def _gather(compute: Compute, arrivals: Sequence[Arrival], images: np.ndarray) -> Any:
    """The features of a node that these images reach, from what arrives there, each of some of them."""
    return compute.gather(
        [
            sent if len(of) == len(images) else compute.spread(sent, rows_among(of, images), len(images))
            for sent, of in arrivals
        ]
    )


def _stack_gates(space: RoutingSpace, gates: Sequence[Tensor]) -> Tensor:
    """The activations of all layers [B,S',3] as float32 [B,L+1,S,3]."""
    padded = [F.pad(layer.to(torch.float32), (0, 0, 0, space.num_scales - layer.shape[1])) for layer in gates]
    return torch.stack(padded, dim=1)
