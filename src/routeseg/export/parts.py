"""The parts of a network as ONNX operators; each mirrors a module of `routeseg.model`, whose BatchNorm is folded.

Operations of a cell, gates and heads bring their own (`onnx`).

Legend: C channels of a scale, h, w the size of its map.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from torch import nn

from routeseg.export.graph import FLOAT, Graph
from routeseg.model.cell import RoutingNode
from routeseg.model.grid import RoutedNetwork
from routeseg.space import DIRECTIONS, DOWN, SMALL_GATE_FACTOR

ROUNDS_UP = 1.0 + 2.0**-20  # so that size / side * side, in float32, is not below the size


def prepare(graph: Graph, model: RoutedNetwork, images: str) -> str:
    """Images [B,3,H,W], RGB in 0..1 -> normalised, and padded right and below with zeros to the space's stride."""
    mean, std = (graph.constant(values.numpy()) for values in (model.normalize.mean, model.normalize.std))
    normalized = graph.op("Div", graph.op("Sub", images, mean), std)
    missing = graph.op("Mod", graph.op("Neg", graph.size(images)), graph.integers([model.space.stride]))
    return graph.op("Pad", normalized, graph.op("Concat", graph.integers([0] * 6), missing, axis=0))


def stem(graph: Graph, model: RoutedNetwork, x: str) -> str:
    """Prepared images -> [B,C,H/4,W/4]; the features of a backbone's first stage, which no `project` has seen."""
    if model.backbone is not None:
        return model.backbone.onnx(graph, 0, x)
    return graph.sequence(cast(nn.Sequential, model.stem), "stem", x)


def crop(graph: Graph, x: str, images: str) -> str:
    """Rows and columns of [B,K,H',W'] that the images have."""
    return graph.op("Slice", x, graph.integers([0, 0]), graph.size(images), graph.integers([2, 3]))


def most_likely(graph: Graph, logits: str, classes: int, kind: int) -> tuple[str, str]:
    """Logits [B,K,H,W] -> the most likely class [B,H,W], as integers, and its probability: NaN if any of the K
    logits is."""
    labels = graph.op("Cast", graph.op("ArgMax", logits, axis=1, keepdims=0), to=kind)
    best = graph.op("ReduceMax", logits, graph.integers([1]), keepdims=1)
    relative = graph.op("Exp", graph.op("Sub", logits, best))
    total = graph.op("Conv", relative, graph.constant(np.ones((1, classes, 1, 1))))  # ReduceSum takes ten times as long
    return labels, graph.op("Squeeze", graph.op("Reciprocal", total), graph.integers([1]))


def project(graph: Graph, model: RoutedNetwork, stage: int, x: str) -> str:
    """What a stage of the backbone makes, in the channels of the grid."""
    assert model.backbone is not None
    return graph.sequence(cast(nn.Sequential, model.backbone.project[stage]), f"stem.project.{stage}", x)


def cell(graph: Graph, node: RoutingNode, name: str, x: str) -> str:
    """relu(H), H as in Eq. 1: every transform begins with this ReLU."""
    total: str | None = None
    for key, operation in node.cell.operations.items():
        out = operation.onnx(graph, f"{name}.cell.{key}", x)
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


def gate(graph: Graph, model: RoutedNetwork, layer: int, scale: int, x: str) -> str:
    """Eq. 2-4: the activations [1,3] of a node, 0 if it lacks the direction; x [1,C,h,w]."""
    node, name = model.node(layer, scale), f"nodes.{layer}-{scale}.gate"
    gate = node.gate
    assert gate is not None
    if gate.small:
        x = shrink(graph, model, scale, x)
    hidden = graph.op("GlobalAveragePool", graph.sequence(gate.squeeze, f"{name}.squeeze", x))
    hidden = graph.op("Flatten", hidden)
    weight = graph.tensor(f"{name}.score.weight", gate.score.weight.detach().numpy())
    bias = graph.tensor(f"{name}.score.bias", gate.score.bias.detach().numpy())
    alpha = gate.onnx(graph, graph.op("Gemm", hidden, weight, bias, transB=1))  # of scores [1,D]
    left = [graph.constant(np.zeros((1, node.directions[0])))] if node.directions[0] else []
    after = len(DIRECTIONS) - 1 - node.directions[-1]
    right = [graph.constant(np.zeros((1, after)))] if after else []
    return graph.op("Concat", *left, alpha, *right, axis=1)


def shrink(graph: Graph, model: RoutedNetwork, scale: int, x: str) -> str:
    """`shrink` of model/gate.py. Its special case, a side under 4 pixels, can only occur at the two coarsest scales."""
    factor = 1.0 / SMALL_GATE_FACTOR
    if 2 ** (model.space.num_scales - 1 - scale) >= SMALL_GATE_FACTOR:
        scales = graph.constant([1, 1, factor, factor])
    else:
        size = graph.op("Cast", graph.size(x), to=FLOAT)
        is_small = graph.op("Less", graph.op("ReduceMin", size), graph.constant(SMALL_GATE_FACTOR))
        quarter = graph.op("Floor", graph.op("Mul", size, graph.constant(factor)))
        fitting = graph.op("Div", graph.op("Max", quarter, graph.constant(1.0)), size)
        fitting = graph.op("Mul", fitting, graph.constant(ROUNDS_UP))
        chosen = graph.op("Where", is_small, fitting, graph.constant(factor))
        scales = graph.op("Concat", graph.constant([1, 1]), chosen, axis=0)
    return graph.op("Resize", x, "", scales, mode="linear", coordinate_transformation_mode="half_pixel")
