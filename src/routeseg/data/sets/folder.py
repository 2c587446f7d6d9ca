"""The `folder` layout, for your own images: a small YAML says where they are and what their masks mean.

Without a YAML, folders, lists of classes and masks tell what it would say (undescribed.py). In a YAML, every key but
`names` may be left out; docs/data.md has examples.

names        the classes, in order
palette      their RGB colours, for images
mapping      label value, or "#rrggbb" in coloured masks -> class (its name or number), or ignore (255)
images       their folder, seen from the YAML; or one for each split: {train: FOLDER, val: FOLDER}
masks        the same; a mask lies where its image lies, sub-folders included, and has its name
mask_suffix  what the names of masks end in beyond that, such as _mask; image_suffix, what those of images end in
split        folders                        each split is a sub-folder of images/ and of masks/; if there is no
                                            images/train, and no key says where the files lie, it is found
             {train: FILE, val: FILE}       lists of names, one a line
             {val_fraction: 0.2, seed: 0}   drawn by name, so that files that are added change nothing for the others;
                                            list: FILE draws from the names in it alone
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from routeseg.data.label_files import LabelMap, read_label_file
from routeseg.data.pairs import LeftOut, Pair, PairedFiles, leave_out, list_images, one_form, pair_files
from routeseg.data.sets.masks import UnclearMasks
from routeseg.data.sets.roots import FILE, expected, in_windows_encoding, no_split, read_names, read_text
from routeseg.data.sets.undescribed import VAL_FRACTION, Undescribed, find_description, find_places
from routeseg.errors import CONTROL
from routeseg.files import expand_user, parse_yaml, write_atomically
from routeseg.labels import IGNORE, Classes

KEYS = ("names", "palette", "mapping", "images", "masks", "image_suffix", "mask_suffix", "split")
PLACES = KEYS[3:]  # those that say where the files lie
FRACTION_KEYS = ("val_fraction", "seed", "list")
TREE = """
ROOT/images/train/NAME.jpg      ROOT/masks/train/NAME.png (one class number or colour a pixel)
ROOT/images/val/NAME.jpg        ROOT/masks/val/NAME.png
ROOT/classes.yaml               names: [road, car] (without it the masks tell the classes)
"""
COLOUR = re.compile("#([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})", re.IGNORECASE)

Folders = Path | Mapping[str, Path]  # one for all splits, or one for each


@dataclass(frozen=True)
class Fraction:
    """The share of the images that is for validation; `names` lists the images to draw from (None: all)."""

    share: float
    seed: int = 0
    names: Path | None = None

    def takes(self, names: Sequence[str], split: str) -> list[str]:
        """The names of a split. Each is drawn for itself, by a hash of seed and name; no split is left empty."""
        draws = sorted((_draw(name, self.seed), name) for name in names)
        count = sum(draw < self.share for draw, _ in draws)
        count = min(max(count, 1), len(draws) - 1)
        return sorted(name for _, name in (draws[:count] if split == "val" else draws[count:]))


def _draw(name: str, seed: int) -> float:
    """A number in 0..1, evenly distributed over names."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@dataclass(frozen=True)
class Description:
    """What a classes.yaml says; see the top of this file. `split` is None for sub-folders.

    strict  a label value that `values` lacks is an error, also if there is a class of that number
    said    where the files lie, for a line, if the YAML leaves that out and it was found
    """

    path: Path
    classes: Classes
    values: Mapping[int, int]
    colours: Mapping[tuple[int, int, int], int]
    images: Folders
    masks: Folders
    image_suffix: str
    mask_suffix: str
    split: Mapping[str, Path] | Fraction | None
    strict: bool = False
    said: str = ""


