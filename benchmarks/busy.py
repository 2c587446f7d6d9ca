"""PyTorch's threads that wait for each other: asleep (OMP_WAIT_POLICY=PASSIVE) or spinning (unset), on an idle machine
and beside a process that keeps one core busy.

    python benchmarks/busy.py

A step of training with PyTorch's operations (depth 8, 16 channels, 4 crops of 240x320), the same on the training
kernels, and a forward of PyTorch's operations at 360x480; then the three of a small network (depth 4, 8 channels,
96x128). Steps a second in processes of their own, taking turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

OUTPUT = Path("results/busy_cpu.json")
POLICIES = ("spinning", "asleep")
BUSY = "while True: pass"
WORKS = ("training", "training_kernels", "forward", "small_training", "small_training_kernels", "small_forward")


def measure(seconds: float) -> dict[str, float]:
    """Steps a second of each kind of work, in this process."""
    import torch

    from routeseg import DynamicRoutingNetwork
    from routeseg.training.fused import Fused

    torch.manual_seed(0)

    def works(depth: int, channels: int, size: tuple[int, int], whole: tuple[int, int]) -> list[Callable[[], object]]:
        images, labels = torch.rand(4, 3, *size), torch.randint(0, 5, (4, *size))
        shape = {"depth": depth, "base_channels": channels, "stem_channels": channels, "num_classes": 5}
        plain, fused = (DynamicRoutingNetwork(**shape) for _ in range(2))
        fused.compute = Fused()

        def train(model: DynamicRoutingNetwork) -> None:
            torch.nn.functional.cross_entropy(model(images).logits, labels).backward()

        return [
            lambda: train(plain),
            lambda: train(fused),
            torch.no_grad()(lambda: plain(torch.rand(1, 3, *whole))),
        ]

    found = {}
    both = [*works(8, 16, (240, 320), (360, 480)), *works(4, 8, (96, 128), (96, 128))]
    for name, work in zip(WORKS, both, strict=True):
        work()
        steps, start = 0, time.perf_counter()
        while (took := time.perf_counter() - start) < seconds:
            work()
            steps += 1
        found[name] = steps / took
    return found


def run(policy: str, busy: bool, seconds: float) -> dict[str, float]:
    """`measure` in a process with this policy, beside a busy process or not."""
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    if policy == "asleep":
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    other = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    try:
        command = [sys.executable, __file__, "--measure", str(seconds)]
        return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    finally:
        if other is not None:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--measure", type=float, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.measure)))
        return

    from routeseg.evaluation import machine_facts
    from routeseg.files import write_json

    report: dict[str, dict[str, dict[str, float]]] = {}
    for machine, busy in (("idle", False), ("one_core_busy", True)):
        rounds = [{policy: run(policy, busy, args.seconds) for policy in POLICIES} for _ in range(args.rounds)]
        report[machine] = {
            work: {policy: float(np.median([one[policy][work] for one in rounds])) for policy in POLICIES}
            for work in rounds[0][POLICIES[0]]
        }
        for work, found in report[machine].items():
            found["ratio"] = found["asleep"] / found["spinning"]
            print(f"{machine} {work}: {found['spinning']:.1f} -> {found['asleep']:.1f} a second ({found['ratio']:.2f})")
    write_json(args.output, {"steps_per_second": report} | machine_facts())


if __name__ == "__main__":
    main()
