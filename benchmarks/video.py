"""A frame rate that holds while others use the machine; what it costs in score; and two smaller questions about video.

    python benchmarks/video.py --data.root FOLDER [--output results/video_cpu.json]

FOLDER is CamVid (docs/data.md), whose validation frames are a video at 1 Hz. It is written as one, and goes through
what `routeseg predict` does, overlays and all, with the bundled network and one thread. This process and a
load that comes and goes share one core (Linux). About four minutes on an idle machine.

    pace      frames with a time to keep (`--frame_ms`), against a fixed budget of the same mean cost, and against all
              that the network has; the load does what it did before in each of them
    keeping   what asking the exits costs, and what is lost if a route is kept for k frames, or as long as the image
              is much the same. Without a load
    decoding  milliseconds of a frame as RGB, PyAV against OpenCV, in turns
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from inference_methods import GATED
from routeseg.budgets.asked import Asked
from routeseg.budgets.budgeted import Budgeted, Steered
from routeseg.data.sets.camvid import open_camvid
from routeseg.engine import SkipEngine
from routeseg.evaluation import machine_facts
from routeseg.evaluation.scores import count_pairs
from routeseg.files import write_json
from routeseg.model import DynamicRoutingNetwork, checkpoints
from routeseg.prediction.clips import VideoWriter, open_clip
from routeseg.prediction.files import Ran
from routeseg.prediction.torch_runner import TorchNetwork
from routeseg.prediction.video import FramePace, predict_video
from routeseg.space import Route

RATE = 15  # frames a second of the video that is written; nothing waits for it
LOAD_S = 4.0  # it works for so long, then rests for so long
TARGETS = (1.1, 1.5)  # what a frame may take, as a multiple of the whole network's frame without a load
LATEST = 95  # percentile
KEPT = (2, 8)  # frames for which a route is kept
ALIKE = (8.0,)  # mean difference of two frames, of 255, up to which a route is kept
BUDGETS = (0.5, 0.75)
ASKED_AND_GIVEN = 50  # frames
THUMBNAIL = (32, 24)  # width, height, in which frames are compared
DECODED, DECODING_ROUNDS = {"480x360": (480, 360), "1920x1080": (1920, 1080)}, 5
LOAD = """
import os, sys, time
parent = os.getppid()
for line in sys.stdin:
    while os.getppid() == parent:
        time.sleep(float(line))
        end = time.monotonic() + float(line)
        while time.monotonic() < end:
            pass
