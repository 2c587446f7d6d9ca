"""Some images of a data set, and what classes they show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from routeseg.data.decoding import UnreadableImage
from routeseg.data.pairs import SegmentationData, SkipLog
from routeseg.labels import IGNORE, Classes

CALIBRATION_IMAGES, LEAST_IMAGES = 300, 8  # at most and at least, to calibrate a network with exits
OFFSET_IMAGES = 100  # at most, to fit offsets of classes to
COUNTED_IMAGES = 500  # at most, to see how frequent classes are
LEAST_SHARE = 1e-4  # of the pixels: a class that is rarer, or is not seen, gains no more than this one


class Subset:
    """Some images of a data set, by their indices."""

    def __init__(self, data: SegmentationData, indices: Sequence[int]) -> None:
        self.data, self.indices = data, indices
        self.classes: Classes = data.classes
        self.skips = SkipLog(len(indices))

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.data.read(self.indices[index])

    def name(self, index: int) -> str:
        return self.data.name(self.indices[index])


def evenly_spread(data: SegmentationData, count: int | None) -> SegmentationData:
    """`count` images of a data set, from its beginning to its end at even steps; all with None.

    Raises ValueError if the count is not positive.
    """
    if count is None or count >= len(data):
        return data
    if count < 1:
        raise ValueError(f"--images is {count}: look at one image at least")
    return Subset(data, np.linspace(0, len(data) - 1, count).round().astype(int).tolist())


def class_weights(data: SegmentationData, balance: float) -> np.ndarray:
    """What a pixel of each class counts, float32 [K]: 1 / (the class's share of the pixels)^balance, 1 in the mean over
    the pixels."""
    counts = np.zeros(IGNORE + 1)
    images = evenly_spread(data, COUNTED_IMAGES)
    for index in range(len(images)):
        try:
            counts += np.bincount(images.read(index)[1].ravel(), minlength=len(counts))
        except UnreadableImage as error:
            images.skips(index, error)
    seen = counts[: len(data.classes)]
    share = np.maximum(seen / max(seen.sum(), 1), LEAST_SHARE)
    weights = share**-balance
    return (weights * share.sum() / (weights * share).sum()).astype(np.float32)
