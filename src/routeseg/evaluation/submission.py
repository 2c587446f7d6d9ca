"""Predictions as the benchmarks' own scripts and servers take them: Cityscapes and PASCAL VOC 2012.

Legend: K classes, H, W image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from routeseg.data.sets.cityscapes import TRAIN_TO_LABEL_ID
from routeseg.data.sets.voc import NAMES, voc_palette
from routeseg.figures import png_bytes
from routeseg.files import check_writable, write_atomically


@dataclass(frozen=True)
class Official:
    """What a benchmark expects.

    file     path of an image's prediction below the submission's folder; {name} and {split} stand for its own
    values   class -> the value that is stored for it
    palette  RGB colours of the stored values; None: a greyscale PNG
    """

    file: str
    values: Sequence[int]
    palette: Sequence[tuple[int, int, int]] | None = None


OFFICIAL = {
    # evalPixelLevelSemanticLabeling takes CITY_SEQ_FRAME*.png, anywhere below its folder, with the original label ids.
    "cityscapes": Official("{name}_pred.png", TRAIN_TO_LABEL_ID),
    # comp6: trained on any data, so also on SBD and ImageNet; the devkit writes the split's name into the folder's.
    "voc": Official(
        "results/VOC2012/Segmentation/comp6_{split}_cls/{name}.png", range(len(NAMES)), tuple(voc_palette())
    ),
}


class Submission:
    """Writes the predictions of a split in the official form, each file whole or not at all.

    A file of the same name is replaced, other files in the folder stay.
    Raises ValueError, before any work, for a data set without an official form, and if the folder cannot be written.
    """

    def __init__(self, folder: str | Path, data_set: str, split: str) -> None:
        if data_set not in OFFICIAL:
            raise ValueError(
                f"--submission: {data_set} has no official form of predictions, {' and '.join(OFFICIAL)} have; "
                "`routeseg predict` writes label maps of any images"
            )
        self.folder, self.split, self.official = Path(folder), split, OFFICIAL[data_set]
        self.table = np.array(self.official.values, dtype=np.uint8)
        self.written: set[Path] = set()
        check_writable(self.path("x").parent, "--submission")

    def path(self, name: str) -> Path:
        """Where the prediction of the image of this name goes."""
        return self.folder / self.official.file.format(name=name, split=self.split)

    def write(self, name: str, labels: np.ndarray) -> None:
        """Writes the predicted classes [H,W] of an image."""
        image = Image.fromarray(self.table[labels])
        if self.official.palette is not None:
            image.putpalette([part for colour in self.official.palette for part in colour])
        write_atomically(self.path(name), png_bytes(image))
        self.written.add(self.path(name))

    def strangers(self) -> list[Path]:
        """Other PNGs that lie among the predictions: an official script may take them for predictions, too."""
        return sorted(set(self.path("x").parent.glob("*.png")) - self.written)
