"""Cityscapes (Cordts et al., CVPR 2016) in its official layout, with the 19 classes that it is trained and scored on.

Label files hold the official ids; they are mapped here, by the table of the benchmark's own scripts, so nothing has
to be converted first. If the scripts' `*_labelTrainIds.png` lies beside, it is used: it holds the classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from routeseg.data.label_files import LabelMap
from routeseg.data.pairs import LeftOut, Pair, PairedFiles, leave_out
from routeseg.data.sets.roots import check_names, expected, files_of, need_folders, no_split, read_class_numbers
from routeseg.labels import IGNORE, Classes

TREE = """
ROOT/leftImg8bit/{train,val,test,train_extra}/CITY/CITY_SEQ_FRAME_leftImg8bit.png
ROOT/gtFine/{train,val,test}/CITY/CITY_SEQ_FRAME_gtFine_labelIds.png
ROOT/gtCoarse/{train,val,train_extra}/CITY/CITY_SEQ_FRAME_gtCoarse_labelIds.png   (only for coarse labels)
"""
# (official id, name, colour) of the classes, in the order in which they are numbered for training
OFFICIAL = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
CLASSES = Classes(tuple(name for _, name, _ in OFFICIAL), tuple(colour for _, _, colour in OFFICIAL))
TRAIN_TO_LABEL_ID = tuple(label_id for label_id, _, _ in OFFICIAL)  # class -> official id, as submissions hold it
IGNORED_LABEL_IDS = (-1, 0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)  # the official ids that are not scored
LABEL_ID_TO_TRAIN = {label_id: IGNORE for label_id in IGNORED_LABEL_IDS} | {
    label_id: train_id for train_id, label_id in enumerate(TRAIN_TO_LABEL_ID)
}

REMEDY = "use the *_labelIds.png or *_labelTrainIds.png that belong to the data set, not *_color or *_instanceIds"
IMAGE_SUFFIX = "_leftImg8bit.png"
TRAIN_IDS_SUFFIX = "_labelTrainIds.png"


@dataclass(frozen=True)
class Part:
    """Where a split lies: the images' folder below leftImg8bit and below `kind`, gtFine or gtCoarse."""

    folder: str
    kind: str
    labelled: bool = True  # an image without a label file is an error


SPLITS = {
    "train": Part("train", "gtFine"),
    "val": Part("val", "gtFine"),
    "test": Part("test", "gtFine", labelled=False),
    "train_extra": Part("train_extra", "gtCoarse"),
    "train_coarse": Part("train", "gtCoarse"),
    "val_coarse": Part("val", "gtCoarse"),
}


@dataclass(frozen=True)
class CityscapesLabels(LabelMap):
    """Official ids -> classes; in a file `*_labelTrainIds.png` the classes themselves."""

    def __call__(self, values: np.ndarray, path: Path) -> np.ndarray:
        return TRAIN_IDS(values, path) if path.name.endswith(TRAIN_IDS_SUFFIX) else super().__call__(values, path)

    def lookup(self, values: np.ndarray, path: Path) -> np.ndarray:
        known = TRAIN_IDS.lookup if path.name.endswith(TRAIN_IDS_SUFFIX) else super().lookup
        return known(values, path)


TRAIN_IDS = LabelMap(
    len(CLASSES),
    {train_id: train_id for train_id in range(len(CLASSES))} | {IGNORE: IGNORE},
    {},
    strict=True,
    remedy="a *_labelTrainIds.png has 0 to 18 and 255; was it written by the benchmark's own createTrainIdLabelImgs?",
)
LABEL_IDS = CityscapesLabels(
    len(CLASSES),
    LABEL_ID_TO_TRAIN,
    {},
    strict=True,
    remedy="the official ids of a *_labelIds.png are -1 to 33; does the file hold training ids (0 to 18 and 255)? "
    "Then its name must end in _labelTrainIds.png",
)


def open_cityscapes(root: Path, split: str, left_out: list[LeftOut] | None = None) -> PairedFiles:
    """A split of Cityscapes, or several joined with "+", such as train+train_extra; see SPLITS.

    Images of `test` have no labels if the file is not there. Raises ValueError, showing the expected tree, if
    something is missing.

    left_out  takes files without a partner; without it they are an error, too
    """
    parts = split.split("+")
    for part in parts:
        if part not in SPLITS:
            raise no_split("Cityscapes", part, SPLITS, ", or several joined with +")
    pairs = [pair for part in parts for pair in _pairs(root, SPLITS[part], left_out)]
    return PairedFiles(
        check_names(pairs, f"the split {split}"), CLASSES, LABEL_IDS, partial(read_class_numbers, remedy=REMEDY)
    )


def _pairs(root: Path, part: Part, left_out: list[LeftOut] | None) -> list[Pair]:
    image_folder, labels = f"leftImg8bit/{part.folder}", f"{part.kind}/{part.folder}"
    need_folders(root, [image_folder, labels] if part.labelled else [image_folder], "Cityscapes", TREE)
    images: dict[tuple[str, str], Path] = {}  # city and name
    found: dict[tuple[str, str], Path] = {}
    for city in sorted(path for path in (root / image_folder).iterdir() if path.is_dir()):
        label_folder = root / labels / city.name
        named = files_of(label_folder, f"_{part.kind}_labelIds.png")
        named |= files_of(label_folder, f"_{part.kind}{TRAIN_IDS_SUFFIX}")
        images |= {(city.name, name): path for name, path in files_of(city, IMAGE_SUFFIX).items()}
        found |= {(city.name, name): path for name, path in named.items()}
    for what, some, others, lacking in (
        (
            "images without a label",
            images,
            found,
            f"label: there is no {root / labels}/{{}}/{{}}_{part.kind}_labelIds.png",
        ),
        ("labels without an image", found, images, f"image: there is no {root / image_folder}/{{}}/{{}}{IMAGE_SUFFIX}"),
    ):
        alone = [key for key in some if key not in others]
        if alone and (part.labelled or some is found):
            message = (
                f"{some[alone[0]]} has no {lacking.format(*alone[0])} ({len(alone)} of {len(some)} are so, `routeseg "
                f"check-data` names them); {expected(TREE)}"
            )
            remedy = "unpack the data set again, or remove them"
            leave_out(LeftOut(what, tuple(str(some[key]) for key in alone), len(some), message, remedy), left_out)
    if not images:
        raise ValueError(f"{root / image_folder} holds no images; {expected(TREE)}")
    kept = [key for key in images if key in found or not part.labelled]
    return [Pair(key[1], images[key], found.get(key)) for key in kept]
