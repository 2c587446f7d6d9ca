"""Pairs of image and label files: reading them, and turning label values into classes.

Every data set of files is a list of `Pair` and a `LabelMap`; the module of a layout only says where its files lie
and what their values mean.

Legend: image uint8 [H,W,3] RGB, labels uint8 [H,W] with IGNORE where there is none, K classes.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import struct
import threading
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray, RawValue
from pathlib import Path, PurePath
from typing import BinaryIO, Protocol

import cv2
import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from routeseg.errors import CONTROL
from routeseg.labels import IGNORE, Classes

log = logging.getLogger("routeseg")
IMAGE_SUFFIXES = tuple(
    ".png .jpg .jpeg .jpe .jfif .bmp .dib .tif .tiff .webp .gif .jp2 .j2k .jpx .avif .ppm .pgm .pbm .pnm .pfm".split()
)
# What is decoded: no format that runs programs (PostScript) or fetches other files. Pillow knows the first ones from
# the start (MPO is among JPEG); for the others it imports all that it has, which takes as long as some images.
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
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # behind "ftyp" in a file's head
GREY_MODES = ("1", "L", "LA", "La")
STRAIGHT = {"La": "LA", "RGBa": "RGBA", "RGBX": "RGB"}  # what premultiplied and padded modes of Pillow become
DEPTHS = (8, 10, 12, 14, 16)  # bits of what cameras and microscopes give, which files of 16 bits hold
ROUNDING = 1e-3  # by which floats may leave 0..1
FEW_BITS = re.compile("L;([24])I?R?")  # how Pillow names grey values of 2 or 4 bits, which it stretches to 8
ORIENTATION_TAG = 0x0112  # of EXIF
PLAIN_ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}  # the last bytes of a file that is whole
# What may turn a PNG, make parts of it transparent or animate it: PNG_SPECIAL are the names that Pillow finds for it in
# the file's head, PNG_TURNED the marks of what turns an image and comes behind the pixels.
PNG_SPECIAL = {"exif", "XML:com.adobe.xmp", "Raw profile type exif", "transparency", "default_image", "interlace"}
PNG_TURNED = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")
PNG_TAIL_BYTES = 1 << 16
_STDERR = threading.Lock()  # only one thread at a time may turn it away
MOST_VALUES = 1 << 17  # from the lowest to the highest label value that a table is made for
SKIPS_NAMED = 10  # unreadable images of a data set that the log names; of the others it only says that there are some


class SkipLog:
    """Says on the log which unreadable images of a data set were skipped: each once, and SKIPS_NAMED at most.

    What was said is shared with the loader processes of this process, so that no two of them name the same image.
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
    with _reading(name), _open(source, max_pixels) as file:
        pixels = _decode_plain(file)
        if pixels is None:
            _take_first(file, name)
            pixels = _pixels(file)
        return pixels


def read_pillow(image: Image.Image) -> np.ndarray:
    """`read_image` of an image of Pillow, of any mode; of several frames the one that it shows."""
    with _reading(getattr(image, "filename", "") or "what was given"):
        return _pixels(image)


def _pixels(image: Image.Image) -> np.ndarray:
    """Upright uint8 [H,W,3] of an image of any mode. Raises what BAD_IMAGE lists."""
    deep = _decode_deep(image)
    if deep is not None:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
        image = Image.fromarray(as_bytes(deep))
        image.getexif()[ORIENTATION_TAG] = orientation
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(as_bytes(np.asarray(image)))
    if image.mode in STRAIGHT:
        image = image.convert(STRAIGHT[image.mode])
    return np.asarray(image.convert("RGB"))


def as_bytes(values: np.ndarray) -> np.ndarray:
    """The values of an image as uint8, of the same shape: whatever holds an image comes through here.

    Floats are 0..1. Integers of 16 bits or more hold 0..65535; if the largest value needs fewer bits, as those of a
    camera of 12 bits do, so many bits are the range, and the log says so.
    Raises ValueError for other types, and for values beyond that.
    """
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind not in "fiu" or values.dtype.itemsize > 4 and values.dtype.kind != "f":
        raise ValueError(f"an image of {values.dtype}: give uint8, uint16, or floats in 0..1")
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if values.dtype.kind == "f":
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):
            raise ValueError(
                f"floats are taken as 0..1, these go from {low:.4g} to {high:.4g}: divide by 255, or give uint8; an "
                "image that is normalised already must not be"
            )
        top = 1
    elif low < 0 or high >= 1 << DEPTHS[-1]:
        raise ValueError(
            f"integers are taken as 0..65535, these go from {low:.0f} to {high:.0f}: give uint8, or uint16 of the range"
        )
    else:
        depth = next(depth for depth in DEPTHS if high < 1 << depth)
        top = (1 << depth) - 1
        if depth < DEPTHS[-1]:
            _say_depth(depth)
    return (np.clip(values.astype(np.float32) / top, 0, 1) * 255).round().astype(np.uint8)


