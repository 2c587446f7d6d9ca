"""A walk over a data set before training: what is in its files, image by image and summed up.

What is wrong with it, and the verdict, is in findings.py.

Legend: K classes, H, W image size.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from routeseg.data.decoding import UnreadableImage, orientation, read_image
from routeseg.data.label_files import LabelMap, count_values, pack_colours, value_name
from routeseg.data.pairs import LeftOut, Pair, PairedFiles, SegmentationData
from routeseg.data.sets.masks import places
from routeseg.labels import IGNORE, Classes

ALONE_SECONDS = 1.0  # a small data set is looked at before other processes would have started
CHUNK = 8  # images that a process is given at a time
VALUES_KEPT = 1000  # different label values of a file, or of a split, that are told apart; the rarest are left out


@dataclass(frozen=True)
class CheckedImage:
    """What a look into the files of one image found.

    unreadable  the message of a file that is damaged or missing
    wrong       the message of what would end a training: a label of another size, or one that is no label image
    size        (height, width) of the image
    label_size  (height, width) of the label
    kind        how the label stores its values: "8 bit", "16 bit" or more, or "colour"
    values      label value as a mapping would call it -> pixels
    unknown     those of `values` that mean nothing
    loose       those of `unknown` that fill no area
    turned      an EXIF note turns the image, the label has none, and their sizes do not tell that it was drawn upright
    pixels      int64 [K+1], pixels of each class, and ignored ones; None if the label does not fit
    digest      a hash of the image file
    """

    name: str
    image: str
    label: str | None
    unreadable: str | None = None
    wrong: str | None = None
    size: tuple[int, int] | None = None
    label_size: tuple[int, int] | None = None
    kind: str | None = None
    values: dict[str, int] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()
    turned: bool = False
    pixels: np.ndarray | None = None
    digest: str | None = None

    @property
    def misfit(self) -> bool:
        """The label has another size than the image."""
        return self.label_size is not None and self.label_size != self.size

    @property
    def blank(self) -> bool:
        """Read, and without a single pixel that belongs to a class."""
        return self.pixels is not None and not self.unknown and not self.pixels[:-1].any()


def look_at_pair(pair: Pair, label_map: LabelMap, read_values: Callable[[Path], np.ndarray]) -> CheckedImage:
    """Reads the two files of an image."""
    found = partial(CheckedImage, pair.name, str(pair.image), None if pair.labels is None else str(pair.labels))
    try:
        image = read_image(pair.image)
        digest = hashlib.blake2b(pair.image.read_bytes(), digest_size=16).hexdigest()
    except (UnreadableImage, OSError) as error:
        return found(unreadable=str(error))
    found = partial(found, size=(image.shape[0], image.shape[1]), digest=digest)
    if pair.labels is None:
        return found(pixels=_histogram(np.array([IGNORE]), np.array([image[..., 0].size]), label_map.classes))
    try:
        stored = read_values(pair.labels)
    except UnreadableImage as error:
        return found(unreadable=str(error))
    except ValueError as error:
        return found(wrong=str(error))
    values, counts = count_values(stored)
    labels = label_map.lookup(values[None], pair.labels)[0]
    order = np.argsort(-counts, kind="stable")[:VALUES_KEPT]
    unknown = [k for k in order if labels[k] < 0]
    areas = places(stored) if unknown else {}
    found = partial(
        found,
        turned=_is_turned(pair.image, pair.labels, image.shape, stored.shape),
        label_size=(stored.shape[0], stored.shape[1]),
        kind="colour" if stored.ndim == 3 else f"{8 * stored.dtype.itemsize} bit",
        values={value_name(values[k]): int(counts[k]) for k in order},
        unknown=tuple(value_name(values[k]) for k in unknown),
        loose=tuple(value_name(values[k]) for k in unknown if not areas[_packed(values[k])].is_area),
    )
    if stored.shape[:2] != image.shape[:2]:
        sizes = f"{image.shape[1]}x{image.shape[0]}, its label {pair.labels} is {stored.shape[1]}x{stored.shape[0]}"
        return found(wrong=f"{pair.image} is {sizes}")
    return found(pixels=_histogram(labels, counts, label_map.classes))


def _packed(value: np.ndarray) -> int:
    return int(pack_colours(value) if value.ndim else value)


def _is_turned(image: Path, label: Path, size: tuple[int, ...], label_size: tuple[int, ...]) -> bool:
    """`CheckedImage.turned` of an image as it is read, and its label."""
    turn = orientation(image)
    sideways = turn > 4 and size[0] != size[1]
    if turn == 1 or (sideways and size[:2] == label_size[:2]):
        return False
    try:
        return orientation(label) == 1
    except UnreadableImage:  # no image, as those of SBD
        return True


def look_at_pairs(pairs: Sequence[Pair], label_map: LabelMap, read_values: Callable) -> list[CheckedImage]:
    return [look_at_pair(pair, label_map, read_values) for pair in pairs]


def look_at_drawn(data: SegmentationData, index: int) -> CheckedImage:
    """An image of a data set that has no files."""
    image, labels = data.read(index)
    values, counts = count_values(labels)
    return CheckedImage(
        name=data.name(index),
        image=data.name(index),
        label=data.name(index),
        size=(image.shape[0], image.shape[1]),
        kind="8 bit",
        values={value_name(value): int(count) for value, count in zip(values, counts, strict=True)},
        pixels=_histogram(values, counts, len(data.classes)),
        digest=hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest(),
    )


def _histogram(labels: np.ndarray, counts: np.ndarray, classes: int) -> np.ndarray:
    """Pixels of each class and ignored, int64 [K+1]; those of no class (below 0) are left out."""
    pixels = np.zeros(classes + 1, dtype=np.int64)
    np.add.at(pixels, np.where(labels == IGNORE, classes, labels)[labels >= 0], counts[labels >= 0])
    return pixels


@dataclass
class SplitCheck:
    """What was found in a split.

    failure   why it could not be opened at all; then there are no images
    left_out  files that make no image
    training  it is the split to train on
    """

    split: str
    classes: Classes
    images: list[CheckedImage]
    training: bool = False
    failure: str | None = None
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def unreadable(self) -> list[CheckedImage]:
        return [image for image in self.images if image.unreadable]

    @property
    def wrong(self) -> list[CheckedImage]:
        return [image for image in self.images if image.wrong]

    @property
    def misfits(self) -> list[CheckedImage]:
        return [image for image in self.images if image.misfit]

    @property
    def blank(self) -> list[CheckedImage]:
        return [image for image in self.images if image.blank]

    @property
    def counted(self) -> list[CheckedImage]:
        """Those whose labels were read, and fit."""
        return [image for image in self.images if image.pixels is not None]

    @cached_property
    def sizes(self) -> Counter[tuple[int, int]]:
        """(height, width) -> images."""
        return Counter(image.size for image in self.images if image.size)

    @cached_property
    def values(self) -> Counter[str]:
        """Label value -> pixels, of all labels that were read."""
        total: Counter[str] = Counter()
        for image in self.images:
            total.update(image.values)
            if len(total) > 10 * VALUES_KEPT:
                total = Counter(dict(total.most_common(VALUES_KEPT)))
        return total

    @cached_property
    def unknown(self) -> list[str]:
        """The label values that mean nothing, the most frequent first."""
        unknown = {value for image in self.images for value in image.unknown}
        return [value for value, _ in self.values.most_common() if value in unknown]

    @cached_property
    def pixels(self) -> np.ndarray:
        """int64 [K+1], of each class, and ignored."""
        zero = np.zeros(len(self.classes) + 1, dtype=np.int64)
        return sum((image.pixels for image in self.counted if image.pixels is not None), zero)

    @cached_property
    def in_images(self) -> np.ndarray:
        """int64 [K], in how many images each class occurs."""
        zero = np.zeros(len(self.classes), dtype=np.int64)
        return sum((image.pixels[:-1] > 0 for image in self.counted if image.pixels is not None), zero)

    def shares(self) -> np.ndarray:
        """float [K], of the pixels that belong to a class; zeros if there are none."""
        labelled = self.pixels[:-1]
        return labelled / max(labelled.sum(), 1)

    def absent(self) -> list[str]:
        """The names of the classes that never occur."""
        return [name for name, count in zip(self.classes.names, self.in_images, strict=True) if not count]

    def smaller_than(self, crop: tuple[int, int]) -> int:
        """How many images are smaller than a crop, in height or width."""
        return sum(count for size, count in self.sizes.items() if size[0] < crop[0] or size[1] < crop[1])

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Sizes are WIDTHxHEIGHT, shares 0..1 of the labelled pixels."""
        named = {f"{width}x{height}": count for (height, width), count in self.sizes.most_common()}
        rows = zip(self.classes.names, self.pixels, self.shares(), self.in_images, strict=False)
        return {
            "failure": self.failure,
            "pictures": len(self.images),
            "left_out": {some.what: list(some.files) for some in self.left_out},
            "unreadable": {image.name: image.unreadable for image in self.unreadable},
            "wrong": {image.name: image.wrong for image in self.wrong},
            "without_labels": [image.name for image in self.blank],
            "sizes": named,
            "label_kinds": dict(Counter(image.kind for image in self.images if image.kind)),
            "values": dict(self.values.most_common(VALUES_KEPT)),
            "values_without_class": {value: self.values[value] for value in self.unknown},
            "classes": [
                {"name": name, "pixels": int(count), "share": float(share), "pictures": int(images)}
                for name, count, share, images in rows
            ],
            "ignored_pixels": int(self.pixels[-1]),
            "never": self.absent(),
        }


