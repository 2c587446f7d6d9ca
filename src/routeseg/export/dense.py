"""A network with its gates as an ONNX graph for one image: closed paths are computed as well, and multiplied by 0.

Legend: S scales, C channels of a scale, h, w the size of its map.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from routeseg.export import parts
from routeseg.export.graph import Graph
from routeseg.model.grid import RoutedNetwork
from routeseg.space import DIRECTIONS, SCALE_STEP, UP, step

FLAG = [1, 1, 1, 1]  # the shape of what a map is multiplied by


@dataclass(frozen=True)
class _Flag:
    """A bool [1] of a graph, with the operators that `step` needs."""

    graph: Graph
    value: str

    def __and__(self, other: _Flag) -> _Flag:
        return _Flag(self.graph, self.graph.op("And", self.value, other.value))

    def __or__(self, other: _Flag) -> _Flag:
        return _Flag(self.graph, self.graph.op("Or", self.value, other.value))

    def __invert__(self) -> _Flag:
        return _Flag(self.graph, self.graph.op("Not", self.value))

    def as_factor(self) -> str:
        """0 or 1, as what a map is multiplied by."""
        return self.graph.op("Reshape", self.graph.as_float(self.value), self.graph.integers(FLAG))


def dense_outputs(graph: Graph, model: RoutedNetwork, images: str) -> tuple[str, str]:
    """Adds a network with gates, whose BatchNorm is folded: prepared images [1,3,H,W] -> logits, gates."""
    space = model.space
    maps = [parts.stem(graph, model, images)]
    arrived = (_Flag(graph, graph.constant([True], bool)),)
    layer_gates = []
    for layer in range(space.depth + 1):
        alphas, is_open = [], []
        for scale, features in enumerate(maps):
            alpha = graph.op(
                "Mul", parts.gate(graph, model, layer, scale, features), graph.as_float(arrived[scale].value)
            )
            alphas.append(alpha)
            opens = _columns(graph, graph.op("Greater", alpha, graph.constant(0.0)), [1])
            is_open.append([_Flag(graph, value) for value in opens])
        now = step(space, layer, arrived, is_open, model.config.zeros_arrive)
        arrivals: list[list[str]] = [[] for _ in now.reached]
        for scale, features in enumerate(maps):
            node, name = model.node(layer, scale), f"nodes.{layer}-{scale}"
            hidden, shares = parts.cell(graph, node, name, features), _columns(graph, alphas[scale], FLAG)
            for direction in node.directions:
                out = graph.op("Mul", parts.convolve(graph, node, name, direction, hidden), shares[direction])
                arrivals[scale + SCALE_STEP[direction]].append(graph.resize(out, 2) if direction == UP else out)
            kept = graph.op("Mul", features, now.passes[scale].as_factor())  # a dropped cell keeps its input (Eq. 5)
            arrivals[scale].append(kept)
        rows = alphas + [graph.constant(np.zeros((1, len(DIRECTIONS))))] * (space.num_scales - len(alphas))
        layer_gates.append(graph.op("Concat", *rows, axis=0))  # [S,3]
        maps, arrived = [_sum(graph, some) for some in arrivals], now.reached
    stacked = [graph.op("Unsqueeze", rows, graph.integers([0, 1])) for rows in layer_gates]
    return model.head.onnx(graph, maps), graph.op("Concat", *stacked, axis=1)


def _columns(graph: Graph, values: str, shape: list[int]) -> list[str]:
    """The three columns of [1,3], each of this shape."""
    column = graph.op("Reshape", values, graph.constant([len(DIRECTIONS), *shape[1:]], np.int64))
    return graph.several("Split", [column], len(DIRECTIONS), axis=0, num_outputs=len(DIRECTIONS))


def _sum(graph: Graph, arrivals: list[str]) -> str:
    total = arrivals[0]
    for out in arrivals[1:]:
        total = graph.op("Add", total, out)
    return total
