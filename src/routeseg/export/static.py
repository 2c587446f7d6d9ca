"""A static network as an ONNX graph: the route is known, so only its operators are there."""

from __future__ import annotations

from collections.abc import Iterator

from routeseg.export import parts
from routeseg.export.graph import Graph
from routeseg.model.grid import RoutedNetwork
from routeseg.space import SCALE_STEP, UP, is_diagonal, walk


def static_outputs(graph: Graph, model: RoutedNetwork, images: str) -> tuple[str, str]:
    """Adds a network without gates, whose BatchNorm is folded: prepared images [B,3,H,W] -> logits, gates."""
    *_, maps = features(graph, model, images)
    gates = model.route.to_gates()
    shape = graph.op("Concat", graph.op("Shape", images, start=0, end=1), graph.integers(gates.shape), axis=0)
    return model.head.onnx(graph, maps), graph.op("Expand", graph.tensor("route", gates[None]), shape)


def features(graph: Graph, model: RoutedNetwork, images: str) -> Iterator[list[str | None]]:
    """Adds stem and layers; behind each layer what has arrived at each scale, None where nothing has."""
    first = pretrained = parts.stem(graph, model, images)
    if model.backbone is not None:
        first = parts.project(graph, model, 0, pretrained)
    maps: list[str | None] = [first] + [None] * (model.space.num_scales - 1)
    for layer, now in enumerate(walk(model.space, model.route.to_gates())):
        after: list[str | None] = [None] * model.space.num_scales
        for scale, features in enumerate(maps):
            if features is None:
                continue
            if now.passes[scale]:  # a dropped cell: the input is kept, for free (Eq. 5)
                sent = [(scale, features)]
            else:
                node, name = model.node(layer, scale), f"nodes.{layer}-{scale}"
                hidden = parts.cell(graph, node, name, features)
                sent = []
                for direction in node.directions:
                    out = parts.convolve(graph, node, name, direction, hidden)
                    sent.append((scale + SCALE_STEP[direction], graph.resize(out, 2) if direction == UP else out))
                    if model.backbone is not None and is_diagonal(layer, scale, direction):
                        pretrained = model.backbone.onnx(graph, scale + 1, pretrained)
                        sent.append((scale + 1, parts.project(graph, model, scale + 1, pretrained)))
            for target, out in sent:
                before = after[target]
                after[target] = out if before is None else graph.op("Add", before, out)
        maps = after
        yield maps
