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
from routeseg.data import cache, decoding, label_files
from routeseg.data.cache import ImageCache
from routeseg.data.config import DataConfig
from routeseg.data.datamodule import SegmentationDataModule
from routeseg.data.decoding import UnreadableImage, as_bytes, decode_image, read_image, read_pillow
from routeseg.data.label_files import LabelMap, read_label_file
from routeseg.data.transforms import LUMA_RGB, jitter
from routeseg.labels import IGNORE
from routeseg.prediction.files import read_source

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
        return decoding._decode_plain(file) is not None


def written(folder: Path, data: bytes) -> Path:
    path = folder / "picture.img"
    path.write_bytes(data)
    return path


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[decoding.ORIENTATION_TAG] = value
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
        monkeypatch.setattr(decoding.ImageOps, "exif_transpose", fail)
        with pytest.raises(
            UnreadableImage, match="picture.img as an image: (Failed to|it is too large for the memory)"
        ):
            read_image(path)

    def test_what_opencv_cannot_take_pillow_reads(self, picture, tmp_path, monkeypatch):
        def fail(data, flags):
            raise cv2.error("Insufficient memory")

        monkeypatch.setattr(decoding.cv2, "imdecode", fail)
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


GREY = np.random.default_rng(1).integers(0, 65536, (32, 40)).astype(np.uint16)
SMALL = np.random.default_rng(2).integers(0, 256, (32, 40, 3), dtype=np.uint8)


