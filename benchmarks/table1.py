"""The paper's Table 1: static architectures and dynamic networks, trained alike, over several seeds.

    python benchmarks/table1.py --config configs/table1/scenes_cpu.yaml --seeds 0,1,2 --jobs 2
    python benchmarks/table1.py --config configs/table1/camvid_cpu.yaml --data.root FOLDER --networks u-net,dynamic-a

The experiment file has the sections of `routeseg train` (data, recipe, model, budget), which all networks share, and
`networks`, name -> what is different for it: keys of these sections, or `common: {of: NAME, threshold: SHARE}`. That is
the static network of the edges that NAME, trained with the same seed, keeps open in at least this share of the training
images; it has no gates and is retrained from scratch. Any key of the shared sections can be given on the command
line.

A seed sets the weights, the order of the data and the augmentation. Which scenes are drawn is the same for all of them
(data.seed, 0 unless given).

OUTPUT has every finished run of FOLDER, also of networks and seeds that this call does not name. The straight lines
between the dynamic networks show what a known network or a common route gains or loses against them at equal cost.

Every (network, seed) trains in a process of its own, in FOLDER/NAME/seedN (settings.json, log.txt, last.ckpt, logs/,
and at the very end result.json). The same command again goes on after an interruption. OUTPUT and a Markdown table
beside it are written anew after each finished run, the figure at the end. Exit code 1 if a run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import Namespace

from result_tables import comparison
from routeseg import figures
from routeseg.architectures import ARCHITECTURES, common_route
from routeseg.cli.common import config_parser, new_network, parts_of
from routeseg.cli.parser import SECTIONS
from routeseg.cost.macs import model_cost
from routeseg.data.config import DataConfig, open_data
from routeseg.data.loaders import evaluation_loader
from routeseg.engine import SkipEngine
from routeseg.evaluation import evaluate, machine_facts
from routeseg.files import RESUME_FILE, check_writable, write_atomically, write_json
from routeseg.model import DynamicRoutingNetwork, checkpoints
from routeseg.space import Route
from routeseg.training.gate_budget import Budget
from routeseg.training.recipe import Recipe
from routeseg.training.run import RunOptions
from routeseg.training.segmentation import train

# Table 1 of the paper, Cityscapes val at 1024x2048: mIoU in %, GMACs (mean, max, min), parameters in millions.
PAPER = {name: (a.paper_miou, (a.paper_gmacs,), a.paper_params_m) for name, a in ARCHITECTURES.items()} | {
    "common-a": (71.6, (41.6,), 4.1),
    "common-b": (73.0, (53.7,), 4.3),
    "common-c": (73.2, (57.1,), 4.5),
    "dynamic-a": (72.8, (44.9, 48.2, 43.5), 17.8),
    "dynamic-b": (73.8, (58.7, 63.5, 56.8), 17.8),
    "dynamic-c": (74.6, (66.6, 71.6, 64.3), 17.8),
    "dynamic-raw": (76.1, (119.5,), 17.8),
}
RESULT_FILE = "result.json"
OVERRIDES = {*SECTIONS, "common"}
COSTS = ("mean", "max", "min", "full")
LOG_TAIL = 12  # lines of a failed run's log that are shown
POLL_SECONDS = 0.2
PARENT_KEY = "TABLE1_PARENT"  # environment of a run: the process that started it


@dataclass(frozen=True)
class Network:
    """A row of the table: what it is, and the recipe that it shares with the others.

    args     the parsed configuration; `args.model` are the network's arguments
    common   (of, threshold), or None
    changes  what the experiment file says is different for it
    """

    name: str
    args: Namespace
    data: DataConfig
    recipe: Recipe
    budget: Budget
    common: tuple[str, float] | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """dynamic, softmax (one path leaves each node), fixed (all are open), static (a route), exits (any budget) or
        common."""
        if self.common:
            return "common"
        model = self.args.model
        if model.exits is not None:
            return "exits"
        return {"soft": "dynamic", "fixed": "static" if model.route else "fixed"}.get(model.gate, model.gate)

    @property
    def label(self) -> str:
        known = ARCHITECTURES.get(self.name)
        return known.name if known else self.name.title()


def read_experiment(path: Path, words: Sequence[str] = ()) -> dict[str, Network]:
    """The networks of an experiment file; `words` are keys from the command line. ValueError names what is wrong."""
    try:
        shared = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    listed = shared.pop("networks", None) if isinstance(shared, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{path} has no `networks`: give a mapping from names to what is different for each")
    parser = config_parser("table1")
    networks: dict[str, Network] = {}
    for name, changes in listed.items():
        if not isinstance(changes, dict | None) or not all(isinstance(part, dict) for part in (changes or {}).values()):
            raise ValueError(
                f"networks.{name} of {path} is {changes!r}: give a mapping, with sections of the file or common"
            )
        changes = dict(changes or {})
        if unknown := set(changes) - OVERRIDES:
            raise ValueError(
                f"networks.{name} of {path} has {', '.join(sorted(unknown))}: only {', '.join(sorted(OVERRIDES))} may "
                "differ between networks, all else is shared"
            )
        common = changes.pop("common", None)
        if common is not None:
            source = networks.get(common.get("of")) if isinstance(common, dict) else None
            if source is None or source.kind not in ("dynamic", "softmax") or set(common) != {"of", "threshold"}:
                raise ValueError(
                    f"networks.{name}.common of {path} must be {{of: NAME, threshold: SHARE}}, NAME being a network "
                    "with gates listed before it"
                )
            changes["model"] = changes.get("model", {}) | {"gate": "fixed", "small_gate": False}
        config = ["--config", yaml.safe_dump(shared), *words, "--config", yaml.safe_dump(changes)]
        args = parser.parse_args(config)
        data, recipe, budget = parts_of(args)
        data.seed = 0 if data.seed is None else data.seed
        if common is not None and not (
            isinstance(common["threshold"], int | float) and 0 < float(common["threshold"]) <= 1
        ):
            raise ValueError(f"networks.{name}.common.threshold of {path} is {common['threshold']!r}: a share in 0..1")
        if budget.weight and args.model.gate == "fixed":
            raise ValueError(f"networks.{name} of {path} has no gates, so it cannot keep a budget: set its weight to 0")
        networks[name] = Network(
            name, args, data, recipe, budget, (common["of"], float(common["threshold"])) if common else None, changes
        )
    return networks


def settings_of(network: Network, networks: Mapping[str, Network], seed: int) -> dict[str, Any]:
    """All that a run's result depends on, as JSON gives it back."""
    data = asdict(network.data)
    for key in ("root", "workers"):  # where the images lie and who loads them
        del data[key]
    settings = {
        "model": vars(network.args.model),
        "data": data,
        "recipe": asdict(replace(network.recipe, seed=seed)),
        "budget": asdict(network.budget),
    }
    if network.common:
        of, threshold = network.common
        source = settings_of(networks[of], networks, seed)
        settings["common"] = {"of": of, "threshold": threshold, "model": source["model"], "budget": source["budget"]}
    return json.loads(json.dumps(settings))


