"""The known networks beside their rows of the paper's Table 1: nodes, edges, parameters and cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from routeseg.architectures import ARCHITECTURES
from routeseg.cost import CostTable, model_cost
from routeseg.model import DynamicRoutingNetwork
from routeseg.space import Route, RoutingSpace

WHOLE_SPACE = "whole space"
PAPER_WHOLE_SPACE = {"paper_gmacs": 119.5, "paper_params_m": 17.8}  # Dynamic-Raw


def architecture_table(
    space: RoutingSpace,
    image_size: tuple[int, int] = (1024, 2048),
    names: Iterable[str] = tuple(ARCHITECTURES),
    num_classes: int = 19,
    base_channels: int = 64,
    convention: str = "authors",
) -> list[dict[str, Any]]:
    """A row for each architecture, and one for the whole space with all paths open.

    name, nodes, edges             `nodes` whose cell runs, open `edges`
    params_m, gmacs                millions of parameters, and cost at the image size (height, width), with the gates
                                   of the nodes that run, not of free skips: so the patterns fit Table 1
                                   (docs/architectures.md)
    static_params_m, static_gmacs  the same without gates: what a static network has and runs
    paper_params_m, paper_gmacs    Table 1, at 1024x2048

    Raises ValueError for an architecture that the space cannot hold.
    """
    with torch.device("meta"):
        full = DynamicRoutingNetwork(num_classes, space.depth, space.num_scales, base_channels)
    cost = model_cost(full, image_size, convention)
    rows = []
    for name in names:
        known = ARCHITECTURES[name]
        paper = {"paper_gmacs": known.paper_gmacs, "paper_params_m": known.paper_params_m}
        rows.append({"name": known.name} | _figures(full, cost, known(space)) | paper)
    return [*rows, {"name": WHOLE_SPACE} | _figures(full, cost, Route.all_open(space)) | PAPER_WHOLE_SPACE]


def _figures(full: DynamicRoutingNetwork, cost: CostTable, route: Route) -> dict[str, Any]:
    static_params = _parameters(full.specialize(route))
    gates = [full.node(*node).gate for node in route.nodes]
    static_macs = cost.of_route(route)
    return {
        "nodes": len(route.nodes),
        "edges": len(route),
        "params_m": (static_params + sum(_parameters(gate) for gate in gates if gate is not None)) / 1e6,
        "gmacs": (static_macs + sum(float(cost.gate[node]) for node in route.nodes)) / 1e9,
        "static_params_m": static_params / 1e6,
        "static_gmacs": static_macs / 1e9,
    }


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
