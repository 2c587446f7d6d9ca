"""Images per second of `routeseg predict`: the plain command, all of the network and half of its cost, against ONNX
Runtime with the same network, all of it, and against one and two workers of Ray. Same images; decoding and writing are
in it.

    python benchmarks/prediction.py [--output results/prediction_cpu.json]

Procedural scenes and the network that is shipped. Rounds of the ways alternate, each in a process of its own, so that a
slow minute of the machine hits all. Medians are reported. The rate is that of the images behind the first
eighth, for each worker takes some to get going. Start-up is what comes before: the workers and the first forwards.
Importing and starting Ray itself, once for a command, is reported apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from PIL import Image

import routeseg
from routeseg.budgets.asked import Asked
from routeseg.data.scenes import draw_scene
from routeseg.evaluation import machine_facts
from routeseg.export import export
from routeseg.files import write_json
from routeseg.model import DynamicRoutingNetwork, checkpoints
from routeseg.prediction.files import Runner, predict_files
from routeseg.prediction.onnx_runner import OnnxNetwork
from routeseg.prediction.ray import BLOCKS_PER_WORKER, predict_with_ray, ray_session
from routeseg.prediction.torch_runner import open_network

SIZE = (256, 512)
IMAGES = {True: 24, False: 96}  # with images of overlay and route, which take most of the time, and without
WORKERS: dict[str, tuple[int | None, ...]] = {"plain": (None,), "50%": (None,), "onnx": (None,), "ray": (1, 2)}
ROUNDS = 2


def measure(way: str, folder: str) -> list[dict]:
    """One row for each setting of a way: images per second, seconds of start-up, and seconds of all."""
    start = time.perf_counter()
    with ExitStack() as stack:
        if way == "ray":
            import ray.data  # noqa: F401

            stack.enter_context(ray_session(workers=max(WORKERS["ray"])))
        begin_s = time.perf_counter() - start
        return [
            {"way": way, "workers": workers, "pictures": pictures, "images": IMAGES[pictures]}
            | measure_run(way, workers, pictures, folder)
            | {"begin_s": begin_s}
            for pictures in IMAGES
            for workers in WORKERS[way]
        ]


def runner_of(way: str, model: DynamicRoutingNetwork, folder: str) -> Runner:
    if way != "onnx":
        return open_network(model, budget=Asked.parse(way) if way.endswith("%") else None)
    file = Path(folder) / "full.onnx"
    if not file.exists():
        export(model.specialize(model.route), file, labels=True)
    return OnnxNetwork(file, torch.get_num_threads())


def measure_run(way: str, workers: int | None, pictures: bool, folder: str) -> dict[str, float]:
    images = sorted(Path(folder).glob("*.png"))[: IMAGES[pictures]]
    model = routeseg.load()
    arrivals = []
    with tempfile.TemporaryDirectory() as output:
        start = time.perf_counter()

        def arrive() -> None:
            arrivals.append(time.perf_counter() - start)

        if workers is not None:
            opener, network = partial(open_network, model), open_network(model).network
            predict_with_ray(opener, network, images, output, workers, on_image=arrive, pictures=pictures)
        else:
            predict_files(runner_of(way, model, folder), images, output, on_image=arrive, pictures=pictures)
    first = len(images) // BLOCKS_PER_WORKER
    rate = (len(images) - first) / (arrivals[-1] - arrivals[first - 1])
    return {"images_per_s": rate, "startup_s": arrivals[first - 1] - first / rate, "whole_s": arrivals[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/prediction_cpu.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(**json.loads(args.one))))
        return
    runs: dict[tuple, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(max(IMAGES.values())):
            Image.fromarray(draw_scene(0, number, SIZE)[0]).save(Path(folder) / f"{number:02d}.png")
        for _ in range(ROUNDS):
            for way in WORKERS:
                command = [sys.executable, __file__, "--one", json.dumps({"way": way, "folder": folder})]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                for row in json.loads(out.splitlines()[-1]):
                    setting = tuple((key, row.pop(key)) for key in ("way", "workers", "pictures", "images"))
                    runs.setdefault(setting, []).append(row)
    results = [
        dict(setting) | {key: statistics.median(run[key] for run in some) for key in some[0]}
        for setting, some in runs.items()
    ]
    network = {"network": checkpoints.PRETRAINED.name, "size": list(SIZE), "rounds": ROUNDS}
    write_json(args.output, {**network, "results": results, **machine_facts()})
    print("| way | workers | pictures | images | images/s | start-up, s | all, s | Ray, s |\n" + "|---" * 8 + "|")
    for r in results:
        print(
            f"| {r['way']} | {r['workers'] or ''} | {r['pictures']} | {r['images']} "
            f"| {r['images_per_s']:.2f} | {r['startup_s']:.1f} | {r['whole_s']:.1f} | {r['begin_s']:.1f} |"
        )


if __name__ == "__main__":
    main()