@dataclass(frozen=True)
class Run:
    """A network, trained with a seed, in its folder."""

    network: Network
    seed: int
    folder: Path
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.network.name} seed {self.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / RESULT_FILE).exists()

    @property
    def result(self) -> dict[str, Any] | None:
        """What it found, once it is finished."""
        return json.loads((self.folder / RESULT_FILE).read_text()) if self.finished else None

    @property
    def source(self) -> Path | None:
        """Folder of the run whose routes it needs."""
        return self.folder.parents[1] / self.network.common[0] / self.folder.name if self.network.common else None

    @property
    def fits(self) -> bool:
        """Whether the folder holds no run with other settings."""
        try:
            self.check()
        except ValueError:
            return False
        return True

    def check(self) -> None:
        """Raises ValueError if the folder holds a run with other settings."""
        path = self.folder / "settings.json"
        if not path.exists():
            return
        before = json.loads(path.read_text())
        different = [
            f"{part}.{key} was {before.get(part, {}).get(key)!r}, is {self.settings.get(part, {}).get(key)!r}"
            for part in sorted(before.keys() | self.settings.keys())
            for key in sorted(before.get(part, {}).keys() | self.settings.get(part, {}).keys())
            if before.get(part, {}).get(key) != self.settings.get(part, {}).get(key)
        ]
        if different:
            raise ValueError(
                f"the run {self.name} in {self.folder} has other settings ({'; '.join(different[:3])}): delete that "
                "folder to train it anew, or choose another --folder"
            )


