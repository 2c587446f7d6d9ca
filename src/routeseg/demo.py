"""The demo: train for a bounded time, and write the report of the run with more that shows what the network does.

OUTPUT/run/        the run: last.ckpt, best/, last/, logs/
OUTPUT/result.json the numbers of the report, with machine, date and versions
OUTPUT/*.png, report.html
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from routeseg import figures
from routeseg.cost.macs import model_cost
from routeseg.data.config import DataConfig, open_data, pair
from routeseg.data.loaders import evaluation_loader, image_tensor
from routeseg.data.pairs import SegmentationData
from routeseg.data.scenes import PRESETS
from routeseg.data.subset import evenly_spread
from routeseg.engine import SkipEngine
from routeseg.evaluation import Evaluation, evaluate
from routeseg.figures.report import Report
from routeseg.files import write_atomically, write_json
from routeseg.labels import label_map
from routeseg.model import DynamicRoutingNetwork, checkpoints
from routeseg.training.clock import Clock
from routeseg.training.gate_budget import Budget
from routeseg.training.pace import Pace, fitted, measure_pace
from routeseg.training.recipe import Recipe
from routeseg.training.report import REPORT_FILE, FinishedRun, write_report
from routeseg.training.run import RunOptions
from routeseg.training.segmentation import train

SUBTITLE = "A segmentation network that picks its own depth and resolution for every image"
IMAGES_PER_PRESET = 40
BUDGETS = (0.25, 0.5, 1.0)  # shares of the full network that one with exits is shown at; at least its cheapest route
GALLERY = 6
VALIDATIONS = 4, 3  # without exits, with exits: each calibrates them; at most
REPORT_SHARE = 0.2  # of the time asked for: at most so much for the images that the report looks at
FIGURES_S, SHOWN = 6.0, 12  # what its figures take, and how many images they show
TRYING_SHARE = 0.15  # of the time asked for: once it is over, no network between this one and the smallest is tried
FEWEST_ITERATIONS = 300  # with fewer a smaller network learns more
# What makes iterations shorter, in this order: at most so many channels, layers, a share of the sides of an image.
SMALLER = (("channels", 16), ("depth", 5), ("channels", 8), ("sides", 0.5))


def run_demo(
    model: DynamicRoutingNetwork,
    data: DataConfig,
    recipe: Recipe,
    budget: Budget,
    output: Path,
    clock: Clock | None = None,
) -> Path:
    """Trains a network, and reports on the one of the last step: `model` for the recipe's iterations, or, if there is a
    clock, for as many as fit into its time, and a smaller network if these would be too few.

    Returns the report's path. Replaces what an earlier demo wrote into `output`.
    """
    began = Clock() if clock is None else clock
    plan = Plan(model, data, recipe) if clock is None else fit_to_time(model, data, recipe, budget, clock)
    print(plan)
    model, data, recipe = plan.model, plan.data, plan.recipe
    path = output / REPORT_FILE
    if path.exists():
        shutil.rmtree(output / "run", ignore_errors=True)
    result = train(model, data, recipe, budget, RunOptions(output / "run", devices=1, clock=clock))
    recipe = replace(recipe, iterations=result.steps)
    network = checkpoints.load(output / "run" / "last")
    run = FinishedRun.of(result, output / "run", network, data, recipe, budget)
    evaluation = run.evaluation
    images = evenly_spread(open_data(data, "val", recipe.seed), len(evaluation.cost_macs))  # those of the validation
    engine: Any = SkipEngine(network)
    of_preset, of_val = plan.looks(len(images))
    by_preset = preset_costs(network, engine, data, recipe.seed, of_preset) if data.name == "scenes" else {}
    facts = run.facts()
    facts["pictures_of_preset"] = of_preset
    facts["cost_by_preset"] = {name: float(share.mean()) for name, share in by_preset.items()}
    facts["budgets"] = [] if network.exits is None else ask_for_budgets(network, engine, evenly_spread(images, of_val))
    more = partial(add_demonstrations, network, engine, images, evaluation, facts, output)
    write_report(run, path, output, more, SUBTITLE)
    write_json(output / "result.json", facts)
    share = facts["cost_gmacs"]["mean_share"]
    print(
        f"mIoU {100 * evaluation.miou:.1f} % (most frequent class everywhere: {100 * evaluation.majority_miou:.1f} %), "
        f"mean real cost {100 * share:.1f} % of the full network\n"
        f"{path}   ({began.spent_s / 60:.1f} minutes)"
    )
    return path


@dataclass(frozen=True)
class Plan:
    """What a demo trains; the pace, if it was measured to fit into some minutes."""

    model: DynamicRoutingNetwork
    data: DataConfig
    recipe: Recipe
    minutes: float | None = None
    pace: Pace | None = None

    def looks(self, val: int) -> tuple[int, int]:
        """How many images of each preset, and of the validation, the report looks at: fewer if they take more than
        REPORT_SHARE of the minutes."""
        if self.pace is None or self.minutes is None or not self.pace.image_s:
            return IMAGES_PER_PRESET, val
        fit = REPORT_SHARE * 60 * self.minutes / self.pace.image_s
        share = min(1.0, fit / (IMAGES_PER_PRESET * len(PRESETS) + val * len(BUDGETS)))
        return max(1, int(share * IMAGES_PER_PRESET)), max(1, int(share * val))

    def report_s(self, val: int) -> float:
        """Seconds of the report."""
        assert self.pace is not None
        of_preset, of_val = self.looks(val)
        looks = of_preset * len(PRESETS) + of_val * len(BUDGETS) + SHOWN
        return looks * self.pace.image_s + FIGURES_S

    def __str__(self) -> str:
        steps, images = self.recipe.iterations, self.data.batch_size * self.recipe.accumulate
        lines = [
            f"network: {self.network}",
            f"training: {steps} iterations of {images} images, {steps * images} in all",
        ]
        if self.pace is not None:
            lines[-1] = lines[-1].replace(": ", ": about ", 1)
            lines[-1] += f", as fast as it is now: {self.pace.seconds(steps) / 60:.1f} of {self.minutes:g} minutes"
            lines.append(str(self.pace.choice))
        return "\n".join(lines)

    @property
    def network(self) -> str:
        """The network in words."""
        crop = pair(self.data.crop)
        gmacs = model_cost(self.model, crop).full / 1e9
        channels = self.model.config.base_channels
        return f"depth {self.model.space.depth}, {channels} channels, {gmacs:.3g} GMACs for {crop[0]}x{crop[1]} pixels"


def fit_to_time(
    model: DynamicRoutingNetwork,
    data: DataConfig,
    recipe: Recipe,
    budget: Budget,
    clock: Clock,
    measure: Callable[..., Pace] = measure_pace,
) -> Plan:
    """As many iterations as fit into the time of the clock, of a smaller network if these are too few; says why."""
    minutes, smaller, val = clock.total_s / 60, iter(SMALLER), len(open_data(data, data.val_split, recipe.seed))
    while True:
        pace = measure(model, data, recipe, budget)
        rest_s = Plan(model, data, recipe, minutes, pace).report_s(val)
        fitting = fitted(recipe, pace, clock, VALIDATIONS[model.exits is not None], rest_s)
        plan = Plan(model, data, fitting, minutes, pace)
        if plan.recipe.iterations >= FEWEST_ITERATIONS:
            return plan
        few = f"only {plan.recipe.iterations} iterations fit into {minutes:g} minutes here, a useful result takes some "
        few += f"{FEWEST_ITERATIONS} ({plan.network})"
        found = None
        for one in smaller:
            found = shrink(*(found or (model, data)), recipe.seed, *one) or found
            if found is not None and clock.spent_s < TRYING_SHARE * clock.total_s:
                break  # else there is no time to try each: the smallest one
        if found is None:
            print(f"{few}; this is the smallest network: give more --minutes")
            return plan
        print(f"{few}: taking a smaller network")
        model, data = found


def shrink(
    model: DynamicRoutingNetwork, data: DataConfig, seed: int, what: str, most: float
) -> tuple[DynamicRoutingNetwork, DataConfig] | None:
    """The network and its data with less of something (see SMALLER); None if they have no more of it already."""
    if what == "sides":
        crop, size = ([max(32, int(most * side)) for side in pair(some)] for some in (data.crop, data.image_size))
        return model, replace(data, crop=pair(crop), image_size=pair(size))
    config = model.config
    names = ("base_channels", "stem_channels") if what == "channels" else ("depth",)
    if what == "depth" and (config.route is not None or config.exits is not None):  # they belong to this depth
        return None
    smaller = replace(config, **{name: min(getattr(config, name), int(most)) for name in names})
    torch.manual_seed(seed)
    return None if smaller == config else (DynamicRoutingNetwork(smaller), data)


def preset_costs(
    model: DynamicRoutingNetwork, engine: SkipEngine, data: DataConfig, seed: int, count: int
) -> dict[str, np.ndarray]:
    """Real cost over so many images of each scale preset, as shares of the full network [images]."""
    shares: dict[str, np.ndarray] = {}
    for preset in PRESETS:
        images = open_data(replace(data, preset=preset, val_images=count), "val", seed)
        result = evaluate(model, evaluation_loader(images), engine)
        shares[preset] = result.cost_macs / result.full_macs
    return shares


def ask_for_budgets(
    model: DynamicRoutingNetwork, engine: SkipEngine, images: SegmentationData
) -> list[dict[str, float]]:
    """What a network with exits does at each of BUDGETS over images: shares of the full network's cost that were
    asked and spent, and mIoU."""
    assert model.exits is not None
    rows = []
    for budget in BUDGETS:
        asked = max(budget, float(model.exits.costs[0]))
        found = evaluate(model, evaluation_loader(images), partial(engine, budget=asked))
        spent = found.cost_macs / found.full_macs
        row = {"asked": asked, "spent": spent.mean(), "least": spent.min(), "most": spent.max(), "miou": found.miou}
        rows.append({name: float(value) for name, value in row.items()})
    return rows


def add_demonstrations(
    model: DynamicRoutingNetwork,
    engine: SkipEngine,
    images: SegmentationData,
    evaluation: Evaluation,
    facts: dict[str, Any],
    output: Path,
    report: Report,
) -> None:
    """What only the demo has: routes beside each other, budgets, cost by the scale of things, segmentations. Draws
    their figures into `output`."""
    report.heading("One route per image")
    routes, stages = output / "routes.png", model.config.backbone_stages
    shown = _shown(images, evaluation, facts)
    figures.routes_side_by_side(routes, model.space, [_panel(model, engine, *one) for one in shown], stages)
    report.paragraph(
        "Columns are layers, rows are scales from 1/4 of the resolution down to 1/32. A filled node runs its cell; "
        "thick lines are open paths, faint ones are closed and not computed."
    )
    report.figure(routes, "Image, segmentation and route (compare the paper's Figure 1)")

    if facts["budgets"]:
        report.heading("Any budget")
        report.paragraph(
            "The same network, asked for three budgets: the mean cost of an image, as a share of the full network's. "
            "An image leaves behind the layer that is enough for it."
        )
        report.table(
            ["asked, %", "spent, %: mean", "least", "most", "mIoU, %"],
            [
                [f"{100 * row[name]:.1f}" for name in ("asked", "spent", "least", "most", "miou")]
                for row in facts["budgets"]
            ],
        )
        asked = output / "budgets.png"
        source, index, _ = shown[-1]
        drawn = [
            _panel(model, partial(engine, budget=row["asked"]), source, index, f"asked {100 * row['asked']:.0f} %")
            for row in facts["budgets"]
        ]
        figures.routes_side_by_side(asked, model.space, drawn, stages)
        report.figure(asked, "One image at each budget")

    if facts["cost_by_preset"]:
        report.heading("Cost by the scale of things")
        report.paragraph(
            f"Mean real cost over {facts['pictures_of_preset']} images of each preset, as a share of the full "
            "network. It is reported as measured: nothing in the training tells the network to follow the scale."
        )
        report.table(
            ["preset", "mean cost, % of full"],
            [[name, f"{100 * s:.2f}"] for name, s in facts["cost_by_preset"].items()],
        )

    report.heading("Segmentations")
    gallery = []
    for index in np.linspace(0, len(images) - 1, min(GALLERY, len(images))).round().astype(int):
        image, labels, _ = _segment(engine, images, int(index))
        path = output / f"overlay_{images.name(int(index))}.png"
        overlay = figures.overlay(image, labels, model.config.class_names, model.config.palette)
        write_atomically(path, figures.png_bytes(overlay))
        gallery.append((path, images.name(int(index))))
    report.gallery(gallery)


def _segment(engine: Any, images: SegmentationData, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image [H,W,3], labels [H,W] and gates [L+1,S,3] of an image."""
    image, _ = images.read(index)
    result = engine(image_tensor(image)[None])
    return image, label_map(result.labels[0].numpy(), result.logits.shape[1]), result.gates[0].numpy()