def open_folder(
    root: Path, split: str, classes: Mapping[str, Any] | None = None, left_out: list[LeftOut] | None = None
) -> PairedFiles:
    """A split of your own images. `root` is the folder of a classes.yaml, or such a file of any name.

    classes   what a classes.yaml would say; it is not read then. None: the file, or without one what the masks tell
    left_out  takes files without a partner and masks that tell no classes; without it they are an error, too
    Raises ValueError if the file does not describe a data set, or the split is not what it describes.
    """
    try:
        about = describe(root, classes)
    except UnclearMasks as error:
        if left_out is None:
            raise
        remedy = "make the masks so that they tell the classes, or write a classes.yaml (docs/data.md)"
        left_out.append(LeftOut("masks that tell no classes", (), 0, str(error), remedy))
        about = replace(_description(describing_file(root), {"names": ["unclear"]}), classes=Classes(()))
    file, folder = (str(path).replace("{", "{{").replace("}", "}}") for path in (about.path, root))  # for a template
    remedy = f"map it in {file}, for example `mapping: {{{{{{value}}: 255}}}}` to ignore it"
    if not about.path.is_file():
        remedy = (
            "the masks that told the classes do not have it: mend the mask, or train anew. To map values, write "
            f"{file} with `routeseg check-data {folder} --write_classes`"
        )
    label_map = LabelMap(len(about.classes), about.values, about.colours, about.strict, remedy)
    read_values = partial(read_label_file, palette=bool(about.colours), grey=bool(about.colours) and not about.values)
    return PairedFiles(_pairs(about, split, left_out), about.classes, label_map, read_values)


def describing_file(root: Path) -> Path:
    """The YAML that `root` is, or that lies in it."""
    return root if root.is_file() or root.suffix in (".yaml", ".yml") else root / FILE


def describe(root: Path, classes: Mapping[str, Any] | None = None) -> Description:
    """What the classes of a folder are and where its files lie, as `open_folder` takes them, and with its errors."""
    path = describing_file(root)
    if classes is None:
        found = undescribed(root)
        if found is None:
            return read_description(path)
        classes = found.description
    about = _described(f"data.classes for {root}", path, classes)
    return replace(about, strict=bool(about.values))


def undescribed(root: Path) -> Undescribed | None:
    """What a folder without a classes.yaml tells; None if there is one, or there are no images with masks.

    Raises UnclearMasks if the masks tell no classes.
    """
    return None if describing_file(root).is_file() else find_description(root)


def _pairs(about: Description, split: str, left_out: list[LeftOut] | None) -> list[Pair]:
    if isinstance(about.split, Fraction):
        if split not in ("train", "val"):
            raise no_split(str(about.path), split, ("train", "val"))
        if about.split.names is None:
            pairs = {pair.name: pair for pair in _paired(about, split, left_out)}
        else:
            pairs = {pair.name: pair for pair in _listed(about, split, about.split.names, left_out)}
        if len(pairs) < 2:
            raise ValueError(f"{about.path.parent} has only one image to divide into training and validation: add more")
        return [pairs[name] for name in about.split.takes(list(pairs), split)]
    if about.split is not None:
        if split not in about.split:
            raise no_split(str(about.path), split, about.split)
        return _listed(about, split, about.split[split], left_out)
    return _paired(about, split, left_out)


def _paired(about: Description, split: str, left_out: list[LeftOut] | None) -> list[Pair]:
    images, masks = _list_files(about, split, left_out)
    ends = about.mask_suffix, about.image_suffix
    return pair_files(images, masks, *_folders(about, split), *ends, left_out=left_out)


def _folders(about: Description, split: str) -> tuple[Path, Path]:
    """Where the images and masks of a split lie. Raises ValueError, naming what is there, if they are missing."""
    found = []
    for key, folders in (("images", about.images), ("masks", about.masks)):
        if not isinstance(folders, Path):
            if split not in folders:
                raise no_split(f"`{key}` of {about.path}", split, folders)
            folder = folders[split]
        else:
            folder = folders / split if about.split is None else folders
        if not folder.is_dir():
            there = [path.name for path in sorted(folder.parent.glob("*/"))]
            here = f"{folder.parent} has {', '.join(there)}" if there else f"{folder.parent} has no folders"
            offer = f"`split: {{val_fraction: {VAL_FRACTION}}}` in {about.path} draws some images for validation"
            raise ValueError(f"no folder {folder}: {here}; {offer}; if not named otherwise there, {expected(TREE)}")
        found.append(folder)
    return found[0], found[1]


