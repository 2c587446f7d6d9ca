"""A mean that holds: what the next image may cost, so that images cost what was asked in the mean. No torch here.

A table of prices says what images cost at a price, those that it was made with. Others cost more or less, all of them
together: darker ones, those of another camera. So what has been spent corrects what is looked up:

    looked up = (asked + debt / HORIZON) / ratio

The ratio of what images cost to what the table said follows the last images. The debt, what has been left over since
the start or is owed (below 0), is paid back over the images that come.
"""

from __future__ import annotations

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
