"""Image files and images of other libraries as uint8 [H,W,3] RGB.

The usual files are decoded by OpenCV, all others by Pillow, which also says what is wrong with one.
"""

from __future__ import annotations

import functools
import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from routeseg.files import silent_stderr

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
STRAIGHT = {"La": "LA", "RGBa": "RGBA", "RGBX": "RGB"}  # what premultiplied and padded modes of Pillow become
DEPTHS = (8, 10, 12, 14, 16)  # bits of what cameras and microscopes give, which files of 16 bits hold
ROUNDING = 1e-3  # by which floats may leave 0..1
ORIENTATION_TAG = 0x0112  # of EXIF
PLAIN_ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}  # the last bytes of a file that is whole
# What may turn a PNG, make parts of it transparent or animate it: PNG_SPECIAL are the names that Pillow finds for it in
# the file's head, PNG_TURNED the marks of what turns an image and comes behind the pixels.
PNG_SPECIAL = {"exif", "XML:com.adobe.xmp", "Raw profile type exif", "transparency", "default_image", "interlace"}
PNG_TURNED = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")
PNG_TAIL_BYTES = 1 << 16


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
    with reading(name), open_image(source, max_pixels) as file:
        pixels = _decode_plain(file)
        if pixels is None:
            take_first(file, name)
            pixels = _pixels(file)
        return pixels


def read_pillow(image: Image.Image) -> np.ndarray:
    """`read_image` of an image of Pillow, of any mode; of several frames the one that it shows."""
    with reading(getattr(image, "filename", "") or "what was given"):
        return _pixels(image)


def _pixels(image: Image.Image) -> np.ndarray:
    """Upright uint8 [H,W,3] of an image of any mode. Raises what BAD_IMAGE lists."""
    deep = decode_deep(image)
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
def reading(name: str | Path, what: str = "an image") -> Iterator[None]:
    """In this block whatever Pillow raises is UnreadableImage, which names the file."""
    try:
        yield
    except BAD_IMAGE as error:
        raise UnreadableImage(f"cannot read {name} as {what}: {_reason(error)}") from error


def take_first(file: ImageFile.ImageFile, name: str | Path) -> None:
    """Of several frames."""
    if getattr(file, "is_animated", False):
        log.warning("%s has %d frames: the first one is taken", name, getattr(file, "n_frames", 0))
        file.seek(0)


def open_image(source: Path | BinaryIO, max_pixels: int) -> ImageFile.ImageFile:
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
    data = bytes_of(file)
    late = data[-PNG_TAIL_BYTES:]
    if not data.endswith(PLAIN_ENDS[file.format]) or (png and any(mark in late for mark in PNG_TURNED)):
        return None
    return _by_opencv(data, cv2.IMREAD_COLOR_RGB)


def decode_deep(image: Image.Image) -> np.ndarray | None:
    """The colours of a PNG or TIFF of 16 bits, of which Pillow keeps the upper byte: uint16 [H,W,3] RGB, as they are
    stored. None for all others, for what is decoded already, and for what OpenCV cannot decode."""
    if not isinstance(image, ImageFile.ImageFile) or image.format not in ("PNG", "TIFF"):
        return None
    if image.fp is None or raw_mode(image)[:-1] not in ("RGB;16", "RGBX;16", "RGBA;16", "LA;16"):
        return None
    pixels = _by_opencv(bytes_of(image), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)  # to RGB it spoils a TIFF
    return None if pixels is None or pixels.dtype != np.uint16 else pixels[..., ::-1]


def raw_mode(image: Image.Image) -> str:
    """How a file stores its values, in Pillow's words, such as "RGB;16B"; "" if it is decoded already."""
    tiles = getattr(image, "tile", None)
    args = tiles[0].args if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def bytes_of(file: ImageFile.ImageFile) -> bytes:
    """All bytes of an open file."""
    assert file.fp is not None
    here = file.fp.tell()
    file.fp.seek(0)
    data = file.fp.read()
    file.fp.seek(here)
    return data


def _by_opencv(data: bytes, flags: int) -> np.ndarray | None:
    try:
        with silent_stderr():  # libraries in C write what is wrong with a file there, without its name
            return cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # too large, for OpenCV or for the memory
        return None


def orientation(path: Path) -> int:
    """How an image file is to be turned or mirrored by its EXIF note, 1 to 8; 1: not at all. Raises UnreadableImage."""
    with reading(path), open_image(path, MAX_PIXELS) as file:
        if file.format == "PNG" and not any(mark in bytes_of(file) for mark in PNG_TURNED):
            return 1  # of a PNG without a note Pillow decodes all pixels to find out
        found = file.getexif().get(ORIENTATION_TAG, 1)
        return found if found in range(1, 9) else 1
