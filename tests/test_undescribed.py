"""Folders without a classes.yaml, as people, tools and frameworks leave them: where files lie, and what classes are."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import run
from pictures import noise, save
from routeseg.data.config import DataConfig, known_classes, layout_of, open_data
from routeseg.data.sets.folder import open_folder
from routeseg.data.sets.voc import voc_palette
from routeseg.labels import IGNORE
from test_folder import blocks, describe, names_of, write_pictures

BOTH = ("train", "val")
NAMES = [f"p{k}" for k in range(6)]


def tree(root: Path, images: str, masks: str, names=NAMES, values=(0, 1, 2), mode="L") -> Path:
    """Images and masks at these places, which have {} for the name; the masks have all of the values."""
    for k, name in enumerate(names):
        save(root / images.format(name), noise(32, 40, k))
        mask = Image.fromarray(blocks(values, seed=k).astype(np.uint8))
        if mode == "P":
            mask.putpalette([part for colour in voc_palette() for part in colour])
        path = root / masks.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        mask.save(path)
    return root


def opened(root: Path):
    """Both splits as `train FOLDER` opens them, and the lines that it says."""
    lines: list[str] = []
    config = known_classes(DataConfig(name=layout_of(root), root=str(root)), lines.append)  # type: ignore[arg-type]
    return {split: open_data(config, split) for split in BOTH}, "\n".join(lines)


def divided(root: Path, values=(0, 1, 2)) -> tuple[list[str], list[str], str]:
    """The names of both splits, and what is said; each mask is read as it was written, by `tree`."""
    data, said = opened(root)
    for part in data.values():
        for index, pair in enumerate(part.pairs):
            stored = np.asarray(Image.open(pair.labels))
            assert np.array_equal(part.read(index)[1], np.searchsorted(values, stored)), pair
    names = [[part.name(index) for index in range(len(part))] for part in data.values()]
    assert not set(names[0]) & set(names[1]) or "/" not in str(data["train"].pairs[0].labels.relative_to(root))
    return names[0], names[1], said


TRAIN, VAL = NAMES[:4], NAMES[4:]
TREES = {  # what people have: images and masks of training, and of validation unless they lie together
    "flat": ("images/{}.jpg", "masks/{}.png"),
    "other words": ("Img/{}.jpg", "Ground Truth/{}.png"),
    "mmsegmentation": ("img_dir/train/{}.jpg", "ann_dir/train/{}.png", "img_dir/val/{}.jpg", "ann_dir/val/{}.png"),
    "split first": ("Train/images/{}.jpg", "Train/labels/{}.png", "Valid/images/{}.jpg", "Valid/labels/{}.png"),
    "ADE20K's folders": (
        *("images/training/{}.jpg", "annotations/training/{}.png"),
        *("images/validation/{}.jpg", "annotations/validation/{}.png"),
    ),
    "a folder for each": ("train_images/{}.jpg", "train_masks/{}.png", "val_images/{}.jpg", "val_masks/{}.png"),
    "camvid of Kaggle": ("train/{}.png", "train_labels/{}_L.png", "val/{}.png", "val_labels/{}_L.png"),
    "camvid of CVAT": ("default/{}.png", "defaultannot/{}.png"),
    "camvid of fastai": ("images/{}.png", "labels/{}_P.png"),
    "x and y": ("x_train/{}.png", "y_train/{}.png", "x_val/{}.png", "y_val/{}.png"),
    "Roboflow": ("train/{}.jpg", "train/{}_mask.png", "valid/{}.jpg", "valid/{}_mask.png"),
    "DeepGlobe": ("{}_sat.jpg", "{}_mask.png"),
    "side by side": ("{}.jpg", "{}-label.png"),
    "nnU-Net": ("imagesTr/{}_0000.png", "labelsTr/{}.png"),
    "Supervisely": ("ds0/img/{}.jpg", "ds0/masks_machine/{}.jpg.png"),
    "VOC of others": ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"),
    "VOC below": ("VOCdevkit/VOC2007/JPEGImages/{}.jpg", "VOCdevkit/VOC2007/SegmentationClass/{}.png"),
    "Cityscapes of others": ("leftImg8bit/{}_leftImg8bit.png", "gtFine/{}_gtFine_labelIds.png"),
    "unpacked twice": ("export/export/images/{}.jpg", "export/export/masks/{}.png"),
}


class TestPlaces:
    @pytest.mark.parametrize("kind", TREES)
    def test_usual_trees_are_read(self, tmp_path, kind):
        places = TREES[kind]
        root = tree(tmp_path / "my", *places[:2], names=NAMES if len(places) == 2 else TRAIN)
        if kind == "Cityscapes of others":
            (root / "classes.txt").write_text("sky\nroad\ntree\n")
        if len(places) == 4:
            tree(root, *places[2:], names=VAL)
        train, val, said = divided(root)
        if len(places) == 4:
            assert (train, val) == (TRAIN, VAL) and "drawn" not in said
        else:
            assert sorted(train + val) == NAMES and val and "they are drawn by name for validation" in said

    def test_the_default_tree_needs_no_words(self, tmp_path):
        for split, names in (("train", TRAIN), ("val", VAL)):
            tree(tmp_path, f"images/{split}/{{}}.png", f"masks/{split}/{{}}.png", names)
        _, said = opened(tmp_path)
        assert (
            said == f"{tmp_path}/masks: 3 classes, by the numbers in 6 masks: class 0, class 1, class 2; 255 is ignored"
        )

    def test_a_split_without_masks_and_other_folders_are_left_out_with_their_number(self, tmp_path):
        root = tree(tmp_path / "globe", "train/{}_sat.jpg", "train/{}_mask.png")
        for k in range(3):
            save(root / "valid" / f"v{k}_sat.jpg", noise(32, 40))
        train, val, said = divided(root)
        assert sorted(train + val) == NAMES and "left out: valid without masks (3 images)" in said
        unet = tree(tmp_path / "unet", "train/image/{}.png", "train/label/{}.png")
        save(unet / "test" / "0.png", noise(32, 40))
        train, val, said = divided(unet)
        assert sorted(train + val) == NAMES and "left out: test without masks (1 image)" in said
        other = tmp_path / "other"
        for split, names in (("train", TRAIN), ("val", VAL), ("test", ["t"]), ("extra", ["e", "f"])):
            tree(other, f"images/{split}/{{}}.png", f"masks/{split}/{{}}.png", names)
        train, val, said = divided(other)
        assert (train, val) == (TRAIN, VAL) and "left out: images/test (1 image), images/extra (2 images)" in said
        shutil.rmtree(other / "images" / "val")
        train, val, said = divided(other)
        assert (
            sorted(train + val) == TRAIN and "images/test (1 image)" in said and "drawn by name for validation" in said
        )

    def test_of_two_folders_of_masks_one_is_left_out(self, tmp_path):
        tree(tree(tmp_path, "images/{}.png", "labels/{}.png"), "images/{}.png", "masks/{}.png")
        assert "masks masks/NAME" in divided(tmp_path)[2] and "left out: labels (6 images)" in divided(tmp_path)[2]

    def test_other_pictures_of_the_labels_are_left_aside(self, tmp_path):
        tree(tmp_path, "images/{}.png", "labels/{}_labelIds.png")
        for name in NAMES:
            save(tmp_path / "labels" / f"{name}_color.png", noise(32, 40))
        assert sorted(sum(divided(tmp_path)[:2], [])) == NAMES

    @pytest.mark.parametrize(
        "masks",
        [
            ("masks/cat/{}.png", "masks/dog/{}.png"),
            ("masks/{}_cat.png", "masks/{}_dog.png"),
            ("masks/{}/0.png", "masks/{}/1.png"),
        ],
    )
    def test_several_masks_for_each_image(self, tmp_path, capsys, masks):
        for place in masks:
            tree(tmp_path / "my", "images/{}.png", place, values=(0, 255))
        code, _, err = run(["check-data", tmp_path / "my", "--output", tmp_path / "o"], capsys)
        assert code == 2 and re.search(r"has several masks for each image, such as .*docs/data\.md", err), err
        assert err.count("\n") == 1

    def test_the_lines_of_the_documentation_put_them_together(self, tmp_path, monkeypatch):
        text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
        (code,) = [block.split("```")[0] for block in text.split("```python\n")[1:] if 'classes = ["cat"' in block]
        for name in NAMES:
            save(tmp_path / "images" / f"{name}.png", noise(32, 40))
        wanted = {name: blocks([0, 1, 2], seed=k) for k, name in enumerate(NAMES)}
        for name, labels in wanted.items():
            for number, one in enumerate(("cat", "dog"), 1):
                save(tmp_path / "masks" / one / f"{name}.png", np.where(labels == number, 255, 0).astype(np.uint8))
        monkeypatch.chdir(tmp_path)
        exec(compile(code, "data.md", "exec"), {})
        shutil.rmtree("masks")
        assert sorted(sum(divided(tmp_path)[:2], [])) == NAMES
        for name, labels in wanted.items():
            assert np.array_equal(np.asarray(Image.open(f"labels/{name}.png")), labels)

    def test_numbers_in_names_are_no_ends(self, tmp_path):
        names = [f"seq_1_{k:04d}" for k in range(12)]
        tree(tmp_path, "images/{}.png", "masks/{}_gt.png", names)
        assert sorted(sum(divided(tmp_path)[:2], [])) == names


class TestWrittenDownGoesFirst:
    @pytest.mark.parametrize("layout", ["camvid", "voc", "ade20k", "cityscapes"])
    def test_a_classes_yaml(self, copied, layout):
        assert layout_of(describe(copied(layout), "names: [a, b]")) == "folder"

    def test_names_alone_leave_the_places_to_be_found(self, tmp_path):
        for split, names in (("training", TRAIN), ("validation", VAL)):
            tree(tmp_path, f"images/{split}/ADE_{{}}.jpg", f"annotations/{split}/ADE_{{}}.png", names)
        describe(tmp_path, "names: [sky, road, tree]")
        train, val, said = divided(tmp_path)
        assert train == [f"ADE_{name}" for name in TRAIN] and len(val) == 2 and "images/validation is for val" in said
        assert open_folder(tmp_path, "train").classes.names == ("sky", "road", "tree")

    def test_a_flat_folder_with_names(self, tmp_path):
        tree(describe(tmp_path, "names: [sky, road, tree]"), "images/{}.jpg", "masks/{}.png")
        train, val, said = divided(tmp_path)
        assert sorted(train + val) == NAMES and "they are drawn by name for validation" in said

    @pytest.mark.parametrize("lists", [("train", "val"), ("default",)])
    @pytest.mark.parametrize("converted", [True, False])
    def test_an_export_that_looks_like_voc(self, tmp_path, capsys, lists, converted):
        """Palette files and VOC's lists: cat and dog, and no aeroplane."""
        root = tree(
            tmp_path / "my", "JPEGImages/2007_00000{}.jpg", "SegmentationClass/2007_00000{}.png", "012345", mode="P"
        )
        colours = [",".join(map(str, colour)) for colour in voc_palette()]
        rows = zip(("background", "cat", "dog"), colours, strict=False)
        (root / "labelmap.txt").write_text(
            "# label:color_rgb:parts:actions\n" + "".join(f"{n}:{c}::\n" for n, c in rows)
        )
        for name, numbers in zip(lists, ("0123", "45") if len(lists) == 2 else ("012345",), strict=True):
            save_list(root / "ImageSets" / "Segmentation" / f"{name}.txt", [f"2007_00000{k}" for k in numbers])
        if converted:
            assert run(["convert-data", "voc", root], capsys)[0] == 0
        train, val, _ = divided(root)
        assert len(train + val) == 6 and (len(lists) == 1 or len(val) == 2)
        assert opened(root)[0]["train"].classes.names == ("background", "cat", "dog")
        code, out, _ = run(["check-data", root, "--data.crop", "[32, 32]", "--output", tmp_path / "o"], capsys)
        assert code == 0 and "aeroplane" not in out and "dog" in out

    def test_a_guess_is_said(self, copied, tmp_path, capsys):
        root = copied("camvid")
        code, out, _ = run(["check-data", root, "--data.crop", "[32, 32]", "--output", tmp_path / "o"], capsys)
        assert code == 0 and f"{root} is taken for camvid, by its folders; if it is other data, a classes.yaml" in out
        describe(root, 'names: [a, b]\nsplit: {"t\\e[2J": x}')
        code, out, err = run(["check-data", root, "--output", tmp_path / "o"], capsys)
        assert code == 2 and "\x1b" not in out + err and r"t\x1b[2J" in out + err

    def test_own_classes_in_the_folders_of_a_benchmark(self, copied, tmp_path):
        for layout, place in (("camvid", "classes.txt"), ("voc", "VOCdevkit/VOC2012/SegmentationClass/classes.txt")):
            root = copied(layout)
            assert layout_of(root) == layout
            (root / place).write_text("background\ncat\ndog\n")
            assert layout_of(root) == "folder"
        root = tmp_path / "camvid"
        names = open_data(DataConfig(name="camvid", root=str(root)), "train").classes.names
        (root / "classes.txt").write_text("\n".join(names))
        assert layout_of(root) == "camvid", "its own classes change nothing"
        (root / "classes.txt").write_text("\n".join(reversed(names)))
        assert layout_of(root) == "folder", "in another order they do"

    def test_folders_of_ade20k_or_voc_alone_make_no_benchmark(self, tmp_path):
        tree(tmp_path / "a", "images/training/{}.jpg", "annotations/training/{}.png")
        tree(tmp_path / "v", "JPEGImages/{}.jpg", "SegmentationClass/{}.png")
        save_list(tmp_path / "v" / "ImageSets" / "Segmentation" / "train.txt", TRAIN)
        save_list(tmp_path / "v" / "ImageSets" / "Segmentation" / "val.txt", VAL)
        for root in (tmp_path / "a", tmp_path / "v"):
            assert opened(root)[0]["train"].classes.names == ("class 0", "class 1", "class 2")


