"""The data of a run: which data set, how its pictures are augmented, and in which order they come.

Batch number n is a pure function of (seed, n): a run that is interrupted goes on with the very batch that is due.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from routeseg.data import scenes
from routeseg.data.cache import ImageCache
from routeseg.data.pairs import PairedFiles, SegmentationData, SkipLog, UnreadableImage
from routeseg.data.sets.ade20k import open_ade20k
from routeseg.data.sets.camvid import open_camvid
from routeseg.data.sets.cityscapes import open_cityscapes
from routeseg.data.sets.folder import open_folder
from routeseg.data.sets.roots import no_split
from routeseg.data.sets.voc import open_voc
from routeseg.data.transforms import Augmentation
from routeseg.files import expand_user
from routeseg.labels import Classes

TRAIN_STREAM, NORM_STREAM = 0, 1  # separate random streams: training batches, batches for precise BatchNorm
VALIDATION_SEED_OFFSET = 1_000_003  # scenes: the validation pictures are drawn from another seed
MAX_BAD_IN_A_ROW = 20


@dataclass
class DataConfig:
    """The `data` section of a configuration.

    name          scenes (procedural, no download), camvid, cityscapes, voc, ade20k, or folder (your own pictures);
                  what each expects is in docs/data.md
    root          folder of the data set (not for scenes)
    sbd_root      folder of SBD, for VOC's split train_aug; None: beside VOCdevkit
    train_split, val_split   which parts to train on and to validate on, as the data set calls them
    crop          (height, width) of a training crop; larger than a picture is fine, it is padded
    scales        random scale factors; flip, colour: mirroring, and strength of the colour augmentation
    batch_size    of each process; a step has batch_size * processes * recipe.accumulate images
    workers       loader processes; 0 loads in the training process
    cache         a folder that keeps the decoded training images, 3 bytes a pixel, on a local disk; pays for large PNGs
    image_size, preset, train_images, val_images   scenes only: size (height, width), scale preset, how many
    seed          scenes only: which pictures are drawn; None takes the run's seed
    """

    name: Literal["scenes", "camvid", "cityscapes", "voc", "ade20k", "folder"] = "scenes"
    root: str | None = None
    sbd_root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    crop: tuple[int, int] = (128, 256)
    scales: list[float] | None = None
    flip: bool = True
    colour: float = 0.3
    batch_size: int = 8
    workers: int = 1
    cache: str | None = None
    image_size: tuple[int, int] = (128, 256)
    preset: scenes.Preset = "mixed"
    train_images: int = 1000
    val_images: int = 100
    seed: int | None = None

    def __post_init__(self) -> None:
        for key in ("batch_size", "train_images", "val_images"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key} is {getattr(self, key)}: it must be at least 1")
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
    """Procedural street scenes; a picture is drawn once and kept."""

    def __init__(self, seed: int, count: int, size: tuple[int, int], preset: str) -> None:
        self.classes = Classes(scenes.CLASSES, scenes.PALETTE)
        self.seed, self.count, self.size, self.preset = seed, count, size, preset
        self.skips = SkipLog(count)
        self._drawn: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{self.preset}_{index:05d}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index not in self._drawn:
            self._drawn[index] = scenes.draw_scene(self.seed, index, self.size, self.preset)
        return self._drawn[index]


def open_data(config: DataConfig, split: str, seed: int = 0) -> SegmentationData:
    """The split (train, val or test) of the data set that the configuration names."""
    if config.name == "scenes":
        if split not in ("train", "val", "test"):
            raise no_split("scenes", split, ("train", "val", "test"))
        train = split == "train"
        seed = seed if config.seed is None else config.seed
        return Scenes(
            seed if train else seed + VALIDATION_SEED_OFFSET,
            config.train_images if train else config.val_images,
            pair(config.image_size),
            config.preset,
        )
    if config.root is None:
        raise ValueError(f"data.root is not set: give the folder of the {config.name} data with --data.root FOLDER")
    root = expand_user(config.root)
    if config.name == "voc":
        return open_voc(root, split, None if config.sbd_root is None else expand_user(config.sbd_root))
    readers = {"camvid": open_camvid, "cityscapes": open_cityscapes, "ade20k": open_ade20k, "folder": open_folder}
    return readers[config.name](root, split)


def image_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 [H,W,3] -> uint8 [3,H,W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class TrainingPictures(Dataset[dict[str, Any]]):
    """Augmented pictures. An item is asked for by (position in the run, index), so that it depends on nothing else."""

    def __init__(self, data: SegmentationData, augmentation: Augmentation, seed: int, stream: int) -> None:
        self.data, self.augmentation, self.seed, self.stream = data, augmentation, seed, stream

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """image uint8 [3,h,w], labels int64 [h,w], skipped: how many unreadable pictures were passed over."""
        position, index = key
        rng = np.random.default_rng([self.seed, self.stream, position])
        for skipped in range(MAX_BAD_IN_A_ROW):
            try:
                place = (index + skipped) % len(self.data)
                image, labels = self.data.read(place)
                break
            except UnreadableImage as error:
                self.data.skips(place, error)
        else:
            raise ValueError(f"{MAX_BAD_IN_A_ROW} unreadable pictures in a row: check the data set's files")
        image, labels = self.augmentation(image, labels, rng)
        return {
            "image": image_tensor(image),
            "labels": torch.from_numpy(labels.astype(np.int64)),
            "skipped": skipped,
        }


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches first, first + 1, ..., total - 1 of an endless, seeded, epoch-wise shuffle, for one of `world` processes.

    A batch is a list of (position in the run, index). `len` is the total, also if the sampler starts later.
    """

    def __init__(
        self, size: int, batch_size: int, total: int, seed: int, first: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        self.size, self.batch_size, self.total, self.seed = size, batch_size, total, seed
        self.first, self.rank, self.world = first, rank, world

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first, self.total):
            batch = []
            for slot in range(self.batch_size):
                position = (step * self.world + self.rank) * self.batch_size + slot
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
                batch.append((position, int(order[position % self.size])))
            yield batch


