"""The images that a network segments worst, and best, to be looked at."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from routeseg.collectives import gather
from routeseg.data.pairs import SegmentationData
from routeseg.labels import IGNORE

WORST = 10  # images that are kept


@dataclass(frozen=True)
class Judged:
    """What a network made of an image: score is the mean IoU of the classes that its labels have, prediction the class
    of each pixel, uint8 [H,W]."""

    score: float
    name: str
    prediction: np.ndarray


class Ranking:
    """Keeps the worst and the best of the images that it is told of: `ranking(name, prediction)`, as `evaluate` calls
    it. Images and labels stay in their files until `read` asks for them.

    worst, best  the worst first, and the best first; no image is in both
    """

    def __init__(self, images: SegmentationData, worst: int = WORST, best: int = 0) -> None:
        self.images, self.counts = images, (worst, best)
        self.worst: list[Judged] = []
        self.best: list[Judged] = []
        self._places = {images.name(index): index for index in range(len(images))}

    def __call__(self, name: str, prediction: np.ndarray) -> None:
        labels = self.images.read(self._places[name])[1]
        if not (labels == IGNORE).all():
            self._keep([*self.worst, *self.best, Judged(image_score(labels, prediction), name, prediction)])

    def gather(self) -> None:
        """To be called in every process of a job, once each has seen its share: all rank the images of all."""
        self._keep([one for share in gather([*self.worst, *self.best]) for one in share])

    def read(self, one: Judged) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 [H,W,3] and labels uint8 [H,W] of an image. Raises ValueError if the files are gone."""
        return self.images.read(self._places[one.name])

    def _keep(self, found: list[Judged]) -> None:
        """Of few images the worst ones are the worst, whatever is left is the best."""
        order, (worst, best) = sorted(found, key=attrgetter("score", "name")), self.counts
        self.worst = order[:worst]
        self.best = order[len(self.worst) :][::-1][:best]


def image_score(labels: np.ndarray, prediction: np.ndarray) -> float:
    """The mean IoU of one image over the classes that its labels have; labels and prediction are [H,W]."""
    known = labels != IGNORE
    labels, prediction = labels[known], prediction[known]
    scores = []
    for k in np.unique(labels):
        true, found = labels == k, prediction == k
        scores.append((true & found).sum() / (true | found).sum())
    return float(np.mean(scores))