CLASSES = {  # file -> what it holds: sky 0, road 1, tree 2
    "classes.txt": "sky\nroad\ntree\n",
    "labels.txt": "0: sky\n1: road\n2: tree",
    "names.txt": "0 sky\r\n1 road\r\n2 tree",
    "class_names.txt": "__ignore__\nsky\nroad\ntree\n",
    "codes.txt": "sky\nroad\ntree",
    "_classes.csv": "Pixel Value, Class\n0, sky\n1, road\n2, tree\n",
    "classes.csv": "name,id\nsky,0\nroad,1\ntree,2\n",
    "class_dict.csv": "name,r,g,b\nsky,0,0,0\nroad,128,0,0\ntree,0,128,0\n",
    "label_colors.txt": "# color (RGB) label\n0 0 0 sky\n128 0 0 road\n0 128 0 tree\n",
    "labelmap.txt": "# label:color_rgb:parts:actions\nsky:0,0,0::\nroad:128,0,0::\ntree:0,128,0::\n",
    "obj_class_to_machine_color.json": '{"sky": [0, 0, 0], "road": [1, 1, 1], "tree": [2, 2, 2]}',
    "dataset.json": '{"channel_names": {"0": "R"}, "labels": {"sky": 0, "road": 1, "tree": 2, "ignore": 255}}',
    "classes.json": '["sky", "road", "tree"]',
    "id2label.json": '{"0": "sky", "1": "road", "2": "tree"}',
    "meta.json": '{"classes": [{"title": "sky", "color": "#000000"}, {"title": "road", "color": "#800000"}, '
    '{"title": "tree", "color": "#008000"}]}',
}


