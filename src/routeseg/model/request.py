"""What a forward is asked besides the images. No torch here.

Legend: B images, L depth, S scales; N is B, or 1 for what is the same for all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from routeseg.config import NetworkConfig
from routeseg.errors import NO_EXITS
from routeseg.space import Route, brief, edge_name

Routes = Route | Sequence[Route] | None
Shares = float | Sequence[float] | np.ndarray | None  # of the full network's cost
Activation = Literal["one", "own"]


@dataclass(frozen=True, eq=False)
class Request:
    """Which edges may be used, and who decides which of them are open.

    mask    bool [N,L+1,S,3]: the edges that may be used
    gated   gates decide which of them are open, and how far; otherwise all of them are, with activation 1
    budget  the mean cost that is requested, as a share of the full network's, float32 [N]; None: what helps
    exits   of given routes in a network with exits: the exits [N] at which they end; None: the network decides
    """

    mask: np.ndarray
    gated: bool
    budget: np.ndarray | None = None
    exits: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        config: NetworkConfig,
        images: int,
        route: Routes = None,
        activation: Activation = "one",
        budget: Shares = None,
    ) -> Request:
        """The request for a forward of so many images; `route`, `activation` and `budget` as
        `DynamicRoutingNetwork.forward` takes them.

        Raises ValueError for a route that the network does not have, for another number of routes or budgets than of
        images, for another activation, and for a budget that is no share or that the network does not take.
        """
        if activation not in ("one", "own"):
            raise ValueError(
                f"activation is {activation!r}: choose one (1 on open edges) or own (that of the network's gates)"
            )
        shares = None if budget is None else _shares(config, images, route, budget)
        if route is None:
            return cls(config.mask, config.gated, shares)
        routes = [route] if isinstance(route, Route) else list(route)
        if not isinstance(route, Route) and len(routes) != images:
            raise ValueError(f"{len(routes)} routes for {images} images: give one route, or one for each image")
        for one in routes:
            check_route(config.whole_route, one)
        mask = np.stack([one.to_gates() > 0 for one in routes])
        exits = None if config.exits is None else np.array([exit_of(config, one) for one in routes])
        return cls(mask, config.gated and activation == "own", exits=exits)


def _shares(config: NetworkConfig, images: int, route: Routes, budget: Shares) -> np.ndarray:
    """Checked budgets, float32 [N]."""
    if config.exits is None:
        raise ValueError(NO_EXITS)
    if route is not None:
        raise ValueError("give a route or a budget, not both: a route has its cost")
    try:
        shares = np.atleast_1d(np.asarray(budget, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise ValueError(f"a budget of {brief(budget)} is no number: give a share such as 0.4") from error
    if shares.ndim != 1 or len(shares) not in (1, images):
        raise ValueError(f"{shares.size} budgets for {images} images: give one budget, or one for each image")
    for share in shares:
        if not 0 < share <= 1:  # NaN is not
            raise ValueError(f"a budget of {share:g} is no share of the full network: give a number above 0, up to 1")
    return shares


def exit_of(config: NetworkConfig, route: Route) -> int:
    """The exit at which a route of a network with exits ends: the first one behind all of its paths."""
    assert config.exits is not None
    return int(np.searchsorted(config.exits, max((layer for layer, _, _ in route), default=0)))


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
