"""The skip engine: a closed path and a dropped cell are not computed, per image also inside a batch.

The gates of a layer are decided together, and reach the host in one transfer. BatchNorm is folded into the
convolutions (in float64, once). Same logits and gates as the dense forward, in eval mode, to float32 rounding; where a
deep network amplifies rounding, it does so in both (in float64 they agree to 1e-12).

At the threshold: a path is open where its activation, as computed here, is above 0. An activation that the dense
forward rounds to the other side of 0 is below 1e-6 there; only a node whose every activation is that small can differ.

Legend: B images, S scales, L depth, C channels, h, w the size of a feature map.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from routeseg.model import DynamicRoutingNetwork, Segmentation
from routeseg.model.cell import RoutingNode
from routeseg.model.grid import fill_missing, prepare
from routeseg.model.layers import running_statistics
from routeseg.model.network import Activation, Routes, route_gates
from routeseg.space import DIRECTIONS, SCALE_STEP


class SkipEngine:
    """An inference forward of a network: `engine(images, route=..., activation=...)` as the network itself.

    The network's weights are copied: train on, and build a new engine afterwards.
    """

    def __init__(self, model: DynamicRoutingNetwork, together: bool | None = None) -> None:
        """`together`: run the images of a batch layer by layer together, choosing rows where routes differ (None: on
        GPUs); otherwise one after the other, which spares the copies and is faster on CPUs."""
        self.model = fold_batch_norm(model)
        self.space = model.space
        self.together = next(model.parameters()).device.type != "cpu" if together is None else together

    @torch.inference_mode()
    def __call__(self, images: Tensor, route: Routes = None, activation: Activation = "one") -> Segmentation:
        """See `DynamicRoutingNetwork.forward`."""
        x, (height, width) = prepare(self.model, images)
        given_tensor = route_gates(self.model, route, len(images), torch.device("cpu"))
        given = None if given_tensor is None else given_tensor.numpy()
        if self.together:
            logits, gates = self._run(x, given, activation)
        else:
            rows = [slice(i, i + 1) for i in range(len(x))]
            parts = [self._run(x[row], None if given is None else given[row], activation) for row in rows]
            logits, gates = (torch.cat(part) for part in zip(*parts, strict=True))
        return Segmentation(logits[..., :height, :width], gates)

    def _run(self, x: Tensor, given: np.ndarray | None, activation: Activation) -> tuple[Tensor, Tensor]:
        """Prepared images [B,3,H,W] and a given route's gates [B,L+1,S,3] to logits [B,K,H,W] and gates."""
        model, space, batch = self.model, self.space, len(x)
        stem = model.stem(x)
        arrivals: list[Tensor | None] = [stem] + [None] * (space.num_scales - 1)
        reached = np.zeros((batch, space.num_scales), dtype=bool)
        reached[:, 0] = True
        gates = []
        for layer in range(space.depth + 1):
            features = fill_missing(arrivals, stem)
            alpha = self._activations(layer, features, reached, given, activation)
            arrivals, reached = self._advance(layer, features, reached, alpha)
            gates.append(alpha)
        logits = model.decoder(fill_missing(arrivals, stem))
        return logits, torch.from_numpy(np.stack(gates, axis=1)).to(logits.device)

    def _activations(
        self, layer: int, features: list[Tensor], reached: np.ndarray, given: np.ndarray | None, activation: Activation
    ) -> np.ndarray:
        """The activations of the layer's edges on the host, float32 [B,S,3]; 0 where an image does not reach a node."""
        if given is not None and activation == "one":
            return given[:, layer] * reached[..., None]
        asked = [s for s in self.space.scales(layer) if reached[:, s].any() and (layer, s) in self.model.route.nodes]
        rows = [_choose(features[s], np.flatnonzero(reached[:, s])) for s in asked]
        answers = [self.model.node(layer, s).activations(x) for s, x in zip(asked, rows, strict=True)]
        alpha = np.zeros((*reached.shape, len(DIRECTIONS)), dtype=np.float32)
        if not asked:
            return alpha
        flat = torch.cat(answers).cpu().numpy()  # the one transfer of this layer
        start = 0
        for s in asked:
            images = np.flatnonzero(reached[:, s])
            alpha[images, s] = flat[start : start + len(images)]
            start += len(images)
        return alpha if given is None else alpha * given[:, layer]

    def _advance(
        self, layer: int, features: list[Tensor], reached: np.ndarray, alpha: np.ndarray
    ) -> tuple[list[Tensor | None], np.ndarray]:
        """Eq. 1 and 5 for a layer: what arrives at each scale of the next, and which images reach it [B,S]."""
        arrivals: list[Tensor | None] = [None] * self.space.num_scales
        next_reached = np.zeros_like(reached)
        runs = np.any(alpha > 0, axis=-1)  # [B,S]
        for scale in self.space.scales(layer):
            running = np.flatnonzero(runs[:, scale])
            if len(running):
                node = self.model.node(layer, scale)
                hidden = node.cell(_choose(features[scale], running))
                self._send(node, scale, hidden, running, alpha[:, scale], arrivals)
                for direction in node.directions:
                    arrives = runs[:, scale] if self.space.zeros_arrive else alpha[:, scale, direction] > 0
                    next_reached[:, scale + SCALE_STEP[direction]] |= arrives
            skipping = np.flatnonzero(reached[:, scale] & ~runs[:, scale])
            if len(skipping):  # dropped cell: the input itself is kept, for free
                next_reached[skipping, scale] = True
                _add(arrivals, scale, _choose(features[scale], skipping), skipping, len(alpha))
        return arrivals, next_reached

    def _send(
        self,
        node: RoutingNode,
        scale: int,
        hidden: Tensor,
        running: np.ndarray,
        alpha: np.ndarray,
        arrivals: list[Tensor | None],
    ) -> None:
        """alpha_j T_j(H) along the open paths of a node, for the images that have them open."""
        for direction in node.directions:
            share = alpha[running, direction]
            rows = np.flatnonzero(share > 0)
            if not len(rows):
                continue
            out = node.transform(direction, _choose(hidden, rows))
            if not (share[rows] == 1).all():
                out *= torch.from_numpy(share[rows]).to(out).view(-1, 1, 1, 1)
            _add(arrivals, scale + SCALE_STEP[direction], out, running[rows], len(alpha))


