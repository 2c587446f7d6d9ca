"""Label files: the values they hold, and which class each value or colour means.

Legend: labels uint8 [H,W] with IGNORE where there is none.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import ImageFile, ImageOps

from routeseg.data.decoding import (
    MAX_PIXELS,
    STRAIGHT,
    bytes_of,
    decode_deep,
    open_image,
    raw_mode,
    reading,
    take_first,
)
from routeseg.labels import IGNORE

log = logging.getLogger("routeseg")
GREY_MODES = ("1", "L", "LA", "La")
FEW_BITS = re.compile("L;([24])I?R?")  # how Pillow names grey values of 2 or 4 bits, which it stretches to 8
MOST_VALUES = 1 << 17  # from the lowest to the highest label value that a table is made for


def label_mode(path: Path) -> tuple[str, np.ndarray | None]:
    """Pillow's mode of a label file, and of a palette file ("P") the colour of each number, uint8 [N,3].

    Raises UnreadableImage if it is missing or no image.
    """
    with reading(path, "a label image"), open_image(path, MAX_PIXELS) as file:
        colours = file.getpalette("RGB") if file.mode == "P" and not _grey_palette(file) else None
        return file.mode, None if colours is None else np.array(colours, np.uint8).reshape(-1, 3)


def read_label_file(path: Path, palette: bool = False, grey: bool = False) -> np.ndarray:
    """The stored values of a label file: integers [H,W], or colours uint8 [H,W,3]. EXIF rotation is applied.

    palette  a palette file gives the colours of its pixels, not their numbers
    grey     so does a greyscale file of at most 8 bits
    Transparent pixels are 0, or black. If that leaves nothing else, the mask was drawn in the transparency, and its
    values are those.
    Raises UnreadableImage if it is missing, damaged or no image, or ValueError if it holds neither of the two, or if
    files of its kind do not keep the values of pixels.
    """
    with reading(path, "a label image"), open_image(path, MAX_PIXELS) as file:
        mode, lossy = file.mode, _lossy(file)
        take_first(file, path)
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
    deep = decode_deep(file)
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
    if found := FEW_BITS.fullmatch(raw_mode(file)):
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
    if file.format == "WEBP" and not _is_lossless_webp(bytes_of(file)):
        return "a lossy WebP"
    if file.format == "JPEG2000":
        data = bytes_of(file)
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
