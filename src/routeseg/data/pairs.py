"""Pairs of image and label files: reading them, and turning label values into classes.

Every data set of files is a list of `Pair` and a `LabelMap`; the module of a layout only says where its files lie
and what their values mean.

Legend: image uint8 [H,W,3] RGB, labels uint8 [H,W] with IGNORE where there is none, K classes.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray, RawValue
from pathlib import Path
from typing import BinaryIO, Protocol

import cv2
import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from routeseg.errors import CONTROL
from routeseg.labels import IGNORE, Classes

log = logging.getLogger("routeseg")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
# What is decoded: no format that runs programs (PostScript) or fetches other files. Pillow knows the first ones from
# the start (MPO is among JPEG); for the others it imports all that it has, which takes as long as some pictures.
FORMATS, RARE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM"), ("TIFF", "WEBP", "JPEG2000", "AVIF")
MAX_SIDE, MAX_PIXELS = 1 << 16, 100_000_000  # of an image: a small file may claim any size
# What Pillow raises for damaged files (RuntimeError from AVIF, struct.error from EXIF data), and for too large ones.
BAD_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
)
GREY_MODES = ("1", "L", "LA")
ORIENTATION_TAG = 0x0112  # of EXIF
PLAIN_ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}  # the last bytes of a file that is whole
# What may turn a PNG, make parts of it transparent or animate it: PNG_SPECIAL are the names that Pillow finds for it in
# the file's head, PNG_TURNED the marks of what turns a picture and comes behind the pixels.
PNG_SPECIAL = {"exif", "XML:com.adobe.xmp", "Raw profile type exif", "transparency", "default_image", "interlace"}
PNG_TURNED = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")
PNG_TAIL_BYTES = 1 << 16
_STDERR = threading.Lock()  # only one thread at a time may turn it away
MOST_VALUES = 1 << 17  # from the lowest to the highest label value that a table is made for
SKIPS_NAMED = 10  # unreadable pictures of a data set that the log names; of the others it only says that there are some


class SkipLog:
    """Says on the log which unreadable pictures of a data set were skipped: each once, and SKIPS_NAMED at most.

    What was said is shared with the loader processes of this process, so that no two of them name the same picture.
    """

    def __init__(self, pictures: int) -> None:
        self._skipped, self._count = RawArray("B", pictures), RawValue("L")

    def __call__(self, index: int, error: UnreadableImage) -> None:
        if self._skipped[index]:
            return
        self._skipped[index] = 1
        self._count.value += 1
        count = self._count.value
        if count <= SKIPS_NAMED:
            log.warning("skipped: %s", error)
        elif count == SKIPS_NAMED + 1:
            log.warning("skipped: more unreadable files; `routeseg check-data` names them")


class SegmentationData(Protocol):
    """What a data set is: classes, a length, and pairs of image and labels.

    skips  is told of every unreadable picture that is skipped
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


class UnreadableImage(ValueError):
    """A file that is no image, or a damaged one. A run may skip it and count it."""


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 [H,W,3] RGB: greyscale, palette, RGBA and 16-bit are converted, EXIF rotation is applied.

    Raises UnreadableImage, naming the file, if it is missing, damaged or no image.
    """
    return decode_image(path, path)


def decode_image(source: Path | BinaryIO, name: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """`read_image` of a path or an open file; `name` is what errors call it. An image of more than `max_pixels` is not
    decoded."""
    try:
        with _open(source, max_pixels) as file:
            pixels = _decode_plain(file)
            if pixels is not None:
                return pixels
            if getattr(file, "is_animated", False):
                log.warning("%s has %d frames: the first one is taken", name, getattr(file, "n_frames", 0))
                file.seek(0)
            file.load()
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith(("I", "F")):  # 16 bits an integer, 0..1 a float, greyscale
                values = np.nan_to_num(np.asarray(image).astype(np.float64))
                top = 1.0 if image.mode.startswith("F") and values.max(initial=0) <= 1 else 65535.0
                image = Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except BAD_IMAGE as error:
        raise UnreadableImage(f"cannot read {name} as an image: {_reason(error)}") from error


def _open(source: Path | BinaryIO, max_pixels: int) -> ImageFile.ImageFile:
    """The image, not yet decoded. Raises what BAD_IMAGE lists."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limits here are ours
        try:
            file = Image.open(source, formats=FORMATS)
        except UnidentifiedImageError:
            if isinstance(source, Path) and not source.stat().st_size:
                raise ValueError("the file is empty") from None
            Image.init()
            file = Image.open(source, formats=[one for one in RARE_FORMATS if one in Image.OPEN])
    width, height = file.size
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        file.close()
        raise ValueError(
            f"it has {width}x{height} pixels; at most {max_pixels} are decoded, and sides up to {MAX_SIDE}"
        )
    return file


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # whose text names the open file
        return "it is none"
    return "it is too large for the memory" if isinstance(error, MemoryError) else str(error)


