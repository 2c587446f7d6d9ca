"""A forward that is asked for a budget each time."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from routeseg.cost.request import Asked, check_exits
from routeseg.model.grid import RoutedNetwork


class Budgeted:
    """A network with exits, or an engine of it, that keeps a budget: `Budgeted(engine, model, Asked.parse("40%"))`.

    Raises ValueError for a network that takes no budget and for a latency table of another precision, and BudgetNotKept
    for a budget that cannot be kept at the size of the images.
    """

    def __init__(self, forward: Any, model: RoutedNetwork, asked: Asked) -> None:
        exits = check_exits(model)
        self.forward, self.model, self.asked = forward, model, asked
        self.precision = getattr(forward, "precision", str(next(model.parameters()).dtype).removeprefix("torch."))
        self.precision_reason = getattr(forward, "precision_reason", None)
        if asked.unit == "share":
            exits.price_of(np.array(asked.value))
        if asked.latency is not None and asked.latency.precision != self.precision:
            raise ValueError(
                f"{asked.file} is for {asked.latency.precision}, the network runs in {self.precision}: measure it with "
                f"`routeseg profile --precision {self.precision}`, or choose --precision {asked.latency.precision}"
            )
        self._shares: dict[tuple[int, int], float] = {}

    def __call__(self, images: Tensor, **how: Any) -> Any:
        size = (images.shape[-2], images.shape[-1])
        if size not in self._shares:
            self._shares[size] = self.asked.share(self.model, size)
        return self.forward(images, budget=self._shares[size], **how)
