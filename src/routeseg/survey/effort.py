"""How far the places of images go through a network, over a data set: by class, and by where they lie in the image.

Legend: H, W size of an image, C classes, K exits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from routeseg.budgets.worth import exits_of
from routeseg.cost.macs import model_cost
from routeseg.evaluation import Forward
from routeseg.labels import IGNORE
from routeseg.model import DynamicRoutingNetwork, Segmentation
from routeseg.space import FIRST_LOOK, over_pixels


@dataclass(frozen=True, eq=False)
class Effort:
    """Of a network whose places leave by themselves. Costs are shares of what the full network costs at an image's own
    size, as everywhere in a survey.

    class_names  of the C classes
    layers       those behind which the K exits are
    pixels       int64 [C+1,K+1]: how many of each class by the labels, and of those without a label, left at each exit;
                 at last those for which a first look was enough
    spent        float64 [C+1]: the costs of these pixels, added up
    images       how many there are
    image        uint8 [H,W,3], their mean, and shares float64 [H,W], the mean cost at each point of it: all images are
                 resized to the first one's size
    """

    class_names: tuple[str, ...]
    layers: tuple[int, ...]
    pixels: np.ndarray
    spent: np.ndarray
    images: int
    image: np.ndarray
    shares: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """For JSON: of each class (None: it does not occur) and of all pixels the shares that leave at each exit, and
        the mean cost, and if images were looked at twice the share for which the first look was enough; all 0..1."""
        return {
            "behind_layers": list(self.layers),
            "all": self._row(self.pixels.sum(0), self.spent.sum()),
            "classes": {name: self._row(self.pixels[c], self.spent[c]) for c, name in enumerate(self.class_names)},
        }

    def _row(self, pixels: np.ndarray, spent: float) -> dict[str, Any] | None:
        count = pixels.sum()
        if not count:
            return None
        *leave, first = (pixels / count).tolist()
        twice = {"first_look": first} if self.pixels[:, -1].any() else {}
        return {"leave": leave, **twice, "cost_share": float(spent / count)}


class EffortNotes:
    """A forward of such a network that remembers where the places of the last images left: `saw` adds them up."""

    def __init__(self, forward: Forward, model: DynamicRoutingNetwork) -> None:
        assert model.config.exits is not None and model.config.place is not None
        self.forward, self.model, self.place = forward, model, model.config.place
        self.layers, self.class_names = tuple(model.config.exits), tuple(model.config.class_names)
        self.pixels = np.zeros((len(self.class_names) + 1, len(self.layers) + 1), np.int64)
        self.spent = np.zeros(len(self.pixels))
        self.images, self.decided = 0, False
        self._cost_at = cache(lambda size: model_cost(model, size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.forward, name)  # such as its precision

    def __call__(self, images: Tensor) -> Segmentation:
        self.last = self.forward(images)
        return self.last

    def saw(self, image: Tensor, labels: np.ndarray) -> None:
        """The last one was this image [1,3,H,W], uint8, with labels [H,W]."""
        result, own = self.last, (labels.shape[0], labels.shape[1])
        table, full, gates = (
            self._cost_at(result.seen or own),
            self._cost_at(own).full,
            result.gates.float().cpu().numpy(),
        )
        if result.exits is None:  # all of it was asked for
            at = np.full(own, exits_of(self.model, gates)[0])
            shares = np.full(own, table.of_gates(gates)[0] / full)
        else:
            self.decided = True
            at = over_pixels(result.exits[0].cpu().numpy(), self.place, own, result.seen)
            shares = table.of_exits(None if result.first is None else self._cost_at(result.first))[at] / full
            at = np.where(at == FIRST_LOOK, len(self.layers), at)
        classes = np.where(labels == IGNORE, len(self.class_names), labels)
        counts = np.bincount((classes * self.pixels.shape[1] + at).ravel(), minlength=self.pixels.size)
        self.pixels += counts.reshape(self.pixels.shape)
        self.spent += np.bincount(classes.ravel(), shares.ravel(), minlength=len(self.spent))
        pixels = image[0].permute(1, 2, 0).cpu().numpy().astype(np.float64)
        if not self.images:
            self._image, self._shares = np.zeros(pixels.shape), np.zeros(own)
        size = self._shares.shape[::-1]
        self._image += cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        self._shares += cv2.resize(shares, size, interpolation=cv2.INTER_AREA)
        self.images += 1

    def found(self) -> Effort | None:
        """All of them together; None if places never decided: no budget was asked for."""
        if not self.decided:
            return None
        mean = (self._image / self.images).round().astype(np.uint8)
        shares = self._shares / self.images
        return Effort(self.class_names, self.layers, self.pixels, self.spent, self.images, mean, shares)
