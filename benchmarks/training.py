"""Images per second and peak memory of a training step: dense forward, loss, backward, clipping, SGD step.

    python benchmarks/training.py [--device cuda] [--output results/training_cpu.json]
    python benchmarks/training.py --networks "diagonal,u-net,any budget" --output results/training_exits_cpu.json
    python benchmarks/training.py --camvid FOLDER       # whole trainings, to results/training_camvid_cpu.json

Every setting runs in a process of its own (for its peak memory) and rounds over the settings alternate, so that a
slow minute of the machine hits all of them. Medians are reported. On CPUs a step in float32 runs on the package's own
kernels (`ours`), and once more on PyTorch's operations. bf16 is left out on CPUs that are no faster at it.

With --camvid, camvid/small is trained with fewer iterations, in float32, on PyTorch's operations, then
on ours, from the same seed: losses, score and seconds of both.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from routeseg import Budget, DynamicRoutingNetwork, bfloat16
from routeseg.cli.common import config_parser, new_network, parts_of
from routeseg.evaluation import machine_facts
from routeseg.files import write_json
from routeseg.model.compute import PLAIN
from routeseg.training.recipe import BFLOAT16, FLOAT32, Recipe
from routeseg.training.report import read_log
from routeseg.training.run import RunOptions
from routeseg.training.segmentation import SegmentationTask, train
from routeseg.training.trial import step_seconds

SETTINGS = {
    "cpu": [
        ("gates", 8, 32, (240, 320), 8),
        ("gates", 16, 16, (240, 320), 8),
        ("gates", 16, 32, (352, 480), 2),
        ("gates", 16, 64, (256, 512), 1),
        ("diagonal", 8, 16, (240, 320), 8),
        ("u-net", 8, 16, (240, 320), 8),
        ("any budget", 8, 16, (240, 320), 8),
    ],
    "cuda": [
        ("gates", 16, 32, (352, 480), 8),
        ("gates", 16, 64, (768, 768), 8),
        ("gates", 33, 64, (768, 768), 8),
        ("any budget", 16, 32, (352, 480), 8),
    ],
}
STATIC = {"gate": "fixed", "route": "diagonal"}
KINDS = {
    "gates": {},
    "diagonal": STATIC,
    "u-net": STATIC | {"route": "u-net"},
    "any budget": STATIC | {"exits": [0, 1, 2, 3, 4, 5, 6]},
}
PRECISIONS = {"fp32": FLOAT32, "bf16": BFLOAT16}
CAMVID_CONFIG = "camvid/small"
ROUNDS = 3
CLASSES = 19


def measure(
    kind: str, depth: int, channels: int, size: tuple[int, int], batch: int, precision: str, ours: bool, device: str
) -> dict:
    """Seconds of a step (median), images per second, and the peak growth of memory in MiB."""
    torch.manual_seed(0)
    model = DynamicRoutingNetwork(num_classes=CLASSES, depth=depth, base_channels=channels, **KINDS[kind])
    model.compute = None if ours else PLAIN
    budget = Budget(0.5, 0.2 if kind == "gates" else 0.0, start=0.0, ramp=0.0)
    task = SegmentationTask(model, Recipe(), budget, size).to(device)
    images = torch.rand(batch, 3, *size, device=device)
    labels = torch.randint(0, CLASSES, (batch, *size), device=device)
    before = _memory_mib(device)
    (seconds,) = step_seconds(task, {"image": images, "labels": labels}, [PRECISIONS[precision]])
    step = statistics.median(seconds)
    return {"step_s": step, "images_per_s": batch / step, "peak_mib": _memory_mib(device) - before}


def _memory_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def whole_trainings(camvid: Path, iterations: int) -> dict:
    """Trains on CamVid on PyTorch's operations, then on ours: the loss of each logged step, mIoU and seconds."""
    found = {"iterations": iterations}
    for way in ("pytorch", "ours"):
        parser = config_parser("train")
        words = ["--config", str(CAMVID_CONFIG), "--data.root", str(camvid), "--recipe.iterations", str(iterations)]
        words += ["--recipe.precision", FLOAT32, "--recipe.validate_every", str(iterations), "--recipe.log_every", "1"]
        args = parser.parse_args(words)
        data, recipe, budget = parts_of(args)
        model = new_network(args, data, recipe)
        model.compute = PLAIN if way == "pytorch" else None
        with tempfile.TemporaryDirectory() as folder:
            result = train(model, data, recipe, budget, RunOptions(Path(folder), progress=False))
            losses = [float(row["loss"]) for row in read_log(Path(folder)) if row.get("loss")]
        found[way] = {"seconds": result.seconds, "miou": result.found.miou, "losses": losses}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=SETTINGS)
    parser.add_argument("--networks", default=",".join(KINDS), help="which of them, comma-separated")
    parser.add_argument("--camvid", type=Path, help="folder of CamVid: train on it instead")
    parser.add_argument("--iterations", type=int, default=240, help="of a training on CamVid")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(**json.loads(args.one), device=args.device)))
        return
    if args.camvid:
        found = whole_trainings(args.camvid, args.iterations)
        write_json(args.output or Path("results/training_camvid_cpu.json"), found | machine_facts())
        return
    emulates = args.device == "cpu" and bfloat16.product_ratio() >= 1
    ways = [("fp32", False)] + ([("bf16", False)] if not emulates else [])
    ways += [("fp32", True)] if args.device == "cpu" else []
    rows: dict[tuple, list[dict]] = {}
    kinds = args.networks.split(",")
    for _ in range(ROUNDS):
        for kind, depth, channels, size, batch in [one for one in SETTINGS[args.device] if one[0] in kinds]:
            for precision, ours in ways:
                setting = {"kind": kind, "depth": depth, "channels": channels, "size": size, "batch": batch}
                setting |= {"precision": precision, "ours": ours}
                command = [sys.executable, __file__, "--device", args.device, "--one", json.dumps(setting)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows.setdefault(tuple(setting.items()), []).append(json.loads(out.splitlines()[-1]))
    results = [
        {**dict(setting), **{key: statistics.median(run[key] for run in runs) for key in runs[0]}}
        for setting, runs in rows.items()
    ]
    output = args.output or Path(f"results/training_{args.device}.json")
    write_json(output, {"rounds": ROUNDS, "results": results, **machine_facts()})
    for row in results:
        size, way = "x".join(map(str, row["size"])), "ours" if row["ours"] else "PyTorch"
        print(
            f"{row['kind']}, depth {row['depth']}, {row['channels']} channels, {row['batch']} x {size}, "
            f"{row['precision']}, {way}: "
            f"{row['step_s']:.3f} s, {row['images_per_s']:.2f} images/s, {row['peak_mib']:.0f} MiB"
        )


if __name__ == "__main__":
    main()
