"""The loaders of a run, as Lightning takes them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from routeseg.data.cache import ImageCache
from routeseg.data.config import DataConfig, open_data, pair
from routeseg.data.loaders import (
    NORM_STREAM,
    TRAIN_STREAM,
    StepSampler,
    TrainingImages,
    evaluation_loader,
    loader_process,
)
from routeseg.data.pairs import PairedFiles
from routeseg.data.subset import CALIBRATION_IMAGES, LEAST_IMAGES, evenly_spread
from routeseg.data.transforms import Augmentation
from routeseg.files import expand_user
from routeseg.labels import Classes


class RunData(LightningDataModule):
    """What the loaders of all tasks share."""

    def processes(self) -> tuple[int, int]:
        """The number of this process, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    @staticmethod
    def batches(data: Dataset[Any], sampler: Any, workers: int, collate: Any = None) -> DataLoader:
        return DataLoader(
            data,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=loader_process if workers else None,
        )


class SegmentationDataModule(RunData):
    """Loaders for training (from step `first_step` on), validation and precise BatchNorm.

    The `accumulate` batches of a training step come as one. Which images a step has depends on their number over all
    processes and batches, not on how these share them.
    """

    def __init__(
        self, config: DataConfig, iterations: int, seed: int = 0, first_step: int = 0, accumulate: int = 1
    ) -> None:
        super().__init__()
        self.config, self.iterations, self.seed, self.first_step = config, iterations, seed, first_step
        self.accumulate, self.looks = accumulate, 1.0
        self.train_data = open_data(config, config.train_split, seed)
        self.val_data = open_data(config, config.val_split, seed)
        if config.cache is not None:
            if not isinstance(self.train_data, PairedFiles):
                raise ValueError(f"data.cache is for images in files, {config.name} has none: leave it out")
            self.train_data.read_pixels = ImageCache(expand_user(config.cache))
        self.train_data = evenly_spread(self.train_data, max(1, round(config.train_share * len(self.train_data))))
        scales = config.scales or list(Augmentation.scales)
        self.augmentation = Augmentation(pair(config.crop), scales, config.flip, config.colour)

    @property
    def classes(self) -> Classes:
        return self.train_data.classes

    def look_at(self, share: float) -> None:
        """Leaves this share of the images to validate and to calibrate with, evenly spread; some in any case."""
        self.looks = share
        self.val_data = evenly_spread(self.val_data, self._some(len(self.val_data)))

    def _some(self, count: int) -> int:
        return max(min(count, LEAST_IMAGES), round(self.looks * count))

    def train_dataloader(self) -> DataLoader:
        rank, world = self.processes()
        images = self.config.batch_size * self.accumulate
        sampler = StepSampler(len(self.train_data), images, self.iterations, self.seed, self.first_step, rank, world)
        return self._batches(sampler, TRAIN_STREAM, self.config.workers)

    def val_dataloader(self) -> DataLoader:
        """Whole images, one at a time, each once over all processes."""
        rank, world = self.processes()
        return evaluation_loader(self.val_data, self.config.workers, rank, world)

    def norm_dataloader(self, step: int, batches: int) -> DataLoader:
        """Augmented batches to estimate BatchNorm's statistics from, a function of (seed, step), shared out among the
        processes."""
        rank, world = self.processes()
        batches = -(-batches // world)
        sampler = StepSampler(
            len(self.train_data), self.config.batch_size, batches, self.seed + step + 1, 0, rank, world
        )
        return self._batches(sampler, NORM_STREAM + step, self.config.workers)

    def calibration_dataloader(self, part: Literal["train", "val"], count: int = CALIBRATION_IMAGES) -> DataLoader:
        """At most so many images as they are, one at a time, each once over all processes: to calibrate with. If
        there are too few for validation, the training images serve."""
        rank, world = self.processes()
        enough = part == "val" and len(self.val_data) >= LEAST_IMAGES
        data, looks = (self.val_data, 1.0) if enough else (self.train_data, self.looks)  # those are fewer already
        images = evenly_spread(data, min(count, len(data)) if looks == 1 else self._some(min(count, len(data))))
        return evaluation_loader(images, self.config.workers, rank, world)

    def _batches(self, sampler: StepSampler, stream: int, workers: int) -> DataLoader:
        return self.batches(TrainingImages(self.train_data, self.augmentation, self.seed, stream), sampler, workers)