def _list_files(
    about: Description, split: str, left_out: list[LeftOut] | None
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Name -> image, and name -> mask, of what lies in a split's folders."""
    image_folder, mask_folder = _folders(about, split)
    images, masks = (list_images(folder, nested=True, left_out=left_out) for folder in (image_folder, mask_folder))
    if image_folder == mask_folder and not about.image_suffix:
        images = {name: path for name, path in images.items() if not name.endswith(about.mask_suffix or "/")}
    images, masks = (
        _ending(images, about, "image_suffix", image_folder),
        _ending(masks, about, "mask_suffix", mask_folder),
    )
    return images, masks


def _ending(found: dict[str, Path], about: Description, key: str, folder: Path) -> dict[str, Path]:
    """The files whose names end in the suffix of this key, by their names without it."""
    suffix = getattr(about, key)
    kept = {name.removesuffix(suffix): path for name, path in found.items() if name.endswith(suffix)}
    if not kept:
        how = f"that end in {suffix!r}: check `{key}`" if suffix else "without that: check `mask_suffix`"
        raise ValueError(f"{folder} holds no names {how} in {about.path}")
    return kept


def _listed(about: Description, split: str, listed_in: Path, left_out: list[LeftOut] | None) -> list[Pair]:
    """The images that a list names, with or without the suffix of the file, in its order."""
    images, masks = _list_files(about, split, left_out)
    image_folder, mask_folder = _folders(about, split)
    names = read_names(listed_in, images)
    for found, folder, ending in ((images, image_folder, about.image_suffix), (masks, mask_folder, about.mask_suffix)):
        absent = [f"{folder / (name + ending)}.*" for name in names if name not in found]
        if absent:
            remedy = f"add the files, or take the names out of {listed_in}"
            message = (
                f"{absent[0]} is not there, though {listed_in} lists it ({len(absent)} of {len(names)} are absent): "
                + remedy
            )
            what = f"names in {listed_in} of which {folder} has no file"
            leave_out(LeftOut(what, tuple(absent), len(names), message, remedy), left_out)
    return [Pair(name, images[name], masks[name]) for name in names if name in images and name in masks]


def read_description(path: Path) -> Description:
    """Reads a classes.yaml. Raises ValueError, naming the file and the key, for whatever it cannot mean."""
    if not path.is_file():
        masks = f", and no folder {path.parent / 'masks'} that would tell them" if path.name == FILE else ""
        raise ValueError(f"no file {path}: it names the classes{masks}; {expected(TREE)}")
    try:
        data = parse_yaml(in_windows_encoding(read_text(path)))
    except ValueError as error:
        raise _undescribed(str(path), error) from error
    about = _described(str(path), path, data)
    root = path.parent
    if set(PLACES) & set(data) or any((root / "images" / split).is_dir() for split in ("train", "val")):
        return about
    places = find_places(root)
    return about if places is None else replace(_described(str(path), path, data | places.keys), said=places.said)


def _described(name: str, path: Path, data: Any) -> Description:
    """The description in a YAML of this place; `name` is what errors call it."""
    try:
        return _description(path, data)
    except ValueError as error:
        raise _undescribed(name, error) from error


def _undescribed(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name} does not describe classes and their images: {' '.join(str(error).split())}")


def _description(path: Path, data: Any) -> Description:
    if not isinstance(data, dict) or "names" not in data:
        raise ValueError("expected `names: [road, car]`")
    _check_keys(data, KEYS, "key")
    names = _names(data["names"])
    values, colours = _mapping(data.get("mapping", {}), names)
    images = _roots(data.get("images", "images"), "images", path.parent)
    masks = _roots(data.get("masks", "masks"), "masks", path.parent)
    split = _split(data.get("split", "folders"), path.parent)
    if isinstance(split, Fraction) and not (isinstance(images, Path) and isinstance(masks, Path)):
        raise ValueError("`split.val_fraction` divides one folder, but `images` or `masks` has one for each split")
    return Description(
        path=path,
        classes=Classes(names, _palette(data.get("palette"), len(names))),
        values=values,
        colours=colours,
        images=images,
        masks=masks,
        image_suffix=one_form(_text(data.get("image_suffix", ""), "image_suffix")),
        mask_suffix=one_form(_text(data.get("mask_suffix", ""), "mask_suffix")),
        split=split,
    )


def _check_keys(data: Mapping, known: Sequence[str], what: str) -> None:
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"no {what} {key!r}: {hint}")


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`{key}` is {value!r}: give a text")
    return value


def _names(data: Any) -> tuple[str, ...]:
    if not isinstance(data, list) or not data:
        raise ValueError("`names` must be a list, in the order of the classes: `names: [road, car]`")
    if any(isinstance(name, bool | dict | list) or name is None for name in data):
        raise ValueError("a name in `names` is no text: write words such as yes, no, on and off in quotes")
    names = tuple(str(name) for name in data)
    if len(names) > IGNORE:
        raise ValueError(f"{len(names)} names: a label map holds at most {IGNORE} classes")
    for name in names:
        if CONTROL.search(name):
            raise ValueError(f"the name {ascii(name)} in `names` has control characters: write it without")
        if names.count(name) > 1:
            raise ValueError(f"`names` has {name} more than once; to merge label values, use `mapping`")
    return names


