"""One network for any budget against static networks, trained alike: scores at equal cost, and the worth of choosing.

    python benchmarks/any_budget.py --config configs/any_budget/scenes_cpu.yaml --seeds 0,1,2 --jobs 2

The experiment file is one of table1.py, with one network that has exits. This trains what is not yet trained, as
table1.py does it (the same folders, resumable), and then asks the network with exits for each budget. Own, shuffled,
common and oracle are the ways to choose of `routeseg.budgets.worth`.

Every image is computed once as far as each exit (float32); where it leaves is what the engine decided. Budgets were
set with the validation images, so what they cost on those of --held_out is noted, too. OUTPUT has the mean over the
seeds and each seed; the figure beside it shows the scores of all networks against their cost.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import table1
from routeseg import figures
from routeseg.budgets.asked import Asked
from routeseg.budgets.budgeted import Budgeted
from routeseg.budgets.worth import exits_of, look_at_exits, worth_of_choice
from routeseg.cost.macs import exit_costs
from routeseg.data.config import open_data
from routeseg.data.loaders import evaluation_loader
from routeseg.data.pairs import SegmentationData
from routeseg.data.subset import evenly_spread
from routeseg.engine import SkipEngine
from routeseg.engine.profiling import profile
from routeseg.evaluation import machine_facts
from routeseg.files import write_json
from routeseg.model import DynamicRoutingNetwork, checkpoints
from routeseg.survey.route_statistics import object_size

BUDGETS = (0.25, 0.26, 0.28, 0.3, 0.33, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # shares of the full network's cost
PERMUTATIONS = 10_000
CLOCKED, CLOCKED_BUDGETS = 100, 5  # images and budgets in milliseconds


def look(run: table1.Run, held_out: str | None) -> dict[str, Any]:
    """What a network with exits makes of the validation images: `seen` at every exit; `left` budget -> the exits [N]
    at which images leave, `costs` [K] in shares, `sizes` [N] of objects; `elsewhere` as `left`, for the images of
    another split; `glances` [K-1], MACs in shares of the full network's, which `costs` leave out."""
    model = checkpoints.load(run.folder / "last")
    pictures = open_data(run.network.data, "val", run.seed)
    engine = SkipEngine(model)
    macs = exit_costs(model, pictures.read(0)[1].shape)
    costs = macs / macs[-1]
    budgets = [one for one in BUDGETS if costs[0] <= one <= costs[-1]]

    def leaving(pictures: SegmentationData) -> dict[float, np.ndarray]:
        gates: dict[float, list[np.ndarray]] = {one: [] for one in budgets}
        for picture in evaluation_loader(pictures):
            for budget, found in gates.items():
                found.append(engine(picture["image"], budget=budget).gates[0].numpy())
        return {budget: exits_of(model, np.array(found)) for budget, found in gates.items()}

    return {
        "seen": look_at_exits(model, evaluation_loader(pictures)),
        "left": leaving(pictures),
        "elsewhere": None if held_out is None else leaving(open_data(run.network.data, held_out, run.seed)),
        "costs": costs,
        "glances": glance_macs(model, pictures) / macs[-1],
        "full_gmacs": macs[-1] / 1e9,
        "sizes": np.array([object_size(picture["labels"][0].numpy()) for picture in evaluation_loader(pictures)]),
    }


@torch.no_grad()
def glance_macs(model: DynamicRoutingNetwork, pictures: SegmentationData) -> np.ndarray:
    """MACs of a glance at each exit but the last, as PyTorch counts the operations of its convolutions."""
    exits = model.exits
    assert exits is not None
    found = []
    for exit, features in enumerate(model.exit_features(next(iter(evaluation_loader(pictures)))["image"])):
        with FlopCounterMode(display=False) as counter:
            exits.see(exit, features)
        found.append(counter.get_total_flops() / 2)
    return np.array(found)


