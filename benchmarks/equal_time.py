"""One network for any budget beside static networks that were trained for the same time, all of them at any image size.

    python benchmarks/equal_time.py configs/equal_time/voc_animals.yaml --data.root FOLDER --seeds 0,1,2

The experiment file has the words of a training that all networks share, and what is different in each; those with
exits are asked for budgets, the others cost what their layers cost. `baseline` is a network of baselines.py, which
learns by the same recipe with PyTorch's operations; `seeds` are those of a network that is not trained with all of
--seeds. Each is trained for as many steps as fit into the same time: --steps measures what a step of each takes, in
turns, and says how many that are; the file has these numbers as recipe.iterations. A run that is there is not trained
again, nor looked at again. Networks with exits are calibrated in several sizes afterwards. Then each looks at the
validation images in each of SIZES, with all layers, and networks with exits keep each of BUDGETS, which choose size
and places. Other words, such as --data.train_share 0.05, are for all of the trainings.

Costs are shares of what the first network costs with all layers at the image's own size. `rows` has, for each network
with exits and each budget, the mean over the seeds of what it spends and scores, and the best static network and size
of no more cost.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.nn import functional as F

import baselines
from places import frontier, miou, pairs_of, resized, walked
from routeseg.cli.common import config_parser, new_network, parts_of
from routeseg.cost.macs import model_cost
from routeseg.data.config import DataConfig, open_data, pair
from routeseg.data.loaders import evaluation_loader
from routeseg.data.subset import evenly_spread
from routeseg.engine import SkipEngine
from routeseg.evaluation import machine_facts
from routeseg.files import write_json
from routeseg.model import DynamicRoutingNetwork, checkpoints
from routeseg.model.decoder import most_likely
from routeseg.training.segmentation import SegmentationTask, freeze_stages

SIZES = (0.35, 0.42, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4)
BUDGETS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.75, 1.0)
ROUNDS = 6  # of steps, of which the fastest counts
BASELINE, SEEDS = "baseline", "seeds"  # words of a network that are not of a training


def words_of(network: Mapping[str, Any], shared: list[str]) -> list[str]:
    return [
        *shared,
        *(
            f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in network.items()
            if key not in (BASELINE, SEEDS)
        ),
    ]


def step_seconds(networks: Mapping[str, Mapping[str, Any]], shared: list[str]) -> dict[str, float]:
    """Seconds of a core that a step takes, all networks in turns, a mean over the training of those whose places leave
    from some step on."""
    turns: dict[str, Callable[[], Any]] = {}
    shares: dict[str, tuple[str, float]] = {}
    for name, network in networks.items():
        args = config_parser("train").parse_args(words_of(network, shared))
        data, recipe, budget = parts_of(args)
        classes, sides = len(open_data(data, "val").classes), pair(data.crop)
        batch = {
            "image": torch.randint(0, 256, (data.batch_size, 3, *sides), dtype=torch.uint8),
            "labels": torch.randint(0, classes, (data.batch_size, *sides)),
        }
        if BASELINE in network:
            training = baselines.Training(baselines.Baseline(network[BASELINE], classes), recipe, None)
            turns[name] = partial(training.step, recipe.iterations - 1, batch)
            shares[name] = (name, 1.0)
            continue
        model = new_network(args, data, recipe, pretrained=False)
        leaving = 0.0 if model.config.place is None else 1 - recipe.places_from
        for way, start, share in (("", 1.0, 1 - leaving), (" places", 0.0, leaving)):
            if share > 0:
                task = SegmentationTask(model, replace(recipe, places_from=start), budget, sides)
                task.model.train()
                task.precision = recipe.precision
                freeze_stages(model.backbone, recipe, recipe.iterations)
                turns[name + way] = partial(one_step, task, batch, torch.optim.SGD(model.parameters(), lr=0.0))
                shares[name + way] = (name, share)
    best = dict.fromkeys(turns, math.inf)
    for _ in range(ROUNDS):
        for way, step in turns.items():
            start = time.process_time()
            step()
            best[way] = min(best[way], time.process_time() - start)
    found = dict.fromkeys(networks, 0.0)
    for way, (name, share) in shares.items():
        found[name] += share * best[way]
    return found


def one_step(task: SegmentationTask, batch: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    task.parts(batch, task.count(batch["labels"]), lambda loss, _: loss.backward())
    optimizer.step()
    optimizer.zero_grad()


def untrained(own: Mapping[str, Any], shared: list[str]) -> DynamicRoutingNetwork:
    """A network of ours, to count costs of."""
    args = config_parser("train").parse_args(words_of(own, shared))
    return new_network(args, *parts_of(args)[:2], pretrained=False)


def trained(name: str, own: Mapping[str, Any], shared: list[str], seed: int, runs: Path) -> Path:
    """The folder of a run, trained if it is not there."""
    folder = runs / f"{name}_{seed}"
    if not (folder / "report.html").is_file():
        words = ["train", *words_of(own, shared), "--recipe.seed", str(seed), "--output", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run([sys.executable, "-m", "routeseg.cli", *words], env=environment, check=True)
    return folder


def calibrated(folder: Path, sizes: list[float], data: list[str]) -> DynamicRoutingNetwork:
    """The network of a run in these sizes, if it has exits. This is not part of the minutes."""
    model = checkpoints.load(folder / "last")
    if model.exits is not None and list(model.config.sizes or ()) != sizes:
        words = ["calibrate", str(folder / "last"), *data, f"--sizes={json.dumps(sizes)}"]
        subprocess.run([sys.executable, "-m", "routeseg.cli", *words], check=True)
        model = checkpoints.load(folder / "last")
    return model.eval()


def looked_at(model: DynamicRoutingNetwork, images: list[Any], reference: DynamicRoutingNetwork) -> dict[str, Any]:
    """Scores and costs in each of SIZES with all layers, and of a network with exits at each of BUDGETS."""
    engine, asked = SkipEngine(model), BUDGETS if model.exits is not None else ()
    return {
        "sizes": [walked(engine, model, images, size, 0.0, reference) for size in SIZES],
        "budgets": [frontier(engine, model, images, budget, reference) for budget in asked],
    }


def baseline_looked_at(
    own: Mapping[str, Any], shared: list[str], seed: int, images: list[Any], reference: DynamicRoutingNetwork
) -> dict[str, Any]:
    """Scores and costs of a network of baselines.py in each of SIZES, trained on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    words = [*words_of(own, shared), "--recipe.seed", str(seed)]
    data, recipe, _ = parts_of(config_parser("train").parse_args(words))
    with torch.enable_grad():
        model = baselines.train(own[BASELINE], data, recipe)
    torch.set_num_threads(threads)
    classes, points = reference.config.num_classes, []
    for size in SIZES:
        pairs, costs = np.zeros((classes, classes), np.int64), []
        for one in images:
            sides, image = one["image"].shape[-2:], resized(one["image"], size)
            logits = F.interpolate(model(image), sides, mode="bilinear", align_corners=False)
            pairs += pairs_of(one["labels"][0].numpy(), most_likely(logits)[0].numpy(), classes)
            costs.append(
                baselines.macs(own[BASELINE], classes, *image.shape[-2:]) / model_cost(reference, tuple(sides)).full
            )
        points.append({"size": size, "cost": float(np.mean(costs)), "miou": miou(pairs)})
    return {"sizes": points, "budgets": []}


