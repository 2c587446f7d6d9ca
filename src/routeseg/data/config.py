"""The `data` section of a configuration: which data set, and how its images are augmented. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from routeseg.data import scenes
from routeseg.data.pairs import LeftOut, SegmentationData, SkipLog
from routeseg.data.sets import ade20k, camvid, cityscapes, voc
from routeseg.data.sets.folder import describing_file, open_folder, read_description, undescribed
from routeseg.data.sets.hints import is_archive, what_it_lacks
from routeseg.data.sets.roots import no_split
from routeseg.data.sets.undescribed import find_class_list, find_places
from routeseg.errors import printable
from routeseg.files import expand_user
from routeseg.labels import BACKGROUND, Classes

SEED_OFFSETS = {"train": 0, "val": 1_000_003, "test": 2_000_003}  # scenes: each split is drawn from another seed


@dataclass
class DataConfig:
    """The `data` section of a configuration.

    name          scenes (procedural, no download), camvid, cityscapes, voc, ade20k, or folder (your own images);
                  what each expects is in docs/data.md
    root          folder of the data set (not for scenes)
    classes       folder only: what a classes.yaml would say (names, mapping, images, ...), which is not read then.
                  None: that file, or without one what folders, lists and masks tell. A run keeps here what they told
    sbd_root      folder of SBD, for VOC's split train_aug; None: beside VOCdevkit
    train_split, val_split   which parts to train on and to validate on, as the data set calls them
    train_share   of the training images, evenly spread: what would fewer labels do?
    crop          (height, width) of a training crop; larger than an image is fine, it is padded
    scales        random scale factors; flip, colour: mirroring, and strength of the colour augmentation
    batch_size    of each process; a step has batch_size * processes * recipe.accumulate images
    workers       loader processes; 0 loads in the training process
    cache         a folder that keeps the decoded training images, 3 bytes a pixel, on a local disk; pays for large PNGs
    image_size, preset, train_images, val_images   scenes only: size (height, width), scale of things
                  (large, small, mixed, or varied: these in turn), how many (val_images of the split test, too)
    seed          scenes only: which images are drawn; None takes the run's seed
    """

    name: Literal["scenes", "camvid", "cityscapes", "voc", "ade20k", "folder"] = "scenes"
    root: str | None = None
    classes: dict[str, Any] | None = None
    sbd_root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    train_share: float = 1.0
    crop: tuple[int, int] = (128, 256)
    scales: list[float] | None = None
    flip: bool = True
    colour: float = 0.3
    batch_size: int = 8
    workers: int = 1
    cache: str | None = None
    image_size: tuple[int, int] = (128, 256)
    preset: scenes.Preset = "varied"
    train_images: int = 1000
    val_images: int = 100
    seed: int | None = None

    def __post_init__(self) -> None:
        for key in ("batch_size", "train_images", "val_images"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key} is {getattr(self, key)}: it must be at least 1")
        if not 0 < self.train_share <= 1:
            raise ValueError(f"data.train_share is {self.train_share}: it must be above 0, and at most 1")
        if self.workers < 0:
            raise ValueError(f"data.workers is {self.workers}: it must not be negative")
        for key in ("crop", "image_size"):
            if min(getattr(self, key)) < 32:
                raise ValueError(f"data.{key} is {getattr(self, key)}: both sides must be at least 32")
        if self.scales is not None and (not self.scales or min(self.scales) <= 0):
            raise ValueError(f"data.scales is {self.scales}: give positive factors")


def pair(size: Sequence[int]) -> tuple[int, int]:
    """A size as the tuple (height, width), also if it was given as a list."""
    height, width = size
    return height, width


class Scenes:
    """Procedural street scenes; an image is drawn once and kept."""

    def __init__(self, seed: int, count: int, size: tuple[int, int], preset: str) -> None:
        self.classes = Classes(scenes.CLASSES, scenes.PALETTE)
        self.seed, self.count, self.size, self.preset = seed, count, size, preset
        self.skips = SkipLog(count)
        self._drawn: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{scenes.preset_of(self.preset, index)}_{index:05d}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index not in self._drawn:
            self._drawn[index] = scenes.draw_scene(self.seed, index, self.size, self.preset)
        return self._drawn[index]


def known_classes(config: DataConfig, say: Callable[[str], None] = lambda line: None) -> DataConfig:
    """The configuration with what a classes.yaml would say of a folder, if there is none.

    say  takes lines that tell what was found, or that a classes.yaml is not read
    Raises UnclearMasks if the masks tell no classes.
    """
    if config.name != "folder" or config.root is None:
        return config
    root = expand_user(config.root)
    if config.classes is not None:
        if describing_file(root).is_file():
            say(
                f"{describing_file(root)} is not read: data.classes of the configuration says what the classes are "
                "(--data.classes null: the file does)"
            )
        return config
    if describing_file(root).is_file():
        about = read_description(describing_file(root))
        if about.said:
            say(printable(f"{root}: {about.said}"))
        return config
    found = undescribed(root)
    if found is None:
        return config
    for line in found.lines:
        say(printable(line))
    return replace(config, classes=found.description)


def open_data(config: DataConfig, split: str, seed: int = 0, left_out: list[LeftOut] | None = None) -> SegmentationData:
    """The split (train, val or test) of the data set that the configuration names.

    left_out  takes files that make no image, for a report; without it they are a ValueError
    """
    if config.name == "scenes":
        if split not in SEED_OFFSETS:
            raise no_split("scenes", split, tuple(SEED_OFFSETS))
        seed = seed if config.seed is None else config.seed
        return Scenes(
            seed + SEED_OFFSETS[split],
            config.train_images if split == "train" else config.val_images,
            pair(config.image_size),
            config.preset,
        )
    if config.root is None:
        raise ValueError(f"data.root is not set: give the folder of the {config.name} data with --data.root FOLDER")
    root = expand_user(config.root)
    if config.name == "voc":
        return voc.open_voc(root, split, None if config.sbd_root is None else expand_user(config.sbd_root), left_out)
    if config.name == "folder":
        return open_folder(root, split, config.classes, left_out)
    open_layout = {
        "ade20k": ade20k.open_ade20k,
        "camvid": camvid.open_camvid,
        "cityscapes": cityscapes.open_cityscapes,
    }[config.name]
    return open_layout(root, split, left_out)


LAYOUTS = {  # what a folder has, one of these, if its images lie in a layout of this name; and the classes of it
    "camvid": (("trainannot",), camvid.CLASSES),
    "cityscapes": (("leftImg8bit",), cityscapes.CLASSES),
    "voc": (("VOCdevkit/VOC2012", "VOC2012", "JPEGImages/20[01][0-9]_[0-9][0-9][0-9][0-9][0-9][0-9].jpg"), voc.CLASSES),
    "ade20k": (("ADEChallengeData2016", "images/training/ADE_*"), ade20k.CLASSES),
}


def layout_of(root: Path) -> str:
    """The name of the layout in which a folder's images lie, or of a YAML that describes them.

    What somebody wrote down, a classes.yaml or the classes of a labelling tool, goes before the names of folders.
    Raises ValueError, with a remedy if it knows one, if it is none that is known.
    """
    if not root.exists():
        raise ValueError(f"no folder {root}: give the folder of your images")
    if describing_file(root).is_file() and not is_archive(root):
        return "folder"
    if known := _known_layout(root):
        return known
    inside = root
    while len(below := [path for path in inside.glob("*/") if not path.name.startswith(".")]) == 1:
        (inside,) = below
        if describing_file(inside).is_file() or _known_layout(inside):
            raise ValueError(f"{root} holds a data set in {inside.relative_to(root)}/: give {inside}")
    if find_places(root) is None:
        raise ValueError(f"{root} {what_it_lacks(root)}")
    return "folder"


def _known_layout(root: Path) -> str | None:
    """The layout whose signs a folder has, unless a list of other classes lies in it."""
    for name, (signs, classes) in LAYOUTS.items():
        for found in (next(root.glob(sign), None) for sign in signs):
            if found is not None:
                if describing_file(found if found.is_dir() else root).is_file():
                    return None
                listed = find_class_list(root) or find_class_list(found if found.is_dir() else root)
                return name if listed is None or _objects(listed.names) == _objects(classes.names) else None
    return None


def _objects(names: Sequence[str]) -> list[str]:
    return [name.lower() for name in names if name.lower() != BACKGROUND]
