"""Images per second of the loader, stage by stage, for images of Cityscapes' size.

    python benchmarks/data.py [--pictures 12] [--output results/data_cpu.json]

Images of 2048x1024 in Cityscapes' layout are made in a temporary folder: procedural scenes, drawn at half of the
size, enlarged, with the noise of a sensor. So a PNG is nearly as large as a photo of Cityscapes (2.3 MB). One training
image is then taken apart: decoding, scale 0.5-2 with crop 768 and flip, colour, tensors. That runs on one core, and
rounds over the stages alternate, so that a slow minute of the machine hits all of them. Then come whole loaders with
0, 1 and 2 processes, with and without a cache of decoded images. Medians are reported.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps

from routeseg import DynamicRoutingNetwork, model_cost
from routeseg.data.cache import ImageCache
from routeseg.data.config import DataConfig
from routeseg.data.datamodule import SegmentationDataModule
from routeseg.data.decoding import read_image
from routeseg.data.label_files import read_label_file
from routeseg.data.loaders import TrainingImages, image_tensor
from routeseg.data.pairs import PairedFiles
from routeseg.data.scenes import draw_scene
from routeseg.data.sets.cityscapes import OFFICIAL
from routeseg.data.transforms import Augmentation, jitter
from routeseg.evaluation import machine_facts
from routeseg.files import write_json

HEIGHT, WIDTH, CROP = 1024, 2048, (768, 768)
CITYSCAPES_MB = 2.3  # leftImg8bit_trainvaltest.zip: 11 GB for 5,000 images
NOISE = 0.3  # standard deviation, of 255
JPEG_QUALITY = 92
COLOUR = 0.3
ROUNDS, LOADER_ROUNDS, LOADER_IMAGES, BATCH = 3, 3, 32, 4
TRAIN_TFLOPS = (1.0, 10.0, 50.0)  # sustained by a training step, for what it would need of the loader


def write_pictures(root: Path, count: int) -> dict[str, float]:
    """Images and labels in Cityscapes' layout, and JPEGs of the images beside. Returns their mean sizes in MB."""
    rng = np.random.default_rng(0)
    ids = np.array([number for number, _, _ in OFFICIAL], dtype=np.uint8)
    images, labels, jpegs = root / "leftImg8bit/train/made", root / "gtFine/train/made", root / "jpeg"
    for folder in (images, labels, jpegs):
        folder.mkdir(parents=True)
    for index in range(count):
        image, classes = draw_scene(0, index, (HEIGHT // 2, WIDTH // 2), "mixed")
        image = cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)
        image = np.clip(image + rng.normal(0, NOISE, image.shape).round(), 0, 255).astype(np.uint8)
        classes = cv2.resize(classes, (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST)
        name = f"made_{index:06d}_000019"
        Image.fromarray(image).save(images / f"{name}_leftImg8bit.png")
        Image.fromarray(ids[classes]).save(labels / f"{name}_gtFine_labelIds.png")
        Image.fromarray(image).save(jpegs / f"{name}.jpg", quality=JPEG_QUALITY)
    return {
        kind: statistics.mean(path.stat().st_size for path in folder.iterdir()) / 1e6
        for kind, folder in (("png", images), ("label_png", labels), ("jpeg", jpegs))
    }


def by_pillow(path: Path) -> np.ndarray:
    """What `read_image` does with files that OpenCV is not trusted with."""
    with Image.open(path) as file:
        file.load()
        return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))


