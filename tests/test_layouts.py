"""Known data sets in their official layouts: what make-data writes, how it is read, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from cityscapesscripts.helpers.labels import labels as official_labels
from PIL import Image
from scipy.io import loadmat, savemat

from conftest import run
from routeseg.data.datamodule import VALIDATION_SEED_OFFSET, DataConfig, open_data
from routeseg.data.pairs import UnreadableImage
from routeseg.data.scenes import CLASSES, draw_scene
from routeseg.data.sets import ade20k, cityscapes, voc
from routeseg.data.sets.ade20k import open_ade20k
from routeseg.data.sets.camvid import open_camvid
from routeseg.data.sets.cityscapes import open_cityscapes
from routeseg.data.sets.voc import open_voc, read_sbd, train_aug_names, voc_palette
from routeseg.data.tools import layouts as writers
from routeseg.labels import IGNORE

SIZE, TRAIN, VAL = (48, 96), 4, 2  # of the fixture `layouts`

# Written out once more, independent of the package: class of the scenes -> label value in the files, and -> class.
#              sky building fence pole road pavement vegetation sign car pedestrian
LABEL_IDS = (23, 11, 13, 17, 7, 8, 21, 20, 26, 24)
CITYSCAPES = (10, 2, 4, 5, 0, 1, 8, 7, 13, 11)
CAMVID = (0, 1, 7, 2, 3, 4, 5, 6, 8, 9)
ADE20K = (2, 1, 32, 93, 6, 11, 4, 43, 20, 12)
VOC = (0, 0, 0, 0, 0, 0, 0, 0, 7, 15)
BORDER_REACH = 3  # pixels from an object, in which VOC's border may lie


def scene(split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    return draw_scene(0 if split == "train" else VALIDATION_SEED_OFFSET, index, SIZE, "mixed")


def check(data, split: str, table: tuple[int, ...], least: float, start: int = 0) -> None:
    """Every labelled pixel is the scene's class under the table, and at least such a share is labelled."""
    for index in range(len(data)):
        image, labels = data.read(index)
        wanted_image, wanted = scene(split, start + index)
        assert np.abs(image.astype(int) - wanted_image).mean() < 6, "the picture of this scene, PNG or JPEG"
        known = labels != IGNORE
        assert least <= known.mean() < 1
        assert np.array_equal(labels[known], np.array(table)[wanted][known])


@pytest.fixture
def copy(layouts, tmp_path):
    """copy(name) -> a copy of a layout that a test may damage."""
    return lambda name: Path(shutil.copytree(layouts(name), tmp_path / name))


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.rglob(pattern))[0]


class TestCamvid:
    def test_classes_and_unlabelled_rim(self, layouts):
        for split, count in (("train", TRAIN), ("val", VAL)):
            data = open_data(DataConfig(name="camvid", root=str(layouts("camvid"))), split)
            assert len(data) == count
            check(data, split, CAMVID, 0.9)


