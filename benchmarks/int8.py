"""int8 against float32, in ONNX Runtime: accuracy on CamVid, and milliseconds an image.

    python benchmarks/int8.py --root path/to/camvid [--output results/int8_camvid_cpu.json]
    python benchmarks/int8.py --root path/to/camvid --exits [--images 30] [--output results/export_exits_cpu.json]

A network with gates, in float32 and in int8, calibrated with training images, scored on the validation set. Then a
network of full size, static and with random weights, for time alone: what int8 gains depends on the width. Times are
medians of files in turns, each made for the image's size, as benchmarks/inference.py takes them.

With --exits: the bundled network as a file that takes a price, in float32 and int8. Scores and exits stand beside those
of the checkpoint, times beside those of static files up to an exit, in each runtime that is installed.

Processors with VNNI and without differ in time: the results name the processor's instructions (`machine.isa`). Give
--output on a machine of another kind than that of the results at hand, to keep both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image

import routeseg
from inference_methods import GATED, alternate, onnxruntime_method, openvino_method, random_network
from routeseg.budgets.asked import Asked
from routeseg.cost.macs import model_cost
from routeseg.data.config import DataConfig, open_data
from routeseg.data.loaders import evaluation_loader
from routeseg.evaluation import evaluate, machine_facts
from routeseg.evaluation.scores import count_pairs
from routeseg.export import export
from routeseg.export.int8 import chosen, export_int8
from routeseg.files import write_json
from routeseg.model import Segmentation
from routeseg.prediction.onnx_runner import OnnxNetwork, as_float
from routeseg.prediction.sources import find_inputs
from routeseg.prediction.torch_runner import open_network

THREADS, SECONDS = int(os.environ.get("OMP_NUM_THREADS", 2)), 60.0
BUDGETS = ("35%", "50%", "75%", "100%")
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
    times = alternate(
        [
            onnxruntime_method(f"{name} {number}", file, as_float(image), THREADS)
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


def scores_of_exits(
    model: routeseg.DynamicRoutingNetwork, files: dict[str, Path], images: list[tuple[np.ndarray, np.ndarray]]
) -> list[dict]:
    """A row for each budget and file: mIoU, and how many labels and exits are those of the checkpoint."""
    rows, classes = [], model.config.num_classes
    for budget in BUDGETS:
        runners = {"checkpoint": open_network(model, budget=Asked.parse(budget))}
        runners |= {name: OnnxNetwork(file, THREADS, budget=budget) for name, file in files.items()}
        expected = [runners["checkpoint"](image) for image, _ in images]
        for name, runner in runners.items():
            found = [runner(image) for image, _ in images]
            pairs = list(zip(found, expected, strict=True))
            truth, labels = (
                torch.from_numpy(np.stack(some)).long()
                for some in ([labels for _, labels in images], [one.labels for one in found])
            )
            confusion = count_pairs(truth, labels, classes)
            hits, there = confusion.diag(), confusion.sum(1) > 0
            iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)
            shares = [float(model_cost(model, one.labels.shape).of_gates(one.gates)) for one in found]
            rows.append(
                {"budget": budget, "file": name, "images": len(images), "miou": float(iou[there].mean())}
                | {"same_labels": float(np.mean([np.mean(one.labels == other.labels) for one, other in pairs]))}
                | {"same_exits": float(np.mean([np.array_equal(one.gates, other.gates) for one, other in pairs]))}
                | {"share": float(np.mean(shares)) / model_cost(model, images[0][0].shape[:2]).full}
            )
    return rows


def times_of_exits(
    model: routeseg.DynamicRoutingNetwork, image: np.ndarray, folder: Path, training: list, seconds: float
) -> dict[str, dict]:
    """name -> times: the file with exits at the prices that send all images to the last exit and to the first one, and
    static files that end there."""
    table, routes, methods = model.exits.table, list(model.config.named_routes.items()), []
    pixels = as_float(image.transpose(2, 0, 1)[None])
    made = {"float32": lambda one, name: export(one, folder / name)}
    made["int8"] = lambda one, name: export_int8(one, folder / name, training)
    made["float32, labels"] = lambda one, name: export(one, folder / name, labels=True)
    for kind, make in made.items():
        several = make(model, f"exits {kind}.onnx")
        for (exit, route), price in ((routes[-1], table.prices[0]), (routes[0], table.prices[-1])):
            one = make(model.specialize(route).eval(), f"{exit} {kind}.onnx")
            for name, file, asked in (
                (f"static {exit}", one, None),
                (f"exits, leaves at {exit}", several, float(price)),
            ):
                methods.append(onnxruntime_method(f"{name}, {kind}, ONNX Runtime", file, pixels, THREADS, price=asked))
                if find_spec("openvino"):
                    words = f"{name}, {kind}, OpenVINO"
                    methods.append(openvino_method(words, file, pixels, THREADS, "float32", price=asked))
    return alternate(methods, seconds)


def exits(root: str, count: int, seconds: float) -> dict[str, Any]:
    """What --exits measures."""
    model, data = routeseg.load().eval(), open_data(DataConfig(name="camvid", root=root), "val")
    images = [data.read(number * len(data) // count) for number in range(count)]
    training = find_inputs([f"{root}/train"])
    with tempfile.TemporaryDirectory() as scratch:
        files = {"float32": export(model, Path(scratch) / "net.onnx")}
        files["int8"] = export_int8(model, Path(scratch) / "int8.onnx", training)
        sizes = {name: file.stat().st_size / 1e6 for name, file in files.items()}
        scores = scores_of_exits(model, files, images)
        times = times_of_exits(model, images[0][0], Path(scratch), training, seconds)
    return {"mb": sizes, "scores": scores, "size": list(images[0][0].shape[:2]), "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of CamVid")
    parser.add_argument("--output", type=Path, help="default: results/int8_camvid_cpu.json, or export_exits_cpu.json")
    parser.add_argument("--exits", action="store_true", help="the bundled network as a file with exits")
    parser.add_argument("--images", type=int, default=101, help="with --exits, of the validation set, evenly spread")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="with --exits, of all methods in turns")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    output = args.output or Path("results", "export_exits_cpu.json" if args.exits else "int8_camvid_cpu.json")
    if args.exits:
        found, facts = exits(args.root, args.images, args.seconds), machine_facts()
        facts["versions"] |= {name: version(name) for name in ("onnxruntime", "openvino") if find_spec(name)}
        busy = {"threads": THREADS, "load_average": os.getloadavg()}
        write_json(output, {"network": "bundled", "seconds": args.seconds} | found | busy | facts)
        for row in found["scores"]:
            print(" ".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
        for name, row in found["times"].items():
            print(f"{row['median_ms']:7.1f} ms, least {row['min_ms']:.1f}  {name}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        camvid, full = on_camvid(args.root, Path(scratch)), full_size(Path(scratch))
    results = {"camvid": camvid, "full_size": FULL_NETWORK | {"results": full}, "seconds": SECONDS}
    facts = machine_facts()
    facts["versions"]["onnxruntime"] = onnxruntime.__version__
    write_json(output, {"network": GATED.name} | results | facts)
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
