"""A forward that is asked for a budget each time, or told where to leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from routeseg.budgets.asked import Asked, check_exits
from routeseg.budgets.keeping import Spending
from routeseg.cost.macs import exit_costs
from routeseg.errors import NO_PLACES
from routeseg.model.grid import RoutedNetwork
from routeseg.space import MIN_IMAGE_SIZE

LEVELS = 12  # of cost, between which the frames of a video change


class _Asked:
    """A network with exits, or an engine of it, that is asked for something in each forward. Raises ValueError for a
    network without exits."""

    def __init__(self, forward: Any, model: RoutedNetwork) -> None:
        check_exits(model)
        self.forward, self.model = forward, model
        self.precision = getattr(forward, "precision", str(next(model.parameters()).dtype).removeprefix("torch."))
        self.precision_reason = getattr(forward, "precision_reason", None)

    def __call__(self, images: Tensor, **how: Any) -> Any:
        return self._run(self.forward, images, how)

    def labels(self, images: Tensor, **how: Any) -> Any:
        """`SkipEngine.labels` of an engine; what the forward gives of another one."""
        return self._run(getattr(self.forward, "labels", self.forward), images, how)

    def _run(self, forward: Any, images: Tensor, how: dict[str, Any]) -> Any:
        raise NotImplementedError


class Budgeted(_Asked):
    """A network with exits, or an engine of it, that keeps a budget: `Budgeted(engine, model, Asked.parse("40%"))`. The
    mean over its images is kept by what they have cost so far (keeping.py), unless the budget is `fixed`, for each
    image, or in milliseconds.

    Raises ValueError for a network that takes no budget and for latency tables of another precision, and BudgetNotKept
    for a budget that cannot be kept at the size of the images.
    """

    def __init__(self, forward: Any, model: RoutedNetwork, asked: Asked) -> None:
        super().__init__(forward, model)
        tables = [table for table in asked.latency if table.precision == self.precision]
        device = next(model.parameters()).device.type
        tables = [table for table in tables if table.device.startswith(device)] or tables
        self.asked = replace(asked, latency=tuple(tables))
        if asked.unit == "share":
            asked.look(model, (MIN_IMAGE_SIZE, MIN_IMAGE_SIZE))  # the same for all sizes
        if asked.unit == "ms" and not tables:
            there = asked.latency[0].precision
            raise ValueError(
                f"{asked.file} is for {there}, the network runs in {self.precision}: measure it with "
                f"`routeseg profile --precision {self.precision}`, or choose --precision {there}"
            )
        for table in tables:
            table.check(model.config, asked.file)
        if asked.per_image and model.config.place is None:
            raise ValueError(f"a budget cannot be kept by each image: {NO_PLACES}")
        self.per_image = asked.per_image or (asked.unit == "ms" and model.config.place is not None)
        self.spending = Spending(replace(self.asked, per_image=self.per_image), model)

    def _run(self, forward: Any, images: Tensor, how: dict[str, Any]) -> Any:
        size = (images.shape[-2], images.shape[-1])
        look = self.spending.look(size)
        result = forward(images, price=look.price, size=look.size, per_image=self.per_image, **how)
        self.spending.saw(size, look, result)
        return result


class Steered(_Asked):
    """A network with exits, or an engine of it, whose images all cost what a level says, which may change from one
    forward to the next. Images leave at one exit, and none decides anything; of a calibrated network whose places leave
    by themselves, the same share of every image's places go on.

    level  the number of the level, 0 the cheapest

    Raises ValueError for a network without exits.
    """

    def __init__(self, forward: Any, model: RoutedNetwork) -> None:
        super().__init__(forward, model)
        prices, self.level = check_exits(model), 0
        self.shares: np.ndarray | None = None
        self.levels: list[dict[str, Any]] = [{"route": route} for route in model.config.exit_routes]
        if model.config.place is not None and prices.at().calibrated:
            self.shares = np.linspace(prices.least, 1, LEVELS)
            looks = [prices.look_up(float(share)) for share in self.shares]
            self.levels = [{"price": look.price, "size": look.size, "per_image": True} for look in looks]

    def costs(self, size: tuple[int, int]) -> np.ndarray:
        """What the levels cost for images (height, width), as shares of the full network's: float64 [N], ascending."""
        if self.shares is not None:
            return self.shares
        macs = exit_costs(self.model, size)
        return macs / macs[-1]

    def _run(self, forward: Any, images: Tensor, how: dict[str, Any]) -> Any:
        return forward(images, **self.levels[self.level], **how)
