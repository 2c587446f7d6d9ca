"""A forward by PyTorch's own operations: on GPUs, and on CPUs where no kernels could be built.

The host decides what runs. It learns the gates' scores of a layer in one transfer, and sends what the device needs for
images that differ in their routes in another one; a batch of one needs none of the latter, and a known route neither.

Legend: B images, b those of them that are meant, S scales, L depth, C channels, h, w the size of a feature map.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routeseg.engine.folding import fold_batch_norm
from routeseg.engine.graphs import CudaRecorder, Recordings
from routeseg.engine.transfers import DeviceArrays, to_device, to_host
from routeseg.errors import NOT_FINITE
from routeseg.model import DynamicRoutingNetwork
from routeseg.model.cell import RoutingNode
from routeseg.model.gate import Gate, activate, shrink
from routeseg.model.grid import prepare
from routeseg.model.layers import Upsample, upsample
from routeseg.space import DIRECTIONS, SCALE_STEP, STEM_STRIDE, UP


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
    """What leaves a node, decided: places in the batch but for `rows`, weights are activations, float32.

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

    together    run the images of a batch layer by layer together, choosing rows where routes differ
    recordings  of known routes, on CUDA; None elsewhere
    """

    def __init__(self, model: DynamicRoutingNetwork, dtype: torch.dtype, together: bool) -> None:
        self.together, self.dtype, self.space = together, dtype, model.space
        self.wide = torch.promote_types(dtype, torch.float32)  # of scores and logits
        folded = fold_batch_norm(model)
        gates = [module for module in folded.modules() if isinstance(module, Gate)]
        scores = [(gate, gate.score) for gate in gates]
        for gate in gates:
            gate.score = nn.Identity()  # type: ignore[assignment]
        self.model = folded.to(dtype)
        for gate, score in scores:
            gate.score = score.to(self.wide)
        self.gate_activation = gates[0].activation if gates else None
        self.model.normalize = copy.deepcopy(model.normalize)  # in the network's own precision
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        on_cuda = next(model.parameters()).device.type == "cuda"
        self.recordings = Recordings(CudaRecorder()) if on_cuda else None

    def __call__(self, images: Tensor, given: np.ndarray | None, own: bool) -> tuple[Tensor, Tensor]:
        """Images [B,3,H,W], and gates of given routes [B,L+1,S,3], to logits [B,K,H,W] and gates [B,L+1,S,3].

        own  the open paths of a given route have the network's own activations

        Raises ValueError for images on a CPU with values that are not finite.
        """
        if images.device.type == "cpu" and images.is_floating_point() and not torch.isfinite(images).all():
            raise ValueError(NOT_FINITE)
        if not self.model.gated:  # what it has is open: a known route
            everything = np.broadcast_to(self.model.route.to_gates(), (len(images), *self.space.legal.shape))
            given, own = everything if given is None else given, False
        forward = partial(self._forward, given=given, own=own)
        if self.recordings is not None and given is not None and not own and (given == given[:1]).all():
            key = (images.shape, images.dtype, given[0].tobytes())
            logits, gates = self.recordings(key, forward, images)
        else:
            logits, gates = forward(images)
        return logits, to_device(gates, logits.device)

    def _forward(self, images: Tensor, given: np.ndarray | None, own: bool) -> tuple[Tensor, np.ndarray]:
        """As `__call__`, with the gates on the host."""
        x, (height, width) = prepare(self.model, images)
        x = x.to(self.dtype)
        if self.together or len(x) == 1:
            logits, gates = self._run(x, given, own)
        else:
            rows = [slice(i, i + 1) for i in range(len(x))]
            parts = [self._run(x[row], None if given is None else given[row], own) for row in rows]
            logits = torch.cat([part[0] for part in parts])
            gates = np.concatenate([part[1] for part in parts])
        return logits[..., :height, :width], gates

    def _run(self, x: Tensor, given: np.ndarray | None, own: bool) -> tuple[Tensor, np.ndarray]:
        """Prepared images [B,3,H,W] and a given route's gates [B,L+1,S,3] to logits [B,K,H,W] and gates.

        Kernels that read the activations on the device, and return where a path is closed, would need no decision of
        the host: they would take the place of this loop.
        """
        space, batch = self.space, len(x)
        stem = self.model.stem(x)
        arrivals: list[list[Arrival]] = [[] for _ in range(space.num_scales)]
        arrivals[0].append(Arrival(stem, np.arange(batch), np.ones(batch, dtype=np.float32)))
        reached = np.zeros((batch, space.num_scales), dtype=bool)
        reached[:, 0] = True
        gates, arrays = [], DeviceArrays((), x.device)
        for layer in range(space.depth + 1):
            features = {
                s: self._gather(arrivals[s], s, stem, arrays) for s in space.scales(layer) if reached[:, s].any()
            }
            if given is not None and not own:
                alpha = given[:, layer] * reached[..., None]
            else:
                alpha = self._activations(layer, features, reached, arrays)
                alpha = alpha if given is None else alpha * given[:, layer]
            departures, reached = self._decide(layer, reached, alpha)
            arrays = DeviceArrays(list(_needed(departures, reached)), x.device)
            arrivals = self._advance(layer, features, departures, arrays)
            gates.append(alpha)
        return self._decode(arrivals, stem, arrays), np.stack(gates, axis=1)

    def _gather(self, arrivals: Sequence[Arrival], scale: int, stem: Tensor, arrays: DeviceArrays) -> Tensor:
        """Eq. 5: the sum of what arrives at a scale, for the whole batch; zeros where nothing does."""
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
        self, layer: int, features: dict[int, Tensor], reached: np.ndarray, arrays: DeviceArrays
    ) -> np.ndarray:
        """The activations of the layer's edges on the host, float32 [B,S,3]; 0 where an image does not reach a node."""
        assert self.gate_activation is not None
        asked = [(s, self.model.node(layer, s), np.flatnonzero(reached[:, s])) for s in features]
        answers = [
            _scores(cast(Gate, node.gate), _choose(features[s], images, arrays)).flatten() for s, node, images in asked
        ]
        found, start = to_host(torch.cat(answers)), 0  # the one transfer of this layer
        scores = np.full((*reached.shape, len(DIRECTIONS)), -np.inf, dtype=found.dtype)
        for s, node, images in asked:
            stop = start + len(images) * len(node.directions)
            scores[images[:, None], s, node.directions] = found[start:stop].reshape(len(images), -1)
            start = stop
        alpha = np.zeros(scores.shape, dtype=np.float32)
        alpha[reached] = activate(torch.from_numpy(scores[reached]), self.gate_activation).numpy()
        return alpha

    def _decide(self, layer: int, reached: np.ndarray, alpha: np.ndarray) -> tuple[list[Departure], np.ndarray]:
        """What leaves each node of the layer, and which images reach the scales of the next [B,S]."""
        departures = []
        next_reached = np.zeros_like(reached)
        runs = np.any(alpha > 0, axis=-1)  # [B,S]
        for scale in (s for s in self.space.scales(layer) if reached[:, s].any()):
            running = np.flatnonzero(runs[:, scale])
            sent = []
            for direction in self.model.node(layer, scale).directions if len(running) else ():
                share = alpha[running, scale, direction]
                rows = np.flatnonzero(share > 0)
                if len(rows):
                    sent.append((direction, rows, share[rows]))
                arrives = runs[:, scale] if self.space.zeros_arrive else alpha[:, scale, direction] > 0
                next_reached[:, scale + SCALE_STEP[direction]] |= arrives
            skipping = np.flatnonzero(reached[:, scale] & ~runs[:, scale])
            next_reached[skipping, scale] = True
            departures.append(Departure(scale, running, tuple(sent), skipping))
        return departures, next_reached

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

    def _decode(self, arrivals: Sequence[Sequence[Arrival]], stem: Tensor, arrays: DeviceArrays) -> Tensor:
        """`Decoder.forward` on what leaves the grid, to logits [B,K,4h,4w]; classes are told apart in float32."""
        decoder, batch = self.model.decoder, len(stem)
        everyone, ones = np.arange(batch), np.ones(batch, dtype=np.float32)
        running: list[Arrival] = []
        for scale in reversed(range(self.space.num_scales)):
            x = self._gather([*arrivals[scale], *running], scale, stem, arrays)
            running = [Arrival(decoder.merge[scale](x), everyone, ones, halved=True)]
        return upsample(decoder.predictor(running[0].map).to(self.wide), STEM_STRIDE)


