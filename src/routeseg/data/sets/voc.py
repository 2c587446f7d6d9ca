"""PASCAL VOC 2012 segmentation (Everingham et al.) and SBD (Hariharan et al., ICCV 2011), in their official layouts."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from routeseg.data.decoding import UnreadableImage
from routeseg.data.label_files import LabelMap
from routeseg.data.pairs import LeftOut, Pair, PairedFiles
from routeseg.data.sets.roots import (
    check_names,
    expected,
    files_of,
    look_up,
    need_folders,
    no_split,
    read_class_numbers,
    read_names,
)
from routeseg.labels import Classes

TREE = """
ROOT/VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val,trainval,test}.txt
ROOT/VOCdevkit/VOC2012/JPEGImages/NAME.jpg
ROOT/VOCdevkit/VOC2012/SegmentationClass/NAME.png
(ROOT may also be VOCdevkit or VOC2012 itself)
"""
SBD_TREE = """
SBD_ROOT/benchmark_RELEASE/dataset/train.txt and val.txt
SBD_ROOT/benchmark_RELEASE/dataset/img/NAME.jpg
SBD_ROOT/benchmark_RELEASE/dataset/cls/NAME.mat
(SBD_ROOT may also be benchmark_RELEASE or dataset itself)
"""
NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
SPLITS = ("train", "val", "trainval", "test", "train_aug")
REMEDY = "VOC's own SegmentationClass/*.png are palette PNGs, whose indices are the classes; do not convert them"
LABELS = LabelMap(len(NAMES), {}, {}, remedy="VOC has 0 to 20 and 255 = border")


def voc_palette() -> list[tuple[int, int, int]]:
    """The 256 colours of VOC's label files: an index's bits, three at a time, are dealt to R, G and B from the top.

    Index 255, the border, is (224, 224, 192).
    """
    colours = []
    for index in range(256):
        red, green, blue = (
            sum(((index >> (3 * place + channel)) & 1) << (7 - place) for place in range(8)) for channel in range(3)
        )
        colours.append((red, green, blue))
    return colours


CLASSES = Classes(NAMES, tuple(voc_palette()[: len(NAMES)]))


def open_voc(
    root: Path, split: str, sbd_root: Path | None = None, left_out: list[LeftOut] | None = None
) -> PairedFiles:
    """A split of VOC 2012: train, val, trainval, test (no labels), or train_aug, which needs SBD.

    sbd_root  where SBD lies; None: beside VOCdevkit
    left_out  takes files that are listed and absent; without it they are an error, too
    Raises ValueError, showing the expected tree, if something is missing.
    """
    if split not in SPLITS:
        raise no_split("VOC 2012", split, SPLITS)
    voc = next((root / place for place in ("VOCdevkit/VOC2012", "VOC2012") if (root / place).is_dir()), root)
    if voc == root and not any((root / part).is_dir() for part in ("ImageSets", "JPEGImages")):
        need_folders(root, ["VOCdevkit/VOC2012"], "VOC 2012", TREE)
    need_folders(voc, ("ImageSets/Segmentation", "JPEGImages"), "VOC 2012", TREE)
    if split == "train_aug":
        pairs = _train_aug(voc, voc.absolute().parents[1] if sbd_root is None else sbd_root, left_out)
    else:
        pairs = _listed(voc, split, left_out)
    return PairedFiles(check_names(pairs, f"the split {split}"), CLASSES, LABELS, read_labels)


def train_aug_names(train: Iterable[str], val: Iterable[str], sbd: Iterable[str]) -> list[str]:
    """The images of VOC's train and of all of SBD, without those of VOC's val; sorted.

    On the real data that is 10,582: SBD has 8,498 + 2,857 = 11,355 images. 2,237 of them are in VOC's trainval
    (1,464 + 1,449) and 9,118 are not; so 1,464 + 9,118.
    """
    return sorted((set(train) | set(sbd)) - set(val))


def read_labels(path: Path) -> np.ndarray:
    """Class numbers [H,W] of a palette PNG of VOC, or of a .mat file of SBD."""
    return read_sbd(path) if path.suffix == ".mat" else read_class_numbers(path, REMEDY)


def read_sbd(path: Path) -> np.ndarray:
    """`GTcls.Segmentation` of a .mat file of SBD: integers [H,W].

    Raises UnreadableImage if the file is missing or damaged, ValueError if it holds something else.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path, variable_names=["GTcls"])
    except NotImplementedError as error:
        raise ValueError(f"{path} is a MATLAB 7.3 file, SBD's are MATLAB 5: take the files of {path.parent}") from error
    except (OSError, ValueError, TypeError, IndexError, EOFError, MemoryError, zlib.error, MatReadError) as error:
        raise UnreadableImage(f"cannot read {path} as a .mat file: {error}") from error
    try:
        segmentation = content["GTcls"][0, 0]["Segmentation"]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{path} has no `GTcls.Segmentation`: use the files of SBD's cls/, not inst/") from error
    if segmentation.ndim != 2 or segmentation.dtype.kind not in "ui":
        raise ValueError(
            f"{path}: `GTcls.Segmentation` has shape {segmentation.shape} of {segmentation.dtype}, it must be one "
            "integer a pixel: use the files of SBD's cls/ as they are"
        )
    return segmentation


def _listed(voc: Path, split: str, left_out: list[LeftOut] | None) -> list[Pair]:
    """The images that ImageSets/Segmentation/SPLIT.txt lists."""
    listed_in = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
    files = files_of(voc / "JPEGImages", ".jpg")
    names = read_names(listed_in, files)
    images = look_up(names, files, listed_in, voc / "JPEGImages", ".jpg", left_out)
    if split == "test":
        return [Pair(name, image, None) for name, image in images.items()]
    folder = voc / "SegmentationClass"
    need_folders(voc, [folder.name], "VOC 2012", TREE)
    labels = look_up(names, files_of(folder, ".png"), listed_in, folder, ".png", left_out)
    return [Pair(name, images[name], labels[name]) for name in images if name in labels]


def _train_aug(voc: Path, sbd_root: Path, left_out: list[LeftOut] | None) -> list[Pair]:
    """VOC's train as VOC annotates it, and the rest of SBD as SBD does."""
    places = (sbd_root / place for place in ("benchmark_RELEASE/dataset", "dataset", "."))
    sbd = next((place for place in places if (place / "cls").is_dir()), sbd_root)
    if not (sbd / "cls").is_dir():
        raise ValueError(
            f"no SBD in {sbd_root}, and train_aug needs its folder cls/: give its place with --data.sbd_root; "
            + expected(SBD_TREE)
        )
    train = {pair.name: pair for pair in _listed(voc, "train", left_out)}
    sbd_names = read_names(sbd / "train.txt") + read_names(sbd / "val.txt")
    val = read_names(voc / "ImageSets" / "Segmentation" / "val.txt")
    names = train_aug_names(train, val, sbd_names)
    added = [name for name in names if name not in train]
    images = files_of(sbd / "img", ".jpg") | files_of(voc / "JPEGImages", ".jpg")  # SBD's images are VOC's
    lists = f"{sbd}/train.txt or val.txt"
    images = look_up(added, images, lists, sbd / "img", ".jpg", left_out)
    labels = look_up(added, files_of(sbd / "cls", ".mat"), lists, sbd / "cls", ".mat", left_out)
    pairs = train | {
        name: Pair(name, images[name], labels[name]) for name in added if name in images and name in labels
    }
    return [pairs[name] for name in names if name in pairs]
