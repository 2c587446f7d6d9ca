"""Your own images without a classes.yaml: the masks tell the classes."""

from __future__ import annotations

import io
import re
from pathlib import Path

import cv2
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


def unnamed(root: Path, values, dtype=np.uint8) -> Path:
    """Six images without a classes.yaml, whose masks all have these values."""
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


def resized(vals, factor: float, how: int):
    """What draws masks of these values, resized with soft edges."""
    return lambda k: cv2.resize(blobs(k, vals), None, fx=factor, fy=factor, interpolation=how)


def blobs(seed: int, values, height: int = 96, width: int = 128) -> np.ndarray:
    """Discs of each value on the first one."""
    rng, mask = np.random.default_rng(seed), np.zeros((height, width), np.intp)
    rows, columns = np.ogrid[:height, :width]
    for kind in list(range(1, len(values))) * 2:
        row, column, radius = rng.integers(10, height - 10), rng.integers(10, width - 10), rng.integers(8, 20)
        mask[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = kind
    return np.array(values, np.uint16 if np.max(values) > 255 else np.uint8)[mask]


def jpeg_and_back(quality: int, values=(0, 255)):
    def draw(seed: int) -> np.ndarray:
        data = io.BytesIO()
        Image.fromarray(blobs(seed, values)).save(data, "JPEG", quality=quality)
        return np.asarray(Image.open(data))

    return draw


def drawn(root: Path, draw, count: int = 4) -> Path:
    """Masks of `draw(number)`, two of them for validation, and images of their size."""
    for k in range(count):
        name, mask = f"{'val' if k >= count - 2 else 'train'}/p{k}.png", draw(k)
        save(root / "masks" / name, mask)
        save(root / "images" / name, noise(*mask.shape[:2], k))
    return root


def dabbed(*dabs):
    """Masks of 0 and 255 with squares of other values, (mask, value, side), in a corner."""

    def draw(seed: int) -> np.ndarray:
        mask = blobs(seed, (0, 255))
        mask[:12, :12] = 0
        for place, (number, value, side) in enumerate(dabs):
            if number == seed:
                mask[2 : 2 + side, 2 + 4 * place : 2 + 4 * place + side] = value
        return mask

    return draw


class TestWithoutAnArea:
    """Values that occur only where others meet, or in a few pixels: nobody painted with them."""

    @pytest.mark.parametrize(
        ("draw", "strange"),
        [
            (resized((0, 255), 0.5, cv2.INTER_AREA), {64, 128, 191}),
            (resized((0, 255), 2, cv2.INTER_LINEAR), {48, 64, 191, 207}),
            (jpeg_and_back(95), {1, 2, 253, 254}),
            (jpeg_and_back(100), {1, 254}),
            (dabbed((0, 1, 1), (1, 254, 1)), {1, 254}),
            (dabbed((0, 7, 1)), {7}),
        ],
        ids=["area", "bilinear", "JPEG 95", "JPEG 100", "two slips", "one slip"],
    )
    def test_they_are_ignored_and_white_is_the_foreground(self, tmp_path, draw, strange):
        found = find_classes(drawn(tmp_path, draw) / "masks")
        assert found.description["names"] == ["background", "foreground"]
        mapping = found.description["mapping"]
        assert mapping[0] == 0 and mapping[255] == 1 and {v for v in mapping if mapping[v] == IGNORE} >= strange
        assert "without an area of their own" in str(found) and "255 is ignored" not in str(found)
        data = open_folder(tmp_path, "train")
        for index in range(len(data)):
            stored, labels = draw(index), data.read(index)[1]
            assert (labels[stored == 255] == 1).all() and (labels[stored == 0] == 0).all()
            assert (labels[(stored > 0) & (stored < 255)] == IGNORE).all()

    def test_of_colours_too(self, tmp_path):
        found = find_classes(drawn(tmp_path, resized((BLACK, RED, (0, 255, 0)), 0.5, cv2.INTER_AREA)) / "masks")
        assert found.description["names"] == ["background", "#00ff00", "#ff0000"]
        assert found.description["mapping"]["#800000"] == IGNORE

    @pytest.mark.parametrize(
        "draw",
        [resized((0, 255), 0.7, cv2.INTER_LINEAR), resized((0, 255), 1.5, cv2.INTER_LANCZOS4), jpeg_and_back(60)],
        ids=["bilinear", "lanczos", "JPEG"],
    )
    def test_many_are_refused(self, tmp_path, draw):
        with pytest.raises(UnclearMasks, match="fill no area of their own.*nearest neighbours"):
            find_classes(drawn(tmp_path, draw) / "masks")

    def test_thin_lines_and_dots_are_classes(self, tmp_path):
        lines = drawn(tmp_path / "lines", lambda k: np.eye(96, 128, k, dtype=np.uint8) * 9)
        assert find_classes(lines / "masks").description["names"] == ["class 0", "class 9"]
        dots = np.zeros((96, 128), np.uint8)
        dots[10::20, 10::20] = 1
        dots = drawn(tmp_path / "dots", lambda k: dots)
        assert find_classes(dots / "masks").description["names"] == ["class 0", "class 1"]

    def test_borders_that_are_counted_are_classes(self, tmp_path):
        """0, 1 and 2, as cells are labelled: 1 is a line around each 2."""

        def draw(k):
            cells = blobs(k, (0, 2))
            return np.where((cells == 0) & (cv2.dilate(cells, np.ones((3, 3), np.uint8)) > 0), 1, cells).astype(
                np.uint8
            )

        found = find_classes(drawn(tmp_path, draw) / "masks")
        assert found.description == {"names": ["class 0", "class 1", "class 2"]}

    def test_numbers_that_a_resized_mask_counts_up_to_are_none(self, tmp_path):
        """0 and 15 with all that soft borders make between them."""
        found = find_classes(drawn(tmp_path, resized((0, 15), 0.7, cv2.INTER_LINEAR)) / "masks")
        assert found.description["names"] == ["class 0", "class 15"] and found.description["mapping"][7] == IGNORE

    def test_colours_a_step_apart(self, tmp_path, capsys):
        """In different masks they may be one class: a warning. Numbers of classes in one channel are not."""
        root = drawn(tmp_path / "mine", lambda k: blobs(k, (BLACK, (255 - k % 2, 0, 0))))
        code, out, _ = run(["check-data", root, "--output", tmp_path / "o"], capsys)
        assert code == 0 and '"#fe0000" and "#ff0000" hardly differ, and no label has both' in out
        assert "ready, with warnings" in out
        root = drawn(tmp_path / "ids", lambda k: blobs(k, (BLACK, (1, 0, 0), (2, 0, 0))))
        assert "hardly differ" not in run(["check-data", root, "--output", tmp_path / "o"], capsys)[1]


class TestWhite:
    """255 is ignored only if nothing says that it is painted."""

    @pytest.mark.parametrize(
        ("draw", "why"),
        [
            (lambda k: blobs(k, (0, 255) if k == 0 else (0, 1)), "in 1 of 4 masks it is all that there is beside 0"),
            (lambda k: blobs(k, (0, 255) if k == 3 else (0, 1)), "in 1 of 4 masks"),
            (dabbed((0, 1, 4)), "in 3 of 4 masks"),
            (lambda k: blobs(k, (0, 100, 200, 255)), "0, 100, 200, 255 look like grey levels"),
            (lambda k: blobs(k, (0, 7, 254, 255)), "254 is hardly a class beside it"),
            (lambda k: blobs(k, (0, 65535) if k == 0 else (0, 1, 2)).astype(np.uint16), "is 65535 a class"),
        ],
        ids=["a file of train", "a file of val", "a dab", "grey levels", "beside 254", "16 bits"],
    )
    def test_it_is_asked_for(self, tmp_path, draw, why):
        root = drawn(tmp_path / "mine", draw)
        with pytest.raises(UnclearMasks, match=why) as error:
            find_classes(root / "masks")
        assert "% of the pixels" in str(error.value)
        lines = re.findall(r"(if it is [^:]*): `([^`]*)`", str(error.value))
        assert len(lines) >= 2
        for when, line in lines:  # each of them is a whole classes.yaml
            white = re.search(r"is (\d+) a class", str(error.value))[1]
            describe(root, line)
            target = read_description(root / "classes.yaml").values[int(white)]
            assert (target == IGNORE) == (when == "if it is ignored")
            train, val = open_folder(root, "train"), open_folder(root, "val")
            for k, labels in enumerate((train.read(0)[1], train.read(1)[1], val.read(0)[1], val.read(1)[1])):
                assert (labels[draw(k) == int(white)] == target).all()

    @pytest.mark.parametrize("values", [(0, 128, 255), (0, 127, 255), (0, 85, 170, 255), (0, 32768, 65535)])
    def test_even_steps_up_to_it_are_classes(self, tmp_path, values):
        found = find_classes(drawn(tmp_path, lambda k: blobs(k, values)) / "masks")
        assert found.description["mapping"] == {value: k for k, value in enumerate(values)}
        assert f"{values[-1]} is a class" in str(found)

    @pytest.mark.parametrize("values", [(0, 1, 255), (0, 5, 9, 255), (1, 2, 255)])
    def test_beside_other_classes_it_is_ignored(self, tmp_path, values):
        found = find_classes(drawn(tmp_path, lambda k: blobs(k, values)) / "masks")
        assert len(found.description["names"]) == len(values) - 1 and "255 is ignored" in str(found)

    def test_65535_is_what_255_is(self, tmp_path, capsys):
        found = find_classes(drawn(tmp_path / "a", lambda k: blobs(k, (0, 1, 65535))) / "masks")
        assert found.description["names"] == ["class 0", "class 1"] and "65535 is ignored" in str(found)
        assert found.description["mapping"][65535] == IGNORE
        found = find_classes(drawn(tmp_path / "b", lambda k: blobs(k, (0, 65535))) / "masks")
        assert found.description == {"names": ["background", "foreground"], "mapping": {0: 0, 65535: 1}}
        root = describe(tmp_path / "a", "names: [a, b, c]")
        out = run(["check-data", root, "--output", tmp_path / "o"], capsys)[1]
        assert "`mapping: {65535: 255}` if 65535 stands for what is ignored" in out

    def test_what_is_below_0_is_ignored(self, tmp_path):
        for k in range(2):
            save(tmp_path / "masks" / f"{k}.tif", blobs(k, (0, 1, 2)).astype(np.int32) - 1)
        found = find_classes(tmp_path / "masks")
        assert found.description == {"names": ["class 0", "class 1"], "mapping": {0: 0, 1: 1, 255: IGNORE, -1: IGNORE}}
        assert "-1 is ignored" in str(found)

    def test_in_a_classes_file_too(self, tmp_path, capsys):
        root = drawn(tmp_path / "mine", lambda k: blobs(k, (0, 255) if k == 0 else (0, 1)))
        describe(root, "names: [a, b]")
        code, out, _ = run(["check-data", root, "--output", tmp_path / "o"], capsys)
        assert code == 2 and "in 1 of 2 labels 255 is all that there is beside 0" in out
        assert f"{root}/masks/train/p0.png" in out and "p1.png" not in out
        for target in ("ignore", "b"):
            assert f"`mapping: {{255: {target}}}`" in out
            describe(root, f"names: [a, b]\nmapping: {{255: {target}}}")
            assert run(["check-data", root, "--output", tmp_path / "o"], capsys)[0] == 0


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
        with pytest.raises(UnclearMasks, match="52 different numbers, of which 50 fill no area of their own"):
            find_classes(root / "masks")

    def test_numbers_of_things(self, tmp_path):
        root = unnamed(tmp_path, (0, 1))
        save(root / "masks" / "val" / "p0.png", np.arange(32 * 40, dtype=np.uint16).reshape(32, 40))
        with pytest.raises(UnclearMasks, match=r"more than 256 different numbers .*val/p0\.png alone has 1280"):
            find_classes(root / "masks")

    def test_jpegs(self, tmp_path):
        root = unnamed(tmp_path, (0, 255))
        mask_files(root)[0].rename(root / "masks" / "train" / "p0.jpg")
        assert len(find_classes(root / "masks").description["names"]) == 2, "it is a PNG with a wrong name"
        save(root / "masks" / "train" / "p0.jpg", blocks([0, 255]).astype(np.uint8))
        with pytest.raises(UnclearMasks, match=r"train/p0\.jpg is of the format JPEG, which does not keep.*as PNG"):
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
        save(root / "masks" / "train" / "p0.jpg", blocks([0, 255]).astype(np.uint8))
        for path in mask_files(root)[:2]:
            path.unlink()
        save(root / "masks" / "train" / "p2.png", blocks([0, 255], 24, 24).astype(np.uint8))
        code, out, err = run(["check-data", root, "--output", tmp_path / "o"], capsys)
        assert code == 2 and not err and "of the format JPEG, which does not keep the values" in out
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
        code, out, err = run([*words, "--recipe.iterations=1"], capsys)
        assert code == 0, err
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
