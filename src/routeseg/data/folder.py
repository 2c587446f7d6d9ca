"""Pairs of image and label files: reading them, and the `folder` layout for your own pictures.

    ROOT/classes.yaml                 names: [...]; optional: palette: [[r,g,b], ...], mapping: {value: class, ...}
    ROOT/images/{train,val}/NAME.*    RGB pictures (.png or .jpg)
    ROOT/masks/{train,val}/NAME.png   one byte a pixel: the class, 255 = ignored

Legend: image uint8 [H,W,3] RGB, labels uint8 [H,W], K classes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import yaml
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


def read_labels(path: Path) -> np.ndarray:
    """A label file with one integer a pixel, [H,W]. Raises UnreadableImage, or ValueError where it has colours."""
    try:
        with Image.open(path) as file:
            values = np.asarray(file)
    except BAD_IMAGE as error:
        raise UnreadableImage(f"cannot read {path} as a label image: {error}") from error
    if values.ndim != 2 or values.dtype.kind not in "uib":
        raise ValueError(f"{path} is no label image: it needs one channel of class numbers, it has {values.shape}")
    return values


class PairedFiles:
    """Image and label files of the same stem in two folders.

    `mapping` sends label values to classes (or to 255, ignored); values without an entry stay.
    Raises ValueError, naming folder or file, where a folder is missing or empty, or a picture has no partner.
    """

    def __init__(
        self, images: Path, labels: Path, classes: Classes, mapping: Mapping[int, int] | None = None, remedy: str = ""
    ) -> None:
        self.classes = classes
        self.mapping = dict(mapping or {})
        self.remedy = remedy or "map it in classes.yaml, for example `mapping: {%d: 255}` to ignore it"
        self.image_paths = _list_images(images)
        label_paths = _list_images(labels)
        for some, others, kind, other_folder in (
            (self.image_paths, label_paths, "an image without a label", labels),
            (label_paths, self.image_paths, "a label without an image", images),
        ):
            alone = sorted(set(some) - set(others))
            if alone:
                raise ValueError(
                    f"{some[alone[0]]} is {kind}: {other_folder} has no {alone[0]}.* ({len(alone)} of {len(some)} "
                    "files are so). Add the missing files or remove the others"
                )
        self.stems = sorted(self.image_paths)
        self.label_paths = label_paths

    def __len__(self) -> int:
        return len(self.stems)

    def name(self, index: int) -> str:
        return self.stems[index]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        stem = self.stems[index]
        image, values = read_image(self.image_paths[stem]), read_labels(self.label_paths[stem])
        if image.shape[:2] != values.shape:
            raise ValueError(
                f"{self.image_paths[stem]} is {image.shape[1]}x{image.shape[0]}, its label {self.label_paths[stem]} is "
                f"{values.shape[1]}x{values.shape[0]}: they must have the same size"
            )
        labels = values.astype(np.int64)
        for value, target in self.mapping.items():
            labels[values == value] = target
        wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= len(self.classes)))]
        if wrong.size:
            value = int(wrong.flat[0])
            remedy = self.remedy % value if "%d" in self.remedy else self.remedy
            raise ValueError(
                f"{self.label_paths[stem]} has the label value {value}, but there are {len(self.classes)} classes "
                f"(0 to {len(self.classes) - 1}, {IGNORE} = ignored): {remedy}"
            )
        return image, labels.astype(np.uint8)


def open_folder(root: Path, split: str) -> PairedFiles:
    """A split of the `folder` layout (see the top of this file)."""
    classes, mapping = read_classes(root / "classes.yaml")
    return PairedFiles(root / "images" / split, root / "masks" / split, classes, mapping)


def read_classes(path: Path) -> tuple[Classes, dict[int, int]]:
    """`names`, and optionally `palette` and `mapping`, of a classes.yaml. Raises ValueError where it has none."""
    if not path.is_file():
        raise ValueError(f"no file {path}: it names the classes, for example\n  names: [road, car]")
    try:
        data = yaml.safe_load(path.read_text())
        names = tuple(str(name) for name in data["names"])
        palette = tuple((int(r), int(g), int(b)) for r, g, b in data["palette"]) if data.get("palette") else None
        mapping = {int(value): int(target) for value, target in (data.get("mapping") or {}).items()}
        if palette is not None and len(palette) != len(names):
            raise ValueError(f"the palette has {len(palette)} colours for {len(names)} names")
        if palette is not None and not all(0 <= part <= 255 for colour in palette for part in colour):
            raise ValueError("colours are three numbers from 0 to 255")
        wrong = [target for target in mapping.values() if target != IGNORE and not 0 <= target < len(names)]
        if wrong:
            raise ValueError(
                f"the mapping leads to {wrong[0]}, classes are 0 to {len(names) - 1}, or {IGNORE} to ignore"
            )
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} does not describe classes ({error}): expected `names: [road, car]`") from error
    return Classes(names, palette), mapping


def write_classes(path: Path, names: Sequence[str], palette: Sequence[Sequence[int]]) -> None:
    """The inverse of `read_classes`."""
    path.write_text(yaml.safe_dump({"names": list(names), "palette": [list(map(int, c)) for c in palette]}))


def _list_images(folder: Path) -> dict[str, Path]:
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
