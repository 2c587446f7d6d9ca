"""What prices cost, and what they bring: a network with exits compares with a price, and a budget is looked up here. No
torch here.

An image can be looked at in several sizes, and each has a table of prices. Of all pairs of a size and a price that cost
what was asked, a budget takes the one with the highest score. A size may be two, of a first look and of a closer one
(model/closer.py): its table has two routes, the first look alone and both.

Legend: K exits, T prices of a table, Z sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from routeseg.errors import NOT_CALIBRATED, BudgetNotKept
from routeseg.space import Size, size_words

TOLERANCE = 1e-3  # by which a budget may be below the cheapest route: what is shown of that is rounded


class Look(NamedTuple):
    """How images are looked at: the factor of their sides, and the price that the exits compare with."""

    size: Size
    price: float


@dataclass(frozen=True, eq=False)
class PriceTable:
    """The table of a network with exits at one size (budgets/calibration.py), float64.

    costs        [K] of leaving at each exit, as a share of the full network's, where the table was made
    prices       [T], ascending
    frequencies  [T,K]: the share of images, or of their places, that leave at each exit at this price. All zeros before
                 a calibration
    scores       [T]: the mIoU at this price, NaN where it is not known
    """

    costs: np.ndarray
    prices: np.ndarray
    frequencies: np.ndarray
    scores: np.ndarray

    @property
    def calibrated(self) -> bool:
        """Whether it tells the price of a budget."""
        return bool(self.frequencies.any())

    def price_of(
        self, budget: np.ndarray, costs: np.ndarray | None = None, unit: str = "", means: np.ndarray | None = None
    ) -> np.ndarray:
        """The prices at which images cost these means: float64, of the shape of the budgets. What is above the dearest
        route costs as much as that.

        costs  [K] of the routes, in the unit of the budgets, which messages name; None: shares of the full network
        means  [T], what images cost in the mean at each price; None: each place or image costs what its route does

        Raises BudgetNotKept for a budget below the cheapest route, and ValueError without a calibration.
        """
        if not self.calibrated:
            raise ValueError(NOT_CALIBRATED)
        whole = 1.0 if costs is None else costs[-1]
        costs = self.costs if costs is None else costs
        for asked in np.ravel(budget):
            if not asked >= costs[0] * (1 - TOLERANCE):
                raise BudgetNotKept(
                    f"a budget of {asked:.4g}{unit} cannot be kept: the cheapest route costs {costs[0]:.4g}{unit}, the "
                    f"full network {costs[-1]:.4g}{unit}"
                )
        means = self.frequencies @ costs if means is None else means
        means = np.maximum.accumulate(means[::-1])  # a list of nearly all places takes longer than all of them
        found = np.interp(budget, means, self.prices[::-1])
        found = np.where(np.asarray(budget) >= whole, self.prices[0], found)  # nobody decides then
        return np.where(np.asarray(budget) <= costs[0] * (1 + TOLERANCE), self.prices[-1], found)

    def going_on(self, price: np.ndarray) -> np.ndarray:
        """The shares [N,K-1] of images or places that go on behind each exit but the last at these prices [N], in the
        mean. Raises ValueError without a calibration."""
        if not self.calibrated:
            raise ValueError(NOT_CALIBRATED)
        at_price = np.stack([np.interp(price, self.prices, column) for column in self.frequencies.T], axis=1)
        shares: np.ndarray = 1 - at_price.cumsum(1)[:, :-1]
        return shares

    def cost_at(self, price: float, costs: np.ndarray | None = None) -> float:
        """What images cost at a price in the mean, in the unit of `costs` [K]; None: shares of the full network."""
        return float(np.interp(price, self.prices, self.frequencies @ (self.costs if costs is None else costs)))

    def score_at(self, price: float) -> float:
        """The mIoU at a price; NaN if it is not known."""
        return float(np.interp(price, self.prices, self.scores))


@dataclass(frozen=True, eq=False)
class Prices:
    """The tables [Z] of a network with exits for images of these sizes, factors of their sides, ascending; 1 is among
    them. All costs are shares of what the full network costs at size 1."""

    sizes: Sequence[Size]
    tables: Sequence[PriceTable]

    @property
    def singles(self) -> Prices:
        """Without closer looks."""
        known = [(size, table) for size, table in zip(self.sizes, self.tables, strict=True) if isinstance(size, float)]
        return Prices(*map(list, zip(*known, strict=True)))

    @property
    def least(self) -> float:
        """The cheapest budget that is kept in any of the sizes, a share; 1 without a calibration."""
        return min((float(table.costs[0]) for table in self.tables if table.calibrated), default=1.0)

    def at(self, size: Size = 1.0) -> PriceTable:
        """The table of a size. Raises ValueError if there is none."""
        if size not in self.sizes:
            known = ", ".join(map(size_words, self.sizes))
            raise ValueError(f"budgets are known for images at {known} times their sides, not at {size_words(size)}")
        return self.tables[list(self.sizes).index(size)]

    def look_up(
        self,
        budget: float,
        costs: Sequence[np.ndarray] | None = None,
        unit: str = "",
        size: Size | None = None,
        means: Sequence[np.ndarray | None] | None = None,
    ) -> Look:
        """The size and the price at which images cost this in the mean and score best; all of the full network at size
        1 if that is what was asked.

        costs  [Z][K] of the routes at each size, in the unit of the budget, which messages name; None: shares of the
               full network
        size   only this one
        means  [Z][T] of the images at each price; None: each place or image costs what its route does

        Raises BudgetNotKept for a budget below the cheapest route, and ValueError without a calibration.
        """
        self.at(1.0 if size is None else size)
        found: tuple[tuple[bool, float, bool], Look] | None = None
        shares, costs = costs is None, [one.costs for one in self.tables] if costs is None else costs
        for number, (at, table, routes) in enumerate(zip(self.sizes, self.tables, costs, strict=True)):
            if not table.calibrated or size not in (None, at) or budget < routes[0] * (1 - TOLERANCE):
                continue
            mean = None if means is None else means[number]
            price = float(table.price_of(np.array(budget), None if shares and at == 1 else routes, unit, mean))
            known = -1.0 if np.isnan(score := table.score_at(price)) else score
            whole = at == 1 and abs(budget / (1.0 if shares else routes[-1]) - 1) < TOLERANCE
            rank = (whole, known, at == 1)
            if found is None or rank > found[0]:
                found = rank, Look(at, price)
        if found is None:  # says why
            least = min(range(len(costs)), key=lambda number: float(costs[number][0]))
            of = least if size is None else list(self.sizes).index(size)
            self.tables[of].price_of(np.array(budget), costs[of], unit)
        assert found is not None
        return found[1]

    def as_json(self) -> dict[str, Any]:
        """The inverse of `from_json`, with what each price costs in the mean, for other readers. What is known at size
        1 stands at the top."""
        known = [_as_json(table) for table in self.tables]
        others = {size_words(size): one for size, one in zip(self.sizes, known, strict=True) if size != 1}
        return known[list(self.sizes).index(1)] | ({"sizes": others} if others else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any], exits: int) -> Prices:
        """The tables of a network with so many exits. Raises ValueError if they are none."""
        try:
            known: dict[Size, Any] = {1.0: data}
            known |= {_size(text): one for text, one in data.get("sizes", {}).items()}
            sizes = sorted(known, key=lambda size: (isinstance(size, tuple), size))
            return cls(sizes, [_from_json(known[size], 2 if isinstance(size, tuple) else exits) for size in sizes])
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError("its table of prices is damaged") from error


def _size(text: str) -> Size:
    """The inverse of `size_words`."""
    first, *closer = map(float, text.split("-"))
    return (first, *closer) if closer else first  # type: ignore[return-value]


def _as_json(table: PriceTable) -> dict[str, Any]:
    arrays = {"costs": table.costs, "prices": table.prices, "frequencies": table.frequencies}
    means = {"means": table.frequencies @ table.costs}
    known = {"scores": table.scores} if np.isfinite(table.scores).all() else {}
    return {name: values.tolist() for name, values in (arrays | means | known).items()}


def _from_json(data: Mapping[str, Any], exits: int) -> PriceTable:
    """The table of one size. Raises ValueError, TypeError or KeyError if it is none."""
    costs, prices, frequencies = (np.array(data[name], dtype=np.float64) for name in ("costs", "prices", "frequencies"))
    prices = np.atleast_1d(prices)
    scores = np.array(data.get("scores", np.full(len(prices), np.nan)), dtype=np.float64)
    shapes = [(exits,), (len(prices),), (len(prices), exits), (len(prices),)]
    if [one.shape for one in (costs, prices, frequencies, scores)] != shapes:
        raise ValueError("shapes")
    if not all(np.isfinite(one).all() for one in (costs, prices, frequencies)):
        raise ValueError("numbers")
    return PriceTable(costs, prices, frequencies, scores)
