"""Images with one label each, to pre-train on: a tree of class folders (as ImageNet's), or tar shards (see shards.py).

Batch number n is a pure function of (seed, n) for a tree, of (seed, n, number of readers) for shards. Unreadable
images are counted; in training one of the others takes their place, so that batches keep their size.

Legend: B images, h, w size of a crop.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from routeseg.data.crops import CentreCrop, RandomResizedCrop
from routeseg.data.datamodule import NORM_STREAM, TRAIN_STREAM, StepSampler, image_tensor, one_thread
from routeseg.data.pairs import SKIPS_NAMED, UnreadableImage, read_image
from routeseg.data.sets.roots import expected
from routeseg.data.shards import Sample, ShuffledShards, find_shards, read_shard
from routeseg.data.tools.registration import IMAGENET_TREE
from routeseg.files import expand_user

SUFFIXES = (".jpeg", ".jpg", ".png")

Batch = dict[str, Tensor]  # image uint8 [B,3,h,w], label int64 [B], skipped int64 []: how many were left out
Item = tuple[np.ndarray, int] | None  # a crop uint8 [h,w,3] and its label; None: unreadable


@dataclass
class ClassificationConfig:
    """The `data` section of a configuration of `routeseg pretrain`; the defaults are the usual ones for ImageNet.

    root          folder of the data set
    train_split, val_split   sub-folders of it, with one folder for each class; or tar shards:
                  train-{000000..000146}.tar, train-*.tar, or URLs, with KEY.jpg and KEY.cls (or KEY.json) in them
    num_classes   shards only (a tree has its folders): labels are 0 to num_classes - 1
    crop          side of the square that the network sees
    resize        evaluation: the shorter side, before the square in the middle is cut out
    area, aspect  training: a crop of this share of the image, and of this width / height, is resized to the square
    flip, colour  mirroring, and strength of the colour augmentation
    batch_size    per process
    workers       loader processes; 0 loads in the training process
    buffer        shards only: training images are mixed within a buffer of so many
    """

    root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    num_classes: int | None = None
    crop: int = 224
    resize: int = 256
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (0.75, 4 / 3)
    flip: bool = True
    colour: float = 0.4
    batch_size: int = 32
    workers: int = 4
    buffer: int = 1000

    def __post_init__(self) -> None:
        for key in ("batch_size", "buffer"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key} is {getattr(self, key)}: it must be at least 1")
        if self.workers < 0:
            raise ValueError(f"data.workers is {self.workers}: it must not be negative")
        if self.crop < 32:
            raise ValueError(f"data.crop is {self.crop}: it must be at least 32")
        if self.resize < self.crop:
            raise ValueError(f"data.resize is {self.resize}: the crop of {self.crop} does not fit in")
        if self.num_classes is not None and self.num_classes < 2:
            raise ValueError(f"data.num_classes is {self.num_classes}: there is nothing to tell apart")
        for key, top in (("area", 1.0), ("aspect", float("inf"))):
            low, high = getattr(self, key)
            if not 0 < low <= high <= top:
                raise ValueError(f"data.{key} is {[low, high]}: give [least, greatest], both positive")

    @property
    def is_tree(self) -> bool:
        return ".tar" not in self.train_split


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
    found = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(SUFFIXES))
    if not found:
        raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)}): add some, or remove the folder")
    return found


def collate(items: Sequence[Item]) -> Batch:
    """A batch for evaluation: unreadable images are left out, and it may be empty."""
    found = [item for item in items if item is not None]
    return {
        "image": torch.stack([image_tensor(image) for image, _ in found]) if found else torch.empty(0, 3, 0, 0),
        "label": torch.tensor([label for _, label in found], dtype=torch.int64),
        "skipped": torch.tensor(len(items) - len(found)),
    }


def collate_training(items: Sequence[Item]) -> Batch:
    """A batch for training, always of the same size: for each unreadable image, one of the others comes again.

    Raises ValueError if no image of the batch can be read.
    """
    found = [item for item in items if item is not None]
    if not found:
        raise ValueError(f"{len(items)} unreadable images in a batch, and no other: check the data set's files")
    missing = len(items) - len(found)
    again = [found[i % len(found)] for i in range(missing)]
    return collate([*found, *again]) | {"skipped": torch.tensor(missing)}


class SkipLog:
    """Names unreadable images on the log: each once, and SKIPS_NAMED of a loader process at most."""

    def __init__(self) -> None:
        self.named: set[str] = set()

    def __call__(self, error: UnreadableImage) -> None:
        if str(error) in self.named or len(self.named) > SKIPS_NAMED:
            return
        self.named.add(str(error))
        more = len(self.named) > SKIPS_NAMED
        logging.getLogger("routeseg").warning("skipped: %s", "more unreadable images" if more else error)


class TreeImages(Dataset[Item]):
    """Crops of a tree. For training an item is asked for by (position in the run, index), for evaluation by index."""

    def __init__(self, tree: ImageTree, crop: RandomResizedCrop | CentreCrop, key: tuple[int, int] = (0, 0)) -> None:
        self.tree, self.crop, self.key = tree, crop, key
        self.skips = SkipLog()

    def __len__(self) -> int:
        return len(self.tree)

    def __getitem__(self, item: tuple[int, int] | int) -> Item:
        position, index = item if isinstance(item, tuple) else (0, item)
        try:
            image, label = self.tree.read(index)
        except UnreadableImage as error:
            self.skips(error)
            return None
        if isinstance(self.crop, CentreCrop):
            return self.crop(image), label
        return self.crop(image, np.random.default_rng([*self.key, position])), label


class ShardBatches(IterableDataset[Batch]):
    """Batches of shards, of the processes and loader workers that share them.

    With a `ShuffledShards`: the endless training stream from batch `first` on, `total` in all; with a list of shards:
    each sample once.
    """

    def __init__(
        self,
        source: ShuffledShards | list[str],
        crop: RandomResizedCrop | CentreCrop,
        num_classes: int,
        batch_size: int,
        total: int = 0,
        first: int = 0,
        key: tuple[int, int] = (0, 0),
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.source, self.crop, self.num_classes, self.batch_size = source, crop, num_classes, batch_size
        self.total, self.first, self.key, self.rank, self.world = total, first, key, rank, world
        self.skips = SkipLog()

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        readers = self.world * workers
        if isinstance(self.source, list):
            yield from self._once(self.source[self.rank * workers + worker :: readers])
            return
        # The loader takes batches from its workers in turn, so that worker w of a resumed run gives batch first + w.
        number = self.first + worker
        reader = self.rank * workers + number % workers
        stream = self.source.samples(reader, readers, skip=number // workers * self.batch_size)
        for _ in range(number, self.total, workers):
            yield collate_training([self._item(*next(stream)) for _ in range(self.batch_size)])

    def _once(self, shards: Sequence[str]) -> Iterator[Batch]:
        items: list[Item] = []
        for sample in (sample for shard in shards for sample in read_shard(shard)):
            items.append(self._item(0, sample))
            if len(items) == self.batch_size:
                yield collate(items)
                items = []
        if items:
            yield collate(items)

    def _item(self, epoch: int, sample: Sample) -> Item:
        label = sample.label(self.num_classes)
        try:
            image = sample.image()
        except UnreadableImage as error:
            self.skips(error)
            return None
        if isinstance(self.crop, CentreCrop):
            return self.crop(image), label
        return self.crop(image, np.random.default_rng([*self.key, epoch, *sample.place])), label


class ClassificationDataModule(LightningDataModule):
    """Loaders for training (from step `first_step` on), validation and precise BatchNorm.

    The `accumulate` batches of a training step come as one.
    Raises ValueError for a data set that is missing, incomplete, or of another layout.
    """

    def __init__(
        self,
        config: ClassificationConfig,
        iterations: int,
        seed: int = 0,
        first_step: int = 0,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.config, self.iterations, self.seed, self.first_step = config, iterations, seed, first_step
        self.accumulate = accumulate
        self.train_source, self.val_source, self.classes = open_sources(config)
        self.augmentation = RandomResizedCrop(config.crop, config.area, config.aspect, config.flip, config.colour)
        self.centre = CentreCrop(config.resize, config.crop)

    def train_dataloader(self) -> DataLoader:
        images = self.config.batch_size * self.accumulate
        return self._training(self.seed, TRAIN_STREAM, images, self.iterations, self.first_step, self.config.workers)

    def norm_dataloader(self, step: int, batches: int) -> DataLoader:
        """Augmented batches to estimate BatchNorm's statistics from, a function of (seed, step), shared out among the
        processes."""
        batches = -(-batches // self._rank()[1])
        return self._training(self.seed + step + 1, NORM_STREAM + step, self.config.batch_size, batches)

    def val_dataloader(self) -> DataLoader:
        """Every image once, over all processes."""
        rank, world = self._rank()
        size, workers = self.config.batch_size, self.config.workers
        if isinstance(self.val_source, ImageTree):
            images = TreeImages(self.val_source, self.centre)
            here = range(rank, len(images), world)
            return _loader(images, workers, [here[i : i + size] for i in range(0, len(here), size)], collate)
        shards = ShardBatches(self.val_source, self.centre, len(self.classes), size, rank=rank, world=world)
        return _loader(shards, min(workers, len(self.val_source)))

    def _training(
        self, seed: int, stream: int, images: int, total: int, first: int = 0, workers: int = 0
    ) -> DataLoader:
        """Augmented batches first, first + 1, ..., total - 1 of so many images of this process."""
        rank, world = self._rank()
        key = (self.seed, stream)
        if isinstance(self.train_source, ImageTree):
            sampler = StepSampler(len(self.train_source), images, total, seed, first, rank, world)
            return _loader(TreeImages(self.train_source, self.augmentation, key), workers, sampler, collate_training)
        readers = world * max(workers, 1)
        if readers > len(self.train_source):
            raise ValueError(
                f"{len(self.train_source)} training shards for {readers} readers ({world} processes of "
                f"{max(workers, 1)} loader workers): each needs at least one. Set --data.workers lower, or make more "
                "and smaller shards"
            )
        source = ShuffledShards(self.train_source, seed, self.config.buffer)
        batches = ShardBatches(source, self.augmentation, len(self.classes), images, total, first, key, rank, world)
        return _loader(batches, workers)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def open_sources(config: ClassificationConfig) -> tuple[ImageTree | list[str], ImageTree | list[str], tuple[str, ...]]:
    """The training images, the validation images, and the names of the classes."""
    if config.is_tree != (".tar" not in config.val_split):
        raise ValueError(
            f"data.train_split is {config.train_split}, data.val_split {config.val_split}: give two folders, or shards "
            "(.tar) for both"
        )
    if not config.is_tree:
        train, val = (find_shards(split, config.root) for split in (config.train_split, config.val_split))
        if config.num_classes is None:
            raise ValueError(
                "tar shards do not say how many classes there are: set --data.num_classes (ImageNet: 1000)"
            )
        return train, val, tuple(f"class {k}" for k in range(config.num_classes))
    if config.root is None:
        raise ValueError(
            f"data.root is not set: give the folder of the images with --data.root FOLDER; {expected(IMAGENET_TREE)}"
        )
    root = expand_user(config.root)
    train_tree, val_tree = ImageTree(root / config.train_split), ImageTree(root / config.val_split)
    for name in sorted(set(train_tree.classes) ^ set(val_tree.classes)):
        has, lacks = (train_tree, val_tree) if name in train_tree.classes else (val_tree, train_tree)
        raise ValueError(f"{has.folder} has the class {name}, {lacks.folder} has not; {expected(IMAGENET_TREE)}")
    if config.num_classes not in (None, len(train_tree.classes)):
        raise ValueError(
            f"data.num_classes is {config.num_classes}, {train_tree.folder} has {len(train_tree.classes)} classes: "
            "leave it out"
        )
    return train_tree, val_tree, train_tree.classes


def _loader(
    dataset: Dataset[Any],
    workers: int,
    batch_sampler: Any = None,
    collate_fn: Callable[[Sequence[Item]], Batch] | None = None,
) -> DataLoader:
    """Without a sampler the data set makes its own batches."""
    return DataLoader(
        dataset,
        batch_size=None if batch_sampler is None else 1,
        batch_sampler=batch_sampler,
        collate_fn=collate_fn,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=one_thread if workers else None,
    )
