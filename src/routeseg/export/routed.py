"""A network with its gates as an ONNX graph for one image: closed paths are branches of `If` that are not taken.

A layer is one `If`. If all of its paths are open, one branch computes it as a whole (`_layer_together`): maps are laid
out anew at the border of a branch, and so only once for each layer. Otherwise its parts are separate branches
(`_layer_apart`): what arrives at a node is summed and its gate asked (`_arrive`), its cell runs (`_run`), and each path
up or down is computed (`_send`). docs/export.md has what this costs.

Legend: L depth, S scales, n nodes of a layer, n' of the next one, C channels of a scale, h, w the size of its map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from routeseg.errors import NotExportable
from routeseg.export import parts
from routeseg.export.arrivals import Sent, nothing, select, select_or_nothing
from routeseg.export.graph import BOOL, FLOAT, Graph
from routeseg.model.decoder import Decoder, Vector
from routeseg.model.grid import RoutedNetwork
from routeseg.space import KEEP, SCALE_STEP, UP


@dataclass(frozen=True)
class LayerState:
    """The nodes of a layer: maps [1,C,h,w] or empty, and [n,1] floats, 0 or 1: has the node a map, is it reached."""

    maps: list[str]
    has_map: str
    reached: str


def routed_outputs(graph: Graph, model: RoutedNetwork, images: str) -> tuple[str, str]:
    """Adds a network with gates, whose BatchNorm is folded: images [1,3,H,W] -> logits, gates."""
    space = model.space
    stem = parts.stem(graph, model, images)
    one = graph.constant([[1.0]])
    alpha = parts.gate(graph, model, 0, 0, stem)
    zeros = _Zeros(graph, model, stem)
    state = LayerState([stem], one, one)
    layer_gates = []
    for layer in range(space.depth + 1):
        layer_gates.append(_all_scales(graph, model, layer, alpha))
        flags = _flags(graph, model, layer, state, alpha)
        *maps, alpha = _layer(graph, model, layer, state.maps, flags, zeros)
        has_map = flags.has_map
        if layer < space.depth and model.config.zeros_arrive:
            runs = np.array([[float(zeros.gate(layer + 1, s).any())] for s in space.scales(layer + 1)])
            if runs.any():  # zeros become a map if the node runs on them
                has_map = graph.op("Max", has_map, graph.op("Mul", flags.reached, graph.constant(runs)))
        state = LayerState(maps, has_map, flags.reached)
    logits = alpha  # what comes behind the last layer
    gates = graph.op("Unsqueeze", graph.op("Concat", *layer_gates, axis=0), graph.constant([0], np.int64))
    return logits, gates


def _layer(graph: Graph, model: RoutedNetwork, layer: int, maps: list[str], flags: Flags, zeros: _Zeros) -> list[str]:
    """The next layer's maps [1,C,h,w] and its activations [n',3]; behind the last layer the logits."""
    last = layer == model.space.depth
    return graph.choose(
        flags.all_open,
        lambda g: _layer_together(g, model, layer, maps, flags),
        lambda g: _layer_apart(g, model, layer, maps, flags, zeros),
        [FLOAT] if last else [FLOAT] * (len(model.space.scales(layer + 1)) + 1),
    )


def _layer_together(graph: Graph, model: RoutedNetwork, layer: int, maps: list[str], flags: Flags) -> list[str]:
    """A layer whose every path is open, in one branch."""
    space = model.space
    arrivals: dict[int, str] = {}
    for k, scale in enumerate(space.scales(layer)):
        node, name = model.node(layer, scale), f"nodes.{layer}-{scale}"
        hidden = parts.cell(graph, node, name, maps[k])
        for direction in node.directions:
            out, target = parts.convolve(graph, node, name, direction, hidden), scale + SCALE_STEP[direction]
            out = graph.resize(out, 2) if direction == UP else out
            out = graph.op("Mul", out, flags.share[k][direction])  # behind the resizing, which then keeps its layout
            arrivals[target] = graph.op("Add", arrivals[target], out) if target in arrivals else out
    if layer == space.depth:
        return [model.head.onnx(graph, [arrivals[s] for s in range(space.num_scales)])]
    scales = space.scales(layer + 1)
    answers = [parts.gate(graph, model, layer + 1, s, arrivals[s]) for s in scales]
    return [*(arrivals[s] for s in scales), graph.op("Concat", *answers, axis=0)]


def _layer_apart(
    graph: Graph, model: RoutedNetwork, layer: int, maps: list[str], flags: Flags, zeros: _Zeros
) -> list[str]:
    """A layer some of whose paths are closed: each part is a branch of its own."""
    space = model.space
    sent = _leave(graph, model, layer, maps, flags)
    if layer == space.depth:
        finals = [select_or_nothing(graph, sent[s], flags.arrives[s]) for s in range(space.num_scales)]
        return [_decode(graph, model, finals, flags.arrives)]
    features, answers = [], []
    for scale in space.scales(layer + 1):
        x, answer = _arrive(
            graph, model, layer + 1, scale, sent[scale], flags.arrives[scale], flags.reaches[scale], zeros
        )
        features.append(x)
        answers.append(answer)
    return [*features, graph.op("Concat", *answers, axis=0)]


class _Zeros:
    """What is known of maps of zeros, before any image is seen."""

    def __init__(self, graph: Graph, model: RoutedNetwork, stem: str) -> None:
        self.model, self.stem = model, stem
        self.shapes: dict[int, str] = {}
        self.graph = graph

    def gate(self, layer: int, scale: int) -> np.ndarray:
        """The activations [3] of a node at which nothing but zeros arrives."""
        zeros = torch.zeros(1, self.model.config.channels(scale), 8, 8)
        return self.model.node(layer, scale).activations(zeros)[0].detach().numpy()

    def shape(self, scale: int) -> str:
        """[1,C,h,w] of a scale, as an int64 value of the outermost graph."""
        if scale not in self.shapes:
            g = self.graph
            size = g.op("Shape", self.stem, start=2, end=4)
            size = g.op("Div", size, g.constant([2**scale, 2**scale], np.int64))
            self.shapes[scale] = g.op(
                "Concat", g.constant([1, self.model.config.channels(scale)], np.int64), size, axis=0
            )
        return self.shapes[scale]


@dataclass(frozen=True)
class Flags:
    """What a layer's activations decide.

    all_open         bool [1]: is every path of the layer
    opens, share     for each node and direction: is the path open (bool [1]), its activation [1,1,1,1]
    runs, drops      for each node, bool [1]; a node drops its cell if it has a map and does not run
    arrives, reaches for each scale of the next layer, bool [1]: does a map arrive, or perhaps zeros alone
    has_map, reached the same as 0 or 1 [n',1]
    """

    all_open: str
    opens: list[list[str]]
    share: list[list[str]]
    runs: list[str]
    drops: list[str]
    arrives: list[str]
    reaches: list[str]
    has_map: str
    reached: str


def _flags(graph: Graph, model: RoutedNetwork, layer: int, state: LayerState, alpha: str) -> Flags:
    """Eq. 5 in zeros and ones, given the activations [n,3] of a layer."""
    space = model.space
    scales = space.scales(layer)
    after = space.scales(layer + 1) or scales
    n = len(scales)
    is_open = graph.op("Cast", graph.op("Greater", alpha, graph.constant(0.0)), to=FLOAT)  # [n,3]
    runs = graph.op("ReduceMax", is_open, graph.constant([1], np.int64), keepdims=1)  # [n,1]
    idle = graph.op("Sub", graph.constant(1.0), runs)
    drops = graph.op("Mul", state.has_map, idle)
    flag = _split(graph, graph.op("Cast", graph.op("Concat", is_open, runs, drops, axis=1), to=BOOL), 5 * n, [1])
    share = _split(graph, alpha, 3 * n, [1, 1, 1, 1])
    arrival = np.zeros((n, 4, len(after)))  # which scale gets a map: of an open path, of a dropped cell
    reach = np.zeros((n, 2, len(after)))  # which is reached if zeros arrive: from a node that runs, from a dropped cell
    for k, scale in enumerate(scales):
        for direction in space.directions(layer, scale):
            arrival[k, direction, scale + SCALE_STEP[direction]] = 1
            reach[k, 0, scale + SCALE_STEP[direction]] = 1
        arrival[k, 3, scale] = reach[k, 1, scale] = 1
    has_map = reached = _spread(graph, [is_open, drops], arrival)
    if model.config.zeros_arrive:
        reached = _spread(graph, [runs, graph.op("Mul", state.reached, idle)], reach)
    lacking = 1.0 - space.legal[layer, : len(scales)]
    all_open = graph.op("ReduceMin", graph.op("Max", is_open, graph.constant(lacking)), keepdims=0)
    return Flags(
        graph.op("Cast", all_open, to=BOOL),
        [flag[5 * k : 5 * k + 3] for k in range(n)],
        [share[3 * k : 3 * k + 3] for k in range(n)],
        flag[3::5],
        flag[4::5],
        _split(graph, graph.op("Cast", has_map, to=BOOL), len(after), [1]),
        _split(graph, graph.op("Cast", reached, to=BOOL), len(after), [1]),
        has_map,
        reached,
    )


def _leave(graph: Graph, model: RoutedNetwork, layer: int, maps: list[str], flags: Flags) -> list[list[list[Sent]]]:
    """For each scale of the next layer, what may arrive there, in groups: at most one of each group does."""
    space = model.space
    sent: list[list[list[Sent]]] = [[[], [], []] for _ in range(space.num_scales)]  # of up, keep, down
    for k, scale in enumerate(space.scales(layer)):
        hidden = _run(graph, model, layer, scale, maps[k], flags.runs[k])
        for direction in space.directions(layer, scale):
            opens, share = flags.opens[k][direction], flags.share[k][direction]
            group = sent[scale + SCALE_STEP[direction]][direction]
            if direction == KEEP:
                group.append(Sent(hidden, opens, share))
            else:
                out = _send(graph, model, layer, scale, direction, hidden, opens, share)
                group.append(Sent(out, opens, coarser=direction == UP))
        sent[scale][KEEP].append(Sent(maps[k], flags.drops[k]))
    return [[group for group in groups if group] for groups in sent]


def _spread(graph: Graph, causes: Sequence[str], matrix: np.ndarray) -> str:
    """Which of n' nodes [n',1] get something, given causes [n,m]: `matrix` [n,m,n'] says to whom each leads."""
    n, m, after = matrix.shape
    row = graph.op("Reshape", graph.op("Concat", *causes, axis=1), graph.constant([1, n * m], np.int64))
    count = graph.op("MatMul", row, graph.constant(matrix.reshape(n * m, after)))
    some = graph.op("Min", count, graph.constant(1.0))
    return graph.op("Reshape", some, graph.constant([after, 1], np.int64))


def _split(graph: Graph, values: str, count: int, shape: Sequence[int]) -> list[str]:
    """The single values, each of this shape."""
    flat = graph.op("Reshape", values, graph.constant([count, *shape[1:]], np.int64))
    return graph.several("Split", [flat], count, axis=0, num_outputs=count) if count > 1 else [flat]


def _run(graph: Graph, model: RoutedNetwork, layer: int, scale: int, features: str, runs: str) -> str:
    """relu(H) of a node, if it runs."""
    node, name = model.node(layer, scale), f"nodes.{layer}-{scale}"
    return graph.choose(runs, lambda g: [parts.cell(g, node, name, features)], nothing)[0]


def _send(
    graph: Graph,
    model: RoutedNetwork,
    layer: int,
    scale: int,
    direction: int,
    hidden: str,
    opens: str,
    share: str,
) -> str:
    """alpha_j T_j(H) of a path up or down, if it is open; up is not yet enlarged."""
    node, name = model.node(layer, scale), f"nodes.{layer}-{scale}"

    def build(g: Graph) -> list[str]:
        return [g.op("Mul", parts.convolve(g, node, name, direction, hidden), share)]

    return graph.choose(opens, build, nothing)[0]


def _arrive(
    graph: Graph,
    model: RoutedNetwork,
    layer: int,
    scale: int,
    groups: list[list[Sent]],
    arrives: str,
    reached: str,
    zeros: _Zeros,
) -> tuple[str, str]:
    """The map of a node and its activations [1,3]: the sum of what arrives, and what its gate says to it."""

    def something(g: Graph) -> list[str]:
        features = select(g, groups)
        return [features, parts.gate(g, model, layer, scale, features)]

    def zeros_or_nothing(g: Graph) -> list[str]:
        known = zeros.gate(layer, scale) * model.config.zeros_arrive
        if not known.any():
            return [*nothing(g), g.constant(np.zeros((1, 3)))]
        blank = g.choose(reached, lambda b: [b.op("ConstantOfShape", zeros.shape(scale))], nothing)[0]
        return [blank, g.op("Mul", g.constant(known[None]), g.op("Cast", reached, to=FLOAT))]

    features, alpha = graph.choose(arrives, something, zeros_or_nothing, (FLOAT, FLOAT))
    return features, alpha


def _all_scales(graph: Graph, model: RoutedNetwork, layer: int, alpha: str) -> str:
    """Activations [n,3] of a layer as [1,S,3], with zeros for scales that it has not."""
    n, total = len(model.space.scales(layer)), model.space.num_scales
    if n < total:
        alpha = graph.op("Concat", alpha, graph.constant(np.zeros((total - n, 3))), axis=0)
    return graph.op("Unsqueeze", alpha, graph.constant([0], np.int64))


def _decode(graph: Graph, model: RoutedNetwork, maps: list[str], arrived: list[str]) -> str:
    """The decoder, in one branch if every scale has a map; otherwise a step after the other."""
    head = model.head
    if not isinstance(head, Decoder):
        raise NotExportable(f"the head {type(head).__name__} has no routed export: export one route for all images")

    def steps(g: Graph, scale: int, running: str | Vector | None) -> list[str]:
        if scale < 0:
            assert isinstance(running, str)
            return [head.onnx_predict(g, running)]

        def step(b: Graph, x: str | None) -> list[str]:
            return steps(b, scale - 1, head.onnx_merge(b, scale, x, running))

        if scale == 0 and not isinstance(running, str):
            return step(g, maps[0])
        return g.choose(arrived[scale], lambda b: step(b, maps[scale]), lambda b: step(b, None))

    everything = reduce(lambda one, other: graph.op("And", one, other), arrived)
    whole = graph.choose(everything, lambda g: [head.onnx(g, maps)], lambda g: steps(g, len(maps) - 1, None))
    return whole[0]
