"""`routeseg check-data` finds what is wrong with a data set and says what to do."""

from __future__ import annotations

import json
import re
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from conftest import run, scenes_checkpoint
from pictures import ORIENTATION_TAG, ROTATED_RIGHT, noise, save, truncate
from routeseg.cli import main
from routeseg.data.config import DataConfig, open_data
from routeseg.data.sets.folder import open_folder
from routeseg.data.tools.check import check_split, images_to_show, look_at_pairs
from routeseg.data.tools.findings import SMALLEST, find, verdict
from routeseg.figures import Section, contact_sheet
from routeseg.labels import IGNORE
from test_folder import blocks, describe, write_pictures

BOTH = ("train", "val")


def folder(root, values=(0, 1), text="names: [a, b]", count=3, dtype=np.uint8):
    """A `folder` data set of 40x32 images; each split has all of the values."""
    names = [f"{split}/p{k}" for split in BOTH for k in range(count)]
    return write_pictures(describe(root, text), names, values, dtype=dtype)


def check(root, capsys, *words):
    """Exit code, what was printed, and the JSON of check-data."""
    out = root.parent / f"{root.name}_check"
    command = ["check-data", "--data.name", "folder", "--data.root", root, "--data.crop", "[32, 32]"]
    code, printed, err = run([*command, "--output", out, "--json", out / "found.json", *words], capsys)
    assert err == ""
    return code, printed, json.loads((out / "found.json").read_text())


def findings(root, **options):
    """The findings about the splits train and val of a `folder` data set, without the command."""
    checks = [check_split(open_folder(root, split), split, split == "train", workers=0) for split in BOTH]
    return find(checks, open_folder(root, "train").label_map, root / "classes.yaml", **options)


def only(found, text):
    (one,) = [finding for finding in found if text in finding.text]
    return one


class TestWhatIsThere:
    def test_a_sound_data_set_is_ready(self, tmp_path, capsys):
        root = folder(tmp_path / "mine", values=(0, 1, 255))
        masks = {s: [np.asarray(Image.open(root / "masks" / s / f"p{k}.png")) for k in range(3)] for s in BOTH}
        code, printed, found = check(root, capsys)
        assert code == 0 and found["verdict"] == "ready" and not found["findings"] and "\nready: " in printed
        for split in BOTH:
            facts, stored = found["splits"][split], np.stack(masks[split])
            assert facts["pictures"] == 3 and facts["sizes"] == {"40x32": 3} and facts["label_kinds"] == {"8 bit": 3}
            assert facts["values"] == {str(v): int((stored == v).sum()) for v in (0, 1, 255)}
            assert facts["ignored_pixels"] == (stored == IGNORE).sum()
            for k, row in enumerate(facts["classes"]):
                assert row["pixels"] == (stored == k).sum() and row["pictures"] == 3
                assert row["share"] == pytest.approx((stored == k).sum() / (stored != IGNORE).sum())
        assert Image.open(found["contact_sheet"]).width > 1000

    def test_scenes_and_their_layouts_are_ready(self, layouts, tmp_path, capsys):
        scenes = ["--data.image_size", "[48, 96]", "--data.train_images", 2, "--data.val_images", 2]
        for words in (
            scenes,
            ["--data.name", "cityscapes", "--data.root", layouts("cityscapes")],
            ["--data.name", "voc", "--data.root", layouts("voc"), "--data.train_split", "trainval"],
        ):
            code, out, _ = run(["check-data", "--data.crop", "[32, 32]", *words, "--output", tmp_path], capsys)
            assert code == 0 and "\nready" in out and (tmp_path / "contact_sheet.png").is_file()

    def test_no_run_overwrites_the_contact_sheet_of_another(self, tmp_path, capsys):
        for k, name in enumerate(("one", "two", "one")):
            root = folder(tmp_path / name, count=k + 1)
            command = ["check-data", root, "--data.crop", "[32, 32]", "--output", tmp_path / "out"]
            code, printed, _ = run(command, capsys)
            sheet = tmp_path / "out" / ("contact_sheet.png" if k == 0 else f"contact_sheet_{k + 1}.png")
            assert code == 0 and f"{sheet}: some images" in printed
            assert Image.open(sheet).height > 0
        assert len(list((tmp_path / "out").iterdir())) == 3

    def test_a_split_by_name_and_twice(self, tmp_path, capsys):
        root = folder(tmp_path / "mine")
        shutil.move(root / "images" / "val", root / "images" / "test")
        shutil.move(root / "masks" / "val", root / "masks" / "test")
        code, _, found = check(root, capsys, "--split", "test", "--split", "train", "--split", "test")
        assert code == 0 and list(found["splits"]) == ["test", "train"]
        code, printed, found = check(root, capsys)
        assert code == 2 and "val: no folder" in printed and found["splits"]["train"]["pictures"] == 3

    def test_other_processes_find_the_same(self, tmp_path):
        root = folder(tmp_path / "mine", values=(0, 1, 7, 255), count=10)
        truncate(root / "images" / "train" / "p4.png")
        data, steps = open_folder(root, "train"), []
        alone = check_split(data, "train", workers=0)
        shared = check_split(data, "train", workers=2, on_image=lambda: steps.append(1))
        assert shared.as_dict() == alone.as_dict() and len(steps) == 10 and len(alone.unreadable) == 1
        assert [picture.name for picture in shared.images] == [picture.name for picture in alone.images]

    def test_16_bits_and_negative_and_coloured_values_are_counted(self, tmp_path):
        root = folder(tmp_path / "mine", values=(1000, 2000), text="names: [a, b]\nmapping: {1000: a}", dtype=np.uint16)
        save(root / "masks" / "train" / "p0.png", blocks([(1, 2, 3), (255, 0, 0)]).astype(np.uint8))
        data = open_folder(root, "train")
        pictures = look_at_pairs(data.pairs, data.label_map, data.read_values)
        assert [picture.kind for picture in pictures] == ["colour", "16 bit", "16 bit"]
        assert set(pictures[0].values) == {'"#010203"', '"#ff0000"'} == set(pictures[0].unknown)
        assert pictures[1].unknown == ("2000",) and pictures[1].pixels[0] == pictures[1].values["1000"]