class TestClasses:
    @pytest.mark.parametrize("file", CLASSES)
    @pytest.mark.parametrize("place", [".", "masks"])
    def test_lists_that_tools_write_beside_the_masks(self, tmp_path, file, place):
        grey = file == "obj_class_to_machine_color.json"
        root = tree(tmp_path, "images/{}.png", "masks/{}.png", mode="L" if grey else "P")
        (root / place / file).write_bytes(CLASSES[file].encode())
        divided(root)
        data, said = opened(root)
        assert data["train"].classes.names == ("sky", "road", "tree") and f"{file}: 3 classes, sky, road, tree" in said

    @pytest.mark.parametrize(
        ("names", "values", "wanted"),
        [
            ("road tree", (0, 1, 2), "background road tree"),
            ("road tree", (1, 2), "road tree"),
            ("road", (0, 255), "background road"),
            ("ground road", (0, 255), "ground road"),
            ("a b c d", (0, 1, 3), "a b c d"),
            ("ground cat dog", (0, 7, 9), "ground cat dog"),
        ],
    )
    def test_numbers_that_do_not_run_from_0(self, tmp_path, names, values, wanted):
        tree(tmp_path, "images/{}.png", "masks/{}.png", values=values)
        (tmp_path / "classes.txt").write_text(names.replace(" ", "\n"))
        data, _ = opened(tmp_path)
        assert list(data["train"].classes.names) == wanted.split()
        image, labels = data["train"].pairs[0], data["train"].read(0)[1]
        place = {0: 0, 1: 1, 3: 3} if len(wanted.split()) == 4 else {value: k for k, value in enumerate(values)}
        stored = np.asarray(Image.open(image.labels))
        assert all((labels[stored == value] == place[value]).all() for value in values)

    def test_a_void_value_stays_ignored(self, tmp_path):
        tree(tmp_path, "images/{}.png", "masks/{}.png", values=(1, 2, 255))
        (tmp_path / "classes.txt").write_text("cat\ndog\n")
        pair, labels = opened(tmp_path)[0]["train"].pairs[0], opened(tmp_path)[0]["train"].read(0)[1]
        assert np.array_equal(labels == IGNORE, np.asarray(Image.open(pair.labels)) == 255)

    @pytest.mark.parametrize(
        ("file", "text", "message"),
        [
            ("classes.txt", "cat\ndog\n" * 1, r"names 2 classes, and the masks hold 4 numbers, up to 9: say in"),
            ("classes.txt", "cat\ncat\n", "names cat more than once"),
            ("classes.txt", "\n\n", "names no classes"),
            ("classes.json", '["c\\u001bat", "dog"]', r"has a name with control characters, 'c\\x1bat'"),
            ("classes.txt", "ca\x1b[2Jt\ndog\n", r"classes\.txt, line 1, has control characters, 'ca\\x1b\[2Jt'"),
            ("labelmap.txt", "cat:1,2,900::\n", "has the line 'cat:1,2,900::': expected NAME:R,G,B::"),
            ("_classes.csv", "Pixel Value, Class\n0, cat\n0, dog", "two classes the same number"),
        ],
    )
    def test_a_list_that_does_not_fit(self, tmp_path, capsys, file, text, message):
        root = tree(tmp_path / "my", "images/{}.png", "masks/{}.png", values=(0, 3, 7, 9))
        (root / file).write_text(text)
        code, out, err = run(["train", root, "--output", tmp_path / "run"], capsys)
        assert code == 2 and re.search(message, err), err
        assert err.count("\n") == 1 and "\x1b" not in out + err

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
    @pytest.mark.parametrize("file", ["classes.txt", "classes.yaml"])
    def test_encodings(self, tmp_path, encoding, file):
        tree(tmp_path, "images/{}.png", "masks/{}.png")
        text = "Himmel\r\nStraße\r\nBäume\r\n" if file == "classes.txt" else "names: [Himmel, Straße, Bäume]\r\n"
        (tmp_path / file).write_bytes(text.encode(encoding))
        assert opened(tmp_path)[0]["train"].classes.names == ("Himmel", "Straße", "Bäume")

    def test_coloured_masks_and_names_without_colours(self, tmp_path):
        tree(tmp_path, "images/{}.png", "masks/{}.png", values=[(0, 0, 0), (200, 0, 0)])
        (tmp_path / "classes.txt").write_text("ground\ncat\n")
        with pytest.raises(ValueError, match=r"classes\.txt names classes, and the masks.* have colours"):
            opened(tmp_path)

    def test_coloured_masks_and_their_colours(self, tmp_path):
        colours = [(0, 0, 0), (200, 0, 0), (9, 90, 200)]
        tree(tmp_path, "images/{}.png", "masks/{}.png", values=colours)
        (tmp_path / "class_dict.csv").write_text("name,r,g,b\nroad,9,90,200\nground,0,0,0\ncar,200,0,0\n")
        part = opened(tmp_path)[0]["train"]
        assert part.classes.names == ("road", "ground", "car")
        stored = np.asarray(Image.open(part.pairs[0].labels))
        for colour, label in zip(colours, (1, 2, 0), strict=True):
            assert (part.read(0)[1][(stored == colour).all(-1)] == label).all()

    @pytest.mark.parametrize("grey", [True, False])
    def test_colours_in_any_order_without_the_background(self, tmp_path, grey):
        values = (0, 100, 200) if grey else [(0, 0, 0), (100, 100, 100), (200, 200, 200)]
        tree(tmp_path, "ds0/img/{}.png", "ds0/masks_machine/{}.png", values=values)
        (tmp_path / "obj_class_to_machine_color.json").write_text('{"cat": [200, 200, 200], "dog": [100, 100, 100]}')
        part = opened(tmp_path)[0]["train"]
        stored = np.asarray(Image.open(part.pairs[0].labels).convert("L"))
        assert part.classes.names == ("background", "cat", "dog")
        assert np.array_equal(part.read(0)[1], np.select([stored == 200, stored == 100], [1, 2], 0))

    @pytest.mark.parametrize("wide", [True, False])
    def test_colours_for_pictures_of_masks_that_hold_numbers(self, tmp_path, wide):
        tree(tmp_path, "images/{}.png", "masks/{}.png")
        for path in (tmp_path / "masks").iterdir() if wide else ():
            save(path, np.asarray(Image.open(path)).astype(np.uint16))
        (tmp_path / "labelmap.txt").write_text("sky:9,9,200::\nroad:90,90,9::\ntree:9,90,9::\n")
        divided(tmp_path)
        assert opened(tmp_path)[0]["val"].classes.palette == ((9, 9, 200), (90, 90, 9), (9, 90, 9))

    def test_they_can_be_written_down(self, tmp_path, capsys):
        root = tree(tmp_path / "my", "{}_sat.jpg", "{}_mask.png")
        (root / "classes.txt").write_text("sky\nroad\ntree")
        before = divided(root)
        words = ["check-data", root, "--data.crop", "[32, 32]", "--output", tmp_path / "o", "--write_classes"]
        assert run(words, capsys)[0] == 0 and (root / "classes.yaml").is_file()
        (root / "classes.txt").unlink()
        assert divided(root)[:2] == before[:2]
        assert open_folder(root, "train").classes.names == ("sky", "road", "tree")


