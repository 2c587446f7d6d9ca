"""Pairs of image and label files, and how they are found.

Every data set of files is a list of `Pair` and a `LabelMap`; the module of a layout only says where its files lie
and what their values mean.

Legend: image uint8 [H,W,3] RGB, labels uint8 [H,W] with IGNORE where there is none.
"""

from __future__ import annotations

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray, RawValue
from pathlib import Path, PurePath
from typing import Protocol

import numpy as np

from routeseg.data.decoding import IMAGE_SUFFIXES, UnreadableImage, read_image
from routeseg.data.label_files import LabelMap, read_label_file
from routeseg.errors import CONTROL
from routeseg.labels import IGNORE, Classes

log = logging.getLogger("routeseg")
SKIPS_NAMED = 10  # unreadable images of a data set that the log names; of the others it only says that there are some


class SkipLog:
    """Says on the log which unreadable images of a data set were skipped: each once, and SKIPS_NAMED at most.

    remedy  what is said once there are more
    What was said is shared with the loader processes of this process, so that no two of them name the same image.
    """

    def __init__(self, images: int, remedy: str = "; `routeseg check-data` names them") -> None:
        self._skipped, self._count, self.remedy = RawArray("B", images), RawValue("L"), remedy

    def __call__(self, index: int, error: UnreadableImage) -> None:
        if self._skipped[index]:
            return
        self._skipped[index] = 1
        self._count.value += 1
        count = self._count.value
        if count <= SKIPS_NAMED:
            log.warning("skipped: %s", error)
        elif count == SKIPS_NAMED + 1:
            log.warning("skipped: more unreadable files%s", self.remedy)


class SegmentationData(Protocol):
    """What a data set is: classes, a length, and pairs of image and labels.

    skips  is told of every unreadable image that is skipped
    """

    classes: Classes
    skips: SkipLog

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """-> image uint8 [H,W,3], labels uint8 [H,W]. Raises UnreadableImage, or ValueError for wrong labels."""
        ...

    def name(self, index: int) -> str:
        """A name for reports."""
        ...


@dataclass(frozen=True)
class Pair:
    """One image: its name in reports, its image file, and its label file (None: it has none, as in a test split)."""

    name: str
    image: Path
    labels: Path | None


