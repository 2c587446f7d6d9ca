"""A forward by PyTorch's own operations: on any device, and on CPUs where no kernels could be built.

The gates of a layer are decided together, and reach the host in one transfer.

Legend: B images, b those of them that are meant, S scales, L depth, C channels, h, w the size of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routeseg.engine.compiled import NOT_FINITE
from routeseg.engine.folding import fold_batch_norm
from routeseg.model import DynamicRoutingNetwork
from routeseg.model.cell import RoutingNode
from routeseg.model.grid import prepare
from routeseg.model.layers import Upsample, upsample
from routeseg.space import DIRECTIONS, SCALE_STEP, UP


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


class EagerForward:
    """A network's forward, with its BatchNorm folded, in channels_last.

    together  run the images of a batch layer by layer together, choosing rows where routes differ
    """

    def __init__(self, model: DynamicRoutingNetwork, dtype: torch.dtype, together: bool) -> None:
        self.together, self.dtype, self.space = together, dtype, model.space
        self.model = fold_batch_norm(model).to(dtype)
        self.model.normalize = model.normalize  # in the network's own precision
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    def __call__(self, images: Tensor, given: np.ndarray | None, own: bool) -> tuple[Tensor, Tensor]:
        """Images [B,3,H,W], and gates of given routes [B,L+1,S,3], to logits [B,K,H,W] and gates [B,L+1,S,3].

        own  the open paths of a given route have the network's own activations

        Raises ValueError for images on a CPU with values that are not finite.
        """
        if images.device.type == "cpu" and images.is_floating_point() and not torch.isfinite(images).all():
            raise ValueError(NOT_FINITE)
        x, (height, width) = prepare(self.model, images)
        x = x.to(self.dtype)
        if self.together or len(x) == 1:
            logits, gates = self._run(x, given, own)
        else:
            rows = [slice(i, i + 1) for i in range(len(x))]
            parts = [self._run(x[row], None if given is None else given[row], own) for row in rows]
            logits, gates = (torch.cat(part) for part in zip(*parts, strict=True))
        return logits[..., :height, :width].to(self.model.normalize.mean.dtype), gates

    def _run(self, x: Tensor, given: np.ndarray | None, own: bool) -> tuple[Tensor, Tensor]:
        """Prepared images [B,3,H,W] and a given route's gates [B,L+1,S,3] to logits [B,K,H,W] and gates."""
        space, batch = self.space, len(x)
        stem = self.model.stem(x)
        arrivals: list[list[Arrival]] = [[] for _ in range(space.num_scales)]
        arrivals[0].append(Arrival(stem, np.arange(batch), np.ones(batch, dtype=np.float32)))
        reached = np.zeros((batch, space.num_scales), dtype=bool)
        reached[:, 0] = True
        gates = []
        for layer in range(space.depth + 1):
            features = {s: self._gather(arrivals[s], s, stem) for s in space.scales(layer) if reached[:, s].any()}
            alpha = self._activations(layer, features, reached, None if given is None else given[:, layer], own)
            arrivals, reached = self._advance(layer, features, reached, alpha)
            gates.append(alpha)
        logits = self.model.decoder([self._gather(incoming, s, stem) for s, incoming in enumerate(arrivals)])
        return logits, torch.from_numpy(np.stack(gates, axis=1)).to(logits.device)

    def _gather(self, arrivals: Sequence[Arrival], scale: int, stem: Tensor) -> Tensor:
        """Eq. 5: the sum of what arrives at a scale, for the whole batch; zeros where nothing does."""
        batch, channels, h, w = stem.shape
        total: Tensor | None = None
        for arrival in arrivals:
            out = arrival.map
            if not (arrival.weight == 1).all():
                out = out * torch.from_numpy(arrival.weight).to(out).view(-1, 1, 1, 1)
            if arrival.halved:
                out = upsample(out)
            if len(arrival.images) == batch:
                total = out if total is None else total + out
                continue
            if total is None:
                total = out.new_zeros(batch, *out.shape[1:]).contiguous(memory_format=torch.channels_last)
            total = total.index_add(0, torch.from_numpy(arrival.images).to(out.device), out)
        return stem.new_zeros(batch, channels << scale, h >> scale, w >> scale) if total is None else total

    def _activations(
        self, layer: int, features: dict[int, Tensor], reached: np.ndarray, given: np.ndarray | None, own: bool
    ) -> np.ndarray:
        """The activations of the layer's edges on the host, float32 [B,S,3]; 0 where an image does not reach a node."""
        if given is not None and not own:
            return given * reached[..., None]
        asked = [s for s in features if (layer, s) in self.model.route.nodes]
        alpha = np.zeros((*reached.shape, len(DIRECTIONS)), dtype=np.float32)
        if not asked:
            return alpha
        images = [np.flatnonzero(reached[:, s]) for s in asked]
        answers = [
            self.model.node(layer, s).activations(_choose(features[s], rows)).float()
            for s, rows in zip(asked, images, strict=True)
        ]
        flat, start = torch.cat(answers).cpu().numpy(), 0  # the one transfer of this layer
        for s, rows in zip(asked, images, strict=True):
            alpha[rows, s] = flat[start : start + len(rows)]
            start += len(rows)
        return alpha if given is None else alpha * given

    def _advance(
        self, layer: int, features: dict[int, Tensor], reached: np.ndarray, alpha: np.ndarray
    ) -> tuple[list[list[Arrival]], np.ndarray]:
        """Eq. 1 and 5 for a layer: what arrives at each scale of the next, and which images reach it [B,S]."""
        arrivals: list[list[Arrival]] = [[] for _ in range(self.space.num_scales)]
        next_reached = np.zeros_like(reached)
        runs = np.any(alpha > 0, axis=-1)  # [B,S]
        for scale, x in features.items():
            running = np.flatnonzero(runs[:, scale])
            if len(running):
                node = self.model.node(layer, scale)
                hidden = F.relu(node.cell(_choose(x, running)))  # all transforms read it through a ReLU
                for direction in node.directions:
                    target = scale + SCALE_STEP[direction]
                    share = alpha[running, scale, direction]
                    rows = np.flatnonzero(share > 0)
                    if len(rows):
                        out = _transform(node, direction, _choose(hidden, rows))
                        arrivals[target].append(Arrival(out, running[rows], share[rows], halved=direction == UP))
                    arrives = runs[:, scale] if self.space.zeros_arrive else alpha[:, scale, direction] > 0
                    next_reached[:, target] |= arrives
            skipping = np.flatnonzero(reached[:, scale] & ~runs[:, scale])
            if len(skipping):  # dropped cell: the input itself is kept, for free
                next_reached[skipping, scale] = True
                kept = _choose(x, skipping)
                arrivals[scale].append(Arrival(kept, skipping, np.ones(len(skipping), dtype=np.float32)))
        return arrivals, next_reached


def _transform(node: RoutingNode, direction: int, hidden: Tensor) -> Tensor:
    """T_j(H) of Eq. 5, but for the resizing of a path up: that is done where the sum is made."""
    for layer in cast(nn.Sequential, node.transforms[DIRECTIONS[direction]]):
        if not isinstance(layer, Upsample):
            hidden = layer(hidden)
    return hidden


def _choose(features: Tensor, images: np.ndarray) -> Tensor:
    """The rows of these images; no copy where these are all."""
    return features if len(images) == len(features) else features[torch.from_numpy(images).to(features.device)]
