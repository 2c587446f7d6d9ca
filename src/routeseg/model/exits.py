"""Exits: one network for any budget. Behind some layers an image, or a place of it, may leave the grid. All that lies
behind is closed for it then, so that its features pass to a decoder for free (Eq. 5: no path is open).

Each exit has a decoder of its own. Routes are nested, and in training all images run all layers: what a node computes,
and its BatchNorm's statistics, do not depend on where others leave.

At an exit the network glances at an image: its decoder, on small features, says which classes are there and how sure it
is. A rule (model/choice.py) lets the image go on if that is worth the price, or each of its places by itself
(model/places.py). The price is what a budget comes down to: `calibrate` (budgets/calibration.py) fits the rule, and
keeps what every price costs, as the share of images or places that leave at each exit (model/prices.py).

Legend: B images, K exits, T prices of the table, hb, wb places of an image, h, w the size of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from routeseg.config import NetworkConfig
from routeseg.model.choice import Choice
from routeseg.model.compute import Compute, choose, enlarged, fill_missing
from routeseg.model.decoder import Segmentation
from routeseg.model.head import Head
from routeseg.model.layers import widened
from routeseg.model.places import Running, enlarge
from routeseg.model.prices import Prices, PriceTable
from routeseg.model.request import Request
from routeseg.registry import CHOICES
from routeseg.space import FIRST_LOOK, STEM_STRIDE, Size, place_sides, walk

TABLE = 67  # prices


class Priced(nn.Module):
    """A table of prices (model/prices.py), as buffers.

    costs        [K] of leaving at each exit, as a share of the full network's, where the table was made
    prices       [T], ascending; frequencies [T,K]: the share of images, or of their places, that leave at each exit at
                 this price. All zeros before a calibration
    scores       [T]: the mIoU at this price, NaN where it is not known; of networks that know several sizes
    """

    costs: Tensor
    prices: Tensor
    frequencies: Tensor

    def __init__(self, exits: int, scored: bool) -> None:
        super().__init__()
        self.register_buffer("costs", torch.zeros(exits))
        self.register_buffer("prices", torch.zeros(TABLE))
        self.register_buffer("frequencies", torch.zeros(TABLE, exits))
        if scored:
            self.register_buffer("scores", torch.full((TABLE,), torch.nan))

    @property
    def table(self) -> PriceTable:
        """What prices cost."""
        return PriceTable(*(one.double().cpu().numpy() for one in self._values()))

    @table.setter
    def table(self, table: PriceTable) -> None:
        found = (table.costs, table.prices, table.frequencies, table.scores)
        for buffer, values in zip(self._values(), found, strict=True):
            buffer.copy_(torch.from_numpy(values))

    def _values(self) -> tuple[Tensor, ...]:
        return (
            self.costs,
            self.prices,
            self.frequencies,
            getattr(self, "scores", torch.full_like(self.prices, torch.nan)),
        )


class Exits(Priced):
    """The exits of a network: decoders of all but the last, whose decoder is the network's head, and what decides.

    layers       the layers behind which they are
    reached      [K][S]: whether features arrive at each scale of each exit
    gates        the rule (model/choice.py)
    others       tables of prices at other sizes than 1, in the order of `sizes`
    wholes       of a network whose places leave, tables of all sizes for images that leave as wholes (`as_wholes`)

    Raises ValueError if places cannot decide by the network's rule.
    """

    gates: Choice

    def __init__(self, config: NetworkConfig, head: type[Head]) -> None:
        assert config.exits is not None and config.choice is not None
        super().__init__(len(config.exits), config.sizes is not None)
        self.layers, self.place, self.scales = config.exits, config.place, config.num_scales
        self.sizes: Sequence[Size] = config.sizes or (1.0,)
        reached = [now.reached for now in walk(config.space, config.whole_route.to_gates())]
        self.reached = [reached[layer] for layer in self.layers]
        self.decoders = nn.ModuleList(head(config) for _ in self.layers[:-1])
        choice = CHOICES[config.choice]
        if self.place is not None and not choice.by_place:
            raise ValueError(f"choice is {config.choice}, about whole images: choose another, or leave place out")
        self.gates = choice(config)
        routes = [2 if isinstance(size, tuple) else len(self.layers) for size in self.sizes if size != 1]
        self.others = nn.ModuleList(Priced(count, True) for count in routes)
        scored, sizes = config.sizes is not None, () if self.place is None else self.singles
        self.wholes = nn.ModuleList(Priced(len(self.layers), scored) for _ in sizes)

    def calibration(self) -> list[Tensor]:
        """The tensors that a calibration sets."""
        tables = [*self.others.buffers(), *self.wholes.buffers()]
        return [*self.buffers(recurse=False), *tables, *self.gates.buffers()]

    @property
    def calibrated(self) -> bool:
        """Whether it can be asked for a budget."""
        return bool(self.frequencies.any())

    @property
    def singles(self) -> list[float]:
        """The sizes that are no closer looks."""
        return [size for size in self.sizes if isinstance(size, float)]

    def at(self, size: Size) -> Priced:
        """The table of a size."""
        others = [one for one in self.sizes if one != 1]
        return self if size == 1 else cast(Priced, self.others[others.index(size)])

    @property
    def known(self) -> Prices:
        """What prices cost, and what they bring."""
        return Prices(self.sizes, [self.at(size).table for size in self.sizes])

    def see(self, exit: int, features: Sequence[Tensor | None]) -> Tensor:
        """What decides at an exit, given all features by scale (`Choice.see`)."""
        there = [map if flag else None for map, flag in zip(features, self.reached[exit], strict=False)]
        return self.gates.see(cast(Head, self.decoders[exit]), there)

    def leaves(self, exit: int, features: Sequence[Tensor | None], price: Tensor) -> Tensor:
        """Who leaves at this exit, given features by scale and prices [B]: bool [B], of places [B,hb,wb]."""
        seen = self.see(exit, features)
        return self.gates.leaves(exit, seen, price if self.place is None else price[:, None, None], self.costs)

    def closer(self, need: Tensor, request: Request) -> Tensor:
        """The places that are looked at closer, bool [B,hb,wb], by how unsure a first look is: those above the price,
        or the share of them that a budget of each image allows; or those that were told to."""
        if (told := request.told_to(len(need), need.shape[1:])) is not None:
            return torch.from_numpy(told != FIRST_LOOK).to(need.device)
        if request.quota is not None:
            return _most(need, need.new_tensor(np.broadcast_to(request.quota[:, 0], len(need))))
        price = need.new_tensor(np.broadcast_to(0.0 if request.price is None else request.price, len(need)))
        return (need > price[:, None, None]) | (price <= 0)[:, None, None]

    def leaving(self, request: Request, images: int, size: tuple[int, int], training: bool) -> Leaving:
        """What happens at the exits in a forward of so many images of this padded size.

        Raises ValueError for a budget that cannot be kept.
        """
        last = len(self.layers) - 1
        if request.exits is not None:
            return Leaving(self, np.array(np.broadcast_to(request.exits, images)))
        price = request.price
        if price is None:
            if training:
                return Leaving(self, np.full(images, last), keeps=True)
            price = np.zeros(1)
        on_device = torch.from_numpy(np.broadcast_to(price, images).astype(np.float32)).to(self.prices.device)
        if self.place is not None:
            quota = None
            if request.quota is not None:
                shares = np.broadcast_to(request.quota, (images, request.quota.shape[1]))
                quota = torch.tensor(shares, device=on_device.device)
            told = request.told_to(images, place_sides(size, self.place))
            return LeavingPlaces(
                self,
                on_device,
                size,
                training,
                quota,
                None if told is None else torch.from_numpy(told).to(on_device.device),
            )
        return Leaving(self, np.full(images, last), on_device if self.calibrated else None)

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
        if isinstance(leaving, LeavingPlaces):
            return leaving.result(last, features, gates, size, compute, coarse)
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

    at       [B]: the exits at which images leave, at the last unless they decide otherwise
    price    [B]; None: they do not decide
    keeps    whether the features of each exit but the last are kept, by scale
    running  which places are still in; None: images leave as wholes
    """

    running: Running | None = None

    def __init__(self, exits: Exits, at: np.ndarray, price: Tensor | None = None, keeps: bool = False) -> None:
        self.exits, self.at, self.price, self.keeps = exits, at, price, keeps
        self.kept: list[Sequence[Any]] = []

    def exit_before(self, layer: int) -> tuple[int, bool]:
        """The last exit that lies before a layer, -1 if there is none; and whether it lies right before it."""
        exit = int(np.searchsorted(self.exits.layers, layer)) - 1
        return exit, exit >= 0 and self.exits.layers[exit] == layer - 1

    def __call__(
        self, layer: int, maps: Sequence[Any], there: Sequence[np.ndarray], compute: Compute, stem: Tensor
    ) -> np.ndarray:
        """Which images [B] have left, once these maps, of the images that are `there`, have come to a layer's nodes;
        the stem's output tells the sizes of all maps."""
        exit, is_here = self.exit_before(layer)
        if not is_here:
            return self.at <= exit
        if self.keeps:
            self.kept.append(maps)
        here = np.flatnonzero(self.at > exit)
        if self.price is not None and len(here):
            # Not what images that have left bring along at other scales.
            reached = self.exits.reached[exit]
            seen = [choose(compute, maps[s], there[s], here) if flag else None for s, flag in enumerate(reached)]
            price = self.price[torch.from_numpy(here).to(self.price.device)]
            self.at[here[self.exits.leaves(exit, seen, price).cpu().numpy()]] = exit
        return self.at <= exit


