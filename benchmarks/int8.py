"""int8 against float32, in ONNX Runtime: accuracy on CamVid, and milliseconds an image.

    python benchmarks/int8.py --root path/to/camvid [--output results/int8_camvid_cpu.json]

A network with gates, in float32 and in int8, calibrated with training images, scored on the validation set. Then a
network of full size, static and with random weights, for time alone: what int8 gains depends on the width. Times are
medians of files in turns, each made for the image's size, as benchmarks/inference.py takes them.

Processors with VNNI and without differ in time: the results name the processor's instructions (`machine.isa`). Give
--output on a machine of another kind than that of the results at hand, to keep both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image

import routeseg
from inference_methods import GATED, alternate, onnxruntime_method, random_network
from routeseg.data.config import DataConfig, open_data
from routeseg.data.loaders import evaluation_loader
from routeseg.evaluation import evaluate, machine_facts
from routeseg.export import export
from routeseg.export.int8 import chosen, export_int8
from routeseg.files import write_json
from routeseg.model import Segmentation
from routeseg.prediction.onnx_runner import OnnxNetwork, prepare
from routeseg.prediction.sources import find_inputs

THREADS, SECONDS = 2, 60.0
TIMED_IMAGES = 4  # of CamVid: their routes differ
FULL_SIZE = (512, 1024)
FULL_NETWORK = {"depth": 16, "channels": 64, "classes": 19}


def as_forward(network: OnnxNetwork) -> Callable[[torch.Tensor], Segmentation]:
    """An exported file as `evaluate` runs it."""

    def forward(images: torch.Tensor) -> Segmentation:
        logits, gates = network.run(images.numpy())
        return Segmentation(torch.from_numpy(logits), torch.from_numpy(gates))

    return forward


def median_ms(files: dict[str, Path], images: list[np.ndarray]) -> dict[str, float]:
    """Milliseconds a forward of each file, the mean over images [1,3,H,W] uint8 of one size: medians, all in turns."""
    network = OnnxNetwork(next(iter(files.values()))).network
    times = alternate(
        [
            onnxruntime_method(f"{name} {number}", file, prepare(network, image), THREADS)
            for name, file in files.items()
            for number, image in enumerate(images)
        ],
        SECONDS,
    )
    return {
        name: statistics.mean(times[f"{name} {number}"]["median_ms"] for number in range(len(images))) for name in files
    }


def on_camvid(root: str, folder: Path) -> list[dict]:
    """A row for each file of a network with gates: accuracy over the validation set, and time."""
    model, data = routeseg.load(GATED), open_data(DataConfig(name="camvid", root=root), "val")
    training = find_inputs([f"{root}/train"])
    files = {
        "float32, dense": export(model, folder / "dense.onnx"),
        "int8, dense": export_int8(model, folder / "int8.onnx", training),
    }
    networks = {name: OnnxNetwork(file, THREADS) for name, file in files.items()}
    rows = []
    reference: list[np.ndarray] = []
    for name, network in networks.items():
        labels: dict[str, np.ndarray] = {}
        result = evaluate(model, evaluation_loader(data, 0), as_forward(network), on_prediction=labels.__setitem__)
        reference = reference or list(labels.values())
        same = [np.mean(one == other) for one, other in zip(labels.values(), reference, strict=True)]
        rows.append(
            {"file": name, "mb": files[name].stat().st_size / 1e6, "calibration_images": 0}
            | {"miou": result.miou, "pixel_accuracy": result.pixel_accuracy, "images": len(result.cost_macs)}
            | {"same_labels": float(np.mean(same)), "cost_gmacs": float(result.cost_macs.mean() / 1e9)}
        )
    rows[-1]["calibration_images"] = len(chosen(training))
    pictures = [data.read(number * len(data) // TIMED_IMAGES)[0] for number in range(TIMED_IMAGES)]
    times = median_ms(files, [picture.transpose(2, 0, 1)[None] for picture in pictures])
    return [row | {"size": list(pictures[0].shape[:2]), "median_ms": times[row["file"]]} for row in rows]


def full_size(folder: Path) -> list[dict]:
    """Time alone, of a static network with random weights and the statistics of random images."""
    network = random_network(**FULL_NETWORK, seed=0)
    model = network.specialize(routeseg.Route.all_open(network.config.space)).eval()
    image = (np.random.default_rng(0).random((*FULL_SIZE, 3)) * 255).astype(np.uint8)
    Image.fromarray(image).save(folder / "noise.png")
    files = {
        "float32": export(model, folder / "static.onnx"),
        "int8": export_int8(model, folder / "static_int8.onnx", [folder / "noise.png"]),
    }
    times = median_ms(files, [image.transpose(2, 0, 1)[None]])
    return [
        {"file": name, "mb": file.stat().st_size / 1e6, "size": list(FULL_SIZE), "median_ms": times[name]}
        for name, file in files.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of CamVid")
    parser.add_argument("--output", type=Path, default=Path("results/int8_camvid_cpu.json"))
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        camvid, full = on_camvid(args.root, Path(scratch)), full_size(Path(scratch))
    results = {"camvid": camvid, "full_size": FULL_NETWORK | {"results": full}, "seconds": SECONDS}
    facts = machine_facts()
    facts["versions"]["onnxruntime"] = onnxruntime.__version__
    write_json(args.output, {"network": GATED.name} | results | facts)
    print("| file | MB | mIoU | pixels right | labels as float32 | GMACs of its route | ms |\n" + "|---" * 7 + "|")
    for row in camvid:
        print(
            f"| {row['file']} | {row['mb']:.1f} | {100 * row['miou']:.2f} % | {100 * row['pixel_accuracy']:.2f} % "
            f"| {100 * row['same_labels']:.2f} % | {row['cost_gmacs']:.3f} | {row['median_ms']:.1f} |"
        )
    for row in full:
        print(f"| full size, {row['file']} | {row['mb']:.1f} |  |  |  |  | {row['median_ms']:.0f} |")


if __name__ == "__main__":
    main()
