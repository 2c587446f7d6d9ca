"""What a folder may be that is no data set yet, and what makes it one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from routeseg.data.decoding import IMAGE_SUFFIXES
from routeseg.data.sets.folder import TREE
from routeseg.data.sets.roots import expected
from routeseg.data.sets.undescribed import IMAGE_FOLDERS, MASK_FOLDERS, ONE_EACH, has_images

ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
MOST_FILES = 5000  # that are looked at
MOST_BYTES = 1 << 26  # of a JSON that is looked into
VOLUME = ".nii.gz"
UNPACK = "unpack it, and give the folder that comes out"
LABEL_STUDIO = re.compile(r"task-\d+-annotation-\d+.*\.png")


def is_archive(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in ARCHIVES and not path.name.lower().endswith(VOLUME)


def what_it_lacks(root: Path) -> str:
    """Why this is no data set, and the remedy: the rest of a sentence that begins with its name."""
    if is_archive(root):
        return f"is an archive: {UNPACK}"
    files = [path for path in islice(root.rglob("*"), MOST_FILES) if path.is_file() and not path.name.startswith(".")]
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images and (archives := [path for path in files if is_archive(path)]):
        return f"holds the archive {archives[0].relative_to(root)}: {UNPACK}"
    if command := _coco([path for path in files if path.suffix.lower() == ".json"], root):
        return f"holds annotations as COCO writes them: draw their masks with `{command}`"
    if any(_has(path, b'"shapes"', b'"imagePath"') for path in files if path.suffix.lower() == ".json"):
        return "holds outlines of Labelme: make masks with its labelme2voc, then `routeseg convert-data voc EXPORT`"
    if any(LABEL_STUDIO.fullmatch(path.name) for path in images):
        return (
            "holds masks of one label each, as Label Studio's brush exports them: export as COCO with images, then "
            "`routeseg convert-data coco FILE.json OUT --images DIR`"
        )
    if odd := next((path for path in images if "\\" in path.name), None):
        return (
            f"has file names with backslashes, such as {odd.name}: unpack them anew with a program that makes folders"
        )
    if any(path.name == "annotations.xml" for path in files):
        return (
            'holds an annotations.xml of CVAT: export as "Segmentation mask" or COCO, for which there is convert-data'
        )
    stems = {path.stem for path in images}
    if any(path.suffix == ".txt" and path.stem in stems and _is_yolo(path) for path in files):
        return "holds boxes or outlines in text files, as YOLO has them, and no masks: export as COCO, or as masks"
    if tables := [path for path in files if path.suffix.lower() == ".csv" and _has(path, b"EncodedPixels")]:
        return f"holds run lengths in {tables[0].relative_to(root)}, as Kaggle has them: write them as PNG masks first"
    if any(path.name.lower().endswith(VOLUME) for path in files):
        return "holds volumes (.nii.gz): write their slices as PNG first, images and masks under the same names"
    apart = [
        path for place in ("*", "*/*") for path in root.glob(f"{place}/images") if (path.parent / "masks").is_dir()
    ]
    if len(apart) > 1 and all(len(list(path.iterdir())) == 1 for path in apart):
        return f"has a folder of images and one of masks for each image: {ONE_EACH}"
    if len(apart) > 1:
        parts = ", ".join(sorted(path.parent.name for path in apart)[:4])
        return f"has images and masks in several folders, {parts}: call those to train and to validate on train and val"
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and has_images(path))
    kinds = [
        name for name in names if name.lower().partition("_")[0] in MASK_FOLDERS and name.lower() not in MASK_FOLDERS
    ]
    if len(kinds) > 1:
        return f"has several folders of masks, {', '.join(kinds[:4])}: {ONE_EACH}"
    if twice := [path for path in images if path.suffix.lower() == ".png" and path.with_suffix(".jpg").exists()]:
        return (
            f"has images and masks of one name in {twice[0].parent}: move the masks into a folder masks/ beside images/"
        )
    with_masks = [name for name in names if name.lower() in MASK_FOLDERS]
    if images and with_masks and not any(name.lower() in IMAGE_FOLDERS for name in names):
        return f"holds masks in {with_masks[0]}/ and no images: put the images into images/, each under its mask's name"
    if images and with_masks:
        return (
            f"has images and masks in {' and '.join(names)}, but none that have the same name in the same sub-folder: "
            "give each mask the place and the name of its image"
        )
    if images:
        return f"holds images, and no masks with their names in a folder that is known; {expected(TREE)}"
    return f"has no layout that is known; for your own images {expected(TREE)}"


def _coco(files: Sequence[Path], root: Path) -> str | None:
    """The command that converts the COCO-style files among these."""
    found = sorted(path for path in files if _has(path, b'"annotations"', b'"images"', b'"categories"'))
    train = [path for path in found if not re.search("val|test", path.relative_to(root).as_posix().lower())]
    val = [path for path in found if "val" in path.relative_to(root).as_posix().lower()]
    if not found:
        return None
    first = (train or found)[0]
    words = [
        "routeseg",
        "convert-data",
        "coco",
        str(first),
        f"{root.absolute().name}_masks",
        "--images",
        str(_images_of(first, root)),
    ]
    if train and val:
        words += ["--val", str(val[0]), "--val_images", str(_images_of(val[0], root))]
    return shlex.join(words)


def _images_of(file: Path, root: Path) -> Path:
    return file.parent if has_images(file.parent) else root


def _has(path: Path, *words: bytes) -> bool:
    if path.stat().st_size > MOST_BYTES:
        return False
    data = path.read_bytes()
    return all(word in data for word in words)


def _is_yolo(path: Path) -> bool:
    line = path.read_bytes()[:200].split(b"\n")[0]
    return re.fullmatch(rb"\d+( -?[\d.e-]+){4,}\s*", line) is not None
