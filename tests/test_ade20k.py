"""ADE20K: 150 classes from 1, 0 is ignored."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_sets import SIZE, DataSetContract, first, scene
from routeseg.data.sets import ade20k
from routeseg.data.sets.ade20k import open_ade20k
from routeseg.labels import IGNORE


class TestAde20k(DataSetContract):
    NAME = "ade20k"
    ROOTS = (".", "ADEChallengeData2016")
    INSIDE = "ADEChallengeData2016"
    SPLITS = "choose one of train, val"
    TREE = "ROOT/ADEChallengeData2016/annotations/"
    TABLE = (2, 1, 32, 93, 6, 11, 4, 43, 20, 12)
    LABELLED = 0.9
    FOLDERS = EMPTY = ("images/training", "annotations/training")
    PICTURE = "images/training/ADE_train_00000001.jpg"
    LABEL = "annotations/training/ADE_train_00000001.png"
    NO_PICTURE = "ADE_train_00000001.png is a label without an image"
    NO_LABEL = "ADE_train_00000001.jpg is an image without a label"
    STRANGE = (151, "1 to 150")

    def test_labels_start_at_1_and_0_is_ignored(self, layouts):
        values = np.asarray(Image.open(first(layouts("ade20k"), "annotations/training/*.png")))
        known = values > 0
        assert np.array_equal(values[known], np.array(self.TABLE)[scene("train", 0)[1]][known] + 1) and not known.all()

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

    def test_all_values_and_no_other(self, copied):
        root = copied("ade20k")
        path = first(root, "annotations/validation/*.png")
        values = np.arange(48 * 96).reshape(SIZE) % 151
        Image.fromarray(values.astype(np.uint8)).save(path)
        data = open_ade20k(root, "val")
        assert np.array_equal(data.read(0)[1], np.where(values == 0, IGNORE, values - 1))
        Image.fromarray(np.full(SIZE, 151, np.uint8)).save(path)
        with pytest.raises(ValueError, match="has the label value 151.*1 to 150"):
            data.read(0)
