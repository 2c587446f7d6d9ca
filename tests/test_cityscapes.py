"""Cityscapes: official ids, splits, and labels of training ids."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from cityscapesscripts.helpers.labels import labels as official_labels
from PIL import Image

from data_sets import SIZE, TRAIN, DataSetContract, check, scene
from routeseg.data.sets import cityscapes
from routeseg.data.sets.cityscapes import open_cityscapes
from routeseg.labels import IGNORE

# Written out once more, independent of the package: class of the scenes -> label value in the files.
#              sky building fence pole road pavement vegetation sign car pedestrian
LABEL_IDS = (23, 11, 13, 17, 7, 8, 21, 20, 26, 24)


class TestCityscapes(DataSetContract):
    NAME = "cityscapes"
    SPLITS = "choose one of train, val, test, train_extra, train_coarse, val_coarse"
    TREE = r"ROOT/leftImg8bit/\{train.*ROOT/gtFine/"
    TABLE = (10, 2, 4, 5, 0, 1, 8, 7, 13, 11)
    LABELLED = 0.8
    FOLDERS = ("leftImg8bit/train", "gtFine/train")
    EMPTY = tuple(f"{kind}/train/{city}" for kind in ("leftImg8bit", "gtFine") for city in ("aachen", "bremen"))
    PICTURE = "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    LABEL = "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    NO_PICTURE = "aachen_000000_000019_gtFine_labelIds.png has no image"
    NO_LABEL = "aachen_000000_000019_leftImg8bit.png has no label"
    STRANGE = (34, "training ids")

    def as_drawn(self, data):
        """Cities come first, scenes went round them."""
        data.pairs.sort(key=lambda pair: pair.name.split("_")[1])
        return data

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

    def test_the_test_split_has_nothing_to_learn_and_may_have_no_files(self, copied):
        root = copied("cityscapes")
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
        check(data, drawn, self.TABLE, 0.2, start)
        assert all((data.read(index)[1] == IGNORE).mean() > 0.2 for index in range(len(data))), "coarse"
        assert all("gtCoarse" in str(pair.labels) for pair in data.pairs)

    def test_train_coarse_has_the_pictures_of_train(self, layouts):
        fine, coarse = (open_cityscapes(layouts("cityscapes"), split) for split in ("train", "train_coarse"))
        assert [pair.image for pair in fine.pairs] == [pair.image for pair in coarse.pairs]

    def test_splits_are_joined(self, layouts):
        data = open_cityscapes(layouts("cityscapes"), "train+train_extra")
        parts = [open_cityscapes(layouts("cityscapes"), split) for split in ("train", "train_extra")]
        assert data.pairs == parts[0].pairs + parts[1].pairs and len(data) == 6

    def test_train_ids_are_used_where_present(self, copied):
        root = copied("cityscapes")
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
    def test_an_id_that_is_not_official_is_refused(self, copied, value):
        root = copied("cityscapes")
        path = root / "gtFine/val/frankfurt/frankfurt_000001_000019_gtFine_labelIds.png"
        values = np.asarray(Image.open(path)).copy()
        values[5, 5] = value
        Image.fromarray(values).save(path)
        data = open_cityscapes(root, "val")
        data.read(0)
        with pytest.raises(ValueError, match=f"000001.*labelIds.png has the label value {value}.*training ids"):
            data.read(1)

    def test_all_official_ids_are_read(self, copied):
        root = copied("cityscapes")
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

    def test_two_pictures_of_one_name(self, copied):
        root = copied("cityscapes")
        for kind in ("leftImg8bit", "gtFine"):
            for path in (root / kind / "train" / "aachen").iterdir():
                shutil.copy(path, root / kind / "train" / "bremen" / path.name)
        with pytest.raises(ValueError, match=r"aachen/aachen_000000.*bremen/aachen_000000.* have the same name"):
            open_cityscapes(root, "train")
        with pytest.raises(ValueError, match="frankfurt_000000.* have the same name in the split val.val_coarse"):
            open_cityscapes(root, "val+val_coarse")

    def test_hidden_files_do_no_harm(self, copied):
        root = copied("cityscapes")
        (root / "leftImg8bit/train/aachen/._aachen_000000_000019_leftImg8bit.png").write_bytes(b"\x00\x05\x16\x07")
        assert len(open_cityscapes(root, "train")) == TRAIN