class TestCityscapes:
    def test_the_table_is_that_of_the_official_scripts(self):
        assert {label.id: label.trainId for label in official_labels if label.id >= 0} == {
            label_id: train_id for label_id, train_id in cityscapes.LABEL_ID_TO_TRAIN.items() if label_id >= 0
        }
        assert cityscapes.LABEL_ID_TO_TRAIN[-1] == IGNORE, "the license plate, -1 there"
        for train_id, label_id in enumerate(cityscapes.TRAIN_TO_LABEL_ID):
            official = next(label for label in official_labels if label.id == label_id)
            assert official.trainId == train_id
            assert official.name == cityscapes.CLASSES.names[train_id]
            assert official.color == cityscapes.CLASSES.palette[train_id]
        assert len(cityscapes.TRAIN_TO_LABEL_ID) == 19

    def test_fine_labels(self, layouts):
        for split, count in (("train", TRAIN), ("val", VAL)):
            data = open_data(DataConfig(name="cityscapes", root=str(layouts("cityscapes"))), split)
            assert len(data) == count
            by_number = sorted(range(count), key=lambda index: data.name(index).split("_")[1])
            data.pairs = [data.pairs[index] for index in by_number]  # cities come first, scenes went round them
            check(data, split, CITYSCAPES, 0.8)

    def test_the_files_hold_official_ids_with_ignored_ones(self, layouts):
        root = layouts("cityscapes")
        values = np.asarray(Image.open(root / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"))
        wanted = np.array(LABEL_IDS)[scene("train", 0)[1]]
        assert {1, 3} <= set(np.unique(values)) <= {1, 3, *LABEL_IDS}
        assert np.array_equal(values[values > 3], wanted[values > 3])
        assert all(label.id in cityscapes.LABEL_ID_TO_TRAIN for label in official_labels)

    def test_names_are_city_sequence_and_frame(self, layouts):
        data = open_cityscapes(layouts("cityscapes"), "train")
        assert data.name(0) == "aachen_000000_000019"
        assert [data.name(index).split("_")[0] for index in range(4)] == ["aachen", "aachen", "bremen", "bremen"]

    def test_the_test_split_has_nothing_to_learn_and_may_have_no_files(self, copy):
        root = copy("cityscapes")
        data = open_cityscapes(root, "test")
        assert len(data) == 1 and data.pairs[0].labels is not None and (data.read(0)[1] == IGNORE).all()
        shutil.rmtree(root / "gtFine" / "test")
        data = open_cityscapes(root, "test")
        assert data.pairs[0].labels is None and (data.read(0)[1] == IGNORE).all()

    @pytest.mark.parametrize(
        ("split", "drawn", "start", "names"),
        [
            ("train_extra", "train", TRAIN, ["augsburg_000000_000019", "augsburg_000001_000019"]),
            ("val_coarse", "val", 0, ["frankfurt_000000_000019", "frankfurt_000001_000019"]),
        ],
    )
    def test_coarse_labels(self, layouts, split, drawn, start, names):
        data = open_cityscapes(layouts("cityscapes"), split)
        assert [data.name(index) for index in range(len(data))] == names
        check(data, drawn, CITYSCAPES, 0.2, start)
        assert all((data.read(index)[1] == IGNORE).mean() > 0.2 for index in range(len(data))), "coarse"
        assert all("gtCoarse" in str(pair.labels) for pair in data.pairs)

    def test_train_coarse_has_the_pictures_of_train(self, layouts):
        fine, coarse = (open_cityscapes(layouts("cityscapes"), split) for split in ("train", "train_coarse"))
        assert [pair.image for pair in fine.pairs] == [pair.image for pair in coarse.pairs]

    def test_splits_are_joined(self, layouts):
        data = open_cityscapes(layouts("cityscapes"), "train+train_extra")
        parts = [open_cityscapes(layouts("cityscapes"), split) for split in ("train", "train_extra")]
        assert data.pairs == parts[0].pairs + parts[1].pairs and len(data) == 6

    def test_train_ids_are_used_where_present(self, copy):
        root = copy("cityscapes")
        labels = np.full(SIZE, IGNORE, np.uint8)
        labels[:, :19] = np.arange(19)
        target = root / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png"
        Image.fromarray(labels).save(target)
        data = open_cityscapes(root, "train")
        assert data.pairs[0].labels == target and np.array_equal(data.read(0)[1], labels)
        assert data.pairs[1].labels.name.endswith("_labelIds.png")
        target.with_name("aachen_000000_000019_gtFine_labelIds.png").unlink()
        assert np.array_equal(open_cityscapes(root, "train").read(0)[1], labels), "and need nothing beside them"
        labels[0, 0] = 19
        Image.fromarray(labels).save(target)
        with pytest.raises(ValueError, match="labelTrainIds.png has the label value 19.*0 to 18"):
            data.read(0)

    @pytest.mark.parametrize("value", [34, 255])
    def test_an_id_that_is_not_official_is_refused(self, copy, value):
        root = copy("cityscapes")
        path = root / "gtFine/val/frankfurt/frankfurt_000001_000019_gtFine_labelIds.png"
        values = np.asarray(Image.open(path)).copy()
        values[5, 5] = value
        Image.fromarray(values).save(path)
        data = open_cityscapes(root, "val")
        data.read(0)
        with pytest.raises(ValueError, match=f"000001.*labelIds.png has the label value {value}.*training ids"):
            data.read(1)

    def test_all_official_ids_are_read(self, copy):
        root = copy("cityscapes")
        path = root / "gtFine/val/frankfurt/frankfurt_000000_000019_gtFine_labelIds.png"
        values = np.zeros(SIZE, np.uint8)
        values[:, :34] = np.arange(34)
        Image.fromarray(values).save(path)
        wanted = np.array([label.trainId for label in official_labels if label.id >= 0])[values]
        assert np.array_equal(open_cityscapes(root, "val").read(0)[1], wanted)

    def test_instance_files_number_what_the_labels_show(self, layouts):
        folder = layouts("cityscapes") / "gtFine" / "train" / "aachen"
        instances = np.asarray(Image.open(folder / "aachen_000000_000019_gtFine_instanceIds.png")).astype(int)
        ids = np.asarray(Image.open(folder / "aachen_000000_000019_gtFine_labelIds.png"))
        assert np.array_equal(np.where(instances >= 1000, instances // 1000, instances), ids)
        assert set(ids[instances >= 1000]) == {24, 26} == {24, 26} & set(np.unique(ids))


class TestVoc:
    def test_palette_is_the_benchmarks(self):
        palette = voc_palette()
        assert len(set(palette)) == 256
        assert palette[:4] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
        assert palette[7] == (128, 128, 128) and palette[15] == (192, 128, 128), "car and person"
        assert palette[20] == (0, 64, 128) and palette[255] == (224, 224, 192), "monitor and border"
        assert len(voc.NAMES) == 21 and voc.NAMES[7] == "car" and voc.NAMES[15] == "person"
        assert voc.CLASSES.palette == tuple(palette[:21])

    @pytest.mark.parametrize("inside", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
    def test_any_of_the_three_roots(self, layouts, inside):
        for split, count in (("train", TRAIN), ("val", VAL)):
            data = open_data(DataConfig(name="voc", root=str(layouts("voc") / inside)), split)
            assert len(data) == count
            check(data, split, VOC, 0.5)

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
    def test_sbd_may_lie_elsewhere(self, copy, inside, tmp_path):
        root = copy("sbd")
        (root / "benchmark_RELEASE").rename(tmp_path / "benchmark_RELEASE")
        with pytest.raises(ValueError, match=r"(?s)no SBD in .*sbd_root.*dataset/cls/NAME\.mat"):
            open_data(DataConfig(name="voc", root=str(root)), "train_aug")
        config = DataConfig(name="voc", root=str(root / "VOCdevkit" / "VOC2012"), sbd_root=str(tmp_path / inside))
        assert len(open_data(config, "train_aug")) == 6

    @pytest.mark.parametrize("inside", ["VOCdevkit", "VOCdevkit/VOC2012"])
    def test_beside_vocdevkit_it_is_found(self, layouts, inside):
        assert len(open_voc(layouts("sbd") / inside, "train_aug")) == 6

    def test_pictures_of_sbd_may_lie_with_vocs(self, copy):
        root = copy("sbd")
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

    def test_a_mat_file_of_another_size_or_value_is_refused_by_name(self, copy):
        root = copy("sbd")
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


class TestAde20k:
    @pytest.mark.parametrize("inside", [".", "ADEChallengeData2016"])
    def test_labels_start_at_1_and_0_is_ignored(self, layouts, inside):
        for split, count in (("train", TRAIN), ("val", VAL)):
            data = open_data(DataConfig(name="ade20k", root=str(layouts("ade20k") / inside)), split)
            assert len(data) == count
            check(data, split, ADE20K, 0.9)
        values = np.asarray(Image.open(first(layouts("ade20k"), "annotations/training/*.png")))
        known = values > 0
        assert np.array_equal(values[known], np.array(ADE20K)[scene("train", 0)[1]][known] + 1) and not known.all()

    def test_150_names_and_colours(self):
        assert len(ade20k.NAMES) == len(set(ade20k.NAMES)) == 150 == len(set(ade20k.CLASSES.palette))
        for number, name in (
            (1, "wall"),
            (13, "person"),
            (21, "car"),
            (76, "swivel chair"),
            (94, "pole"),
            (150, "flag"),
        ):
            assert ade20k.NAMES[number - 1] == name

    def test_all_values_and_no_other(self, copy):
        root = copy("ade20k")
        path = first(root, "annotations/validation/*.png")
        values = np.arange(48 * 96).reshape(SIZE) % 151
        Image.fromarray(values.astype(np.uint8)).save(path)
        data = open_ade20k(root, "val")
        assert np.array_equal(data.read(0)[1], np.where(values == 0, IGNORE, values - 1))
        Image.fromarray(np.full(SIZE, 151, np.uint8)).save(path)
        with pytest.raises(ValueError, match="has the label value 151.*1 to 150"):
            data.read(0)


OPENERS = {"camvid": open_camvid, "cityscapes": open_cityscapes, "voc": open_voc, "ade20k": open_ade20k}
TREE_SIGN = {
    "camvid": r"ROOT/trainannot/NAME\.png",
    "cityscapes": r"ROOT/leftImg8bit/\{train.*ROOT/gtFine/",
    "voc": r"ROOT/VOCdevkit/VOC2012/ImageSets/Segmentation/",
    "ade20k": r"ROOT/ADEChallengeData2016/annotations/",
}


class TestWhatIsMissing:
    @pytest.mark.parametrize("name", list(OPENERS))
    def test_a_root_that_is_not_there_or_empty(self, tmp_path, name):
        with pytest.raises(ValueError, match=rf"(?s)no folder .*nowhere.*the expected tree is.*{TREE_SIGN[name]}"):
            OPENERS[name](tmp_path / "nowhere", "train")
        with pytest.raises(ValueError, match=rf"(?s)has no folder \w+.*the expected tree is.*{TREE_SIGN[name]}"):
            OPENERS[name](tmp_path, "train")

    @pytest.mark.parametrize(
        ("name", "gone"),
        [
            ("camvid", "train"),
            ("camvid", "trainannot"),
            ("cityscapes", "leftImg8bit/train"),
            ("cityscapes", "gtFine/train"),
            ("voc", "JPEGImages"),
            ("voc", "SegmentationClass"),
            ("ade20k", "images/training"),
            ("ade20k", "annotations/training"),
        ],
    )
    def test_the_missing_folder_is_named(self, copy, name, gone):
        root = copy(name)
        inner = {"voc": "VOCdevkit/VOC2012", "ade20k": "ADEChallengeData2016"}.get(name, ".")
        shutil.rmtree(root / inner / gone)
        with pytest.raises(ValueError, match=rf"(?s)has no folder {gone}/.*{TREE_SIGN[name]}"):
            OPENERS[name](root, "train")

    @pytest.mark.parametrize(
        ("name", "known"),
        [
            ("camvid", "train, val, test"),
            ("cityscapes", "train, val, test, train_extra, train_coarse, val_coarse"),
            ("voc", "train, val, trainval, test, train_aug"),
            ("ade20k", "train, val"),
            ("scenes", "train, val, test"),
        ],
    )
    def test_a_split_that_does_not_exist(self, layouts, name, known):
        root = None if name == "scenes" else str(layouts(name))
        with pytest.raises(ValueError, match=f"has no split 'training': choose one of {known}"):
            open_data(DataConfig(name=name, root=root), "training")

    @pytest.mark.parametrize(
        ("name", "pattern", "message"),
        [
            ("camvid", "trainannot/*.png", "train/000000.png is an image without a label"),
            ("camvid", "train/*.png", "trainannot/000000.png is a label without an image"),
            ("cityscapes", "gtFine/train/*/*_labelIds.png", "aachen_000000_000019_leftImg8bit.png has no label"),
            ("cityscapes", "leftImg8bit/train/*/*.png", "aachen_000000_000019_gtFine_labelIds.png has no picture"),
            ("voc", "JPEGImages/*.jpg", "JPEGImages/2007_000000.jpg is not there, .*train.txt lists it .1 of 4"),
            ("voc", "SegmentationClass/*.png", "SegmentationClass/2007_000000.png is not there, .*train.txt lists it"),
            ("ade20k", "annotations/training/*.png", "ADE_train_00000001.jpg is an image without a label"),
            ("ade20k", "images/training/*.jpg", "ADE_train_00000001.png is a label without an image"),
        ],
    )
    def test_an_absent_image_or_label_is_named(self, copy, name, pattern, message):
        root = copy(name)
        first(root, pattern).unlink()
        with pytest.raises(ValueError, match=message):
            OPENERS[name](root, "train")

    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            ("cls/2007_000005.mat", "cls/2007_000005.mat is not there"),
            ("img/2007_000005.jpg", "img/2007_000005.jpg is"),
        ],
    )
    def test_a_file_that_sbd_lists_is_absent(self, copy, pattern, message):
        root = copy("sbd")
        (root / "benchmark_RELEASE/dataset" / pattern).unlink()
        with pytest.raises(ValueError, match=f"{message}.*train.txt or val.txt.*1 of 2"):
            open_voc(root, "train_aug")

    def test_a_missing_list_is_named(self, copy):
        root = copy("sbd")
        (root / "benchmark_RELEASE/dataset/val.txt").unlink()
        with pytest.raises(ValueError, match=r"no file .*dataset/val\.txt"):
            open_voc(root, "train_aug")
        (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").unlink()
        with pytest.raises(ValueError, match=r"no file .*Segmentation/train\.txt"):
            open_voc(root, "train")

    @pytest.mark.parametrize(
        ("name", "folders"),
        [
            ("camvid", ["train", "trainannot"]),
            ("cityscapes", ["leftImg8bit/train/aachen", "leftImg8bit/train/bremen", "gtFine/train/aachen"]),
            ("ade20k", ["ADEChallengeData2016/images/training", "ADEChallengeData2016/annotations/training"]),
        ],
    )
    def test_an_empty_split(self, copy, name, folders):
        root = copy(name)
        for folder in folders:
            shutil.rmtree(root / folder)
            (root / folder).mkdir()
        if name == "cityscapes":
            shutil.rmtree(root / "gtFine/train/bremen")
        with pytest.raises(ValueError, match=r"train\w* holds no (images|pictures)"):
            OPENERS[name](root, "train")

    def test_an_empty_list(self, copy):
        root = copy("voc")
        (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").write_text("\n\n")
        with pytest.raises(ValueError, match=r"Segmentation/train\.txt is empty"):
            open_voc(root, "train")

    def test_duplicate_names(self, copy):
        root = copy("voc")
        listed = root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
        listed.write_text(listed.read_text() + "2007_000001\n")
        with pytest.raises(ValueError, match=r"train\.txt names 2007_000001 more than once"):
            open_voc(root, "train")
        root = copy("cityscapes")
        for kind in ("leftImg8bit", "gtFine"):
            for path in (root / kind / "train" / "aachen").iterdir():
                shutil.copy(path, root / kind / "train" / "bremen" / path.name)
        with pytest.raises(ValueError, match=r"aachen/aachen_000000.*bremen/aachen_000000.* have the same name"):
            open_cityscapes(root, "train")
        with pytest.raises(ValueError, match="frankfurt_000000.* have the same name in the split val.val_coarse"):
            open_cityscapes(root, "val+val_coarse")

    def test_windows_line_ends_blank_lines_and_hidden_files_do_no_harm(self, copy):
        root = copy("voc") / "VOCdevkit" / "VOC2012"
        wanted = open_voc(root, "train").pairs
        listed = root / "ImageSets/Segmentation/train.txt"
        listed.write_bytes(b"\xef\xbb\xbf" + listed.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
        assert open_voc(root, "train").pairs == wanted
        root = copy("cityscapes")
        (root / "leftImg8bit/train/aachen/._aachen_000000_000019_leftImg8bit.png").write_bytes(b"\x00\x05\x16\x07")
        assert len(open_cityscapes(root, "train")) == TRAIN

    @pytest.mark.parametrize(
        ("name", "pattern"),
        [
            ("camvid", "trainannot/000000.png"),
            ("cityscapes", "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"),
            ("voc", "VOCdevkit/VOC2012/SegmentationClass/2007_000000.png"),
            ("ade20k", "ADEChallengeData2016/annotations/training/ADE_train_00000001.png"),
        ],
    )
    def test_colours_and_16_bits_in_a_label_file(self, copy, name, pattern):
        root = copy(name)
        data = OPENERS[name](root, "train")
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(root / pattern)
        with pytest.raises(
            ValueError, match=rf"{Path(pattern).name} is coloured \(RGB\), its pixels must be class num"
        ):
            data.read(0)
        Image.fromarray(np.full(SIZE, 300, np.uint16)).save(root / pattern)
        with pytest.raises(ValueError, match=f"{Path(pattern).name} has 16 or more bits a pixel"):
            data.read(0)


class TestNamesThatAreNotUtf8:
    ODD = "caf\udce9"  # the byte E9 in a file name, as Python keeps it

    def test_in_a_list_and_on_disk(self, copy):
        voc2012 = copy("voc") / "VOCdevkit" / "VOC2012"
        for folder, suffix in (("JPEGImages", ".jpg"), ("SegmentationClass", ".png")):
            shutil.copy(voc2012 / folder / f"2007_000000{suffix}", voc2012 / folder / f"{self.ODD}{suffix}")
        listed = voc2012 / "ImageSets/Segmentation/train.txt"
        listed.write_bytes(listed.read_bytes() + b"caf\xe9\n")
        data = open_voc(voc2012, "train")
        assert data.name(TRAIN) == self.ODD
        assert np.array_equal(data.read(TRAIN)[1], data.read(0)[1])

    def test_an_absent_one_is_named_on_the_terminal(self, copy, capsys):
        root = copy("voc")
        listed = root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
        listed.write_bytes(listed.read_bytes() + b"caf\xe9\n")
        code, _, err = run(["train", "--data.name=voc", f"--data.root={root}", "--output", root / "run"], capsys)
        assert code == 2 and r"JPEGImages/caf\udce9.jpg is not there" in err

    def test_as_the_folder_of_make_data(self, tmp_path, capsys):
        words = ["make-data", "scenes", tmp_path / self.ODD, "--train=1", "--val=1", "--size=[32,48]"]
        code, out, _ = run(words, capsys)
        assert code == 0 and r"caf\udce9" in out
        assert len(open_data(DataConfig(name="folder", root=str(tmp_path / self.ODD)), "train")) == 1


SMALL = ["--train=2", "--val=1", "--size=[32,48]"]
NETWORK = ["--model.depth=3", "--model.base_channels=4", "--model.stem_channels=4", "--accelerator=cpu"]
SHORT = ["--recipe.iterations=1", "--recipe.precise_bn_batches=1", "--data.crop=[32,32]", "--data.batch_size=2"]


class TestMakeData:
    @pytest.mark.parametrize("layout", writers.LAYOUTS)
    def test_the_last_line_says_how_to_train_on_it(self, tmp_path, capsys, layout):
        root = tmp_path / layout
        code, out, _ = run(["make-data", "scenes", root, f"--layout={layout}", *SMALL], capsys)
        assert code == 0
        options = out.strip().splitlines()[-1].removeprefix("train on them with ").split()
        assert options[0] == "--data.name" and "--data.root" in options
        words = ["train", *options, *NETWORK, *SHORT, "--data.workers=0", "--output", tmp_path / "run"]
        code, _, err = run(words, capsys)
        assert code == 0, err
        assert not (root / writers.UNFINISHED).exists()
        code, _, err = run(["make-data", "scenes", root, f"--layout={layout}", *SMALL], capsys)
        assert code == 2 and "already holds" in err

    def test_every_class_of_the_scenes_has_a_place_in_every_layout(self):
        assert tuple(writers.COUNTERPARTS) == CLASSES

    @pytest.mark.parametrize("layout", writers.LAYOUTS)
    def test_the_progress_bar_ends_at_its_total(self, tmp_path, layout):
        steps: list[int] = []
        config = DataConfig(image_size=(32, 48), train_images=3, val_images=3)
        writers.write_layout(layout, tmp_path / "a", config, on_picture=lambda: steps.append(1))
        assert len(steps) == writers.pictures_of(layout, config)

    @pytest.mark.parametrize(("train", "val"), [(1, 1), (2, 1), (1, 3)])
    def test_the_smallest_sets_can_be_read(self, tmp_path, train, val):
        config = DataConfig(image_size=(32, 48), train_images=train, val_images=val)
        writers.write_layout("sbd", tmp_path / "sbd", config)
        writers.write_layout("cityscapes", tmp_path / "city", config)
        assert len(open_voc(tmp_path / "sbd", "train_aug")) == train + 1
        assert len(open_voc(tmp_path / "sbd", "val")) == val
        assert len(open_cityscapes(tmp_path / "city", "train+train_extra")) == train + 1

    def test_an_interrupted_write_leaves_nothing(self, tmp_path):
        def stop():
            raise KeyboardInterrupt

        for root in (tmp_path / "new", tmp_path / "empty"):
            if root.name == "empty":
                root.mkdir()
            with pytest.raises(KeyboardInterrupt):
                writers.write_layout("voc", root, DataConfig(image_size=(32, 48)), on_picture=stop)
        assert not (tmp_path / "new").exists() and not list((tmp_path / "empty").iterdir())

    def test_a_killed_write_is_recognised(self, tmp_path, capsys):
        work = tmp_path / "a" / writers.UNFINISHED
        (work / "VOCdevkit").mkdir(parents=True)
        code, _, err = run(["make-data", "scenes", tmp_path / "a", "--layout=voc", *SMALL], capsys)
        assert code == 2 and "already holds .unfinished/, left by an interrupted make-data: remove it" in err
        assert work.exists(), "another process may still be writing it"
        with pytest.raises(ValueError, match="has no folder VOCdevkit/VOC2012/"):
            open_voc(tmp_path / "a", "train")

    def test_a_full_disk_leaves_nothing(self, tmp_path, capsys, monkeypatch):
        def full(path, pixels, palette=False):
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(writers, "_save", full)
        code, _, err = run(["make-data", "scenes", tmp_path / "a", *SMALL], capsys)
        assert code == 2 and "No space left on device" in err and not (tmp_path / "a").exists()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--layout=cityscape"], "no layout 'cityscape': choose one of folder, camvid, cityscapes"),
            (["--preset=huge"], "unknown preset 'huge'"),
            (["--train=0"], "train_images is 0"),
            (["--size=[16,48]"], "image_size"),
        ],
    )
    def test_wrong_options(self, tmp_path, capsys, words, message):
        code, _, err = run(["make-data", "scenes", tmp_path / "a", *SMALL, *words], capsys)
        assert code == 2 and message in err and not (tmp_path / "a").exists()

    def test_a_place_that_cannot_be_written(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        for place in (tmp_path / "file", tmp_path / "file" / "below"):
            code, _, err = run(["make-data", "scenes", place, *SMALL], capsys)
            assert code == 2 and "Not a directory" in err or "File exists" in err


@pytest.mark.parametrize("workers", [0, 1])
def test_wrong_labels_end_a_training_with_one_message(copy, capsys, tmp_path, workers):
    """Also where a loader process finds them."""
    root = copy("cityscapes")
    for path in (root / "gtFine" / "train").rglob("*_labelIds.png"):
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(path)
    data = ["--data.name=cityscapes", f"--data.root={root}", f"--data.workers={workers}"]
    code, _, err = run(["train", *data, *NETWORK, *SHORT, "--output", tmp_path / "run"], capsys)
    assert code == 2
    assert err.count("routeseg: error") == 1 and "_labelIds.png is coloured (RGB)" in err
