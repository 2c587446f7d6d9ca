"""A network with its gates as an ONNX graph without `If`: closed paths are computed as well, and multiplied by 0.

It is the dense forward of `routeseg.model`, for one image. A quantiser wants it so (int8.py): it sees every
operator on every image, and enters no branches.

Legend: S scales, C channels of a scale, h, w the size of its map.
"""

from __future__ import annotations

import numpy as np

from routeseg.export import parts
from routeseg.export.graph import Graph
from routeseg.model import DynamicRoutingNetwork
from routeseg.space import DIRECTIONS, SCALE_STEP, UP

FLAG = [1, 1, 1, 1]  # the shape of what a map is multiplied by


def dense_outputs(graph: Graph, model: DynamicRoutingNetwork, images: str) -> tuple[str, str]:
    """Adds a network with gates, whose BatchNorm is folded: images [1,3,H,W] -> logits, gates."""
    space = model.space
    maps, reached = [parts.stem(graph, model, images)], [graph.constant([[1.0]])]
    layer_gates = []
    for layer in range(space.depth + 1):
        after = len(space.scales(min(layer + 1, space.depth)))
        arrivals: list[list[str]] = [[] for _ in range(after)]
        arrives: list[list[str]] = [[] for _ in range(after)]
        rows = []
        for scale, features in enumerate(maps):
            alpha = graph.op("Mul", parts.gate(graph, model, layer, scale, features), reached[scale])
            rows.append(alpha)
            is_open = graph.op("Cast", graph.op("Greater", alpha, graph.constant(0.0)), to=parts.FLOAT)  # [1,3]
            runs = graph.op("ReduceMax", is_open, graph.constant([1], np.int64), keepdims=1)  # [1,1]
            node, name = model.node(layer, scale), f"nodes.{layer}-{scale}"
            hidden = parts.cell(graph, node, name, features)
            shares, opens = _columns(graph, alpha, FLAG), _columns(graph, is_open, [1, 1])
            for direction in node.directions:
                target = scale + SCALE_STEP[direction]
                out = graph.op("Mul", parts.convolve(graph, node, name, direction, hidden), shares[direction])
                arrivals[target].append(graph.resize(out, 2) if direction == UP else out)
                arrives[target].append(runs if space.zeros_arrive else opens[direction])
            drops = graph.op("Sub", reached[scale], runs)  # a dropped cell keeps its input, for free (Eq. 5)
            kept = graph.op("Mul", features, graph.op("Reshape", drops, graph.constant(FLAG, np.int64)))
            arrivals[scale].append(kept)
            arrives[scale].append(drops)
        rows += [graph.constant(np.zeros((1, len(DIRECTIONS))))] * (space.num_scales - len(rows))
        layer_gates.append(graph.op("Concat", *rows, axis=0))  # [S,3]
        maps = [_sum(graph, some) for some in arrivals]
        reached = [graph.op("Max", *some) if len(some) > 1 else some[0] for some in arrives]
    running: str | parts.Vector | None = None
    for scale in reversed(range(space.num_scales)):
        running = parts.merge(graph, model, scale, maps[scale], running)
    assert isinstance(running, str)
    stacked = [graph.op("Unsqueeze", rows, graph.constant([0, 1], np.int64)) for rows in layer_gates]
    return parts.predict(graph, model, running), graph.op("Concat", *stacked, axis=1)


def _columns(graph: Graph, values: str, shape: list[int]) -> list[str]:
    """The three columns of [1,3], each of this shape."""
    column = graph.op("Reshape", values, graph.constant([len(DIRECTIONS), *shape[1:]], np.int64))
    return graph.several("Split", [column], len(DIRECTIONS), axis=0, num_outputs=len(DIRECTIONS))


def _sum(graph: Graph, arrivals: list[str]) -> str:
    total = arrivals[0]
    for out in arrivals[1:]:
        total = graph.op("Add", total, out)
    return total
