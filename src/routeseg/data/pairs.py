"""Pairs of image and label files: reading them, and turning label values into classes.

Every data set of files is a list of `Pair` and a `LabelMap`; the module of a layout only says where its files lie
and what their values mean.

Legend: image uint8 [H,W,3] RGB, labels uint8 [H,W] with IGNORE where there is none, K classes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from routeseg.data.transforms import IGNORE

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
# What Pillow raises for damaged files (struct.error from EXIF data).
BAD_IMAGE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Classes:
    """Names and RGB colours of the classes; `palette` may be None."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...] | None = None

    def __len__(self) -> int:
        return len(self.names)


class SegmentationData(Protocol):
    """What a data set is: classes, a length, and pairs of image and labels."""

    classes: Classes

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

    Raises UnreadableImage, naming the file, where it is missing, damaged or no image.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith(("I", "F")):  # 16 bits an integer, 0..1 a float, greyscale
                values = np.nan_to_num(np.asarray(image).astype(np.float64))
                top = 1.0 if image.mode.startswith("F") and values.max(initial=0) <= 1 else 65535.0
                image = Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except BAD_IMAGE as error:
        raise UnreadableImage(f"cannot read {path} as an image: {error}") from error


def read_label_file(path: Path) -> np.ndarray:
    """The stored values of a label file: integers [H,W], or colours uint8 [H,W,3].

    Raises UnreadableImage where it is missing, damaged or no image, or ValueError where it is neither of the two.
    """
    try:
        with Image.open(path) as file:
            values = np.asarray(file)
    except BAD_IMAGE as error:
        raise UnreadableImage(f"cannot read {path} as a label image: {error}") from error
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
        if values.ndim == 3:
            return self._from_colours(values, path)
        low, high = min(int(values.min(initial=0)), 0), max(int(values.max(initial=0)), IGNORE)
        if high - low > 1 << 16:
            raise self._unknown(str(high if high > -low else low), path)
        labels = self._table(low, high)[values.astype(np.int64) - low if low else values]
        if (labels < 0).any():
            raise self._unknown(str(int(values[labels < 0][0])), path)
        return labels.astype(np.uint8)

    def _table(self, low: int, high: int) -> np.ndarray:
        """Label values low..high -> class, IGNORE, or -1 where they mean nothing; int16 [high - low + 1]."""
        table = np.full(high - low + 1, -1, dtype=np.int16)
        if not self.strict:
            table[-low : self.classes - low] = np.arange(self.classes)
            table[IGNORE - low] = IGNORE
        for value, target in self.values.items():
            if low <= value <= high:
                table[value - low] = target
        return table

    def _from_colours(self, colours: np.ndarray, path: Path) -> np.ndarray:
        if not self.colours:
            raise ValueError(
                f"{path} is coloured (RGB), its pixels must be class numbers; or say what each colour means, in "
                'classes.yaml: `mapping: {"#804080": road}`'
            )
        packed = pack_colours(colours)
        known = pack_colours(np.array(list(self.colours), dtype=np.uint8))
        order = np.argsort(known)
        place = order[np.searchsorted(known[order], packed).clip(max=len(known) - 1)]
        wrong = known[place] != packed
        if wrong.any():
            red, green, blue = (int(part) for part in colours[wrong][0])
            raise self._unknown(f'"#{red:02x}{green:02x}{blue:02x}"', path)
        return np.array(list(self.colours.values()), dtype=np.uint8)[place]

    def _unknown(self, value: str, path: Path) -> ValueError:
        return ValueError(
            f"{path} has the label value {value}, which is none of the {self.classes} classes "
            f"(0 to {self.classes - 1}, {IGNORE} = ignored): {self.remedy.format(value=value)}"
        )


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
    read_values  how a label file is read, where it is no image: Path -> integers [H,W]
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        classes: Classes,
        label_map: LabelMap,
        read_values: Callable[[Path], np.ndarray] = read_label_file,
    ) -> None:
        self.pairs, self.classes, self.label_map, self.read_values = list(pairs), classes, label_map, read_values

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index].name

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """-> image uint8 [H,W,3], labels uint8 [H,W], all IGNORE where there is no label file."""
        pair = self.pairs[index]
        image = read_image(pair.image)
        if pair.labels is None:
            return image, np.full(image.shape[:2], IGNORE, dtype=np.uint8)
        values = self.read_values(pair.labels)
        if image.shape[:2] != values.shape[:2]:
            raise ValueError(
                f"{pair.image} is {image.shape[1]}x{image.shape[0]}, its label {pair.labels} is "
                f"{values.shape[1]}x{values.shape[0]}: they must have the same size"
            )
        return image, self.label_map(values, pair.labels)


def pair_folders(images: Path, labels: Path) -> list[Pair]:
    """The files of two folders that have the same stem, sorted.

    Raises ValueError, naming folder or file, where a folder is missing or empty, or a file has no partner.
    """
    image_paths, label_paths = list_images(images), list_images(labels)
    for some, others, kind, other_folder in (
        (image_paths, label_paths, "an image without a label", labels),
        (label_paths, image_paths, "a label without an image", images),
    ):
        alone = sorted(set(some) - set(others))
        if alone:
            raise ValueError(
                f"{some[alone[0]]} is {kind}: {other_folder} has no {alone[0]}.* ({len(alone)} of {len(some)} "
                "files are so). Add the missing files or remove the others"
            )
    return [Pair(stem, image_paths[stem], label_paths[stem]) for stem in sorted(image_paths)]


def list_images(folder: Path) -> dict[str, Path]:
    """Stem -> file. Raises ValueError for a folder that is missing or empty, and for two files of one stem."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: check the data root and its layout")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if path.stem in found:
                raise ValueError(f"{found[path.stem]} and {path} have the same name: keep one of them")
            found[path.stem] = path
    if not found:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return found