def compressed_pixels(path: Path) -> bytes:
    """The deflate stream of a PNG."""
    data, place, stream = path.read_bytes(), 8, b""
    while place < len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        stream += data[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += 12 + length
    return stream


def stages(root: Path, config: DataConfig) -> tuple[dict[str, Callable[[int], Any]], int]:
    """Stage -> a function that does it for one image; and the number of images."""
    module = SegmentationDataModule(config, 1)
    data = module.train_data
    assert isinstance(data, PairedFiles)
    count, crop_only = len(data), Augmentation(CROP, flip=True, colour=0.0)
    pngs = [pair.image for pair in data.pairs]
    labels = [pair.labels for pair in data.pairs if pair.labels is not None]
    jpegs = sorted((root / "jpeg").iterdir())
    in_memory = [np.fromfile(path, np.uint8) for path in pngs]
    streams = [compressed_pixels(path) for path in pngs]
    decoded = [data.read(index) for index in range(count)]
    crops = [crop_only(*decoded[index], np.random.default_rng(index)) for index in range(count)]
    values = [read_label_file(path) for path in labels]
    cache = ImageCache(root / "cache")
    plain = TrainingImages(data, module.augmentation, 0, 0)
    cached_module = SegmentationDataModule(config, 1)
    assert isinstance(cached_module.train_data, PairedFiles)
    cached_module.train_data.read_pixels = cache
    cached = TrainingImages(cached_module.train_data, module.augmentation, 0, 0)
    for path in pngs:
        cache(path)

    def rng(index: int) -> np.random.Generator:
        return np.random.default_rng(index)

    return {
        "PNG: inflate alone (zlib)": lambda i: zlib.decompress(streams[i]),
        "PNG: decoder alone, from memory (OpenCV, libpng)": lambda i: cv2.imdecode(in_memory[i], cv2.IMREAD_COLOR_RGB),
        "PNG: Pillow, the general way": lambda i: by_pillow(pngs[i]),
        "PNG: read_image": lambda i: read_image(pngs[i]),
        "PNG: from the cache, all rows": lambda i: np.array(cache(pngs[i])),
        "JPEG: Pillow, the general way": lambda i: by_pillow(jpegs[i]),
        "JPEG: read_image": lambda i: read_image(jpegs[i]),
        "JPEG: at half of the resolution": lambda i: cv2.imread(str(jpegs[i]), cv2.IMREAD_REDUCED_COLOR_2),
        "label PNG": lambda i: read_label_file(labels[i]),
        "label ids to classes": lambda i: data.label_map(values[i], labels[i]),
        "scale, crop, flip": lambda i: crop_only(*decoded[i], rng(i)),
        "colour": lambda i: jitter(crops[i][0], COLOUR, rng(i)),
        "to tensors": lambda i: (image_tensor(crops[i][0]), torch.from_numpy(crops[i][1].astype(np.int64))),
        "the whole item": lambda i: plain[(i, i)],
        "the whole item, cached": lambda i: cached[(i, i)],
    }, count


def measure_stages(made: dict[str, Callable[[int], Any]], count: int) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(ROUNDS):
        for index in range(count):
            for name, stage in made.items():
                start = time.perf_counter()
                stage(index)
                seconds[name].append(time.perf_counter() - start)
    return [
        {
            "stage": name,
            "ms": 1e3 * statistics.median(times),
            "mean_ms": 1e3 * statistics.mean(times),
            "fastest_ms": 1e3 * min(times),
            "images_per_s": 1 / statistics.median(times),
        }
        for name, times in seconds.items()
    ]


def measure_loader(config: DataConfig) -> float:
    """Images per second from the second batch on (the first waits for the processes to start)."""
    module = SegmentationDataModule(config, LOADER_IMAGES // config.batch_size + 1)
    batches = iter(module.train_dataloader())
    next(batches)
    start = time.perf_counter()
    images = sum(len(batch["image"]) for batch in batches)
    return images / (time.perf_counter() - start)


def measure_loaders(root: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    settings = [(workers, cached) for workers in (0, 1, 2) for cached in (False, True)]
    runs: dict[tuple[int, bool], list[float]] = {setting: [] for setting in settings}
    for _ in range(LOADER_ROUNDS):
        for workers, cached in settings:
            cache = str(root / "cache") if cached else None
            runs[workers, cached].append(measure_loader(DataConfig(**config, workers=workers, cache=cache)))
    return [
        {
            "workers": workers,
            "cache": cached,
            "images_per_s": statistics.median(rates),
            "images_per_s_and_worker": statistics.median(rates) / max(workers, 1),
        }
        for (workers, cached), rates in runs.items()
    ]


def needed() -> dict[str, Any]:
    """What a training step of the paper's network takes from the loader, by arithmetic alone."""
    network = DynamicRoutingNetwork(num_classes=19, depth=16)
    tflop = 3 * 2 * model_cost(network, CROP).full / 1e12  # forward, and twice that backward; two FLOPs a MAC
    return {
        "network": "depth 16, 64 channels, all paths open, crop 768x768",
        "tflop_per_image": tflop,
        "images_per_s_at_sustained_tflops": {f"{rate:g}": rate / tflop for rate in TRAIN_TFLOPS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("results/data_cpu.json"))
    args = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sizes = write_pictures(root, args.pictures)
        config = {
            "name": "cityscapes",
            "root": str(root),
            "val_split": "train",
            "crop": CROP,
            "colour": COLOUR,
            "batch_size": BATCH,
        }
        made, count = stages(root, DataConfig(**config))
        stage_rows = measure_stages(made, count)
        loader_rows = measure_loaders(root, config)
    ms = {row["stage"]: row["ms"] for row in stage_rows}
    alone = ms["PNG: decoder alone, from memory (OpenCV, libpng)"]
    summary = {
        "decoder_share_of_item": alone / ms["the whole item"],
        "read_image_speedup_png": ms["PNG: Pillow, the general way"] / ms["PNG: read_image"],
        "read_image_speedup_jpeg": ms["JPEG: Pillow, the general way"] / ms["JPEG: read_image"],
        "cache_speedup_item": ms["the whole item"] / ms["the whole item, cached"],
    }
    pictures = {
        "size": [HEIGHT, WIDTH],
        "count": args.pictures,
        "mean_mb": sizes,
        "of": f"procedural scenes at half of the size, enlarged, with noise of {NOISE} (standard deviation, of 255)",
        "png_mb_of_cityscapes": CITYSCAPES_MB,
        "in_memory": "all files were in the system's cache: no disk is measured",
    }
    facts = {"pictures": pictures, "rounds": ROUNDS, "stages": stage_rows, "loaders": loader_rows, "summary": summary}
    write_json(args.output, {**facts, "needed": needed(), "command": "benchmarks/data.py", **machine_facts()})
    print("| stage | ms | fastest | images/s |\n|---|---|---|---|")
    for row in stage_rows:
        print(f"| {row['stage']} | {row['ms']:.1f} | {row['fastest_ms']:.1f} | {row['images_per_s']:.1f} |")
    print("\n| workers | cache | images/s | per worker |\n|---|---|---|---|")
    for row in loader_rows:
        cached = "yes" if row["cache"] else "no"
        print(f"| {row['workers']} | {cached} | {row['images_per_s']:.1f} | {row['images_per_s_and_worker']:.1f} |")
    print(f"\n{sizes}\n{summary}\n{needed()}")


if __name__ == "__main__":
    main()
