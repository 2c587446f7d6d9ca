"""Images with one label each, to pre-train on: a tree of class folders, as ImageNet's. No torch here; their batches:
classification_loaders.py."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from routeseg.data.decoding import IMAGE_SUFFIXES, read_image
from routeseg.data.sets.roots import expected
from routeseg.data.tools.registration import IMAGENET_TREE
from routeseg.files import expand_user


@dataclass
class ClassificationConfig:
    """The `data` section of a configuration of `routeseg pretrain`; the defaults are the usual ones for ImageNet.

    root          folder of the data set
    train_split, val_split   sub-folders of it, with one folder for each class
    crop          side of the square that the network sees
    resize        evaluation: the shorter side, before the square in the middle is cut out
    area, aspect  training: a crop of this share of the image, and of this width / height, is resized to the square
    flip, colour  mirroring, and strength of the colour augmentation
    batch_size    per process
    workers       loader processes; 0 loads in the training process
    """

    root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    crop: int = 224
    resize: int = 256
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (0.75, 4 / 3)
    flip: bool = True
    colour: float = 0.4
    batch_size: int = 32
    workers: int = 4

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size is {self.batch_size}: it must be at least 1")
        if self.workers < 0:
            raise ValueError(f"data.workers is {self.workers}: it must not be negative")
        if self.crop < 32:
            raise ValueError(f"data.crop is {self.crop}: it must be at least 32")
        if self.resize < self.crop:
            raise ValueError(f"data.resize is {self.resize}: the crop of {self.crop} does not fit in")
        for key, top in (("area", 1.0), ("aspect", float("inf"))):
            low, high = getattr(self, key)
            if not 0 < low <= high <= top:
                raise ValueError(f"data.{key} is {[low, high]}: give [least, greatest], both positive")


class ImageTree:
    """The images of FOLDER/CLASS/: `classes` are the sorted names of the sub-folders.

    Names are kept in arrays, not as objects: a million of them, in every loader process.
    Raises ValueError if there are no classes, only one, or one without images.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}; {expected(IMAGENET_TREE)}")
        self.folder = folder
        self.classes = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
        if len(self.classes) < 2:
            found = f"only one class, {self.classes[0]}" if self.classes else "no class folders"
            raise ValueError(f"{folder} has {found}; {expected(IMAGENET_TREE)}")
        names = [_images(folder / name) for name in self.classes]
        self.labels = np.repeat(np.arange(len(names), dtype=np.int32), [len(group) for group in names])
        self.names = np.array([os.fsencode(name) for group in names for name in group])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """-> image uint8 [H,W,3], label. Raises UnreadableImage."""
        label = int(self.labels[index])
        return read_image(self.folder / self.classes[label] / os.fsdecode(self.names[index])), label


def _images(folder: Path) -> list[str]:
    found = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(IMAGE_SUFFIXES))
    if not found:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}): add some, or remove the folder")
    return found


def open_trees(config: ClassificationConfig) -> tuple[ImageTree, ImageTree]:
    """The training images and the validation images, of the same classes.

    Raises ValueError for a data set that is missing, incomplete, or of another layout.
    """
    if config.root is None:
        raise ValueError(
            f"data.root is not set: give the folder of the images with --data.root FOLDER; {expected(IMAGENET_TREE)}"
        )
    root = expand_user(config.root)
    train, val = ImageTree(root / config.train_split), ImageTree(root / config.val_split)
    for name in sorted(set(train.classes) ^ set(val.classes)):
        has, lacks = (train, val) if name in train.classes else (val, train)
        raise ValueError(f"{has.folder} has the class {name}, {lacks.folder} has not; {expected(IMAGENET_TREE)}")
    return train, val
