"""Exports of labelling tools become data sets of the `folder` layout."""

from __future__ import annotations

import json
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import run
from pictures import noise, save
from routeseg.data.sets.folder import open_folder, read_description
from routeseg.data.sets.voc import voc_palette
from routeseg.data.tools.convert import Annotations, convert_coco, convert_voc
from routeseg.labels import IGNORE
from test_folder import blocks

BOTH = ("train", "val")


def square(top, left, side):
    """A polygon as COCO writes it, x first."""
    return [left, top, left + side, top, left + side, top + side, left, top + side]


BOX = {"id": 4, "image_id": 7, "category_id": 3, "bbox": [1, 1, 5, 5]}  # an annotation without an outline


def image_entry(number, name):
    return {"id": number, "file_name": name, "height": 40, "width": 48}


def coco(root, **changes):
    """A COCO-style export of two images, with a polygon in a larger one, run lengths of both kinds, and a crowd."""
    for k, name in enumerate(("one.jpg", "sub/two.jpg")):
        save(root / "images" / name, noise(40, 48, k))
    crowd_counts = [48 * 10, 5 * 40, 40 * 48 - 48 * 10 - 5 * 40]  # column by column: 5 columns, beginning at the 12th
    crowd = {"size": [40, 48], "counts": crowd_counts}
    data = {
        "images": [image_entry(7, "one.jpg"), image_entry(9, "sub/two.jpg")],
        "categories": [
            {"id": 0, "name": "animals", "supercategory": "none"},
            {"id": 5, "name": "cat", "supercategory": "animals"},
            {"id": 3, "name": "dog", "supercategory": "animals"},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 5, "segmentation": [square(10, 10, 5)]},
            {"id": 2, "image_id": 7, "category_id": 3, "segmentation": [square(5, 5, 20), square(30, 30, 4)]},
            {"id": 3, "image_id": 9, "category_id": 5, "segmentation": crowd, "iscrowd": 1},
            {"id": 4, "image_id": 9, "category_id": 3, "bbox": [1, 1, 5, 5], "segmentation": []},
        ],
    }
    (root / "ann.json").write_text(json.dumps(data | changes))
    return root


def expected_masks(empty=0):
    """The masks of `coco`: dog is 1, cat 2."""
    one, two = np.full((40, 48), empty, np.uint8), np.full((40, 48), empty, np.uint8)
    one[5:25, 5:25] = one[30:34, 30:34] = 1
    one[10:15, 10:15] = 2
    two[:, 12:17] = 2
    return {"one": one, "sub/two": two}