def plan(networks: Mapping[str, Network], chosen: Sequence[str], seeds: Sequence[int], folder: Path) -> list[Run]:
    """The runs, seed by seed, with those that they need. Raises ValueError for an unknown network."""
    names: list[str] = []
    for name in chosen:
        if name not in networks:
            raise ValueError(f"no network {name!r} in the experiment: choose from {', '.join(networks)}")
        common = networks[name].common
        names += [common[0], name] if common else [name]
    return [
        Run(networks[name], seed, folder / name / f"seed{seed}", settings_of(networks[name], networks, seed))
        for seed in seeds
        for name in dict.fromkeys(names)
    ]


def perform(run: Run, accelerator: str = "auto") -> dict[str, Any]:
    """Trains one network, or goes on training it; returns what is written into result.json."""
    run.check()
    write_json(run.folder / "settings.json", run.settings)
    network, recipe = run.network, replace(run.network.recipe, seed=run.seed)
    args = network.args.clone()
    if run.source is not None:
        args.model.route = _common_route(run, recipe)
    model = new_network(args, network.data, recipe)
    resume = (run.folder / RESUME_FILE).exists()
    options = RunOptions(run.folder, resume, devices=1, accelerator=accelerator, progress=False)
    result = train(model, network.data, recipe, network.budget, options)
    step = result.steps
    if step != recipe.iterations:
        raise RuntimeError(f"the training of {run.name} ended at step {step} of {recipe.iterations}")
    pictures = open_data(network.data, "val", run.seed)
    evaluation = result.found
    if evaluation is None:  # the last step was done and saved already
        model.to("cuda" if options.on_gpu else "cpu")
        model.save(run.folder / "last")
        evaluation = evaluate(model, evaluation_loader(pictures, network.data.workers), SkipEngine(model))
    height, width = pictures.read(0)[1].shape
    table = model_cost(model, (height, width))
    share = float(table.expected(torch.from_numpy(evaluation.gates)).mean()) / table.budgeted
    found = {
        **evaluation.as_dict(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "expected_share": share if model.config.gated else None,
        "seed": run.seed,
        "iterations": step,
        "precision": result.precision,
        "seconds": result.seconds,
        "resumed": resume,
        "settings": run.settings,
        **machine_facts(),
    }
    write_json(run.folder / RESULT_FILE, found)
    return found


def _common_route(run: Run, recipe: Recipe) -> list[list]:
    """The route of a common network, as the network's argument; kept in the run's folder."""
    path = run.folder / "route.json"
    if not path.exists():
        assert run.source is not None and run.network.common is not None
        dynamic = checkpoints.load(run.source / "last").to("cuda" if torch.cuda.is_available() else "cpu")
        pictures = open_data(run.network.data, "train", recipe.seed)
        gates = evaluate(dynamic, evaluation_loader(pictures), SkipEngine(dynamic)).gates
        route = common_route(gates, run.network.common[1])
        write_json(path, json.loads(route.to_json()))
    return [list(edge) for edge in Route.from_json(path.read_text()).named_edges]


def perform_all(
    runs: Sequence[Run], jobs: int, command: Sequence[str], on_finished: Callable[[], Any]
) -> dict[str, str]:
    """Performs the runs that are not finished, `jobs` processes at a time; returns why, for each that failed."""
    waiting = [run for run in runs if not run.finished]
    active: dict[subprocess.Popen, Run] = {}
    failed: dict[str, str] = {}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    start, total, done = time.monotonic(), len(waiting), 0
    print(f"{len(runs) - total} runs are finished, {total} to do", flush=True)
    try:
        while waiting or active:
            for run in list(waiting):
                source = next((r for r in runs if r.folder == run.source), None)
                if source is not None and source.name in failed:
                    waiting.remove(run)
                    failed[run.name] = f"it needs {source.name}, which failed"
                elif len(active) < jobs and (source is None or source.finished):
                    waiting.remove(run)
                    active[_start(run, command, threads)] = run
            time.sleep(POLL_SECONDS)
            for process in [p for p in active if p.poll() is not None]:
                run, done = active.pop(process), done + 1
                if process.returncode == 0 and (found := run.result):
                    elapsed = time.monotonic() - start
                    left = elapsed / done * (total - done)
                    cost = found["cost_gmacs"]["mean"]
                    print(
                        f"{run.name}: mIoU {100 * found['miou']:.1f} %, {cost:.3f} GMACs, {found['seconds']:.0f} s; "
                        f"{done} of {total} after {elapsed / 60:.1f} minutes, about {left / 60:.0f} left",
                        flush=True,
                    )
                    on_finished()
                else:
                    failed[run.name] = f"exit code {process.returncode}, see {run.folder / 'log.txt'}"
                    tail = (run.folder / "log.txt").read_text().splitlines()[-LOG_TAIL:]
                    print(f"{run.name} FAILED:", *tail, sep="\n    ", flush=True)
    finally:
        for process in active:  # a checkpoint is whole or not there: they may die at any moment
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return failed


def _start(run: Run, command: Sequence[str], threads: int) -> subprocess.Popen:
    run.folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, __file__, *command, "--one", run.network.name, str(run.seed)]
    with (run.folder / "log.txt").open("a") as log:
        return subprocess.Popen(
            words,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), PARENT_KEY: str(os.getpid())},
            start_new_session=True,  # its loader processes die with it
        )


