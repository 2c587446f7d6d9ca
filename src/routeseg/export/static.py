"""A static network as an ONNX graph: the route is known, so only its operators are there."""

from __future__ import annotations

import numpy as np

from routeseg.export import parts
from routeseg.export.graph import Graph
from routeseg.model.grid import RoutedNetwork
from routeseg.space import SCALE_STEP, UP, is_diagonal, walk


def static_outputs(graph: Graph, model: RoutedNetwork, images: str) -> tuple[str, str]:
    """Adds a network without gates, whose BatchNorm is folded: images [B,3,H,W] -> logits, gates."""
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
    return model.head.onnx(graph, maps), _gates(graph, model, images)


def _gates(graph: Graph, model: RoutedNetwork, images: str) -> str:
    """The route's 0 and 1 for each image [B,L+1,S,3]."""
    gates = model.route.to_gates()
    batch = graph.op("Shape", images, start=0, end=1)
    shape = graph.op("Concat", batch, graph.constant(gates.shape, np.int64), axis=0)
    return graph.op("Expand", graph.tensor("route", gates[None]), shape)