def _needed(departures: Sequence[Departure], reached: np.ndarray) -> Iterator[np.ndarray]:
    """The places and weights that a device needs to know until the next layer is decided: not those of all images,
    and no weight that all share. `reached` [B,S] is that of the next layer."""
    batch = len(reached)
    places = [np.flatnonzero(of_scale) for of_scale in reached.T]
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


def _scores(gate: Gate, features: Tensor) -> Tensor:
    """Eq. 2-3 for features [b,C,h,w]: scores [b,D] of the node's directions, float32."""
    hidden = gate.squeeze(shrink(features) if gate.small else features)
    return gate.score(hidden.mean(dim=(2, 3), dtype=gate.score.weight.dtype))


def _transform(node: RoutingNode, direction: int, hidden: Tensor) -> Tensor:
    """T_j(H) of Eq. 5, but for the resizing of a path up: that is done where the sum is made."""
    for layer in cast(nn.Sequential, node.transforms[DIRECTIONS[direction]]):
        if not isinstance(layer, Upsample):
            hidden = layer(hidden)
    return hidden


def _choose(features: Tensor, images: np.ndarray, arrays: DeviceArrays) -> Tensor:
    """The rows of these images; no copy where these are all."""
    return features if len(images) == len(features) else features[arrays[images]]