@functools.cache  # so it is said once
def _say_depth(depth: int) -> None:
    log.warning("images of 16 bits a value whose largest value is below %d are read as %d bits", 1 << depth, depth)


@contextmanager
def _reading(name: str | Path, what: str = "an image") -> Iterator[None]:
    """In this block whatever Pillow raises is UnreadableImage, which names the file."""
    try:
        yield
    except BAD_IMAGE as error:
        raise UnreadableImage(f"cannot read {name} as {what}: {_reason(error)}") from error


def _take_first(file: ImageFile.ImageFile, name: str | Path) -> None:
    """Of several frames."""
    if getattr(file, "is_animated", False):
        log.warning("%s has %d frames: the first one is taken", name, getattr(file, "n_frames", 0))
        file.seek(0)


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
            try:
                file = Image.open(source, formats=[one for one in RARE_FORMATS if one in Image.OPEN])
            except UnidentifiedImageError:
                if _head(source)[4:12] in [b"ftyp" + brand for brand in HEIC_BRANDS]:
                    raise ValueError("it is HEIC, which is not decoded here: convert it to JPEG or PNG") from None
                raise
    width, height = file.size
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        file.close()
        raise ValueError(
            f"it has {width}x{height} pixels; at most {max_pixels} are decoded, and sides up to {MAX_SIDE}"
        )
    return file


def _head(source: Path | BinaryIO, count: int = 12) -> bytes:
    if isinstance(source, Path):
        with source.open("rb") as file:
            return file.read(count)
    source.seek(0)
    return source.read(count)


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
    data = _bytes_of(file)
    late = data[-PNG_TAIL_BYTES:]
    if not data.endswith(PLAIN_ENDS[file.format]) or (png and any(mark in late for mark in PNG_TURNED)):
        return None
    return _by_opencv(data, cv2.IMREAD_COLOR_RGB)


def _decode_deep(image: Image.Image) -> np.ndarray | None:
    """The colours of a PNG or TIFF of 16 bits, of which Pillow keeps the upper byte: uint16 [H,W,3] RGB, as they are
    stored. None for all others, for what is decoded already, and for what OpenCV cannot decode."""
    if not isinstance(image, ImageFile.ImageFile) or image.format not in ("PNG", "TIFF"):
        return None
    if image.fp is None or _raw_mode(image)[:-1] not in ("RGB;16", "RGBX;16", "RGBA;16", "LA;16"):
        return None
    pixels = _by_opencv(_bytes_of(image), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)  # to RGB it spoils a TIFF
    return None if pixels is None or pixels.dtype != np.uint16 else pixels[..., ::-1]


def _raw_mode(image: Image.Image) -> str:
    """How a file stores its values, in Pillow's words, such as "RGB;16B"; "" if it is decoded already."""
    tiles = getattr(image, "tile", None)
    args = tiles[0].args if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _bytes_of(file: ImageFile.ImageFile) -> bytes:
    """All bytes of an open file."""
    assert file.fp is not None
    here = file.fp.tell()
    file.fp.seek(0)
    data = file.fp.read()
    file.fp.seek(here)
    return data


def _by_opencv(data: bytes, flags: int) -> np.ndarray | None:
    try:
        with _silent_libraries():
            return cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
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
    with _reading(path, "a label image"), _open(path, MAX_PIXELS) as file:
        colours = file.getpalette("RGB") if file.mode == "P" and not _grey_palette(file) else None
        return file.mode, None if colours is None else np.array(colours, np.uint8).reshape(-1, 3)


def orientation(path: Path) -> int:
    """How an image file is to be turned or mirrored by its EXIF note, 1 to 8; 1: not at all. Raises UnreadableImage."""
    with _reading(path), _open(path, MAX_PIXELS) as file:
        if file.format == "PNG" and not any(mark in _bytes_of(file) for mark in PNG_TURNED):
            return 1  # of a PNG without a note Pillow decodes all pixels to find out
        found = file.getexif().get(ORIENTATION_TAG, 1)
        return found if found in range(1, 9) else 1


def read_label_file(path: Path, palette: bool = False, grey: bool = False) -> np.ndarray:
    """The stored values of a label file: integers [H,W], or colours uint8 [H,W,3]. EXIF rotation is applied.

    palette  a palette file gives the colours of its pixels, not their numbers
    grey     so does a greyscale file of at most 8 bits
    Transparent pixels are 0, or black. If that leaves nothing else, the mask was drawn in the transparency, and its
    values are those.
    Raises UnreadableImage if it is missing, damaged or no image, or ValueError if it holds neither of the two, or if
    files of its kind do not keep the values of pixels.
    """
    with _reading(path, "a label image"), _open(path, MAX_PIXELS) as file:
        mode, lossy = file.mode, _lossy(file)
        _take_first(file, path)
        values = None if lossy else _stored(file, palette, grey)
    if lossy:
        raise ValueError(
            f"{path} is {lossy}, which does not keep the values of pixels: make the mask again from its original, as "
            "PNG"
        )
    if values is None:
        raise ValueError(
            f"{path} is no label image: it needs one channel of class numbers, or RGB colours of 8 bits; it holds "
            f"something else (Pillow's mode {mode}). Save it as PNG"
        )
    return values