class TestWhatIsWrong:
    """Each of these is behind a question why the IoU is 0 or nan, or why only one class is predicted."""

    @pytest.mark.parametrize(
        ("values", "text", "level", "about", "remedy"),
        [
            ((0, 255), "", "error", "only label values are 0 and 255.*b never occurs", "{0: 0, 255: 1}"),
            ((1, 2), "", "error", r"values without a class in 3 of 3 labels: 2 \(", "{1: 0, 2: 1}.*run from 1"),
            ((0, 1, 2), "", "error", "without a class", r"\[background, a, .*{0: 255, 1: 0, 2: 1}"),
            ((10, 200), "", "error", "without a class", "{10: 0, 200: 1}`, if that is the order"),
            ((0, 128), "", "error", "without a class", "{0: 0, 128: 1}`, if that is the order"),
            ((0, 1, 9), "", "error", r"without a class.*: 9 \(", "{9: 255}` to ignore"),
            ((255,), "", "error", "not a single labelled pixel: every pixel is ignored", "the mapping"),
            ((0, 0, 0), "", "error", "every labelled pixel is a; ", "check the mapping"),
            ((0, 1, 2), "mapping: {1: 0, 2: 1}", "warning", "0 and 1 both mean a", "{0: 255, ...}"),
            ((0, 1) + (255,) * 18, "", "warning", "90.0 % of the pixels are ignored", "is 255 .* a class"),
            ((0,), "names: [a]", "error", "there is one class only, a", "rest of the image as a class"),
            ((1, 2), "names: [a, b, c, d]", "warning", "a, d never occur: .*lowest label value is 1", "names and map"),
        ],
    )
    def test_label_values(self, tmp_path, values, text, level, about, remedy):
        text = text if text.startswith("names") else f"names: [a, b]\n{text}"
        found = findings(folder(tmp_path, values, text))
        for split in BOTH:
            matching = [f for f in found if f.text.startswith(split) and re.search(about, f.text)]
            assert len(matching) == 1, [f.text for f in found]
            assert matching[0].level == level or (split == "val" and values == (0, 0, 0))
            assert re.search(remedy, matching[0].remedy), matching[0].remedy
        assert verdict(found) == level + "s"

    def test_what_it_says_to_write_makes_the_data_set_ready(self, tmp_path):
        for values, text in (
            ((0, 255), "{0: 0, 255: 1}"),
            ((1, 2), "{1: 0, 2: 1}"),
            ((0, 1, 2), "{0: 255, 1: 0, 2: 1}"),
        ):
            root = folder(tmp_path / text, values)
            (first, *_) = findings(root)
            assert f"mapping: {text}`" in first.remedy
            describe(root, f"names: [a, b]\nmapping: {text}\n")
            assert not findings(root)

    def test_coloured_masks_without_a_mapping(self, tmp_path):
        root = folder(tmp_path, [(128, 64, 128), (0, 0, 142)])
        finding = only(findings(root), "train: colours without a class")
        assert finding.level == "error" and len(finding.files) == 3
        assert '"#804080": NAME' in finding.remedy and '"#00008e": NAME' in finding.remedy

    def test_masks_whose_borders_are_blurred(self, tmp_path):
        root = folder(tmp_path)
        for k in range(3):
            mask = Image.fromarray((blocks([0, 200], seed=k)).astype(np.uint8))
            mask.resize((39, 31)).resize((40, 32)).save(root / "masks" / "train" / f"p{k}.png")
        assert "nearest neighbours" in only(findings(root), "train: label values without a class").remedy
        for k in range(3):
            (root / "masks" / "train" / f"p{k}.png").unlink()
            Image.fromarray(blocks([(9, 99, 200), (200, 9, 9)], seed=k).astype(np.uint8)).save(
                root / "masks" / "train" / f"p{k}.jpg"
            )
        finding = only(findings(root), "train: 3 of 3 labels are no label images")
        assert finding.level == "error" and "is of the format JPEG, which does not keep" in finding.files[0]

    def test_unreadable_and_missing_files_are_named(self, tmp_path, capsys):
        root = folder(tmp_path / "mine", count=4)
        truncate(root / "images" / "train" / "p1.png")
        truncate(root / "masks" / "train" / "p2.png")
        code, printed, found = check(root, capsys)
        assert code == 0 and found["verdict"] == "warnings" and "2 of 4 images cannot be read" in printed
        assert "images/train/p1.png" in printed and "masks/train/p2.png" in printed
        assert set(found["splits"]["train"]["unreadable"]) == {"p1", "p2"}
        for path in (root / "images" / "train").iterdir():
            path.write_bytes(b"no image")
        assert check(root, capsys)[0] == 2

    def test_of_many_files_twenty_are_listed(self, tmp_path, capsys):
        root = folder(tmp_path / "mine", count=23)
        for path in (root / "images" / "val").iterdir():
            path.write_bytes(b"no image")
        _, printed, found = check(root, capsys)
        assert printed.count("images/val/") == 20 and "and 3 more" in printed
        assert len(only([type("F", (), f) for f in found["findings"]], "cannot be read").files) == 23

    def test_labels_that_do_not_fit(self, tmp_path):
        root = folder(tmp_path)
        save(root / "masks" / "train" / "p0.png", blocks([0, 1], 40, 32).astype(np.uint8))
        finding = only(findings(root), "train: 1 of 3 labels have another size")
        assert finding.level == "error" and "p0.png is 40x32, its label" in finding.files[0]
        assert "width and height are swapped" in finding.remedy and "EXIF" not in finding.remedy
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = ROTATED_RIGHT
        save(root / "images" / "train" / "p0.png", noise(40, 32), exif=exif)
        assert "width and height are swapped: a note in the images (EXIF)" in only(findings(root), "size").remedy
        (root / "masks" / "train" / "p1.png").unlink()
        save(root / "masks" / "train" / "p1.tif", np.full((32, 40), 0.5, np.float32))
        finding = only(findings(root), "train: 1 of 3 labels are no label images")
        assert "p1.tif is no label image" in finding.files[0] and "EXIF" not in finding.remedy

    @pytest.mark.parametrize(
        ("turn", "height", "width", "on_mask", "said"),
        [
            (3, 32, 40, 1, True),
            (2, 32, 40, 1, True),
            (4, 32, 40, 1, True),
            (6, 40, 40, 1, True),
            (3, 32, 40, 3, False),
            (6, 32, 40, 1, False),  # only a mask that was drawn upright has this size
            (1, 32, 40, 1, False),
        ],
    )
    @pytest.mark.parametrize("suffix", ["png", "jpg"])
    def test_a_note_that_turns_an_image_and_changes_no_size(self, tmp_path, suffix, turn, height, width, on_mask, said):
        root = folder(tmp_path)
        (root / "images" / "train" / "p0.png").unlink()
        notes = Image.Exif(), Image.Exif()
        notes[0][ORIENTATION_TAG], notes[1][ORIENTATION_TAG] = turn, on_mask
        size = (width, height) if turn == 6 else (height, width)
        save(root / "images" / "train" / f"p0.{suffix}", noise(*size), exif=notes[0])
        save(root / "masks" / "train" / "p0.png", blocks([0, 1], height, width).astype(np.uint8), exif=notes[1])
        found = [one for one in findings(root) if "EXIF" in one.text]
        assert [one.files for one in found] == [(str(root / "images" / "train" / f"p0.{suffix}"),)] * said
        assert verdict(found) == ("warnings" if said else "ready")

    def test_borders_of_a_mask_that_was_resized(self, tmp_path):
        """Beside classes that have names: what fills no area is told from what was painted."""
        root = folder(tmp_path, text="names: [a, b]\nmapping: {255: b}")
        mask = cv2.blur(blocks([0, 255]).astype(np.uint8), (2, 2))
        for k in range(3):
            save(root / "masks" / "train" / f"p{k}.png", mask)
        finding = only(findings(root), "train: label values without a class")
        assert "fill no area of their own" in finding.remedy and ": ignore" in finding.remedy
        save(root / "masks" / "train" / "p0.png", np.repeat([[0, 1, 7, 255]], 32, 0).repeat(10, 1).astype(np.uint8))
        save(root / "masks" / "train" / "p1.png", blocks([0, 1]).astype(np.uint8))
        save(root / "masks" / "train" / "p2.png", blocks([0, 1]).astype(np.uint8))
        assert "`mapping: {7: 255}` to ignore" in only(findings(root), "without a class").remedy

    def test_all_kinds_of_errors_come_in_one_run(self, tmp_path, capsys):
        """Each with its count, its files and its remedy; what one image is wrong in hides none of the others."""
        root = folder(tmp_path / "mine", count=8)
        images, masks = root / "images" / "train", root / "masks" / "train"
        (masks / "p0.png").unlink()
        (images / "p1.png").unlink()
        save(masks / "p2.png", blocks([0, 1, 9], 24, 24).astype(np.uint8))
        save(masks / "p3.png", blocks([0, 1, 7]).astype(np.uint8))
        (images / "p4.png").write_bytes(b"")
        save(masks / "p5.jpg", blocks([0, 1]).astype(np.uint8))
        code, printed, found = check(root, capsys)
        assert code == 2 and found["verdict"] == "errors"
        wanted = {
            "images without a label: 1 of 7": ([f"{images}/p0.png"], f"add to {masks}"),
            "labels without an image: 1 of 7": ([f"{masks}/p1.png"], f"add to {images}"),
            "files with the name of another one: 1 of 8": ([f"{masks}/p5.jpg and {masks}/p5.png"], "keep one"),
            "1 of 6 labels have another size": ([f"{masks}/p2.png"], "of the size of their image"),
            "label values without a class in 2 of 6 labels: ": (
                [f"{masks}/p2.png", f"{masks}/p3.png"],
                "{7: 255, 9: 255}",
            ),
            "1 of 6 images cannot be read": (
                [f"cannot read {images}/p4.png as an image: the file is empty"],
                "again",
            ),
        }
        for text, (files, remedy) in wanted.items():
            finding = only([type("F", (), f) for f in found["findings"]], f"train: {text.split(': ')[0]}")
            assert text in finding.text and remedy in finding.remedy, finding.text
            assert len(finding.files) == len(files), finding.files
            assert all(file in given for file, given in zip(files, finding.files, strict=True))
            assert finding.text in printed and all(file in printed for file in files)
        assert not [f for f in found["findings"] if f["text"].startswith("val")]
        assert set(found["splits"]["train"]["left_out"]) == {text.split(":")[0] for text in list(wanted)[:3]}
        with pytest.raises(ValueError, match=r"same name: keep one"):  # a training refuses the first of them
            open_folder(root, "train")

    def test_labels_that_are_all_named_otherwise(self, tmp_path, capsys):
        root = write_pictures(describe(tmp_path / "mine", "names: [a, b]"), ["train/x", "val/y"], suffix="_m")
        code, printed, found = check(root, capsys)
        assert code == 2 and found["splits"]["val"]["pictures"] == 0 and found["contact_sheet"] is None
        assert printed.count("mask_suffix: _mask") == 4 and "remove" not in printed
        describe(root, "names: [a, b]\nmask_suffix: _m")
        assert check(root, capsys)[0] == 0

    @pytest.mark.parametrize("name", ["camvid", "ade20k"])
    def test_files_without_a_partner_in_a_known_layout(self, copied, tmp_path, capsys, name):
        root = copied(name)
        files = sorted(root.rglob("*train*/*"))
        files[0].unlink()
        files[-1].unlink()
        words = ["check-data", "--data.name", name, "--data.root", root, "--output", tmp_path / "out"]
        code, out, err = run(words, capsys)
        assert code == 2 and not err
        assert "train: images without a label: 1 of 3" in out and "train: labels without an image: 1 of 3" in out

    def test_a_list_that_names_what_is_not_there(self, tmp_path, capsys):
        root = describe(tmp_path / "mine", "names: [a, b]\nsplit: {train: t.txt, val: v.txt}")
        write_pictures(root, ["x", "y"])
        (root / "t.txt").write_text("x\nz\n")
        (root / "v.txt").write_text("y\n")
        code, printed, found = check(root, capsys)
        assert code == 2 and [row["pictures"] for row in found["splits"].values()] == [1, 1]
        for folder_name in ("images", "masks"):
            assert f"t.txt of which {root}/{folder_name} has no file: 1 of 2" in printed
        assert f"take the names out of {root}/t.txt" in printed

    def test_a_split_that_cannot_be_opened_has_its_column(self, tmp_path, capsys):
        root = folder(tmp_path / "mine")
        shutil.rmtree(root / "masks" / "val")
        (root / "masks" / "train" / "p0.png").unlink()
        code, printed, _ = check(root, capsys)
        (heads,) = [line for line in printed.splitlines() if "train" in line and "┃" in line and "%" not in line]
        (pictures,) = [line for line in printed.splitlines() if line.startswith("│ images")]
        assert code == 2 and heads.replace("┃", "").split() == ["train", "val"]
        assert "2" in pictures and "cannot be opened" in pictures
        assert "val: no folder" in printed and "train: images without a label" in printed
        shutil.rmtree(root / "masks" / "train")
        code, printed, found = check(root, capsys)
        assert code == 2 and printed.count("cannot be opened") == 2 and len(found["findings"]) == 2

    def test_rare_classes_are_told_and_change_no_verdict(self, tmp_path, capsys):
        root = folder(tmp_path / "mine", (0, 1, 2), "names: [a, b, c]")
        for k in range(3):
            mask = blocks([0, 1]).astype(np.uint8)
            mask[0, :3] = 2
            save(root / "masks" / "train" / f"p{k}.png", mask)
        code, printed, found = check(root, capsys)
        assert code == 0 and found["verdict"] == "ready" and "\nready: " in printed
        assert "note: train: rare classes, of the labelled pixels: c (0.2 %)" in printed
        assert "--recipe.class_balance 0.5" in printed and "note: val" not in printed

    def test_pictures_without_a_label_and_a_class_that_is_nearly_everything(self, tmp_path):
        root = folder(tmp_path)
        for k in range(3):
            save(root / "masks" / "val" / f"p{k}.png", blocks([0] * 160 + [1], 320, 320).astype(np.uint8))
            save(root / "images" / "val" / f"p{k}.png", noise(320, 320, k))
        save(root / "masks" / "val" / "p1.png", np.full((320, 320), IGNORE, np.uint8))
        found = findings(root)
        assert only(found, "val: 1 of 3 images have no labelled pixel").files == (str(root / "masks/val/p1.png"),)
        assert (
            only(found, "val: 99.4 % of the labelled pixels is a").level == "warning" and verdict(found) == "warnings"
        )

    def test_classes_that_are_only_in_one_split(self, tmp_path):
        root = folder(tmp_path, (0, 1, 2), "names: [a, b, c]")
        for k in range(3):
            save(root / "masks" / "train" / f"p{k}.png", blocks([0, 1]).astype(np.uint8))
            save(root / "masks" / "val" / f"p{k}.png", blocks([1, 2]).astype(np.uint8))
        found = findings(root)
        assert "their IoU is 0" in only(found, "train: c never occurs").text
        assert "their IoU is nan" in only(found, "val: a never occurs").text

    def test_the_same_picture_in_both_splits_and_twice_in_one(self, tmp_path):
        root = folder(tmp_path)
        for source, copy in (("train/p0", "val/p1"), ("train/p1", "train/p2")):
            for kind in ("images", "masks"):
                shutil.copy(root / kind / f"{source}.png", root / kind / f"{copy}.png")
        found = findings(root)
        files = (f"{root}/images/train/p0.png = {root}/images/val/p1.png",)
        assert only(found, "is in two splits: 1 times").files == files
        assert only(found, "is several times in a split: 1 times").level == "warning"

    def test_one_file_in_the_lists_of_both_splits(self, tmp_path):
        root = write_pictures(describe(tmp_path, "names: [a, b]\nsplit: {train: t.txt, val: v.txt}"), ["x", "y"])
        (root / "t.txt").write_text("x\ny\n")
        (root / "v.txt").write_text("y\n")
        assert only(findings(root), "is in two splits").level == "warning"

    def test_small_pictures(self, tmp_path):
        root = folder(tmp_path)
        assert not findings(root, crop=(32, 40))
        text = only(findings(root, crop=(33, 40)), "smaller than the crop").text
        assert "train: 3 of 3 images are smaller than the crop of 40x33" in text
        save(root / "images" / "val" / "p0.png", noise(SMALLEST - 1, 40))
        save(root / "masks" / "val" / "p0.png", np.eye(SMALLEST - 1, 40, dtype=np.uint8))
        assert (
            only(findings(root), f"val: images with a side under {SMALLEST} pixels, which the network refuses: 1").level
            == "error"
        )

    def test_a_data_set_of_a_known_layout_keeps_its_own_remedy(self, layouts, tmp_path, capsys):
        root = tmp_path / "camvid"
        shutil.copytree(layouts("camvid"), root)
        path = min((root / "trainannot").iterdir())
        labels = np.asarray(Image.open(path)).copy()
        labels[:4] = 77
        save(path, labels)
        code, out, _ = run(
            ["check-data", "--data.name", "camvid", "--data.root", root, "--output", tmp_path / "out"], capsys
        )
        assert code == 2 and "77 (" in out and "11-class labelling of SegNet" in out and "classes.yaml" not in out


