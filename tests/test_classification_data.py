"""Labelled images to pre-train on: trees of class folders, their crops, and their bad files by name."""

import io
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from routeseg.data.classification import ClassificationConfig, ImageTree
from routeseg.data.classification_loaders import ClassificationDataModule
from routeseg.data.crops import CentreCrop, RandomResizedCrop

SMALL = dict(crop=32, resize=36, batch_size=4, workers=0)


def picture(label: int, seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    rng = np.random.default_rng([label, seed])
    colour = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])[label % 3]
    noise = rng.integers(-40, 41, (*size, 3))
    return Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8))


def png(label: int, seed: int) -> bytes:
    data = io.BytesIO()
    picture(label, seed).save(data, "PNG")
    return data.getvalue()


def write_tree(root, classes=("apple", "leaf", "sea"), train=6, val=2):
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                suffix = ("JPEG", "jpg", "png")[i % 3]
                picture(label, 100 * (split == "val") + i).save(folder / f"{name}_{i}.{suffix}")
    return root


def batches(module, count=None):
    return list(islice(module.train_dataloader(), count))


def same(some, other):
    return len(some) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(some, other, strict=True)
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"))


class TestCrops:
    def test_boxes_keep_to_area_and_aspect(self):
        crop, rng = RandomResizedCrop(32, (0.08, 1.0), (0.75, 4 / 3)), np.random.default_rng(0)
        shares, aspects = [], []
        for _ in range(500):
            top, left, height, width = crop.box(300, 400, rng)
            assert 0 <= top <= 300 - height and 0 <= left <= 400 - width
            shares.append(height * width / 120_000)
            aspects.append(width / height)
        assert 0.079 < min(shares) < 0.11 and max(shares) > 0.9
        assert 0.73 < min(aspects) < 0.8 and 1.27 < max(aspects) < 1.36

    @pytest.mark.parametrize("size", [(20, 900), (900, 20), (1, 1)])
    def test_where_no_crop_fits_the_largest_in_the_middle_is_taken(self, size):
        crop = RandomResizedCrop(32, (1.0, 1.0), (0.75, 4 / 3))
        top, left, height, width = crop.box(*size, np.random.default_rng(0))
        assert 0.7 < width / height < 1.4 and min(height, width) in (1, *size)
        assert (top, left) == ((size[0] - height) // 2, (size[1] - width) // 2)
        assert crop(np.zeros((*size, 3), np.uint8), np.random.default_rng(0)).shape == (32, 32, 3)

    def test_flip_is_a_mirror(self):
        ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 3, (64, 64, 3))
        crop = RandomResizedCrop(64, (1.0, 1.0), (1.0, 1.0))
        seen = {bool((np.diff(crop(ramp, np.random.default_rng(i))[0, :, 0].astype(int)) > 0).all()) for i in range(20)}
        assert seen == {True, False}

    @pytest.mark.parametrize("size", [(48, 96), (96, 48), (17, 33), (256, 300)])
    def test_centre_crop(self, size):
        """The middle of the image is in the middle of the crop; the shorter side is resize / crop times as long."""
        rows, columns = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]), indexing="ij")
        image = np.stack([rows, columns, rows], axis=2)
        crop = CentreCrop(40, 32)((image * 255).round().astype(np.uint8)).astype(float)
        assert crop.shape == (32, 32, 3)
        middle = crop[15:17, 15:17].mean((0, 1))
        assert middle == pytest.approx([127.5] * 3, abs=3)
        shorter = int(np.argmin(size))
        seen = crop.max((0, 1))[shorter] - crop.min((0, 1))[shorter]
        assert seen / 255 == pytest.approx(31 / 40, abs=0.06)