def _shown(
    images: SegmentationData, evaluation: Evaluation, facts: dict[str, Any]
) -> list[tuple[SegmentationData, int, str]]:
    """The images whose routes are drawn: of scenes a large-, a small- and a mixed-scale one; of other data the
    cheapest, the median and the dearest."""
    if facts["data"]["name"] == "scenes":
        data, seed = DataConfig(**facts["data"]), facts["recipe"]["seed"]
        return [(open_data(replace(data, preset=p, val_images=1), "val", seed), 0, p) for p in PRESETS]
    order = np.argsort(evaluation.cost_macs)
    places = {"cheapest": order[0], "median": order[len(order) // 2], "dearest": order[-1]}
    return [(images, int(index), name) for name, index in places.items()]


def _panel(
    model: DynamicRoutingNetwork, engine: Any, source: SegmentationData, index: int, name: str
) -> tuple[list[np.ndarray], np.ndarray, str]:
    """An image and its segmentation, its gates and what it cost, as `figures.routes_side_by_side` draws them."""
    image, labels, gates = _segment(engine, source, index)
    table = model_cost(model, labels.shape)
    macs = float(table.of_gates(gates))
    title = f"{name}: {macs / 1e9:.3f} GMACs ({100 * macs / table.full:.0f} % of full)"
    tinted = figures.overlay(image, labels, model.config.class_names, model.config.palette, legend=False)
    return [image, tinted], gates, title