def check_split(
    data: SegmentationData,
    split: str,
    training: bool = False,
    workers: int | None = None,
    on_image: Callable[[], None] | None = None,
    left_out: Sequence[LeftOut] = (),
) -> SplitCheck:
    """Looks at every image of a split.

    workers     processes that read files, 0 or 1: this one; None: one a core, if it takes more than some seconds
    on_image    called after each image (for a progress bar)
    left_out    what was left out when the split was opened
    """
    found: dict[int, CheckedImage] = {}
    for start, some in _look(data, workers):
        found.update(enumerate(some, start))
        if on_image is not None:
            for _ in some:
                on_image()
    images = [found[index] for index in sorted(found)]
    return SplitCheck(split, data.classes, images, training, left_out=list(left_out))


def _look(data: SegmentationData, workers: int | None) -> Iterator[tuple[int, list[CheckedImage]]]:
    """Pictures, in any order, as (index of the first, some of them in a row)."""
    if not isinstance(data, PairedFiles):
        for index in range(len(data)):
            yield index, [look_at_drawn(data, index)]
        return
    look = partial(look_at_pairs, label_map=data.label_map, read_values=data.read_values)
    starts = deque(range(0, len(data), CHUNK))
    processes = (os.cpu_count() or 1) if workers is None else workers
    alone_until = time.monotonic() + ALONE_SECONDS if workers is None else 0.0
    while starts and (processes < 2 or time.monotonic() < alone_until):
        start = starts.popleft()
        yield start, look(data.pairs[start : start + CHUNK])
    if not starts:
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        try:
            tasks = {pool.submit(look, data.pairs[start : start + CHUNK]): start for start in starts}
            for done in as_completed(tasks):
                yield tasks[done], done.result()
        except BrokenProcessPool as error:
            raise ValueError("a process that reads files was killed, for want of memory? Try --workers 1") from error
        finally:
            pool.shutdown(cancel_futures=True)