class LeavingPlaces(Leaving):
    """The same for places, which decide at each exit; images run as far as one of their places does.

    price    [B]; at 0 or less nobody leaves, and if it is so for all images nobody looks
    quota    [B,K-1], the shares of the places that go on behind each exit: those that need it most, whatever the price;
             None: the price decides
    told     [B,hb,wb], where they leave, whatever they need; None: the quota or the price decides
    left     int64 [B,hb,wb]: the exit at which each place leaves
    outputs  what the decoder of each exit but the last made, where somebody left there (in training, all of them)
    """

    running: Running

    def __init__(
        self,
        exits: Exits,
        price: Tensor,
        size: tuple[int, int],
        training: bool,
        quota: Tensor | None = None,
        told: Tensor | None = None,
    ) -> None:
        assert exits.place is not None
        last, sides = len(exits.layers) - 1, place_sides(size, exits.place)
        super().__init__(exits, np.full(len(price), last), price)
        self.size, self.training, self.quota, self.told = size, training, quota, told
        self.looks = bool((price > 0).any())
        self.left = torch.full((len(price), *sides), last, device=price.device)
        self.running = Running(torch.ones_like(self.left, dtype=torch.bool), size, exits.place)
        self.outputs: list[Any] = []

    def __call__(
        self, layer: int, maps: Sequence[Any], there: Sequence[np.ndarray], compute: Compute, stem: Tensor
    ) -> np.ndarray:
        exit, is_here = self.exit_before(layer)
        if is_here and exit < len(self.exits.decoders):
            assert self.price is not None and self.exits.place is not None
            leaves, running = None, self.running
            if self.looks and running.flags.any():
                with torch.no_grad():
                    seen = [None if one is None else compute.map(one) for one in maps]
                    leaves = running.flags & (self.price > 0)[:, None, None] & self._leave(exit, seen)
            output = None
            if self.training or (leaves is not None and leaves.any()):
                missing = [None] * (self.exits.scales - len(maps))
                head = cast(Head, self.exits.decoders[exit])
                output = compute.head(head, fill_missing([*maps, *missing], stem), True, running)
            self.outputs.append(output)
            if leaves is not None and leaves.any():
                self.left[leaves] = exit
                self.running = Running(running.flags & ~leaves, self.size, self.exits.place)
        return ~self.running.flags.flatten(1).any(1).cpu().numpy()

    def _leave(self, exit: int, features: Sequence[Tensor | None]) -> Tensor:
        """Which places leave, [B,hb,wb], of those that run."""
        if self.told is not None:
            return self.told <= exit
        if self.quota is None:
            assert self.price is not None
            return self.exits.leaves(exit, features, self.price)
        need = self.exits.gates.need(exit, self.exits.see(exit, features))
        return ~_most(need.masked_fill(~self.running.flags, -torch.inf), self.quota[:, exit])

    def result(
        self, last: Head, features: Sequence[Any], gates: Tensor, size: tuple[int, int], compute: Compute, coarse: bool
    ) -> Segmentation:
        """The segmentation in which each place has the logits of the exit at which it left; in training the logits of
        every exit."""
        if not self.training and not bool(self.running.flags.any()):  # nobody is left
            output = next(one for one in self.outputs if one is not None)
        else:
            output = compute.head(last, features, True, self.running)
        if self.training:
            outputs = [one if coarse else enlarged(one, self.size) for one in (*self.outputs, output)]
            logits = [last.result(one, gates, size).logits for one in outputs]
            return Segmentation(logits[-1], gates, tuple(logits[:-1]), self.left)
        at = enlarge(self.left[:, None], self.running.place // STEM_STRIDE, output.shape[-2:])
        for exit, one in enumerate(self.outputs):
            if one is not None:
                output = torch.where(at == exit, one, output)
        found = last.result(enlarged(widened(output), self.size), gates, size)
        return replace(found, exits=self.left) if self.looks else found


def _most(need: Tensor, shares: Tensor) -> Tensor:
    """These shares [B] of the places, those that need most: bool [B,hb,wb]."""
    rank = need.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < (shares[:, None] * rank.shape[1]).round()).view_as(need)
