"""Some pictures of a data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from routeseg.data.pairs import SegmentationData, SkipLog
from routeseg.labels import Classes

CALIBRATION_PICTURES = 300  # at most, to calibrate a network with exits


class Pictures:
    """Some pictures of a data set, by their indices."""

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
    """`count` pictures of a data set, from its beginning to its end at even steps; all with None.

    Raises ValueError if the count is not positive.
    """
    if count is None or count >= len(data):
        return data
    if count < 1:
        raise ValueError(f"--images is {count}: look at one picture at least")
    return Pictures(data, np.linspace(0, len(data) - 1, count).round().astype(int).tolist())
