"""Does time follow the cost? Milliseconds of a network whose places leave, at shares of its cost, by the clock.

    python benchmarks/clock.py bundled --data.name camvid --data.root FOLDER --output results/places_clock_avx2.json

For images at each of --sizes (HEIGHTxWIDTH, resized) it writes the time from an image to its labels,

    full       all layers, by the kernels; `onnx`: the exported full network in ONNX Runtime, beside it in turns, whose
               file has the most likely class in it, too; `openvino` the same, if that is installed; and the networks
               of baselines.py in ONNX Runtime, by their names
    smaller    all layers of the image at each of SMALLER of its sides; `onnx` of an image that was made smaller before
    places     at each of SHARES as a budget of each image, which is looked at as it is: the share of the MACs that is
               spent, and of the full network's time
    budgets    at each of BUDGETS as `routeseg predict --budget` keeps it, which may look at a smaller image
    bfloat16   full and budgets in it, on machines that compute in it
    call       of `routeseg.load()(array)`, which checks the weights and counts the cost as well
    miou       at the first of the sizes: of each way, over --scored images
    asked      at the first of the sizes: what budgets of --asked_ms take as the mean over the images, by tables that
               are measured right before

Times are medians over the images of the median of rounds in which all ways take turns. One process, threads as PyTorch
takes them (OMP_NUM_THREADS); for an idle machine. --figure draws scores against time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import baselines
import routeseg
from inference_methods import openvino_method
from places import miou, spent_share
from routeseg.budgets.asked import Asked
from routeseg.budgets.budgeted import Budgeted
from routeseg.data.config import DataConfig, open_data
from routeseg.data.loaders import evaluation_loader
from routeseg.data.subset import evenly_spread
from routeseg.engine import SkipEngine
from routeseg.engine.compiled import is_compiled
from routeseg.engine.profiling import profile
from routeseg.evaluation import machine_facts
from routeseg.evaluation.scores import count_pairs
from routeseg.export import export
from routeseg.figures.common import BLUE, MUTED, ORANGE, new_figure, picture_kind, plain_axes, save_figure
from routeseg.files import write_json
from routeseg.model import DynamicRoutingNetwork
from routeseg.prediction.onnx_runner import OnnxNetwork
from routeseg.space import seen_size
from routeseg.stopwatch import take_turns

SHARES = (0.35, 0.5, 0.65, 0.8)
REST_S = 0.1  # behind other runtimes, whose threads spin for a while
BUDGETS = ("15%", "25%", "35%", "50%", "60%", "75%", "100%")
SMALLER = (0.42, 0.5, 0.6, 0.7, 0.85)
STYLES = ((BLUE, "o-"), (ORANGE, "s--"), (MUTED, "^:"))


def ways(model: DynamicRoutingNetwork, engine: Any, own: tuple[int, int]) -> dict[str, Callable[[Tensor], Any]]:
    """What is timed, by name."""
    found: dict[str, Callable[[Tensor], Any]] = {"full": partial(engine.labels, price=0.0)}
    least = float(model.exits.costs[0]) if model.exits is not None else 1.0
    for share in SHARES:
        if model.config.place is not None and share > least:
            found[f"places {share:g}"] = partial(engine.labels, budget=share, per_image=True, size=1.0)
    precisions: dict[str, Any] = {"": "float32"}
    if is_compiled(torch.bfloat16):
        precisions[" bfloat16"] = "bfloat16"
        found["full bfloat16"] = partial(SkipEngine(model, "bfloat16").labels, price=0.0)
    for name, precision in precisions.items():
        for text in BUDGETS:  # each with an engine of its own, whose memory stays that of its sizes
            look, one = Asked.parse(text).look(model, own), SkipEngine(model, precision)
            found[f"budget {text}{name}"] = partial(one.labels, price=look.price, size=look.size)
    for size in SMALLER:
        found[f"smaller {size:g}"] = partial(SkipEngine(model).labels, price=0.0, size=size)
    return found


def runtimes(
    file: Path,
    onnx: OnnxNetwork,
    others: Mapping[str, Callable[[np.ndarray], Any]],
    view: Tensor,
    smaller: Mapping[float, Tensor],
) -> dict[str, Callable[[], Any]]:
    """The full network in other runtimes, and other networks, on this image."""
    found: dict[str, Callable[[], Any]] = {"onnx": partial(onnx.run, view.numpy())}
    found |= {f"onnx {size:g}": partial(onnx.run, image.numpy()) for size, image in smaller.items()}
    if find_spec("openvino"):
        for precision in ("float32", *(["bfloat16"] if is_compiled(torch.bfloat16) else [])):
            name = "openvino" if precision == "float32" else f"openvino {precision}"
            found[name] = openvino_method(name, file, view.numpy(), torch.get_num_threads(), precision).run
    return found | {name: partial(run, view.numpy()) for name, run in others.items()}


def scores(
    asked: Mapping[str, Callable[[Tensor], Any]], model: DynamicRoutingNetwork, data: Any, size: tuple[int, int]
) -> dict[str, float]:
    """The mIoU of each way over images of a size."""
    classes = model.config.num_classes
    pairs = {way: torch.zeros(classes, classes, dtype=torch.int64) for way in asked}
    for one in evaluation_loader(data):
        if not one["skipped"] and one["image"].shape[-2:] == size:
            for way, run in asked.items():
                pairs[way] += count_pairs(one["labels"], run(one["image"]).labels.long(), classes)
    return {way: miou(some.numpy()) for way, some in pairs.items() if some.any()}


def draw(found: dict[str, Any], to: Path) -> None:
    """Scores against milliseconds: budgets, smaller images, and smaller images in ONNX Runtime."""
    name, at = next(iter(found["sizes"].items()))
    smaller = [*(f"smaller {size:g}" for size in SMALLER), "full"]
    lines = {
        "any budget": [f"budget {text}" for text in BUDGETS],
        "a smaller image, all layers": smaller,
        "the same in ONNX Runtime": smaller,
    }
    figure = new_figure(6.4, 4.0, layout="constrained")
    axes = figure.add_subplot()
    plain_axes(axes)
    for (label, some), (colour, style) in zip(lines.items(), STYLES, strict=True):
        of = [way.replace("smaller", "onnx").replace("full", "onnx") for way in some] if "ONNX" in label else some
        ms, score = [at[way]["ms"] for way in of], [100 * found["miou"][way] for way in some]
        axes.plot(ms, score, style, color=colour, label=label, linewidth=1.6, markersize=4.5)
    axes.set_xlabel(f"ms from an image of {name} to its labels, {found['machine']['threads']} threads", fontsize=9)
    axes.set_ylabel("mIoU, %", fontsize=9)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    save_figure(figure, to, picture_kind(to))


@torch.no_grad()
def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="a checkpoint folder, or `bundled`")
    parser.add_argument("--data.name", dest="name", default="folder")
    parser.add_argument("--data.root", dest="root", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="*", default=["360x480", "512x1024", "1024x2048"])
    parser.add_argument("--asked_ms", type=float, nargs="*", default=[])
    parser.add_argument("--scored", type=int, default=51)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(words)
    segmenter = routeseg.load(None if args.network == "bundled" else args.network)
    model: DynamicRoutingNetwork = segmenter
    everything = open_data(DataConfig(name=args.name, root=args.root), args.split)
    data = evenly_spread(everything, args.images)
    images = [one["image"].float() / 255 for one in evaluation_loader(data) if not one["skipped"]]
    engine: Any = SkipEngine(model)
    found: dict[str, Any] = {"network": args.network, "images": len(images), "rounds": args.rounds, "sizes": {}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "full.onnx"
        export(model.specialize(model.route), file, labels=True)
        onnx = OnnxNetwork(file, torch.get_num_threads())
        for name in args.sizes:
            height, width = map(int, name.split("x"))
            own = height, width
            asked, threads = ways(model, engine, own), torch.get_num_threads()
            others = {
                one: baselines.in_onnx_runtime(one, model.config.num_classes, height, width, threads)
                for one in baselines.NETWORKS
            }
            if "miou" not in found:
                found["miou"] = scores(asked, model, evenly_spread(everything, args.scored), own)
            ms: dict[str, list[float]] = {}
            shares: dict[str, list[float]] = {way: [] for way in asked}
            for image in images:
                views = {
                    size: F.interpolate(image, seen_size(own, size), mode="bilinear", antialias=True)
                    .clamp(0, 1)
                    .contiguous()
                    for size in (1.0, *SMALLER)
                }
                view = views.pop(1.0)
                for way, run in asked.items():
                    shares[way].append(spent_share(model, run(view), own))
                pixels = (255 * view[0].permute(1, 2, 0)).round().to(torch.uint8).numpy()
                turns: dict[str, Callable[[], Any]] = {way: partial(run, view) for way, run in asked.items()}
                turns["call"] = partial(segmenter.predict, pixels)
                rivals = runtimes(file, onnx, others, view, views)
                rested = [turn for run in rivals.values() for turn in (run, partial(time.sleep, REST_S))]
                # The first one behind a rest takes longer, and does not count.
                ours = [turns["full"], *turns.values(), partial(time.sleep, REST_S)]
                times = take_turns([*ours, *rested], args.rounds)
                times = [*times[1 : len(ours) - 1], *times[len(ours) :: 2]]
                turns |= rivals
                for way, some in zip(turns, times, strict=True):
                    ms.setdefault(way, []).append(1000 * float(np.median(some)))
            full = float(np.median(ms["full"]))
            found["sizes"][name] = {
                way: {
                    "ms": float(np.median(times)),
                    "of_full": float(np.median(times)) / full,
                    "share_of_macs": float(np.mean(shares[way])) if way in shares else 1.0,
                }
                for way, times in ms.items()
            }
            write_json(args.output, found | {"command": ["benchmarks/clock.py", *words]} | machine_facts())
    if args.asked_ms:
        height, width = map(int, args.sizes[0].split("x"))
        found["asked"] = kept(model, images, (height, width), args.asked_ms)
        write_json(args.output, found | {"command": ["benchmarks/clock.py", *words]} | machine_facts())
    if args.figure is not None:
        draw(found | machine_facts(), args.figure)
    return 0


def kept(
    model: DynamicRoutingNetwork, images: list[Tensor], size: tuple[int, int], asked: list[float]
) -> dict[str, Any]:
    """The milliseconds of budgets in milliseconds over images of a size, all budgets in turns."""
    tables = [profile(model, size, look=look) for look in model.config.sizes or (1.0,)]
    forwards = {
        f"{ms:g}": Budgeted(SkipEngine(model), model, Asked.parse(f"{ms:g}ms", tables, "profiled")) for ms in asked
    }
    ms: dict[str, list[float]] = {name: [] for name in forwards}
    for image in images:
        view = F.interpolate(image, size, mode="bilinear", antialias=True).clamp(0, 1).contiguous()
        times = take_turns([partial(forward.labels, view) for forward in forwards.values()], 3)
        for name, some in zip(ms, times, strict=True):
            ms[name].append(1000 * float(np.median(some)))
    return {name: {"mean": float(np.mean(some)), "p95": float(np.percentile(some, 95))} for name, some in ms.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
