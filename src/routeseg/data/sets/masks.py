"""Classes that nobody named: what a classes.yaml would say of a folder of masks, read from the masks themselves.

What is found depends on the files alone, not on a split or a process: all masks below the folder are looked at, or
MOST_MASKS of them at even steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from routeseg.data.decoding import UnreadableImage
from routeseg.data.label_files import GREY_MODES, count_values, label_mode, pack_colours, read_label_file
from routeseg.data.pairs import list_images
from routeseg.labels import IGNORE

MOST_MASKS = 5000  # that are looked at
MOST_CLASSES = 64  # that are taken for classes without a classes.yaml
MOST_LOOSE = 30  # values without an area that are ignored; more of them are refused
RARE_VALUE = 0.001  # share of pixels below which a value may be a slip
# Shares of the pixels of a value, by which a value without an area is told from a class. On 40 masks of photographs:
# what was painted fills 0.89 or more; soft borders and traces of JPEG 0.03 or less, and 0.2 to 1 of them lie between.
FILLED, BETWEEN = 0.1, 0.15
SLIP_PIXELS = 8  # of a value in a mask, without an area: no more are a slip
VIEWING_STEP = 16  # between numbers that are grey levels to be looked at, rather than numbers of classes
NEAR = 3  # steps between two values, of which one is hardly a class beside the other
IGNORED_16 = 65535  # what 255 is in masks of 16 bits
CHUNK = 64  # masks that are looked at together
BLACK, WHITE = 0, 0xFFFFFF
BACKGROUND, FOREGROUND = "background", "foreground"
BY_HAND = "or say in a classes.yaml what they mean (docs/data.md)"
LOOSE = (
    "fill no area of their own, as borders do in a mask that was resized, drawn with soft edges or saved as JPEG: make "
    "the masks again from the originals, as PNG with hard edges, and resize them with nearest neighbours"
)


class UnclearMasks(ValueError):
    """Masks that do not tell their classes. The message names a file or the folder, and the remedy."""


@dataclass(frozen=True)
class Places:
    """Where the pixels of a value are: how many there are, how many are the corner of a square of 2x2, and how many
    have both a lower and a higher value beside them."""

    pixels: int
    filled: int
    between: int

    @property
    def is_area(self) -> bool:
        return self.filled >= FILLED * self.pixels

    @property
    def is_between(self) -> bool:
        return self.between >= BETWEEN * self.pixels

    def __add__(self, other: Places) -> Places:
        return Places(self.pixels + other.pixels, self.filled + other.filled, self.between + other.between)


def places(stored: np.ndarray) -> dict[int, Places]:
    """Number, or packed colour -> where its pixels are, in a mask as it is stored: [H,W], or colours [H,W,3]."""
    values = stored if stored.dtype in (np.uint8, np.uint16) else stored.astype(np.float32)
    around = np.ones((3, 3), np.uint8)
    around[1, 1] = 0
    low, high = cv2.erode(values, around), cv2.dilate(values, around)
    between: Any = (low < values) & (values < high)
    if stored.ndim == 3:
        between = between.any(-1) & ((low <= values) & (values <= high)).all(-1)
    packed = pack_colours(stored) if stored.ndim == 3 else stored
    first = packed[:-1, :-1]
    filled = (first == packed[1:, :-1]) & (first == packed[:-1, 1:]) & (first == packed[1:, 1:])
    all_of, filled_of, between_of = (
        {int(value): int(count) for value, count in zip(*count_values(np.atleast_2d(some)), strict=True)}
        for some in (packed, first[filled], packed[between])
    )
    return {value: Places(n, filled_of.get(value, 0), between_of.get(value, 0)) for value, n in all_of.items()}


def white_alone(masks: Iterable[Mapping[int, int]], white: int = IGNORE) -> tuple[int, int]:
    """In how many masks, value -> pixels, there are `white` and 0 alone, and in how many `white` and others."""
    alone = beside = 0
    for values in masks:
        least = max(RARE_VALUE * sum(values.values()), 1)
        if values.get(white, 0) >= least:
            others = sum(count for value, count in values.items() if value not in (0, white)) >= least
            beside += others
            alone += not others and values.get(0, 0) >= least
    return alone, beside


@dataclass(frozen=True)
class FoundClasses:
    """The classes of masks.

    description  what a classes.yaml would say: names, and palette and mapping where they are needed
    masks, seen  how many masks there are, and how many of them were looked at
    coloured     they are told by colours, not by numbers
    notes        what was decided that the masks leave open
    """

    description: dict[str, Any]
    masks: int
    seen: int
    coloured: bool
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        names, mapping = self.description["names"], self.description.get("mapping", {})
        seen = f"{self.seen} masks" if self.seen == self.masks else f"{self.seen} of {self.masks} masks"
        ignored = IGNORE not in mapping if not mapping else mapping.get(IGNORE) == IGNORE
        rest = "".join(f"; {note}" for note in ([f"{IGNORE} is ignored"] if ignored else []) + list(self.notes))
        how = "colours" if self.coloured else "numbers"
        return f"{len(names)} classes, by the {how} in {seen}: {', '.join(names)}{rest}"


def find_classes(folder: Path, masks: Sequence[Path] | None = None) -> FoundClasses:
    """The classes of the masks below a folder, or of these of them.

    Each number is a class, "class 0" and so on; 255 is ignored, but 0 and 255 alone are background and foreground.
    Each colour is a class of that name; black is the background, and the first one. Of palette files the numbers
    count, and their colours become the palette; if the files number their colours differently, the colours count.
    A value that fills no area, as soft borders and slips of the brush, is ignored.
    Raises UnclearMasks if the masks tell no classes, and if 255 may be a class as well as what is ignored.
    """
    paths = sorted(list_images(folder, nested=True, left_out=[]).values() if masks is None else masks)
    seen = [paths[k] for k in np.linspace(0, len(paths) - 1, min(MOST_MASKS, len(paths))).round().astype(int)]
    survey = _survey(seen, coloured=False) or _survey(seen, coloured=True)
    if survey is None or not survey.values:
        raise UnclearMasks(f"{folder} holds no mask that can be read: check-data names the files")
    loose = survey.loose()
    values = sorted(set(survey.values) - loose)
    notes = _of_loose(survey, loose)
    if survey.coloured and any(colour != _grey(colour & 255) for colour in values):
        description = _of_colours(values, sorted(loose))
    elif survey.coloured:
        description, more = _of_numbers([colour & 255 for colour in values], (), survey.as_grey(values), folder)
        mapping = description.get("mapping") or {n: n for n in (*range(len(description["names"])), IGNORE)}
        spelled = {_hex(_grey(number)): target for number, target in mapping.items()}
        description["mapping"] = spelled | {_hex(colour): IGNORE for colour in sorted(loose)}
        notes += more
    else:
        description, more = _of_numbers(values, sorted(loose), survey, folder)
        description |= _palette(survey.palette, description)
        notes += more
    if len(description["names"]) < 2:
        there = ", ".join(_hex(value) if survey.coloured else str(value) for value in values)
        raise UnclearMasks(
            f"the masks in {folder} hold nothing but {there}: label two classes at least (the rest of an image is "
            f"one), {BY_HAND}"
        )
    return FoundClasses(description, len(paths), len(seen), survey.coloured, tuple(notes))


def _of_loose(survey: _Survey, loose: set[int]) -> list[str]:
    if not loose:
        return []
    names = ", ".join(_hex(value) if survey.coloured else str(value) for value in sorted(loose))
    return [f"{names} ({survey.share(loose)}) without an area of their own, as soft borders and slips: ignored"]


def _of_numbers(
    numbers: Sequence[int], loose: Sequence[int], survey: _Survey, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """Names, and a mapping unless the classes are numbered from 0 without a gap; and what is to be said. Both kinds of
    numbers are in order. Raises UnclearMasks if 255 may be a class."""
    ignored = {number: IGNORE for number in (*loose, *(number for number in numbers if number < 0))}
    notes = [f"{number} is ignored" for number in numbers if number < 0]
    numbers = [number for number in numbers if number >= 0]
    white = IGNORED_16 if IGNORED_16 in numbers else IGNORE
    if list(numbers) == [0, white]:
        return {"names": [BACKGROUND, FOREGROUND], "mapping": {0: 0, white: 1} | ignored}, notes
    plain = [number for number in numbers if number != white]
    if white not in numbers or len(plain) < 2:
        return _named(plain, {IGNORE: IGNORE} | ignored), notes
    steps = np.linspace(0, white, len(numbers))
    if np.abs(steps - numbers).max() <= 1:
        return _named(numbers, ignored), [*notes, f"{white} is a class, for the values are even steps up to it"]
    alone, beside = white_alone(survey.masks, white)
    if alone > beside:
        why = f"in {alone} of {len(survey.masks)} masks it is all that there is beside 0"
    elif white - plain[-1] <= NEAR:
        why = f"{plain[-1]} is hardly a class beside it"
    elif np.diff(numbers).min() >= VIEWING_STEP:
        why = f"{', '.join(map(str, numbers))} look like grey levels, not like numbers of classes"
    else:
        notes += [f"{white} is ignored"] if white != IGNORE else []
        return _named(plain, {white: IGNORE} | ignored), notes
    readings = [("if it is ignored", _mapped(plain, {white: IGNORE} | ignored))]
    if len(plain) == 2:
        same = _mapped(plain, {white: 1} | ignored)
        readings.append((f"if it is the same as {plain[1]}", same))
    readings.append(("if it is a class of its own", _mapped(numbers, ignored)))
    lines = "; ".join(f"{when}: `{_one_line(what, survey.coloured)}`" for when, what in readings)
    raise UnclearMasks(
        f"is {white} a class in {folder}, or ignored? It is {survey.share([white])}, and "
        f"{why}. Say so in {folder.parent / 'classes.yaml'}, in one line; {lines}"
    )


def _mapped(numbers: Sequence[int], others: Mapping[int, int]) -> dict[str, Any]:
    """Names of classes of these numbers, and a mapping: of them, and of others."""
    mapping = {number: k for k, number in enumerate(numbers)} | dict(others)
    return {"names": [f"class {number}" for number in numbers], "mapping": mapping}


def _named(numbers: Sequence[int], ignored: Mapping[int, int]) -> dict[str, Any]:
    """The same, without a mapping that says nothing new."""
    description = _mapped(numbers, ignored)
    if list(numbers) == list(range(len(numbers))) and set(ignored) <= {IGNORE}:
        del description["mapping"]
    return description


def _one_line(description: Mapping[str, Any], coloured: bool) -> str:
    """What a classes.yaml says, in one line of it."""
    mapping = {
        _hex(_grey(value)) if coloured else value: "ignore" if target == IGNORE else target
        for value, target in description["mapping"].items()
    }
    data = {"names": description["names"], "mapping": mapping}
    return yaml.safe_dump(data, default_flow_style=True, sort_keys=False, width=10_000).strip()


def _of_colours(colours: Sequence[int], loose: Sequence[int]) -> dict[str, Any]:
    """Names, palette and mapping of packed colours. They are in order, so that black is the first."""
    return {
        "names": [BACKGROUND if colour == BLACK else _hex(colour) for colour in colours],
        "palette": [[colour >> 16, (colour >> 8) & 255, colour & 255] for colour in colours],
        "mapping": {_hex(colour): k for k, colour in enumerate(colours)} | {_hex(colour): IGNORE for colour in loose},
    }


def _palette(colours: Mapping[int, int], description: Mapping[str, Any]) -> dict[str, Any]:
    """The palette of palette files for these classes, if each has a colour of its own, not all grey."""
    mapping = description.get("mapping") or {k: k for k in range(len(description["names"]))}
    own = [colours[number] for number, target in mapping.items() if target != IGNORE and number in colours]
    if len(set(own)) < len(description["names"]) or all(colour == _grey(colour & 255) for colour in own):
        return {}
    return {"palette": [[colour >> 16, (colour >> 8) & 255, colour & 255] for colour in own]}


def _grey(level: int) -> int:
    """0..255 -> packed colour."""
    return level * 0x010101


def _hex(colour: int) -> str:
    return f"#{colour:06x}"


@dataclass
class _Survey:
    """What some masks hold: of each mask number, or packed colour if `coloured`, -> pixels; where these are in all
    together, and in how many masks; and the colours of numbers in palette files, packed."""

    coloured: bool
    masks: list[dict[int, int]] = field(default_factory=list)
    values: dict[int, Places] = field(default_factory=dict)
    palette: dict[int, int] = field(default_factory=dict)

    def add(self, mask: _Mask) -> None:
        self.masks.append({value: found.pixels for value, found in mask.values.items()})
        for value, found in mask.values.items():
            self.values[value] = self.values.get(value, Places(0, 0, 0)) + found
        self.palette |= mask.palette

    def share(self, values: Iterable[int]) -> str:
        """How much of the masks has one of these values, in words."""
        count = sum(self.values[value].pixels for value in values)
        total = sum(found.pixels for found in self.values.values())
        if count < RARE_VALUE * total:
            return f"{count} pixel{'s' * (count > 1)}"
        return f"{100 * count / total:.1f} % of the pixels"

    def loose(self) -> set[int]:
        """The values that fill no area: slips, and what lies between others or hardly differs from one with an area.
        If all numbers are counted from 0, a few thin ones are classes. None, if fewer than two others are left."""
        numbers = set(self.values) - {IGNORE}
        areas = [value for value, found in self.values.items() if found.is_area]
        thin = {value: found for value, found in self.values.items() if not found.is_area}
        loose = {value for value, found in thin.items() if found.is_between}
        if self.coloured or numbers != set(range(len(numbers))):
            loose |= {value for value in thin if any(self._are_near(value, area) for area in areas)}
        elif 2 * len(loose) <= len(areas):
            loose = set()
        loose |= {
            value
            for value, found in thin.items()
            if not found.filled and found.pixels <= SLIP_PIXELS * sum(value in mask for mask in self.masks)
        }
        return loose if len(self.values) - len(loose) > 1 else set()

    def _are_near(self, one: int, other: int) -> bool:
        parts = (0, 8, 16) if self.coloured else ()
        steps = [abs((one >> k & 255) - (other >> k & 255)) for k in parts] or [abs(one - other)]
        return max(steps) <= NEAR

    def as_grey(self, values: Sequence[int]) -> _Survey:
        """Those of its colours that are all grey, by their levels."""
        grey = [{value & 255: mask[value] for value in values if value in mask} for mask in self.masks]
        return _Survey(True, grey, {value & 255: self.values[value] for value in values})


@dataclass(frozen=True)
class _Mask:
    """The same of one mask, and Pillow's mode of its file."""

    path: Path
    mode: str
    coloured: bool
    values: dict[int, Places]
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
        found.add(mask)
        if len(found.values) > 4 * MOST_CLASSES:
            raise _too_many(found, mask)
    loose = found.loose()
    if len(found.values) - len(loose) > MOST_CLASSES or len(loose) > MOST_LOOSE:
        raise _too_many(found)
    return found