class PairedFiles:
    """Images and labels of a list of files.

    label_map   what label values mean
    read_values  how a label file is read, if it is no image: Path -> integers [H,W]

    `read_pixels`, Path -> uint8 [H,W,3], is how an image is read; a cache may take its place (data/cache.py).
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        classes: Classes,
        label_map: LabelMap,
        read_values: Callable[[Path], np.ndarray] = read_label_file,
    ) -> None:
        self.pairs, self.classes, self.label_map, self.read_values = list(pairs), classes, label_map, read_values
        self.read_pixels: Callable[[Path], np.ndarray] = read_image
        self.skips = SkipLog(len(self.pairs))

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index].name

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """-> image uint8 [H,W,3], labels uint8 [H,W], all IGNORE if there is no label file."""
        pair = self.pairs[index]
        image = self.read_pixels(pair.image)
        if pair.labels is None:
            return image, np.full(image.shape[:2], IGNORE, dtype=np.uint8)
        values = self.read_values(pair.labels)
        if image.shape[:2] != values.shape[:2]:
            raise ValueError(
                f"{pair.image} is {image.shape[1]}x{image.shape[0]}, its label {pair.labels} is "
                f"{values.shape[1]}x{values.shape[0]}: they must have the same size"
            )
        return image, self.label_map(values, pair.labels)


@dataclass(frozen=True)
class LeftOut:
    """Files of a split that make no image, all for one reason.

    what     the files, in the plural: "images without a label"
    files    all of them
    total    of how many
    message  what ends a training: the first of them, the reason, and the remedy
    remedy   what to do about all of them
    note     they may well be left out: it is no mistake
    """

    what: str
    files: tuple[str, ...]
    total: int
    message: str
    remedy: str
    note: bool = False


def leave_out(some: LeftOut, left_out: list[LeftOut] | None) -> None:
    """Keeps it in the list, for a report. Without a list, as in a training, raises ValueError with its message."""
    if left_out is None:
        raise ValueError(some.message)
    left_out.append(some)


def pair_folders(images: Path, labels: Path, left_out: list[LeftOut] | None = None) -> list[Pair]:
    """The files of two folders that have the same stem, sorted.

    left_out  takes the files that have no partner
    Raises ValueError, naming folder or file, if a folder is missing or empty, or, without `left_out`, if a file has
    no partner.
    """
    return pair_files(
        list_images(images, left_out=left_out),
        list_images(labels, left_out=left_out),
        images,
        labels,
        left_out=left_out,
    )


def pair_files(
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
    image_folder: Path,
    label_folder: Path,
    suffix: str = "",
    image_suffix: str = "",
    left_out: list[LeftOut] | None = None,
) -> list[Pair]:
    """Name -> image file and name -> label file as pairs, sorted by name.

    suffix    what a label file's name has after the name of its image; image_suffix, what that of an image has
    left_out  takes the files that have no partner; without it they are a ValueError that names the first
    """
    for some, others, one, partner, other_folder, ending in (
        (images, labels, "an image", "a label", label_folder, suffix),
        (labels, images, "a label", "an image", image_folder, image_suffix),
    ):
        alone = sorted(set(some) - set(others))
        if alone:
            kind = one.split()[1]
            remedy = f"add to {other_folder} what they lack, or remove these {kind}s"
            advice = f"Add {partner} for each, or remove the {kind}"
            if len(alone) == len(some):
                remedy = advice = (
                    "give each label the name of its image; if your own labels have an ending beyond that, say so in "
                    "classes.yaml, for example `mask_suffix: _mask`"
                )
            message = (
                f"{some[alone[0]]} is {one} without {partner}: {other_folder} has no {alone[0]}{ending}.* "
                f"({len(alone)} of {len(some)} {kind}s are so, `routeseg check-data` names them). {advice}"
            )
            files = tuple(str(some[name]) for name in alone)
            leave_out(LeftOut(f"{kind}s without {partner}", files, len(some), message, remedy), left_out)
    return [Pair(name, images[name], labels[name]) for name in sorted(images) if name in labels]


def other_files(names: Iterable[str]) -> str:
    """The files of these names that are no images, by suffix: "2 .heic, 1 .mov"; "" if there are none."""
    suffixes = (path.suffix.lower() for path in map(PurePath, names) if not path.name.startswith("."))
    counts = Counter(suffix or "without a suffix" for suffix in suffixes if suffix not in IMAGE_SUFFIXES)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def list_images(folder: Path, nested: bool = False, left_out: list[LeftOut] | None = None) -> dict[str, Path]:
    """Name -> file. A name is the stem; with `nested`, files of sub-folders count too, and are called city/stem.

    left_out  takes what has the name of a file before it; without it that is a ValueError
    Names are in one form of Unicode. Hidden files and folders are left out. Raises ValueError for a folder that is
    missing or empty, and for names with control characters.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: check the data root and its layout")
    found: dict[str, Path] = {}
    twice: list[tuple[Path, Path]] = []
    others: list[str] = []
    for path in _files(folder, nested):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            others += [str(path)] if path.is_file() else []
            continue
        name = one_form(path.relative_to(folder).with_name(path.stem).as_posix())
        if CONTROL.search(name):
            raise ValueError(f"{folder} has a file whose name has control characters, {ascii(name)}: rename it")
        if name in found:
            twice.append((found[name], path))
        else:
            found[name] = path
    what = f"files in {folder} that are no images ({other_files(others)})"
    if not found:
        there = f", but {other_files(others)}: convert to PNG or JPEG what are images" if others else ""
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}){there}")
    if others and left_out is not None:
        remedy = "nothing, unless some of them are images, as HEIC are: convert those to PNG or JPEG"
        left_out.append(LeftOut(what, tuple(others), len(found) + len(others), "", remedy, note=True))
    if twice:
        message = f"{twice[0][0]} and {twice[0][1]} have the same name: keep one of them"
        files = tuple(f"{one} and {other}" for one, other in twice)
        total = len(found) + len(twice)
        leave_out(LeftOut("files with the name of another one", files, total, message, "keep one of each"), left_out)
    return found


def one_form(name: str) -> str:
    """A name in the composed form of Unicode: macOS and others write the same name in two."""
    return unicodedata.normalize("NFC", name)


def _files(folder: Path, nested: bool) -> list[Path]:
    if not nested:
        return sorted(folder.iterdir())
    paths = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [Path(parent, name) for name in sorted(names)]
    return paths
