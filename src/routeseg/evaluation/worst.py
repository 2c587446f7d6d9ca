"""The pictures that a network segments worst, to be looked at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from routeseg.data.pairs import SegmentationData
from routeseg.labels import IGNORE

WORST = 10  # pictures that are kept


@dataclass(frozen=True)
class Judged:
    """A picture and what a network made of it: score is the mean IoU of the classes that its labels have."""

    score: float
    name: str
    image: np.ndarray
    labels: np.ndarray
    prediction: np.ndarray


class Worst:
    """Keeps the worst of the pictures that it is told of: `worst(name, prediction)`, as `evaluate` calls it."""

    def __init__(self, pictures: SegmentationData, count: int = WORST) -> None:
        self.pictures, self.count = pictures, count
        self.found: list[Judged] = []  # the worst first
        self._places = {pictures.name(index): index for index in range(len(pictures))}

    def __call__(self, name: str, prediction: np.ndarray) -> None:
        image, labels = self.pictures.read(self._places[name])
        if (labels == IGNORE).all():
            return
        self.found.append(Judged(picture_score(labels, prediction), name, image, labels, prediction))
        self.found = sorted(self.found, key=lambda one: one.score)[: self.count]


def picture_score(labels: np.ndarray, prediction: np.ndarray) -> float:
    """The mean IoU of one picture over the classes that its labels have; labels and prediction are [H,W]."""
    known = labels != IGNORE
    labels, prediction = labels[known], prediction[known]
    scores = []
    for k in np.unique(labels):
        true, found = labels == k, prediction == k
        scores.append((true & found).sum() / (true | found).sum())
    return float(np.mean(scores))
