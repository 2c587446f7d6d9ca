"""Exports of labelling tools become data sets of the `folder` layout.

COCO-style: one JSON of polygons and run lengths; its masks are drawn, the images stay where they are.
VOC-style:  JPEGImages/, SegmentationClass/ and a list of classes; nothing but a classes.yaml is added.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image

from routeseg.data.pairs import list_images, one_form
from routeseg.data.sets.class_lists import BACKGROUNDS, read_class_lists
from routeseg.data.sets.folder import write_classes
from routeseg.data.sets.roots import FILE, expected, match_names
from routeseg.data.sets.undescribed import VAL_FRACTION, divide
from routeseg.data.sets.voc import voc_palette
from routeseg.errors import CONTROL, require
from routeseg.files import check_writable, write_atomically
from routeseg.labels import IGNORE

FARTHEST = 1e6  # coordinate that is drawn: pycocotools walks along outlines step by step, and never ends at NaN
VOC_TREE = """
EXPORT/JPEGImages/NAME.jpg
EXPORT/SegmentationClass/NAME.png          coloured, or class numbers
EXPORT/labelmap.txt or class_names.txt     lines NAME:R,G,B:: or lines NAME; other lists of classes serve as well
EXPORT/ImageSets/Segmentation/LIST.txt     may be left out
"""


@dataclass(frozen=True)
class Converted:
    """The classes.yaml that was written, the names of the classes, and what a user should know about them."""

    path: Path
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Annotations:
    """A COCO-style JSON and the folder of its images. Raises ValueError if the one does not fit the other.

    categories  id -> entry
    images      id -> the name of the file below the folder, without its suffix, and (height, width)
    objects     id of the image -> annotations
    """

    def __init__(self, path: Path, images: Path) -> None:
        self.path, self.folder = path, images
        data = _read_json(path)
        parts = ("images", "annotations", "categories")
        missing = [key for key in parts if not isinstance(data, dict) or not isinstance(data.get(key), list)]
        if missing:
            raise ValueError(
                f"{path} has no list `{missing[0]}`: export as COCO (instance segmentation), with {', '.join(parts)}"
            )
        categories, listed = self._by_id("category", data["categories"]), self._by_id("image", data["images"])
        for entry in categories.values():
            entry.text("name")
            if entry.data.get("supercategory") is not None:
                entry.text("supercategory", empty=True)
        self.categories = {number: entry.data for number, entry in categories.items()}
        if not listed:
            raise ValueError(f"{path} lists no images")
        if not self.folder.is_dir():
            raise ValueError(f"no folder {self.folder}: give the folder of the images with --images")
        names = self._names([entry.text("file_name") for entry in listed.values()])
        self.images = {key: (name, listed[key].size()) for key, name in zip(listed, names, strict=True)}
        self.objects: dict[int, list[dict]] = defaultdict(list)
        for place, one in enumerate(data["annotations"]):
            entry = _Entry(path, "annotation", place, one)
            ids = {key: entry.number(key) for key in ("image_id", "category_id")}
            self.objects[ids["image_id"]].append(one | ids)
        self._check()

    def __len__(self) -> int:
        return len(self.images)

    def _by_id(self, kind: str, listed: list) -> dict[int, _Entry]:
        found: dict[int, _Entry] = {}
        for place, data in enumerate(listed):
            entry = _Entry(self.path, kind, place, data)
            if found.setdefault(entry.number("id"), entry) is not entry:
                raise entry.wrong("id", "an id of its own")
        return found

    def _names(self, called: Sequence[str]) -> Iterator[str]:
        """Which file below the folder each image is. Tools write its path on their own machine, or an address: what
        counts is the end of it. A file that is not there keeps the name that it is called."""
        paths = [
            unquote(name.partition("?d=")[2] or name.partition("?")[0]) if "://" in name else name for name in called
        ]
        below: dict[str, list[str]] = defaultdict(list)  # name without folders -> names
        for name in self.files:
            below[name.rpartition("/")[2]].append(name)
        for path, found in zip(paths, match_names(paths, self.files), strict=True):
            base = PureWindowsPath(one_form(path))  # / ends a folder as well
            ends = [found] if found in self.files else below.get(base.stem, [found])
            if len(ends) > 1:
                raise ValueError(
                    f"{self.folder} has {len(ends)} images called {base.name}, and {self.path} does not say which of "
                    f"them {path} is: keep one, or rename them"
                )
            yield ends[0]

    def _check(self) -> None:
        names = [name for name, _ in self.images.values()]
        lost = [name for name in names if name not in self.files]
        if lost:
            raise ValueError(
                f"{self.folder} has no {PureWindowsPath(lost[0]).stem}.*, which {self.path} lists as {lost[0]} "
                f"({len(lost)} of {len(names)} are absent): give the folder that holds the images with --images"
            )
        for name, count in Counter(names).items():
            if count > 1:
                raise ValueError(
                    f"{self.path} has {count} images called {name}: rename them, so that each has its mask"
                )
        if strangers := set(self.objects) - set(self.images):
            raise ValueError(f"{self.path} has annotations of an image {min(strangers)}, which it does not list")
        unknown = {entry["category_id"] for entries in self.objects.values() for entry in entries} - set(
            self.categories
        )
        if unknown:
            raise ValueError(f"{self.path} has annotations of a category {min(unknown)}, which it does not name")
        every = [entry for entries in self.objects.values() for entry in entries]
        if every and not any(_may_be_drawn(entry.get("segmentation")) for entry in every):
            raise ValueError(
                f"{self.path} has {len(every)} annotations and no outlines, but boxes or points at most: there are no "
                "masks. Label polygons or masks, and export as COCO (instance segmentation)"
            )

    @property
    def used(self) -> set[int]:
        """The categories that have objects."""
        return {entry["category_id"] for entries in self.objects.values() for entry in entries}

    @cached_property
    def files(self) -> dict[str, Path]:
        return list_images(self.folder, nested=True)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no JSON: it cannot be read from line {error.lineno}, column {error.colno}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no JSON: it is no text in UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"{path} is no JSON that COCO writes: its lists are nested too deeply") from error


@dataclass(frozen=True)
class _Entry:
    """An entry of a list in a COCO-style file. A wrong field is a ValueError that names file, id and field."""

    path: Path
    kind: str
    place: int
    data: Any

    def wrong(self, field: str, expected: str) -> ValueError:
        """The error for a field; also if the entry has no fields at all."""
        which = f"{self.kind} {ascii(self.data['id'])}" if self._has("id") else f"the {self.kind} at place {self.place}"
        what = f"has `{field}` {ascii(self.data[field])[:60]}" if self._has(field) else f"has no `{field}`"
        return ValueError(f"{self.path} is not as COCO writes it: {which} {what}, which must be {expected}")

    def _has(self, field: str) -> bool:
        return isinstance(self.data, dict) and field in self.data

    def number(self, field: str, least: float = -math.inf) -> int:
        """A whole number, also as a text or as 3.0."""
        value = self.data[field] if self._has(field) else None
        if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,18}\s*", value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < least:
            raise self.wrong(field, "a whole number" + (f", at least {least}" if least > -math.inf else ""))
        return int(value)

    def text(self, field: str, empty: bool = False) -> str:
        """A line of text; a number counts as one."""
        value = self.data[field] if self._has(field) else None
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.wrong(field, "a text")
        if CONTROL.search(str(value)) or not (empty or str(value).strip()):
            raise self.wrong(field, "a line of text")
        return str(value)

    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.number("height", least=1), self.number("width", least=1)


def convert_coco(
    parts: Mapping[str, Annotations],
    output: Path,
    background: bool = True,
    on_image: Callable[[], None] | None = None,
) -> Converted:
    """Draws the masks of COCO-style annotations, larger objects first: OUTPUT/masks/, lists, and OUTPUT/classes.yaml.

    parts       split -> its annotations; if there is only one, a part of it is set aside for validation, by name
    background  pixels without an object are the first class, and not ignored
    on_image    called after each image (for a progress bar)
    Raises ValueError, naming the extra, if pycocotools is missing, and if OUTPUT holds a data set.
    """
    tool = require("pycocotools.mask", "coco", "a file of COCO annotations")
    if (output / FILE).exists():
        raise ValueError(f"{output} already holds a data set: choose another folder")
    categories, notes = _categories(parts)
    names = [str(entry["name"]) for entry in categories.values()]
    first = next((names.index(name) for name in BACKGROUNDS if name in names), None)
    if background and first is None:
        names, first = ["background", *names], 0
        classes = {key: k for k, key in enumerate(categories, 1)}
    else:
        classes = {key: k for k, key in enumerate(categories)}
    if len(names) > IGNORE:
        raise ValueError(f"{len(names)} categories: a mask holds at most {IGNORE}")
    empty = first if background and first is not None else IGNORE
    check_writable(output, "output folder")
    boxes = 0
    for split, part in parts.items():
        for number, (name, size) in part.images.items():
            mask, without = _paint(tool, part.path, size, part.objects.get(number, []), classes, empty)
            boxes += without
            write_atomically(output / "masks" / split / f"{name}.png", _png(mask))
            if on_image is not None:
                on_image()
        lines = "".join(f"{name}\n" for name in sorted(name for name, _ in part.images.values()))
        write_atomically(output / f"{split}.txt", lines.encode(errors="surrogateescape"))
    if boxes:
        notes.append(f"annotations without an outline, with a box at most, were left out: {boxes}")
    where = {split: _seen_from(part.folder, output) for split, part in parts.items()}
    if len(parts) == 1:
        (split,) = parts
        layout = {"images": where[split], "masks": f"masks/{split}"}
        layout["split"] = {"val_fraction": VAL_FRACTION, "seed": 0, "list": f"{split}.txt"}  # type: ignore[assignment]
    else:
        layout = {"images": where, "masks": {split: f"masks/{split}" for split in parts}}  # type: ignore[dict-item]
        layout["split"] = {split: f"{split}.txt" for split in parts}  # type: ignore[assignment]
    write_classes(output / FILE, names, voc_palette()[: len(names)], **layout)  # last: a folder with it is complete
    return Converted(output / FILE, tuple(names), tuple(notes))


def _categories(parts: Mapping[str, Annotations]) -> tuple[dict[int, dict], list[str]]:
    """Category id -> entry, by id, and notes. Raises ValueError if two files do not agree.

    Some tools write the project's name as a category above all others, without a single object: that is left out.
    """
    merged: dict[int, dict] = {}
    for part in parts.values():
        for key, entry in part.categories.items():
            if merged.setdefault(key, entry)["name"] != entry["name"]:
                raise ValueError(
                    f"{part.path} calls category {key} {entry['name']}, another file {merged[key]['name']}: export "
                    "them together"
                )
    used = set().union(*(part.used for part in parts.values()))
    if not used:
        raise ValueError(f"{next(iter(parts.values())).path} has no annotations")
    above = {entry.get("supercategory") for entry in merged.values()} - {None, "none"}
    left_out = [key for key, entry in merged.items() if key not in used and entry["name"] in above]
    notes = [
        f"{merged[key]['name']} stands above other categories and has no objects: it is no class" for key in left_out
    ]
    kept = {key: merged[key] for key in sorted(merged) if key not in left_out}
    twice = [name for name, count in Counter(str(entry["name"]) for entry in kept.values()).items() if count > 1]
    if twice:
        raise ValueError(f"{next(iter(parts.values())).path} has two categories called {twice[0]}: rename one")
    return kept, notes


def _png(mask: np.ndarray) -> bytes:
    """A palette PNG, whose bytes are the classes and whose colours can be told apart."""
    image, data = Image.fromarray(mask), io.BytesIO()
    image.putpalette([part for colour in voc_palette() for part in colour])
    image.save(data, format="PNG")
    return data.getvalue()


def _paint(
    tool: Any, path: Path, size: tuple[int, int], objects: Sequence[dict], classes: Mapping[int, int], empty: int
) -> tuple[np.ndarray, int]:
    """A mask uint8 [H,W], larger objects first so that smaller ones stay visible; and how many have no outline."""
    shapes = []
    without = 0
    for entry in objects:
        with _naming(path, entry):
            runs = _runs(tool, entry.get("segmentation"), size)
            if runs is None:
                without += 1
            else:
                shapes.append((int(tool.area(runs)), runs, entry))
    mask = np.full(size, empty, dtype=np.uint8)
    for _, runs, entry in sorted(shapes, key=lambda shape: -shape[0]):
        with _naming(path, entry):
            mask[tool.decode(runs).astype(bool)] = classes[entry["category_id"]]
    return mask, without


class _BadOutline(ValueError):
    """An outline that is not as COCO writes it; the message says why."""


@contextmanager
def _naming(path: Path, entry: dict) -> Iterator[None]:
    """Turns whatever a damaged outline raises in this block into a ValueError that names the annotation."""
    try:
        yield
    except Exception as error:  # pycocotools raises errors of every kind
        reason = str(error) if isinstance(error, _BadOutline) else "its run lengths cannot be decoded"
        raise ValueError(
            f"{path}: annotation {ascii(entry.get('id'))} has no readable segmentation: {reason}"
        ) from error


def _runs(tool: Any, outline: Any, size: tuple[int, int]) -> Any:
    """An outline as pycocotools' run lengths, or None if there is none."""
    if not _may_be_drawn(outline):
        return None
    if isinstance(outline, dict):
        counts = outline.get("counts")
        if outline.get("size") != list(size):
            raise _BadOutline(f"its run lengths are for `size` {ascii(outline.get('size'))}, its image is {list(size)}")
        if isinstance(counts, str):
            return {"size": list(size), "counts": counts.encode()}
        if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
            raise _BadOutline("`counts` must be whole numbers, or a text as pycocotools writes it")
        if sum(counts) != size[0] * size[1]:
            raise _BadOutline(f"`counts` add up to {sum(counts)} pixels, its image has {size[0] * size[1]}")
        return tool.frPyObjects({"size": list(size), "counts": counts}, *size)
    polygons = [outline] if isinstance(outline, list) and not any(isinstance(one, list) for one in outline) else outline
    if not isinstance(polygons, list) or not all(isinstance(polygon, list) for polygon in polygons):
        raise _BadOutline("it must be a list of polygons, or run lengths")
    if any(isinstance(n, bool) or not isinstance(n, int | float) for polygon in polygons for n in polygon):
        raise _BadOutline("a polygon must be numbers, x, y, x, y and so on")
    if any(len(polygon) % 2 for polygon in polygons):
        raise _BadOutline("a polygon has an odd number of coordinates")
    if not all(abs(number) <= FARTHEST for polygon in polygons for number in polygon):
        raise _BadOutline("a coordinate is no number, or far outside the image")
    polygons = [[float(number) for number in polygon] for polygon in polygons if len(polygon) >= 6]
    return tool.merge(tool.frPyObjects(polygons, *size))


