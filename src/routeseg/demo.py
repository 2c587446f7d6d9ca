"""The demo: train for a bounded time, evaluate, and write a report that shows what the network does.

OUTPUT/run/        the run: last.ckpt, best/, last/, logs/
OUTPUT/result.json the numbers of the report, with machine, date and versions
OUTPUT/*.png, report.html
"""

from __future__ import annotations

import copy
import csv
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from routeseg import figures
from routeseg.cost.budget import Budget
from routeseg.cost.macs import model_cost
from routeseg.data.config import DataConfig, open_data, pair
from routeseg.data.datamodule import SegmentationDataModule
from routeseg.data.loaders import evaluation_loader, image_tensor
from routeseg.data.pairs import SegmentationData
from routeseg.data.scenes import PRESETS
from routeseg.engine import SkipEngine
from routeseg.evaluation import Evaluation, evaluate, machine_facts
from routeseg.figures.report import Report
from routeseg.files import write_atomically, write_json
from routeseg.model import DynamicRoutingNetwork, checkpoints
from routeseg.training.recipe import Recipe
from routeseg.training.run import RunOptions
from routeseg.training.segmentation import SegmentationTask, train

PICTURES_PER_PRESET = 40
GALLERY = 6
CALIBRATION_STEPS = 4
TRAINING_SHARE = 0.65  # of the time asked for; the rest goes to drawing pictures and to validation
VALIDATIONS = 4


def run_demo(
    model: DynamicRoutingNetwork, data: DataConfig, recipe: Recipe, budget: Budget, output: Path, minutes: float | None
) -> Path:
    """Trains `model` for about `minutes` (None: the recipe's iterations), evaluates it, and writes the report.

    Returns the report's path. Replaces what an earlier demo wrote into `output`.
    """
    start = time.monotonic()
    if minutes is not None:
        recipe = fit_to_time(model, data, recipe, budget, minutes)
    print(f"training for {recipe.iterations} iterations of {data.batch_size} pictures")
    if (output / "report.html").exists():
        shutil.rmtree(output / "run", ignore_errors=True)
    result = train(model, data, recipe, budget, RunOptions(output / "run", devices=1))
    best = checkpoints.load(output / "run" / "best")
    pictures = open_data(data, "val", recipe.seed)
    engine = SkipEngine(best)
    evaluation = evaluate(best, evaluation_loader(pictures), engine)
    facts = {
        **evaluation.as_dict(),
        "training_minutes": result.seconds / 60,
        "iterations": recipe.iterations,
        "parameters": sum(p.numel() for p in best.parameters()),
        "data": asdict(data),
        "recipe": asdict(recipe),
        "budget": asdict(budget),
        **machine_facts(),
    }
    facts["data"].pop("root")
    by_preset = preset_costs(best, engine, data, recipe.seed) if data.name == "scenes" else {}
    facts["cost_by_preset"] = {name: float(share.mean()) for name, share in by_preset.items()}
    path = write_report(best, engine, pictures, evaluation, facts, budget, output)
    write_json(output / "result.json", facts)
    share = facts["cost_gmacs"]["mean_share"]
    print(
        f"mIoU {100 * evaluation.miou:.1f} % (most frequent class everywhere: {100 * evaluation.majority_miou:.1f} %), "
        f"mean real cost {100 * share:.1f} % of the full network\n"
        f"{path}   ({(time.monotonic() - start) / 60:.1f} minutes)"
    )
    return path