def _too_many(found: _Survey, mask: _Mask | None = None) -> UnclearMasks:
    """The error for values that are no classes; `mask` is the one at which the count was given up."""
    what = "colours" if found.coloured else "numbers"
    count, loose = f"{len(found.values)} different {what}", found.loose()
    if mask is not None:
        count = f"more than {4 * MOST_CLASSES} different {what} ({mask.path} alone has {len(mask.values)})"
    return UnclearMasks(
        f"the masks do not tell their classes: they hold {count}, of which {len(loose)} {LOOSE}. At most "
        f"{MOST_CLASSES} are taken for classes; if more were painted, {BY_HAND.removeprefix('or ')}"
    )


def _look_at_all(paths: Sequence[Path], coloured: bool) -> Iterator[_Mask]:
    """The masks in order, without those that cannot be read: check-data names them, and training skips them. Raises
    UnclearMasks for one that is no mask, which ends a training."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), CHUNK):
            masks = pool.map(partial(_look, coloured=coloured), paths[start : start + CHUNK])
            yield from (mask for mask in masks if mask is not None)


def _look(path: Path, coloured: bool) -> _Mask | None:
    try:
        mode, colours = label_mode(path)
        stored = read_label_file(path, palette=coloured, grey=coloured)
    except UnreadableImage:
        return None
    except ValueError as error:
        raise UnclearMasks(str(error)) from error
    values = places(stored)
    palette = {}
    if colours is not None and not coloured:
        palette = {n: int(pack_colours(colours[n])) for n in values if n < len(colours)}
    return _Mask(path, mode, stored.ndim == 3, values, palette)
