"""Images per second and peak memory of a training step: dense forward, loss, backward, SGD step.

    python benchmarks/training.py [--device cuda] [--output results/training_cpu.json]

Every setting runs in a process of its own (for its peak memory) and rounds over the settings alternate, so that a
slow minute of the machine hits all of them. Medians are reported.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from routeseg import Budget, DynamicRoutingNetwork
from routeseg.evaluation import machine_facts
from routeseg.files import write_json
from routeseg.training.recipe import Recipe
from routeseg.training.segmentation import SegmentationTask
from routeseg.training.task import parameter_groups

SETTINGS = {
    "cpu": [(8, 32, (240, 320), 4), (16, 32, (240, 320), 4), (16, 32, (352, 480), 2), (16, 64, (256, 512), 1)],
    "cuda": [(16, 32, (352, 480), 8), (16, 64, (768, 768), 8), (33, 64, (768, 768), 8)],
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS, STEPS = 3, 3
CLASSES = 19


def measure(depth: int, channels: int, size: tuple[int, int], batch: int, precision: str, device: str) -> dict:
    """Seconds of a step (median), images per second, and the peak growth of memory in MiB."""
    torch.manual_seed(0)
    model = DynamicRoutingNetwork(num_classes=CLASSES, depth=depth, base_channels=channels).to(
        device, memory_format=torch.channels_last
    )
    optimizer = torch.optim.SGD(parameter_groups(model, Recipe()), lr=0.01, momentum=0.9)
    task = SegmentationTask(model, Recipe(), Budget(0.5, 0.2, start=0.0, ramp=0.0), size)
    images = torch.rand(batch, 3, *size, device=device)
    labels = torch.randint(0, CLASSES, (batch, *size), device=device)
    before = _memory_mib(device)
    seconds = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        with torch.autocast(device, PRECISIONS[precision], enabled=precision != "fp32"):
            loss = task.part(images, labels, task.count(labels)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[1:])
    return {"step_s": step, "images_per_s": batch / step, "peak_mib": _memory_mib(device) - before}


def _memory_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=SETTINGS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(**json.loads(args.one), device=args.device)))
        return
    rows: dict[tuple, list[dict]] = {}
    for _ in range(ROUNDS):
        for depth, channels, size, batch in SETTINGS[args.device]:
            for precision in PRECISIONS:
                setting = {"depth": depth, "channels": channels, "size": size, "batch": batch, "precision": precision}
                command = [sys.executable, __file__, "--device", args.device, "--one", json.dumps(setting)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows.setdefault(tuple(setting.items()), []).append(json.loads(out.splitlines()[-1]))
    results = [
        {**dict(setting), **{key: statistics.median(run[key] for run in runs) for key in runs[0]}}
        for setting, runs in rows.items()
    ]
    output = args.output or Path(f"results/training_{args.device}.json")
    write_json(output, {"rounds": ROUNDS, "results": results, **machine_facts()})
    print("| depth | channels | crop | batch | precision | images/s | peak MiB |\n|---|---|---|---|---|---|---|")
    for r in results:
        size = "x".join(map(str, r["size"]))
        print(
            f"| {r['depth']} | {r['channels']} | {size} | {r['batch']} | {r['precision']} "
            f"| {r['images_per_s']:.2f} | {r['peak_mib']:.0f} |"
        )


if __name__ == "__main__":
    main()