class TestTree:
    def test_reads_what_lies_there(self, tree):
        data = ImageTree(tree / "train")
        assert data.classes == ("apple", "leaf", "sea") and len(data) == 18
        for index in range(18):
            image, label = data.read(index)
            assert image.shape == (48, 40, 3) and image.mean((0, 1)).argmax() == label

    def test_names_that_are_no_text(self, tmp_path):
        import os

        root = write_tree(tmp_path)
        os.rename(os.fsencode(root / "train/apple/apple_0.JPEG"), os.fsencode(root / "train/apple") + b"/\xff.png")
        data = ImageTree(root / "train")
        assert sum(data.read(i)[0].size > 0 for i in range(len(data))) == 18

    def test_a_batch_is_a_function_of_seed_and_number(self, tree):
        config = ClassificationConfig(root=str(tree), **SMALL)
        whole = batches(ClassificationDataModule(config, 9, seed=1))
        assert len(whole) == 9 and not same(whole, batches(ClassificationDataModule(config, 9, seed=2)))
        assert same(whole[5:], batches(ClassificationDataModule(config, 9, seed=1, first_step=5)))
        parallel = ClassificationConfig(root=str(tree), **{**SMALL, "workers": 2})
        assert same(whole, batches(ClassificationDataModule(parallel, 9, seed=1)))

    def test_accumulated_batches_come_as_one(self, tree):
        config = ClassificationConfig(root=str(tree), **SMALL)
        single = batches(ClassificationDataModule(config, 4, seed=1))
        double = batches(ClassificationDataModule(config, 2, seed=1, accumulate=2))
        assert torch.equal(torch.cat([b["image"] for b in single]), torch.cat([b["image"] for b in double]))

    def test_validation_has_every_image_once(self, tree):
        found = list(ClassificationDataModule(ClassificationConfig(root=str(tree), **SMALL), 1).val_dataloader())
        assert [len(batch["label"]) for batch in found] == [4, 2]
        assert torch.cat([batch["label"] for batch in found]).tolist() == [0, 0, 1, 1, 2, 2]

    def test_an_unreadable_image_gives_its_place_to_another_of_its_batch(self, tmp_path, caplog):
        root = write_tree(tmp_path)
        for path in sorted((root / "train" / "leaf").iterdir())[:3]:
            path.write_bytes(path.read_bytes()[:60])
        config = ClassificationConfig(root=str(root), **{**SMALL, "batch_size": 6})
        found = batches(ClassificationDataModule(config, 6))
        assert (
            sum(int(batch["skipped"]) for batch in found[:3]) == sum(int(batch["skipped"]) for batch in found[3:]) == 3
        )
        assert all(batch["image"].shape == (6, 3, 32, 32) and batch["label"].shape == (6,) for batch in found)
        assert len([record for record in caplog.records if "leaf_" in record.getMessage()]) == 3  # once each
        for batch in found:
            assert (batch["image"].float().mean((2, 3)).argmax(1) == batch["label"]).all()
        for path in (root / "train").glob("*/*"):
            path.write_bytes(b"")
        with pytest.raises(ValueError, match="6 unreadable images in a batch, and no other"):
            batches(ClassificationDataModule(config, 3))

    def test_validation_leaves_unreadable_images_out(self, tmp_path):
        root = write_tree(tmp_path, val=3)
        for path in (root / "val" / "apple").iterdir():
            path.write_bytes(b"")
        found = list(ClassificationDataModule(ClassificationConfig(root=str(root), **SMALL), 1).val_dataloader())
        assert [(len(batch["label"]), int(batch["skipped"])) for batch in found] == [(1, 3), (4, 0), (1, 0)]


def _no_root(root):
    return {"root": None}


def _no_train(root):
    (root / "train").rename(root / "training")


def _no_classes(root):
    for folder in (root / "train").iterdir():
        folder.rename(root / folder.name)


def _one_class(root):
    for name in ("leaf", "sea"):
        (root / "train" / name).rename(root / name)


def _other_classes(root):
    (root / "val" / "sea").rename(root / "val" / "ocean")


def _empty_class(root):
    for path in (root / "train" / "leaf").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_no_root, r"data\.root is not set(.|\n)*ROOT/train/n01440764/NAME\.JPEG"),
        (_no_train, r"no folder .*train; the expected tree is\n  ROOT/train/n01440764"),
        (_no_classes, "no class folders; the expected tree"),
        (_one_class, "only one class, apple"),
        (_other_classes, "val has the class ocean, .*train has not"),
        (_empty_class, "leaf holds no images"),
    ],
)
def test_a_tree_that_is_none(tmp_path, spoil, expected):
    root = write_tree(tmp_path)
    changes = {"root": str(root), **(spoil(root) or {})}
    with pytest.raises(ValueError, match=expected):
        ClassificationDataModule(ClassificationConfig(**SMALL, **changes), 1)


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 0}, {"workers": -1}, {"crop": 16}, {"resize": 20}, {"area": (0, 1)}, {"area": (0.5, 2)},
     {"aspect": (2, 1)}],
)  # fmt: skip
def test_settings_that_make_no_sense(changes):
    with pytest.raises(ValueError, match=f"data.{next(iter(changes))}"):
        ClassificationConfig(**{**SMALL, **changes})
