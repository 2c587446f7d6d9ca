"""The fast ways to an image: the pixels, the classes and the errors are those of the slow ways."""

from __future__ import annotations

import io
import logging
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from conftest import run
from routeseg.data import cache, pairs
from routeseg.data.cache import ImageCache
from routeseg.data.config import DataConfig
from routeseg.data.datamodule import SegmentationDataModule
from routeseg.data.pairs import LabelMap, UnreadableImage, decode_image, read_image, read_label_file
from routeseg.data.transforms import LUMA_RGB, jitter
from routeseg.labels import IGNORE

ROTATED = 6  # EXIF orientation
ENCODINGS = {
    "png": {"format": "PNG"},
    "png stored": {"format": "PNG", "compress_level": 0},
    "jpeg 4:2:0": {"format": "JPEG"},
    "jpeg 4:4:4": {"format": "JPEG", "subsampling": 0, "quality": 95},
    "jpeg 4:2:2": {"format": "JPEG", "subsampling": 1},
    "jpeg progressive": {"format": "JPEG", "progressive": True, "quality": 30},
}


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Smooth and rough parts, of odd size."""
    rng = np.random.default_rng(0)
    smooth = cv2.GaussianBlur(rng.integers(0, 256, (121, 203, 3), dtype=np.uint8), (0, 0), 3)
    picture = cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX)
    picture[:40] = rng.integers(0, 256, (40, 203, 3))
    return picture


def encoded(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as file:
        file.load()
        return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))


def is_fast(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as file:
        return pairs._decode_plain(file) is not None


def written(folder: Path, data: bytes) -> Path:
    path = folder / "picture.img"
    path.write_bytes(data)
    return path


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[pairs.ORIENTATION_TAG] = value
    return exif


def png_with(data: bytes, kind: bytes, content: bytes) -> bytes:
    """The PNG with one more chunk, behind its pixels."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:-12] + chunk + data[-12:]


class TestFastImages:
    @pytest.mark.parametrize("name", ENCODINGS)
    def test_pixels_are_those_of_pillow(self, picture, tmp_path, name):
        data = encoded(picture, **ENCODINGS[name])
        assert is_fast(data)
        got = read_image(written(tmp_path, data))
        assert got.dtype == np.uint8 and np.array_equal(got, by_pillow(data))

    def test_exif_that_does_not_turn_is_fast_too(self, picture):
        assert is_fast(encoded(picture, format="JPEG", exif=orientation(1)))

    @pytest.mark.parametrize("format", ["PNG", "JPEG"])
    def test_a_turned_picture_is_turned(self, picture, tmp_path, format):
        data = encoded(picture, format=format, exif=orientation(ROTATED))
        assert not is_fast(data)
        got = read_image(written(tmp_path, data))
        assert got.shape == (203, 121, 3) and np.array_equal(got, by_pillow(data))

    def test_a_png_that_says_so_at_its_end_is_turned(self, picture, tmp_path):
        data = png_with(
            encoded(picture, format="PNG"), b"eXIf", orientation(ROTATED).tobytes().removeprefix(b"Exif\0\0")
        )
        assert by_pillow(data).shape == (203, 121, 3), "Pillow sees it"
        assert np.array_equal(read_image(written(tmp_path, data)), by_pillow(data))

    def test_all_other_kinds_go_the_slow_way(self, picture, tmp_path):
        grey, alpha = picture[..., 0], np.dstack([picture, picture[..., :1]])
        deep = cv2.imencode(".png", picture.astype(np.uint16)[..., ::-1] * 257)[1].tobytes()
        others = {
            "grey": encoded(grey, format="PNG"),
            "alpha": encoded(alpha, format="PNG"),
            "grey jpeg": encoded(grey, format="JPEG"),
            "16 bits": deep,
            "transparent colour": encoded(picture, format="PNG", transparency=(0, 0, 0)),
            "trailing bytes": encoded(picture, format="JPEG") + b"\0\0",
            "bmp": encoded(picture, format="BMP"),
        }
        for name, data in others.items():
            assert not is_fast(data), name
            assert np.array_equal(read_image(written(tmp_path, data)), by_pillow(data)), name

    @pytest.mark.parametrize("name", ["png", "jpeg 4:2:0", "jpeg progressive"])
    def test_a_file_that_was_cut_off_is_an_error(self, picture, tmp_path, name):
        data = encoded(picture, **ENCODINGS[name])
        for share in (0.1, 0.5, 0.9, 0.99):
            with pytest.raises(UnreadableImage, match="cannot read .*picture.img as an image"):
                read_image(written(tmp_path, data[: int(share * len(data))]))

    def test_a_flipped_bit_is_an_error_where_it_is_one_for_pillow(self, picture, tmp_path, capfd):
        data, rng = encoded(picture, format="PNG"), np.random.default_rng(0)
        for place in rng.integers(60, len(data) - 20, 30):
            damaged = bytearray(data)
            damaged[place] ^= 1 << int(rng.integers(8))
            try:
                expected = by_pillow(bytes(damaged))
            except (OSError, SyntaxError):
                with pytest.raises(UnreadableImage):
                    read_image(written(tmp_path, bytes(damaged)))
            else:
                assert np.array_equal(read_image(written(tmp_path, bytes(damaged))), expected)

    @pytest.mark.parametrize("error", [RuntimeError("Failed to decode frame 0"), MemoryError()])
    def test_whatever_pillow_raises(self, picture, tmp_path, monkeypatch, error):
        def fail(file):
            raise error

        path = written(tmp_path, encoded(picture[..., 0], format="PNG"))
        monkeypatch.setattr(pairs.ImageOps, "exif_transpose", fail)
        with pytest.raises(
            UnreadableImage, match="picture.img as an image: (Failed to|it is too large for the memory)"
        ):
            read_image(path)

    def test_what_opencv_cannot_take_pillow_reads(self, picture, tmp_path, monkeypatch):
        def fail(data, flags):
            raise cv2.error("Insufficient memory")

        monkeypatch.setattr(pairs.cv2, "imdecode", fail)
        assert np.array_equal(read_image(written(tmp_path, encoded(picture, format="PNG"))), picture)

    def test_a_path_that_is_not_utf8(self, picture, tmp_path):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
        path.write_bytes(encoded(picture, format="PNG"))
        assert np.array_equal(read_image(path), picture)


