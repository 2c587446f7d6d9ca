"""Your own images: what a classes.yaml says, and where it finds the files."""

from __future__ import annotations

import errno
import io
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors import SafetensorError

from conftest import run
from data_sets import DataSetContract
from pictures import ORIENTATION_TAG, ROTATED_RIGHT, noise, save, truncate
from routeseg import files
from routeseg.data.decoding import UnreadableImage
from routeseg.data.label_files import LabelMap
from routeseg.data.sets.folder import Fraction, open_folder, read_description, write_classes
from routeseg.data.sets.voc import voc_palette
from routeseg.labels import IGNORE

# A list of a list of ... of words, by aliases: 10 ** 11 words in a few lines.
BOMB = "a: &a [x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefghijk"))


def blocks(values, height: int = 32, width: int = 40, seed: int = 0) -> np.ndarray:
    """Squares of 8 pixels, each of one of the values (numbers or colours), all of which occur."""
    rng = np.random.default_rng(seed)
    grid = rng.permutation(np.resize(np.arange(len(values)), (height // 8) * (width // 8)))
    return np.array(values)[grid.reshape(height // 8, width // 8)].repeat(8, 0).repeat(8, 1)


def write_pictures(root: Path, names, values=(0, 1), images="images", masks="masks", suffix="", dtype=np.uint8) -> Path:
    """Images and masks of these names under a root."""
    for seed, name in enumerate(names):
        save(root / images / f"{name}.png", noise(32, 40, seed + 100 * len(images)))
        save(root / masks / f"{name}{suffix}.png", blocks(values, seed=seed).astype(dtype))
    return root


def describe(root: Path, text: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.yaml").write_text(text)
    return root


def names_of(root: Path, split: str) -> list[str]:
    data = open_folder(root, split)
    for index in range(len(data)):
        data.read(index)
    return [data.name(index) for index in range(len(data))]


@pytest.fixture
def folder_root(tmp_path) -> Path:
    """The `folder` layout with label values 10, 20 and 30, mapped to two classes and ignored."""
    root = tmp_path / "mine"
    values = np.array([10, 20, 30, 255], dtype=np.uint8)[np.random.default_rng(0).integers(0, 4, (32, 40))]
    for split in ("train", "val"):
        save(root / "images" / split / "a.jpg", noise(32, 40))
        save(root / "masks" / split / "a.png", values)
    mapping = {10: 0, 20: 1, 30: 255}
    return describe(
        root, yaml.safe_dump({"names": ["road", "car"], "palette": [[1, 2, 3], [4, 5, 6]], "mapping": mapping})
    )


class TestFolder(DataSetContract):
    NAME = "folder"
    SPLITS = "no folder .*images/training: .*images has train, val"
    TREE = "ROOT/images/train"
    TABLE = tuple(range(10))
    LABELLED = 1.0
    FOLDERS = EMPTY = ("images/train", "masks/train")
    PICTURE = "images/train/000000.png"
    LABEL = "masks/train/000000.png"
    NO_PICTURE = "masks/train/000000.png is a label without an image"
    NO_LABEL = "images/train/000000.png is an image without a label"
    STRANGE = (10, "map it in .*classes.yaml")
    WIDE = "has the label value 300"


class TestMapping:
    def test_pairs_and_mapping(self, folder_root):
        data = open_folder(folder_root, "train")
        assert data.classes.names == ("road", "car") and data.classes.palette == ((1, 2, 3), (4, 5, 6))
        values = np.asarray(Image.open(folder_root / "masks" / "train" / "a.png"))
        labels = data.read(0)[1]
        for value, target in ((10, 0), (20, 1), (30, IGNORE), (255, IGNORE)):
            assert (values == value).any() and (labels[values == value] == target).all()

    def test_a_mapping_may_swap_classes(self, folder_root):
        save(folder_root / "masks" / "train" / "a.png", np.eye(32, 40, dtype=np.uint8))
        describe(folder_root, "names: [road, car]\nmapping: {0: 1, 1: 0}\n")
        labels = open_folder(folder_root, "train").read(0)[1]
        assert np.array_equal(labels, 1 - np.eye(32, 40, dtype=np.uint8))

    def test_names_of_classes_and_ignore_as_targets(self, folder_root):
        describe(folder_root, "names: [road, car]\nmapping: {10: car, 20: road, 30: ignore}\n")
        values = np.asarray(Image.open(folder_root / "masks" / "train" / "a.png"))
        labels = open_folder(folder_root, "train").read(0)[1]
        for value, target in ((10, 1), (20, 0), (30, IGNORE)):
            assert (labels[values == value] == target).all()

    def test_255_may_be_a_class(self, folder_root):
        mask = blocks([0, 255]).astype(np.uint8)
        save(folder_root / "masks" / "train" / "a.png", mask)
        describe(folder_root, "names: [back, crack]\nmapping: {255: crack}\n")
        assert np.array_equal(open_folder(folder_root, "train").read(0)[1], mask // 255)

    def test_a_value_that_is_not_mapped_names_file_value_and_remedy(self, folder_root):
        describe(folder_root, "names: [road, car]\nmapping: {10: 0, 20: 1}\n")
        with pytest.raises(
            ValueError, match=r"masks/train/a\.png .* label value 30.*mine/classes\.yaml.*mapping: \{30: 255\}"
        ):
            open_folder(folder_root, "train").read(0)

    def test_a_16_bit_mask_is_read_whole(self, folder_root):
        save(folder_root / "masks" / "train" / "a.png", np.full((32, 40), 1000, np.uint16))
        with pytest.raises(ValueError, match="label value 1000"):
            open_folder(folder_root, "train").read(0)
        describe(folder_root, "names: [road, car]\nmapping: {1000: 1}\n")
        assert (open_folder(folder_root, "train").read(0)[1] == 1).all()

    @pytest.mark.parametrize("value", [8_421_504, -8_421_504])
    def test_a_value_far_beyond_any_class_is_named(self, value):
        values = blocks([1, value]).astype(np.int32)
        with pytest.raises(ValueError, match=f"a.tif has the label value {value}"):
            LabelMap(2, {}, {})(values, Path("a.tif"))
        assert np.array_equal(LabelMap(2, {}, {}).lookup(values, Path("a.tif")), np.where(values == 1, 1, -1))

    def test_coloured_masks(self, folder_root):
        colours = [(128, 64, 128), (0, 0, 142), (0, 0, 0)]
        mask = blocks(colours).astype(np.uint8)
        save(folder_root / "masks" / "train" / "a.png", mask)
        describe(folder_root, 'names: [road, car]\nmapping: {"#804080": road, "#00008E": 1, "#000000": ignore}\n')
        labels = open_folder(folder_root, "train").read(0)[1]
        for colour, target in zip(colours, (0, 1, IGNORE), strict=True):
            assert (labels[(mask == colour).all(-1)] == target).all() and (labels == target).any()

    def test_colours_of_a_palette_file_and_of_rgba(self, folder_root):
        """With colours in the mapping a palette file is read by its colours, whatever its numbers are."""
        numbers = blocks([5, 9]).astype(np.uint8)
        picture = Image.fromarray(numbers)
        picture.putpalette([part for colour in voc_palette() for part in colour])
        describe(folder_root, 'names: [road, car]\nmapping: {"#800080": road, "#c00000": car}\n')  # of 5 and of 9
        picture.save(folder_root / "masks" / "train" / "a.png")
        assert np.array_equal(open_folder(folder_root, "train").read(0)[1], numbers // 9)
        picture.convert("RGBA").save(folder_root / "masks" / "train" / "a.png")
        assert np.array_equal(open_folder(folder_root, "train").read(0)[1], numbers // 9)

    @pytest.mark.parametrize("mode", ["1", "L", "LA"])
    def test_colours_of_a_greyscale_file(self, folder_root, mode):
        """Where the mapping has colours alone; with numbers in it, a greyscale file holds numbers."""
        mask = blocks([0, 255]).astype(np.uint8)
        Image.fromarray(mask).convert(mode).save(folder_root / "masks" / "train" / "a.png")
        describe(folder_root, 'names: [road, car]\nmapping: {"#ffffff": road, "#000000": car}\n')
        assert np.array_equal(open_folder(folder_root, "train").read(0)[1], mask == 0)
        if mode == "L":
            describe(folder_root, 'names: [road, car]\nmapping: {"#ffffff": road, 255: car}\n')
            assert np.array_equal(open_folder(folder_root, "train").read(0)[1], mask == 255)

    @pytest.mark.parametrize("twice", ['7: a, "7": b', '"#FFFFFF": a, "#ffffff": b'])
    def test_a_value_that_is_mapped_twice(self, tmp_path, twice):
        describe(tmp_path, f"names: [a, b]\nmapping: {{{twice}}}\n")
        with pytest.raises(ValueError, match="more than once"):
            read_description(tmp_path / "classes.yaml")

    def test_the_home_of_nobody_is_a_name(self, tmp_path):
        describe(tmp_path, "names: [a, b]\nimages: ~no-such-user/images\n")
        assert read_description(tmp_path / "classes.yaml").images == tmp_path / "~no-such-user" / "images"

    def test_without_colours_a_palette_file_is_read_by_its_numbers(self, folder_root):
        numbers = blocks([0, 1]).astype(np.uint8)
        picture = Image.fromarray(numbers)
        picture.putpalette([part for colour in voc_palette() for part in colour])
        picture.save(folder_root / "masks" / "train" / "a.png")
        describe(folder_root, "names: [road, car]\n")
        assert np.array_equal(open_folder(folder_root, "train").read(0)[1], numbers)

    def test_a_colour_that_means_nothing_and_colours_without_a_mapping(self, folder_root):
        save(folder_root / "masks" / "train" / "a.png", blocks([(128, 64, 128), (1, 2, 3)]).astype(np.uint8))
        describe(folder_root, 'names: [road, car]\nmapping: {"#804080": road}\n')
        with pytest.raises(ValueError, match=r'a\.png has the label value "#010203".*mapping: \{"#010203": 255\}'):
            open_folder(folder_root, "train").read(0)
        describe(folder_root, "names: [road, car]\n")
        with pytest.raises(ValueError, match=r'a\.png is coloured.*mapping: \{"#804080": road\}'):
            open_folder(folder_root, "train").read(0)

    def test_an_upright_image_fits_a_label_map_that_is_upright(self, folder_root):
        """An image that the camera turned belongs to a mask of the size it is seen at."""
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = ROTATED_RIGHT
        data = io.BytesIO()
        Image.fromarray(noise(40, 32)).save(data, "JPEG", exif=exif)
        (folder_root / "images" / "train" / "a.jpg").write_bytes(data.getvalue())
        image, labels = open_folder(folder_root, "train").read(0)
        assert image.shape[:2] == labels.shape == (32, 40)


class TestWhereFilesLie:
    def test_sub_folders_such_as_cities(self, tmp_path):
        root = write_pictures(describe(tmp_path, "names: [a, b]"), ["train/bonn/x", "train/ulm/x", "val/x"])
        save(root / "images" / "train" / ".thumbnails" / "y.png", noise(8, 8))
        (root / "images" / "train" / "ulm" / "._x.png").write_bytes(b"of a Mac")
        assert names_of(root, "train") == ["bonn/x", "ulm/x"] and names_of(root, "val") == ["x"]

    def test_other_roots_seen_from_a_yaml_of_any_name(self, tmp_path):
        write_pictures(tmp_path / "data", ["train/x", "val/y"], images="rgb", masks="../labels")
        (tmp_path / "about").mkdir()
        about = tmp_path / "about" / "streets.yml"
        about.write_text(f"names: [a, b]\nimages: ../data/rgb\nmasks: {tmp_path}/labels\n")
        assert names_of(about, "train") == ["x"] and names_of(about, "val") == ["y"]

    def test_a_folder_for_each_split_and_masks_beside_the_images(self, tmp_path):
        """As exports with NAME.jpg and NAME_mask.png in one folder for each split have it."""
        root = describe(
            tmp_path,
            "names: [a, b]\nimages: {train: train, val: valid}\nmasks: {train: train, val: valid}\nmask_suffix: _mask",
        )
        for split in ("train", "valid"):
            write_pictures(root, ["x", "y"], images=split, masks=split, suffix="_mask")
        assert names_of(root, "train") == names_of(root, "val") == ["x", "y"]
        with pytest.raises(
            ValueError, match=r"`images` of .*classes\.yaml has no split 'test': choose one of train, val"
        ):
            open_folder(root, "test")

    def test_a_suffix_leaves_out_the_other_files_of_the_mask_folder(self, tmp_path):
        root = write_pictures(describe(tmp_path, "names: [a, b]\nmask_suffix: _ids"), ["train/x"], suffix="_ids")
        save(root / "masks" / "train" / "x_color.png", noise(32, 40))
        assert names_of(root, "train") == ["x"]
        describe(tmp_path, "names: [a, b]\nmask_suffix: _label")
        with pytest.raises(ValueError, match="masks/train holds no names that end in '_label': check `mask_suffix`"):
            open_folder(root, "train")

    def test_an_image_without_a_mask_names_the_mask_that_is_missing(self, tmp_path):
        root = write_pictures(describe(tmp_path, "names: [a, b]\nmask_suffix: _m"), ["train/x", "train/y"], suffix="_m")
        (root / "masks" / "train" / "y_m.png").unlink()
        with pytest.raises(
            ValueError, match=r"images/train/y\.png is an image without a label: .* no y_m\.\* \(1 of 2"
        ):
            open_folder(root, "train")

    def test_two_images_of_one_name_are_refused(self, tmp_path):
        root = write_pictures(describe(tmp_path, "names: [a, b]"), ["train/c/x"])
        save(root / "images" / "train" / "c" / "x.jpg", noise(32, 40))
        with pytest.raises(ValueError, match=r"c/x\.jpg and .*c/x\.png have the same name"):
            open_folder(root, "train")

    def test_an_empty_split_and_a_missing_one(self, tmp_path):
        root = write_pictures(describe(tmp_path, "names: [a, b]"), ["train/x"])
        (root / "images" / "val").mkdir()
        (root / "masks" / "val").mkdir()
        with pytest.raises(ValueError, match="images/val holds no images"):
            open_folder(root, "val")
        with pytest.raises(ValueError, match=r"no folder .*images/test: .*images has train, val;.*expected tree is"):
            open_folder(root, "test")

    def test_a_missing_classes_file_shows_what_is_expected(self, folder_root):
        (folder_root / "classes.yaml").unlink()
        (folder_root / "masks").rename(folder_root / "other")
        with pytest.raises(
            ValueError,
            match=r"no file .*classes\.yaml.* no folder .*masks(?s:.*)ROOT/images/train(?s:.*)names: \[road, car\]",
        ):
            open_folder(folder_root, "train")

    @pytest.mark.parametrize(("image", "mask"), [("webp", "tif"), ("tiff", "bmp"), ("gif", "gif"), ("bmp", "jp2")])
    def test_every_format_that_is_decoded(self, tmp_path, image, mask):
        root = describe(tmp_path, "names: [a, b]")
        for split in ("train", "val"):
            save(root / "images" / split / f"x.{image}", noise(32, 40))
            save(root / "masks" / split / f"x.{mask}", blocks([0, 1]).astype(np.uint8))
        for split in ("train", "val"):
            assert np.array_equal(open_folder(root, split).read(0)[1], blocks([0, 1]))

    def test_files_that_are_no_images(self, tmp_path, capsys):
        """They are counted; if there is nothing else, they are named."""
        root = write_pictures(describe(tmp_path / "mine", "names: [a, b]"), ["train/x", "val/y"])
        for name in ("a.heic", "b.HEIC", "c.mov", ".hidden.txt"):
            (root / "images" / "train" / name).write_bytes(b"x")
        code, out, _ = run(["check-data", root, "--output", tmp_path / "o"], capsys)
        assert code == 0 and "that are no images (2 .heic, 1 .mov): 3 of 4" in out.replace("\n", " ")
        assert names_of(root, "train") == ["x"]
        (root / "images" / "train" / "x.png").unlink()
        with pytest.raises(ValueError, match=r"images/train holds no images .* but 2 \.heic, 1 \.mov: convert to PNG"):
            open_folder(root, "train")


class TestSplits:
    def test_lists(self, tmp_path):
        root = describe(tmp_path, "names: [a, b]\nsplit: {train: lists/t.txt, val: lists/v.txt}\n")
        write_pictures(root, ["bonn/x.1", "y", "z", "unused"])
        (root / "lists").mkdir()
        (root / "lists" / "t.txt").write_bytes("\ufeffz\r\nbonn/x.1.png\r\n\r\n".encode())  # as Windows writes it
        (root / "lists" / "v.txt").write_text("y.jpg\n")
        assert names_of(root, "train") == ["z", "bonn/x.1"] and names_of(root, "val") == ["y"]
        with pytest.raises(ValueError, match="no split 'test': choose one of train, val"):
            open_folder(root, "test")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("x\ngone\n", r"images/gone\.\* is not there, though .*t\.txt lists it \(1 of 2"),
            ("x\nunlabelled\n", r"masks/unlabelled\.\* is not there, though .*t\.txt lists it"),
            ("x\nx\n", r"t\.txt names x more than once"),
            ("x\nx.png\n", r"t\.txt names x more than once"),
            ("\n", r"t\.txt is empty"),
            (None, r"no file .*t\.txt"),
        ],
    )
    def test_a_list_that_does_not_fit_the_files(self, tmp_path, text, message):
        root = write_pictures(describe(tmp_path, "names: [a, b]\nsplit: {train: t.txt}"), ["x", "y"])
        save(root / "images" / "unlabelled.png", noise(32, 40))
        if text is not None:
            (root / "t.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            open_folder(root, "train")

    def test_a_fraction_divides_all_pictures(self, tmp_path):
        root = describe(tmp_path, "names: [a, b]\nsplit: {val_fraction: 0.3, seed: 1}")
        write_pictures(root, [f"c/{k}" for k in range(12)])
        train, val = names_of(root, "train"), names_of(root, "val")
        assert sorted(train + val) == sorted(f"c/{k}" for k in range(12)) and val
        with pytest.raises(ValueError, match="no split 'test': choose one of train, val"):
            open_folder(root, "test")

    def test_a_fraction_is_near_what_was_asked_and_follows_the_seed(self):
        names = [f"picture_{k}" for k in range(2000)]
        val = Fraction(0.2, seed=0).takes(names, "val")
        assert 340 < len(val) < 460, "0.2 of 2000, three standard deviations to each side"
        assert val == Fraction(0.2, seed=0).takes(names[::-1], "val") != Fraction(0.2, seed=1).takes(names, "val")

    def test_files_that_are_added_leave_the_others_where_they_are(self):
        names = [f"picture_{k}" for k in range(500)]
        before, after = (set(Fraction(0.2).takes(some, "val")) for some in (names[:300], names))
        assert after & set(names[:300]) == before

    def test_a_fraction_leaves_neither_split_empty(self, tmp_path):
        for share in (0.001, 0.999):
            for count in range(2, 6):
                names = [str(k) for k in range(count)]
                train, val = (Fraction(share).takes(names, split) for split in ("train", "val"))
                assert train and val and sorted(train + val) == names
        root = write_pictures(describe(tmp_path, "names: [a, b]\nsplit: {val_fraction: 0.5}"), ["x"])
        with pytest.raises(ValueError, match="only one image to divide into training and validation: add more"):
            open_folder(root, "train")

    def test_a_fraction_of_a_list(self, tmp_path):
        root = describe(tmp_path, "names: [a, b]\nsplit: {val_fraction: 0.5, list: all.txt}")
        write_pictures(root, ["x", "y", "z"])
        save(root / "images" / "unlabelled.png", noise(32, 40))
        (root / "all.txt").write_text("x\ny\nz\n")
        assert sorted(names_of(root, "train") + names_of(root, "val")) == ["x", "y", "z"]


class TestDescription:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "expected `names"),
            ("[road]", "expected `names"),
            ("palette: [[1, 2, 3]]", "expected `names"),
            ("names:", "`names` must be a list"),
            ("names: {0: road, 1: car}", "`names` must be a list"),
            ("names: [yes, no]", "in quotes"),
            ("names: [a, b, a]", "`names` has a more than once"),
            (f"names: [{', '.join(map(str, range(300)))}]", "300 names"),
            ("names: [a", "line 1"),
            ("names: &a [*a]", "more than 20000 values"),
            ("names: " + "[" * 5000, "nested too deeply"),
            (f"names: [a]\n{BOMB}mask_suffix: *k", "more than 20000 values"),
            (f"names: [a]\n{BOMB}? *k\n: 1", "more than 20000 values"),
            ("names: [a]\n? [a]\n: 1", "unhashable key"),
            ('names: ["a\\e[2Jb"]', r"the name 'a\\x1b\[2Jb' in `names` has control characters"),
            ("names: [a]\nmapping: {x: 0}", "`mapping` has 'x': give a label value .* or a colour"),
            ('names: [a]\nmapping: {"#80408": 0}', "`mapping` has '#80408'"),
            ("names: [a]\nmapping: [0, 1]", "`mapping` must be of the form"),
            ("names: [a]\nmapping:\n  #804080: a\n", "a colour must stand in quotes"),
            ("names: [road, car]\nmapping: {3: raod}", "leads to raod.*did you mean road"),
            ("names: [a]\npalette: [[1, 2]]", "`palette` must be a list of colours"),
            ("names: [a]\npalette: [[1, 2, 300]]", "`palette` must be a list of colours"),
            ("names: [a, b]\npalette: [[1, 2, 3]]", "the palette has 1 colours for 2 names"),
            ("names: [a]\nimage: x", "no key 'image': did you mean images"),
            ("names: [a]\nfoo: x", "no key 'foo': there are names, palette"),
            ("names: [a]\nimages: 3", "`images` is 3: give a folder"),
            ("names: [a]\nmask_suffix: 3", "`mask_suffix` is 3: give a text"),
            ("names: [a]\nsplit: random", "`split` is 'random'"),
            ("names: [a]\nsplit: {val_fraction: 2}", "`split.val_fraction` is 2: give a share"),
            ("names: [a]\nsplit: {seed: 2}", "`split.val_fraction` is None"),
            ("names: [a]\nsplit: {val_fraction: 0.2, sed: 1}", "no key of `split` 'sed': did you mean seed"),
            ("names: [a]\nsplit: {val_fraction: 0.2, seed: x}", "`split.seed` is 'x'"),
            ("names: [a]\nsplit: {val_fraction: 0.2}\nimages: {train: a, val: b}", "divides one folder"),
        ],
    )
    def test_what_it_cannot_mean_names_file_and_key(self, tmp_path, text, message):
        describe(tmp_path, text)
        with pytest.raises(ValueError, match=rf"classes\.yaml does not describe classes.*{message}"):
            read_description(tmp_path / "classes.yaml")

    @pytest.mark.parametrize("target", [2, 5, -1, 300, True])
    def test_a_target_of_the_mapping_outside_the_classes_is_refused(self, tmp_path, target):
        describe(tmp_path, f"names: [road, car]\nmapping: {{10: 0, 20: {target}, 30: 255}}\n")
        with pytest.raises(ValueError, match=rf"classes\.yaml.*mapping leads to {target}\b"):
            read_description(tmp_path / "classes.yaml")

    def test_the_example_of_the_documentation(self, tmp_path):
        text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
        (example,) = [block for block in text.split("```yaml\n")[1:] if block.startswith("names:")]
        about = read_description(describe(tmp_path, example.split("```")[0]) / "classes.yaml")
        assert about.values == {7: 0, 11: 1, 0: IGNORE} and about.split == Fraction(0.2, 0)
        assert (about.images, about.masks, about.mask_suffix) == (tmp_path / "photos", tmp_path / "../labels", "_mask")

    def test_there_and_back(self, tmp_path):
        names = ("sky", "no", "größe")
        write_classes(
            tmp_path / "classes.yaml", names, ((1, 2, 3), (4, 5, 6), (7, 8, 9)), mapping={"#010203": 1, 7: 255}
        )
        about = read_description(tmp_path / "classes.yaml")
        assert about.classes.names == names and about.classes.palette == ((1, 2, 3), (4, 5, 6), (7, 8, 9))
        assert about.values == {7: 255} and about.colours == {(1, 2, 3): 1}
        assert "größe" in (tmp_path / "classes.yaml").read_text(encoding="utf-8")


class TestBadFiles:
    @pytest.mark.parametrize("folder", ["images", "masks"])
    def test_a_truncated_file_is_named(self, tmp_path, folder):
        root = write_pictures(describe(tmp_path, "names: [a, b]"), ["train/x"])
        truncate(root / folder / "train" / "x.png")
        with pytest.raises(UnreadableImage, match=rf"{folder}/train/x\.png"):
            open_folder(root, "train").read(0)

    def test_a_path_that_is_not_utf_8(self, tmp_path, capsys):
        """Its bytes are kept in reading, in lists and in JSON, and printed with backslashes."""
        odd = os.fsdecode(b"caf\xe9")
        root = describe(tmp_path / odd, "names: [a, b]\nsplit: {train: t.txt, val: v.txt}\n")
        write_pictures(root, [odd, "x"])
        (root / "t.txt").write_bytes(b"caf\xe9\n")
        (root / "v.txt").write_bytes(b"x\n")
        assert names_of(root, "train") == [odd]
        words = ["check-data", "--data.name", "folder", "--data.root", root, "--data.crop", "[32, 32]"]
        code, out, err = run([*words, "--output", tmp_path / "check", "--json", tmp_path / "check.json"], capsys)
        assert code == 0 and "Traceback" not in out + err
        assert json.loads((tmp_path / "check.json").read_text())["data"]["root"] == str(root)
        truncate(root / "images" / f"{odd}.png")
        code, out, err = run([*words, "--output", tmp_path / "check", "--json", tmp_path / "check.json"], capsys)
        assert code == 2 and "1 of 1 images cannot be read" in out and "caf\\udce9.png" in out

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
    def test_a_full_disk_is_one_clear_message_and_nothing_is_half_written(self, tmp_path, monkeypatch, number):
        files.write_json(tmp_path / "kept.json", {"old": 1})

        def fill_up(path, data):
            with open(path, "wb") as file:
                file.write(data[: len(data) // 2])
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "write_bytes", fill_up)
        for name in ("kept.json", "new.json"):
            with pytest.raises(OSError, match=f"{os.strerror(number)}: free some space") as caught:
                files.write_json(tmp_path / name, {"new": 2})
            assert caught.value.errno == number and caught.value.filename == str(tmp_path / name)
        assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
        assert json.loads((tmp_path / "kept.json").read_text()) == {"old": 1}

    def test_a_full_disk_leaves_no_half_checkpoint(self, tmp_path, monkeypatch, tiny_network):
        def fill_up(network, folder):
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(type(tiny_network), "save_pretrained", fill_up)
        with pytest.raises(ValueError, match=f"cannot write the checkpoint {tmp_path}.*No space left on device"):
            tiny_network.save(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_full_disk_ends_a_command_with_exit_code_2(self, tmp_path, monkeypatch, capsys):
        def fill_up(path, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", fill_up)
        code, _, err = run(["architectures", "--json", tmp_path / "a.json"], capsys)
        assert code == 2 and err == (
            f"routeseg: error: {tmp_path}/a.json: cannot write it, No space left on device: free some space there, or "
            "write to another folder\n"
        )
        assert not list(tmp_path.iterdir())
