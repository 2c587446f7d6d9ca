"""Classes that nobody named: what a classes.yaml would say of a folder of masks, read from the masks themselves.

What is found depends on the files alone, not on a split or a process: all masks below the folder are looked at, or
MOST_MASKS of them at even steps.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from routeseg.data.pairs import GREY_MODES, count_values, label_mode, list_images, pack_colours, read_label_file
from routeseg.labels import IGNORE

MOST_MASKS = 5000  # that are looked at
MOST_CLASSES = 64  # that are taken for classes without a classes.yaml
BLURRED_VALUES = 30  # different label values that no class has, from which on they come from blurred borders
RARE_VALUE = 0.001  # share of pixels below which a value is none that somebody painted with
CHUNK = 64  # masks that are looked at together
BLACK, WHITE = 0, 0xFFFFFF
BACKGROUND, FOREGROUND = "background", "foreground"
BY_HAND = "or say in a classes.yaml what they mean (docs/data.md)"


class UnclearMasks(ValueError):
    """Masks that do not tell their classes. The message names a file or the folder, and the remedy."""


def are_blurred(strange: int, proper: int) -> bool:
    """Whether so many values that nobody painted, beside those that somebody did, come from blurred borders."""
    return strange > BLURRED_VALUES and strange > 2 * proper


def never_painted(files: Iterable[str | Path]) -> str:
    """Why these masks have values that nobody painted, and what to do."""
    how = (
        "they are JPEGs, which do not keep values"
        if any(_is_jpeg(Path(file)) for file in files)
        else "they look like borders of a mask that was resized, or drawn with soft edges"
    )
    return (
        f"these values were never painted: {how}. Make the masks again from the originals, as PNG with hard edges, and "
        "resize them with nearest neighbours"
    )


def _is_jpeg(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg")


@dataclass(frozen=True)
class FoundClasses:
    """The classes of masks.

    description  what a classes.yaml would say: names, and palette and mapping where they are needed
    masks, seen  how many masks there are, and how many of them were looked at
    coloured     they are told by colours, not by numbers
    """

    description: dict[str, Any]
    masks: int
    seen: int
    coloured: bool

    def __str__(self) -> str:
        names, mapping = self.description["names"], self.description.get("mapping", {})
        seen = f"{self.seen} masks" if self.seen == self.masks else f"{self.seen} of {self.masks} masks"
        ignored = [str(value) for value, target in mapping.items() if target == IGNORE] if mapping else [str(IGNORE)]
        rest = f"; {ignored[0]} is ignored" if ignored else ""
        how = "colours" if self.coloured else "numbers"
        return f"{len(names)} classes, by the {how} in {seen}: {', '.join(names)}{rest}"


def find_classes(folder: Path, masks: Sequence[Path] | None = None) -> FoundClasses:
    """The classes of the masks below a folder, or of these of them.

    Each number is a class, "class 0" and so on; 255 is ignored, but 0 and 255 alone are background and foreground.
    Each colour is a class of that name; black is the background, and the first one. Of palette files the numbers
    count, and their colours become the palette; if the files number their colours differently, the colours count.
    Raises UnclearMasks if the masks tell no classes.
    """
    paths = sorted(list_images(folder, nested=True, left_out=[]).values() if masks is None else masks)
    for path in paths:
        if _is_jpeg(path):
            raise UnclearMasks(f"{path} does not tell its classes: {never_painted([path])}")
    seen = [paths[k] for k in np.linspace(0, len(paths) - 1, min(MOST_MASKS, len(paths))).round().astype(int)]
    survey = _survey(seen, coloured=False) or _survey(seen, coloured=True)
    if survey is None or not survey.values:
        raise UnclearMasks(f"{folder} holds no mask that can be read: copy the masks again from where they come from")
    values = sorted(survey.values)
    if not survey.coloured:
        description = _of_numbers(values) | _palette(survey.palette, values)
    elif all(colour == _grey(colour & 255) for colour in values):
        description = _of_numbers([colour & 255 for colour in values])
        plain = {number: number for number in (*range(len(description["names"])), IGNORE)}
        targets = description.get("mapping", plain)
        description["mapping"] = {_hex(_grey(number)): target for number, target in targets.items()}
    else:
        description = _of_colours(values)
    if len(description["names"]) < 2:
        there = ", ".join(_hex(value) if survey.coloured else str(value) for value in values)
        raise UnclearMasks(
            f"the masks in {folder} hold nothing but {there}: label two classes at least (the rest of a picture is "
            f"one), {BY_HAND}"
        )
    return FoundClasses(description, len(paths), len(seen), survey.coloured)


def _of_numbers(numbers: Sequence[int]) -> dict[str, Any]:
    """Names, and a mapping unless the classes are numbered from 0 without a gap. The numbers are in order."""
    if list(numbers) == [0, IGNORE]:
        return {"names": [BACKGROUND, FOREGROUND], "mapping": {0: 0, IGNORE: 1}}
    plain = [number for number in numbers if number != IGNORE]
    names = [f"class {number}" for number in plain]
    if plain == list(range(len(plain))):
        return {"names": names}
    return {"names": names, "mapping": {number: k for k, number in enumerate(plain)} | {IGNORE: IGNORE}}


def _of_colours(colours: Sequence[int]) -> dict[str, Any]:
    """Names, palette and mapping of packed colours. They are in order, so that black is the first."""
    return {
        "names": [BACKGROUND if colour == BLACK else _hex(colour) for colour in colours],
        "palette": [[colour >> 16, (colour >> 8) & 255, colour & 255] for colour in colours],
        "mapping": {_hex(colour): k for k, colour in enumerate(colours)},
    }


def _palette(colours: Mapping[int, int], numbers: Sequence[int]) -> dict[str, Any]:
    """The palette of palette files for the classes of these numbers, if each has a colour of its own, not all grey."""
    classes = numbers if list(numbers) == [0, IGNORE] else [number for number in numbers if number != IGNORE]
    own = [colours[number] for number in classes if number in colours]
    if len(set(own)) < len(classes) or all(colour == _grey(colour & 255) for colour in own):
        return {}
    return {"palette": [[colour >> 16, (colour >> 8) & 255, colour & 255] for colour in own]}


def _grey(level: int) -> int:
    """0..255 -> packed colour."""
    return level * 0x010101


def _hex(colour: int) -> str:
    return f"#{colour:06x}"


@dataclass
class _Survey:
    """What some masks hold: number, or packed colour if `coloured`, -> pixels; and the colours of numbers in palette
    files, packed."""

    coloured: bool
    values: Counter[int] = field(default_factory=Counter)
    palette: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Mask:
    """The same of one mask, and Pillow's mode of its file."""

    path: Path
    mode: str
    coloured: bool
    values: dict[int, int]
    palette: dict[int, int]


