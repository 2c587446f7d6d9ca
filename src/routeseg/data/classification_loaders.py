"""Batches of images that have one label each (classification.py).

Batch number n is a pure function of (seed, n). Unreadable images are counted; in training one of the others takes their
place, so that batches keep their size.

Legend: B images, h, w size of a crop.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from routeseg.data.classification import ClassificationConfig, ImageTree, open_trees
from routeseg.data.crops import CentreCrop, RandomResizedCrop
from routeseg.data.datamodule import RunData
from routeseg.data.decoding import UnreadableImage
from routeseg.data.loaders import NORM_STREAM, TRAIN_STREAM, StepSampler, image_tensor
from routeseg.data.pairs import SkipLog

Batch = dict[str, Tensor]  # image uint8 [B,3,h,w], label int64 [B], skipped int64 []: how many were left out
Item = tuple[np.ndarray, int] | None  # a crop uint8 [h,w,3] and its label; None: unreadable


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


class TreeImages(Dataset[Item]):
    """Crops of a tree. For training an item is asked for by (position in the run, index), for evaluation by index."""

    def __init__(self, tree: ImageTree, crop: RandomResizedCrop | CentreCrop, key: tuple[int, int] = (0, 0)) -> None:
        self.tree, self.crop, self.key = tree, crop, key
        self.skips = SkipLog(len(tree), remedy="")

    def __len__(self) -> int:
        return len(self.tree)

    def __getitem__(self, item: tuple[int, int] | int) -> Item:
        position, index = item if isinstance(item, tuple) else (0, item)
        try:
            image, label = self.tree.read(index)
        except UnreadableImage as error:
            self.skips(index, error)
            return None
        if isinstance(self.crop, CentreCrop):
            return self.crop(image), label
        return self.crop(image, np.random.default_rng([*self.key, position])), label


class ClassificationDataModule(RunData):
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
        self.train_tree, self.val_tree = open_trees(config)
        self.augmentation = RandomResizedCrop(config.crop, config.area, config.aspect, config.flip, config.colour)
        self.centre = CentreCrop(config.resize, config.crop)

    def train_dataloader(self) -> DataLoader:
        images = self.config.batch_size * self.accumulate
        return self._training(self.seed, TRAIN_STREAM, images, self.iterations, self.first_step, self.config.workers)

    def norm_dataloader(self, step: int, batches: int) -> DataLoader:
        """Augmented batches to estimate BatchNorm's statistics from, a function of (seed, step), shared out among the
        processes."""
        batches = -(-batches // self.processes()[1])
        return self._training(self.seed + step + 1, NORM_STREAM + step, self.config.batch_size, batches)

    def val_dataloader(self) -> DataLoader:
        """Every image once, over all processes."""
        rank, world = self.processes()
        size, workers = self.config.batch_size, self.config.workers
        images = TreeImages(self.val_tree, self.centre)
        here = range(rank, len(images), world)
        return self.batches(images, [here[i : i + size] for i in range(0, len(here), size)], workers, collate)

    def _training(
        self, seed: int, stream: int, images: int, total: int, first: int = 0, workers: int = 0
    ) -> DataLoader:
        """Augmented batches first, first + 1, ..., total - 1 of so many images of this process."""
        rank, world = self.processes()
        sampler = StepSampler(len(self.train_tree), images, total, seed, first, rank, world)
        source = TreeImages(self.train_tree, self.augmentation, (self.seed, stream))
        return self.batches(source, sampler, workers, collate_training)
