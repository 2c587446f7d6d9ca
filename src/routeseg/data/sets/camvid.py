"""CamVid, the street scenes of Brostow, Fauqueur and Cipolla (2009), in the split and 11 classes of SegNet (2017)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from routeseg.data.label_files import LabelMap
from routeseg.data.pairs import LeftOut, PairedFiles, pair_folders
from routeseg.data.sets.roots import need_folders, no_split, read_class_numbers
from routeseg.labels import IGNORE, Classes

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
        (220, 70, 190),
        (220, 60, 60),
        (0, 150, 170),
    ),
)
UNLABELLED = 11
SPLITS = ("train", "val", "test")
TREE = """
ROOT/train/NAME.png (or .jpg)   ROOT/trainannot/NAME.png
ROOT/val/NAME.png               ROOT/valannot/NAME.png
ROOT/test/NAME.png              ROOT/testannot/NAME.png
"""
REMEDY = "CamVid has 0 to 10 and 11 = unlabelled. Is this the 11-class labelling of SegNet?"
LABELS = LabelMap(len(CLASSES), {UNLABELLED: IGNORE}, {}, remedy=REMEDY)


def open_camvid(root: Path, split: str, left_out: list[LeftOut] | None = None) -> PairedFiles:
    """A split of CamVid. Raises ValueError, showing the expected tree, if something is missing.

    left_out  takes files without a partner; without it they are an error, too
    """
    if split not in SPLITS:
        raise no_split("CamVid", split, SPLITS)
    need_folders(root, (split, f"{split}annot"), "CamVid", TREE)
    pairs = pair_folders(root / split, root / f"{split}annot", left_out)
    return PairedFiles(pairs, CLASSES, LABELS, partial(read_class_numbers, remedy=REMEDY))