def duplicates(checks: Iterable[SplitCheck]) -> list[list[tuple[str, CheckedImage]]]:
    """The groups of images whose images are the same, byte for byte, with their splits."""
    groups: dict[str, list[tuple[str, CheckedImage]]] = {}
    for check in checks:
        for image in check.images:
            if image.digest is not None:
                groups.setdefault(image.digest, []).append((check.split, image))
    return [group for group in groups.values() if len({(split, image.image) for split, image in group}) > 1]


def images_to_show(check: SplitCheck, count: int) -> list[int]:
    """Indices of readable images: for each class the one that has most of it, the rarest class first; then others."""
    pixels = {k: image.pixels[:-1] for k, image in enumerate(check.images) if image.pixels is not None}
    chosen: list[int] = []
    for kind in np.argsort(check.in_images, kind="stable"):
        if len(chosen) < count and check.in_images[kind] and not any(pixels[k][kind] for k in chosen):
            chosen.append(max((int(counts[kind]), k) for k, counts in pixels.items())[1])
    readable = list(pixels)
    for place in np.linspace(0, len(readable) - 1, min(count, len(readable))).round().astype(int):
        if len(chosen) < count and readable[place] not in chosen:
            chosen.append(readable[place])
    return sorted(chosen)


def read_to_show(data: SegmentationData, index: int) -> tuple[np.ndarray, np.ndarray]:
    """-> image uint8 [H,W,3], labels uint8 [H,W]; a value that means nothing is K."""
    if not isinstance(data, PairedFiles) or data.pairs[index].labels is None:
        return data.read(index)
    pair = data.pairs[index]
    assert pair.labels is not None
    labels = data.label_map.lookup(data.read_values(pair.labels), pair.labels)
    return read_image(pair.image), np.where(labels < 0, len(data.classes), labels).astype(np.uint8)
