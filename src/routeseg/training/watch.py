"""What one sees of a training: the worst and the best pictures of its last validation.

None of it may end a training: whatever goes wrong is one warning.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from routeseg.data.pairs import SegmentationData
from routeseg.errors import warn_of
from routeseg.evaluation.ranking import Ranking

RANKED = 3  # worst pictures that the report shows, and best ones


class Watch:
    """Looks at the pictures of a run's validations, in each of its processes.

    pictures    the validation data
    last_step   the step whose validation is the last one
    ranking     the worst and the best pictures of the last validation; None before it, and if they could not be read
    """

    def __init__(self, pictures: SegmentationData, last_step: int) -> None:
        self.pictures, self.last_step = pictures, last_step
        self.ranking: Ranking | None = None
        self._error: Exception | None = None

    def begin(self, step: int) -> Callable[[str, np.ndarray], None] | None:
        """Before the validation of a step: what is to be told of each picture, its name and its predicted classes."""
        self._error = None
        if step < self.last_step:
            return None
        few = min(RANKED, (len(self.pictures) + 1) // 2)
        self.ranking = Ranking(self.pictures, worst=few, best=few)
        return self._look

    def end(self, step: int) -> None:
        """After the validation of a step, in every process."""
        if self.ranking is not None:
            self.ranking.gather()
        if self._error is not None:
            self.ranking = None
            warn_of("worst and best pictures", self._error)

    def _look(self, name: str, prediction: np.ndarray) -> None:
        try:
            if self.ranking is not None and self._error is None:
                self.ranking(name, prediction)
        except Exception as error:  # said once, at the end
            self._error = error