class TestCoco:
    def words(self, root):
        return ["convert-data", "coco", root / "ann.json", root / "out", "--images", root / "images"]

    def test_small_objects_lie_over_large_ones_and_the_result_loads(self, tmp_path, capsys):
        root = coco(tmp_path)
        save(root / "images" / "not_in_the_json.jpg", noise(40, 48))
        code, out, _ = run(self.words(root), capsys)
        assert code == 0 and "3 classes, background, dog, cat" in out and "animals stands above" in out
        assert "were left out: 1" in out
        data = {split: open_folder(root / "out", split) for split in BOTH}
        read = {name.name(k): name.read(k)[1] for name in data.values() for k in range(len(name))}
        assert data["train"].classes.names == ("background", "dog", "cat") and set(read) == {"one", "sub/two"}
        for name, mask in expected_masks().items():
            assert np.array_equal(read[name], mask), name
        assert not (root / "out" / "images").exists(), "the images stay where they are"

    def test_background_ignored(self, tmp_path):
        convert_coco({"train": Annotations(coco(tmp_path) / "ann.json", tmp_path / "images")}, tmp_path / "out", False)
        mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "train" / "one.png"))
        wanted = expected_masks()["one"]
        assert np.array_equal(mask, np.where(wanted == 0, IGNORE, wanted - 1))

    def test_compressed_run_lengths(self, tmp_path):
        from pycocotools import mask as tool

        wanted = np.zeros((40, 48), np.uint8)
        wanted[3:30, 7:20] = 1
        runs = tool.encode(np.asfortranarray(wanted))
        entry = {"id": 1, "image_id": 7, "category_id": 5}
        segmentation = {"size": [40, 48], "counts": runs["counts"].decode()}
        root = coco(tmp_path, annotations=[{**entry, "segmentation": segmentation}])
        convert_coco({"train": Annotations(root / "ann.json", root / "images")}, root / "out")
        assert np.array_equal(np.asarray(Image.open(root / "out/masks/train/one.png")) == 2, wanted == 1)

    def test_through_a_symlink(self, tmp_path):
        root = coco(tmp_path / "deep" / "disk")
        (root / "out").mkdir()
        (tmp_path / "link").symlink_to(root / "out")
        convert_coco({"train": Annotations(root / "ann.json", root / "images")}, tmp_path / "link")
        assert sum(len(open_folder(tmp_path / "link", split)) for split in BOTH) == 2

    def test_a_file_for_training_and_one_for_validation(self, tmp_path, capsys):
        train, val = coco(tmp_path / "t"), coco(tmp_path / "v")
        words = ["convert-data", "coco", train / "ann.json", tmp_path / "out", "--images", train / "images"]
        code, _, _ = run([*words, "--val", val / "ann.json", "--val_images", val / "images"], capsys)
        assert code == 0
        for split, root in (("train", train), ("val", val)):
            data = open_folder(tmp_path / "out", split)
            assert [data.name(k) for k in range(len(data))] == ["one", "sub/two"]
            assert data.pairs[0].image.resolve() == root / "images" / "one.jpg"
            assert np.array_equal(data.read(0)[1], expected_masks()["one"])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"images": []}, "lists no images"),
            ({"annotations": []}, "has no annotations"),
            ({"categories": None}, "has no list `categories`: export as COCO"),
            ({"annotations": [{"id": 1, "image_id": 8, "category_id": 5}]}, "annotations of an image 8"),
            ({"annotations": [{"id": 1, "image_id": 7, "category_id": 6}]}, "annotations of a category 6"),
            ({"annotations": [{"id": 1, "image_id": 7}]}, "not as COCO writes it.*category_id"),
            (
                {"images": [image_entry(7, "..\\..\\no.jpg")]},
                r"has no no\.\*, which .*ann.json lists .*1 of 1.*--images",
            ),
            ({"images": [image_entry(7, "no.jpg")]}, "has no no.*, which .*ann.json lists"),
            ({"annotations": [BOX]}, "ann.json has 1 annotations and no outlines.*there are no masks"),
            ({"annotations": [BOX | {"segmentation": []}]}, "there are no masks"),
            ({"annotations": [BOX | {"segmentation": [[1, 2, 3, 4]]}]}, "there are no masks"),
            ({"annotations": [BOX | {"id": "x", "image_id": "seven"}]}, "annotation 'x' has `image_id` 'seven', which"),
            (
                {"annotations": [BOX | {"category_id": None}]},
                "annotation 4 has `category_id` None, which must be a who",
            ),
            ({"annotations": ["a box"]}, "the annotation at place 0 has no `image_id`"),
            ({"images": [image_entry("seven", "one.jpg")]}, "image 'seven' has `id` 'seven', which must be a whole"),
            ({"images": [image_entry(7.5, "one.jpg")]}, "image 7.5 has `id` 7.5, which must be a whole number"),
            ({"images": [image_entry(True, "one.jpg")]}, "image True has `id` True, which must be a whole number"),
            ({"images": [image_entry(7, "one.jpg"), image_entry("7", "sub/two.jpg")]}, "image '7' .* an id of its own"),
            ({"images": [image_entry(7, None)]}, "image 7 has `file_name` None, which must be a text"),
            (
                {"images": [image_entry(7, "one.jpg") | {"height": "tall"}]},
                "image 7 has `height` 'tall', .* at least 1",
            ),
            ({"images": [image_entry(7, "one.jpg") | {"width": 0}]}, "image 7 has `width` 0, .* at least 1"),
            ({"categories": [{"id": 3}]}, "category 3 has no `name`"),
            ({"categories": [{"id": 3, "name": ["dog"]}]}, r"category 3 has `name` \['dog'\], which must be a text"),
            ({"categories": [{"id": 3, "name": "d\x1b[2Jog"}]}, r"category 3 has `name` 'd\\x1b\[2Jog'"),
            (
                {"categories": [{"id": 3, "name": "dog", "supercategory": []}]},
                "`supercategory` \\[\\], which must be a te",
            ),
            ({"categories": [{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}]}, "category 3 .* an id of its own"),
            ({"images": [image_entry(7, "one.jpg"), image_entry(9, "one.jpg")]}, "2 images called one"),
            ({"categories": [{"id": k, "name": "cat"} for k in (3, 5)]}, "two categories called cat"),
        ],
    )
    def test_what_does_not_fit_is_named_and_nothing_written(self, tmp_path, capsys, changes, message):
        code, out, err = run(self.words(coco(tmp_path, **changes)), capsys)
        assert code == 2 and re.search(message, err), err
        assert err.count("\n") == 1 and not re.search("[\x00-\x09\x0b-\x1f]", err + out)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("..\\..\\media\\one.jpg", "..\\..\\media\\sub\\two.jpg"),
            ("C:\\Users\\me\\one.jpg", "C:\\Users\\me\\two.jpg"),
            ("/data/upload/1/one.jpg", "../two.jpg"),
            ("http://localhost:8080/data/upload/1/one.jpg", "s3://bucket/a%20b/two.jpg?X-Amz-Expires=3"),
            ("/data/local-files/?d=x/one.jpg", "http://host/data/local-files/?d=sub%2Ftwo.jpg"),
            ("./one.jpg", "sub//two.jpg"),
        ],
    )
    def test_file_names_of_another_machine(self, tmp_path, capsys, first, second):
        root = coco(tmp_path, images=[image_entry("7", first), image_entry(9.0, second)])
        code, _, err = run(self.words(root), capsys)
        assert code == 0, err
        for name, mask in expected_masks().items():
            assert np.array_equal(np.asarray(Image.open(root / "out" / "masks" / "train" / f"{name}.png")), mask), name

    def test_two_files_that_one_name_may_be(self, tmp_path, capsys):
        root = coco(tmp_path, images=[image_entry(7, "C:\\a\\two.jpg")])
        save(root / "images" / "other" / "two.jpg", noise(40, 48))
        code, _, err = run(self.words(root), capsys)
        assert (
            code == 2
            and "has 2 images called two.jpg" in err
            and "which of them C:" in err
            and "two.jpg is: keep one" in err
        )
        whole = coco(tmp_path, images=[image_entry(7, "one.jpg"), image_entry(9, "C:\\x\\sub\\two.jpg")])
        assert run(self.words(whole), capsys)[0] == 0, "the end of the path tells them apart"

    def test_a_polygon_that_is_not_in_a_list_of_its_own(self, tmp_path):
        entry = {"id": 1, "image_id": 7, "category_id": 5, "segmentation": square(10, 10, 5)}
        root = coco(tmp_path, annotations=[entry])
        convert_coco({"train": Annotations(root / "ann.json", root / "images")}, root / "out")
        mask = np.asarray(Image.open(root / "out/masks/train/one.png"))
        assert (mask[10:15, 10:15] == 2).all() and (mask > 0).sum() == 25

    @pytest.mark.parametrize(
        "segmentation",
        [
            [[1, 2, 3, 4, 5, 6, 7]],
            [["x"] * 6],
            {"size": [40, 48]},
            {"size": [9, 9], "counts": [81]},
            {"size": [40, 48], "counts": ["x"]},
            {"size": [40, 48], "counts": [-5, 40 * 48 + 5]},
            {"size": [40, 48], "counts": "no run lengths"},
            {"size": [40, 48], "counts": None},
            [[1, 2, 3, float("nan"), 5, 6]],
            [[1, 2, 3, 1e300, 5, 6]],
            {"counts": [40 * 48]},
            {"size": [40, 48], "counts": [7]},
            "a polygon",
            5,
            [1, 2, "3", 4, 5, 6],
        ],
    )
    def test_a_broken_outline_names_its_annotation(self, tmp_path, capsys, segmentation):
        entry = {"id": 55, "image_id": 7, "category_id": 5, "segmentation": segmentation}
        code, _, err = run(self.words(coco(tmp_path, annotations=[entry])), capsys)
        assert code == 2 and re.search("annotation 55 has no readable segmentation: (it|its|a|`counts`) ", err), err
        assert not (tmp_path / "out" / "classes.yaml").exists()

    def test_wrong_words_and_the_missing_extra(self, tmp_path, capsys, monkeypatch):
        root = coco(tmp_path)
        words = self.words(root)
        (root / "text.json").write_text("no json")
        for wrong, message in (
            (words[:4], "--images DIR"),
            ([*words, "--val_images", root], "--val_images only applies to --val"),
            ([*words[:2], root / "no.json", *words[3:]], "cannot read"),
            ([*words[:2], root / "text.json", *words[3:]], "is no JSON: it cannot be read from line 1, column 1"),
            ([*words[:-1], root / "nowhere"], "no folder"),
            ([*words, "--background", "red"], "choose class or ignore"),
            (["convert-data", "yolo", root], "choose coco or voc"),
        ):
            code, _, err = run(wrong, capsys)
            assert code == 2 and message in err, (wrong, err)
        assert run(words, capsys)[0] == 0
        code, _, err = run(words, capsys)
        assert code == 2 and "already holds a data set" in err
        monkeypatch.setitem(sys.modules, "pycocotools", None)
        code, _, err = run([*words[:3], root / "other", *words[4:]], capsys)
        assert code == 2 and '[coco]"' in err and not (root / "other").exists()


