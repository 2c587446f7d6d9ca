"""Lists of classes that labelling tools and people leave beside the masks, in the formats that are in use.

classes.txt, labels.txt, codes.txt, ...   a name a line, which may have its number or colour before or behind it
class_names.txt                           the same, of labelme2voc: __ignore__ comes first and is none
labelmap.txt                              lines NAME:R,G,B:: of CVAT
label_colors.txt                          lines R G B NAME
_classes.csv, class_dict.csv              of Roboflow and others: tables of the same, with a heading
*.json                                    a list of names, or an object: name -> number or colour, number -> name; also
                                          as `labels` (dataset.json of nnU-Net) or `classes` (meta.json of Supervisely)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from routeseg.data.label_files import count_values, label_mode, pack_colours, read_label_file
from routeseg.data.sets.masks import BACKGROUND, UnclearMasks, find_classes
from routeseg.data.sets.roots import in_windows_encoding, read_lines
from routeseg.errors import CONTROL
from routeseg.labels import IGNORE, Colour

FILES = (  # by which goes first
    "labelmap.txt class_names.txt classes.txt class.txt classnames.txt labels.txt label_names.txt names.txt codes.txt "
    "categories.txt classes.names label_colors.txt label_color.txt _classes.csv class_dict.csv class_dict_seg.csv "
    "classes.csv labels_class_dict.csv label_colors.csv obj_class_to_machine_color.json classes.json labels.json "
    "id2label.json dataset.json meta.json"
).split()
BACKGROUNDS = (BACKGROUND, "_background_", "__background__")
IGNORED = ("__ignore__", "ignore")  # names of what is no class
NO_COLOUR = -1  # what numbers of 16 bits are
LOOKED_AT = 20  # masks, to see whether they have the colours of a list
BORDER = "#e0e0c0"  # VOC's border of objects
COLOUR_BEHIND = re.compile(r"(.*?)[\s:,;]+(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})[\s:,;]*")
COLOUR_BEFORE = re.compile(r"(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(.*)")
NUMBER_BEHIND = re.compile(r"(.*?)\s*[:,;=\t]\s*(\d+)")
NUMBER_BEFORE = re.compile(r"(\d+)\s*[:,;=\t ]\s*(\D.*)")


@dataclass(frozen=True)
class ClassList:
    """Names in their order, and what masks have for each: numbers, colours, or neither: then it is the place.

    ignored  numbers or colours of what is no class
    """

    path: Path
    names: tuple[str, ...]
    numbers: tuple[int, ...] = ()
    colours: tuple[Colour, ...] = ()
    ignored: tuple[Any, ...] = ()

    def describe(self, masks: Sequence[Path]) -> dict[str, Any]:
        """The names, mapping and palette of a classes.yaml, for these masks.

        Raises UnclearMasks if the masks do not tell which class is which.
        """
        palette = [list(colour) for colour in self.colours] or None
        coloured, black = self._look(masks[:LOOKED_AT])
        if coloured:
            names, colours = self.names, self.colours
            if black and not self._has_background():
                names, colours = (BACKGROUND, *names), ((0, 0, 0), *colours)
            mapping = {_hex(colour): k for k, colour in enumerate(colours)}
            mapping |= {colour: IGNORE for colour in (BORDER, *map(_hex, self.ignored)) if colour not in mapping}
            return {"names": list(names), "palette": [list(colour) for colour in colours], "mapping": mapping}
        if self.numbers:
            return _numbered(self.names, self.numbers, self.ignored)
        found = find_classes(masks[0].parent, masks)
        if found.coloured:
            raise UnclearMasks(
                f"{self.path} names classes, and the masks, such as {masks[0]}, have colours that it does not tell: "
                'say in a classes.yaml what each means, `mapping: {"#804080": road}` (docs/data.md)'
            )
        known = found.description
        numbers = (
            [value for value, to in known["mapping"].items() if to != IGNORE]
            if "mapping" in known
            else range(len(known["names"]))
        )
        names, count = self.names, len(self.names)
        if len(numbers) == count + 1 and not min(numbers) and not self._has_background():
            names, count = (BACKGROUND, *names), count + 1
        if palette is None and len(known.get("palette", ())) == count:
            palette = known["palette"]
        drawn = {} if palette is None or len(palette) != count else {"palette": palette}
        if IGNORE not in numbers and max(numbers) < count:
            return {"names": list(names)} | drawn
        if len(numbers) == count:
            return _numbered(names, numbers) | drawn
        raise UnclearMasks(
            f"{self.path} names {count} classes, and the masks hold {len(numbers)} numbers, up to {max(numbers)}: say "
            "in a classes.yaml what each means, `mapping: {7: road}` (docs/data.md)"
        )

    def _has_background(self) -> bool:
        return (0, 0, 0) in (*self.colours, *self.ignored) or not {name.lower() for name in self.names}.isdisjoint(
            BACKGROUNDS
        )

    def _look(self, masks: Sequence[Path]) -> tuple[bool, bool]:
        """Whether masks have the colours of the list, and not numbers; and whether they have black."""
        found: set[int] = set()
        plain = False
        for path in masks if self.colours else ():
            try:
                plain |= label_mode(path)[0] not in ("RGB", "RGBA")
                values, _ = count_values(read_label_file(path, palette=True, grey=True))
                found.update(pack_colours(values).tolist() if values.ndim == 2 else [NO_COLOUR])
            except ValueError:  # it is damaged, or none: that is said elsewhere
                continue
        border = tuple(int(BORDER[k : k + 2], 16) for k in (1, 3, 5))
        known = {0, *pack_colours(np.array([*self.colours, *self.ignored, border])).tolist()} if self.colours else set()
        return bool(self.colours) and (not plain or found <= known), 0 in found


def _numbered(names: Sequence[str], numbers: Sequence[int], ignored: Sequence[int] = ()) -> dict[str, Any]:
    if list(numbers) == list(range(len(names))) and not ignored:
        return {"names": list(names)}
    return {
        "names": list(names),
        "mapping": dict.fromkeys((*ignored, IGNORE), IGNORE) | {n: k for k, n in enumerate(numbers)},
    }


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def read_class_lists(folder: Path) -> Iterator[ClassList]:
    """The lists of classes in a folder, those of tools first. Raises ValueError for one that cannot be understood."""
    there = {name.lower(): folder / name for name in sorted(os.listdir(folder), reverse=True)}
    for name in FILES:
        if name in there and there[name].is_file() and (found := _read(there[name])) is not None:
            yield found


def _read(path: Path) -> ClassList | None:
    """None if it is a JSON of something else."""
    rows = _of_json(path) if path.suffix.lower() == ".json" else _of_lines(path)
    if rows is None:
        return None
    numbered = all(mark is not None for _, mark in rows)
    no_class = IGNORED if numbered else IGNORED[:1]
    ignored = tuple(mark for name, mark in rows if name.lower() in no_class and numbered)
    rows = [row for row in rows if row[0].lower() not in no_class]
    names, marks = tuple(name for name, _ in rows), tuple(mark for _, mark in rows)
    if not names:
        raise ValueError(f"{path} names no classes")
    if len(names) > IGNORE:
        raise ValueError(f"{path} names {len(names)} classes: a mask holds at most {IGNORE}")
    if odd := next((name for name in names if CONTROL.search(name)), None):
        raise ValueError(f"{path} has a name with control characters, {ascii(odd)}: write it without")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{path} names {twice} more than once: give each class a name of its own")
    if not numbered:
        return ClassList(path, names)
    coloured = isinstance(marks[0], tuple)
    if len(set(marks)) < len(marks):
        what = "colour: export with different colours" if coloured else "number: give each its own"
        raise ValueError(f"{path} gives two classes the same {what}")
    if coloured:
        return ClassList(path, names, colours=marks, ignored=ignored)
    ordered = sorted(zip(marks, names, strict=True))
    return ClassList(path, tuple(name for _, name in ordered), tuple(mark for mark, _ in ordered), ignored=ignored)


def _of_lines(path: Path) -> list[tuple[str, Any]]:
    """Name and colour, number or None of each line."""
    lines = [in_windows_encoding(line) for line in read_lines(path) if not line.startswith("#")]
    if path.name.lower() == "labelmap.txt":
        return [_of_labelmap(path, line) for line in lines]
    if path.suffix.lower() == ".csv":
        lines = lines[1:] if lines and not any(char.isdigit() for char in lines[0]) else lines
    rows: list[tuple[str, Any]] = []
    for line in lines:
        if match := COLOUR_BEHIND.fullmatch(line):
            rows.append((match[1], _colour(match.groups()[1:])))
        elif match := COLOUR_BEFORE.fullmatch(line):
            rows.append((match[4], _colour(match.groups()[:3])))
        elif match := NUMBER_BEHIND.fullmatch(line):
            rows.append((match[1], int(match[2])))
        elif match := NUMBER_BEFORE.fullmatch(line):
            rows.append((match[2], int(match[1])))
        else:
            rows.append((line, None))
    alike = len({type(mark) for _, mark in rows}) == 1 and all(mark != () for _, mark in rows)
    return [(name.strip(" \t,;\"'"), mark) for name, mark in rows] if alike else [(line, None) for line in lines]


def _of_labelmap(path: Path, line: str) -> tuple[str, Any]:
    """A line of CVAT; its colour may be left out."""
    name, _, rest = line.partition(":")
    colour = rest.split(":")[0]
    match = re.fullmatch(r"\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*", colour)
    if colour.strip() and not (match and _colour(match.groups())):
        raise ValueError(f"{path} has the line {line!r}: expected NAME:R,G,B::")
    return name.strip(), _colour(match.groups()) if match else None


def _colour(parts: Sequence[Any]) -> tuple[int, ...]:
    """Three numbers up to 255; () if they are not."""
    numbers = tuple(int(part) for part in parts)
    return numbers if max(numbers) <= 255 else ()


def _of_json(path: Path) -> list[tuple[str, Any]] | None:
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    if isinstance(data, dict):
        data = data.get("labels", data.get("classes", data))
    if isinstance(data, list):
        named = [_of_object(entry) if isinstance(entry, dict) else (entry, None) for entry in data]
    elif isinstance(data, dict):
        named = [(to, int(key)) if str(key).isdigit() else (key, _mark(to)) for key, to in data.items()]
    else:
        return None
    known = named and all(isinstance(name, str) and mark != () for name, mark in named)
    return named if known and len({type(mark) for _, mark in named}) == 1 else None


def _of_object(entry: dict[str, Any]) -> tuple[Any, Any]:
    """Name and mark of an object such as {"title": "cat", "color": "#ff0000"}."""
    name = next((entry[key] for key in ("title", "name", "label") if key in entry), None)
    mark = next((entry[key] for key in ("color", "colour", "id", "value") if key in entry), None)
    return name, None if mark is None else _mark(mark)


def _mark(value: Any) -> Any:
    """A number, or a colour as a tuple; () for anything else."""
    if type(value) is int and 0 <= value <= 65535:
        return value
    if isinstance(value, list) and len(value) in (3, 4) and all(type(part) is int for part in value):
        return _colour(value[:3])
    if isinstance(value, str) and (match := re.fullmatch("#(..)(..)(..)(?:..)?", value)):
        try:
            return _colour([int(part, 16) for part in match.groups()])
        except ValueError:
            return ()
    return ()
