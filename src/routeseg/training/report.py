"""The report of a run, one HTML page: how it went, the score of each class, the worst and the best images, cost."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from routeseg import figures
from routeseg.data.config import DataConfig
from routeseg.evaluation import Evaluation, machine_facts
from routeseg.evaluation.ranking import Judged, Ranking
from routeseg.figures.report import Report
from routeseg.labels import IGNORE, see_through
from routeseg.model import DynamicRoutingNetwork
from routeseg.training.gate_budget import Budget
from routeseg.training.recipe import Recipe
from routeseg.training.run import RunResult

REPORT_FILE = "report.html"
FIGURES_FOLDER = "figures"  # of a run: those of its report
WHITE = (255, 255, 255)  # in a legend: what one sees through
CONFUSIONS = 8  # that are listed
CONFUSED = 0.01  # share of a class's pixels from which a confusion is listed


@dataclass(frozen=True)
class FinishedRun:
    """A run that is over.

    network     the one of its last step, as in FOLDER/last
    evaluation  of that network, by the last validation of the run; ranking: its worst and best images, if there are
    minutes     since the run was started, or since it was resumed
    """

    folder: Path
    network: DynamicRoutingNetwork
    data: DataConfig
    recipe: Recipe
    budget: Budget
    evaluation: Evaluation
    ranking: Ranking | None
    minutes: float
    precision: str

    @classmethod
    def of(
        cls,
        result: RunResult[Evaluation],
        folder: Path,
        network: DynamicRoutingNetwork,
        data: DataConfig,
        recipe: Recipe,
        budget: Budget,
    ) -> FinishedRun:
        """What `train` was given, and its result. Raises ValueError if the run had no step left to do."""
        if result.found is None:
            raise ValueError("the run had no step left to do")
        minutes, precision = result.seconds / 60, result.precision
        return cls(folder, network, data, recipe, budget, result.found, result.ranking, minutes, precision)

    def facts(self) -> dict[str, Any]:
        """The numbers of the report, for a JSON file, with machine, date and versions. Where the data lie is left
        out."""
        facts = {
            **self.evaluation.as_dict(),
            "training_minutes": self.minutes,
            "iterations": self.recipe.iterations,
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "data": asdict(self.data),
            "recipe": asdict(self.recipe) | {"precision": self.precision},
            "budget": asdict(self.budget),
            **machine_facts(),
        }
        facts["data"].pop("root")
        return facts


def write_report(
    run: FinishedRun, path: Path, folder: Path, more: Callable[[Report], None] | None = None, subtitle: str = ""
) -> None:
    """Draws the figures into `folder` and binds them into the page at `path`. `more` adds sections of its own, which
    come first.

    Raises OSError if something cannot be written.
    """
    found, facts = run.evaluation, run.facts()
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(run.data.root).name if run.data.name == "folder" and run.data.root else run.data.name
    report = Report(f"routeseg on {name}", subtitle)
    cards = [
        (f"{100 * facts['cost_gmacs']['mean_share']:.0f} %", "of the full network's cost, on average"),
        (f"{run.minutes:.1f} min", f"of training on {facts['machine']['cores']} cores"),
    ]
    if found.has_labels:
        cards = [
            (f"{100 * found.miou:.1f} %", "mIoU on validation images"),
            (f"{100 * found.majority_miou:.1f} %", "mIoU of the most frequent class everywhere"),
            *cards,
        ]
    report.key_numbers(cards)
    if more is not None:
        more(report)
    _add_training(report, run, folder)
    if found.has_labels:
        _add_classes(report, run, folder)
    if run.ranking is not None:
        for title, chosen in (("The worst images", run.ranking.worst), ("The best images", run.ranking.best)):
            _add_images(report, run, run.ranking, title, chosen, folder)
    _add_cost(report, found, folder)
    _add_how(report, run, facts)
    report.write(path)


def _add_training(report: Report, run: FinishedRun, folder: Path) -> None:
    report.heading("Training")
    curves, budget = folder / "curves.png", run.budget
    hidden = set() if budget.weight > 0 else {"budget_loss"}
    if run.network.exits is not None:  # every layer learns: a step costs the same from the first to the last
        hidden |= {"expected_cost", "real_cost"}
    rows = [{key: value for key, value in row.items() if key not in hidden} for row in read_log(run.folder)]
    start = int(budget.start * run.recipe.iterations) if budget.weight > 0 else None
    figures.learning_curves(curves, rows, start, budget.target if budget.weight > 0 else None)
    report.figure(curves, "The training, step by step")


def _add_classes(report: Report, run: FinishedRun, folder: Path) -> None:
    report.heading("Classes")
    found, names = run.evaluation, run.network.config.class_names
    bars, confusion = folder / "class_iou.png", folder / "confusion.png"
    figures.class_iou_bars(bars, names, found.iou, run.network.config.palette)
    report.figure(bars, "IoU per class on the validation images")
    figures.confusion_matrix(confusion, names, found.confusion)
    report.figure(confusion, "What the pixels of each class are taken for; a row adds up to 100 %")
    rows = confusions(found)
    if rows:
        report.paragraph("What is mistaken most often, by the share of a class's pixels:")
        report.table(
            ["class", "taken for", "of its pixels, %"],
            [[names[true], names[taken], f"{100 * share:.1f}"] for true, taken, share in rows],
        )


def confusions(found: Evaluation) -> list[tuple[int, int, float]]:
    """(class, what it is taken for, share of its pixels), the largest shares first."""
    shares = found.confusion / np.maximum(found.confusion.sum(1, keepdims=True), 1)
    np.fill_diagonal(shares, 0)
    places = np.argwhere(shares >= CONFUSED).tolist()
    return sorted(((i, j, float(shares[i, j])) for i, j in places), key=lambda row: -row[2])[:CONFUSIONS]


def _add_images(
    report: Report, run: FinishedRun, ranking: Ranking, title: str, chosen: Sequence[Judged], folder: Path
) -> None:
    """Images with their labels, what the network made of them, its route, and what that cost."""
    if not chosen:
        return
    config, found = run.network.config, run.evaluation
    panels, seen = [], set()
    for one in chosen:
        image, labels = ranking.read(one)
        row = found.names.index(one.name)
        macs, share = found.cost_macs[row], found.cost_macs[row] / found.full_macs[row]
        tinted = [
            figures.overlay(image, some, config.class_names, config.palette, legend=False)
            for some in (labels, one.prediction)
        ]
        words = f"{one.name}\nmIoU {100 * one.score:.1f} %, {macs / 1e9:.3f} GMACs ({100 * share:.0f} % of full)"
        panels.append(([image, *tinted], found.gates[row], words))
        seen |= set(np.unique(labels).tolist()) | set(np.unique(one.prediction).tolist())
    path = folder / f"{title.split()[1]}.png"
    names = ("image", "label", "prediction")
    figures.routes_side_by_side(path, run.network.space, panels, config.backbone_stages, names)
    report.heading(title)
    colours = list(config.palette)
    if see_through(config.class_names, colours):
        colours[0] = WHITE
    entries = [(config.class_names[k], colours[k]) for k in sorted(seen - {IGNORE})]
    report.legend([*entries, *([("ignored", (0, 0, 0))] if IGNORE in seen else [])])
    report.figure(path, "Image, label, prediction and route. The mIoU of an image is over the classes of its label")


def _add_cost(report: Report, found: Evaluation, folder: Path) -> None:
    report.heading("Cost")
    path = folder / "cost.png"
    figures.cost_histogram(path, found.cost_macs / 1e9, found.full_macs / 1e9)
    report.figure(path, "Real cost of the validation images")


def _add_how(report: Report, run: FinishedRun, facts: dict[str, Any]) -> None:
    report.heading("How it was made")
    machine, versions, cost = facts["machine"], facts["versions"], facts["cost_gmacs"]
    config, recipe, budget = run.network.config, run.recipe, run.budget
    size = f"{config.base_channels} channels, {facts['parameters'] / 1e6:.2f} M parameters"
    backbone = f", on {config.backbone}" if config.backbone else ""
    spread = f"min {cost['min']:.3f}, max {cost['max']:.3f}, full {cost['full']:.3f}"
    images = run.data.batch_size * recipe.accumulate
    rows = [
        ["network", f"depth {config.depth}, {size}{backbone}"],
        ["training", f"{recipe.iterations} iterations of {images} images, {run.precision}"],
        ["real cost", f"{cost['mean']:.3f} GMACs ({spread})"],
        ["validation", f"{facts['images']} images, the network of the last step"],
        ["machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}"],
        ["date, versions", f"{facts['date']}, " + ", ".join(f"{name} {v}" for name, v in versions.items())],
    ]
    if budget.weight > 0:
        rows.insert(2, ["budget", f"weight {budget.weight}, target {budget.target} of the expected cost"])
    report.table(["", ""], rows)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's CSV logs, in the order of the steps; a resumed run replaces the steps that it repeats."""
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for path in sorted((run / "logs").glob("version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                rows[int(row["step"]), bool(row.get("val_miou"))] = row
    return [rows[key] for key in sorted(rows)]