def save_list(path: Path, names) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


class TestLists:
    @pytest.mark.parametrize("place", ["ImageSets/Segmentation", "splits", "."])
    @pytest.mark.parametrize(
        ("lists", "train", "said"),
        [
            ({"train": TRAIN, "val": VAL}, TRAIN, None),
            ({"Train": TRAIN, "Validation": VAL}, TRAIN, None),
            ({"train": TRAIN[:2], "val": VAL, "trainval": NAMES}, TRAIN[:2], "trainval.txt (2 images)"),
            (
                {"train": TRAIN[:2], "val": VAL, "test": TRAIN[2:3]},
                TRAIN[:2],
                "test.txt (1 image), 1 image that no list",
            ),
            ({"train": TRAIN, "test": VAL}, None, "test.txt (2 images)"),
            ({"trainval": TRAIN, "test": VAL}, None, "test.txt (2 images)"),
            ({"train": TRAIN[:3], "trainval": TRAIN, "test": VAL}, None, "test.txt (2 images)"),
            ({"default": NAMES}, None, None),
        ],
    )
    def test_each_by_its_name(self, tmp_path, place, lists, train, said):
        root = tree(tmp_path, "JPEGImages/{}.jpg", "SegmentationClass/{}.png")
        for name, names in lists.items():
            save_list(root / place / f"{name}.txt", names)
        trained, validated, told = divided(root)
        if train is not None:
            assert (trained, validated) == (train, VAL)
        else:
            known = lists.get("trainval") or lists.get("train") or lists["default"]
            assert sorted(trained + validated) == sorted(known) and "are drawn by name for validation" in told
        assert (said in told) if said else "left out" not in told

    def test_of_train_and_test_the_conversion_says_what_is_left_out(self, tmp_path, capsys):
        root = tree(tmp_path / "my", "JPEGImages/{}.jpg", "SegmentationClass/{}.png", [f"p{k}" for k in range(12)])
        (root / "class_names.txt").write_text("__ignore__\n_background_\ncat\ndog\n")
        save_list(root / "ImageSets/Segmentation/train.txt", [f"p{k}" for k in range(7)])
        save_list(root / "ImageSets/Segmentation/test.txt", [f"p{k}" for k in range(7, 10)])
        code, out, _ = run(["convert-data", "voc", root], capsys)
        assert code == 0 and "test.txt (3 images), 2 images that no list names" in out
        assert sorted(names_of(root, "train") + names_of(root, "val")) == [f"p{k}" for k in range(7)]

    def test_beside_images_that_lie_deeper(self, tmp_path):
        inside = "VOCdevkit/VOC2007"
        root = tree(tmp_path, f"{inside}/JPEGImages/{{}}.jpg", f"{inside}/SegmentationClass/{{}}.png")
        for name, names in (("train", TRAIN), ("val", VAL)):
            save_list(root / inside / "ImageSets" / "Segmentation" / f"{name}.txt", names)
        assert divided(root)[:2] == (TRAIN, VAL)

    def test_no_list_to_train_on(self, tmp_path):
        root = tree(tmp_path, "images/{}.jpg", "masks/{}.png")
        save_list(root / "test.txt", VAL)
        with pytest.raises(ValueError, match=r"test\.txt is a list of images, and .*add train\.txt"):
            layout_of(root)

    @pytest.mark.parametrize(
        "line",
        [
            "images\\sub\\{}.png",
            ".\\sub\\{}.png",
            "C:\\my data\\images\\sub\\{}.png",
            "/SegNet/CamVid/images/sub/{}.png /SegNet/CamVid/masks/sub/{}.png",
            "images/sub/{}.png masks/sub/{}.png",
            "sub/{}.png,masks/sub/{}.png",
            "sub/{}\tsub/{}",
            '"sub/{}.png"',
            "  sub/{}.PNG  ",
        ],
    )
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
    def test_as_other_systems_and_frameworks_write_them(self, tmp_path, line, encoding):
        names = ["sub/grün 1", "sub/b", "sub/c"]
        root = describe(tmp_path, "names: [a, b]\nsplit: {train: lists\\t.txt, val: v.txt}\nimages: .\\images")
        write_pictures(root, names)
        lines = [line.format(*[name.removeprefix("sub/")] * 2) for name in names]
        (root / "lists").mkdir()
        (root / "lists" / "t.txt").write_bytes("\r\n".join(lines[:2]).encode(encoding))
        (root / "v.txt").write_bytes(lines[2].encode(encoding))
        assert names_of(root, "train") == names[:2] and names_of(root, "val") == names[2:]

    @pytest.mark.parametrize("forms", ["NFC NFD NFD", "NFD NFC NFC", "NFD NFD NFC", "NFC NFC NFD"])
    def test_forms_of_unicode(self, tmp_path, forms):
        """Those of the images, of the masks, and of the list may differ."""
        image, mask, listed = (unicodedata.normalize(form, "größe_é") for form in forms.split())
        root = describe(tmp_path, "names: [a, b]\nsplit: {train: t.txt, val: t.txt}")
        save(root / "images" / f"{image}.jpg", noise(32, 40))
        save(root / "masks" / f"{mask}.png", blocks([0, 1]).astype(np.uint8))
        save_list(root / "t.txt", [f"{listed}.jpg"])
        assert names_of(root, "train") == [unicodedata.normalize("NFC", "größe_é")]

    @pytest.mark.parametrize("text", [b"a\x1b[2Jb\n", b"x\x00y\x00\n", b"caf\xc2\x9bx\n", b"\xff\xfea\x00\x1b\x00"])
    def test_nothing_raw_reaches_the_terminal(self, tmp_path, capsys, text):
        root = write_pictures(describe(tmp_path / "my", "names: [a, b]\nsplit: {train: t.txt, val: t.txt}"), ["a"])
        (root / "t.txt").write_bytes(text)
        code, out, err = run(["train", root, "--output", tmp_path / "run"], capsys)
        assert code == 2 and "t.txt, line 1, has control characters" in err
        assert err.count("\n") == 1 and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", out + err)

    @pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\x9bb"])
    def test_a_file_whose_name_has_control_characters(self, tmp_path, capsys, name):
        root = tree(tmp_path / "my", "images/{}.jpg", "masks/{}.png", [*NAMES, name])
        for words in (["check-data", root, "--output", tmp_path / "o"], ["train", root, "--output", tmp_path / "run"]):
            code, out, err = run(words, capsys)
            assert code == 2 and ascii(name)[1:-1] in err and "rename it" in err
            assert err.count("\n") == 1 and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", out + err)