def _choose(features: Tensor, images: np.ndarray) -> Tensor:
    """The rows of these images; no copy where these are all."""
    return features if len(images) == len(features) else features[torch.from_numpy(images).to(features.device)]


def _add(arrivals: list[Tensor | None], scale: int, out: Tensor, images: np.ndarray, batch: int) -> None:
    """Adds rows [b,C,h,w] of these images to what arrives at a scale [B,C,h,w]."""
    before = arrivals[scale]
    if len(images) == batch:
        arrivals[scale] = out if before is None else before + out
        return
    if before is None:
        before = out.new_zeros(batch, *out.shape[1:]).contiguous(memory_format=torch.channels_last)
    arrivals[scale] = before.index_add_(0, torch.from_numpy(images).to(out.device), out)


def fold_batch_norm(model: DynamicRoutingNetwork) -> DynamicRoutingNetwork:
    """A copy in eval mode whose convolutions carry the BatchNorm behind them; computed in float64."""
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack memory_format
    for sequence in [m for m in folded.modules() if isinstance(m, nn.Sequential)]:
        for position in range(1, len(sequence)):
            conv, norm = sequence[position - 1], sequence[position]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.modules.batchnorm._BatchNorm):
                mean, variance = running_statistics(norm)
                scale = norm.weight.double() / torch.sqrt(variance.double() + norm.eps)
                shift = norm.bias.double() - mean.double() * scale
                dtype = conv.weight.dtype
                conv.weight = nn.Parameter(
                    (conv.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype), requires_grad=False
                )
                conv.bias = nn.Parameter(shift.to(dtype), requires_grad=False)
                sequence[position] = nn.Identity()
    return folded