def voc_export(root, kind="palette", lists=("train", "val"), labelmap=True):
    """A VOC-style export with three images; its masks have background, cat, dog, and a border of 255."""
    values = np.array([0, 1, 2, 255])
    palette = voc_palette()
    for k, name in enumerate(("p0", "p1", "p2")):
        save(root / "JPEGImages" / f"{name}.jpg", noise(32, 40, k))
        numbers = blocks(values, seed=k).astype(np.uint8)
        picture = Image.fromarray(numbers)
        picture.putpalette([part for colour in palette for part in colour])
        path = root / "SegmentationClass" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        (picture.convert("RGB") if kind == "rgb" else picture).save(path)
    if labelmap:
        lines = [f"{name}:{','.join(map(str, palette[k]))}::" for k, name in enumerate(("background", "cat", "dog"))]
        (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + "\n".join(lines) + "\n")
    else:
        (root / "class_names.txt").write_text("_background_\ncat\ndog")
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split in lists:
        text = {"train": "p0\np1\n", "val": "p2\n"}.get(split, "p0\np1\np2\n")
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(text)
    return root


class TestVoc:
    @pytest.mark.parametrize(("kind", "labelmap"), [("palette", True), ("rgb", True), ("palette", False)])
    def test_a_classes_yaml_makes_it_load_and_nothing_else_changes(self, tmp_path, capsys, kind, labelmap):
        root = voc_export(tmp_path, kind, labelmap=labelmap)
        before = {path for path in root.rglob("*")}
        code, out, _ = run(["convert-data", "voc", root], capsys)
        assert code == 0 and {path for path in root.rglob("*")} - before == {root / "classes.yaml"}
        train, val = (open_folder(root, split) for split in BOTH)
        assert train.classes.names[1:] == ("cat", "dog") and "background" in train.classes.names[0]
        assert [train.name(k) for k in range(2)] == ["p0", "p1"] and val.name(0) == "p2"
        for data, place, seed in ((train, 0, 0), (train, 1, 1), (val, 0, 2)):
            assert np.array_equal(data.read(place)[1], blocks([0, 1, 2, 255], seed=seed))
        assert (
            run(["check-data", "--data.name", "folder", "--data.root", root, "--output", tmp_path / "c"], capsys)[0]
            == 0
        )

    @pytest.mark.parametrize("labelmap", [True, False])
    def test_background_ignored(self, tmp_path, labelmap):
        root = voc_export(tmp_path, labelmap=labelmap)
        assert convert_voc(root, background=False).names == ("cat", "dog")
        values = blocks([0, 1, 2, 255], seed=0)
        wanted = np.where((values == 0) | (values == 255), IGNORE, values - 1)
        assert np.array_equal(open_folder(root, "train").read(0)[1], wanted)

    @pytest.mark.parametrize("labelmap", [True, False])
    def test_a_background_that_is_not_the_first_is_ignored(self, tmp_path, labelmap):
        root = voc_export(tmp_path, labelmap=labelmap)
        file = root / ("labelmap.txt" if labelmap else "class_names.txt")
        file.write_text(file.read_text().replace("cat", "x").replace("background", "cat").replace("x", "background"))
        file.write_text(file.read_text().replace("_cat_", "cat"))
        assert convert_voc(root, background=False).names == ("cat", "dog")
        values = blocks([0, 1, 2, 255], seed=0)
        wanted = np.select([values == 0, values == 2], [0, 1], IGNORE)
        assert np.array_equal(open_folder(root, "train").read(0)[1], wanted)

    def test_no_background_to_ignore(self, tmp_path):
        root = voc_export(tmp_path, labelmap=False)
        (root / "class_names.txt").write_text("ground\ncat\ndog\n")
        with pytest.raises(ValueError, match="classes ground, cat, dog: .* called background"):
            convert_voc(root, background=False)
        assert not (root / "classes.yaml").exists()

    @pytest.mark.parametrize("lists", [("default",), ("trainval",), ()])
    def test_without_two_lists_a_fraction_is_for_validation(self, tmp_path, lists):
        root = voc_export(tmp_path, lists=lists)
        convert_voc(root)
        names = [open_folder(root, split).name(k) for split in BOTH for k in range(len(open_folder(root, split)))]
        assert sorted(names) == ["p0", "p1", "p2"]

    def test_lists_as_tools_call_them(self, tmp_path):
        root = voc_export(tmp_path)
        lists = root / "ImageSets" / "Segmentation"
        (lists / "train.txt").rename(lists / "Train.txt")
        (lists / "val.txt").rename(lists / "Validation.txt")
        convert_voc(root)
        assert [len(open_folder(root, split)) for split in BOTH] == [2, 1]

    def test_images_elsewhere_and_masks_of_older_tools(self, tmp_path):
        root = voc_export(tmp_path / "export")
        (root / "JPEGImages").rename(tmp_path / "photos")
        (root / "SegmentationClass").rename(root / "SegmentationClassPNG")
        save(root / "SegmentationClass" / "keep.jpg", noise(8, 8))
        with pytest.raises(ValueError, match="no folder .*JPEGImages(?s:.*)--images"):
            convert_voc(root)
        convert_voc(root, images=str(tmp_path / "photos"))
        assert len(open_folder(root, "train")) == 2
        assert read_description(root / "classes.yaml").images == root / "../photos", "both can be moved together"

    def test_what_is_missing_is_named(self, tmp_path, capsys):
        root = voc_export(tmp_path / "e")
        (root / "labelmap.txt").write_text("background:0,0:\n")
        for prepare, message in (
            (lambda: None, "has the line 'background:0,0:': expected NAME:R,G,B::"),
            (lambda: (root / "labelmap.txt").write_text("a:0,0,0::\nb:0,0,0::"), "two classes the same colour"),
            (lambda: (root / "labelmap.txt").write_text("# nothing"), "names no classes"),
            (lambda: (root / "labelmap.txt").unlink(), "no list of the classes, such as labelmap.txt"),
            (lambda: shutil.rmtree(root / "SegmentationClass"), "no SegmentationClass/ with PNGs"),
            (lambda: shutil.rmtree(root), "no folder"),
        ):
            prepare()
            code, _, err = run(["convert-data", "voc", root], capsys)
            assert code == 2 and message in err, err
            assert not (root / "classes.yaml").exists()
        root = voc_export(tmp_path / "f")
        assert run(["convert-data", "voc", root], capsys)[0] == 0
        assert run(["convert-data", "voc", root], capsys)[0] == 2, "what is there is not overwritten"
        code, _, err = run(["convert-data", "voc", root, tmp_path / "out"], capsys)
        assert code == 2 and "no more than --images" in err
