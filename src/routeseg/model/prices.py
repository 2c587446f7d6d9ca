"""What prices cost: a network with exits compares with a price, and a budget is looked up in this table. No torch here.

Legend: K exits, T prices of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from routeseg.errors import NOT_CALIBRATED, BudgetNotKept

TOLERANCE = 1e-3  # by which a budget may be below the cheapest route: what is shown of that is rounded


@dataclass(frozen=True, eq=False)
class PriceTable:
    """The table of a network with exits (budgets/calibration.py), float64.

    costs        [K] of leaving at each exit, as a share of the full network's, where the table was made
    prices       [T], ascending
    frequencies  [T,K]: the share of images, or of their places, that leave at each exit at this price. All zeros before
                 a calibration
    """

    costs: np.ndarray
    prices: np.ndarray
    frequencies: np.ndarray

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
        found = np.interp(budget, means[::-1], self.prices[::-1])
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

    def share_at(self, price: float) -> float:
        """What images cost at a price, as a share of the full network: the mean."""
        return float(np.interp(price, self.prices, self.frequencies @ self.costs))

    def as_json(self) -> dict[str, Any]:
        """The inverse of `from_json`, with what each price costs in the mean, for other readers."""
        arrays = {"costs": self.costs, "prices": self.prices, "frequencies": self.frequencies}
        return {name: values.tolist() for name, values in (arrays | {"means": self.frequencies @ self.costs}).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], exits: int) -> PriceTable:
        """The table of a network with so many exits. Raises ValueError if it is none."""
        try:
            found = cls(*(np.array(data[name], dtype=np.float64) for name in ("costs", "prices", "frequencies")))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError("its table of prices is damaged") from error
        shapes = [(exits,), (len(np.atleast_1d(found.prices)),), (len(np.atleast_1d(found.prices)), exits)]
        arrays = (found.costs, found.prices, found.frequencies)
        if [one.shape for one in arrays] != shapes or not all(np.isfinite(one).all() for one in arrays):
            raise ValueError("its table of prices is damaged")
        return found
