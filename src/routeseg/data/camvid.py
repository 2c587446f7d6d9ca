"""CamVid, the street scenes of Brostow, Fauqueur and Cipolla (2009), in the split and 11 classes of SegNet (2017).

ROOT/train/NAME.{png,jpg}   ROOT/trainannot/NAME.png      and the same for val and test
"""

from __future__ import annotations

from pathlib import Path

from routeseg.data.pairs import Classes, LabelMap, PairedFiles, pair_folders
from routeseg.data.transforms import IGNORE

CLASSES = Classes(
    names=(
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign symbol",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    palette=(
        (128, 178, 230),
        (150, 84, 84),
        (214, 206, 170),
        (120, 88, 140),
        (60, 62, 190),
        (106, 142, 35),
        (230, 160, 60),
        (84, 84, 130),
        (40, 0, 140),
        (220, 60, 60),
        (0, 150, 170),
    ),
)
UNLABELLED = 11
REMEDY = "CamVid has 0 to 10 and 11 = unlabelled. Is this the 11-class labelling of SegNet?"
LAYOUT = "expected train/, trainannot/, val/ and valannot/ below it, with the same stems in both folders of a split"


def open_camvid(root: Path, split: str) -> PairedFiles:
    """A split of CamVid. Raises ValueError with the expected layout where it is not there."""
    if not root.is_dir():
        raise ValueError(f"no folder {root}: give CamVid's folder with --data.root; {LAYOUT}")
    if not (root / split).is_dir():
        raise ValueError(f"{root} has no folder {split}/: {LAYOUT}")
    meaning = LabelMap(len(CLASSES), {UNLABELLED: IGNORE}, {}, remedy=REMEDY)
    return PairedFiles(pair_folders(root / split, root / f"{split}annot"), CLASSES, meaning)
