"""A mean that holds: what the next image may cost, so that images cost what was asked in the mean. No torch here.

A table of prices says what images cost at a price, those that it was made with. Others cost more or less, all of them
together: darker ones, those of another camera. So what has been spent corrects what is looked up:

    looked up = (asked + debt / HORIZON) / ratio

The ratio of what images cost to what the table said follows the last images. The debt, what has been left over since
the start or is owed (below 0), is paid back over the images that come.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from routeseg.budgets.asked import MMACS, Asked, check_exits
from routeseg.cost.macs import Outcome, model_cost, spent_macs
from routeseg.model.prices import Look

if TYPE_CHECKING:
    from routeseg.description import NetworkDescription
    from routeseg.model.grid import RoutedNetwork

HORIZON = 12.0  # images over which a debt is paid back
MEMORY = 12.0  # images that the ratio follows, at most
MOST_RATIO = 8.0


class Keeper:
    """Keeps the mean cost of images, in any unit.

    asked  the mean
    """

    def __init__(self, asked: float) -> None:
        self.asked, self.images = asked, 0
        self._debt, self._ratio = 0.0, 1.0

    def next(self) -> float:
        """What is to be looked up for the next image; 0 or less: as little as possible."""
        return (self.asked + self._debt / HORIZON) / self._ratio

    def saw(self, promised: float, spent: float, images: int = 1) -> None:
        """What images cost in the mean, and what the table had promised."""
        self.images += images
        self._debt += images * (self.asked - spent)
        share = min(1.0, images / min(self.images + 1, MEMORY))
        self._ratio *= min(max(spent / promised / self._ratio, 1 / MOST_RATIO), MOST_RATIO) ** share
        self._ratio = min(max(self._ratio, 1 / MOST_RATIO), MOST_RATIO)


class Spending:
    """How each image of a network with exits is looked at, so that a budget is kept: its size and its price. The size
    is that of the tables, the price follows what images have cost, unless the budget is `fixed`, for each image, or in
    milliseconds, which nobody counts.

    Raises ValueError for a network without exits.
    """

    def __init__(self, asked: Asked, network: RoutedNetwork | NetworkDescription) -> None:
        self.asked, self.network, self.prices = asked, network, check_exits(network)
        follows = not (asked.per_image or asked.fixed or asked.unit == "ms")
        self.keeper = Keeper(asked.amount) if follows else None
        self._known: dict[tuple[int, int], tuple[Look, np.ndarray]] = {}
        self._cost_at = cache(lambda size: model_cost(network, size))

    def look(self, size: tuple[int, int]) -> Look:
        """For the next images (height, width). Raises BudgetNotKept if the budget cannot be kept at this size."""
        if size not in self._known:
            look = self.asked.look(self.network, size)
            costs = self.asked.costs(self.network, size)[list(self.prices.sizes).index(look.size)]
            self._known[size] = look, costs
        look, costs = self._known[size]
        table = self.prices.at(look.size)
        if self.keeper is None or self.keeper.images == 0 or look.price == table.prices[0]:  # all of that size
            return look
        return Look(look.size, float(table.price_of(np.array(max(self.keeper.next(), costs[0])), costs)))

    def saw(self, size: tuple[int, int], look: Look, made: Outcome) -> None:
        """What a forward made of a look at images (height, width)."""
        if self.keeper is None:
            return
        macs = np.atleast_1d(spent_macs(made, size, self._cost_at))
        whole = MMACS if self.asked.unit == "macs" else self._cost_at(size).full
        promised = self.prices.at(look.size).cost_at(look.price, self._known[size][1])
        self.keeper.saw(promised, float(macs.mean()) / whole, len(macs))