def of_mode(mode: str) -> Image.Image:
    """An image of one of Pillow's modes."""
    if mode.startswith("I;16"):
        return Image.frombytes(mode, (40, 32), GREY.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    if mode == "I":
        return Image.fromarray(GREY.astype(np.int32))
    if mode == "F":
        return Image.fromarray((GREY / 65535).astype(np.float32))
    before = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode)
    base = Image.fromarray(SMALL)
    return (base.convert(before) if before else base).convert(mode)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_bits(values: np.ndarray, bits: int, colour_type: int) -> bytes:
    """A PNG of 1, 2 or 4 bits a pixel: greyscale, or of colour type 3 with a palette."""
    rows = ("".join(format(int(value), f"0{bits}b") for value in row) for row in values)
    packed = (int(row + "0" * (-len(row) % 8), 2).to_bytes((len(row) + 7) // 8, "big") for row in rows)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour_type, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(range(3 * 2**bits))) if colour_type == 3 else b""
    data = zlib.compress(b"".join(b"\0" + row for row in packed))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + palette + chunk(b"IDAT", data) + chunk(b"IEND", b"")


class TestOneReading:
    """A path, bytes, an image of Pillow, an array and a tensor of the same image are the same pixels."""

    MODES = ("1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "LAB", "HSV", "LA", "La", "PA", "I", "F")

    @pytest.mark.parametrize("mode", [*MODES, "I;16", "I;16L", "I;16B"])
    def test_of_every_mode(self, tmp_path, mode):
        image, path = of_mode(mode), tmp_path / "x.img"
        pixels = read_pillow(image)
        assert pixels.dtype == np.uint8 and pixels.shape == (32, 40, 3) and len(np.unique(pixels)) > 1
        written = 0
        for format in ("PNG", "TIFF", "BMP", "PPM", "GIF"):
            try:
                image.save(path, format)
            except (OSError, KeyError, ValueError):
                continue  # no mode of this format
            if format in ("GIF", "PPM", "BMP") and mode not in ("1", "L", "P"):
                continue  # which would write another mode
            written += 1
            assert np.array_equal(read_image(path), pixels), format
            assert np.array_equal(read_source("x", path), pixels), format
            with Image.open(path) as file:
                assert np.array_equal(read_pillow(file), pixels), format
                assert np.array_equal(read_pillow(file), pixels), f"{format}, which is decoded now"
                values = np.asarray(file)
            if values.ndim == 2 and file.mode != "P":
                assert np.array_equal(as_bytes(np.stack([values] * 3, axis=-1)), pixels), format
        assert written or mode in ("HSV", "La", "RGBa")

    @pytest.mark.parametrize("bits", [16, 14, 12, 10, 8])
    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_of_16_bits_the_range_is_that_of_the_values(self, tmp_path, caplog, bits, suffix):
        """Colours and grey; nothing is cut off or black; what was found is said, once."""
        decoding._say_depth.cache_clear()
        deep = np.random.default_rng(0).integers(0, 1 << bits, (32, 40, 3)).astype(np.uint16)
        deep[0, 0] = (1 << bits) - 1
        expected = deep / ((1 << bits) - 1) * 255
        for name, values in (("colour", deep), ("grey", deep[..., 0])):
            path = tmp_path / f"{name}.{suffix}"
            cv2.imwrite(str(path), values[..., ::-1] if values.ndim == 3 else values)
            got = read_image(path)
            assert np.abs(got - (expected if name == "colour" else expected[..., :1])).max() <= 0.51
            with Image.open(path) as file:
                assert np.array_equal(read_pillow(file), got)
        assert np.array_equal(as_bytes(deep), read_image(tmp_path / f"colour.{suffix}"))
        assert np.array_equal(as_bytes(deep.astype(np.int32)), as_bytes(deep))
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == (bits < 16) and all(f"read as {bits} bits" in line for line in said)

    def test_colours_of_16_bits_are_turned(self, tmp_path):
        data = cv2.imencode(".png", np.dstack([GREY, GREY // 2, GREY // 3]))[1].tobytes()
        note = orientation(ROTATED).tobytes().removeprefix(b"Exif\0\0")
        turned = read_image(written(tmp_path, png_with(data, b"eXIf", note)))
        assert np.array_equal(turned, np.rot90(read_image(written(tmp_path, data)), -1))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (np.full((32, 40), 200, np.float32), "these go from 0 to 200"),
            (np.full((32, 40), np.nan, np.float32), "these go from nan to nan"),
            (np.full((32, 40), 70_000, np.int32), "these go from 0 to 70000"),
            (np.full((32, 40), -5, np.int32), "these go from -5 to 0"),
        ],
    )
    def test_a_range_that_nothing_tells_is_asked_for(self, tmp_path, values, message):
        path = tmp_path / "x.tif"
        Image.fromarray(values).save(path)
        for read in (lambda: read_image(path), lambda: as_bytes(values), lambda: read_pillow(Image.fromarray(values))):
            with pytest.raises(ValueError, match=message):
                read()

    def test_heic_is_named(self, tmp_path):
        path = written(tmp_path, b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
        for read in (read_image, lambda path: read_source(path, path)):
            with pytest.raises(UnreadableImage, match=r"cannot read .*picture\.img.*it is HEIC.*convert it to JPEG"):
                read(path)


class TestMasksAsStored:
    @pytest.mark.parametrize("bits", [1, 2, 4])
    @pytest.mark.parametrize("colour_type", [0, 3], ids=["grey", "palette"])
    def test_few_bits(self, tmp_path, bits, colour_type):
        values = np.random.default_rng(0).integers(0, 2**bits, (32, 41))
        assert np.array_equal(read_label_file(written(tmp_path, png_of_bits(values, bits, colour_type))), values)

    @pytest.mark.parametrize("most", [3, 20, 255, 1000, 65535])
    @pytest.mark.parametrize("plain", [False, True])
    def test_a_pgm_that_says_its_largest_value(self, tmp_path, most, plain):
        values = np.random.default_rng(0).integers(0, min(most, 254) + 1, (32, 40))
        raw = values.astype(np.uint8 if most < 256 else ">u2").tobytes()
        data = b"P2 40 32 %d\n" % most + b" ".join(b"%d" % value for value in values.ravel())
        path = written(tmp_path, data if plain else b"P5 40 32 %d\n" % most + raw)
        assert np.array_equal(read_label_file(path), values)

    @pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
    def test_16_bits_of_either_order(self, tmp_path, mode):
        of_mode(mode).save(tmp_path / "x.tif")
        assert np.array_equal(read_label_file(tmp_path / "x.tif"), GREY)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("x.bmp", {}),
            ("x.gif", {}),
            ("x.tif", {}),
            ("x.tif", {"compression": "tiff_lzw"}),
            ("x.jp2", {}),
            ("x.pgm", {}),
        ],
    )
    def test_every_format_that_keeps_values(self, tmp_path, name, options):
        for values in (SMALL[..., 0], np.array([0, 128, 255], np.uint8)[SMALL[..., 0] % 3]):
            Image.fromarray(values).save(tmp_path / name, **options)
            assert np.array_equal(read_label_file(tmp_path / name), values)

    @pytest.mark.parametrize("frames", [1, 2])
    def test_lossless_webp(self, tmp_path, frames):
        images = [Image.fromarray(SMALL), Image.fromarray(255 - SMALL)][:frames]
        images[0].save(tmp_path / "x.webp", lossless=True, exact=True, save_all=True, append_images=images[1:])
        assert np.array_equal(read_label_file(tmp_path / "x.webp"), SMALL)

    @pytest.mark.parametrize(
        ("name", "options", "what"),
        [
            ("x.jpg", {"quality": 100}, "JPEG"),
            ("x.png", {"format": "JPEG"}, "JPEG"),
            ("x.webp", {}, "a lossy WebP"),
            ("x.webp", {"format": "WEBP", "save_all": True, "append_images": [Image.new("L", (40, 32))]}, "lossy WebP"),
            ("x.jp2", {"irreversible": True}, "a lossy JPEG 2000"),
            ("x.tif", {"compression": "jpeg"}, "a TIFF with jpeg compression"),
            ("x.avif", {}, "AVIF"),
        ],
    )
    def test_a_lossy_one_is_refused_with_the_reason(self, tmp_path, name, options, what):
        Image.fromarray(SMALL[..., 0]).save(tmp_path / name, **options)
        with pytest.raises(ValueError, match=rf"{name} is .*{what}, which does not keep the values.*as PNG"):
            read_label_file(tmp_path / name)
        assert read_image(tmp_path / name).shape == (32, 40, 3), "as an image it will do"

    def test_whole_floats_are_numbers(self, tmp_path):
        Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "x.tif")
        assert np.array_equal(read_label_file(tmp_path / "x.tif"), GREY)
        for value in (0.5, np.nan, np.inf, 1e30):
            Image.fromarray(np.full((32, 40), value, np.float32)).save(tmp_path / "x.tif")
            with pytest.raises(ValueError, match=r"x\.tif is no label image.*mode F"):
                read_label_file(tmp_path / "x.tif")

    @pytest.mark.parametrize("mode", ["CMYK", "LAB"])
    def test_a_mode_that_holds_neither_numbers_nor_colours_is_named(self, tmp_path, mode):
        of_mode(mode).save(tmp_path / "x.tif")
        with pytest.raises(ValueError, match=rf"x\.tif is no label image.*mode {mode}"):
            read_label_file(tmp_path / "x.tif")

    def test_colours_of_16_bits(self, tmp_path):
        """They are read if 8 bits were written as 16; else two of them could become one."""
        cv2.imwrite(str(tmp_path / "x.png"), SMALL[..., ::-1].astype(np.uint16) * 257)
        assert np.array_equal(read_label_file(tmp_path / "x.png"), SMALL)
        cv2.imwrite(str(tmp_path / "x.png"), SMALL[..., ::-1].astype(np.uint16))
        with pytest.raises(ValueError, match=r"x\.png is no label image.*colours of 8 bits"):
            read_label_file(tmp_path / "x.png")

    def test_a_mask_with_the_note_of_its_image_is_turned_with_it(self, tmp_path):
        Image.fromarray(SMALL[..., 0]).save(tmp_path / "x.png", exif=orientation(3))
        assert np.array_equal(read_label_file(tmp_path / "x.png"), SMALL[::-1, ::-1, 0])


class TestTransparency:
    HERE = np.add.outer(np.arange(32), np.arange(40)) < 30

    @pytest.mark.parametrize("below", [(0, 0, 0), (255, 255, 255), (9, 200, 3)])
    def test_transparent_pixels_are_one_value_whatever_lies_under_them(self, tmp_path, below):
        colours = np.where(self.HERE[..., None], (200, 10, 10), SMALL if below == (9, 200, 3) else below)
        rgba = np.dstack([colours, np.where(self.HERE, 255, 0)]).astype(np.uint8)
        for name in ("x.png", "x.tif", "x.webp"):
            Image.fromarray(rgba).save(tmp_path / name, **({"lossless": True} if name == "x.webp" else {}))
            got = read_label_file(tmp_path / name)
            assert (got[self.HERE] == (200, 10, 10)).all() and not got[~self.HERE].any()

    @pytest.mark.parametrize("below", [0, 255])
    @pytest.mark.parametrize("mode", ["LA", "RGBA"])
    def test_a_mask_that_is_alpha_alone(self, tmp_path, mode, below):
        """Drawn in black on nothing, or on white that nobody sees."""
        alpha, grey = np.where(self.HERE, 255, 0), np.where(self.HERE, 0, below)
        pixels = np.dstack([grey] * (1 if mode == "LA" else 3) + [alpha]).astype(np.uint8)
        Image.fromarray(pixels, mode).save(tmp_path / "x.png")
        got = read_label_file(tmp_path / "x.png")
        assert np.array_equal(got if mode == "LA" else got[..., 0], alpha)

    def test_black_beside_transparent_pixels_is_said(self, tmp_path, caplog):
        label_files._say_black.cache_clear()
        rgba = np.dstack([SMALL * (SMALL[..., :1] > 99), 255 * self.HERE]).astype(np.uint8)
        Image.fromarray(rgba).save(tmp_path / "x.png")
        for _ in range(2):
            assert not read_label_file(tmp_path / "x.png")[~self.HERE].any()
        assert [record.getMessage()[:33] for record in caplog.records] == ["masks have transparent pixels, an"]

    def test_numbers_beside_alpha(self, tmp_path):
        numbers = SMALL[..., 0]
        for alpha, expected in ((np.full((32, 40), 255), numbers), (255 * self.HERE, numbers * self.HERE)):
            Image.fromarray(np.dstack([numbers, alpha]).astype(np.uint8), "LA").save(tmp_path / "x.png")
            assert np.array_equal(read_label_file(tmp_path / "x.png"), expected)

    def test_a_palette_with_alpha(self, tmp_path):
        image = Image.fromarray(SMALL[..., 0] % 3)
        image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0])
        numbers, colours = np.asarray(image), np.asarray(image.convert("RGB"))
        image.save(tmp_path / "x.png", transparency=0)
        assert np.array_equal(read_label_file(tmp_path / "x.png"), numbers), "numbers stay what they are"
        expected = np.where(numbers[..., None] > 0, colours, 0)
        assert np.array_equal(read_label_file(tmp_path / "x.png", palette=True), expected)
        image.convert("PA").save(tmp_path / "x.tif")
        assert np.array_equal(read_label_file(tmp_path / "x.tif"), numbers)
