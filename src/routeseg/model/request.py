"""What a forward is asked besides the images. No torch here.

Legend: B images, L depth, S scales; N is B, or 1 for what is the same for all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsFloat, TypedDict

import numpy as np

from routeseg.config import MAX_SIZE, NetworkConfig, is_size
from routeseg.errors import NO_EXITS, NO_PLACES
from routeseg.model.prices import Prices
from routeseg.space import FIRST_LOOK, Route, Size, brief, edge_name

Routes = Route | Sequence[Route] | None
Shares = float | Sequence[float] | np.ndarray | None  # of the full network's cost; or prices
Activation = Literal["one", "own"]


class Options(TypedDict, total=False):
    """What a forward may be asked, by name.

    activation  of the open edges of a given route: "one", or "own", the network's own gates (an edge that they close
                stays closed)
    budget      of a network with exits: the mean cost of the images, as a share of the full network's; a number, for
                which a network that knows several sizes chooses one, or one for each image. None: what helps
    price       of the same, in the budget's place: what its rule compares with (model/choice.py), a number or one for
                each image. In training places leave by it, and the logits of all exits come with where they left
    per_image   of a network whose places leave by themselves: each image keeps the budget, not the mean of them
    exits       of the same, in the budget's place: where each place leaves, integers [hb,wb] or [B,hb,wb], as results
                have them
    size        images are looked at with sides so many times as long (model/sizes.py); two: first so, and closer where
                that is unsure, which the price says (model/closer.py). None: as they are, unless a budget chooses
    """

    activation: Activation
    budget: Shares
    price: Shares
    per_image: bool
    exits: Any
    size: Size | None


@dataclass(frozen=True, eq=False)
class Request:
    """Which edges may be used, and who decides which of them are open.

    mask    bool [N,L+1,S,3]: the edges that may be used
    gated   gates decide which of them are open, and how far; otherwise all of them are, with activation 1
    price   of a network with exits: what its rule compares with, float64 [N]; None: what helps
    quota   [N,K-1] of each image, whose places do not compare with a price but with each other: the shares of them that
            go on behind each exit, those that need it most; None: the price decides
    told    where places leave, whatever they compare, int64 [N,hb,wb]
    size    images are looked at with sides so many times as long, or first so and then so
    exits   of given routes in a network with exits: the exits [N] at which they end; None: the network decides
    """

    mask: np.ndarray
    gated: bool
    exits: np.ndarray | None = None
    price: np.ndarray | None = None
    quota: np.ndarray | None = None
    size: Size = 1.0
    told: np.ndarray | None = None

    def told_to(self, images: int, sides: Sequence[int]) -> np.ndarray | None:
        """`told` of so many images of sides[0] x sides[1] places, a copy [B,hb,wb]; None if nothing was. Raises
        ValueError if it is of others."""
        if self.told is None:
            return None
        if self.told.shape[1:] != tuple(sides):
            raise ValueError(
                f"exits are of {self.told.shape[1]}x{self.told.shape[2]} places, images of this size have "
                f"{sides[0]}x{sides[1]}"
            )
        return np.array(np.broadcast_to(self.told, (images, *sides)), order="C")

    @classmethod
    def of(
        cls,
        config: NetworkConfig,
        images: int,
        route: Routes = None,
        prices: Prices | None = None,
        *,
        activation: Activation = "one",
        budget: Shares = None,
        price: Shares = None,
        per_image: bool = False,
        exits: Any = None,
        size: Size | None = None,
    ) -> Request:
        """The request for a forward of so many images: a route or one for each, and `Options`. `prices` are the tables
        of a network with exits.

        Raises ValueError for a route that the network does not have, for another number of routes or budgets than of
        images, for another activation, for a budget that is no share or that the network does not take, and for one of
        each image, or exits of places, if its places do not leave by themselves; and BudgetNotKept.
        """
        if activation not in ("one", "own"):
            raise ValueError(
                f"activation is {activation!r}: choose one (1 on open edges) or own (that of the network's gates)"
            )
        if budget is not None and price is not None:
            raise ValueError("give a budget or a price, not both")
        if isinstance(size, list):
            size = tuple(size)
        if size is not None and not is_size(size):
            raise ValueError(
                f"size is {brief(size)}: it is a factor of an image's sides, above 0 up to {MAX_SIZE:g}, or a smaller "
                "and a larger one"
            )
        if isinstance(size, tuple) and (route is not None or config.place is None or config.backbone is None):
            raise ValueError(
                "a closer look is for a network with places and a backbone, without a route: give one size"
            )
        shares = None if budget is None else _shares(config, images, route, budget)
        found = None if price is None else _prices(config, images, route, price)
        at = 1.0 if size is None else size if isinstance(size, tuple) else float(size)
        if exits is not None:
            if route is not None or budget is not None or price is not None or per_image:
                raise ValueError("exits say where places leave: give no route, budget or price with them")
            told = _told(config, images, exits, FIRST_LOOK if isinstance(at, tuple) else 0)
            return cls(config.mask, config.gated, price=np.ones(1), size=at, told=told)
        if route is None:
            if per_image and config.place is None:
                raise ValueError(f"a budget cannot be kept by each image: {NO_PLACES}")
            if shares is not None and prices is not None:
                if isinstance(budget, SupportsFloat) and np.ndim(budget) == 0:
                    at, one = prices.look_up(float(shares[0]), size=size)
                    found = np.array([one])
                else:  # images of several budgets have one size
                    found = np.array([prices.look_up(float(share), size=at).price for share in shares])
            quota = None
            if per_image and found is not None and prices is not None:
                quota = prices.at(at).going_on(found)
            return cls(config.mask, config.gated, price=found, quota=quota, size=at)
        routes = [route] if isinstance(route, Route) else list(route)
        if not isinstance(route, Route) and len(routes) != images:
            raise ValueError(f"{len(routes)} routes for {images} images: give one route, or one for each image")
        for one_route in routes:
            check_route(config.whole_route, one_route)
        mask = np.stack([one.to_gates() > 0 for one in routes])
        exits = None if config.exits is None else np.array([exit_of(config, one) for one in routes])
        return cls(mask, config.gated and activation == "own", exits=exits, size=at)


def _numbers(config: NetworkConfig, images: int, route: Routes, values: Shares, what: str, hint: str) -> np.ndarray:
    """Checked budgets or prices, float64 [N]."""
    if config.exits is None:
        raise ValueError(NO_EXITS)
    if route is not None:
        raise ValueError(f"give a route or a {what}, not both: a route has its cost")
    try:
        numbers = np.atleast_1d(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(f"a {what} of {brief(values)} is no number{hint}") from error
    if numbers.ndim != 1 or len(numbers) not in (1, images):
        raise ValueError(f"{numbers.size} {what}s for {images} images: give one {what}, or one for each image")
    return numbers


def _shares(config: NetworkConfig, images: int, route: Routes, budget: Shares) -> np.ndarray:
    """Checked budgets, float64 [N]."""
    shares = _numbers(config, images, route, budget, "budget", ": give a share such as 0.4")
    for share in shares:
        if not 0 < share <= 1:  # NaN is not
            raise ValueError(f"a budget of {share:g} is no share of the full network: give a number above 0, up to 1")
    return shares


def _prices(config: NetworkConfig, images: int, route: Routes, price: Shares) -> np.ndarray:
    """Checked prices, float64 [N]."""
    prices = _numbers(config, images, route, price, "price", "")
    if not np.isfinite(prices).all():
        raise ValueError(f"a price of {prices[~np.isfinite(prices)][0]} is none: give finite numbers")
    return prices


def _told(config: NetworkConfig, images: int, exits: Any, least: int) -> np.ndarray:
    """Checked exits of places, int64 [N,hb,wb]."""
    if config.place is None or config.exits is None:
        raise ValueError(f"exits cannot be told to places: {NO_PLACES}")
    told = np.asarray(exits.cpu() if hasattr(exits, "cpu") else exits)
    told = told[None] if told.ndim == 2 else told
    if not np.issubdtype(told.dtype, np.integer) or told.ndim != 3 or len(told) not in (1, images):
        raise ValueError(
            f"exits are {told.dtype} {list(told.shape)}: give integers [hb,wb] or [B,hb,wb], B = {images}, one a place"
        )
    last = len(config.exits) - 1
    if told.size and not least <= told.min() <= told.max() <= last:
        raise ValueError(f"exits go from {told.min()} to {told.max()}: they are numbers from {least} to {last}")
    return told.astype(np.int64)


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
