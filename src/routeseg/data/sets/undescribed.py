"""A folder that nobody described: what a classes.yaml would say of it.

The names of folders and files tell where images and masks lie, as people, labelling tools and frameworks name them; a
list that a tool leaves beside the masks tells what the classes are called (class_lists.py); the masks tell the rest
(masks.py).
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routeseg.data.decoding import IMAGE_SUFFIXES
from routeseg.data.pairs import list_images
from routeseg.data.sets.class_lists import ClassList, read_class_lists
from routeseg.data.sets.masks import find_classes
from routeseg.data.sets.roots import FILE, read_names

VAL_FRACTION = 0.2  # of the images, if nothing says which are for validation
SPLITS = {  # what a folder or a list is called -> the split that it is
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
UNDIVIDED = ("trainval", "default", "all")  # what a list or folder is called that is for training and validation
LIST_FOLDERS = ("ImageSets/Segmentation", "ImageSets", "splits", "split", "lists", ".")
IMAGE_FOLDERS = (
    "images image imgs img img_dir image_dir images_png jpegimages imagestr rgb photos photo pictures frames inputs "
    "input original_images leftimg8bit x"
).split()
MASK_FOLDERS = (
    "masks mask masks_machine masks_png labels label label_images labelstr annotations annotation annots annot ann_dir "
    "anns ann segmentationclass segmentationclasspng segmentationclassraw segmentations segmentation segmaps segs seg "
    "ground_truth groundtruth gt gtfine targets target outputs output y"
).split()
# What the name of a mask ends in that lies beside its image, or beside other images of its labels.
MASK_WORDS = set(
    "mask masks label labels labelids gt seg segmentation segmap groundtruth truth annotation anno annot ann matte "
    "target l p m".split()
)
ONE_EACH = (
    "there must be one mask for each image, in which each class has a number or colour: docs/data.md shows how to put "
    "masks of one class each together"
)
MOST_ENDS = 4  # images that may have the same name up to a _
Folders = tuple[Path, Path]  # of images, and of their masks


@dataclass(frozen=True)
class Places:
    """Where the images and masks of a folder lie.

    keys     what a classes.yaml says of that: images, masks, image_suffix, mask_suffix, split; empty for the default
    folders  those in which they lie
    masks    the masks
    said     what is used for what, and what is left out, for a line; empty for the default tree, if all of it is used
    """

    keys: Mapping[str, Any]
    folders: tuple[Folders, ...]
    masks: tuple[Path, ...]
    said: str


@dataclass(frozen=True)
class Undescribed:
    """What a classes.yaml would say of a folder, and lines that tell it."""

    description: dict[str, Any]
    lines: tuple[str, ...]


def find_description(root: Path) -> Undescribed | None:
    """What a classes.yaml would say of a folder; None if it has no images with masks.

    Raises ValueError if it has some, and they or the lists beside them cannot be understood.
    """
    places = find_places(root)
    if places is None:
        return None
    described = find_class_list(root, places)
    if described is None:
        folder = Path(os.path.commonpath([masks for _, masks in places.folders]))
        found = find_classes(folder, places.masks)
        description, line = found.description, f"{folder}: {found}"
    else:
        description = described.describe(places.masks)
        line = f"{described.path}: {len(description['names'])} classes, {', '.join(description['names'])}"
        line += _meaning(description)
    lines = (line, f"{root}: {places.said}") if places.said else (line,)
    return Undescribed(description | dict(places.keys), lines)


def _meaning(description: Mapping[str, Any]) -> str:
    """What the numbers in masks are read as, for a line, unless it is the class of that number."""
    names = dict(enumerate(description["names"]))
    numbers = {value: to for value, to in description.get("mapping", {}).items() if isinstance(value, int)}
    read = [f"{value} = {names[to]}" for value, to in numbers.items() if to in names]
    return f" ({', '.join(read[:8])}{', ...' if len(read) > 8 else ''})" if read else ""


def find_class_list(root: Path, places: Places | None = None) -> ClassList | None:
    """The list of classes that lies in a folder, or beside its masks; without `places` in any of its sub-folders. None
    if there is none."""
    folders = [root, *(sorted(root.glob("*/")) + sorted(root.glob("*/*/")) if places is None else [])]
    for both in places.folders if places else ():
        for folder in both:
            folders += [folder, *(above for above in folder.parents if root in above.parents)]
    return next((found for folder in dict.fromkeys(folders) for found in read_class_lists(folder)), None)


def find_places(root: Path) -> Places | None:
    """Where the images and masks of a folder lie; None if it has no images with masks.

    Raises ValueError if images have several masks each, or if lists do not say what is for training.
    """
    folders = _folders(root) if root.is_dir() else {}
    images, masks = (
        {split: list_images(both[k], nested=True, left_out=[]) for split, both in folders.items()} for k in range(2)
    )
    ends = _ends(folders, images, masks)
    if ends is None:
        return None
    named = {split: _without(images[split], ends[0]) for split in folders}
    masks = {split: _without(masks[split], ends[1]) for split in folders}
    apart = [split for split, both in folders.items() if both[0] != both[1] or ends[1]]
    names = {split: sorted(set(named[split]) & set(masks[split])) if split in apart else [] for split in folders}
    used = [split for split in folders if names[split]]
    first = next((split for split in ("train", "") if split in used), None)
    if first is None or any(ends) and 2 * len(names[first]) < min(len(named[first]), len(masks[first])):
        return None
    keys: dict[str, Any] = {key: end for key, end in zip(("image_suffix", "mask_suffix"), ends, strict=True) if end}
    left: list[str] = []
    if "val" in used:
        default = all(folders[s] == (root / "images" / s, root / "masks" / s) for s in used)
        if not default:
            keys |= {
                key: {s: _seen(folders[s][k], root) for s in used if s} for k, key in enumerate(("images", "masks"))
            }
        said = f"{_seen(folders['val'][0], root)} is for validation"
    else:
        default = False
        keys |= {key: _seen(folders[first][k], root) for k, key in enumerate(("images", "masks"))}
        keys["split"], said, left = divide(root, names[first], Path(os.path.commonpath(folders[first])))
    for split in folders:
        if split not in (first, "val") or split not in used:
            lack = "" if split in used else " without masks"
            left.append(f"{_seen(folders[split][0], root)}{lack} ({_count(images[split])})")
    left += _others(root, folders)
    images_at, masks_at = (f"{_seen(folders[first][k], root)}/NAME{ends[k]}".removeprefix("./") for k in range(2))
    said = f"images are {images_at}, masks {masks_at}; {said}"
    said += f"; left out: {', '.join(left)}" if left else ""
    return Places(
        keys,
        tuple(folders[split] for split in used),
        tuple(sorted({path for split in used for path in masks[split].values()})),
        "" if default and not left else said,
    )


def _folders(root: Path) -> dict[str, Folders]:
    """Split -> folders of its images and masks, by their names; "" if nothing divides them. There may be none."""
    below = _below(root)
    images, masks = _first(below, IMAGE_FOLDERS), _first(below, MASK_FOLDERS)
    if images is not None and masks is not None:  # images/train and masks/train, or images and masks
        in_images, in_masks = _splits(images), _splits(masks)
        divided = {split: (in_images[split], in_masks[split]) for split in in_images if split in in_masks}
        return divided if "train" in divided else {"": (images, masks)}
    found: dict[str, Folders] = {}
    parts: dict[tuple[str, str], Path] = {}
    for name, folder in below.items():
        if part := _part(name):
            parts.setdefault(part, folder)
    for (split, kind), folder in parts.items():
        if kind == "images":  # train/images and train/masks, or train and train_masks, or both in train
            inside = _below(folder)
            images, masks = _first(inside, IMAGE_FOLDERS), _first(inside, MASK_FOLDERS)
            found[split] = folder, parts.get((split, "masks"), folder)
            if images is not None and masks is not None:
                found[split] = images, masks
    if found:
        return found
    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in root.iterdir()):
        return {"": (root, root)}
    (only,) = below.values() if len(below) == 1 else (root,)
    return _folders(only) if only != root and not (only / FILE).is_file() else {}


def _below(folder: Path) -> dict[str, Path]:
    """Name, small and with underlines, -> sub-folder with images in it."""
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    return {_small(name): path for name, path in found.items() if has_images(path)}


def _small(name: str) -> str:
    return re.sub(r"[-. ]", "_", name.lower())


def _first(below: Mapping[str, Path], names: Iterable[str]) -> Path | None:
    return next((below[name] for name in names if name in below), None)


def _splits(folder: Path) -> dict[str, Path]:
    """Split -> sub-folder."""
    found: dict[str, Path] = {}
    for name, path in _below(folder).items():
        if name in SPLITS:
            found.setdefault(SPLITS[name], path)
    return found


def _part(name: str) -> tuple[str, str] | None:
    """The split that a folder is of, and whether it has images or masks: train, valannot, train_masks, y_test, ..."""
    names = "|".join(sorted((*SPLITS, *UNDIVIDED), key=len, reverse=True))
    match = re.fullmatch(rf"(?:(\w+)_)?({names})_?(\w+)?", name)
    if match is None or (match[1] and match[3]):
        return None
    split, kind = SPLITS.get(match[2], ""), match[1] or match[3] or IMAGE_FOLDERS[0]
    kinds = [what for what, known in (("images", IMAGE_FOLDERS), ("masks", MASK_FOLDERS)) if kind in known]
    return (split, kinds[0]) if kinds else None


def has_images(folder: Path) -> bool:
    """Whether there is an image in a folder, or below it."""
    return any(
        Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
        for _, _, names in os.walk(folder, followlinks=True)
        for name in names
    )


def _ends(folders: Mapping[str, Folders], images: Mapping, masks: Mapping) -> tuple[str, str] | None:
    """What the names of images end in, and those of masks, beyond what is the same in both; None if nothing is.

    Raises ValueError if an image has several masks.
    """
    votes: Counter[tuple[str, str]] = Counter()
    for split, (image_folder, mask_folder) in folders.items():
        together = image_folder == mask_folder
        if not together and images[split].keys() & masks[split].keys():
            return "", ""
        ends: dict[str, list[str]] = defaultdict(list)
        for name in images[split]:
            for base, end in _cuts(name):
                if not (together and _of_mask(end)):
                    ends[base].append(end)
        for name in masks[split]:
            for base, end in _cuts(name):
                if _of_mask(end) or not together:
                    votes.update((image_end, end) for image_end in ends[base] if len(ends[base]) <= MOST_ENDS)
        if not together:
            _check_one_each(images[split], masks[split])
    if not votes:
        return None
    (image_end, _), most = max(votes.items(), key=lambda vote: (vote[1], -len(vote[0][0] + vote[0][1])))
    rivals = [end for (one, end), count in votes.items() if one == image_end and 2 * count >= most]
    proper = [end for end in rivals if _of_mask(end)] if len(rivals) > 1 else rivals
    if len(proper) != 1:
        raise _several(masks, [f"NAME{end}" for end in sorted(proper or rivals)])
    return image_end, proper[0]


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """A name, whole, and divided before each -, _, blank or dot of its last part."""
    yield name, ""
    start = name.rfind("/") + 2
    for match in re.finditer(r"[-_ .]+", name[start:]):
        yield name[: start + match.start()], name[start + match.start() :]


def _of_mask(end: str) -> bool:
    return not MASK_WORDS.isdisjoint(re.split("[^a-z]+", end.lower()))


def _check_one_each(images: Mapping[str, Path], masks: Mapping[str, Path]) -> None:
    """Raises ValueError if the masks of a class lie in a folder of their own, or those of an image."""
    for part in (0, -1):
        count = Counter(name.split("/")[part] for name in masks if "/" in name)
        twice = [name for name, several in count.items() if several > 1 and name in images]
        if twice:
            of_one = sorted(name for name in masks if name.split("/")[part] == twice[0])
            raise _several({"": masks}, of_one)


def _several(masks: Mapping[str, Mapping[str, Path]], found: list[str]) -> ValueError:
    example = next(path for some in masks.values() for path in some.values())
    return ValueError(f"{example.parent} has several masks for each image, such as {', '.join(found[:4])}: {ONE_EACH}")


def _without(files: Mapping[str, Path], end: str) -> dict[str, Path]:
    """Those whose names have this end, by their names without it."""
    return {name.removesuffix(end): path for name, path in files.items() if name.endswith(end)}


def divide(root: Path, names: list[str], inside: Path | None = None) -> tuple[dict[str, Any], str, list[str]]:
    """The split by the lists of a folder, what that is in words, and what it leaves out.

    inside  the sub-folder in which the images lie, whose lists come first

    Raises ValueError if there are lists, and none is for training.
    """
    lists = _lists(inside or root) or _lists(root)
    roles: dict[str, Path] = {}
    for path in lists:
        name = path.stem.lower()
        roles.setdefault("all" if name in UNDIVIDED else SPLITS.get(name, name), path)
    whole = roles.get("all", roles.get("train", lists[0] if len(lists) == 1 else None))
    seen = {path: _seen(path, root) for path in lists}
    fraction = {"val_fraction": VAL_FRACTION, "seed": 0}
    drawn = f"drawn by name for validation, with a chance of {VAL_FRACTION:.0%} each"
    split: dict[str, Any] = {role: seen[roles[role]] for role in ("train", "val", "test") if role in roles}
    if {"train", "val"} <= set(roles):
        used = [roles["train"], roles["val"]]
        said = f"{seen[used[0]]} is for training, {seen[used[1]]} for validation"
    elif whole is not None and whole not in (roles.get("val"), roles.get("test")):
        used, said, split = [whole], f"those in {seen[whole]} are {drawn}", fraction | {"list": seen[whole]}
    elif split:
        first = next(iter(split.values()))
        raise ValueError(
            f"{root / first} is a list of images, and there is none of those to train on: add train.txt beside it, or "
            "say in a classes.yaml how to divide the images, for example `split: {val_fraction: 0.2}`"
        )
    else:
        used, said, split = [], f"they are {drawn}", fraction
    listed = {path: set(read_names(path, names)) & set(names) for path in lists}
    taken = set().union(*(listed[path] for path in used)) if used else set(names)
    left = [(seen[path], listed[path] - taken) for path in lists if path not in used]
    unlisted = set(names) - taken - set().union(*(some for _, some in left))
    said_left = [f"{name} ({_count(some)})" for name, some in left if some]
    return split, said, said_left + ([f"{_count(unlisted)} that no list names"] if unlisted else [])


def _lists(root: Path) -> list[Path]:
    """The lists of images that are not empty, in the first folder that has some: under ImageSets all, else by name."""
    for where in LIST_FOLDERS:
        paths = sorted((root / where).glob("*.txt"))
        if not where.startswith("ImageSets"):
            paths = [path for path in paths if path.stem.lower() in (*SPLITS, *UNDIVIDED)]
        if paths := [path for path in paths if path.read_bytes().strip()]:
            return paths
    return []


def _others(root: Path, folders: Mapping[str, Folders]) -> list[str]:
    """The folders of images or masks beside those that are used, with the number of their files."""
    used = {folder for both in folders.values() for folder in both}
    above = {folder.parent for folder in used if _small(folder.parent.name) in IMAGE_FOLDERS and "" not in folders}
    others = [folder for one in sorted(above) for folder in _below(one).values()]
    for one in sorted({folder.parent for folder in used} - above) if root not in used else ():
        others += [path for name, path in _below(one).items() if name in (*IMAGE_FOLDERS, *MASK_FOLDERS)]
    spare = [folder for folder in others if not any(folder == one or folder in one.parents for one in used)]
    return [f"{_seen(one, root)} ({_count(list_images(one, True, []))})" for one in dict.fromkeys(spare)]


def _seen(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _count(some: Sized) -> str:
    return f"{len(some)} image{'s' * (len(some) != 1)}"
