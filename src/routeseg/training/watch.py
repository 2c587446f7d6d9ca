"""What one sees of a training: OUTPUT/progress.png while it runs, and the worst and the best images at its end.

None of it may end a training: whatever goes wrong is one warning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from routeseg import figures
from routeseg.collectives import gather, rank_and_world
from routeseg.config import NetworkConfig
from routeseg.data.decoding import UnreadableImage
from routeseg.data.pairs import SegmentationData
from routeseg.errors import only_warned_of, warn_of
from routeseg.evaluation import Evaluation
from routeseg.evaluation.ranking import Ranking

PROGRESS_FILE = "progress.png"  # of a run
WATCH_STATE = "watch"  # where a checkpoint keeps what Watch knows
RANKED = 3  # worst images that the report shows, and best ones
SHOWN = 4  # images of progress.png
ROWS = 8  # validations that it shows at most


@dataclass(frozen=True)
class Row:
    """A validation in progress.png: its number (0 is the first of the run), its step and mIoU, and the predicted
    classes of the images that are shown, by their names, uint8 [h,w]."""

    number: int
    step: int
    miou: float
    predictions: dict[str, np.ndarray]


def thinned(rows: list[Row]) -> list[Row]:
    """ROWS at most, the last one and others at even steps from the first one on. A row that is left out once is never
    asked for again."""
    last, stride = rows[-1].number, 1
    while -(-last // stride) + 1 > ROWS:
        stride *= 2
    return [row for row in rows if row.number % stride == 0 or row.number == last]


class Watch:
    """Looks at the images of a run's validations, in each of its processes.

    images      the validation data
    last_step   the step whose validation is the last one
    config      of the network: names and colours of the classes
    progress    the file of progress.png; None: it is not drawn
    ranking     the worst and the best images of the last validation; None before it, and if they could not be read
    """

    def __init__(
        self, images: SegmentationData, last_step: int, config: NetworkConfig, progress: Path | None = None
    ) -> None:
        self.images, self.last_step, self.config, self.progress = images, last_step, config, progress
        self.ranking: Ranking | None = None
        self.rows: list[Row] = []
        self._error: Exception | None = None
        places = np.linspace(0, len(images) - 1, min(SHOWN, len(images))).round().astype(int).tolist()
        self._places = {images.name(place): place for place in places if progress is not None}
        self._predictions: dict[str, np.ndarray] = {}

    def begin(self, step: int) -> Callable[[str, np.ndarray], None]:
        """Before the validation of a step: what is to be told of each image, its name and its predicted classes."""
        self._error, self._predictions = None, {}
        if step == self.last_step:
            few = min(RANKED, (len(self.images) + 1) // 2)
            self.ranking = Ranking(self.images, worst=few, best=few)
        return self._look

    def _look(self, name: str, prediction: np.ndarray) -> None:
        if name in self._places:
            self._predictions[name] = figures.shrunk(prediction)
        try:
            if self.ranking is not None and self._error is None:
                self.ranking(name, prediction)
        except Exception as error:  # said once, at the end
            self._error = error

    def end(self, step: int, found: Evaluation) -> None:
        """After the validation of a step, in every process."""
        if self.ranking is not None:
            self.ranking.gather()
        if self._error is not None:
            self.ranking = None
            warn_of("worst and best images", self._error)
        if self.progress is None:
            return
        predictions = {name: one for share in gather(self._predictions) for name, one in share.items()}
        number = self.rows[-1].number + 1 if self.rows else 0
        self.rows = thinned([*self.rows, Row(number, step, found.miou, predictions)])
        if rank_and_world()[0] == 0:
            with only_warned_of("figure of the progress"):
                self._draw(self.progress)

    def _draw(self, path: Path) -> None:
        shown = self._shown
        rows: list[tuple[list[str], list[np.ndarray | None]]] = [
            (["image"], [image for image, _ in shown.values()]),
            (["label"], [self._tinted(image, labels) for image, labels in shown.values()]),
        ]
        for row in self.rows:
            tinted = [self._tinted(image, row.predictions.get(name)) for name, (image, _) in shown.items()]
            score = [] if np.isnan(row.miou) else [f"mIoU {100 * row.miou:.1f} %"]
            rows.append(([f"step {row.step}", *score], tinted))
        figures.progress_sheet(path, rows)

    @cached_property
    def _shown(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Image and labels of the images that are shown, small, by their names; those that can be read."""
        shown = {}
        for name, place in self._places.items():
            try:
                image, labels = self.images.read(place)
            except UnreadableImage:  # the validation has said so
                continue
            shown[name] = figures.shrunk(image), figures.shrunk(labels)
        return shown

    def _tinted(self, image: np.ndarray, labels: np.ndarray | None) -> np.ndarray | None:
        if labels is None or labels.shape != image.shape[:2]:
            return None
        return figures.overlay(image, labels, self.config.class_names, self.config.palette, legend=False)

    def state_dict(self) -> dict[str, Any]:
        """The rows of progress.png, for a run that goes on."""
        return {
            "rows": [
                {
                    "number": row.number,
                    "step": row.step,
                    "miou": row.miou,
                    "predictions": {name: torch.from_numpy(one) for name, one in row.predictions.items()},
                }
                for row in self.rows
            ]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = [
            Row(**row | {"predictions": {name: one.numpy() for name, one in row["predictions"].items()}})
            for row in state["rows"]
        ]