def _stored(file: ImageFile.ImageFile, palette: bool, grey: bool) -> np.ndarray | None:
    """The values in a label file, as `read_label_file` gives them; None for what can be none."""
    deep = _decode_deep(file)
    if deep is not None and (deep % 257).any():  # not colours of 8 bits that were written as 16
        return None
    stretch = _stretch(file)
    ImageOps.exif_transpose(file, in_place=True)
    mode = "L" if _grey_palette(file) else STRAIGHT.get(file.mode, file.mode)
    image = file if mode == file.mode else file.convert(mode)
    coloured = (palette and image.mode in ("P", "PA")) or (grey and image.mode in GREY_MODES)
    alpha = None
    if coloured or image.mode in ("RGB", "RGBA"):
        pixels = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
        values, alpha = pixels[..., :3], pixels[..., 3] if pixels.shape[2] == 4 else None
    elif image.mode in ("LA", "PA"):
        values, alpha = np.moveaxis(np.asarray(image), -1, 0)
    elif image.mode == "F":
        values = np.asarray(image)
        if not (np.abs(values) < 1 << 24).all() or (values % 1).any():
            return None
        values = values.astype(np.int32)
    elif image.mode in ("1", "L", "P") or image.mode.startswith("I"):
        values = np.asarray(image)
        values = values.astype(np.uint8 if values.dtype == bool else values.dtype.newbyteorder("="))
        if stretch != 1:
            values = np.rint(values / stretch).astype(values.dtype)
    else:
        return None
    if alpha is None or alpha.min(initial=255) == 255:
        return values
    values = np.where(alpha[..., None] if values.ndim == 3 else alpha, values, 0)
    if values.any():
        black = ~values.any(axis=-1) if values.ndim == 3 else values == 0
        if not alpha.all() and (black & (alpha > 0)).any():
            _say_black()
        return values
    return np.repeat(alpha[..., None], 3, axis=2) if values.ndim == 3 else alpha


@functools.cache  # so it is said once
def _say_black() -> None:
    log.warning("masks have transparent pixels, and others that are black, or 0: both are read as black, or 0")


def _stretch(file: ImageFile.ImageFile) -> float:
    """By how much Pillow multiplies the grey values of a file that has fewer bits than Pillow's mode."""
    if found := FEW_BITS.fullmatch(_raw_mode(file)):
        return 255 / (2 ** int(found[1]) - 1)
    tile = file.tile[0] if file.tile else None
    if file.format == "PPM" and tile and tile.codec_name.startswith("ppm") and isinstance(tile.args, tuple):
        return (65535 if file.mode == "I" else 255) / int(tile.args[1])  # the file says its largest value
    return 1


def _grey_palette(file: ImageFile.ImageFile) -> bool:
    """Whether a file is a GIF of grey values: the format knows no other way to keep them than a palette."""
    colours = np.array(file.getpalette("RGB") or () if file.mode == "P" and file.format == "GIF" else (), np.uint8)
    return colours.size > 0 and bool((colours.reshape(-1, 3) == colours[::3, None]).all())


def _lossy(file: ImageFile.ImageFile) -> str | None:
    """What kind of file this is, if it is one that does not keep the values of pixels."""
    if file.format in ("JPEG", "MPO", "AVIF"):
        return f"of the format {file.format}"
    if file.format == "TIFF" and file.info.get("compression") in ("jpeg", "tiff_jpeg", "webp"):
        return f"a TIFF with {file.info['compression']} compression"
    if file.format == "WEBP" and not _is_lossless_webp(_bytes_of(file)):
        return "a lossy WebP"
    if file.format == "JPEG2000":
        data = _bytes_of(file)
        coding = data.find(b"\xff\x52\x00")  # the marker COD; its last byte but one is 1 for the wavelet of integers
        if coding < 0 or data[coding + 13 : coding + 14] != b"\1":
            return "a lossy JPEG 2000"
    return None


def _is_lossless_webp(data: bytes) -> bool:
    """Whether the first chunk of pixels in a WebP is lossless."""
    place = 12  # behind RIFF, size, WEBP
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name in (b"VP8L", b"VP8 "):
            return name == b"VP8L"
        place += 24 if name == b"ANMF" else 8 + size + size % 2  # a frame holds chunks, behind 16 bytes of its own
    return False


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