class TestFastLabels:
    @pytest.mark.parametrize("strict", [False, True])
    def test_bytes_become_what_larger_numbers_become(self, strict):
        meaning = LabelMap(19, {0: IGNORE, 7: 0, 8: 1, 40: 18, 255: IGNORE}, {}, strict=strict)
        values = np.array([[0, 7, 8], [40, 255, 7]], np.uint8)
        got = meaning(values, Path("x.png"))
        assert got.dtype == np.uint8 and got.tolist() == [[255, 0, 1], [18, 255, 0]]
        assert np.array_equal(got, meaning(values.astype(np.int32), Path("x.png")))

    @pytest.mark.parametrize("kind", [np.uint8, np.int32])
    def test_a_value_that_means_nothing_is_named(self, kind):
        with pytest.raises(ValueError, match=r"x.png has the label value 77, which is none of the 19 classes"):
            LabelMap(19, {}, {})(np.array([[3, 77]], kind), Path("x.png"))


class TestJitter:
    def test_it_is_brightness_then_saturation_then_contrast(self, picture):
        for seed in range(8):
            got = jitter(picture, 0.5, np.random.default_rng(seed)).astype(np.float64)
            brightness, contrast, saturation = 1 + 0.5 * np.random.default_rng(seed).uniform(-1, 1, 3)
            pixels = picture * brightness
            grey = (pixels @ LUMA_RGB)[..., None]
            pixels = grey + saturation * (pixels - grey)
            pixels = grey.mean() + contrast * (pixels - grey.mean())
            assert np.abs(got - pixels.clip(0, 255)).max() < 1, "rounded"
            assert abs(got.mean() - pixels.clip(0, 255).mean()) < 0.1, "neither darker nor brighter"


