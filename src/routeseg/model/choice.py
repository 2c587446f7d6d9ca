"""What decides who leaves at the exits of a network (model/exits.py): a rule is a subclass of `Choice` with a name in
registry.CHOICES.

`loss`     of whole images: a linear map of what a glance sees predicts what part of the mIoU an image loses at this
           exit and at each later one. It leaves where loss and price of the cost are least:

               leaves at k  <=>  loss_k + price * cost_k <= loss_j + price * cost_j   for all later exits j

`entropy`  of images or places: they leave if the mean entropy of the classes, as a glance sees it there, is at most the
           price (nats). A pixel counts as much as the classes that it may be of: an error of a rare class costs more of
           the mIoU. Beside these weights it has nothing to fit, so that it is the same on images of any source

Legend: N images, or places of images, K exits, F features of a glance, B images, hb, wb places of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routeseg.config import NetworkConfig
from routeseg.counting import NOTHING, Macs
from routeseg.errors import NotExportable
from routeseg.model.graph import Graph
from routeseg.model.head import GLANCE, Head
from routeseg.space import STEM_STRIDE

RIDGES = 10.0 ** np.arange(-2, 7)  # strengths, for standardised features
LEAST_SPREAD = 1e-2  # of a feature over the images, as a share of the largest: a class that hardly occurs


class Choice(nn.ModuleList):
    """A rule, with a part for each exit but the last. Made of the network's configuration.

    by_place  places can decide by it
    fits      it is fitted to images with labels
    """

    by_place: ClassVar[bool] = False
    fits: ClassVar[bool] = False

    def see(self, head: Head, features: Sequence[Tensor | None]) -> Tensor:
        """What decides at an exit, given its head and features by scale, None where nothing arrives: float32
        [B,...], of places [B,...,hb,wb]."""
        raise NotImplementedError

    def leaves(self, exit: int, seen: Tensor, price: Tensor, costs: Tensor) -> Tensor:
        """Who leaves at an exit, given what `see` gave [N,...], prices [N], and the costs [K] of leaving at each exit,
        shares of the full network's: bool [N]. At a price of 0 or less nobody may leave that would rather not."""
        raise NotImplementedError

    def need(self, exit: int, seen: Tensor) -> Tensor:
        """How much it would help to go on, given what `see` gave; only the order counts. For `by_place` alone."""
        raise NotImplementedError

    def unsure(self, scores: Tensor) -> Tensor:
        """How unsure scores [B,K,h,w] are, pixel by pixel [B,h,w]: their entropy, in nats."""
        return -(scores.softmax(1) * scores.log_softmax(1)).sum(1)

    def fit(self, seen: Sequence[np.ndarray], losses: np.ndarray) -> None:
        """Fits the rule to images with labels, if it `fits`: what was seen [N,F] at each exit but the last, and what
        each image loses [N,K] in mIoU at each exit."""

    @classmethod
    def macs(cls, config: NetworkConfig, head: type[Head]) -> Macs:
        """MACs of a decision at an exit, for any image size."""
        return NOTHING

    def onnx(
        self, graph: Graph, exit: int, head: Head, maps: Sequence[str | None], price: str, costs: np.ndarray
    ) -> str:
        """Adds `see` and `leaves`, for one image, to a graph of ONNX: the name of a bool. Raises NotExportable if the
        rule has no export."""
        raise NotExportable(f"the choice {type(self).__name__} has no export: give it a method `onnx`")


class LossGate(nn.Module):
    """What a glance sees [N,F] -> the loss that it predicts at its exit and at each later one, [N,later]."""

    center: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, features: int, later: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(features))
        self.register_buffer("weight", torch.zeros(later, features))
        self.register_buffer("bias", torch.zeros(later))

    def forward(self, seen: Tensor) -> Tensor:
        center, weight, bias = (values.float() for values in (self.center, self.weight, self.bias))
        return F.linear(seen - center, weight, bias)


