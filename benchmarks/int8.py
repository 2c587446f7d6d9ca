"""int8 against float32, in ONNX Runtime: accuracy on CamVid, and milliseconds an image.

    python benchmarks/int8.py --root path/to/camvid [--output results/int8_camvid_cpu.json]

The network that is shipped, with its gates: routed in float32 (closed paths skipped), dense in float32 and in int8
(every path computed). Calibrated with training images, scored on the validation set. Then a network of full size,
static and with random weights, for time alone: what int8 gains depends on the width. Rounds of the files alternate, so
that a slow minute of the machine hits all; medians are reported.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image

import routeseg
from routeseg.collection import find_inputs
from routeseg.data.datamodule import DataConfig, evaluation_loader, open_data
from routeseg.evaluation import evaluate, machine_facts
from routeseg.export import build_onnx
from routeseg.files import write_json
from routeseg.model import Segmentation
from routeseg.onnx_network import OnnxNetwork, prepare
from routeseg.quantization import chosen, export_int8

THREADS, ROUNDS, WARM_UP = 2, 15, 2
TIMED_IMAGES = 4  # of CamVid: their routes differ
FULL_SIZE = (512, 1024)
FULL_NETWORK = {"num_classes": 19, "depth": 16, "base_channels": 64, "gate": "fixed"}


def as_forward(network: OnnxNetwork) -> Callable[[torch.Tensor], Segmentation]:
    """An exported file as `evaluate` runs it."""

    def forward(images: torch.Tensor) -> Segmentation:
        logits, gates = network.run(images.numpy())
        return Segmentation(torch.from_numpy(logits), torch.from_numpy(gates))

    return forward


def write_float(model: routeseg.DynamicRoutingNetwork, path: Path, **kind: bool) -> Path:
    path.write_bytes(build_onnx(model, **kind).SerializeToString())
    return path


def median_ms(networks: dict[str, OnnxNetwork], images: list[np.ndarray]) -> dict[str, float]:
    """Milliseconds a forward of each network, over images [1,3,H,W]."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    for number in range(WARM_UP + ROUNDS):
        for image in images:
            for name, network in networks.items():
                pixels = prepare(network.network, image)
                start = time.perf_counter()
                network.session.run(["logits", "gates"], {"images": pixels})
                if number >= WARM_UP:
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(some) for name, some in times.items()}


def on_camvid(root: str, folder: Path) -> list[dict]:
    """A row for each file of the shipped network: accuracy over the validation set, and time."""
    model, data = routeseg.load(), open_data(DataConfig(name="camvid", root=root), "val")
    training = find_inputs([f"{root}/train"])
    files = {
        "float32, routed": write_float(model, folder / "routed.onnx", routed=True),
        "float32, dense": write_float(model, folder / "dense.onnx", dense=True),
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
    times = median_ms(networks, [picture.transpose(2, 0, 1)[None] for picture in pictures])
    return [row | {"size": list(pictures[0].shape[:2]), "median_ms": times[row["file"]]} for row in rows]


def full_size(folder: Path) -> list[dict]:
    """Time alone, of a static network with random weights and the statistics of random images."""
    torch.manual_seed(0)
    model = routeseg.DynamicRoutingNetwork(**FULL_NETWORK)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.rand(2, 3, *FULL_SIZE) ** 2)
    image = (np.random.default_rng(0).random((*FULL_SIZE, 3)) * 255).astype(np.uint8)
    Image.fromarray(image).save(folder / "noise.png")
    files = {
        "float32": write_float(model.eval(), folder / "static.onnx"),
        "int8": export_int8(model, folder / "static_int8.onnx", [folder / "noise.png"]),
    }
    times = median_ms(
        {name: OnnxNetwork(file, THREADS) for name, file in files.items()}, [image.transpose(2, 0, 1)[None]]
    )
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
    results = {"camvid": camvid, "full_size": FULL_NETWORK | {"results": full}, "rounds": ROUNDS}
    facts = machine_facts()
    facts["versions"]["onnxruntime"] = onnxruntime.__version__
    write_json(args.output, {"network": routeseg.checkpoints.PRETRAINED.name} | results | facts)
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
