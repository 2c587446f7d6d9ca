"""Your own pictures without a classes.yaml: the masks tell the classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import routeseg
from conftest import run
from pictures import noise, save, truncate
from routeseg.data.config import DataConfig, known_classes, open_data
from routeseg.data.sets import masks
from routeseg.data.sets.folder import open_folder, read_description
from routeseg.data.sets.masks import UnclearMasks, find_classes
from routeseg.labels import IGNORE
from test_folder import blocks, describe, write_pictures
from test_train_command import TINY

RED, GREEN, BLACK, WHITE = (255, 0, 0), (0, 128, 64), (0, 0, 0), (255, 255, 255)
NAMES = [f"{split}/p{k}" for split in ("train", "val") for k in range(3)]
pytestmark = pytest.mark.usefixtures("one_thread")


def unnamed(root: Path, values, dtype=np.uint8) -> Path:
    """Six pictures without a classes.yaml, whose masks all have these values."""
    return write_pictures(root, NAMES, values, dtype=dtype)


def mask_files(root: Path) -> list[Path]:
    return sorted((root / "masks").rglob("*.png"))


def with_palettes(root: Path, *palettes) -> Path:
    """The masks as palette files, which take these palettes in turns."""
    for k, path in enumerate(mask_files(root)):
        picture = Image.open(path).copy()
        picture.putpalette([part for colour in palettes[k % len(palettes)] for part in colour])
        picture.save(path)
    return root


class TestClasses:
    @pytest.mark.parametrize(
        ("values", "names", "labels"),
        [
            ((0, 1, 2), ["class 0", "class 1", "class 2"], (0, 1, 2)),
            ((0, 1, 255), ["class 0", "class 1"], (0, 1, IGNORE)),
            ((0, 255), ["background", "foreground"], (0, 1)),
            ((1, 2), ["class 1", "class 2"], (0, 1)),
            ((0, 3, 7, 255), ["class 0", "class 3", "class 7"], (0, 1, 2, IGNORE)),
            ((0, 1000), ["class 0", "class 1000"], (0, 1)),
            ((BLACK, RED, GREEN), ["background", "#008040", "#ff0000"], (0, 2, 1)),
            ((RED, GREEN), ["#008040", "#ff0000"], (1, 0)),
            ((BLACK, WHITE), ["background", "foreground"], (0, 1)),
            ((BLACK, (1, 1, 1), WHITE), ["class 0", "class 1"], (0, 1, IGNORE)),
        ],
    )
    def test_what_the_values_mean(self, tmp_path, values, names, labels):
        """The same in each split, and pixel by pixel."""
        root = unnamed(tmp_path, values, np.uint16 if max(np.ravel(values)) > 255 else np.uint8)
        for split in ("train", "val"):
            data = open_data(DataConfig(name="folder", root=str(root)), split)
            assert list(data.classes.names) == names
            for index in range(3):
                stored = np.asarray(Image.open(root / "masks" / split / f"p{index}.png"))
                known = data.read(index)[1]
                for value, label in zip(values, labels, strict=True):
                    here = (stored == value).all(-1) if stored.ndim == 3 else stored == value
                    assert here.any() and (known[here] == label).all()

    def test_the_colours_of_coloured_masks_are_the_palette(self, tmp_path):
        assert open_folder(unnamed(tmp_path, (BLACK, RED, GREEN)), "val").classes.palette == (BLACK, GREEN, RED)

    def test_palette_files_count_by_number_and_bring_their_colours(self, tmp_path):
        root = with_palettes(unnamed(tmp_path, (0, 1, 2, 255)), [GREEN, RED, BLACK] + 253 * [WHITE])
        data = open_folder(root, "train")
        assert data.classes.names == ("class 0", "class 1", "class 2") and data.classes.palette == (GREEN, RED, BLACK)
        assert np.array_equal(data.read(0)[1], np.asarray(Image.open(root / "masks" / "train" / "p0.png")))

    @pytest.mark.parametrize("palette", [[(k, k, k) for k in range(256)], [RED, RED, GREEN]], ids=["grey", "twice"])
    def test_a_palette_that_tells_nothing_is_left_out(self, tmp_path, palette):
        classes = open_folder(with_palettes(unnamed(tmp_path, (0, 1, 2)), palette), "train").classes
        assert classes.names == ("class 0", "class 1", "class 2") and classes.palette is None

    def test_palette_files_that_number_their_colours_differently_count_by_colour(self, tmp_path):
        """As a tool leaves them that makes a palette for each file."""
        root = with_palettes(unnamed(tmp_path, (0, 1, 2)), [BLACK, RED, GREEN], [GREEN, BLACK, RED])
        data = open_folder(root, "train")
        assert data.classes.names == ("background", "#008040", "#ff0000")
        for index in range(3):
            colours = np.asarray(Image.open(root / "masks" / "train" / f"p{index}.png").convert("RGB"))
            assert np.array_equal(np.array(data.classes.palette)[data.read(index)[1]], colours)

    def test_a_black_mask_saved_in_grey_is_background_among_coloured_ones(self, tmp_path):
        root = unnamed(tmp_path, (BLACK, RED))
        save(root / "masks" / "val" / "p0.png", np.zeros((32, 40), np.uint8))
        assert (open_folder(root, "val").read(0)[1] == 0).all()

    def test_a_class_of_one_mask_is_a_class_of_both_splits(self, tmp_path):
        root = unnamed(tmp_path, (0, 1))
        save(root / "masks" / "val" / "p2.png", blocks([0, 1, 2]).astype(np.uint8))
        assert [len(open_folder(root, split).classes) for split in ("train", "val")] == [3, 3]

    def test_the_order_of_files_and_of_looking_does_not_matter(self, tmp_path, monkeypatch):
        for k, (name, shift) in enumerate((("one", 0), ("other", 3))):
            root = tmp_path / name
            for j, picture in enumerate(NAMES):
                colours = [(40 * ((j + shift) % 6), 9, 200), GREEN]
                save(root / "masks" / f"{picture}.png", blocks(colours, seed=k).astype(np.uint8))
        assert find_classes(tmp_path / "one" / "masks") == find_classes(tmp_path / "other" / "masks")
        monkeypatch.setattr(masks.os, "cpu_count", lambda: 1)
        monkeypatch.setattr(masks, "CHUNK", 1)
        assert len(find_classes(tmp_path / "one" / "masks").description["names"]) == 7

    def test_of_very_many_masks_some_are_looked_at_at_even_steps(self, tmp_path, monkeypatch):
        root = unnamed(tmp_path, (0, 1))
        monkeypatch.setattr(masks, "MOST_MASKS", 3)
        save(root / "masks" / "val" / "p2.png", blocks([0, 1, 2]).astype(np.uint8))  # the last is always among them
        found = find_classes(root / "masks")
        assert (found.seen, found.masks) == (3, 6) and "3 of 6 masks" in str(found)
        save(root / "masks" / "train" / "p1.png", blocks([0, 1, 9]).astype(np.uint8))
        with pytest.raises(ValueError, match=r"p1\.png has the label value 9.*check-data .* --write_classes"):
            open_folder(root, "train").read(1)

    def test_a_value_that_came_later_is_no_class_by_chance(self, tmp_path):
        """Classes 0, 5 and 9 are numbered 0 to 2; a 2 in a new mask is none of them."""
        root = unnamed(tmp_path, (0, 5, 9))
        config = known_classes(DataConfig(name="folder", root=str(root)))
        save(root / "masks" / "train" / "p0.png", blocks([0, 2]).astype(np.uint8))
        with pytest.raises(ValueError, match="label value 2, which is none of the 3 classes"):
            open_data(config, "train").read(0)

    def test_masks_that_cannot_be_read_are_passed_over(self, tmp_path):
        root = unnamed(tmp_path, (0, 1))
        truncate(root / "masks" / "train" / "p0.png")
        assert len(open_folder(root, "train").classes) == 2
        for path in mask_files(root):
            path.write_bytes(b"no image")
        with pytest.raises(UnclearMasks, match="masks holds no mask that can be read"):
            find_classes(root / "masks")


class TestUnclear:
    def test_soft_borders(self, tmp_path):
        root = unnamed(tmp_path, (BLACK, RED, GREEN))
        for path in mask_files(root):
            Image.open(path).resize((200, 160), Image.Resampling.BICUBIC).save(path)
        with pytest.raises(UnclearMasks, match=r"different colours.*soft edges.*as PNG with hard edges.*classes\.yaml"):
            open_folder(root, "train")

    def test_borders_with_fewer_values_than_classes_may_have(self, tmp_path):
        """Fifty shades on some pixels each, beside two that fill the masks."""
        root = unnamed(tmp_path, (0, 200))
        for path in mask_files(root):
            mask = np.array(Image.open(path).resize((400, 320), Image.Resampling.NEAREST))
            mask[0, :50] = np.arange(20, 70)
            save(path, mask)
        with pytest.raises(UnclearMasks, match="52 different numbers.*never painted"):
            find_classes(root / "masks")

    def test_numbers_of_things(self, tmp_path):
        root = unnamed(tmp_path, (0, 1))
        save(root / "masks" / "val" / "p0.png", np.arange(32 * 40, dtype=np.uint16).reshape(32, 40))
        with pytest.raises(UnclearMasks, match=r"more than 256 different numbers .*val/p0\.png alone has 1280"):
            find_classes(root / "masks")

    def test_jpegs(self, tmp_path):
        root = unnamed(tmp_path, (0, 255))
        mask_files(root)[0].rename(root / "masks" / "train" / "p0.jpg")
        with pytest.raises(UnclearMasks, match=r"train/p0\.jpg does not tell.*JPEGs, which do not keep values.*as PNG"):
            find_classes(root / "masks")

    def test_numbers_beside_colours(self, tmp_path):
        root = unnamed(tmp_path, (BLACK, RED))
        save(root / "masks" / "val" / "p1.png", blocks([0, 1]).astype(np.uint8))
        with pytest.raises(UnclearMasks, match=r"val/p1\.png holds numbers, .* save all of them in one way"):
            find_classes(root / "masks")

    @pytest.mark.parametrize(("values", "there"), [((0,), "0"), ((255,), "255"), ((RED,), "#ff0000")])
    def test_one_class_alone(self, tmp_path, values, there):
        with pytest.raises(UnclearMasks, match=f"hold nothing but {there}: label two classes"):
            find_classes(unnamed(tmp_path, values) / "masks")

    def test_check_data_tells_it_beside_all_else(self, tmp_path, capsys):
        root = unnamed(tmp_path / "mine", (0, 255))
        mask_files(root)[0].rename(root / "masks" / "train" / "p0.jpg")
        mask_files(root)[0].unlink()
        save(root / "masks" / "train" / "p2.png", blocks([0, 255], 24, 24).astype(np.uint8))
        code, out, err = run(["check-data", root, "--output", tmp_path / "o"], capsys)
        assert code == 2 and not err and "JPEGs, which do not keep values" in out
        assert "images without a label: 1 of 3" in out and "have another size than their image" in out


class TestCommands:
    def test_a_run_remembers_the_classes(self, tmp_path, capsys):
        """Training, going on, evaluation and prediction agree, whatever becomes of the masks."""
        root, output = unnamed(tmp_path / "mine", (BLACK, RED, GREEN)), tmp_path / "run"
        words = ["train", root, "--config=small", *TINY, "--recipe.iterations=1", "--recipe.save_every=1"]
        code, out, err = run([*words, "--output", output], capsys)
        line = f"{root}/masks: 3 classes, by the colours in 6 masks: background, #008040, #ff0000"
        assert code == 0 and out.splitlines().count(line) == 1, err
        known = yaml.safe_load((output / "config.yaml").read_text())["data"]["classes"]
        assert known["names"] == ["background", "#008040", "#ff0000"]
        config = routeseg.load(output / "best").config
        assert config.class_names == tuple(known["names"]) and config.palette == (BLACK, GREEN, RED)
        for path in mask_files(root):
            save(path, blocks([RED, GREEN]).astype(np.uint8))
        code, out, err = run(["evaluate", output], capsys)
        assert code == 0 and "by the colours" not in out and "background" in out and "#008040" in out, err
        code, out, err = run(["train", "--resume", f"--output={output}", "--recipe.iterations=2"], capsys)
        assert code == 0 and routeseg.load(output / "last").config.class_names == config.class_names, err
        describe(root, "names: [a, b]")
        code, out, err = run(["evaluate", output], capsys)
        assert code == 0 and f"{root}/classes.yaml is not read" in out, err

    def test_a_run_does_not_go_on_with_other_values(self, tmp_path, capsys):
        """0, 1, 2 become 0, 2, 7."""
        root, output = unnamed(tmp_path / "mine", (0, 1, 2)), tmp_path / "run"
        words = ["train", root, "--config=small", *TINY, "--recipe.save_every=1", "--output", output]
        assert run([*words, "--recipe.iterations=1"], capsys)[0] == 0
        before = (output / "config.yaml").read_bytes()
        for path in mask_files(root):
            mask = np.array(Image.open(path))
            Image.fromarray(np.array([0, 2, 7], np.uint8)[mask]).save(path)
        code, _, err = run([*words, "--recipe.iterations=2", "--resume"], capsys)
        assert code == 2 and "has other classes: class 1 is class 1 there and class 2 here" in err
        assert (output / "config.yaml").read_bytes() == before

    def test_check_data_tells_them_once_and_writes_them(self, tmp_path, capsys):
        root = unnamed(tmp_path / "mine", (0, 255))
        code, out, err = run(["check-data", root, "--output", tmp_path / "o"], capsys)
        assert code == 0 and out.count("2 classes, by the numbers in 6 masks: background, foreground\n") == 1, err
        assert not (root / "classes.yaml").exists()
        words = ["check-data", root, "--output", tmp_path / "o", "--write_classes"]
        code, out, err = run(words, capsys)
        assert code == 0 and f"{root}/classes.yaml: written" in out, err
        about = read_description(root / "classes.yaml")
        assert about.classes.names == ("background", "foreground") and about.values == {0: 0, 255: 1}
        code, out, err = run(words, capsys)
        assert code == 2 and "is there already" in err
        assert run(["check-data", "--write_classes", "--output", tmp_path / "o"], capsys)[0] == 2

    def test_the_other_processes_of_a_job_say_nothing(self, tmp_path, capsys, monkeypatch):
        root = unnamed(tmp_path / "mine", (0, 1))
        monkeypatch.setenv("LOCAL_RANK", "1")
        code, out, _ = run(["check-data", root, "--output", tmp_path / "o"], capsys)
        assert code == 0 and "by the numbers" not in out

    def test_a_mistake_in_what_a_run_keeps_is_named(self, tmp_path):
        root = unnamed(tmp_path / "mine", (0, 1))
        with pytest.raises(ValueError, match=r"data\.classes for .*mine does not describe.*did you mean names"):
            open_data(DataConfig(name="folder", root=str(root), classes={"names": ["a", "b"], "nmes": 1}), "train")

    def test_images_and_masks_that_are_missing_are_still_told(self, tmp_path):
        root = unnamed(tmp_path / "mine", (0, 1))
        save(root / "images" / "train" / "more.png", noise(32, 40))
        with pytest.raises(ValueError, match=r"more\.png is an image without a label.*remove the image"):
            open_folder(root, "train")
