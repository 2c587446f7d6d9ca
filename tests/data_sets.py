"""What every data set in files keeps to: the tests of each inherit the contract, and say how the set looks."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pictures import truncate
from routeseg.data.config import SEED_OFFSETS, DataConfig, open_data
from routeseg.data.decoding import UnreadableImage
from routeseg.data.pairs import PairedFiles, SegmentationData
from routeseg.data.scenes import draw_scene
from routeseg.labels import IGNORE

SIZE, TRAIN, VAL = (48, 96), 4, 2  # of the fixture `layouts`


def scene(split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    return draw_scene(SEED_OFFSETS[split], index, SIZE, "varied")


def check(data: SegmentationData, split: str, table: tuple[int, ...], least: float, start: int = 0) -> None:
    """Every labelled pixel is the scene's class under the table, and at least such a share is labelled."""
    for index in range(len(data)):
        image, labels = data.read(index)
        wanted_image, wanted = scene(split, start + index)
        assert image.dtype == labels.dtype == np.uint8 and labels.shape == SIZE
        assert np.abs(image.astype(int) - wanted_image).mean() < 6, "the image of this scene, PNG or JPEG"
        known = labels != IGNORE
        assert least <= known.mean() and (least == 1 or known.mean() < 1)
        assert np.array_equal(labels[known], np.array(table)[wanted][known])
        assert labels[known].max() < len(data.classes)


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.rglob(pattern))[0]


class DataSetContract:
    """A data set that `make-data` can write: it opens, counts, reads and names, and says what is wrong with its files.

    NAME        of the data set, and of the layout of scenes
    ROOTS       folders of the layout that may be given as the root
    INSIDE      that of them in which the folders and files below lie
    SPLITS      what is said of a split that it has not
    TREE        a part of the expected tree, which messages show
    TABLE       class of the scenes -> class, written out once more, independent of the package
    LABELLED    the least share of pixels with a class; below 1 some have none
    FOLDERS     must be there for `train`, each named where it is not
    EMPTY       folders without which `train` has no images
    PICTURE, LABEL   of one image of `train`, the first of its set by name
    NO_PICTURE, NO_LABEL   what is said where one of them is not there
    STRANGE     a label value that the data set has not, and what is said of it
    WIDE        what is said of a label file of 16 bits
    """

    NAME: str
    ROOTS: tuple[str, ...] = (".",)
    INSIDE: str = "."
    SPLITS: str
    TREE: str
    TABLE: tuple[int, ...]
    LABELLED: float
    FOLDERS: tuple[str, ...]
    EMPTY: tuple[str, ...]
    PICTURE: str
    LABEL: str
    NO_PICTURE: str
    NO_LABEL: str
    STRANGE: tuple[int, str]
    WIDE: str = "has 16 or more bits a pixel"

    def open(self, root: Path, split: str = "train") -> PairedFiles:
        data = open_data(DataConfig(name=self.NAME, root=str(root)), split)
        assert isinstance(data, PairedFiles)
        return data

    def as_drawn(self, data: PairedFiles) -> PairedFiles:
        """The images in the order of the scenes."""
        return data

    def test_pictures_and_labels_are_those_of_the_scenes(self, layouts):
        for inside in self.ROOTS:
            for split, count in (("train", TRAIN), ("val", VAL)):
                data = self.open(layouts(self.NAME) / inside, split)
                assert len(data) == count == len({data.name(index) for index in range(count)})
                check(self.as_drawn(data), split, self.TABLE, self.LABELLED)

    def test_a_root_that_is_not_there_or_empty_or_not_given(self, tmp_path):
        with pytest.raises(ValueError, match=rf"(?s)no (folder|file) .*nowhere.*the expected tree is.*{self.TREE}"):
            self.open(tmp_path / "nowhere")
        with pytest.raises(ValueError, match=rf"(?s)no (folder|file) .*the expected tree is.*{self.TREE}"):
            self.open(tmp_path)
        with pytest.raises(ValueError, match=f"data.root is not set: .*{self.NAME} data with --data.root"):
            open_data(DataConfig(name=self.NAME), "train")

    def test_the_missing_folder_is_named(self, copied, tmp_path):
        root = copied(self.NAME)
        base = root / self.INSIDE
        for folder in self.FOLDERS:
            (base / folder).rename(tmp_path / "gone")
            with pytest.raises(
                ValueError, match=rf"(?s)no folder \S*{folder}(?!\w).*the expected tree is.*{self.TREE}"
            ):
                self.open(root)
            (tmp_path / "gone").rename(base / folder)

    def test_a_split_that_does_not_exist(self, layouts):
        with pytest.raises(ValueError, match=self.SPLITS):
            self.open(layouts(self.NAME), "training")

    def test_an_absent_image_or_label_is_named(self, copied, tmp_path):
        root = copied(self.NAME)
        base = root / self.INSIDE
        for path, message in ((self.PICTURE, self.NO_PICTURE), (self.LABEL, self.NO_LABEL)):
            (base / path).rename(tmp_path / "gone")
            with pytest.raises(ValueError, match=message):
                self.open(root)
            (tmp_path / "gone").rename(base / path)

    def test_a_report_has_all_that_is_absent(self, copied):
        """As check-data asks: what has no partner is told, file by file, and the other images open."""
        root, left_out = copied(self.NAME), []
        whole = self.open(root).pairs
        gone = [whole[0].labels, whole[1].image]
        for path in gone:
            path.unlink()
        kept = open_data(DataConfig(name=self.NAME, root=str(root)), "train", left_out=left_out).pairs
        assert [pair.name for pair in kept] == [pair.name for pair in whole[2:]]
        told = {Path(path).stem for some in left_out for path in some.files}
        assert told & {whole[0].image.stem, whole[0].labels.stem} and told & {whole[1].image.stem, whole[1].labels.stem}
        assert all(some.remedy and some.message for some in left_out)

    def test_an_empty_split(self, copied):
        root = copied(self.NAME)
        base = root / self.INSIDE
        for folder in self.EMPTY:
            shutil.rmtree(base / folder)
            (base / folder).mkdir()
        with pytest.raises(ValueError, match=r"train\w* holds no images"):
            self.open(root)

    def test_labels_that_are_none(self, copied):
        """Colours, 16 bits, a value that is no class, another size."""
        root = copied(self.NAME)
        base = root / self.INSIDE
        path, name = base / self.LABEL, re.escape(Path(self.LABEL).name)
        data = self.open(root)
        place = [pair.labels for pair in data.pairs].index(path)
        value, range_of_values = self.STRANGE
        for pixels, message in (
            (np.zeros((*SIZE, 3), np.uint8), rf"{name} is coloured"),
            (np.full(SIZE, 300, np.uint16), rf"{name} {self.WIDE}"),
            (np.full(SIZE, value, np.uint8), rf"{name} has the label value {value}.*{range_of_values}"),
            (np.zeros((20, 24), np.uint8), rf"{Path(self.PICTURE).name} is 96x48, its label .*{name} is 24x20"),
        ):
            Image.fromarray(pixels).save(path)
            with pytest.raises(ValueError, match=message) as refusal:
                data.read(place)
            assert not isinstance(refusal.value, UnreadableImage), "wrong labels are not passed over"

    def test_a_damaged_file_is_unreadable(self, copied):
        root = copied(self.NAME)
        base = root / self.INSIDE
        data = self.open(root)
        place = [pair.labels for pair in data.pairs].index(base / self.LABEL)
        for path in (self.LABEL, self.PICTURE):
            truncate(base / path)
            with pytest.raises(UnreadableImage, match=re.escape(path)):
                data.read(place)
