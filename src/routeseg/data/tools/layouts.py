"""Procedural street scenes, written in the layouts of the known data sets with their official label encodings.

So every reader, and a configuration for the real data, can be tried before a download. What the real labels leave out
is left out here too: the bonnet of the camera's car, a rim, borders of objects, the labels of the test split.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
from PIL import Image

from routeseg.data import scenes
from routeseg.data.config import SEED_OFFSETS, DataConfig, pair
from routeseg.data.sets import ade20k, camvid, cityscapes, voc
from routeseg.data.sets.folder import write_classes
from routeseg.labels import IGNORE

Layout = Literal["folder", "camvid", "cityscapes", "voc", "sbd", "ade20k"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
UNFINISHED = ".unfinished"  # what is being written lies in this sub-folder, and is moved out of it when complete
JPEG_QUALITY = 95
NO_COUNTERPART = "background"

# Class of the scenes -> class of CamVid, Cityscapes, ADE20K and VOC.
COUNTERPARTS = {
    "sky": ("sky", "sky", "sky", NO_COUNTERPART),
    "building": ("building", "building", "building", NO_COUNTERPART),
    "fence": ("fence", "fence", "fence", NO_COUNTERPART),
    "pole": ("pole", "pole", "pole", NO_COUNTERPART),
    "road": ("road", "road", "road", NO_COUNTERPART),
    "pavement": ("pavement", "sidewalk", "sidewalk", NO_COUNTERPART),
    "vegetation": ("tree", "vegetation", "tree", NO_COUNTERPART),
    "sign": ("sign symbol", "traffic sign", "signboard", NO_COUNTERPART),
    "car": ("car", "car", "car", "car"),
    "pedestrian": ("pedestrian", "person", "person", "person"),
}
CAMVID, CITYSCAPES, ADE20K, VOC = range(4)

# Cityscapes: official ids that training ignores, and those that get instances.
EGO_VEHICLE_ID, OUT_OF_ROI_ID, UNLABELED_ID = 1, 3, 0
INSTANCE_IDS = (24, 26)  # person, car
CITIES = {"train": ("aachen", "bremen"), "val": ("frankfurt",), "test": ("berlin",), "train_extra": ("augsburg",)}
RIM = 1 / 48  # part of the height that is not labelled at the edge of an image
BONNET = (0.35, 0.10)  # half-axes of the bonnet, parts of width and height
COARSE = 1 / 32  # part of the height: coarse labels keep this far from every border of classes


@dataclass(frozen=True)
class World:
    """The images to draw: `train` and `val` as in the data set `scenes`; what else a layout has is drawn beyond."""

    config: DataConfig
    seed: int
    on_image: Callable[[], None] | None = None

    def draw(self, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        """-> image uint8 [H,W,3], labels uint8 [H,W], indices into scenes.CLASSES."""
        seed = self.seed + SEED_OFFSETS[split]
        drawn = scenes.draw_scene(seed, index, pair(self.config.image_size), self.config.preset)
        if self.on_image is not None:
            self.on_image()
        return drawn

    @property
    def train(self) -> int:
        return self.config.train_images

    @property
    def val(self) -> int:
        return self.config.val_images

    @property
    def extra(self) -> int:
        """Training images beyond `train`: Cityscapes' train_extra, and what only SBD has."""
        return max(1, self.train // 2)

    @property
    def test(self) -> int:
        """Test images, drawn beyond `val`."""
        return max(1, self.val // 2)


def images_of(layout: Layout, config: DataConfig) -> int:
    """How many images `write_layout` draws."""
    world = World(config, 0)
    more = {"cityscapes": world.extra + world.test, "voc": world.test, "sbd": world.test + world.extra}
    return world.train + world.val + more.get(layout, 0)


def write_layout(
    layout: Layout, root: Path, config: DataConfig, seed: int = 0, on_image: Callable[[], None] | None = None
) -> None:
    """Writes the scenes of a configuration in a layout. Nothing appears in `root` before all is written.

    Raises ValueError if the folder already holds data, or cannot be written.
    """
    write = {
        "folder": _write_folder,
        "camvid": _write_camvid,
        "cityscapes": _write_cityscapes,
        "voc": _write_voc,
        "sbd": _write_sbd,
        "ade20k": _write_ade20k,
    }[layout]
    work = root / UNFINISHED
    made = not root.exists()
    if work.exists():
        raise ValueError(
            f"{root} already holds {UNFINISHED}/, left by an interrupted make-data: remove it, and start anew"
        )
    if root.is_dir() and any(root.iterdir()):
        raise ValueError(f"{root} already holds files: choose another folder")
    try:
        work.mkdir(parents=True)
        write(work, World(config, seed, on_image))
        for entry in sorted(work.iterdir(), reverse=True):
            entry.rename(root / entry.name)
    except OSError as error:
        raise ValueError(f"cannot write into {root}: {error.strerror or error}. Choose another folder") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if made and root.is_dir() and not any(root.iterdir()):
            root.rmdir()


def _write_folder(root: Path, world: World) -> None:
    for split, count in (("train", world.train), ("val", world.val)):
        for index in range(count):
            image, labels = world.draw(split, index)
            _save(root / "images" / split / f"{index:06d}.png", image)
            _save(root / "masks" / split / f"{index:06d}.png", labels)
    write_classes(root / "classes.yaml", scenes.CLASSES, scenes.PALETTE)


def _write_camvid(root: Path, world: World) -> None:
    table = np.array([camvid.CLASSES.names.index(COUNTERPARTS[name][CAMVID]) for name in scenes.CLASSES], np.uint8)
    for split, count in (("train", world.train), ("val", world.val)):
        for index in range(count):
            image, labels = world.draw(split, index)
            values = table[labels]
            values[_rim(values.shape)] = camvid.UNLABELLED
            _save(root / split / f"{index:06d}.png", image)
            _save(root / f"{split}annot" / f"{index:06d}.png", values)


def _write_cityscapes(root: Path, world: World) -> None:
    for split, count, drawn_as, first in (
        ("train", world.train, "train", 0),
        ("val", world.val, "val", 0),
        ("test", world.test, "val", world.val),
        ("train_extra", world.extra, "train", world.train),
    ):
        for index in range(count):
            city = CITIES[split][index % len(CITIES[split])]
            name = f"{city}_{index:06d}_000019"
            image, labels = world.draw(drawn_as, first + index)
            ids = cityscapes_ids(labels)
            _save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", image)
            if split != "train_extra":
                fine = np.where(np.isin(ids, (EGO_VEHICLE_ID, OUT_OF_ROI_ID)), ids, UNLABELED_ID)
                fine = ids if split != "test" else fine.astype(np.uint8)  # the labels of test are kept back
                _save(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", fine)
                _save(root / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png", _instance_ids(fine))
            if split != "test":
                _save(root / "gtCoarse" / split / city / f"{name}_gtCoarse_labelIds.png", _coarse(ids))


def cityscapes_ids(labels: np.ndarray) -> np.ndarray:
    """Labels of a scene -> official ids, uint8 [H,W], with a rim out of the region of interest and a bonnet."""
    classes = [cityscapes.CLASSES.names.index(COUNTERPARTS[name][CITYSCAPES]) for name in scenes.CLASSES]
    ids = np.array(cityscapes.TRAIN_TO_LABEL_ID, np.uint8)[classes][labels]
    height, width = ids.shape
    axes = (round(BONNET[0] * width), round(BONNET[1] * height))
    cv2.ellipse(ids, (width // 2, height - 1), axes, 0, 180, 360, EGO_VEHICLE_ID, cv2.FILLED)
    ids[_rim(ids.shape)] = OUT_OF_ROI_ID
    return ids


def _instance_ids(ids: np.ndarray) -> np.ndarray:
    """Official ids, with 1000 * id + number for each connected person and car: uint16 [H,W]."""
    instances = ids.astype(np.uint16)
    for label_id in INSTANCE_IDS:
        _, numbers = cv2.connectedComponents((ids == label_id).astype(np.uint8))
        instances[numbers > 0] = 1000 * label_id + numbers[numbers > 0] - 1
    return instances


def _coarse(ids: np.ndarray) -> np.ndarray:
    """Labels inside of regions only, and nothing near their borders."""
    reach = 2 * max(1, round(COARSE * ids.shape[0])) + 1
    near_border = cv2.morphologyEx(ids, cv2.MORPH_GRADIENT, np.ones((reach, reach), np.uint8)) > 0
    return np.where(near_border, np.uint8(UNLABELED_ID), ids)


def _write_voc(root: Path, world: World) -> None:
    voc2012 = root / "VOCdevkit" / "VOC2012"
    names: dict[str, list[str]] = {}
    for split, count, drawn_as, first in (
        ("train", world.train, "train", 0),
        ("val", world.val, "val", 0),
        ("test", world.test, "val", world.val),
    ):
        names[split] = [_voc_name(drawn_as, first + index) for index in range(count)]
        for index, name in enumerate(names[split]):
            image, labels = world.draw(drawn_as, first + index)
            _save(voc2012 / "JPEGImages" / f"{name}.jpg", image)
            if split != "test":
                _save(voc2012 / "SegmentationClass" / f"{name}.png", _with_border(voc_classes(labels)), palette=True)
    names["trainval"] = sorted(names["train"] + names["val"])
    for split, listed in names.items():
        _write_list(voc2012 / "ImageSets" / "Segmentation" / f"{split}.txt", listed)


def _voc_name(drawn_as: str, index: int) -> str:
    return f"{2007 if drawn_as == 'train' else 2008}_{index:06d}"


def _write_sbd(root: Path, world: World) -> None:
    """VOC 2012 and SBD beside each other.

    SBD's train list: the later half of VOC's train, the first image of VOC's val, and all new images but one; its
    val list: that one, and the rest of VOC's val. So train_aug is VOC's train and the new images.
    """
    from scipy.io import savemat

    _write_voc(root, world)
    sbd = root / "benchmark_RELEASE" / "dataset"
    lists = {
        "train": [("train", index) for index in range(world.train // 2, world.train + world.extra - 1)] + [("val", 0)],
        "val": [("train", world.train + world.extra - 1)] + [("val", index) for index in range(1, world.val)],
    }
    for split, members in lists.items():
        for drawn_as, index in members:
            name = _voc_name(drawn_as, index)
            new = drawn_as == "train" and index >= world.train
            quiet = World(world.config, world.seed, world.on_image if new else None)  # the others were drawn before
            image, labels = quiet.draw(drawn_as, index)
            classes = voc_classes(labels)
            _save(sbd / "img" / f"{name}.jpg", image)
            present = [value for value in np.unique(classes) if value]
            instances, categories = _numbered(classes)
            for kind, content in (
                ("cls", {"GTcls": {"Segmentation": classes, "CategoriesPresent": np.array([present], np.uint8)}}),
                ("inst", {"GTinst": {"Segmentation": instances, "Categories": np.array([categories], np.uint8).T}}),
            ):
                path = sbd / kind / f"{name}.mat"
                path.parent.mkdir(parents=True, exist_ok=True)
                savemat(path, content, do_compression=True)
        _write_list(sbd / f"{split}.txt", [_voc_name(*member) for member in members])


def voc_classes(labels: np.ndarray) -> np.ndarray:
    """Labels of a scene -> classes of VOC, uint8 [H,W]; what VOC does not know is background."""
    return np.array([voc.NAMES.index(COUNTERPARTS[name][VOC]) for name in scenes.CLASSES], np.uint8)[labels]


def _with_border(classes: np.ndarray) -> np.ndarray:
    """Pixels that touch an object of a higher class from outside become the border, 255."""
    around = cv2.dilate(classes, np.ones((3, 3), np.uint8))
    return np.where(around != classes, np.uint8(IGNORE), classes)


def _numbered(classes: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Connected objects numbered from 1, uint8 [H,W], and the class of each."""
    instances, categories = np.zeros_like(classes), []
    for value in np.unique(classes[classes > 0]):
        _, numbers = cv2.connectedComponents((classes == value).astype(np.uint8))
        for number in range(1, numbers.max() + 1):
            categories.append(int(value))
            instances[numbers == number] = min(len(categories), IGNORE - 1)
    return instances, categories


def _write_ade20k(root: Path, world: World) -> None:
    classes = [ade20k.NAMES.index(COUNTERPARTS[name][ADE20K]) for name in scenes.CLASSES]
    table = np.array(classes, np.uint8) + 1
    base = root / "ADEChallengeData2016"
    for split, folder, count in (("train", "training", world.train), ("val", "validation", world.val)):
        for index in range(count):
            image, labels = world.draw(split, index)
            values = table[labels]
            values[_rim(values.shape)] = 0
            _save(base / "images" / folder / f"ADE_{split}_{index + 1:08d}.jpg", image)
            _save(base / "annotations" / folder / f"ADE_{split}_{index + 1:08d}.png", values)


def _rim(shape: tuple[int, ...]) -> np.ndarray:
    """The pixels at the edge of an image, bool [H,W]."""
    width = max(1, round(RIM * shape[0]))
    rim = np.ones(shape, dtype=bool)
    rim[width:-width, width:-width] = False
    return rim


def _save(path: Path, pixels: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette([part for colour in voc.voc_palette() for part in colour])
    options: dict[str, Any] = {"quality": JPEG_QUALITY, "subsampling": 0} if path.suffix == ".jpg" else {}
    image.save(path, **options)


def _write_list(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))
