"""Exits: one network for any budget. Behind some layers an image may leave the grid. All that lies behind is closed for
it then, so that its features pass to a decoder for free (Eq. 5: no path is open).

Each exit has a decoder of its own. Routes are nested, and in training all images run all layers: what a node computes,
and its BatchNorm's statistics, do not depend on where others leave.

At an exit the network glances at an image: its decoder, on features a quarter of the size, says which classes are
there and how sure it is of each. A linear map of that predicts what part of the mIoU the image loses at this exit and
at each later one. The image goes on if that is worth the price,

    leaves at k  <=>  loss_k + price * cost_k <= loss_j + price * cost_j   for all later exits j.

The price is what a budget comes down to: `calibrate` (training/calibration.py) fits the predictions, and keeps what
every price costs, as the share of images that leave at each exit.

Legend: B images, K exits, F features of a glance, T prices of the table, C classes, h, w the size of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from routeseg.config import NetworkConfig
from routeseg.errors import BudgetNotKept
from routeseg.model.compute import Compute, choose, fill_missing
from routeseg.model.decoder import Decoder, Segmentation
from routeseg.model.head import Head
from routeseg.model.request import Request
from routeseg.space import walk

TABLE = 67  # prices
TOLERANCE = 1e-3  # by which a budget may be below the cheapest route: what is shown of that is rounded


class ExitGate(nn.Module):
    """What a glance sees [B,F] -> the loss that it predicts at its exit and at each later one, [B,later]."""

    center: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, features: int, later: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(features))
        self.register_buffer("weight", torch.zeros(later, features))
        self.register_buffer("bias", torch.zeros(later))

    def forward(self, seen: Tensor) -> Tensor:
        center, weight, bias = (values.float() for values in (self.center, self.weight, self.bias))
        return nn.functional.linear(seen - center, weight, bias)


class Exits(nn.Module):
    """The exits of a network: decoders and gates of all but the last, whose decoder is the network's head.

    layers       the layers behind which they are
    reached      [K][S]: whether features arrive at each scale of each exit
    costs        [K] of each route, as a share of the full network's, where the table was made
    prices       [T], ascending; frequencies [T,K]: the share of images that leave at each exit at this price. All zeros
                 before a calibration
    """

    costs: Tensor
    prices: Tensor
    frequencies: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        assert config.exits is not None
        self.layers, count = config.exits, len(config.exits)
        reached = [now.reached for now in walk(config.space, config.whole_route.to_gates())]
        self.reached = [reached[layer] for layer in self.layers]
        self.decoders = nn.ModuleList(Decoder(config) for _ in self.layers[:-1])
        self.gates = nn.ModuleList(ExitGate(2 * config.num_classes, count - k) for k in range(count - 1))
        self.register_buffer("costs", torch.zeros(count))
        self.register_buffer("prices", torch.zeros(TABLE))
        self.register_buffer("frequencies", torch.zeros(TABLE, count))

    def calibration(self) -> list[Tensor]:
        """The tensors that a calibration sets."""
        return [self.costs, self.prices, self.frequencies, *self.gates.buffers()]

    @property
    def calibrated(self) -> bool:
        """Whether it can be asked for a budget."""
        return bool(self.frequencies.any())

    def price_of(self, budget: np.ndarray, costs: np.ndarray | None = None, unit: str = "") -> np.ndarray:
        """The prices at which images cost these means: float64, of the shape of the budgets. What is above the dearest
        route costs as much as that.

        costs  [K] of the routes, in the unit of the budgets, which messages name; None: shares of the full network

        Raises BudgetNotKept for a budget below the cheapest route, and ValueError without a calibration.
        """
        if not self.calibrated:
            raise ValueError("the network was not calibrated, so it knows no budget: run `routeseg calibrate`")
        costs = self.costs.double().cpu().numpy() if costs is None else costs
        for asked in np.ravel(budget):
            if not asked >= costs[0] * (1 - TOLERANCE):
                raise BudgetNotKept(
                    f"a budget of {asked:.4g}{unit} cannot be kept: the cheapest route costs {costs[0]:.4g}{unit}, the "
                    f"full network {costs[-1]:.4g}{unit}"
                )
        means, prices = self.frequencies.double().cpu().numpy() @ costs, self.prices.double().cpu().numpy()
        found = np.interp(budget, means[::-1], prices[::-1])
        return np.where(np.asarray(budget) <= costs[0] * (1 + TOLERANCE), prices[-1], found)

    def share_at(self, price: float) -> float:
        """What images cost at a price, as a share of the full network: the mean."""
        means = (self.frequencies.double() @ self.costs.double()).cpu().numpy()
        return float(np.interp(price, self.prices.double().cpu().numpy(), means))

    def share_for(self, budget: float, costs: np.ndarray, unit: str) -> float:
        """The share of the full network that is asked for by a mean cost in another unit; `costs` and `unit`, and what
        is raised, as for `price_of`."""
        return self.share_at(float(self.price_of(np.array(budget), costs, unit)))

    def glance(self, exit: int, features: Sequence[Tensor | None]) -> Tensor:
        """What the decoder of an exit makes of features by scale (`Decoder.glance`): the share of each class, and the
        entropy where it is: float32 [B,F]."""
        logits = cast(Decoder, self.decoders[exit]).glance(features).float().flatten(2)
        share = logits.softmax(1)
        entropy = -(share * logits.log_softmax(1)).sum(1, keepdim=True)
        return torch.cat([share.mean(2), (share * entropy).mean(2)], dim=1)

    def expected(self, exit: int, features: Sequence[Tensor | None]) -> Tensor:
        """The losses that an exit expects of images here and at each later exit, given features by scale: [B,later]."""
        found: Tensor = self.gates[exit](self.glance(exit, features))
        return found

    def leaves(self, exit: int, features: Sequence[Tensor | None], price: Tensor) -> Tensor:
        """Which images leave at this exit, given their features by scale and prices [B]: bool [B]."""
        total = self.expected(exit, features) + price[:, None] * self.costs[exit:]
        return total[:, 0] <= total[:, 1:].amin(dim=1)

    def leaving(self, request: Request, images: int, training: bool) -> Leaving:
        """What happens at the exits in a forward of so many images.

        Raises ValueError for a budget that cannot be kept.
        """
        if request.exits is not None:
            return Leaving(self, np.array(np.broadcast_to(request.exits, images)))
        last = np.full(images, len(self.layers) - 1)
        if training:
            return Leaving(self, last, keeps=True)
        price = np.zeros(1) if request.budget is None else self.price_of(request.budget)
        on_device = torch.from_numpy(np.broadcast_to(price, images).astype(np.float32)).to(self.prices.device)
        return Leaving(self, last, on_device if self.calibrated else None)

    def result(
        self,
        last: Head,
        leaving: Leaving,
        stem: Tensor,
        features: Sequence[Any],
        gates: Tensor,
        size: tuple[int, int],
        compute: Compute,
        coarse: bool = False,
    ) -> Segmentation:
        """The segmentation, from the stem's output and what leaves the grid at each scale; `last` is the decoder of the
        last exit."""
        heads = [*self.decoders, last]
        if leaving.keeps:
            missing = [None] * len(features)
            parts = [fill_missing([*maps, *missing[len(maps) :]], stem) for maps in leaving.kept]
            logits = [
                head.result(compute.head(head, some, coarse), gates, size).logits
                for head, some in zip(heads, [*parts, features], strict=True)
            ]
            return Segmentation(logits[-1], gates, tuple(logits[:-1]))
        chosen = np.unique(leaving.at)
        if len(chosen) == 1:
            return last.result(compute.head(heads[chosen[0]], features), gates, size)
        rows = [torch.from_numpy(np.flatnonzero(leaving.at == exit)) for exit in chosen]
        logits = [
            compute.head(heads[exit], [compute.take(map, some) for map in features])
            for exit, some in zip(chosen, rows, strict=True)
        ]
        order = torch.argsort(torch.cat(rows)).to(gates.device)
        return last.result(torch.cat(logits)[order], gates, size)


class Leaving:
    """A walk through the grid, as it passes the exits: which images leave there.

    at     [B]: the exits at which images leave, at the last unless they decide otherwise
    price  [B]; None: they do not decide
    keeps  whether the features of each exit but the last are kept, by scale
    """

    def __init__(self, exits: Exits, at: np.ndarray, price: Tensor | None = None, keeps: bool = False) -> None:
        self.exits, self.at, self.price, self.keeps = exits, at, price, keeps
        self.kept: list[Sequence[Any]] = []

    def __call__(self, layer: int, maps: Sequence[Any], places: Sequence[np.ndarray], compute: Compute) -> np.ndarray:
        """Which images [B] have left, once these maps, of images at these places, have come to a layer's nodes."""
        layers = self.exits.layers
        exit = int(np.searchsorted(layers, layer)) - 1  # the last one that lies before the layer
        if exit < 0 or layers[exit] != layer - 1:
            return self.at <= exit
        if self.keeps:
            self.kept.append(maps)
        here = np.flatnonzero(self.at > exit)
        if self.price is not None and len(here):
            # Not what images that have left bring along at other scales.
            reached = self.exits.reached[exit]
            seen = [choose(compute, maps[s], places[s], here) if flag else None for s, flag in enumerate(reached)]
            price = self.price[torch.from_numpy(here).to(self.price.device)]
            self.at[here[self.exits.leaves(exit, seen, price).cpu().numpy()]] = exit
        return self.at <= exit
