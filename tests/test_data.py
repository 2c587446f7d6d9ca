"""Reading images and labels, augmenting them, and the order in which they come."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pictures import ORIENTATION_TAG, ROTATED_RIGHT, noise, save, truncate
from routeseg.cli.logs import log_to_stderr
from routeseg.data.config import DataConfig, open_data
from routeseg.data.datamodule import SegmentationDataModule
from routeseg.data.decoding import UnreadableImage, read_image
from routeseg.data.label_files import LabelMap, read_label_file
from routeseg.data.loaders import MAX_BAD_IN_A_ROW, EvaluationImages, StepSampler, TrainingImages, evaluation_loader
from routeseg.data.pairs import SKIPS_NAMED
from routeseg.data.sets import camvid
from routeseg.data.transforms import PADDING_RGB, Augmentation
from routeseg.labels import IGNORE

COLOURS = np.array(
    [[250, 10, 10], [10, 250, 10], [10, 10, 250], [250, 250, 10], [10, 250, 250], [250, 10, 250]], np.uint8
)


def painted(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Large blocks of classes, and an image that shows each class in its colour."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, len(COLOURS), (-(-height // 16), -(-width // 16)), dtype=np.uint8)
    labels = blocks.repeat(16, 0).repeat(16, 1)[:height, :width]
    return COLOURS[labels], labels


@pytest.fixture
def small_camvid(tmp_path) -> Path:
    """Three training and two validation images in CamVid's layout."""
    for split, count in (("train", 3), ("val", 2)):
        for index in range(count):
            labels = painted(40, 48, index)[1]
            labels[0, 0] = 11
            save(tmp_path / "camvid" / split / f"p{index}.png", noise(40, 48, index))
            save(tmp_path / "camvid" / f"{split}annot" / f"p{index}.png", labels)
    return tmp_path / "camvid"