def _survey(paths: Sequence[Path], coloured: bool) -> _Survey | None:
    """What the masks hold, as colours if `coloured`, else as numbers; None if numbers do not mean the same everywhere:
    a mask has colours, or two palettes differ.

    Raises UnclearMasks if there are more values than classes, or numbers beside colours.
    """
    found = _Survey(coloured)
    for mask in _look_at_all(paths, coloured):
        known = found.palette
        if not coloured and (
            mask.coloured or any(known.get(n, colour) != colour for n, colour in mask.palette.items())
        ):
            return None
        if coloured and (not mask.coloured or (mask.mode in GREY_MODES and not set(mask.values) <= {BLACK, WHITE})):
            raise UnclearMasks(
                f"{mask.path} holds numbers, and other masks beside it hold colours: save all of them in one way"
            )
        found.values.update(mask.values)
        found.palette |= mask.palette
        if len(found.values) > 4 * MOST_CLASSES:
            raise _too_many(found, mask)
    if found.values and not _are_classes(found):
        raise _too_many(found)
    return found


def _are_classes(found: _Survey) -> bool:
    """Whether so many values may be classes, and somebody painted with them."""
    if len(found.values) > MOST_CLASSES:
        return False
    numbers = set(found.values) - {IGNORE}
    if not found.coloured and numbers == set(range(len(numbers))):
        return True
    painted = sum(count >= RARE_VALUE * found.values.total() for count in found.values.values())
    return not are_blurred(len(found.values) - painted, painted)


def _too_many(found: _Survey, mask: _Mask | None = None) -> UnclearMasks:
    """The error for values that are no classes; `mask` is the one at which the count was given up."""
    what = "colours" if found.coloured else "numbers"
    count = f"{len(found.values)} different {what}"
    if mask is not None:
        count = f"more than {4 * MOST_CLASSES} different {what} ({mask.path} alone has {len(mask.values)})"
    return UnclearMasks(
        f"the masks do not tell their classes: they hold {count}, at most {MOST_CLASSES} are taken for classes: "
        f"{never_painted([])}; if they were painted, say in a classes.yaml what they mean (docs/data.md)"
    )


def _look_at_all(paths: Sequence[Path], coloured: bool) -> Iterator[_Mask]:
    """The masks in order, without those that cannot be read: check-data names them, and training skips or refuses
    them."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), CHUNK):
            masks = pool.map(partial(_look, coloured=coloured), paths[start : start + CHUNK])
            yield from (mask for mask in masks if mask is not None)


def _look(path: Path, coloured: bool) -> _Mask | None:
    try:
        mode, colours = label_mode(path)
        stored = read_label_file(path, palette=coloured, grey=coloured)
    except ValueError:
        return None
    values, counts = count_values(stored)
    palette = {}
    if colours is not None and not coloured:
        palette = {int(n): int(pack_colours(colours[n])) for n in values if n < len(colours)}
    packed = pack_colours(values) if values.ndim == 2 else values
    return _Mask(path, mode, values.ndim == 2, dict(zip(packed.tolist(), counts.tolist(), strict=True)), palette)