def _decode_plain(file: ImageFile.ImageFile) -> np.ndarray | None:
    """The usual case in about half of the time, by OpenCV: an upright and whole PNG or JPEG of 8-bit RGB.

    None for all others, and for a file that OpenCV finds damaged: Pillow reads those, or says what is wrong.
    """
    if file.mode != "RGB" or file.format not in PLAIN_ENDS or file.fp is None:
        return None
    png = file.format == "PNG"
    if png and (file.tile[0][3] != "RGB" or file.info.keys() & PNG_SPECIAL):  # 16 bits, or see there
        return None
    if not png and file.getexif().get(ORIENTATION_TAG, 1) != 1:
        return None
    here = file.fp.tell()
    file.fp.seek(0)
    data = file.fp.read()
    file.fp.seek(here)
    late = data[-PNG_TAIL_BYTES:]
    if not data.endswith(PLAIN_ENDS[file.format]) or (png and any(mark in late for mark in PNG_TURNED)):
        return None
    try:
        with _silent_libraries():
            return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # too large, for OpenCV or for the memory
        return None


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """C libraries write what is wrong with a file to stderr, without its name: in this block, to nowhere."""
    with _STDERR:
        try:
            kept = os.dup(2)
        except OSError:  # there is no stderr
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


def label_mode(path: Path) -> tuple[str, np.ndarray | None]:
    """Pillow's mode of a label file, and of a palette file ("P") the colour of each number, uint8 [N,3].

    Raises UnreadableImage if it is missing or no image.
    """
    try:
        with _open(path, MAX_PIXELS) as file:
            colours = file.getpalette("RGB") if file.mode == "P" else None
            return file.mode, None if colours is None else np.array(colours, np.uint8).reshape(-1, 3)
    except BAD_IMAGE as error:
        raise UnreadableImage(f"cannot read {path} as a label image: {_reason(error)}") from error


def read_label_file(path: Path, palette: bool = False, grey: bool = False) -> np.ndarray:
    """The stored values of a label file: integers [H,W], or colours uint8 [H,W,3].

    palette  a palette file gives the colours of its pixels, not their numbers
    grey     so does a greyscale file of at most 8 bits
    Raises UnreadableImage if it is missing, damaged or no image, or ValueError if it holds neither of the two.
    """
    try:
        with _open(path, MAX_PIXELS) as file:
            coloured = (palette and file.mode == "P") or (grey and file.mode in GREY_MODES)
            values = np.asarray(file.convert("RGB") if coloured else file)
    except BAD_IMAGE as error:
        raise UnreadableImage(f"cannot read {path} as a label image: {_reason(error)}") from error
    if values.ndim == 3 and values.shape[2] in (3, 4) and values.dtype == np.uint8:
        return values[..., :3]
    if values.ndim != 2 or values.dtype.kind not in "uib":
        raise ValueError(
            f"{path} is no label image: it needs one channel of class numbers, or RGB colours; it has shape "
            f"{values.shape} of {values.dtype}"
        )
    return values.astype(np.int64) if values.dtype.kind == "b" else values