"""


@contextmanager
def load() -> Iterator[None]:
    """Another process on this core, which rests for LOAD_S, works for LOAD_S, and so on, from now on."""
    with subprocess.Popen([sys.executable, "-c", LOAD], stdin=subprocess.PIPE, text=True) as process:
        time.sleep(1)
        assert process.stdin is not None
        process.stdin.write(f"{LOAD_S}\n")
        process.stdin.flush()
        try:
            yield
        finally:
            process.kill()


class Scored:
    """A runner that keeps what it found."""

    def __init__(self, forward: Any, model: DynamicRoutingNetwork) -> None:
        self.runner = TorchNetwork(forward, model)
        self.network, self.precision, self.forward = self.runner.network, self.runner.precision, forward
        self.found: list[np.ndarray] = []

    def __call__(self, image: np.ndarray) -> Ran:
        ran = self.runner(image)
        self.found.append(ran.labels)
        return ran


def mean_iou(found: Sequence[np.ndarray], truth: Sequence[np.ndarray], classes: int) -> float:
    """Of frames that repeat the labelled ones; pixels summed over all, mean over the classes that labels have."""
    counts = np.zeros((classes, classes), np.int64)
    for number, labels in enumerate(found):
        known = truth[number % len(truth)]
        pair = (torch.from_numpy(one.astype(np.int64)) for one in (known, labels))
        counts += count_pairs(*pair, classes).numpy()
    union, there = counts.sum(0) + counts.sum(1) - np.diag(counts), counts.sum(1) > 0
    return float((np.diag(counts)[there] / union[there]).mean())


def write_clip(path: Path, images: Sequence[np.ndarray], size: tuple[int, int] | None = None) -> Path:
    """The images as a video, resized to (width, height)."""
    images = [image if size is None else cv2.resize(image, size) for image in images]
    writer = VideoWriter(path, images[0].shape[:2], Fraction(RATE))
    for number, image in enumerate(images):
        writer.write(image, number / RATE)
    writer.finish()
    return path


def run(
    clip: Path,
    scored: Scored,
    truth: Sequence[np.ndarray],
    frame_ms: float | None = None,
    loaded: bool = True,
) -> dict[str, Any]:
    """One walk through the video: times of its frames, cost, score."""
    pace = None if frame_ms is None else FramePace(scored.forward, frame_ms)
    with tempfile.TemporaryDirectory() as output:
        with load() if loaded else nullcontext():
            summary = predict_video(scored, open_clip(clip), output, "clip", pace=pace)
        rows = [line.split(",") for line in (Path(output) / "clip_frames.csv").read_text().splitlines()]
    column = {name: place for place, name in enumerate(rows[0])}
    times = np.array([float(row[column["frame_ms"]]) for row in rows[1:]])
    return {
        "frames": summary.frames,
        "mean_ms": float(times.mean()),
        "median_ms": float(np.median(times)),
        "p95_ms": float(np.percentile(times, LATEST)),
        "share": summary.shares[0],
        "miou": mean_iou(scored.found[-len(times) :], truth, scored.network.config.num_classes),
        "frame_ms": [round(float(one), 1) for one in times],
        "exits": [int(row[column["exit"]]) for row in rows[1:]],
    }


def late(found: dict[str, Any], frame_ms: float) -> dict[str, Any]:
    """A run against a time that was asked for, without its single frames."""
    kept = {key: value for key, value in found.items() if key not in ("frame_ms", "exits")}
    times = np.array(found["frame_ms"])
    return kept | {"late": float((times > frame_ms).mean()), "p95_of_asked": found["p95_ms"] / frame_ms}


def measure_pace(
    images: Sequence[np.ndarray], rounds: int, model: DynamicRoutingNetwork, truth: Sequence[np.ndarray]
) -> dict[str, Any]:
    """`paced` keeps the time; `fixed` has the same mean cost as a budget; `whole` and `cheapest` are the last level and
    the first."""
    engine = SkipEngine(model)
    dearest = len(Steered(engine, model).levels) - 1
    with tempfile.TemporaryDirectory() as folder:
        once = write_clip(Path(folder) / "once.mp4", images)
        clip = write_clip(Path(folder) / "clip.mp4", list(images) * rounds)

        def at(level: int) -> Scored:
            scored = Scored(Steered(engine, model), model)
            scored.forward.level = level
            return scored

        alone = run(once, at(dearest), truth, loaded=False)
        ends = {"whole": run(clip, at(dearest), truth), "cheapest": run(clip, at(0), truth)}
        targets = []
        for factor in TARGETS:
            frame_ms = factor * alone["median_ms"]
            paced = run(clip, at(0), truth, frame_ms)
            asked = Asked(max(paced["share"], float(model.exits.costs[0])), "share")
            found = {"paced": paced, "fixed": run(clip, Scored(Budgeted(engine, model, asked), model), truth), **ends}
            ways = {name: late(one, frame_ms) for name, one in found.items()}
            seen = {"exits": paced["exits"], "frame_ms": paced["frame_ms"]}
            targets.append({"asked_ms": frame_ms, "asked_fps": 1000 / frame_ms, "ways": ways, "paced_frames": seen})
            print(f"asked {frame_ms:.0f} ms")
            for name, row in ways.items():
                print(
                    f"  {name:8} p95 {row['p95_ms']:.0f} ms, {100 * row['late']:.1f} % late, "
                    f"{1000 / row['mean_ms']:.1f} fps, {100 * row['share']:.0f} % cost, {100 * row['miou']:.1f} % mIoU",
                    flush=True,
                )
    return {"alone": late(alone, alone["median_ms"]), "targets": targets}


def measure_keeping(
    images: Sequence[np.ndarray], model: DynamicRoutingNetwork, truth: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    """For each budget and way: what a frame takes, its cost, the score, and how often the route was asked for."""
    engine, classes = SkipEngine(model), model.config.num_classes
    pixels = [torch.from_numpy(image.transpose(2, 0, 1).copy())[None] for image in images]
    thumbnails = [cv2.resize(image, THUMBNAIL, interpolation=cv2.INTER_AREA).astype(np.float32) for image in images]

    def walk(budget: float | None, asks: Callable[[int, int], bool]) -> dict[str, Any]:
        """`asks(frame, asked)`: whether this frame asks anew, where the route is that of the frame `asked`."""
        found, times, gates, asked, route = [], [], [], 0, None
        for number, image in enumerate(pixels):
            start = time.perf_counter()
            anew = route is None or asks(number, asked)
            result = engine(image, budget=budget) if anew else engine(image, route)
            times.append(1000 * (time.perf_counter() - start))
            if anew:
                asked, route = number, Route.from_gates(model.space, result.gates[0].numpy())
            found.append(result.labels[0].numpy())
            gates.append(anew)
        return {
            "mean_ms": float(np.mean(times)),
            "median_ms": float(np.median(times)),
            "miou": mean_iou(found, truth, classes),
            "asked": float(np.mean(gates)),
        }

    ways: dict[str, Callable[[int, int], bool]] = {"each frame asks": lambda number, asked: True}
    ways |= {f"kept for {k} frames": lambda number, asked, k=k: number - asked >= k for k in KEPT}
    ways |= {
        f"kept up to a difference of {most:g}": lambda number, asked, most=most: (
            float(np.abs(thumbnails[number] - thumbnails[asked]).mean()) > most
        )
        for most in ALIKE
    }
    budgets: Sequence[float | None] = BUDGETS if model.exits is not None else (None,)
    rows = [{"budget": one, "way": name, **walk(one, asks)} for one in budgets for name, asks in ways.items()]
    for budget in budgets:  # the same routes, asked for and given, in turns: what asking itself takes
        pairs = []
        for image in pixels[:ASKED_AND_GIVEN]:
            start = time.perf_counter()
            result = engine(image, budget=budget)
            middle = time.perf_counter()
            engine(image, Route.from_gates(model.space, result.gates[0].numpy()))
            pairs.append((1000 * (middle - start), 1000 * (time.perf_counter() - middle)))
        asking, given = np.median(pairs, axis=0)
        rows.append(
            {"budget": budget, "way": "the same routes, given", "median_ms": float(given), "asking_ms": float(asking)}
        )
    return rows


def measure_decoding(images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Milliseconds of a frame, median of the rounds."""

    def by_pyav(path: Path) -> int:
        clip = open_clip(path)
        count = sum(1 for _ in clip)
        clip.close()
        return count

    def by_opencv(path: Path) -> int:
        video, count = cv2.VideoCapture(str(path)), 0
        while True:
            there, picture = video.read()
            if not there:
                video.release()
                return count
            cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
            count += 1

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, size in DECODED.items():
            path = write_clip(Path(folder) / f"{name}.mp4", images, size)
            times: dict[str, list[float]] = {"pyav": [], "opencv": []}
            for _ in range(DECODING_ROUNDS):
                for way, decode in (("pyav", by_pyav), ("opencv", by_opencv)):
                    start = time.perf_counter()
                    count = decode(path)
                    times[way].append(1000 * (time.perf_counter() - start) / count)
            found = {way: statistics.median(some) for way, some in times.items()}
            rows.append({"size": name, "ms": found, "opencv_of_pyav": found["opencv"] / found["pyav"]})
    return rows


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.root", dest="root", type=Path, required=True, help="the folder of CamVid")
    parser.add_argument("--split", default="val", help="whose frames they are; the network has learnt those of train")
    parser.add_argument("--frames", type=int, help="the first so many of them; all by default")
    parser.add_argument("--rounds", type=int, default=2, help="how often the video shows them")
    parser.add_argument("--output", type=Path, default=Path("results/video_cpu.json"))
    args = parser.parse_args(words)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    pictures = open_camvid(args.root, args.split)
    pairs = [pictures.read(number) for number in range(len(pictures))[: args.frames]]
    images, truth = [image for image, _ in pairs], [labels for _, labels in pairs]
    model, gated = (checkpoints.load(path).eval() for path in (None, GATED))
    facts: dict[str, Any] = {"split": args.split, "frames": len(images), "rounds": args.rounds, "load_s": LOAD_S}
    facts["decoding"] = measure_decoding(images[:40])
    facts["pace"] = measure_pace(images, args.rounds, model, truth)
    facts["keeping"] = [
        {"network": name, **row}
        for name, one in ((checkpoints.PRETRAINED.name, model), (GATED.name, gated))
        for row in measure_keeping(images, one, truth)
    ]
    write_json(args.output, facts | machine_facts())
    print(f"\n{args.output}")
    for row in facts["decoding"] + facts["keeping"]:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    main()