class TestCache:
    @pytest.fixture
    def image(self, picture, tmp_path) -> Path:
        path = tmp_path / "picture.png"
        Image.fromarray(picture).save(path)
        return path

    def test_the_second_time_nothing_is_decoded(self, picture, image, tmp_path, monkeypatch):
        reader = ImageCache(tmp_path / "cache")
        assert np.array_equal(reader(image), picture)
        monkeypatch.setattr(cache, "read_image", lambda path: pytest.fail("decoded again"))
        again = ImageCache(tmp_path / "cache")(image)
        assert type(again) is np.ndarray and np.array_equal(again, picture)

    def test_a_changed_image_is_decoded_anew(self, picture, image, tmp_path):
        reader = ImageCache(tmp_path / "cache")
        reader(image)
        Image.fromarray(picture[::-1]).save(image)
        assert np.array_equal(reader(image), picture[::-1])

    def test_a_damaged_entry_is_replaced(self, picture, image, tmp_path):
        reader = ImageCache(tmp_path / "cache")
        reader(image)
        (entry,) = (tmp_path / "cache").rglob("*.npy")
        whole = entry.read_bytes()
        for damaged in (b"", whole[:100], whole[:-1], b"nonsense" * 100):
            entry.write_bytes(damaged)
            assert np.array_equal(reader(image), picture)
            assert entry.read_bytes() == whole

    def test_a_full_disk_is_said_once_and_training_goes_on(self, picture, image, tmp_path, monkeypatch, caplog):
        reader = ImageCache(tmp_path / "cache")
        monkeypatch.setattr(cache, "SPARE_BYTES", 1 << 60)
        with caplog.at_level(logging.WARNING, "routeseg"):
            for _ in range(3):
                assert np.array_equal(reader(image), picture)
        assert len(caplog.records) == 1 and "no more images are kept" in caplog.text
        assert not list((tmp_path / "cache").rglob("*.npy"))

    def test_what_is_no_image_stays_an_error(self, tmp_path):
        reader = ImageCache(tmp_path / "cache")
        (tmp_path / "bad.png").write_bytes(b"nothing")
        for name in ("bad.png", "absent.png"):
            with pytest.raises(UnreadableImage, match=f"cannot read .*{name} as an image"):
                reader(tmp_path / name)

    def test_batches_are_the_same_with_and_without(self, tmp_path):
        rng = np.random.default_rng(0)
        for split in ("train", "val"):
            for part, shape in (("", (40, 48, 3)), ("annot", (40, 48))):
                (tmp_path / f"{split}{part}").mkdir()
                for index in range(3):
                    pixels = rng.integers(0, 12, shape).astype(np.uint8) * (1 if part else 20)
                    Image.fromarray(pixels).save(tmp_path / f"{split}{part}" / f"{index}.png")

        def batches(**options):
            config = DataConfig("camvid", str(tmp_path), crop=(32, 32), batch_size=2, workers=0, **options)
            return list(SegmentationDataModule(config, 6).train_dataloader())

        plain, first, second = batches(), batches(cache=str(tmp_path / "c")), batches(cache=str(tmp_path / "c"))
        assert len(list((tmp_path / "c").rglob("*.npy"))) == 3
        for kind in (first, second):
            for one, other in zip(plain, kind, strict=True):
                assert torch.equal(one["image"], other["image"]) and torch.equal(one["labels"], other["labels"])

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="cannot write into .*file.*--data.cache"):
            ImageCache(tmp_path / "file")

    def test_scenes_have_no_files(self, tmp_path, capsys):
        words = ["train", "--data.cache", tmp_path / "c", "--output", tmp_path / "run"]
        code, _, err = run([*words, "--recipe.iterations", 1], capsys)
        assert code == 2 and "data.cache is for images in files, scenes has none" in err


class TestHostileFiles:
    def test_no_format_that_runs_programs(self, tmp_path):
        """Pillow would hand PostScript to Ghostscript."""
        path = tmp_path / "photo.png"
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n")
        for read in (read_image, read_label_file):
            with pytest.raises(UnreadableImage, match="it is none"):
                read(path)

    @pytest.mark.parametrize("size", [(70_000, 1), (1, 70_000), (12_000, 12_000)])
    def test_what_claims_too_many_pixels(self, tmp_path, size, monkeypatch):
        """It is refused by its head, before anything is decoded."""
        path = tmp_path / "large.png"
        Image.new("1", size).save(path)
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
        for read in (read_image, read_label_file):
            with pytest.raises(UnreadableImage, match=f"it has {size[0]}x{size[1]} pixels; at most 100000000"):
                read(path)

    def test_a_limit_of_ones_own(self, tmp_path):
        path = tmp_path / "photo.png"
        Image.new("RGB", (30, 20)).save(path)
        assert decode_image(path, path, max_pixels=600).shape == (20, 30, 3)
        with pytest.raises(UnreadableImage, match="at most 599 are decoded"):
            decode_image(path, path, max_pixels=599)


@pytest.mark.parametrize("kind", ["jpeg 4:2:0", "png"])
def test_libraries_write_nothing_without_a_name(kind, picture, capfd, tmp_path):
    """What libjpeg and libpng say of a damaged file does not reach the terminal; stderr is there again afterwards."""
    data = bytearray(encoded(picture, **ENCODINGS[kind]))
    data[len(data) // 2 : len(data) // 2 + 100] = bytes(100)
    path = tmp_path / "damaged"
    path.write_bytes(data)
    try:
        read_image(path)
    except UnreadableImage as error:
        assert str(path) in str(error)
    os.write(2, b"here\n")
    assert capfd.readouterr().err == "here\n"


def test_of_several_frames_the_first_is_taken(tmp_path, caplog):
    frames = [Image.fromarray(np.full((40, 40, 3), value, np.uint8)) for value in (10, 200)]
    for name, count in (("moving.gif", 2), ("still.gif", 1)):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:count])
        caplog.clear()
        assert read_image(tmp_path / name).max() < 20
        said = [record.getMessage() for record in caplog.records]
        assert said == ([f"{tmp_path / name} has 2 frames: the first one is taken"] if count == 2 else [])
