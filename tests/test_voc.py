"""VOC 2012 and SBD: lists, borders, palette files, and the training set of both together."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from conftest import run
from data_sets import SIZE, TRAIN, DataSetContract, first, scene
from routeseg.data.config import DataConfig, open_data
from routeseg.data.decoding import UnreadableImage
from routeseg.data.sets import voc
from routeseg.data.sets.voc import open_voc, read_sbd, train_aug_names, voc_palette
from routeseg.labels import IGNORE

VOC = (0, 0, 0, 0, 0, 0, 0, 0, 7, 15)  # class of the scenes -> class, written out once more
BORDER_REACH = 3  # pixels from an object, in which the border may lie
ODD = "caf\udce9"  # the byte E9 in a file name, as Python keeps it


class TestVoc(DataSetContract):
    NAME = "voc"
    ROOTS = (".", "VOCdevkit", "VOCdevkit/VOC2012")
    INSIDE = "VOCdevkit/VOC2012"
    SPLITS = "choose one of train, val, trainval, test, train_aug"
    TREE = "ROOT/VOCdevkit/VOC2012/ImageSets/Segmentation/"
    TABLE = VOC
    LABELLED = 0.5
    FOLDERS = ("JPEGImages", "SegmentationClass")
    PICTURE = "JPEGImages/2007_000000.jpg"
    LABEL = "SegmentationClass/2007_000000.png"
    NO_PICTURE = f"{PICTURE} is not there, .*train.txt lists it .1 of 4"
    NO_LABEL = f"{LABEL} is not there, .*train.txt lists it"
    STRANGE = (21, "0 to 20")

    def test_an_empty_split(self, copied):
        root = copied("voc")
        (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").write_text("\n\n")
        with pytest.raises(ValueError, match=r"Segmentation/train\.txt is empty"):
            open_voc(root, "train")

    def test_palette_is_the_benchmarks(self):
        palette = voc_palette()
        assert len(set(palette)) == 256
        assert palette[:4] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
        assert palette[7] == (128, 128, 128) and palette[15] == (192, 128, 128), "car and person"
        assert palette[20] == (0, 64, 128) and palette[255] == (224, 224, 192), "monitor and border"
        assert len(voc.NAMES) == 21 and voc.NAMES[7] == "car" and voc.NAMES[15] == "person"
        assert voc.CLASSES.palette == tuple(palette[:21])

    def test_the_border_runs_around_objects(self, layouts):
        labels = open_voc(layouts("voc"), "train").read(0)[1]
        objects = np.array(VOC)[scene("train", 0)[1]] > 0
        near = np.zeros(SIZE, bool)
        for y, x in np.argwhere(objects):
            near[max(0, y - BORDER_REACH) : y + BORDER_REACH, max(0, x - BORDER_REACH) : x + BORDER_REACH] = True
        assert (labels == IGNORE).sum() > 20 and near[labels == IGNORE].all()

    def test_files_are_palette_pictures_that_show_the_benchmarks_colours(self, layouts):
        path = first(layouts("voc"), "SegmentationClass/*.png")
        with Image.open(path) as picture:
            assert picture.mode == "P"
            indices, colours = np.asarray(picture), np.asarray(picture.convert("RGB"))
        assert np.array_equal(colours, np.array(voc_palette(), np.uint8)[indices])

    def test_trainval_is_both_and_test_has_no_labels(self, layouts):
        trainval, train, val, test = (open_voc(layouts("voc"), split) for split in ("trainval", "train", "val", "test"))
        assert sorted(trainval.pairs, key=str) == sorted(train.pairs + val.pairs, key=str)
        assert [pair.labels for pair in test.pairs] == [None] and (test.read(0)[1] == IGNORE).all()
        assert not {pair.name for pair in test.pairs} & {pair.name for pair in trainval.pairs}

    def test_a_name_that_is_listed_twice(self, copied):
        root = copied("voc")
        listed = root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
        listed.write_text(listed.read_text() + "2007_000001\n")
        with pytest.raises(ValueError, match=r"train\.txt names 2007_000001 more than once"):
            open_voc(root, "train")

    def test_windows_line_ends_and_blank_lines_do_no_harm(self, copied):
        root = copied("voc") / "VOCdevkit" / "VOC2012"
        wanted = open_voc(root, "train").pairs
        listed = root / "ImageSets/Segmentation/train.txt"
        listed.write_bytes(b"\xef\xbb\xbf" + listed.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
        assert open_voc(root, "train").pairs == wanted

    def test_a_name_that_is_not_utf_8(self, copied):
        voc2012 = copied("voc") / "VOCdevkit" / "VOC2012"
        for folder, suffix in (("JPEGImages", ".jpg"), ("SegmentationClass", ".png")):
            shutil.copy(voc2012 / folder / f"2007_000000{suffix}", voc2012 / folder / f"{ODD}{suffix}")
        listed = voc2012 / "ImageSets/Segmentation/train.txt"
        listed.write_bytes(listed.read_bytes() + b"caf\xe9\n")
        data = open_voc(voc2012, "train")
        assert data.name(TRAIN) == ODD
        assert np.array_equal(data.read(TRAIN)[1], data.read(0)[1])

    def test_an_absent_picture_whose_name_is_not_utf_8_is_named_on_the_terminal(self, copied, capsys):
        root = copied("voc")
        listed = root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
        listed.write_bytes(listed.read_bytes() + b"caf\xe9\n")
        code, _, err = run(["train", "--data.name=voc", f"--data.root={root}", "--output", root / "run"], capsys)
        assert code == 2 and r"JPEGImages/caf\udce9.jpg" in err and "absent" in err


class TestSbd:
    def names(self, root: Path, part: str) -> set[str]:
        return set((root / part).read_text().split())

    def test_train_aug_is_all_of_both_without_vocs_val(self, layouts):
        root = layouts("sbd")
        lists, sbd = root / "VOCdevkit/VOC2012/ImageSets/Segmentation", root / "benchmark_RELEASE/dataset"
        train, val = self.names(lists, "train.txt"), self.names(lists, "val.txt")
        in_sbd = self.names(sbd, "train.txt") | self.names(sbd, "val.txt")
        assert train & in_sbd and train - in_sbd and val & in_sbd and in_sbd - train - val, "all cases occur"
        data = open_voc(root, "train_aug")
        names = [data.name(index) for index in range(len(data))]
        assert set(names) == (train | in_sbd) - val and len(set(names)) == len(names) == 6
        for pair in data.pairs:
            assert pair.labels.suffix == (".png" if pair.name in train else ".mat"), "VOC's own annotation goes first"
        for index in range(len(data)):
            labels, wanted = data.read(index)[1], np.array(VOC)[scene("train", index)[1]]
            known = labels != IGNORE
            assert np.array_equal(labels[known], wanted[known])
            assert known.all() == (index >= TRAIN), "VOC's files have a border, SBD's none"

    @pytest.mark.parametrize("in_train", [1133, 788, 1464])
    def test_the_rule_gives_10582_on_sets_of_the_real_sizes(self, in_train):
        """VOC: 1,464 + 1,449. SBD: 8,498 + 2,857, of which 2,237 are in VOC's trainval, however they are divided."""
        train = [f"t{index}" for index in range(1464)]
        val = [f"v{index}" for index in range(1449)]
        in_both = train[:in_train] + val[: 2237 - in_train]
        sbd = in_both + [f"s{index}" for index in range(8498 + 2857 - len(in_both))]
        assert len(in_both) == 2237 and len(sbd) == 11355
        names = train_aug_names(train, val, sbd)
        assert len(names) == len(set(names)) == 10582
        assert not set(names) & set(val) and set(train) <= set(names)

    @pytest.mark.parametrize("inside", [".", "benchmark_RELEASE", "benchmark_RELEASE/dataset"])
    def test_sbd_may_lie_elsewhere(self, copied, inside, tmp_path):
        root = copied("sbd")
        (root / "benchmark_RELEASE").rename(tmp_path / "benchmark_RELEASE")
        with pytest.raises(ValueError, match=r"(?s)no SBD in .*sbd_root.*dataset/cls/NAME\.mat"):
            open_data(DataConfig(name="voc", root=str(root)), "train_aug")
        config = DataConfig(name="voc", root=str(root / "VOCdevkit" / "VOC2012"), sbd_root=str(tmp_path / inside))
        assert len(open_data(config, "train_aug")) == 6

    @pytest.mark.parametrize("inside", ["VOCdevkit", "VOCdevkit/VOC2012"])
    def test_beside_vocdevkit_it_is_found(self, layouts, inside):
        assert len(open_voc(layouts("sbd") / inside, "train_aug")) == 6

    def test_pictures_of_sbd_may_lie_with_vocs(self, copied):
        root = copied("sbd")
        for path in (root / "benchmark_RELEASE/dataset/img").iterdir():
            shutil.move(path, root / "VOCdevkit/VOC2012/JPEGImages" / path.name)
        assert len(open_voc(root, "train_aug")) == 6

    def test_files_have_the_official_structure(self, layouts):
        folder = layouts("sbd") / "benchmark_RELEASE/dataset"
        classes = loadmat(folder / "cls" / "2007_000004.mat")["GTcls"]
        assert classes.shape == (1, 1) and classes[0, 0]["Segmentation"].dtype == np.uint8
        assert np.array_equal(classes[0, 0]["Segmentation"], np.array(VOC)[scene("train", 4)[1]])
        instances = loadmat(folder / "inst" / "2007_000004.mat")["GTinst"][0, 0]
        categories = np.concatenate([[0], instances["Categories"].ravel()])
        assert np.array_equal(categories[instances["Segmentation"]], classes[0, 0]["Segmentation"])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"other": np.zeros((4, 4))}, "no `GTcls.Segmentation`"),
            ({"GTcls": np.zeros((4, 4), np.uint8)}, "no `GTcls.Segmentation`"),
            ({"GTcls": {"Boundaries": np.zeros((4, 4))}}, "no `GTcls.Segmentation`"),
            ({"GTcls": np.zeros((0, 0))}, "no `GTcls.Segmentation`"),
            ({"GTcls": {"Segmentation": np.zeros((4, 4, 3), np.uint8)}}, r"shape \(4, 4, 3\) of uint8"),
            ({"GTcls": {"Segmentation": np.full((4, 4), 0.5)}}, r"shape \(4, 4\) of float64"),
            ({"GTcls": {"Segmentation": "text"}}, "GTcls.Segmentation"),
        ],
    )
    def test_a_mat_file_of_another_structure_is_refused_by_name(self, tmp_path, content, message):
        savemat(tmp_path / "a.mat", content)
        with pytest.raises(ValueError, match=f"a.mat.*{message}") as refusal:
            read_sbd(tmp_path / "a.mat")
        assert not isinstance(refusal.value, UnreadableImage), "wrong labels are not passed over"

    def test_a_mat_file_of_another_size_or_value_is_refused_by_name(self, copied):
        root = copied("sbd")
        path = root / "benchmark_RELEASE/dataset/cls/2007_000004.mat"
        savemat(path, {"GTcls": {"Segmentation": np.zeros((10, 20), np.uint8)}})
        data = open_voc(root, "train_aug")
        with pytest.raises(ValueError, match=r"2007_000004\.jpg is 96x48, its label .*2007_000004\.mat is 20x10"):
            data.read(4)
        savemat(path, {"GTcls": {"Segmentation": np.full(SIZE, 21, np.uint8)}})
        with pytest.raises(ValueError, match=r"2007_000004\.mat has the label value 21.*0 to 20"):
            data.read(4)

    def test_a_damaged_mat_file_is_unreadable_however_short(self, layouts, tmp_path):
        whole = (layouts("sbd") / "benchmark_RELEASE/dataset/cls/2007_000004.mat").read_bytes()
        path = tmp_path / "a.mat"
        for length in range(0, len(whole), 7):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="a.mat"):
                read_sbd(path)
        for content in (b"", b"<html>404</html>", whole[: len(whole) // 2]):
            path.write_bytes(content)
            with pytest.raises(UnreadableImage, match="cannot read .*a.mat"):
                read_sbd(path)
        path.unlink()
        with pytest.raises(UnreadableImage, match="a.mat"):
            read_sbd(path)

    def test_a_matlab_7_3_file_is_named_as_such(self, tmp_path):
        header = b"MATLAB 7.3 MAT-file".ljust(124, b" ") + b"\x00\x02IM"
        (tmp_path / "a.mat").write_bytes(header + b"\x89HDF\r\n\x1a\n" + bytes(64))
        with pytest.raises(ValueError, match="a.mat is a MATLAB 7.3 file"):
            read_sbd(tmp_path / "a.mat")

    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            ("cls/2007_000005.mat", "cls/2007_000005.mat is not there"),
            ("img/2007_000005.jpg", "img/2007_000005.jpg is"),
        ],
    )
    def test_a_file_that_sbd_lists_is_absent(self, copied, pattern, message):
        root = copied("sbd")
        (root / "benchmark_RELEASE/dataset" / pattern).unlink()
        with pytest.raises(ValueError, match=f"{message}.*train.txt or val.txt.*1 of 2"):
            open_voc(root, "train_aug")

    def test_a_missing_list_is_named(self, copied):
        root = copied("sbd")
        (root / "benchmark_RELEASE/dataset/val.txt").unlink()
        with pytest.raises(ValueError, match=r"no file .*dataset/val\.txt"):
            open_voc(root, "train_aug")
        (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").unlink()
        with pytest.raises(ValueError, match=r"no file .*Segmentation/train\.txt"):
            open_voc(root, "train")