def _palette(data: Any, classes: int) -> tuple[tuple[int, int, int], ...] | None:
    if not data:
        return None
    if not isinstance(data, list) or not all(_is_colour(colour) for colour in data):
        raise ValueError("`palette` must be a list of colours, three numbers from 0 to 255 each: [[128, 64, 128], ...]")
    if len(data) != classes:
        raise ValueError(f"the palette has {len(data)} colours for {classes} names")
    return tuple((red, green, blue) for red, green, blue in data)


def _is_colour(data: Any) -> bool:
    return isinstance(data, list) and len(data) == 3 and all(type(part) is int and 0 <= part <= 255 for part in data)


def _mapping(data: Any, names: Sequence[str]) -> tuple[dict[int, int], dict[tuple[int, int, int], int]]:
    """Label value -> class, and colour -> class."""
    if not isinstance(data, dict):
        raise ValueError(
            '`mapping` must be of the form {7: road, 8: ignore}, and a colour must stand in quotes: "#804080": road'
        )
    values: dict[int, int] = {}
    colours: dict[tuple[int, int, int], int] = {}
    for key, target in data.items():
        to = _target(target, names)
        if match := COLOUR.fullmatch(str(key)):
            red, green, blue = (int(part, 16) for part in match.groups())
            twice = (red, green, blue) in colours
            colours[red, green, blue] = to
        elif not isinstance(key, bool) and re.fullmatch(r"-?\d+", str(key)):
            twice = int(key) in values
            values[int(key)] = to
        else:
            raise ValueError(f'`mapping` has {key!r}: give a label value such as 7, or a colour such as "#804080"')
        if twice:
            raise ValueError(f"`mapping` has {key} more than once, in different spellings: keep one of them")
    return values, colours


def _target(target: Any, names: Sequence[str]) -> int:
    if isinstance(target, str) and target in names:
        return names.index(target)
    if target in ("ignore", IGNORE):
        return IGNORE
    if type(target) is int and 0 <= target < len(names):
        return target
    near = difflib.get_close_matches(str(target), [*names, "ignore"], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"the mapping leads to {target}, classes are 0 to {len(names) - 1} or their names, or {IGNORE} to ignore{hint}"
    )


def _roots(data: Any, key: str, base: Path) -> Folders:
    if isinstance(data, dict) and data:
        return {str(split): _path(folder, key, base) for split, folder in data.items()}
    if not isinstance(data, str):
        raise ValueError(f"`{key}` is {data!r}: give a folder, or one for each split, {{train: FOLDER, val: FOLDER}}")
    return _path(data, key, base)


def _path(data: Any, key: str, base: Path) -> Path:
    """A file or folder, seen from a base; also as Windows writes it."""
    path = base / expand_user(_text(data, key))
    return path if path.exists() else base / expand_user(data.replace("\\", "/"))


def _split(data: Any, base: Path) -> Mapping[str, Path] | Fraction | None:
    if data == "folders":
        return None
    if not isinstance(data, dict) or not data:
        raise ValueError(
            f"`split` is {data!r}: give folders, lists {{train: FILE, val: FILE}}, or {{val_fraction: 0.2, seed: 0}}"
        )
    if not set(data) & set(FRACTION_KEYS):
        return {str(split): _path(file, f"split.{split}", base) for split, file in data.items()}
    _check_keys(data, FRACTION_KEYS, "key of `split`")
    share, seed, names = data.get("val_fraction"), data.get("seed", 0), data.get("list")
    if not isinstance(share, float) or not 0 < share < 1:
        raise ValueError(f"`split.val_fraction` is {share}: give a share of the images between 0 and 1")
    if type(seed) is not int:
        raise ValueError(f"`split.seed` is {seed!r}: give a whole number")
    return Fraction(share, seed, None if names is None else _path(names, "split.list", base))


def write_classes(path: Path, names: Sequence[str], palette: Sequence[Sequence[int]] | None, **more: Any) -> None:
    """Writes a classes.yaml that `read_description` reads; `more` are its other keys."""
    data: dict[str, Any] = {"names": list(names)}
    if palette is not None:
        data["palette"] = [list(map(int, colour)) for colour in palette]
    text = yaml.safe_dump(data | more, sort_keys=False, allow_unicode=True, width=120)
    write_atomically(path, text.encode())
