"""A forward by PyTorch's own operations: on GPUs, and on CPUs if no kernels could be built.

The host decides what runs. One transfer for each layer brings it the gates' scores. If routes differ between images,
another transfer sends what the device needs for that. A batch of one needs only the first, a known route neither.

Legend: B images, b some of them, S scales, L depth, C channels, h, w the size of a feature map.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routeseg.engine.folding import fold_batch_norm
from routeseg.engine.graphs import CudaRecorder, Recordings
from routeseg.engine.transfers import DeviceArrays, to_device, to_host
from routeseg.errors import NOT_FINITE
from routeseg.model.cell import RoutingNode
from routeseg.model.decoder import Decoder
from routeseg.model.gate import Gate
from routeseg.model.grid import RoutedNetwork, prepare
from routeseg.model.layers import Upsample, upsample
from routeseg.model.request import Request
from routeseg.space import DIRECTIONS, SCALE_STEP, STEM_STRIDE, UP, Step, step


@dataclass(frozen=True)
class Arrival:
    """What arrives at a node along one edge (Eq. 5): `weight` times the map.

    map     [b,C,h,w], of the images in `images` (their places in the batch)
    weight  activation for each of these images, float32
    halved  the map has half the height and width, and is still to be resized (path up)
    """

    map: Tensor
    images: np.ndarray
    weight: np.ndarray
    halved: bool = False


@dataclass(frozen=True)
class Departure:
    """What leaves a node, as decided. Images are places in the batch; weights are activations, float32.

    running   the images whose cell runs
    sent      for each direction that some of them take: (direction, rows of `running`, weights)
    skipping  the images that drop the cell: the input itself is kept, for free
    """

    scale: int
    running: np.ndarray
    sent: tuple[tuple[int, np.ndarray, np.ndarray], ...]
    skipping: np.ndarray


class EagerForward:
    """A network's forward, with its BatchNorm folded, in channels_last. The gates' last layer is in float32.

    together    run the images of a batch layer by layer together, choosing rows if routes differ
    recordings  of known routes, on CUDA; None elsewhere
    """

    def __init__(self, model: RoutedNetwork, dtype: torch.dtype, together: bool) -> None:
        self.together, self.dtype, self.space, self.config = together, dtype, model.space, model.config
        self.wide = torch.promote_types(dtype, torch.float32)  # of scores and logits
        folded = fold_batch_norm(model)
        gates = [module for module in folded.modules() if isinstance(module, Gate)]
        self.model = folded.to(dtype)
        for gate in gates:
            gate.score.to(self.wide)
        self.activate = gates[0].activate if gates else None
        self.model.normalize = copy.deepcopy(model.normalize)  # in the network's own precision
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        on_cuda = next(model.parameters()).device.type == "cuda"
        self.recordings = Recordings(CudaRecorder()) if on_cuda else None

    def __call__(self, images: Tensor, request: Request) -> Any:
        """What the head makes of images [B,3,H,W].

        Raises ValueError for images on a CPU with values that are not finite.
        """
        check_finite(images)
        forward = partial(self._forward, request=request)
        if self.recordings is not None and not request.gated and len(request.mask) == 1:
            output, gates = self.recordings((images.shape, images.dtype, request.mask.tobytes()), forward, images)
        else:
            output, gates = forward(images)
        return self.model.head.result(output, to_device(gates, output.device), (images.shape[-2], images.shape[-1]))

    def _forward(self, images: Tensor, request: Request) -> tuple[Tensor, np.ndarray]:
        """The head's output, and the gates on the host."""
        x, _ = prepare(self.model, images)
        x = x.to(self.dtype)
        if self.together or len(x) == 1:
            return self._run(x, request)
        parts = [self._run(x[i : i + 1], request.of_image(i)) for i in range(len(x))]
        return torch.cat([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _run(self, x: Tensor, request: Request) -> tuple[Tensor, np.ndarray]:
        """Prepared images [B,3,H,W] to the head's output and gates.

        Kernels that read the activations on the device, and return if a path is closed, would need no decision of the
        host: they could replace this loop.
        """
        space, batch = self.space, len(x)
        stem = self.model.stem(x)
        arrivals: list[list[Arrival]] = [[] for _ in range(space.num_scales)]
        arrivals[0].append(Arrival(stem, np.arange(batch), np.ones(batch, dtype=np.float32)))
        arrived: Sequence[np.ndarray] = [np.ones(batch, dtype=bool)]
        gates, arrays = np.zeros((batch, *space.legal.shape), dtype=np.float32), DeviceArrays((), x.device)
        for layer in range(space.depth + 1):
            scales = space.scales(layer)
            features = {s: self._gather(arrivals[s], s, stem, arrays) for s in scales if arrived[s].any()}
            alpha = request.mask[:, layer, : len(scales)] * np.stack(arrived, axis=1)[..., None]  # [B,S',3]
            if request.gated:
                alpha = alpha * self._activations(layer, features, arrived, request, arrays)
            gates[:, layer, : len(scales)] = alpha
            is_open = [[alpha[:, s, direction] > 0 for direction in range(len(DIRECTIONS))] for s in scales]
            now = step(space, layer, arrived, is_open, self.config.zeros_arrive)
            departures = self._departures(now, gates[:, layer])
            arrays = DeviceArrays(list(_needed(departures, now.reached)), x.device)
            arrivals = self._advance(layer, features, departures, arrays)
            arrived = now.reached
        return self._read_out(arrivals, stem, arrays), gates

    def _gather(self, arrivals: Sequence[Arrival], scale: int, stem: Tensor, arrays: DeviceArrays) -> Tensor:
        """Eq. 5: the sum of what arrives at a scale, for the whole batch; zeros if nothing does."""
        batch, channels, h, w = stem.shape
        shape = (batch, channels << scale, h >> scale, w >> scale)
        total: Tensor | None = None
        for arrival in arrivals:
            out, factor = arrival.map, 1.0
            if _uniform(arrival.weight):
                factor = float(arrival.weight[0])  # an argument of the kernel: nothing is brought to the device
            else:
                weight = arrays[arrival.weight].view(-1, 1, 1, 1)
                out = torch.mul(out, weight, out=torch.empty_like(out))  # in float32, then rounded
            if arrival.halved:
                out = upsample(out)
            if len(arrival.images) < batch:
                total = _zeros(shape, stem) if total is None else total.clone()  # it may be read elsewhere, too
                total.index_add_(0, arrays[arrival.images], out, alpha=factor)
            elif total is None:
                total = out if factor == 1 else out * factor
            else:
                total = torch.add(total, out, alpha=factor)
        return _zeros(shape, stem) if total is None else total

    def _activations(
        self,
        layer: int,
        features: dict[int, Tensor],
        arrived: Sequence[np.ndarray],
        request: Request,
        arrays: DeviceArrays,
    ) -> np.ndarray:
        """The activations of the layer's edges on the host, float32 [B,S',3]; 0 if an image does not reach a node."""
        assert self.activate is not None
        asked = [(s, self.model.node(layer, s), np.flatnonzero(arrived[s])) for s in features]
        answers = []
        for s, node, images in asked:
            budget = None if request.budget is None else to_device(request.budget[images], features[s].device)
            answers.append(cast(Gate, node.gate).scores(_choose(features[s], images, arrays), budget).flatten())
        found, start = to_host(torch.cat(answers)), 0  # the one transfer of this layer
        reached = np.stack(arrived, axis=1)
        scores = np.full((*reached.shape, len(DIRECTIONS)), -np.inf, dtype=found.dtype)
        for s, node, images in asked:
            stop = start + len(images) * len(node.directions)
            scores[images[:, None], s, node.directions] = found[start:stop].reshape(len(images), -1)
            start = stop
        alpha = np.zeros(scores.shape, dtype=np.float32)
        alpha[reached] = self.activate(torch.from_numpy(scores[reached])).numpy()
        return alpha

    def _departures(self, now: Step[np.ndarray], alpha: np.ndarray) -> list[Departure]:
        """What leaves each node of the layer, given the activations [B,S,3]."""
        departures = []
        for scale, arrived in enumerate(now.arrived):
            if not arrived.any():
                continue
            running = np.flatnonzero(now.runs[scale])
            sent = []
            for direction in range(len(DIRECTIONS)):
                share = alpha[running, scale, direction]
                rows = np.flatnonzero(share > 0)
                if len(rows):
                    sent.append((direction, rows, share[rows]))
            departures.append(Departure(scale, running, tuple(sent), np.flatnonzero(now.passes[scale])))
        return departures

    def _advance(
        self, layer: int, features: dict[int, Tensor], departures: Sequence[Departure], arrays: DeviceArrays
    ) -> list[list[Arrival]]:
        """Eq. 1 and 5 for a layer: what arrives at each scale of the next."""
        arrivals: list[list[Arrival]] = [[] for _ in range(self.space.num_scales)]
        for departure in departures:
            scale, running, skipping = departure.scale, departure.running, departure.skipping
            x = features[scale]
            if len(running):
                node = self.model.node(layer, scale)
                hidden = F.relu(node.cell(_choose(x, running, arrays)))  # all transforms read it through a ReLU
                for direction, rows, weight in departure.sent:
                    out = _transform(node, direction, _choose(hidden, rows, arrays))
                    arrival = Arrival(out, running[rows], weight, halved=direction == UP)
                    arrivals[scale + SCALE_STEP[direction]].append(arrival)
            if len(skipping):
                kept = _choose(x, skipping, arrays)
                arrivals[scale].append(Arrival(kept, skipping, np.ones(len(skipping), dtype=np.float32)))
        return arrivals

    def _read_out(self, arrivals: Sequence[Sequence[Arrival]], stem: Tensor, arrays: DeviceArrays) -> Tensor:
        """What the head makes of what leaves the grid; a decoder's paths up are summed before they are resized."""
        head, batch = self.model.head, len(stem)
        if type(head) is not Decoder:
            return head([self._gather(arrivals[s], s, stem, arrays) for s in range(self.space.num_scales)]).to(
                self.wide
            )
        everyone, ones = np.arange(batch), np.ones(batch, dtype=np.float32)
        running: list[Arrival] = []
        for scale in reversed(range(self.space.num_scales)):
            x = self._gather([*arrivals[scale], *running], scale, stem, arrays)
            running = [Arrival(head.merge[scale](x), everyone, ones, halved=True)]
        return upsample(head.predictor(running[0].map).to(self.wide), STEM_STRIDE)  # classes are told apart in float32


class LeavingForward:
    """A network with exits or a backbone, with its BatchNorm folded: its own forward computes no more than what the
    images run."""

    def __init__(self, model: RoutedNetwork) -> None:
        self.model = fold_batch_norm(model)

    def __call__(self, images: Tensor, request: Request) -> Any:
        """See `EagerForward`."""
        check_finite(images)
        return self.model.answer(images, request)


def check_finite(images: Tensor) -> None:
    """Raises ValueError for images on a CPU with values that are not finite."""
    if images.device.type == "cpu" and images.is_floating_point() and not torch.isfinite(images).all():
        raise ValueError(NOT_FINITE)


def _needed(departures: Sequence[Departure], reached: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """The places and weights that a device needs to know until the next layer is decided. Places of all images are left
    out, and so is a weight that all images share. `reached`, by scale [B], belongs to the next layer."""
    batch = len(reached[0])
    places = [np.flatnonzero(of_scale) for of_scale in reached]
    for departure in departures:
        places += [departure.running, departure.skipping]
        for _, rows, weight in departure.sent:
            places += [rows, departure.running[rows]]
            if not _uniform(weight):
                yield weight
    yield from (array for array in places if 0 < len(array) < batch)


def _uniform(weight: np.ndarray) -> bool:
    return bool((weight == weight[0]).all())


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    empty = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    return empty.zero_()


def _transform(node: RoutingNode, direction: int, hidden: Tensor) -> Tensor:
    """T_j(H) of Eq. 5, without the resizing of a path up: the sum does that."""
    for layer in cast(nn.Sequential, node.transforms[DIRECTIONS[direction]]):
        if not isinstance(layer, Upsample):
            hidden = layer(hidden)
    return hidden


def _choose(features: Tensor, images: np.ndarray, arrays: DeviceArrays) -> Tensor:
    """The rows of these images; no copy if these are all."""
    return features if len(images) == len(features) else features[arrays[images]]
