"""The parts of a network as ONNX operators; each mirrors a module of `routeseg.model`, whose BatchNorm is folded.

Legend: C channels of a scale, h, w the size of its map.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import numpy as np
from torch import nn

from routeseg.export.graph import FLOAT, Graph
from routeseg.model import DynamicRoutingNetwork
from routeseg.model.cell import RoutingNode
from routeseg.space import DIRECTIONS, DOWN, SMALL_GATE_FACTOR, STEM_STRIDE

BELOW_ONE = 1.0 - float(np.finfo(np.float32).eps)  # the largest activation
ROUNDS_UP = 1.0 + 2.0**-20  # so that size / side * side, in float32, is not below the size
Vector = np.ndarray  # one value per channel, float64 [C]: a map that is the same everywhere


def sequence(graph: Graph, module: nn.Sequential, name: str, x: str) -> str:
    """Convolutions and ReLUs in a row, also nested."""
    for key, layer in module.named_children():
        if isinstance(layer, nn.Conv2d):
            x = graph.conv(layer, f"{name}.{key}", x)
        elif isinstance(layer, nn.ReLU):
            x = graph.op("Relu", x)
        elif isinstance(layer, nn.Sequential):
            x = sequence(graph, layer, f"{name}.{key}", x)
        else:
            assert isinstance(layer, nn.Identity)  # where a BatchNorm was
    return x


def stem(graph: Graph, model: DynamicRoutingNetwork, images: str) -> str:
    """Images [B,3,H,W], RGB in 0..1 -> [B,C,H/4,W/4]; the normalisation is part of the first convolution.

    That is exact, since this convolution is not padded.
    """
    layers = copy.deepcopy(model.stem)
    first = cast(nn.Conv2d, cast(nn.Sequential, layers[0])[0])
    assert first.padding == (0, 0) and first.bias is not None
    weight = first.weight.double() / model.normalize.std.double()
    first.bias.data = (first.bias.double() - (weight * model.normalize.mean.double()).sum((1, 2, 3))).float()
    first.weight.data = weight.float()
    return sequence(graph, layers, "stem", images)


def cell(graph: Graph, node: RoutingNode, name: str, x: str) -> str:
    """relu(H), H as in Eq. 1: every transform begins with this ReLU."""
    total: str | None = None
    for key, operation in node.cell.items():
        out = sequence(graph, operation, f"{name}.cell.{key}", x) if isinstance(operation, nn.Sequential) else x
        total = out if total is None else graph.op("Add", total, out)
    assert total is not None
    return graph.op("Relu", total)


def convolve(graph: Graph, node: RoutingNode, name: str, direction: int, x: str) -> str:
    """T_j of Eq. 5 from relu(H); up is not yet enlarged."""
    for key, conv in node.transforms[DIRECTIONS[direction]].named_children():
        if isinstance(conv, nn.Conv2d):
            stride = 2 if direction == DOWN else 1  # Subsample, then a 1x1 convolution
            x = graph.op("Relu", graph.conv(conv, f"{name}.transforms.{DIRECTIONS[direction]}.{key}", x, stride))
    return x


def gate(graph: Graph, model: DynamicRoutingNetwork, layer: int, scale: int, x: str) -> str:
    """Eq. 2-4: the activations [1,3] of a node, 0 where it lacks the direction; x [1,C,h,w]."""
    node, name = model.node(layer, scale), f"nodes.{layer}-{scale}.gate"
    gate = node.gate
    assert gate is not None
    if gate.small:
        x = shrink(graph, model, scale, x)
    hidden = graph.op("GlobalAveragePool", sequence(graph, gate.squeeze, f"{name}.squeeze", x))
    hidden = graph.op("Flatten", hidden)
    weight = graph.tensor(f"{name}.score.weight", gate.score.weight.detach().numpy())
    bias = graph.tensor(f"{name}.score.bias", gate.score.bias.detach().numpy())
    scores = graph.op("Gemm", hidden, weight, bias, transB=1)  # [1,D]
    if gate.activation == "softmax":
        alpha = graph.op("Softmax", scores, axis=1)
        winner = graph.op("ArgMax", alpha, axis=1, keepdims=1)
        numbers = graph.constant([list(range(len(node.directions)))], np.int64)
        alpha = graph.op("Mul", alpha, graph.op("Cast", graph.op("Equal", winner, numbers), to=1))
        alpha = graph.op("Min", alpha, graph.constant(BELOW_ONE))
    else:
        assert gate.activation == "soft"
        alpha = graph.op("Clip", graph.op("Tanh", scores), graph.constant(0.0), graph.constant(BELOW_ONE))
    left = [graph.constant(np.zeros((1, node.directions[0])))] if node.directions[0] else []
    after = len(DIRECTIONS) - 1 - node.directions[-1]
    right = [graph.constant(np.zeros((1, after)))] if after else []
    return graph.op("Concat", *left, alpha, *right, axis=1)


def shrink(graph: Graph, model: DynamicRoutingNetwork, scale: int, x: str) -> str:
    """`shrink` of model/gate.py. Its special case, a side under 4 pixels, can only occur at the two coarsest scales."""
    factor = 1.0 / SMALL_GATE_FACTOR
    if 2 ** (model.space.num_scales - 1 - scale) >= SMALL_GATE_FACTOR:
        scales = graph.constant([1, 1, factor, factor])
    else:
        size = graph.op("Cast", graph.op("Shape", x, start=2, end=4), to=FLOAT)
        is_small = graph.op("Less", graph.op("ReduceMin", size), graph.constant(SMALL_GATE_FACTOR))
        quarter = graph.op("Floor", graph.op("Mul", size, graph.constant(factor)))
        fitting = graph.op("Div", graph.op("Max", quarter, graph.constant(1.0)), size)
        fitting = graph.op("Mul", fitting, graph.constant(ROUNDS_UP))
        chosen = graph.op("Where", is_small, fitting, graph.constant(factor))
        scales = graph.op("Concat", graph.constant([1, 1]), chosen, axis=0)
    return graph.op("Resize", x, "", scales, mode="linear", coordinate_transformation_mode="half_pixel")


def merge(
    graph: Graph, model: DynamicRoutingNetwork, scale: int, x: str | None, running: str | Vector | None
) -> str | Vector:
    """A step of the decoder: what arrives at a scale (None: zeros) and what comes from the coarser one -> the next.

    A scale that nothing arrives at is the same everywhere, so it stays a vector and writes no map.
    """
    block, name = cast(nn.Sequential, model.decoder.merge[scale]), f"decoder.merge.{scale}"
    conv = cast(nn.Conv2d, block[0])
    assert conv.bias is not None
    if x is None and not isinstance(running, str):
        vector = np.zeros(conv.in_channels) if running is None else running
        weight, bias = conv.weight.double().numpy()[..., 0, 0], conv.bias.double().numpy()
        return np.maximum(weight @ vector + bias, 0.0)
    if isinstance(running, np.ndarray):
        running = graph.constant(running.reshape(1, -1, 1, 1))
    both = [part for part in (x, running) if part is not None]
    out = sequence(graph, block, name, both[0] if len(both) == 1 else graph.op("Add", *both))
    return graph.resize(out, 2) if scale > 0 else out


def predict(graph: Graph, model: DynamicRoutingNetwork, x: str) -> str:
    """The end of the decoder: [B,C,H/4,W/4] -> logits [B,K,H,W]."""
    return graph.resize(graph.conv(model.decoder.predictor, "decoder.predictor", x), STEM_STRIDE)


def decode(graph: Graph, model: DynamicRoutingNetwork, maps: Sequence[str | None]) -> str:
    """The decoder: a map of each scale, None for zeros -> logits [B,K,H,W]."""
    running: str | Vector | None = None
    for scale in reversed(range(len(maps))):
        running = merge(graph, model, scale, maps[scale], running)
    assert isinstance(running, str)  # something reaches some scale
    return predict(graph, model, running)