@dataclass(frozen=True)
class LabelMap:
    """What the values of label files mean.

    classes  how many classes there are
    values   label value -> class, or IGNORE
    colours  RGB colour -> class, or IGNORE, for colour-coded masks; empty: masks must hold numbers
    strict   a value without an entry in `values` is an error; otherwise it is its own class, if there is one
    remedy   what to do about a value that means nothing; `{value}` stands for it
    """

    classes: int
    values: Mapping[int, int]
    colours: Mapping[tuple[int, int, int], int]
    strict: bool = False
    remedy: str = "map it in classes.yaml, for example `mapping: {{{value}: 255}}` to ignore it"

    def __call__(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Stored values, [H,W] or colours [H,W,3] -> labels uint8 [H,W]. Raises ValueError, naming file and value."""
        if values.ndim == 3 and not self.colours:
            raise ValueError(
                f"{path} is coloured (RGB), its pixels must be class numbers; or say what each colour means, in "
                'classes.yaml: `mapping: {"#804080": road}`'
            )
        if values.dtype == np.uint8 and values.ndim == 2:
            table = self._table(0, 255)
            if not cv2.LUT(values, (table < 0).astype(np.uint8)).any():
                return cv2.LUT(values, table.astype(np.uint8))
        labels = self.lookup(values, path)
        unknown = labels < 0
        if unknown.any():
            value = value_name(values[unknown][0])
            raise ValueError(
                f"{path} has the label value {value}, which is none of the {self.classes} classes "
                f"(0 to {self.classes - 1}, {IGNORE} = ignored): {self.remedy.format(value=value)}"
            )
        return labels.astype(np.uint8)

    def lookup(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Stored values -> class, IGNORE, or -1 for a value that means nothing; int16 [H,W]."""
        if values.ndim == 3:
            return self._of_colours(values)
        low, high = min(int(values.min(initial=0)), 0), max(int(values.max(initial=0)), IGNORE)
        if high - low <= MOST_VALUES:
            return self._table(low, high)[values.astype(np.int64) - low if low else values]
        near = np.abs(values.astype(np.int64)) <= MOST_VALUES // 2
        labels = np.full(values.shape, -1, dtype=np.int16)
        labels[near] = self.lookup(values[near], path)
        return labels

    def _table(self, low: int, high: int) -> np.ndarray:
        """Label values low..high -> class, IGNORE, or -1 for those that mean nothing; int16 [high - low + 1]."""
        table = np.full(high - low + 1, -1, dtype=np.int16)
        if not self.strict:
            table[-low : self.classes - low] = np.arange(self.classes)
            table[IGNORE - low] = IGNORE
        for value, target in self.values.items():
            if low <= value <= high:
                table[value - low] = target
        return table

    def _of_colours(self, colours: np.ndarray) -> np.ndarray:
        packed = pack_colours(colours)
        if not self.colours:
            return np.full(packed.shape, -1, dtype=np.int16)
        known = pack_colours(np.array(list(self.colours), dtype=np.uint8))
        order = np.argsort(known)
        place = order[np.searchsorted(known[order], packed).clip(max=len(known) - 1)]
        targets = np.array(list(self.colours.values()), dtype=np.int16)
        return np.where(known[place] == packed, targets[place], np.int16(-1))


def count_values(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values of a label file, [N] or colours [N,3], in order, and how many pixels have each, [N]."""
    if stored.dtype == np.uint8 and stored.ndim == 2:
        counts = np.bincount(stored.ravel(), minlength=256)
        return np.flatnonzero(counts), counts[counts > 0]
    values, counts = np.unique(pack_colours(stored) if stored.ndim == 3 else stored, return_counts=True)
    if stored.ndim == 3:
        values = np.stack([values >> 16, (values >> 8) & 255, values & 255], axis=-1).astype(np.uint8)
    return values, counts


def value_name(value: np.ndarray) -> str:
    """A label value as a mapping in classes.yaml calls it: 7, or a colour as "#804080" with the quotes."""
    parts = np.atleast_1d(value)
    return '"#{:02x}{:02x}{:02x}"'.format(*parts) if len(parts) == 3 else str(int(parts[0]))


def pack_colours(colours: np.ndarray) -> np.ndarray:
    """uint8 [...,3] -> int32 [...], one number for each colour."""
    red, green, blue = (colours[..., channel].astype(np.int32) for channel in range(3))
    return (red << 16) | (green << 8) | blue


@dataclass(frozen=True)
class Pair:
    """One picture: its name in reports, its image file, and its label file (None: it has none, as in a test split)."""

    name: str
    image: Path
    labels: Path | None


class PairedFiles:
    """Pictures and labels of a list of files.

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
    """Files of a split that make no picture, all for one reason.

    what     the files, in the plural: "images without a label"
    files    all of them
    total    of how many
    message  what ends a training: the first of them, the reason, and the remedy
    remedy   what to do about all of them
    """

    what: str
    files: tuple[str, ...]
    total: int
    message: str
    remedy: str


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
    for path in _files(folder, nested):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            name = one_form(path.relative_to(folder).with_name(path.stem).as_posix())
            if CONTROL.search(name):
                raise ValueError(f"{folder} has a file whose name has control characters, {ascii(name)}: rename it")
            if name in found:
                twice.append((found[name], path))
            else:
                found[name] = path
    if not found:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
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