def rank_correlation(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Spearman's, with ties, and the share of permutations in which it is as far from 0."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        mean = np.cumsum(count) - (count - 1) / 2
        centred = mean[place] - mean[place].mean()
        return centred / max(float(np.linalg.norm(centred)), 1e-12)

    first, second = ranks(a), ranks(b)
    found = float(first @ second)
    others = np.array([rng.permutation(first) @ second for _ in range(PERMUTATIONS)])
    return found, float((1 + (np.abs(others) >= abs(found) - 1e-12).sum()) / (1 + PERMUTATIONS))


def analyse(seen: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """A row for each budget: what was asked and spent (shares of the full network), the scores of each way to choose,
    the cheapest and the dearest image, and whether cost follows the size of things."""
    rng, costs = np.random.default_rng(seed), seen["costs"]
    rows = []
    for budget, exits in seen["left"].items():
        spent = costs[exits]
        correlation, chance = rank_correlation(seen["sizes"], spent, rng)
        rows.append(
            {
                "asked": budget,
                **worth_of_choice(seen["seen"], exits, costs, seed).as_dict(),
                "held_out": None if seen["elsewhere"] is None else float(costs[seen["elsewhere"][budget]].mean()),
                "least": float(spent.min()),
                "most": float(spent.max()),
                "leaving": (np.bincount(exits, minlength=len(costs)) / len(exits)).tolist(),
                "size_correlation": correlation,
                "size_chance": chance,
            }
        )
    return rows


def clock(run: table1.Run, split: str) -> dict[str, Any]:
    """Milliseconds asked and taken, by the clock, over CLOCKED images of a split in turns: the budgets follow each
    other at every image. The latency table is measured first, at the size of the images."""
    model = checkpoints.load(run.folder / "last")
    pictures = evenly_spread(open_data(run.network.data, split, run.seed), CLOCKED)
    size = pictures.read(0)[1].shape
    table, engine = profile(model, size), SkipEngine(model)
    routes = table.exits_ms
    asked = np.linspace(routes[0], routes[-1], CLOCKED_BUDGETS + 2)[1:-1]
    engines = [Budgeted(engine, model, Asked(ms, "ms", (table,))) for ms in asked]
    taken = np.zeros((len(pictures), len(asked)))
    for number, picture in enumerate(evaluation_loader(pictures)):
        for which, one in enumerate(engines):
            one(picture["image"])  # the caches are warm, as they are in a run of one budget
            start = time.perf_counter()
            one(picture["image"])
            taken[number, which] = 1000 * (time.perf_counter() - start)
    return {
        "routes_ms": routes.tolist(),
        "asked_ms": asked.tolist(),
        "taken_ms": taken.mean(0).tolist(),
        "pictures": len(taken),
    }


def mean_rows(by_seed: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of the seeds, averaged budget by budget; of `own` the standard deviation, too."""
    rows = []
    for same in zip(*by_seed, strict=True):
        row: dict[str, Any] = {
            key: None if same[0][key] is None else np.mean([one[key] for one in same], axis=0).tolist()
            for key in same[0]
            if key != "size_chance"
        }
        row["size_chance"] = max(one["size_chance"] for one in same)
        row["own_std"] = float(np.std([one["own"] for one in same], ddof=1)) if len(same) > 1 else None
        rows.append(row)
    return rows


def against_static(rows: Sequence[dict[str, Any]], static: Sequence[dict[str, Any]], full_gmacs: float) -> None:
    """Gives each row `best_static`, the name and mIoU of the best static network that costs no more; None if there is
    none."""
    for row in rows:
        cheaper = [one for one in static if one["gmacs"]["mean"] <= row["spent"] * full_gmacs * 1.001]
        best = max(cheaper, key=lambda one: one["miou_mean"], default=None)
        row["best_static"] = None if best is None else {"name": best["name"], "miou": best["miou_mean"]}


def main(arguments: Sequence[str] | None = None, train: Callable[[Sequence[str]], int] = table1.main) -> int:
    command = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="the experiment file")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--folder", type=Path, help="of the runs; runs/any_budget_CONFIG unless given")
    parser.add_argument("--output", type=Path, help="results/any_budget_CONFIG.json unless given")
    parser.add_argument("--held_out", help="a split whose images no budget was set with, to see what they cost")
    parser.add_argument("--clock", action="store_true", help="budgets in ms, too: the machine must be idle otherwise")
    args, words = parser.parse_known_args(command)
    title = f"any_budget_{args.config.stem}"
    folder = args.folder or Path("runs") / title
    output = args.output or Path("results") / f"{title}.json"
    trained = ["--config", str(args.config), "--seeds", args.seeds, "--jobs", str(args.jobs), "--folder", str(folder)]
    networks = table1.read_experiment(args.config, words)
    if args.held_out is not None:
        open_data(next(iter(networks.values())).data, args.held_out)  # a mistake is found before hours of training
    code = train([*trained, "--output", str(folder / "table.json"), *words])
    if code:
        return code
    seeds = [int(seed) for seed in args.seeds.split(",")]
    names = [name for name, network in networks.items() if network.kind == "exits"]
    if len(names) != 1:
        print(f"any_budget: error: {args.config} has {len(names)} networks with exits: give one", file=sys.stderr)
        return 2
    runs = table1.plan(networks, list(networks), seeds, folder)
    summary = table1.summary(runs, runs, trained)
    static = [row for row in summary["rows"] if row["kind"] != "exits"]
    mine = [run for run in runs if run.network.name == names[0]]
    seen = [look(run, args.held_out) for run in mine]
    by_seed = [analyse(one, seed) for one, seed in zip(seen, seeds, strict=True)]
    rows, full_gmacs = mean_rows(by_seed), seen[0]["full_gmacs"]
    against_static(rows, static, full_gmacs)
    write_json(
        output,
        {
            "network": names[0],
            "settings": summary["settings"],
            "seeds": seeds,
            "costs": seen[0]["costs"].tolist(),
            "full_gmacs": full_gmacs,
            "pictures": len(seen[0]["sizes"]),
            "rows": rows,
            "by_seed": by_seed,
            "glances": np.mean([one["glances"] for one in seen], axis=0).tolist(),
            "clock": clock(mine[0], args.held_out or "val") if args.clock else None,
            "networks": [{k: v for k, v in row.items() if k not in ("runs", "paper")} for row in summary["rows"]],
            "command": ["benchmarks/any_budget.py", *command],
            **machine_facts(),
        },
    )
    drawn = [
        {
            "label": f"{100 * row['asked']:g} %",
            "kind": "exits",
            "miou_mean": row["own"],
            "miou_std": row["own_std"],
            "gmacs": {k: row[v] * full_gmacs for k, v in (("mean", "spent"), ("min", "spent"), ("max", "spent"))},
        }
        for row in rows
    ]
    figures.accuracy_cost(output.with_suffix(".png"), [*static, *drawn])
    for row in rows:
        best = row["best_static"]
        beaten = "" if best is None else f", {best['name']} {100 * best['miou']:.1f}"
        print(
            f"asked {100 * row['asked']:.4g} %, spent {100 * row['spent']:.1f} %: own {100 * row['own']:.1f}, shuffled "
            f"{100 * row['shuffled']:.1f}, common {100 * row['common']:.1f}, oracle {100 * row['oracle']:.1f}{beaten}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