class TestAugmentation:
    def check_aligned(self, image: np.ndarray, labels: np.ndarray) -> float:
        """Away from borders, each pixel has its class's colour. Returns the share of pixels that are away."""
        nearest = np.abs(image[:, :, None].astype(int) - COLOURS).sum(-1).argmin(-1)
        padded = np.pad(labels, 2, mode="edge")
        height, width = labels.shape
        inside = np.ones(labels.shape, dtype=bool)
        for dy in range(5):
            for dx in range(5):
                inside &= padded[dy : dy + height, dx : dx + width] == labels
        known = inside & (labels != IGNORE)
        assert (nearest[known] == labels[known]).all()
        assert (image[inside & (labels == IGNORE)] == PADDING_RGB).all()
        return float(known.mean())

    @pytest.mark.parametrize("size", [(96, 160), (95, 161), (50, 300)])
    def test_image_and_labels_stay_aligned(self, size):
        augmentation = Augmentation((64, 80), scales=(0.5, 0.75, 1.0, 1.3, 2.0))
        image, labels = painted(*size)
        shares = []
        for seed in range(40):
            got = augmentation(image, labels, np.random.default_rng(seed))
            assert got[0].shape == (64, 80, 3) and got[1].shape == (64, 80)
            assert got[0].dtype == got[1].dtype == np.uint8
            shares.append(self.check_aligned(*got))
        assert np.mean(shares) > 0.3, "most of a crop was compared"

    def test_at_scale_1_the_crop_is_the_picture_itself(self):
        image, labels = noise(48, 64), np.arange(48 * 64).reshape(48, 64).astype(np.uint8) % 200
        augmentation = Augmentation((32, 40), scales=(1.0,), flip=False)
        places = set()
        for seed in range(30):
            crop, crop_labels = augmentation(image, labels, np.random.default_rng(seed))
            windows = np.lib.stride_tricks.sliding_window_view(image, (32, 40, 3))[:, :, 0]
            rows, columns = np.nonzero((windows == crop).all((2, 3, 4)))
            assert len(rows) == 1, "the crop is a window of the image"
            top, left = int(rows[0]), int(columns[0])
            assert np.array_equal(crop_labels, labels[top : top + 32, left : left + 40])
            places.add((top, left))
        tops, lefts = ({place[axis] for place in places} for axis in (0, 1))
        assert min(tops) < 4 and max(tops) > 12 and min(lefts) < 6 and max(lefts) > 18, "from everywhere"

    def test_flip_mirrors_half_of_the_pictures_with_their_labels(self):
        image, labels = noise(32, 40), (noise(32, 40)[..., 0] % 6).astype(np.uint8)
        augmentation = Augmentation((32, 40), scales=(1.0,), flip=True)
        mirrored = 0
        for seed in range(100):
            got, got_labels = augmentation(image, labels, np.random.default_rng(seed))
            flipped = np.array_equal(got, image[:, ::-1])
            assert flipped or np.array_equal(got, image)
            assert np.array_equal(got_labels, labels[:, ::-1] if flipped else labels)
            mirrored += flipped
        assert 30 < mirrored < 70

    def test_a_crop_larger_than_the_picture_is_padded(self):
        image, labels = noise(32, 40), np.zeros((32, 40), np.uint8)
        augmentation = Augmentation((64, 100), scales=(1.0,), flip=False)
        for seed in range(10):
            got, got_labels = augmentation(image, labels, np.random.default_rng(seed))
            rows, columns = np.nonzero(got_labels == 0)
            assert len(rows) == 32 * 40 and (got_labels[got_labels != 0] == IGNORE).all()
            window = got[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert np.array_equal(window, image)
            assert (got[got_labels == IGNORE] == PADDING_RGB).all()

    def test_larger_in_one_direction_only(self):
        image, labels = painted(100, 40)
        got, got_labels = Augmentation((64, 80), scales=(1.0,))(image, labels, np.random.default_rng(0))
        assert (got_labels != IGNORE).any(0).sum() == 40
        assert ((got_labels != IGNORE).any(1)).all()
        self.check_aligned(got, got_labels)

    def test_ignored_pixels_never_become_a_class(self):
        labels = np.full((64, 64), IGNORE, dtype=np.uint8)
        labels[:, 32:] = 3
        augmentation = Augmentation((80, 80), scales=(0.7, 1.7))
        for seed in range(10):
            got = augmentation(noise(64, 64), labels, np.random.default_rng(seed))[1]
            assert set(np.unique(got)) == {3, IGNORE}

    def test_colour_changes_the_image_alone_and_stays_in_range(self):
        image, labels = painted(64, 64)
        augmentation = Augmentation((64, 64), scales=(1.0,), flip=False, colour=0.5)
        changes = []
        for seed in range(20):
            strong, same = augmentation(image, labels, np.random.default_rng(seed))
            assert strong.dtype == np.uint8 and np.array_equal(same, labels)
            changes.append(strong.mean() - image.mean())
            wrapped = np.abs(strong.astype(int) - image).max()
            assert 0 < wrapped < 200, "a bright pixel that wraps around would turn dark"
        assert min(changes) < -5 and max(changes) > 5, "darker and brighter"

    def test_the_same_generator_gives_the_same_picture(self):
        augmentation = Augmentation((48, 48), colour=0.3)
        image, labels = painted(64, 80)
        one, again, other = (augmentation(image, labels, np.random.default_rng(seed)) for seed in (5, 5, 6))
        assert np.array_equal(one[0], again[0]) and np.array_equal(one[1], again[1])
        assert not np.array_equal(one[0], other[0])


class TestSampler:
    def batches(self, **changes) -> list[list[tuple[int, int]]]:
        options = {"size": 10, "batch_size": 3, "total": 20, "seed": 1, **changes}
        return list(StepSampler(**options))

    def test_a_batch_does_not_depend_on_where_the_run_starts(self):
        whole = self.batches()
        assert len(whole) == 20 and all(len(batch) == 3 for batch in whole)
        for first in (1, 4, 19):
            assert self.batches(first=first) == whole[first:]
        assert self.batches(total=30)[:20] == whole

    @pytest.mark.parametrize("world", [1, 2, 3])
    def test_every_picture_once_per_epoch_over_all_processes(self, world):
        """An epoch ends inside a batch here; still each image is seen once before any is seen twice."""
        processes = [self.batches(world=world, rank=rank) for rank in range(world)]
        seen = sorted(pair for batches in processes for batch in batches for pair in batch)
        positions, indices = zip(*seen, strict=True)
        assert positions == tuple(range(20 * 3 * world))
        for epoch in range(len(indices) // 10):
            assert sorted(indices[10 * epoch : 10 * (epoch + 1)]) == list(range(10))

    def test_epochs_and_seeds_are_shuffled_differently(self):
        indices = [index for batch in self.batches() for _, index in batch]
        others = [index for batch in self.batches(seed=2) for _, index in batch]
        assert indices[:10] != indices[10:20] and indices[:10] != others[:10]
        assert indices[:10] != list(range(10))

    def test_a_batch_larger_than_the_data_set(self):
        counts = Counter(index for _, index in self.batches(size=2, batch_size=5, total=4)[0])
        assert sorted(counts.values()) == [2, 3]

    def test_length_is_the_whole_run(self):
        assert len(StepSampler(10, 3, 20, seed=1, first=15)) == 20


class TestTrainingOrder:
    def module(self, workers: int = 0, first_step: int = 0, seed: int = 3) -> SegmentationDataModule:
        config = DataConfig(
            image_size=(32, 48), crop=(32, 32), train_images=5, val_images=3, batch_size=2, workers=workers
        )
        return SegmentationDataModule(config, iterations=6, seed=seed, first_step=first_step)

    def batches(self, **options) -> list[dict]:
        return list(self.module(**options).train_dataloader())

    def test_a_share_of_the_pictures(self):
        config = DataConfig(image_size=(32, 48), crop=(32, 32), train_images=5, batch_size=2, train_share=0.4)
        module = SegmentationDataModule(config, iterations=6)
        assert [module.train_data.name(i) for i in range(len(module.train_data))] == ["large_00000", "small_00004"]

    def test_the_same_batches_from_any_start_and_number_of_workers(self):
        whole = self.batches()
        assert len(whole) == 6
        assert whole[0]["image"].shape == (2, 3, 32, 32) and whole[0]["image"].dtype == torch.uint8
        assert whole[0]["labels"].shape == (2, 32, 32) and whole[0]["labels"].dtype == torch.int64
        for options in ({"workers": 2}, {"first_step": 4}, {"first_step": 3, "workers": 1}):
            batches = self.batches(**options)
            due = whole[options.get("first_step", 0) :]
            assert len(batches) == len(due)
            for batch, wanted in zip(batches, due, strict=True):
                assert torch.equal(batch["image"], wanted["image"])
                assert torch.equal(batch["labels"], wanted["labels"])

    def test_another_seed_gives_other_batches(self):
        assert not torch.equal(self.batches(seed=3)[0]["image"], self.batches(seed=4)[0]["image"])

    def test_the_same_picture_is_augmented_anew_each_time(self):
        data = open_data(DataConfig(image_size=(64, 96), train_images=1), "train")
        pictures = TrainingImages(data, Augmentation((48, 48)), seed=0, stream=0)
        assert not torch.equal(pictures[0, 0]["image"], pictures[1, 0]["image"])
        assert torch.equal(pictures[1, 0]["image"], pictures[1, 0]["image"])

    def test_the_augmentation_depends_on_seed_and_stream(self):
        data = open_data(DataConfig(image_size=(64, 96), train_images=1), "train")
        augmentation = Augmentation((48, 48))
        one, seed, stream = (
            TrainingImages(data, augmentation, *key)[0, 0]["image"] for key in ((0, 0), (1, 0), (0, 1))
        )
        assert not torch.equal(one, seed) and not torch.equal(one, stream)

    def test_precise_norm_batches_are_a_function_of_seed_and_step(self):
        one, again, other = (list(self.module().norm_dataloader(step, 2)) for step in (10, 10, 20))
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, again, strict=True))
        assert not torch.equal(one[0]["image"], other[0]["image"])

    @pytest.mark.parametrize("world", [1, 2, 4])
    def test_evaluation_sees_every_picture_once_over_all_processes(self, world):
        data = open_data(DataConfig(image_size=(32, 48), val_images=3), "val")
        names = [p["name"] for rank in range(world) for p in evaluation_loader(data, 0, rank, world)]
        assert sorted(names) == sorted(data.name(index) for index in range(3))
        picture = next(iter(evaluation_loader(data)))
        assert picture["image"].shape == (1, 3, 32, 48) and picture["labels"].shape == (1, 32, 48)
        assert np.array_equal(picture["image"][0].permute(1, 2, 0).numpy(), data.read(0)[0])