def coco_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))


class TestHints:
    """What is no data set yet ends in one message, with what to do."""

    def hint(self, root, capsys) -> str:
        code, _, err = run(["check-data", root], capsys)
        assert code == 2 and "Traceback" not in err and not err.splitlines()[1:] or "expected tree" in err
        return err

    @pytest.mark.parametrize("name", ["my.zip", "my.tar.gz", "my.7z"])
    def test_an_archive(self, tmp_path, capsys, name):
        (tmp_path / "d").mkdir()
        archive = tmp_path / "d" / name
        archive.write_bytes(b"PK\x03\x04")
        assert f"{archive} is an archive: unpack it" in self.hint(archive, capsys)
        assert f"holds the archive {name}: unpack it" in self.hint(tmp_path / "d", capsys)

    def test_coco(self, tmp_path, capsys):
        root = tmp_path / "my"
        for split in ("train", "valid"):
            save(root / split / "x.jpg", noise(32, 40))
            coco_file(root / split / "_annotations.coco.json")
        assert (
            f"`routeseg convert-data coco {root}/train/_annotations.coco.json my_masks --images {root}/train "
            f"--val {root}/valid/_annotations.coco.json --val_images {root}/valid`"
        ) in self.hint(root, capsys)
        root = tmp_path / "cvat"
        save(root / "images" / "default" / "x.jpg", noise(32, 40))
        coco_file(root / "annotations" / "instances_default.json")
        assert f"instances_default.json cvat_masks --images {root}`" in self.hint(root, capsys)

    def test_others(self, tmp_path, capsys):
        for name, file, text, remedy in (
            ("labelme", "a.json", '{"shapes": [], "imagePath": "a.jpg"}', "labelme2voc"),
            ("cvat", "annotations.xml", "<annotations/>", '"Segmentation mask" or COCO'),
            ("yolo", "a.txt", "0 0.1 0.2 0.3 0.4 0.5 0.6\n", "export as COCO"),
            ("kaggle", "train.csv", "ImageId,EncodedPixels\na,1 3\n", "run lengths in train.csv, as Kaggle has them"),
            ("volumes", "a.nii.gz", "", "slices as PNG"),
            ("nothing", "b.md", "", "no masks with their names"),
        ):
            save(tmp_path / name / "a.jpg", noise(32, 40))
            (tmp_path / name / file).write_text(text)
            assert remedy in self.hint(tmp_path / name, capsys)
        save(tmp_path / "studio" / "task-1-annotation-1-by-1-tag-cat-0.png", noise(32, 40)[..., 0])
        assert "export as COCO with images" in self.hint(tmp_path / "studio", capsys)
        tree(tmp_path / "one", "{}.jpg", "{}.png")
        assert "move the masks into a folder masks/" in self.hint(tmp_path / "one", capsys)
        tree(tmp_path / "before", "images/img_{}.png", "masks/mask_{}.png")
        assert "give each mask the place and the name of its image" in self.hint(tmp_path / "before", capsys)
        tree(tmp_path / "cvat2", "SegmentationClass/{}.png", "SegmentationObject/{}.png")
        assert "holds masks in SegmentationClass/ and no images" in self.hint(tmp_path / "cvat2", capsys)
        for k in range(4):
            tree(tmp_path / "halves", f"images/{'train' if k else 'val'}/{{}}.png", "masks/{}.png", [f"p{k}"])
        assert "give each mask the place and the name of its image" in self.hint(tmp_path / "halves", capsys)
        tree(tmp_path / "windows", "images\\{}.png", "masks\\{}.png")
        assert r"with backslashes, such as images\p" in self.hint(tmp_path / "windows", capsys)
        shutil.rmtree(tmp_path / "halves" / "images" / "train")
        shutil.rmtree(tmp_path / "halves" / "images" / "val")
        assert "holds masks in masks/ and no images" in self.hint(tmp_path / "halves", capsys)
        (tmp_path / "empty").mkdir()
        assert "no layout that is known" in self.hint(tmp_path / "empty", capsys)

    def test_a_folder_for_each_image(self, tmp_path, capsys):
        for name in NAMES:
            tree(tmp_path / "my", f"{name}/images/{name}.png", f"{name}/masks/{{}}.png", ["x", "y"])
        assert "one of masks for each image" in self.hint(tmp_path / "my", capsys)
        (tmp_path / "dsb").mkdir()
        shutil.move(tmp_path / "my", tmp_path / "dsb" / "stage1_train")
        assert "one of masks for each image" in self.hint(tmp_path / "dsb", capsys)
        for fold in ("fold1", "fold2"):
            tree(tmp_path / "folds", f"{fold}/images/{{}}.png", f"{fold}/masks/{{}}.png")
        assert "several folders, fold1, fold2: call those to train" in self.hint(tmp_path / "folds", capsys)
        for one in ("cat", "dog"):
            tree(tmp_path / "two", "images/{}.png", f"masks_{one}/{{}}.png")
        assert "several folders of masks, masks_cat, masks_dog: there must be one" in self.hint(
            tmp_path / "two", capsys
        )

    def test_a_data_set_in_a_folder_of_its_own(self, copied, tmp_path, capsys):
        shutil.move(copied("camvid"), tmp_path / "data" / "CamVid")
        assert f"holds a data set in CamVid/: give {tmp_path}/data/CamVid" in self.hint(tmp_path / "data", capsys)
        for name, inside in (("voc", "VOCdevkit/VOC2012"), ("ade20k", "ADEChallengeData2016")):
            root = copied(name)
            describe(root / inside, "names: [a, b]")
            assert f"holds a data set in {inside}/: give {root}/{inside}" in self.hint(root, capsys)
            assert layout_of(root / inside) == "folder"
