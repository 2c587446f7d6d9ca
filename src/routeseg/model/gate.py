"""The gates (Sec. 3.2, Eq. 2-4): one activation per direction, per image. The paper's is the soft conditional gate;
softmax, whose one largest path wins, is the alternative that its ablation argues against.

Another gate is a subclass of `Gate`, with its name in registry.GATES (docs/extending.md).

Legend: B images, C channels, h, w the size of a feature map, D legal directions of the node (1 to 3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routeseg import counting
from routeseg.counting import MAP, ONCE, SMALL, Macs, each
from routeseg.errors import NotExportable
from routeseg.model.graph import Graph
from routeseg.model.layers import conv_norm
from routeseg.space import SMALL_GATE_FACTOR

GATE_BIAS = 1.5  # tanh(1.5) = 0.905: every path starts open
BELOW_ONE = 1.0 - torch.finfo(torch.float32).eps  # the largest activation of a gate that is soft


class Gate(nn.Module):
    """Features [B,C,h,w] -> activations alpha [B,D] in [0,1]; 0 is closed.

    small  the features are first resized by 1/4 (bilinear), so that the gate costs a sixteenth

    A kind of gate says how scores become activations (`activate`) and, if it can be exported, the same in ONNX
    (`onnx`). It may also compute its scores in another way (`scores`, `macs`).
    """

    def __init__(self, channels: int, num_directions: int, small: bool = False) -> None:
        super().__init__()
        self.small = small
        self.squeeze = conv_norm(channels, channels // 2)
        self.score = nn.Linear(channels // 2, num_directions)

    def reset_parameters(self) -> None:
        """Draws the weights of the scores: near 0, so that every path starts open, for every image."""
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.constant_(self.score.bias, GATE_BIAS)

    def forward(self, features: Tensor) -> Tensor:
        return self.activate(self.scores(features))

    def scores(self, features: Tensor) -> Tensor:
        """G of Eq. 2-3: [B,C,h,w] -> [B,D], float32."""
        return self.score(self.pool(features))

    def pool(self, features: Tensor) -> Tensor:
        """What scores are made of: [B,C,h,w] -> [B,C/2], float32."""
        hidden = self.squeeze(shrink(features) if self.small else features)
        return hidden.mean(dim=(2, 3), dtype=self.score.weight.dtype)

    @staticmethod
    def activate(scores: Tensor) -> Tensor:
        """Activations in [0,1] of scores [B,D], float32. A score of -infinity closes a path; rows are independent, and
        a column of -infinity changes no other."""
        raise NotImplementedError

    @classmethod
    def macs(cls, channels: int, num_directions: int, small: bool, stride: int) -> Macs:
        """MACs for any image size; `stride` is that of the features' map, in pixels of the image."""
        place, hidden = (SMALL if small else MAP), channels // 2
        resize = each("resize", channels, stride, SMALL) if small else Macs()
        return (
            resize
            + counting.conv_norm_macs(channels, hidden, stride, place=place)
            + each("pool", hidden, stride, place)
            + each("conv", hidden * num_directions, 1, ONCE)
        )

    def onnx(self, graph: Graph, scores: str) -> str:
        """`activate` in a graph of ONNX: scores [1,D] -> activations [1,D]. Raises NotExportable if it has none."""
        raise NotExportable(f"the gate {type(self).__name__} has no export: give it a method `onnx`")


class SoftGate(Gate):
    """The soft conditional gate: directions are independent of each other, several or none may be open."""

    @staticmethod
    def activate(scores: Tensor) -> Tensor:
        return torch.tanh(scores.float()).clamp(min=0.0).clamp(max=BELOW_ONE)  # Eq. 4

    def onnx(self, graph: Graph, scores: str) -> str:
        return graph.op("Clip", graph.op("Tanh", scores), graph.constant(0.0), graph.constant(BELOW_ONE))


class SoftmaxGate(Gate):
    """Softmax over the directions. Only the largest stays open: one path leaves the node, and no cell is ever
    dropped."""

    @staticmethod
    def activate(scores: Tensor) -> Tensor:
        alpha = torch.softmax(scores.float(), dim=1)
        winner = F.one_hot(alpha.argmax(dim=1), alpha.shape[1])
        return (alpha * winner).clamp(max=BELOW_ONE)

    def onnx(self, graph: Graph, scores: str) -> str:
        alpha = graph.op("Softmax", scores, axis=1)
        winner = graph.op("ArgMax", alpha, axis=1, keepdims=1)
        numbers = graph.integers([list(range(self.score.out_features))])
        alpha = graph.op("Mul", alpha, graph.as_float(graph.op("Equal", winner, numbers)))
        return graph.op("Min", alpha, graph.constant(BELOW_ONE))


def shrink(features: Tensor) -> Tensor:
    """Bilinear resizing to a quarter, at least one pixel: [B,C,h,w] -> [B,C,h/4,w/4]."""
    h, w = features.shape[-2:]
    if min(h, w) >= SMALL_GATE_FACTOR:  # the step is 4 pixels also if 4 does not divide the size
        return F.interpolate(features, scale_factor=1 / SMALL_GATE_FACTOR, mode="bilinear", align_corners=False)
    size = [max(1, side // SMALL_GATE_FACTOR) for side in (h, w)]
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)