class TestCommand:
    def test_wrong_words(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        root = folder(tmp_path / "mine")
        base = ["check-data", "--data.name", "folder", "--data.root", root]
        for words, expected in (
            (["check-data", "--data.name", "folder", "--output", tmp_path / "o"], "data.root is not set"),
            (["check-data", "--data.name", "folder", "--data.root", tmp_path / "no", "--output", tmp_path], "no file"),
            ([*base, "--output", tmp_path / "file" / "x"], "cannot write"),
            ([*base, "--output", tmp_path / "o", "--json", tmp_path / "file" / "x"], "cannot write"),
            ([*base, "--workers", "-1"], "--workers is -1"),
            ([*base, "--jsn", "x"], "did you mean json"),
            ([*base, "--split", "test", "--output", tmp_path / "o"], "images has train, val"),
        ):
            code, out, err = run(words, capsys)
            assert code == 2 and expected in out + err, (words, out, err)

    def test_the_other_commands_name_unreadable_files_once(self, layouts, tmp_path, capfd):
        """Also where loader processes met them, in training and again in validation."""
        root = tmp_path / "mine"
        shutil.copytree(layouts("folder"), root)
        for split, stem in (("train", "000001"), ("val", "000000")):
            truncate(root / "images" / split / f"{stem}.png")
        data = ["--data.name", "folder", "--data.root", str(root), "--data.crop", "[32, 32]", "--data.batch_size", "2"]
        model = ["--model.depth", "3", "--model.base_channels", "8", "--model.stem_channels", "8"]
        recipe = ["--recipe.iterations", "4", "--recipe.validate_every", "2", "--recipe.precise_bn_batches", "2"]
        assert main(["train", *data, *model, *recipe, "--output", str(tmp_path / "run"), "--data.workers", "1"]) == 0
        errors = capfd.readouterr().err
        for name in ("train/000001.png", "val/000000.png"):
            assert errors.count(f"routeseg: skipped: cannot read {root}/images/{name}") == 1, errors
        checkpoint = scenes_checkpoint(tmp_path / "checkpoint")
        for command in (["evaluate", checkpoint], ["routes", checkpoint, "--output", str(tmp_path / "routes")]):
            assert main([*command, *data, "--data.workers", "0"]) == 0
            errors = capfd.readouterr().err
            assert errors.count("val/000000.png") == 1 and "Traceback" not in errors, errors

    def test_a_folder_is_enough(self, tmp_path, capsys):
        root = folder(tmp_path / "mine")
        code, out, err = run(["check-data", root, "--output", tmp_path / "o"], capsys)
        assert code == 0 and "smaller than the crop, 32x32" in out, "the crop that `train FOLDER` takes"
        code, out, err = run(["check-data", root, "--config", "camvid/small", "--output", tmp_path / "o"], capsys)
        assert code == 0 and "train" in out and not err
        assert run(["check-data", tmp_path / "none"], capsys)[0] == 2

    @pytest.mark.parametrize("words", [[], ["--workers", "1"]])
    def test_without_a_folder_it_asks_for_one(self, words, tmp_path, capsys):
        code, out, err = run(["check-data", *words, "--output", tmp_path / "o"], capsys)
        assert code == 2 and "nothing to check: give the folder" in err and not out and not (tmp_path / "o").exists()


class TestContactSheet:
    def test_rare_classes_are_shown_first(self, tmp_path):
        root = folder(tmp_path, (0,), "names: [a, b, c]", count=9)
        save(root / "masks" / "train" / "p7.png", blocks([0, 0, 1]).astype(np.uint8))
        save(root / "masks" / "train" / "p5.png", blocks([0, 0, 2, 2]).astype(np.uint8))
        truncate(root / "images" / "train" / "p0.png")
        found = check_split(open_folder(root, "train"), "train", workers=0)
        assert images_to_show(found, 2) == [5, 7]
        shown = images_to_show(found, 4)
        assert {5, 7} < set(shown) and 0 not in shown and len(shown) == 4
        assert images_to_show(found, 100) == list(range(1, 9))

    def test_pictures_are_tinted_with_their_labels_and_the_legend_has_every_class(self, tmp_path):
        image, labels = np.full((60, 80, 3), 128, np.uint8), np.zeros((60, 80), np.uint8)
        labels[:, 40:], labels[:10] = 2, IGNORE  # 2 is one more than there are classes: a value without a class
        path = tmp_path / "sheet.png"
        section = Section("train", [("x", image, labels)] * 5)
        contact_sheet(path, "t", [section], ["a", "b"], [(0, 200, 0), (0, 0, 200)], [1, 0])
        sheet = np.asarray(Image.open(path)).astype(int)

        def is_tinted(colour):
            return np.abs(sheet - (0.55 * np.array(colour) + 0.45 * 128)).max(-1) < 3

        green, magenta = is_tinted((0, 200, 0)), is_tinted((255, 0, 255))
        for tint in (green, magenta):
            assert tint.any(0).sum() > 4 * 150 and tint.sum() > 5 * 150 * 200, "in the five images, half of each"
        for colour in ((0, 200, 0), (0, 0, 200), (255, 0, 255), (0, 0, 0)):
            assert (sheet == colour).all(-1).sum() > 200, f"{colour} stands in the legend"

    def test_tall_and_wide_and_odd_names(self, tmp_path):
        sizes = {"n" * 300: (32, 640), "\udce9": (640, 33)}
        pictures = [(name, noise(*size), np.zeros(size, np.uint8)) for name, size in sizes.items()]
        names, colours = [f"class {k}" for k in range(150)], [(k, k, k) for k in range(150)]
        contact_sheet(tmp_path / "s.png", "t" * 500, [Section("x", pictures)], names, colours, [1] + [0] * 149)
        assert 1000 < Image.open(tmp_path / "s.png").height < 3000


def test_scenes_are_looked_at_as_they_are_drawn():
    data = open_data(DataConfig(image_size=(48, 64), train_images=3), "train")
    found = check_split(data, "train", training=True)
    assert len(found.images) == 3 and found.sizes == {(48, 64): 3}
    counts = sum(np.bincount(data.read(k)[1].ravel(), minlength=256) for k in range(3))
    assert np.array_equal(found.pixels[:-1], counts[: len(data.classes)]) and found.pixels[-1] == counts[IGNORE]