class TestDataConfig:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("batch_size", 0),
            ("train_images", 0),
            ("train_share", 0.0),
            ("train_share", 1.5),
            ("val_images", -1),
            ("workers", -1),
            ("crop", (16, 64)),
            ("image_size", (64, 31)),
            ("scales", []),
            ("scales", [1.0, -0.5]),
        ],
    )
    def test_what_cannot_be_is_named(self, key, value):
        with pytest.raises(ValueError, match=f"data.{key} is"):
            DataConfig(**{key: value})

    def test_a_split_that_the_scenes_do_not_have(self):
        with pytest.raises(ValueError, match="scenes has no split 'training': choose one of train, val, test"):
            open_data(DataConfig(), "training")

    def test_training_and_validation_scenes_differ(self):
        config = DataConfig(image_size=(32, 48), train_images=2, val_images=2)
        train, val = open_data(config, "train"), open_data(config, "val")
        assert len(train) == len(val) == 2
        assert not np.array_equal(train.read(0)[0], val.read(0)[0])


class TestReadImage:
    rgb = noise(30, 40)

    def test_rgb_is_read_as_it_is(self, tmp_path):
        got = read_image(save(tmp_path / "a.png", self.rgb))
        assert got.dtype == np.uint8 and np.array_equal(got, self.rgb)

    def test_greyscale(self, tmp_path):
        grey = self.rgb[..., 0]
        assert np.array_equal(read_image(save(tmp_path / "a.png", grey)), np.dstack([grey] * 3))

    def test_grey_with_alpha_and_one_bit(self, tmp_path):
        grey = self.rgb[..., :2]
        assert np.array_equal(read_image(save(tmp_path / "a.png", grey)), np.dstack([grey[..., 0]] * 3))
        bits = self.rgb[..., 0] > 128
        got = read_image(save(tmp_path / "b.png", bits))
        assert np.array_equal(got, np.dstack([bits * np.uint8(255)] * 3))

    def test_rgba_drops_the_alpha(self, tmp_path):
        rgba = np.dstack([self.rgb, np.full((30, 40), 200, np.uint8)])
        assert np.array_equal(read_image(save(tmp_path / "a.png", rgba)), self.rgb)

    def test_palette(self, tmp_path):
        picture = Image.fromarray(self.rgb[..., 0] % 4)
        picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
        picture.save(tmp_path / "a.png")
        colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [100, 110, 120]], dtype=np.uint8)
        assert np.array_equal(read_image(tmp_path / "a.png"), colours[self.rgb[..., 0] % 4])

    @pytest.mark.parametrize("suffix", [".png", ".tif"])
    def test_16_bit_greyscale_keeps_its_contrast(self, tmp_path, suffix):
        grey = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
        got = read_image(save(tmp_path / f"a{suffix}", grey))
        assert np.abs(got.astype(float) - (grey / 257)[..., None]).max() <= 0.51

    def test_floating_point_in_0_to_1_is_not_black(self, tmp_path):
        grey = np.linspace(0, 1, 30 * 40, dtype=np.float32).reshape(30, 40)
        got = read_image(save(tmp_path / "a.tif", grey))
        assert got.max() == 255 and len(np.unique(got)) > 200

    @pytest.mark.parametrize("suffix", [".png", ".jpg"])
    def test_exif_rotation_is_applied(self, tmp_path, suffix):
        stored = np.zeros((32, 64, 3), dtype=np.uint8)
        stored[:16, :16] = 255  # the corner that comes to the right when the image is put upright
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = ROTATED_RIGHT
        Image.fromarray(stored).save(tmp_path / f"a{suffix}", exif=exif)
        got = read_image(tmp_path / f"a{suffix}")
        assert got.shape == (64, 32, 3)
        assert got[:14, 18:].min() > 200 and got[20:].max() < 50 and got[:, :14].max() < 50

    def test_rotated_16_bit(self, tmp_path):
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = ROTATED_RIGHT
        Image.fromarray(np.full((30, 40), 40000, np.uint16)).save(tmp_path / "a.png", exif=exif)
        assert read_image(tmp_path / "a.png").shape == (40, 30, 3)

    def test_damaged_exif_does_not_escape_as_another_error(self, tmp_path):
        """Rotated, and a width that is text: the image is read, or refused by name; nothing else."""
        entries = [(256, 2, 4, b"abc\0"), (ORIENTATION_TAG, 3, 1, struct.pack("<HH", ROTATED_RIGHT, 0))]
        body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0)
        Image.fromarray(self.rgb).save(tmp_path / "a.jpg", exif=exif)
        try:
            assert read_image(tmp_path / "a.jpg").shape in ((40, 30, 3), (30, 40, 3))
        except UnreadableImage as error:
            assert "a.jpg" in str(error)

    @pytest.mark.parametrize("kind", ["truncated", "empty", "text", "missing", "folder"])
    @pytest.mark.parametrize("suffix", [".png", ".jpg"])
    def test_what_is_no_image_is_named(self, tmp_path, kind, suffix):
        path = tmp_path / f"broken{suffix}"
        if kind == "truncated":
            truncate(save(path, self.rgb))
        elif kind == "folder":
            path.mkdir()
        elif kind != "missing":
            path.write_text("" if kind == "empty" else "<html>404</html>")
        with pytest.raises(UnreadableImage, match=f"broken{suffix}"):
            read_image(path)

    def test_labels_with_colours_are_refused(self, tmp_path):
        path = save(tmp_path / "a.png", self.rgb)
        with pytest.raises(ValueError, match="a.png is coloured"):
            LabelMap(3, {}, {})(read_label_file(path), path)
        with pytest.raises(UnreadableImage, match="b.png"):
            read_label_file(truncate(save(tmp_path / "b.png", self.rgb[..., 0])))

    def test_labels_with_a_palette_are_their_indices(self, tmp_path):
        values = self.rgb[..., 0] % 3
        picture = Image.fromarray(values)
        picture.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
        picture.save(tmp_path / "a.png")
        assert np.array_equal(read_label_file(tmp_path / "a.png"), values)

    @pytest.mark.parametrize("folder", ["train", "trainannot"])
    def test_a_truncated_file_is_passed_over_in_training_and_counted(self, small_camvid, folder, caplog):
        truncate(small_camvid / folder / "p1.png")
        data = camvid.open_camvid(small_camvid, "train")
        pictures = TrainingImages(data, Augmentation((40, 48), scales=(1.0,), flip=False), seed=0, stream=0)
        item = pictures[0, 1]
        (message,) = caplog.messages
        assert message.startswith("skipped: ") and f"{folder}/p1.png" in message
        assert item["skipped"] == 1
        assert np.array_equal(item["image"].permute(1, 2, 0), data.read(2)[0]), "the next one stands in"
        assert pictures[0, 0]["skipped"] == 0 and pictures[7, 1]["skipped"] == 1
        assert len(caplog.messages) == 1, "no file is named twice"

    def test_after_the_last_picture_the_first_stands_in(self, small_camvid):
        truncate(small_camvid / "train" / "p2.png")
        data = camvid.open_camvid(small_camvid, "train")
        pictures = TrainingImages(data, Augmentation((40, 48), scales=(1.0,), flip=False), seed=0, stream=0)
        item = pictures[0, 2]
        assert np.array_equal(item["image"].permute(1, 2, 0).numpy(), data.read(0)[0])

    def test_nothing_but_unreadable_pictures_ends_with_an_error(self, small_camvid):
        for path in (small_camvid / "train").iterdir():
            truncate(path)
        data = camvid.open_camvid(small_camvid, "train")
        pictures = TrainingImages(data, Augmentation((40, 48)), seed=0, stream=0)
        with pytest.raises(ValueError, match=f"{MAX_BAD_IN_A_ROW} unreadable"):
            pictures[0, 0]

    def test_a_truncated_file_is_counted_in_evaluation(self, small_camvid, caplog):
        truncate(small_camvid / "val" / "p0.png")
        data = camvid.open_camvid(small_camvid, "val")
        items = [EvaluationImages(data, range(2))[k] for k in range(2)]
        assert "val/p0.png" in caplog.text
        assert items[0] == {"skipped": 1} and items[1]["skipped"] == 0 and items[1]["name"] == "p1"

    def test_loader_processes_name_a_file_once_between_them(self, small_camvid, capfd):
        truncate(small_camvid / "val" / "p0.png")
        data = camvid.open_camvid(small_camvid, "val")
        with log_to_stderr():
            for _ in range(2):
                assert sum(picture["skipped"] for picture in evaluation_loader(data, workers=2)) == 1
        assert capfd.readouterr().err.count("val/p0.png") == 1

    def test_of_many_unreadable_files_the_first_are_named(self, tmp_path, caplog):
        count = SKIPS_NAMED + 5
        for index in range(count):
            for folder in ("train", "trainannot"):
                save(tmp_path / folder / f"p{index:02d}.png", np.zeros((32, 32), np.uint8)).write_bytes(b"no image")
        pictures = EvaluationImages(camvid.open_camvid(tmp_path, "train"), range(count))
        assert all(pictures[index]["skipped"] for index in range(count))
        assert len(caplog.messages) == SKIPS_NAMED + 1 and "check-data" in caplog.messages[-1]

    def test_wrong_labels_are_not_passed_over_in_training(self, small_camvid):
        save(small_camvid / "trainannot" / "p0.png", np.full((40, 48), 99, np.uint8))
        data = camvid.open_camvid(small_camvid, "train")
        with pytest.raises(ValueError, match="label value 99"):
            TrainingImages(data, Augmentation((40, 48)), seed=0, stream=0)[0, 0]
