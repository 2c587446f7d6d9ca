"""Images as tensors, and the order in which they come.

Batch number n is a pure function of (seed, n): a run that is interrupted goes on with the very batch that is due.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from routeseg.data.decoding import UnreadableImage
from routeseg.data.pairs import SegmentationData
from routeseg.data.transforms import Augmentation

TRAIN_STREAM, NORM_STREAM = 0, 1  # separate random streams: training batches, batches for precise BatchNorm
MAX_BAD_IN_A_ROW = 20


def image_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 [H,W,3] -> uint8 [3,H,W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class TrainingImages(Dataset[dict[str, Any]]):
    """Augmented images. An item is asked for by (position in the run, index), so that it depends on nothing else."""

    def __init__(self, data: SegmentationData, augmentation: Augmentation, seed: int, stream: int) -> None:
        self.data, self.augmentation, self.seed, self.stream = data, augmentation, seed, stream

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """image uint8 [3,h,w], labels int64 [h,w], skipped: how many unreadable images were passed over."""
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
            raise ValueError(f"{MAX_BAD_IN_A_ROW} unreadable images in a row: check the data set's files")
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


class EvaluationImages(Dataset[dict[str, Any]]):
    """Images as they are, for evaluation; for an unreadable one only `skipped` = 1 comes."""

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


def evaluation_loader(data: SegmentationData, workers: int = 0, rank: int = 0, world: int = 1) -> DataLoader:
    """Whole images of a data set, one at a time: image [1,3,H,W] uint8, labels [1,H,W] int64."""
    images = EvaluationImages(data, range(rank, len(data), world))
    return DataLoader(images, batch_size=None, num_workers=workers, worker_init_fn=loader_process if workers else None)


def _heed(parent: int) -> None:
    """Ends this process at a SIGTERM of its parent, and passes over those of others."""
    while (told := signal.sigwaitinfo({signal.SIGTERM})) and told.si_pid != parent:
        pass
    os._exit(0)


def loader_process(worker: int) -> None:
    """For `worker_init_fn`: a loader process uses one core, and leaves signals that go to the whole group to the one
    that it works for. If that one ends it, it ends: Python does so at its exit, and waits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_heed, args=(os.getppid(),), daemon=True).start()
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
