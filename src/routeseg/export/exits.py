"""A network with exits as an ONNX graph for one image, which leaves where a price lets it."""

from __future__ import annotations

from typing import cast

from routeseg.export.graph import Graph
from routeseg.export.static import features
from routeseg.model.grid import RoutedNetwork
from routeseg.model.head import Head


def exits_outputs(graph: Graph, model: RoutedNetwork, images: str, price: str) -> tuple[str, str]:
    """Adds a network with exits, whose BatchNorm is folded: prepared images [1,3,H,W] and a price -> logits, gates."""
    exits, routes = model.exits, model.config.exit_routes
    assert exits is not None
    behind = list(features(graph, model, images))
    logits = model.head.onnx(graph, behind[-1])
    gates = graph.constant(routes[-1].to_gates()[None])
    for exit in reversed(range(len(exits.decoders))):
        maps, head = behind[exits.layers[exit]], cast(Head, exits.decoders[exit])
        with graph.within(f"exits.decoders.{exit}."):
            here = head.onnx(graph, maps)
        with graph.within(f"exits.gates.{exit}."):  # weights of its own, which int8 leaves as they are
            leaves = exits.gates.onnx(graph, exit, head, maps, price, exits.costs.numpy())
        logits = graph.choose(leaves, here, logits)
        gates = graph.choose(leaves, graph.constant(routes[exit].to_gates()[None]), gates)
    return logits, gates
