"""The known networks beside their rows of the paper's Table 1: nodes, edges, parameters and cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from routeseg.architectures import ARCHITECTURES
from routeseg.cost.macs import model_cost
from routeseg.model import DynamicRoutingNetwork
from routeseg.space import DIRECTIONS, Route, RoutingSpace

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
                                   (docs/results.md)
    static_params_m, static_gmacs  the same without gates: what a static network has and runs
    paper_params_m, paper_gmacs    Table 1, at 1024x2048

    Raises ValueError for an architecture that the space cannot hold.
    """
    count = RouteCounter(space, image_size, num_classes, base_channels, convention)

    def row(name: str, route: Route) -> dict[str, Any]:
        (gmacs, params), (static_gmacs, static_params) = (count(route, gates) for gates in (True, False))
        figures = {"params_m": params, "gmacs": gmacs, "static_params_m": static_params, "static_gmacs": static_gmacs}
        return {"name": name, "nodes": len(route.nodes), "edges": len(route)} | figures

    rows = []
    for known in (ARCHITECTURES[name] for name in names):
        paper = {"paper_gmacs": known.paper_gmacs, "paper_params_m": known.paper_params_m}
        rows.append(row(known.name, known(space)) | paper)
    return [*rows, row(WHOLE_SPACE, Route.all_open(space)) | PAPER_WHOLE_SPACE]


class RouteCounter:
    """Cost and parameters of routes in a space, by adding up the parts of the whole network, which is built once."""

    def __init__(
        self,
        space: RoutingSpace,
        image_size: tuple[int, int],
        num_classes: int = 19,
        base_channels: int = 64,
        convention: str = "authors",
    ) -> None:
        with torch.device("meta"):
            model = DynamicRoutingNetwork(
                num_classes=num_classes, depth=space.depth, num_scales=space.num_scales, base_channels=base_channels
            )
        params = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_modules()}
        self.cost = model_cost(model, image_size, convention)
        self.fixed = params["stem"] + params["decoder"]
        self.cell = {(layer, s): params[f"nodes.{layer}-{s}.cell"] for layer, s in space.nodes}
        self.gate = {(layer, s): params[f"nodes.{layer}-{s}.gate"] for layer, s in space.nodes}
        self.edge = {
            (layer, s, d): params[f"nodes.{layer}-{s}.transforms.{DIRECTIONS[d]}"] for layer, s, d in space.edges
        }

    def __call__(self, route: Route, gates: bool) -> tuple[float, float]:
        """GMACs and millions of parameters of a route, with the gates of the nodes that run or without."""
        macs = self.cost.of_route(route)
        params = self.fixed + sum(self.edge[edge] for edge in route)
        for node in route.nodes:
            macs += gates * float(self.cost.gate[node])
            params += self.cell[node] + gates * self.gate[node]
        return macs / 1e9, params / 1e6
