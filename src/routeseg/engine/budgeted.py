"""A forward that is asked for a budget each time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from routeseg.cost.request import Asked, check_exits
from routeseg.model.grid import RoutedNetwork


class Budgeted:
    """A network with exits, or an engine of it, that keeps a budget: `Budgeted(engine, model, Asked.parse("40%"))`.

    Raises ValueError for a network that takes no budget, and when it is called for one that cannot be kept at the size
    of the images.
    """

    def __init__(self, forward: Any, model: RoutedNetwork, asked: Asked) -> None:
        check_exits(model)
        self.forward, self.model, self.asked = forward, model, asked
        self.precision, self.precision_reason = (
            getattr(forward, name, None) for name in ("precision", "precision_reason")
        )
        self._shares: dict[tuple[int, int], float] = {}

    def __call__(self, images: Tensor, **how: Any) -> Any:
        size = (images.shape[-2], images.shape[-1])
        if size not in self._shares:
            self._shares[size] = self.asked.share(self.model, size)
        return self.forward(images, budget=self._shares[size], **how)