def fit_to_time(
    model: DynamicRoutingNetwork, data: DataConfig, recipe: Recipe, budget: Budget, minutes: float
) -> Recipe:
    """The recipe with as many iterations as fit into `minutes` on this machine.

    Times forward, loss and backward of a few batches, as the training computes them, on a copy of the network.
    """
    module = SegmentationDataModule(replace(data, workers=0), CALIBRATION_STEPS, recipe.seed)
    trial = copy.deepcopy(model).train()
    trial.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack memory_format
    task = SegmentationTask(trial, recipe, budget, pair(data.crop))
    seconds = []
    for batch in module.train_dataloader():
        start = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16-mixed"):
            task.part(batch["image"], batch["labels"], task.count(batch["labels"])).loss.backward()
        seconds.append(time.monotonic() - start)
    steps = minutes * 60 * TRAINING_SHARE / (statistics.median(seconds[1:]) * recipe.accumulate)
    every = max(5, int(steps / VALIDATIONS))
    iterations = every * VALIDATIONS
    return replace(
        recipe, iterations=iterations, validate_every=every, warmup_steps=min(recipe.warmup_steps, iterations // 10)
    )


def preset_costs(
    model: DynamicRoutingNetwork, engine: SkipEngine, data: DataConfig, seed: int
) -> dict[str, np.ndarray]:
    """Real cost over pictures of each scale preset, as shares of the full network [pictures]."""
    shares: dict[str, np.ndarray] = {}
    for preset in PRESETS:
        pictures = open_data(replace(data, preset=preset, val_images=PICTURES_PER_PRESET), "val", seed)
        result = evaluate(model, evaluation_loader(pictures), engine)
        shares[preset] = result.cost_macs / result.full_macs
    return shares


def read_log(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's CSV logs, in the order of the steps; a resumed run replaces the steps that it repeats."""
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for path in sorted((run / "logs").glob("version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                rows[int(row["step"]), bool(row.get("val_miou"))] = row
    return [rows[key] for key in sorted(rows)]


def write_report(
    model: DynamicRoutingNetwork,
    engine: SkipEngine,
    pictures: SegmentationData,
    evaluation: Evaluation,
    facts: dict[str, Any],
    budget: Budget,
    output: Path,
) -> Path:
    """Draws every figure into `output` and binds them into OUTPUT/report.html."""
    cost, iterations = facts["cost_gmacs"], facts["iterations"]
    title = f"routeseg on {facts['data']['name']}"
    report = Report(title, "A segmentation network that picks its own depth and resolution for every image")
    report.key_numbers(
        [
            (f"{100 * facts['miou']:.1f} %", "mIoU on validation pictures"),
            (f"{100 * facts['majority_class_miou']:.1f} %", "mIoU of the most frequent class everywhere"),
            (f"{100 * cost['mean_share']:.0f} %", "of the full network's cost, on average"),
            (f"{facts['training_minutes']:.1f} min", f"of training on {facts['machine']['cores']} cores"),
        ]
    )

    report.heading("One route per picture")
    routes = output / "routes.png"
    figures.routes_side_by_side(routes, model.space, _panels(model, engine, pictures, evaluation, facts))
    report.paragraph(
        "Columns are layers, rows are scales from 1/4 of the resolution down to 1/32. A filled node runs its cell; "
        "thick lines are open paths, faint ones are closed and not computed."
    )
    report.figure(routes, "Picture, segmentation and route (compare the paper's Figure 1)")

    if facts["cost_by_preset"]:
        report.heading("Cost by the scale of things")
        report.paragraph(
            f"Mean real cost over {PICTURES_PER_PRESET} pictures of each preset, as a share of the full network. "
            "It is reported as measured: nothing in the training tells the network to follow the scale."
        )
        report.table(
            ["preset", "mean cost, % of full"],
            [[name, f"{100 * s:.2f}"] for name, s in facts["cost_by_preset"].items()],
        )

    report.heading("Segmentations")
    gallery = []
    for index in np.linspace(0, len(pictures) - 1, min(GALLERY, len(pictures))).round().astype(int):
        image, labels, _ = _segment(engine, pictures, int(index))
        path = output / f"overlay_{pictures.name(int(index))}.png"
        overlay = figures.overlay(image, labels, model.config.class_names, model.config.palette)
        write_atomically(path, figures.png_bytes(overlay))
        gallery.append((path, pictures.name(int(index))))
    report.gallery(gallery)

    report.heading("Training")
    curves, bars, histogram = (output / f"{name}.png" for name in ("curves", "class_iou", "cost"))
    start = int(budget.start * iterations) if budget.weight > 0 else None
    figures.learning_curves(curves, read_log(output / "run"), start, budget.target if budget.weight > 0 else None)
    report.figure(curves, "Loss, validation mIoU, and expected and real cost over the training")
    figures.class_iou_bars(bars, model.config.class_names, evaluation.iou, model.config.palette)
    report.figure(bars, "IoU per class on the validation pictures")
    figures.cost_histogram(histogram, evaluation.cost_macs / 1e9, float(evaluation.full_macs.mean() / 1e9))
    report.figure(histogram, "Real cost of the validation pictures")

    report.heading("How it was made")
    machine, versions = facts["machine"], facts["versions"]
    size = f"{model.config.base_channels} channels, {facts['parameters'] / 1e6:.2f} M parameters"
    spread = f"min {cost['min']:.3f}, max {cost['max']:.3f}, full {cost['full']:.3f}"
    report.table(
        ["", ""],
        [
            ["network", f"depth {model.space.depth}, {size}"],
            ["training", f"{iterations} iterations of {facts['data']['batch_size']} pictures"],
            ["budget", f"weight {budget.weight}, target {budget.target} of the expected cost"],
            ["real cost", f"{cost['mean']:.3f} GMACs ({spread})"],
            ["machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}"],
            ["date, versions", f"{facts['date']}, " + ", ".join(f"{name} {v}" for name, v in versions.items())],
        ],
    )
    path = output / "report.html"
    report.write(path)
    return path


def _segment(engine: SkipEngine, pictures: SegmentationData, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image [H,W,3], labels [H,W] and gates [L+1,S,3] of a picture."""
    image, _ = pictures.read(index)
    result = engine(image_tensor(image)[None])
    return image, result.labels[0].numpy().astype(np.uint8), result.gates[0].numpy()


def _panels(
    model: DynamicRoutingNetwork,
    engine: SkipEngine,
    pictures: SegmentationData,
    evaluation: Evaluation,
    facts: dict[str, Any],
) -> Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, str]]:
    """Of scenes a large-, a small- and a mixed-scale picture; of other data the cheapest, the median, the dearest."""
    chosen: list[tuple[SegmentationData, int, str]]
    if facts["data"]["name"] == "scenes":
        data = DataConfig(**facts["data"])
        chosen = [
            (open_data(replace(data, preset=p, val_images=1), "val", facts["recipe"]["seed"]), 0, p) for p in PRESETS
        ]
    else:
        order = np.argsort(evaluation.cost_macs)
        places = {"cheapest": order[0], "median": order[len(order) // 2], "dearest": order[-1]}
        chosen = [(pictures, int(index), name) for name, index in places.items()]
    panels = []
    for source, index, name in chosen:
        image, labels, gates = _segment(engine, source, index)
        table = model_cost(model, labels.shape)
        macs = float(table.of_gates(gates))
        title = f"{name}: {macs / 1e9:.3f} GMACs ({100 * macs / table.full:.0f} % of full)"
        drawn = figures.overlay(image, labels, model.config.class_names, model.config.palette, legend=False)
        panels.append((image, drawn, gates, title))
    return panels