class LossChoice(Choice):
    """The head, on features a quarter of the size, tells the share of each class and the entropy where it is. A
    glance costs 0.2 % of the network, which is not counted."""

    fits = True

    def __init__(self, config: NetworkConfig) -> None:
        assert config.exits is not None
        count = len(config.exits)
        super().__init__(LossGate(2 * config.num_classes, count - k) for k in range(count - 1))

    def see(self, head: Head, features: Sequence[Tensor | None]) -> Tensor:
        logits = head.glance(features).float().flatten(2)
        share = logits.softmax(1)
        entropy = -(share * logits.log_softmax(1)).sum(1, keepdim=True)
        return torch.cat([share.mean(2), (share * entropy).mean(2)], dim=1)

    def leaves(self, exit: int, seen: Tensor, price: Tensor, costs: Tensor) -> Tensor:
        total = self[exit](seen) + price[:, None] * costs[exit:]
        return total[:, 0] <= total[:, 1:].amin(dim=1)

    def onnx(
        self, graph: Graph, exit: int, head: Head, maps: Sequence[str | None], price: str, costs: np.ndarray
    ) -> str:
        share, entropy = _onnx_entropy(graph, head.onnx_glance(graph, maps))
        means = (graph.op("GlobalAveragePool", one) for one in (share, graph.op("Mul", share, entropy)))
        seen = graph.op("Flatten", graph.op("Concat", *means, axis=1))  # [1,2K]
        gate = cast(LossGate, self[exit])
        center, weight, bias = (graph.constant(one.numpy()) for one in (gate.center, gate.weight, gate.bias))
        loss = graph.op("Gemm", graph.op("Sub", seen, center), weight, bias, transB=1)
        total = graph.op("Add", loss, graph.op("Mul", price, graph.constant(costs[exit:])))  # [1,later]
        here = graph.op("Gather", total, graph.integers(0), axis=1)
        later = graph.op("Gather", total, graph.integers(np.arange(1, len(costs) - exit)), axis=1)
        least = graph.op("ReduceMin", later, graph.integers([1]), keepdims=0)
        return graph.op("Squeeze", graph.op("LessOrEqual", here, least))

    def fit(self, seen: Sequence[np.ndarray], losses: np.ndarray) -> None:
        for exit, gate in enumerate(self):
            center, weight = ridge(seen[exit], losses[:, exit:])
            for name, value in (("center", center), ("weight", weight), ("bias", losses[:, exit:].mean(0))):
                getattr(gate, name).copy_(torch.from_numpy(value))


class EntropyChoice(Choice):
    """The mean entropy over an image, or over each of its places.

    weights  float32 [C]: what a pixel of each class counts; all 1 before a calibration that reads labels
    """

    by_place = True
    weights: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.place = config.place
        self.register_buffer("weights", torch.ones(config.num_classes))

    def see(self, head: Head, features: Sequence[Tensor | None]) -> Tensor:
        return self.over_places(self.unsure(head.glance(features, even=True).float()))

    def unsure(self, scores: Tensor) -> Tensor:
        weights = torch.tensordot(scores.softmax(1), self.weights.to(scores.dtype), dims=([1], [0]))
        return weights * super().unsure(scores)

    def over_places(self, values: Tensor) -> Tensor:
        """The mean of an even glance's values [B,h,w] over each image [B], or over each of its places [B,hb,wb]."""
        if self.place is None:
            return values.mean((1, 2))
        pixels = self.place // (STEM_STRIDE * GLANCE)
        return F.avg_pool2d(values[:, None], pixels, ceil_mode=True, count_include_pad=False)[:, 0]

    def leaves(self, exit: int, seen: Tensor, price: Tensor, costs: Tensor) -> Tensor:
        return seen <= price

    def need(self, exit: int, seen: Tensor) -> Tensor:
        return seen

    @classmethod
    def macs(cls, config: NetworkConfig, head: type[Head]) -> Macs:
        return head.glance_macs(config)

    def onnx(
        self, graph: Graph, exit: int, head: Head, maps: Sequence[str | None], price: str, costs: np.ndarray
    ) -> str:
        assert self.place is None
        share, entropy = _onnx_entropy(graph, head.onnx_glance(graph, maps, even=True))
        if bool((self.weights != 1).any()):
            weights = graph.constant(self.weights.cpu().numpy().reshape(1, -1, 1, 1))
            weight = graph.op("ReduceSum", graph.op("Mul", share, weights), graph.integers([1]), keepdims=1)
            entropy = graph.op("Mul", entropy, weight)
        return graph.op("LessOrEqual", graph.op("Squeeze", graph.op("GlobalAveragePool", entropy)), price)


def _onnx_entropy(graph: Graph, logits: str) -> tuple[str, str]:
    """The shares of the classes [1,K,h,w] in a graph of ONNX, and their entropy [1,1,h,w]."""
    share = graph.op("Softmax", logits, axis=1)
    product = graph.op("Mul", share, graph.op("LogSoftmax", logits, axis=1))
    return share, graph.op("Neg", graph.op("ReduceSum", product, graph.integers([1]), keepdims=1))


def ridge(features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A ridge regression of targets [N,J] on features [N,F]: the features' centre [F], and weights [J,F].

    The strength is the one of RIDGES that predicts best each image that is left out.
    """
    center, spread = features.mean(0), features.std(0)
    alive = spread > LEAST_SPREAD * spread.max()  # what hardly changes tells nothing
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=alive)
    mean = targets.mean(0)
    left, singular, right = np.linalg.svd((features - center) * scale, full_matrices=False)
    along = left.T @ (targets - mean)
    best: tuple[float, float] | None = None
    for strength in RIDGES:
        share = singular**2 / (singular**2 + strength)
        leverage = (left**2 @ share)[:, None]  # the mean stays: else predictions would vary where features tell nothing
        predicted = mean + left @ (share[:, None] * along)
        error = float((((targets - predicted) / np.maximum(1 - leverage, 1e-6)) ** 2).mean())  # of those left out
        if best is None or error < best[0]:
            best = (error, strength)
    assert best is not None
    weights = right.T @ ((singular / (singular**2 + best[1]))[:, None] * along)
    return center, (weights * scale[:, None]).T
