"""CamVid: in small as make-data writes it, and the real one where it lies on this machine."""

from __future__ import annotations

import numpy as np
import pytest

from data_sets import SIZE, DataSetContract
from pictures import noise, save
from routeseg.data.sets import camvid
from routeseg.labels import IGNORE


class TestCamvid(DataSetContract):
    NAME = "camvid"
    SPLITS = "choose one of train, val, test"
    TREE = r"ROOT/trainannot/NAME\.png"
    TABLE = (0, 1, 7, 2, 3, 4, 5, 6, 8, 9)
    LABELLED = 0.9
    FOLDERS = EMPTY = ("train", "trainannot")
    PICTURE = "train/000000.png"
    LABEL = "trainannot/000000.png"
    NO_PICTURE = "trainannot/000000.png is a label without an image"
    NO_LABEL = "train/000000.png is an image without a label.*1 of 4"
    STRANGE = (12, "11 classes")

    def test_the_value_after_the_classes_is_ignored(self, copied):
        root = copied("camvid")
        save(root / "trainannot" / "000000.png", np.full(SIZE, 11, np.uint8))
        data = camvid.open_camvid(root, "train")
        assert len(data.classes) == 11 and (data.read(0)[1] == IGNORE).all()

    def test_a_split_without_a_folder(self, layouts):
        with pytest.raises(ValueError, match="(?s)no folder test/.*trainannot"):
            camvid.open_camvid(layouts("camvid"), "test")

    def test_two_images_of_one_name_are_refused(self, copied):
        root = copied("camvid")
        save(root / "train" / "000001.jpg", noise(*SIZE))
        with pytest.raises(ValueError, match="000001.jpg and .*000001.png have the same name"):
            camvid.open_camvid(root, "train")


class TestRealCamvid:
    def test_splits_sizes_and_classes(self, camvid_root):
        train, val = (camvid.open_camvid(camvid_root, split) for split in ("train", "val"))
        assert (len(train), len(val)) == (367, 101)
        assert not {pair.name for pair in train.pairs} & {pair.name for pair in val.pairs}
        counts = np.zeros(256, dtype=np.int64)
        for index in range(0, len(val), 10):
            image, labels = val.read(index)
            assert image.shape == (360, 480, 3) and labels.shape == (360, 480)
            assert 40 < image.mean() < 160
            counts += np.bincount(labels.ravel(), minlength=256)
        assert set(np.flatnonzero(counts)) == {*range(11), IGNORE}
        road, building = (camvid.CLASSES.names.index(name) for name in ("road", "building"))
        assert counts[[road, building]].sum() > 0.4 * counts.sum(), "road and houses fill most of a street"

    def test_sky_is_above_the_road(self, camvid_root):
        _, labels = camvid.open_camvid(camvid_root, "val").read(0)
        classes = [camvid.CLASSES.names.index(name) for name in ("sky", "road")]
        sky, road = (np.nonzero(labels == k)[0].mean() for k in classes)  # mean row, of 360
        assert sky < 120 and road > 200
