"""What a forward is asked besides the images. No torch here.

Legend: B images, L depth, S scales; N is B, or 1 for what is the same for all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from routeseg.config import NetworkConfig
from routeseg.space import Route, edge_name

Routes = Route | Sequence[Route] | None
Activation = Literal["one", "own"]


@dataclass(frozen=True, eq=False)
class Request:
    """Which edges may be used, and who decides which of them are open.

    mask    bool [N,L+1,S,3]: the edges that may be used
    gated   gates decide which of them are open, and how far; otherwise all of them are, with activation 1
    budget  the cost that is requested, float32 [N], for gates that take a request; None: they spend what helps
    """

    mask: np.ndarray
    gated: bool
    budget: np.ndarray | None = None

    @classmethod
    def of(cls, config: NetworkConfig, images: int, route: Routes = None, activation: Activation = "one") -> Request:
        """The request for a forward of so many images; `route` and `activation` as `DynamicRoutingNetwork.forward`
        takes them.

        Raises ValueError for a route that the network does not have, for another number of routes than of images, and
        for another activation.
        """
        if activation not in ("one", "own"):
            raise ValueError(
                f"activation is {activation!r}: choose one (1 on open edges) or own (that of the network's gates)"
            )
        if route is None:
            return cls(config.mask, config.gated)
        routes = [route] if isinstance(route, Route) else list(route)
        if not isinstance(route, Route) and len(routes) != images:
            raise ValueError(f"{len(routes)} routes for {images} images: give one route, or one for each image")
        for one in routes:
            check_route(config.whole_route, one)
        mask = np.stack([one.to_gates() > 0 for one in routes])
        return cls(mask, config.gated and activation == "own")

    def of_image(self, number: int) -> Request:
        """The request for one of the images."""

        def row(values: np.ndarray) -> np.ndarray:
            return values if len(values) == 1 else values[number : number + 1]

        return Request(row(self.mask), self.gated, None if self.budget is None else row(self.budget))


def check_route(whole: Route, route: Route) -> None:
    """Raises ValueError if the route belongs to another space than the network, or has edges that it lacks; `whole`
    has those of the network."""
    if route.space != whole.space:
        raise ValueError(f"the route is drawn in {route.space}, the network has {whole.space}")
    lacking = sorted(route.edges - whole.edges)
    if lacking:
        raise ValueError(
            f"the network has no {edge_name(lacking[0])} (and lacks {len(lacking) - 1} more of the route): it is a "
            "static network, made for another route"
        )
