"""Small batches: when does the training of a dynamic network diverge on one device, and what keeps it from that?

    python benchmarks/small_batch.py --jobs 2 [--output results/small_batch_cpu.json]

The authors' users saw their training diverge with 1 to 3 pictures in a step at the paper's learning rate, 0.05, which
belongs to 8. Here a network of depth 16 trains on procedural scenes (16 channels, full gates, which a batch of 1 can
train at this size; weight and target of budget A). It always sees the same number of pictures, so smaller batches make
more steps:

    reference     8 pictures in a step, learning rate 0.05, gradient clipped at 5, warm-up
    bare          learning rate 0.05 whatever the batch, no clipping, no warm-up
    unscaled      learning rate 0.05 whatever the batch, clipping and warm-up as in the paper
    zeros         the same, and closed paths send zeros that arrive, as in the authors' code
    scaled        the shipped recipe: learning rate 0.05 * pictures / 8, clipping, warm-up
    accumulated   the recipe of cityscapes/one_gpu: batches of 2, four of which make a step
    xN            bare, unscaled and scaled at N times their learning rate: shows the edge of stability

A run diverged if its loss became nan or infinite, or if its cross-entropy at the end is above that of a guess (ln K).
Every run is a process of its own with one thread, in FOLDER/NAME/seedN. The same command again goes on after an
interruption; OUTPUT is written anew after every finished run. Exit code 1 if a run failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from routeseg import Budget, DynamicRoutingNetwork
from routeseg.data.config import DataConfig
from routeseg.data.scenes import CLASSES
from routeseg.evaluation import machine_facts
from routeseg.files import RESUME_FILE, check_writable, write_json
from routeseg.training.recipe import Recipe
from routeseg.training.report import read_log
from routeseg.training.run import RunOptions
from routeseg.training.segmentation import train
from routeseg.training.task import NonFiniteLoss

LR, LR_PICTURES = 0.05, 8  # the paper's learning rate, and the pictures in a step that it belongs to
WARMUP_SHARE = 0.1
TAIL_SHARE = 0.1  # of the steps: the final loss is the mean over them
NORM_PICTURES = 80  # for precise BatchNorm, however many are in a batch
POLL_SECONDS = 0.2
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Variant:
    """A way to train: pictures in a batch, what the learning rate is multiplied by, and the safeguards."""

    batch: int
    lr: float
    safe: bool = True  # gradient clipped, warm-up
    accumulate: int = 1
    zeros_arrive: bool = False
    seeds: int = 3  # how many at most

    @property
    def pictures(self) -> int:
        return self.batch * self.accumulate


def variants() -> dict[str, Variant]:
    found = {"reference": Variant(8, LR), "accumulated-2": Variant(2, LR, accumulate=4)}
    for batch in (2, 1):
        scaled = LR * batch / LR_PICTURES
        found |= {
            f"bare-{batch}": Variant(batch, LR, safe=False),
            f"unscaled-{batch}": Variant(batch, LR),
            f"zeros-{batch}": Variant(batch, LR, zeros_arrive=True),
            f"scaled-{batch}": Variant(batch, scaled),
        }
    for times in (4, 16, 64):
        found |= {
            f"bare-2 x{times}": Variant(2, LR * times, safe=False, seeds=1),
            f"unscaled-2 x{times}": Variant(2, LR * times, seeds=1),
            f"scaled-2 x{times}": Variant(2, LR * 2 / LR_PICTURES * times, seeds=1),
        }
    return found


def settings_of(variant: Variant, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """All that a run depends on, as JSON gives it back."""
    steps = max(2, args.pictures // variant.pictures)
    size = tuple(args.size)
    data = DataConfig(
        crop=size, image_size=size, train_images=600, val_images=50, batch_size=variant.batch, workers=0, seed=0,
        preset="mixed", scales=[0.75, 1.0, 1.25], colour=0.2,
    )  # fmt: skip
    recipe = Recipe(
        iterations=steps, lr=variant.lr, accumulate=variant.accumulate, gate_lr_factor=5.0, seed=seed,
        warmup_steps=int(WARMUP_SHARE * steps) if variant.safe else 0, clip_norm=5.0 if variant.safe else math.inf,
        precise_bn_batches=NORM_PICTURES // variant.batch, validate_every=steps, save_every=100, log_every=1,
        precision="32-true",
    )  # fmt: skip
    model = {"depth": args.depth, "base_channels": args.channels, "stem_channels": args.channels}
    return {
        "model": model | {"zeros_arrive": variant.zeros_arrive},
        "data": json.loads(json.dumps(asdict(data))),
        "recipe": asdict(recipe),
        "budget": asdict(Budget(0.8, 0.1, start=0.4, ramp=0.05)),
    }


def perform(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains one network, or goes on training it; returns what is written into result.json."""
    data, recipe = DataConfig(**settings["data"]), Recipe(**settings["recipe"])
    torch.manual_seed(recipe.seed)
    model = DynamicRoutingNetwork(num_classes=len(CLASSES), **settings["model"])
    resume = (folder / RESUME_FILE).exists()
    if not resume:
        shutil.rmtree(folder / "logs", ignore_errors=True)
    options = RunOptions(folder, resume, devices=1, accelerator="cpu", progress=False)
    start, stopped, miou, cost = time.monotonic(), None, None, None
    try:
        result = train(model, data, recipe, Budget(**settings["budget"]), options)
        if result.found is not None:
            miou = result.found.miou
            cost = float((result.found.cost_macs / result.found.full_macs).mean())
    except NonFiniteLoss as error:
        stopped = str(error).split(". ")[0]
    losses = [float(row["cross_entropy"]) for row in read_log(folder) if row.get("cross_entropy")]
    tail = max(1, round(TAIL_SHARE * recipe.iterations))
    final = None if stopped else float(np.mean(losses[-tail:]))
    found = {
        "diverged": stopped is not None or final > math.log(len(CLASSES)),
        "stopped": stopped,
        "steps": len(losses),
        "final_loss": final,
        "highest_loss": float(np.max(losses[tail:])) if len(losses) > tail else None,
        "miou": miou,
        "real_cost_share": cost,
        "seed": recipe.seed,
        "seconds": time.monotonic() - start,
        "settings": settings,
        **machine_facts(),
    }
    write_json(folder / RESULT_FILE, found)
    return found


def finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result in a folder, if there is one. Raises ValueError if it belongs to other settings."""
    for name in (RESULT_FILE, "settings.json"):
        path = folder / name
        if path.exists():
            found = json.loads(path.read_text())
            if found.get("settings", found) != json.loads(json.dumps(settings)):
                raise ValueError(f"{folder} holds a run with other settings: delete it, or choose another --folder")
            return found if name == RESULT_FILE else None
    return None


def summary(runs: dict[tuple[str, int], tuple[Path, dict[str, Any]]], command: Sequence[str]) -> dict[str, Any]:
    """The JSON: one row for each variant with its finished runs."""
    rows = []
    for name, variant in variants().items():
        results = [found for (which, _), (path, s) in runs.items() if which == name and (found := finished(path, s))]
        if results:
            recipe = results[0]["settings"]["recipe"]
            rows.append(
                {
                    "name": name,
                    **{k: v for k, v in asdict(variant).items() if k != "seeds"},
                    **{key: recipe[key] for key in ("iterations", "warmup_steps")},
                    "clip_norm": recipe["clip_norm"] if math.isfinite(recipe["clip_norm"]) else None,
                    "runs": [{k: v for k, v in r.items() if k in KEPT} for r in results],
                }
            )
    some = next((s for _, s in runs.values()), {})
    shared = {part: some[part] for part in ("model", "budget")} if some else {}
    return {
        "guess_loss": math.log(len(CLASSES)),
        "settings": shared | {"data": {k: v for k, v in some.get("data", {}).items() if k != "batch_size"}},
        "rows": rows,
        "missing": [f"{name} seed {seed}" for (name, seed), (path, s) in runs.items() if not finished(path, s)],
        "command": ["benchmarks/small_batch.py", *command],
        **machine_facts(),
    }


KEPT = ("diverged", "stopped", "steps", "final_loss", "highest_loss", "miou", "real_cost_share", "seed", "seconds")


def markdown(facts: dict[str, Any]) -> str:
    heads = ["", "pictures in a step", "learning rate", "steps", "diverged", "final loss", "highest loss", "mIoU, %"]
    heads.append("real cost, %")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in facts["rows"]:
        runs = row["runs"]
        cells = [
            row["name"],
            f"{row['batch']} x {row['accumulate']}" if row["accumulate"] > 1 else str(row["batch"]),
            f"{row['lr']:.4g}",
            str(row["iterations"]),
            f"{sum(run['diverged'] for run in runs)} of {len(runs)}",
            *(_spread([run[key] for run in runs], factor, digits) for key, factor, digits in COLUMNS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


COLUMNS = (("final_loss", 1, 2), ("highest_loss", 1, 2), ("miou", 100, 1), ("real_cost_share", 100, 0))


def _spread(values: list[float | None], factor: float, digits: int) -> str:
    """Mean, and the range if there are several, of those that are there."""
    there = [factor * value for value in values if value is not None]
    if not there:
        return "-"
    mean = f"{np.mean(there):.{digits}f}"
    return mean if len(there) == 1 else f"{mean} ({min(there):.{digits}f} to {max(there):.{digits}f})"


def start(name: str, seed: int, folder: Path, command: Sequence[str]) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(
            [sys.executable, __file__, *command, "--one", name, str(seed)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def perform_all(
    runs: dict[tuple[str, int], tuple[Path, dict[str, Any]]], jobs: int, command: Sequence[str], output: Path
) -> None:
    """Performs the runs that are not finished, `jobs` processes at a time."""
    waiting = [key for key, (folder, settings) in runs.items() if not finished(folder, settings)]
    active: dict[subprocess.Popen, tuple[str, int]] = {}
    print(f"{len(runs) - len(waiting)} runs are finished, {len(waiting)} to do", flush=True)
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                name, seed = waiting.pop(0)
                active[start(name, seed, runs[name, seed][0], command)] = name, seed
            time.sleep(POLL_SECONDS)
            for process in [p for p in active if p.poll() is not None]:
                name, seed = key = active.pop(process)
                folder, settings = runs[key]
                found = finished(folder, settings)
                if process.returncode or not found:
                    print(f"{name} seed {seed} FAILED, see {folder / 'log.txt'}", file=sys.stderr, flush=True)
                    continue
                how = found["stopped"] or f"final loss {found['final_loss']:.2f}"
                word = "DIVERGED, " if found["diverged"] else ""
                print(f"{name} seed {seed}: {word}{how}, {found['seconds']:.0f} s, {len(waiting)} wait", flush=True)
                write_json(output, summary(runs, command))
    finally:
        for process in active:  # a checkpoint is whole or not there: they may die at any moment
            process.kill()
            process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    command = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", help="names, comma-separated; all unless given")
    parser.add_argument("--seeds", type=int, default=3, help="how many (those of xN have one)")
    parser.add_argument("--pictures", type=int, default=1200, help="that each run is trained on")
    parser.add_argument("--size", type=int, nargs=2, default=(96, 128), help="height and width of the crops")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/small_batch"), help="of the runs")
    parser.add_argument("--output", type=Path, default=Path("results/small_batch_cpu.json"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(command)
    known = variants()
    if args.one:
        torch.set_num_threads(1)
        name, seed = args.one[0], int(args.one[1])
        folder, settings = args.folder / name.replace(" ", "_") / f"seed{seed}", settings_of(known[name], seed, args)
        write_json(folder / "settings.json", settings)
        perform(folder, settings)
        return 0
    try:
        names = args.variants.split(",") if args.variants else list(known)
        for name in names:
            if name not in known:
                raise ValueError(f"no variant {name!r}: choose from {', '.join(known)}")
        if min(args.jobs, args.seeds, args.pictures) < 1:
            raise ValueError("--jobs, --seeds and --pictures must be at least 1")
        runs = {
            (name, seed): (args.folder / name.replace(" ", "_") / f"seed{seed}", settings_of(known[name], seed, args))
            for seed in range(args.seeds)
            for name in names
            if seed < known[name].seeds
        }
        check_writable(args.folder, "--folder")
        check_writable(args.output.parent)
        perform_all(runs, args.jobs, command, args.output)
        facts = summary(runs, command)
        write_json(args.output, facts)
    except (ValueError, OSError) as error:
        print(f"small_batch: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("small_batch: interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(markdown(facts))
    for name in facts["missing"]:
        print(f"missing: {name}", file=sys.stderr)
    return 1 if facts["missing"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
