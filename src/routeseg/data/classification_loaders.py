"""Batches of images that have one label each (classification.py).

Batch number n is a pure function of (seed, n) for a tree, of (seed, n, number of readers) for shards. Unreadable
images are counted; in training one of the others takes their place, so that batches keep their size.

Legend: B images, h, w size of a crop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from routeseg.data.classification import ClassificationConfig, ImageTree, open_sources
from routeseg.data.crops import CentreCrop, RandomResizedCrop
from routeseg.data.loaders import NORM_STREAM, TRAIN_STREAM, StepSampler, image_tensor, loader_process
from routeseg.data.pairs import SKIPS_NAMED, UnreadableImage
from routeseg.data.shards import Sample, ShuffledShards, read_shard

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
        worker_init_fn=loader_process if workers else None,
    )