class EvaluationPictures(Dataset[dict[str, Any]]):
    """Pictures as they are, for evaluation; for an unreadable one only `skipped` = 1 comes."""

    def __init__(self, data: SegmentationData, indices: range) -> None:
        self.data, self.indices = data, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> dict[str, Any]:
        index = self.indices[item]
        try:
            image, labels = self.data.read(index)
        except UnreadableImage as error:
            self.data.skips(index, error)
            return {"skipped": 1}
        return {
            "image": image_tensor(image)[None],
            "labels": torch.from_numpy(labels.astype(np.int64))[None],
            "name": self.data.name(index),
            "skipped": 0,
        }


class SegmentationDataModule(LightningDataModule):
    """Loaders for training (from step `first_step` on), validation and precise BatchNorm.

    The `accumulate` batches of a training step come as one. Which images a step has depends on their number over all
    processes and batches, not on how these share them.
    """

    def __init__(
        self, config: DataConfig, iterations: int, seed: int = 0, first_step: int = 0, accumulate: int = 1
    ) -> None:
        super().__init__()
        self.config, self.iterations, self.seed, self.first_step = config, iterations, seed, first_step
        self.accumulate = accumulate
        self.train_data = open_data(config, config.train_split, seed)
        self.val_data = open_data(config, config.val_split, seed)
        if config.cache is not None:
            if not isinstance(self.train_data, PairedFiles):
                raise ValueError(f"data.cache is for images in files, {config.name} has none: leave it out")
            self.train_data.read_pixels = ImageCache(expand_user(config.cache))
        scales = config.scales or list(Augmentation.scales)
        self.augmentation = Augmentation(pair(config.crop), scales, config.flip, config.colour)

    @property
    def classes(self) -> Classes:
        return self.train_data.classes

    def train_dataloader(self) -> DataLoader:
        rank, world = self._rank()
        images = self.config.batch_size * self.accumulate
        sampler = StepSampler(len(self.train_data), images, self.iterations, self.seed, self.first_step, rank, world)
        return self._batches(sampler, TRAIN_STREAM, self.config.workers)

    def val_dataloader(self) -> DataLoader:
        """Whole pictures, one at a time, each once over all processes."""
        rank, world = self._rank()
        return evaluation_loader(self.val_data, self.config.workers, rank, world)

    def norm_dataloader(self, step: int, batches: int) -> DataLoader:
        """Augmented batches to estimate BatchNorm's statistics from, a function of (seed, step), shared out among the
        processes."""
        rank, world = self._rank()
        batches = -(-batches // world)
        sampler = StepSampler(
            len(self.train_data), self.config.batch_size, batches, self.seed + step + 1, 0, rank, world
        )
        return self._batches(sampler, NORM_STREAM + step, self.config.workers)

    def _batches(self, sampler: StepSampler, stream: int, workers: int) -> DataLoader:
        pictures = TrainingPictures(self.train_data, self.augmentation, self.seed, stream)
        return DataLoader(
            pictures,
            batch_sampler=sampler,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=one_thread if workers else None,
        )

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def evaluation_loader(data: SegmentationData, workers: int = 0, rank: int = 0, world: int = 1) -> DataLoader:
    """Whole pictures of a data set, one at a time: image [1,3,H,W] uint8, labels [1,H,W] int64."""
    pictures = EvaluationPictures(data, range(rank, len(data), world))
    return DataLoader(pictures, batch_size=None, num_workers=workers, worker_init_fn=one_thread if workers else None)


def one_thread(worker: int) -> None:
    """For `worker_init_fn`: a loader process uses one core."""
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
