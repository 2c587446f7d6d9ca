"""What benchmarks/inference.py measures in processes of their own: peak memory, and the time to a first result."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import routeseg
from inference_methods import GATED, in_words, new_network, plain_forward, precisions, random_images
from routeseg import SkipEngine
from routeseg.export import export

COMMAND = Path(__file__).with_name("inference.py")
MEMORY_SIZE, WARM_UP_SIZE = (1024, 2048), (64, 64)
STARTS, START_SIZE = 5, (360, 480)


def memory(args: Namespace) -> dict[str, Any]:
    """method -> MiB that a forward adds to the peak of its process, the logits it returns included."""
    found = {}
    for name in ("plain", *(f"engine {precision}" for precision in precisions(args.device))):
        words = [sys.executable, str(COMMAND), "--one", name, "--device", args.device, "--threads", str(args.threads)]
        words += ["--depth", str(args.depth), "--channels", str(args.channels), "--classes", str(args.classes)]
        words += ["--size", in_words(args.memory_size)]
        out = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment(args)).stdout
        found[name] = {"peak_mib": float(json.loads(out.splitlines()[-1]))}
    return {"size": in_words(args.memory_size), "methods": found}


@torch.inference_mode()
def memory_of(name: str, args: Namespace) -> float:
    """In a process of its own. The first forward, of a small image, takes what a library takes once."""
    model = new_network(args)
    kind, _, precision = name.partition(" ")
    forward = partial(plain_forward, model) if kind == "plain" else SkipEngine(model, precision)
    forward(random_images(1, WARM_UP_SIZE, args.seed).to(args.device))
    images = random_images(1, args.size[0], args.seed).to(args.device)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward(images)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: VmHWM is VmRSS
    before = resident_mib("VmRSS")
    forward(images)
    return resident_mib("VmHWM") - before


def resident_mib(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 2**10


START_ENGINE = """
import torch, routeseg
model = routeseg.load({network!r}).to({device!r})
routeseg.SkipEngine(model)(torch.zeros(1, 3, {height}, {width}, dtype=torch.uint8, device={device!r})).labels.cpu()
"""
START_ONNX = """
import numpy, routeseg
routeseg.OnnxNetwork({file!r})(numpy.zeros(({height}, {width}, 3), dtype=numpy.uint8))
"""


def startup(args: Namespace) -> dict[str, Any]:
    """program -> seconds from the start of the process to its first labels; the programs take turns."""
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = export(routeseg.load(GATED), Path(folder) / "net.onnx")
        places = {
            "network": str(GATED),
            "device": args.device,
            "file": str(file),
            "height": START_SIZE[0],
            "width": START_SIZE[1],
        }
        for _ in range(STARTS):
            for name, program in (("engine", START_ENGINE), ("onnx file", START_ONNX)):
                words = [sys.executable, "-c", program.format(**places) + "print('done', flush=True)"]
                start = time.perf_counter()
                with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment(args)) as process:
                    assert process.stdout is not None
                    if process.stdout.readline() != "done\n":
                        raise RuntimeError(f"the program of startup ({name}) failed")
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
    return {name: {"median_s": statistics.median(some), "min_s": min(some)} for name, some in seconds.items()}


def environment(args: Namespace) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(args.threads)}
