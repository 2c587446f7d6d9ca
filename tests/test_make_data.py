"""What make-data writes: every layout, whole or not at all, and ready to be trained on."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from conftest import run
from data_sets import SIZE
from routeseg.data.config import DataConfig, open_data
from routeseg.data.scenes import CLASSES
from routeseg.data.sets.cityscapes import open_cityscapes
from routeseg.data.sets.voc import open_voc
from routeseg.data.tools import layouts as writers

SMALL = ["--train=2", "--val=1", "--size=[32,48]"]
NETWORK = ["--model.depth=3", "--model.base_channels=4", "--model.stem_channels=4", "--accelerator=cpu"]
SHORT = ["--recipe.iterations=1", "--recipe.precise_bn_batches=1", "--data.crop=[32,32]", "--data.batch_size=2"]


class TestMakeData:
    @pytest.mark.usefixtures("no_report")
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
        writers.write_layout(layout, tmp_path / "a", config, on_image=lambda: steps.append(1))
        assert len(steps) == writers.images_of(layout, config)

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
                writers.write_layout("voc", root, DataConfig(image_size=(32, 48)), on_image=stop)
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

    def test_a_folder_whose_name_is_not_utf_8(self, tmp_path, capsys):
        words = ["make-data", "scenes", tmp_path / "caf\udce9", "--train=1", "--val=1", "--size=[32,48]"]
        code, out, _ = run(words, capsys)
        assert code == 0 and r"caf\udce9" in out
        assert len(open_data(DataConfig(name="folder", root=str(tmp_path / "caf\udce9")), "train")) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_wrong_labels_end_a_training_with_one_message(copied, capsys, tmp_path, workers):
    """Also where a loader process finds them."""
    root = copied("cityscapes")
    for path in (root / "gtFine" / "train").rglob("*_labelIds.png"):
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(path)
    data = ["--data.name=cityscapes", f"--data.root={root}", f"--data.workers={workers}"]
    code, _, err = run(["train", *data, *NETWORK, *SHORT, "--output", tmp_path / "run"], capsys)
    assert code == 2
    assert err.count("routeseg: error") == 1 and "_labelIds.png is coloured (RGB)" in err