def _die_with_parent() -> None:
    """Ends this process when the one that started it is gone: two must never train in one folder."""
    parent = int(os.environ[PARENT_KEY])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def at_equal_cost(rows: Sequence[dict[str, Any]]) -> None:
    """Gives each row that is not dynamic `dynamic_at_equal_cost`: the mIoU of the dynamic networks at its mean cost, on
    the straight lines between them; None if it is cheaper or dearer than all of them."""
    curve = sorted((row["gmacs"]["mean"], row["miou_mean"]) for row in rows if row["kind"] == "dynamic")
    for row in rows:
        cost = row["gmacs"]["mean"]
        inside = row["kind"] != "dynamic" and len(curve) > 1 and curve[0][0] <= cost <= curve[-1][0]
        row["dynamic_at_equal_cost"] = float(np.interp(cost, *zip(*curve, strict=True))) if inside else None


def summary(runs: Sequence[Run], asked: Sequence[Run], command: Sequence[str]) -> dict[str, Any]:
    """The JSON of the table, from the runs that are finished; shares and mIoU are 0..1, costs GMACs. `missing` names
    the runs that were asked for and are not finished."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        groups.setdefault(run.network.name, []).append(run)
    order = {name: place for place, name in enumerate(PAPER)}
    rows = [
        _row(group[0].network, results)
        for _, group in sorted(groups.items(), key=lambda item: order.get(item[0], len(order)))
        if (results := [run.result for run in group if run.result is not None])
    ]
    at_equal_cost(rows)
    settings = {part: dict(runs[0].settings[part]) for part in ("data", "recipe")}
    del settings["recipe"]["seed"]
    last = max((run for row in rows for run in row["runs"]), key=lambda run: run["date"], default=machine_facts())
    return {
        "settings": settings,
        "seeds": sorted({run.seed for run in runs if run.finished} or {run.seed for run in asked}),
        "missing": [run.name for run in asked if not run.finished],
        "rows": rows,
        "command": ["benchmarks/table1.py", *command],
        **{key: last[key] for key in ("machine", "date", "versions")},
    }


def _row(network: Network, results: list[dict[str, Any]]) -> dict[str, Any]:
    miou = [found["miou"] for found in results]
    shares = [found["expected_share"] for found in results]
    paper = None
    if network.name in PAPER:
        paper_miou, paper_gmacs, params = PAPER[network.name]
        gmacs = dict(zip(COSTS, paper_gmacs, strict=False))
        paper = {"miou": round(paper_miou / 100, 4), "gmacs": gmacs, "params_m": params}
    return {
        "name": network.name,
        "label": network.label,
        "kind": network.kind,
        "seeds": [found["seed"] for found in results],
        "miou": miou,
        "miou_mean": statistics.mean(miou),
        "miou_std": statistics.stdev(miou) if len(miou) > 1 else None,
        "gmacs": {key: statistics.mean(found["cost_gmacs"][key] for found in results) for key in COSTS},
        "params_m": statistics.mean(found["parameters"] for found in results) / 1e6,
        "expected_share": None if None in shares else statistics.mean(shares),
        "paper": paper,
        "model": results[0]["settings"]["model"],
        "budget": results[0]["settings"]["budget"],
        "changes": network.changes,
        "common": network.common and {"of": network.common[0], "threshold": network.common[1]},
        "runs": [{key: value for key, value in found.items() if key != "settings"} for found in results],
    }


def finished_and(asked: Sequence[Run], networks: Mapping[str, Network], folder: Path) -> list[Run]:
    """The runs asked for, and those of the experiment that are finished already, with the settings of today."""
    seeds = {int(path.name.removeprefix("seed")) for path in folder.glob("*/seed*") if path.name[4:].isdigit()}
    others = plan(networks, list(networks), sorted(seeds), folder)
    known = {run.folder for run in asked}
    return [*asked, *(run for run in others if run.folder not in known and run.finished and run.fits)]


def write_summary(runs: Sequence[Run], asked: Sequence[Run], command: Sequence[str], output: Path) -> dict[str, Any]:
    """Writes OUTPUT and the Markdown table beside it."""
    facts = summary(runs, asked, command)
    write_json(output, facts)
    write_atomically(output.with_suffix(".md"), (comparison([facts], "") + "\n").encode())
    return facts


def main(arguments: Sequence[str] | None = None) -> int:
    command = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="the experiment file")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--networks", help="names, comma-separated; all of the file unless given")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--folder", type=Path, help="of the runs; runs/table1_CONFIG unless given")
    parser.add_argument("--output", type=Path, help="results/table1_CONFIG.json unless given")
    parser.add_argument("--figure", type=Path, help="OUTPUT with .png unless given")
    parser.add_argument("--accelerator", default="auto", help="cpu, gpu or auto")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args, words = parser.parse_known_args(command)
    title = f"table1_{args.config.stem}"
    folder = args.folder or Path("runs") / title
    output = args.output or Path("results") / f"{title}.json"
    figure = args.figure or output.with_suffix(".png")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs end with us
    try:
        networks = read_experiment(args.config, words)
        if args.one:
            _die_with_parent()
            perform(plan(networks, args.one[:1], [int(args.one[1])], folder)[-1], args.accelerator)
            return 0
        try:
            seeds = list(dict.fromkeys(int(seed) for seed in args.seeds.split(",")))
        except ValueError as error:
            raise ValueError(f"--seeds is {args.seeds!r}: give whole numbers, as in 0,1,2") from error
        if args.jobs < 1:
            raise ValueError(f"--jobs is {args.jobs}: it must be at least 1")
        runs = plan(networks, args.networks.split(",") if args.networks else list(networks), seeds, folder)
        for run in runs:
            run.check()
        for name in {run.network.name for run in runs}:  # what makes no network is found before the first training
            with torch.device("meta"):
                DynamicRoutingNetwork(**vars(networks[name].args.model))
        figures.picture_kind(figure)
        if output.suffix != ".json":
            raise ValueError(f"--output is {output}: name it .json (the Markdown table goes beside it)")
        check_writable(output.parent)
        check_writable(folder, "--folder")

        def write() -> dict[str, Any]:
            return write_summary(finished_and(runs, networks, folder), runs, command, output)

        failed = perform_all(runs, args.jobs, command, write)
        facts = write()
        if facts["rows"]:
            figures.accuracy_cost(figure, facts["rows"])
    except (ValueError, OSError) as error:
        if args.one:
            raise  # the whole story belongs into the log
        print(f"table1: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("table1: interrupted; the same command goes on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(comparison([facts], ""))
    for name, reason in failed.items():
        print(f"missing: {name}: {reason}", file=sys.stderr)
    return 1 if facts["missing"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