def compared(dynamic: str, found: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each budget: means over the seeds, and the best of the others that costs no more; the same of the
    network's own sizes, with all layers."""

    def mean(name: str, table: str, number: int) -> dict[str, Any]:
        some = [one[table][number] for one in found[name]]
        scores = [one["miou"] for one in some]
        spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
        return some[0] | {
            "cost": float(np.mean([one["cost"] for one in some])),
            "miou": float(np.mean(scores)),
            "std": spread,
        }

    points = {name: [mean(name, "sizes", k) for k in range(len(SIZES))] for name in found}

    def best(names: list[str], cost: float) -> dict[str, Any] | None:
        cheaper = [{"name": name} | one for name in names for one in points[name] if one["cost"] <= 1.001 * cost]
        return max(cheaper, key=lambda one: one["miou"], default=None)

    rows = []
    for number in range(len(found[dynamic][0]["budgets"])):
        own = mean(dynamic, "budgets", number)
        others = [name for name in found if not found[name][0]["budgets"]]
        rows.append(own | {"static": best(others, own["cost"]), "sizes_alone": best([dynamic], own["cost"])})
    return rows


@torch.no_grad()
def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--data.root", dest="root", required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=float, default=None, help="train nothing: how many fit into so many minutes")
    parser.add_argument("--images", type=int, default=None, help="of the validation, at most")
    parser.add_argument("--runs", type=Path, help="runs/equal_time_NAME unless given")
    parser.add_argument("--output", type=Path, help="results/equal_time_NAME.json unless given")
    args, others = parser.parse_known_args(words)
    experiment = yaml.safe_load(args.experiment.read_text(encoding="utf-8"))
    networks, name = experiment["networks"], args.experiment.stem
    shared = [*map(str, experiment["train"]), "--data.root", args.root, *others]
    if args.steps:
        torch.set_num_threads(1)
        with torch.enable_grad():
            took = step_seconds(networks, shared)
        for one, step_s in took.items():
            print(f"{one}: a step takes {step_s:.3f} s, {60 * args.steps / step_s:.0f} steps")
        return 0
    dynamic = next(iter(networks))
    runs = args.runs or Path("runs") / f"equal_time_{name}"
    output = args.output or Path("results") / f"equal_time_{name}.json"
    kind = experiment.get("data", "folder")
    images = [
        one
        for one in evaluation_loader(
            evenly_spread(open_data(DataConfig(name=kind, root=args.root), "val"), args.images)
        )
        if not one["skipped"]
    ]
    reference = untrained(networks[dynamic], shared)
    found: dict[str, list[dict[str, Any]]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in map(int, args.seeds.split(",")):
        for network, own in networks.items():
            if seed not in own.get(SEEDS, [seed]):
                continue
            kept = runs / f"{network}_{seed}" / "equal_time.json"
            if not kept.is_file() and BASELINE in own:
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_json(kept, baseline_looked_at(own, shared, seed, images, reference))
            elif not kept.is_file():
                folder = trained(network, own, shared, seed, runs)
                model = calibrated(folder, experiment["sizes"], [f"--data.name={kind}", "--data.root", args.root])
                write_json(kept, looked_at(model, images, reference))
            found = {one: found.get(one, []) for one in networks if one in found or one == network}
            found[network].append(json.loads(kept.read_text()))
            rows = {one: compared(one, found) for one in found if found[one][0]["budgets"]}
            write_json(
                output,
                {
                    "experiment": experiment,
                    "seeds": args.seeds,
                    "images": len(images),
                    "rows": rows,
                    "networks": found,
                    "command": ["benchmarks/equal_time.py", *words],
                    **machine_facts(),
                },
            )
    for one, some in rows.items():
        for row in some:
            static = row["static"]
            beside = (
                "" if static is None else f", {static['name']} at size {static['size']:g} {100 * static['miou']:.1f}"
            )
            print(f"{one}: {100 * row['cost']:.1f} %: {100 * row['miou']:.1f} %{beside}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
