"""Labelled images in tar shards, in the naming of `webdataset`: KEY.jpg beside KEY.cls (or KEY.json).

A reader (one loader process of one training process) streams through its share of the shards. What it gives is a
function of (seed, reader, number of readers), so that a resumed run can pass over what it has seen. Samples of shards
are counted by their headers, and only the epoch that is due is read again.
"""

from __future__ import annotations

import functools
import glob
import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np

from routeseg.data.pairs import decode_image
from routeseg.errors import require
from routeseg.files import expand_user

IMAGE_KEYS = ("jpg", "jpeg", "png")
BLOCK = 512  # bytes of a block of a tar file
REMEMBERED = 4 * tarfile.RECORDSIZE  # tarfile reads a record at a time, and sees the end in the last or the one before
META = r"__[^/]*__($|/)"  # names that webdataset passes over
DAMAGED = (OSError, EOFError, ValueError, tarfile.TarError)  # what a damaged shard raises; ValueError: a name twice


@dataclass(frozen=True)
class Sample:
    """An image file and its label, as they lie in a shard: nothing is decoded yet. `place` is (shard, number in it)."""

    shard: str
    place: tuple[int, int]
    files: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.files['__key__']} in {self.shard}"

    def image(self) -> np.ndarray:
        """uint8 [H,W,3]. Raises UnreadableImage for a damaged one, ValueError if there is none."""
        for key in IMAGE_KEYS:
            if key in self.files:
                return decode_image(io.BytesIO(self.files[key]), self.name)
        raise ValueError(
            f"{self.name} has no image, only {', '.join(k for k in self.files if k[0] != '_')}: expected KEY.jpg or "
            "KEY.png, and KEY without a dot"
        )

    def label(self, num_classes: int) -> int:
        """From KEY.cls, a number as text, or KEY.json, a number or {"label": number}. Raises ValueError for others."""
        try:
            if "cls" in self.files:
                label = int(self.files["cls"])
            else:
                data = json.loads(self.files["json"])
                label = data["label"] if isinstance(data, dict) else data
                if not isinstance(label, int) or isinstance(label, bool):
                    raise ValueError(f"{label!r} is no whole number")
        except (KeyError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(
                f'{self.name} has no label ({reason}): expected KEY.cls with a number, or KEY.json with {{"label": '
                "number}"
            ) from error
        if not 0 <= label < num_classes:
            raise ValueError(
                f"{self.name} has the label {label}, outside 0..{num_classes - 1}: labels count from 0; set "
                "--data.num_classes to the number of classes"
            )
        return label


def find_shards(pattern: str, root: str | None) -> list[str]:
    """The shards of a pattern, such as train-{000000..000146}.tar or val-*.tar, below `root` if it is relative.

    Raises ValueError if it matches nothing, or if a file that it names does not exist.
    """
    _, shardlists = import_webdataset()
    if "://" in pattern:
        return list(shardlists.expand_urls(pattern))
    path = str(expand_user(root or ".") / expand_user(pattern))
    found: list[str] = []
    for name in shardlists.expand_urls(path):
        found += sorted(glob.glob(name)) if glob.has_magic(name) else [name]
    missing = [name for name in found if not Path(name).is_file()]
    if missing or not found:
        absent = f"{missing[0]} does not exist ({len(missing)} of {len(found)} shards)" if missing else "no such file"
        raise ValueError(
            f"no shards {path}: {absent}. Give a pattern such as train-{{000000..000146}}.tar or train-*.tar, relative "
            "to --data.root"
        )
    return found


def read_shard(shard: str, number: int = 0) -> Iterator[Sample]:
    """The samples of one shard, in their order.

    Raises ValueError, naming it, if it cannot be read, is damaged, ends before its end, or is empty.
    """
    tariterators, _ = import_webdataset()
    place = 0
    try:
        with fsspec.open(shard, "rb") as file:
            for files in tariterators.group_by_keys(_stream(_Watched(file), shard)):
                yield Sample(shard, (number, place), files)
                place += 1
    except DAMAGED as error:
        raise _damaged(shard, f"behind sample {place}", error) from error
    if not place:
        raise ValueError(f"the shard {shard} holds no samples: expected KEY.jpg and KEY.cls, or KEY.json")


def count_samples(shard: str) -> int:
    """How many samples `read_shard` gives, from the headers of the shard alone."""
    tariterators, _ = import_webdataset()
    try:
        with fsspec.open(shard, "rb") as file, tarfile.open(fileobj=file) as tar:
            entries = ({"fname": member.name, "data": b"", "__url__": shard} for member in tar if _is_data(member))
            return sum(1 for _ in tariterators.group_by_keys(entries))
    except DAMAGED as error:
        raise _damaged(shard, "somewhere", error) from error


def _stream(file: _Watched, shard: str) -> Iterator[dict[str, Any]]:
    """The files in a tar file, as webdataset hands them on. Raises tarfile.ReadError if it is damaged."""
    plain = shard.endswith(".tar")
    with tarfile.open(fileobj=file, mode="r|" if plain else "r|*") as tar:  # type: ignore[call-overload]
        for member in tar:
            if _is_data(member):
                content = tar.extractfile(member)
                assert content is not None
                yield {"fname": member.name, "data": content.read(), "__url__": shard}
            tar.members = []  # tarfile keeps the headers of all that it has seen
        # tarfile takes a damaged header, and a file that ends too early, for the end without a word.
        if plain and file.block(tar.offset) != bytes(BLOCK):
            raise tarfile.ReadError("no tar header, and no end, where one should be")


def _is_data(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not re.match(META, member.name)


def _damaged(shard: str, where: str, error: Exception) -> ValueError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else next(iter(error.args), error)
    return ValueError(f"the shard {shard} is damaged {where}: {reason}. Fetch it again, or take it out of the pattern")


@dataclass(frozen=True)
class ShuffledShards:
    """The endless training stream: every epoch in a new order of shards, and mixed within a buffer of samples.

    An epoch gives every sample of every shard to one of the readers, once.
    """

    shards: Sequence[str]
    seed: int
    buffer: int

    def samples(self, reader: int, readers: int, skip: int = 0) -> Iterator[tuple[int, Sample]]:
        """(epoch, sample) of one reader, from its sample number `skip` on."""
        epoch, counted = 0, functools.cache(count_samples)
        while skip:  # whole epochs are only counted
            size = sum(counted(self.shards[number]) for number in self._own(epoch, reader, readers))
            if skip < size:
                break
            skip, epoch = skip - size, epoch + 1
        while True:
            for sample in self._epoch(epoch, reader, readers):
                if skip:
                    skip -= 1
                else:
                    yield epoch, sample
            epoch += 1

    def _own(self, epoch: int, reader: int, readers: int) -> list[int]:
        """The shards that a reader reads in an epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))
        return [int(number) for number in order[reader::readers]]

    def _epoch(self, epoch: int, reader: int, readers: int) -> Iterator[Sample]:
        rng = np.random.default_rng([self.seed, epoch, reader])
        held: list[Sample] = []
        for number in self._own(epoch, reader, readers):
            for sample in read_shard(self.shards[number], number):
                if len(held) < self.buffer:
                    held.append(sample)
                    continue
                place = int(rng.integers(len(held)))
                held[place], sample = sample, held[place]
                yield sample
        for place in rng.permutation(len(held)):
            yield held[place]


class _Watched:
    """A file that remembers the last bytes that were read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.tail, self.position = file, b"", 0

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.tail = (self.tail + data)[-REMEMBERED:]
        self.position += len(data)
        return data

    def block(self, offset: int) -> bytes:
        """The block at this offset; shorter at the file's end."""
        start = offset - (self.position - len(self.tail))
        return self.tail[start : start + BLOCK] if start >= 0 else b""


def import_webdataset() -> tuple[Any, Any]:
    """webdataset's `tariterators` and `shardlists`. Raises ValueError, naming the extra, if it is missing."""
    tariterators, shardlists = (
        require(f"webdataset.{name}", "tars", "a set of tar shards") for name in ("tariterators", "shardlists")
    )
    return tariterators, shardlists