def _may_be_drawn(outline: Any) -> bool:
    """Whether it is more than nothing, points, or lines."""
    parts = outline if isinstance(outline, list) and any(isinstance(one, list) for one in outline) else [outline]
    return any(one and not (isinstance(one, list) and len(one) < 6) for one in parts)


def _seen_from(folder: Path, base: Path) -> str:
    """A relative path if it is short, so that both may be moved together; else the absolute one."""
    relative = os.path.relpath(os.path.realpath(folder), os.path.realpath(base))
    return str(folder.absolute()) if relative.count("..") > 2 else Path(relative).as_posix()


def convert_voc(export: Path, images: str | None = None, background: bool = True) -> Converted:
    """Writes EXPORT/classes.yaml for a VOC-style export; the images and masks are not touched.

    images      the folder of the images, if it is not EXPORT/JPEGImages
    background  the class background is kept; else it is ignored
    Raises ValueError, showing the expected tree, if something is missing.
    """
    image_folder = Path(images) if images is not None else export / "JPEGImages"
    if (export / FILE).exists():
        raise ValueError(f"{export / FILE} is already there: remove it to write it anew")
    for folder in (export, image_folder):
        if not folder.is_dir():
            raise ValueError(
                f"no folder {folder}; {expected(VOC_TREE)}\nor give the folder of the images with --images"
            )
    masks = next((m for m in ("SegmentationClass", "SegmentationClassPNG") if any((export / m).rglob("*.png"))), None)
    if masks is None:
        raise ValueError(f"{export} has no SegmentationClass/ with PNGs in it; {expected(VOC_TREE)}")
    listed = next(read_class_lists(export), None)
    if listed is None:
        raise ValueError(
            f"{export} has no list of the classes, such as labelmap.txt or class_names.txt; {expected(VOC_TREE)}"
        )
    in_masks = list_images(export / masks, nested=True)
    described = listed.describe(sorted(in_masks.values()))
    names, mapping, palette = described["names"], described.get("mapping", {}), described.get("palette")
    if not background:
        gone = next((k for k, name in enumerate(names) if name in BACKGROUNDS), None)
        if gone is None or len(names) == 1:
            raise ValueError(
                f"{export} has the classes {', '.join(names)}: to ignore the background, there must be a class called "
                f"{' or '.join(BACKGROUNDS)}, and another one; leave --background out"
            )
        mapping = mapping or {k: k for k in range(len(names))}
        mapping = {key: IGNORE if k in (gone, IGNORE) else k - (k > gone) for key, k in mapping.items()}
        names, palette = names[:gone] + names[gone + 1 :], palette and palette[:gone] + palette[gone + 1 :]
    layout: dict[str, Any] = {"images": _seen_from(image_folder, export), "masks": masks}
    if mapping:
        layout["mapping"] = mapping
    layout["split"], said, left = divide(
        export, sorted(in_masks.keys() & list_images(image_folder, nested=True).keys())
    )
    check_writable(export, "folder")
    write_classes(export / FILE, names, palette, **layout)
    notes = (said, *([f"left out: {', '.join(left)}"] if left else []))
    return Converted(export / FILE, tuple(names), notes)
