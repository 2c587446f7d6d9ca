"""The tables that the commands print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from routeseg.data.tools.check import SplitCheck
from routeseg.data.tools.findings import VERDICTS, Finding, verdict
from routeseg.errors import printable

if TYPE_CHECKING:
    from routeseg.cost.latency import LatencyTable
    from routeseg.evaluation import Evaluation
    from routeseg.model import DynamicRoutingNetwork
    from routeseg.survey.routes import RouteSurvey

BUDGETS_SHOWN = 8
FILES_SHOWN = 20  # of the files that a finding is about


def print_evaluation(result: Evaluation) -> None:
    """The table of `routeseg evaluate`."""
    console = Console()
    data = result.as_dict()
    summary = Table(show_header=False)
    if result.has_labels:
        console.print(_class_table(result))
        summary.add_row("mIoU", f"{100 * data['miou']:.2f} %")
        if result.boundary_iou is not None:
            summary.add_row("boundary mIoU", f"{100 * data['boundary_miou']:.2f} %")
        summary.add_row("mIoU of the most frequent class", f"{100 * data['majority_class_miou']:.2f} %")
        summary.add_row("pixel accuracy", f"{100 * data['pixel_accuracy']:.2f} %")
    else:
        print("no labels in this split: there is no score")
    summary.add_row("images", f"{data['images']}" + (f" ({data['skipped']} skipped)" if data["skipped"] else ""))
    if data["passes_per_image"] != 1:
        summary.add_row("passes over an image", f"{data['passes_per_image']:.4g}, whose costs are added up")
    summary.add_row("precision", data["precision"])
    _add_costs(summary, data["cost_gmacs"])
    console.print(summary)


def _class_table(result: Evaluation) -> Table:
    """IoU of each class, and boundary IoU if it was asked for."""
    table = Table(title="IoU per class, %", title_justify="left")
    table.add_column("class")
    columns = [result.iou] if result.boundary_iou is None else [result.iou, result.boundary_iou]
    for name in ("IoU", "boundary IoU")[: len(columns)]:
        table.add_column(name, justify="right")
    for name, *values in zip(result.class_names, *columns, strict=True):
        table.add_row(name, *("absent" if value != value else f"{100 * value:.1f}" for value in values))
    return table


def print_exits(model: DynamicRoutingNetwork) -> None:
    """The exits of a calibrated network: what each costs, and who leaves there at some budgets."""
    assert model.exits is not None and model.config.exits is not None
    known = model.exits.table
    budgets = np.linspace(known.costs[0], known.costs[-1], BUDGETS_SHOWN)[1:-1]
    table = Table(title="exits: cost, and share of images that leave there at a budget, %", title_justify="left")
    for name in ("behind layer", "cost", *(f"{100 * budget:.0f}" for budget in budgets)):
        table.add_column(name, justify="right")
    shares = [
        [np.interp(known.price_of(np.array(budget)), known.prices, column) for budget in budgets]
        for column in known.frequencies.T
    ]
    for layer, cost, row in zip(model.config.exits, known.costs, shares, strict=True):
        table.add_row(str(layer), f"{100 * cost:.1f}", *(f"{100 * share:.0f}" for share in row))
    Console().print(table)


def print_survey(survey: RouteSurvey) -> None:
    """The tables of `routeseg routes`, and what the tests say in words."""
    console = Console()
    data = survey.as_dict()
    cost, edges = data["cost_gmacs"], data["edges_open"]
    summary = Table(show_header=False)
    summary.add_row("images", f"{data['images']}" + (f" ({data['skipped']} skipped)" if data["skipped"] else ""))
    _add_costs(summary, cost)
    for key in ("always", "sometimes", "never"):
        summary.add_row(f"edges {key} open", f"{edges[key]} of {sum(edges.values())}")
    summary.add_row("different routes", f"{data['distinct_routes']}")
    for key, image in (("cheapest", min), ("dearest", max)):
        found = image(data["per_image"], key=lambda entry: entry["cost_share"])
        share = f"{100 * found['cost_share']:.1f} % of the full network"
        summary.add_row(f"{key} image", f"{found['name']}, {found['cost_gmacs']:.3f} GMACs ({share})")
    console.print(summary)
    units = "object size in % of the image's side, cost in % of the full network"
    table = Table(title=f"Routes by {survey.grouped_by}\n({units})", title_justify="left")
    table.add_column("group")
    for name in ("images", "size", "open edges", "cost", "min", "max"):
        table.add_column(name, justify="right")
    for group in data["groups"]:
        size, share = group["object_size"]["mean"], group["cost_share"]
        table.add_row(
            group["name"],
            f"{group['images']}",
            "none" if size is None else f"{100 * size:.1f}",
            f"{group['open_edges']:.1f}",
            *(f"{100 * share[key]:.2f}" for key in ("mean", "min", "max")),
        )
    console.print(table)
    if "effort" in data:
        console.print(_effort_table(data["effort"]))
    for sentence in data["in_words"]:
        print(sentence)


def _effort_table(effort: dict[str, Any]) -> Table:
    """Where the pixels of each class that occurs leave, the dearest class first."""
    title = "Where pixels of each class leave, and their cost\n(% of them behind each layer, % of the full network)"
    table = Table(title=title, title_justify="left")
    first = ["first look"] if "first_look" in effort["all"] else []
    for name in ("class", *first, *(f"layer {layer}" for layer in effort["behind_layers"]), "cost"):
        table.add_column(name, justify="right" if table.columns else "left")
    known = [(name, row) for name, row in effort["classes"].items() if row is not None]
    known.sort(key=lambda one: -one[1]["cost_share"])
    for name, row in [*known, ("all pixels", effort["all"])]:
        before = [row["first_look"]] if first else []
        table.add_row(escape(name), *(f"{100 * share:.1f}" for share in (*before, *row["leave"], row["cost_share"])))
    return table


def _add_costs(table: Table, cost: dict[str, float]) -> None:
    """The rows about real cost of a table of two columns."""
    for key in ("mean", "min", "max"):
        table.add_row(
            f"real cost, {key}", f"{cost[key]:.3f} GMACs ({100 * cost[key + '_share']:.1f} % of the full network)"
        )
    table.add_row("full network", f"{cost['full']:.3f} GMACs")


def print_check(checks: Sequence[SplitCheck], findings: Sequence[Finding], crop: tuple[int, int]) -> None:
    """What `routeseg check-data` found: splits, classes, what is wrong, and the verdict."""
    console = Console()
    table = Table(title="Images (width x height)", title_justify="left")
    for column in ("", *(check.split for check in checks)):
        table.add_column(column, justify="right" if table.columns else "left")
    for title, cell in (
        ("images", lambda check: f"{len(check.images)}"),
        ("files left out", lambda check: f"{sum(len(some.files) for some in check.left_out)}"),
        ("unreadable", lambda check: f"{len(check.unreadable)}"),
        ("labels of another size", lambda check: f"{len(check.misfits)}"),
        ("without labels", lambda check: f"{len(check.blank)}"),
        ("smallest", lambda check: _size(min(check.sizes, default=None, key=np.prod))),
        ("largest", lambda check: _size(max(check.sizes, default=None, key=np.prod))),
        ("most frequent", lambda check: "".join(_size(size) for size, _ in check.sizes.most_common(1))),
        (f"smaller than the crop, {_size(crop)}", lambda check: f"{check.smaller_than(crop)}"),
        ("labels", lambda check: ", ".join(sorted({image.kind for image in check.images if image.kind}))),
        ("ignored pixels", lambda check: f"{100 * check.pixels[-1] / max(check.pixels.sum(), 1):.1f} %"),
    ):
        failed = "cannot be opened" if not table.rows else ""
        table.add_row(title, *(cell(check) if check.failure is None else failed for check in checks))
    console.print(table)
    if any(check.classes.names for check in checks):
        console.print(_class_shares(checks))
    for finding in findings:
        print(printable(f"\n{finding.level}: {finding.text}"))
        for file in finding.files[:FILES_SHOWN]:
            print(printable(f"    {file}"))
        if len(finding.files) > FILES_SHOWN:
            print(f"    and {len(finding.files) - FILES_SHOWN} more")
        print(printable(f"  what to do: {finding.remedy}"))
    print(f"\n{VERDICTS[verdict(findings)]}")


def _size(size: tuple[int, int] | None) -> str:
    return "none" if size is None else f"{size[1]}x{size[0]}"


def _class_shares(checks: Sequence[SplitCheck]) -> Table:
    """Of each class, its share of the labelled pixels, and in how many images it occurs."""
    table = Table(title="Classes: % of the labelled pixels, and images that show them", title_justify="left")
    table.add_column("class")
    for check in checks:
        table.add_column(f"{check.split}, %", justify="right")
        table.add_column("images", justify="right")
    for k, name in enumerate(next(check.classes.names for check in checks if check.classes.names)):
        cells: list[str] = []
        for check in checks:
            count = 0 if check.failure else int(check.in_images[k])
            nothing = ["", ""] if check.failure else ["never", "0"]
            cells += [f"{100 * check.shares()[k]:.2f}", f"{count}"] if count else nothing
        table.add_row(escape(name), *cells)
    return table


def print_architectures(rows: Sequence[dict[str, Any]], title: str) -> None:
    """The table of `routeseg architectures`."""
    table = Table(title=f"{title}\n(GMACs, parameters in M)", title_justify="left", caption_justify="left")
    for column in ("", "nodes", "edges", "static", "with gates", "Table 1"):
        table.add_column(column, justify="right" if table.columns else "left")
    for row in rows:
        pairs = [
            f"{row[prefix + 'gmacs']:.1f}, {row[prefix + 'params_m']:.{digits}f}"
            for prefix, digits in (("static_", 2), ("", 2), ("paper_", 1))
        ]
        table.add_row(row["name"], str(row["nodes"]), str(row["edges"]), *pairs)
    table.caption = (
        "static: as `--model.route` trains it, no gates. with gates: those of its nodes counted too, as Table 1 seems "
        "to do. Table 1: the paper, at 1024x2048 with 64 channels."
    )
    Console().print(table)


def print_latency(table: LatencyTable, model: DynamicRoutingNetwork) -> None:
    """The table of `routeseg profile`: what an image takes that leaves at each exit, or with all paths open and with
    those that its own gates open."""
    from routeseg.budgets.asked import levels

    config, ms = model.config, table.exits_ms
    if config.exits is None:
        rows = [["all open", "100", f"{ms[0]:.2f}"]]
        if own := table.facts.get("own_gates"):
            rows.append(["its own gates, on one image", f"{100 * own['share_of_full']:.1f}", f"{own['ms']:.2f}"])
    else:
        shares = levels(model, table.size)
        rows = [
            [name, f"{100 * share:.1f}", f"{time:.2f}"]
            for name, share, time in zip(config.named_routes, shares, ms, strict=True)
        ]
    shown = Table(title=f"{table.size[0]}x{table.size[1]}, {table.device}, {table.precision}", title_justify="left")
    for column in ("", "% of the full cost", "ms"):
        shown.add_column(column, justify="right" if shown.columns else "left")
    if config.place is not None:
        shown.add_column("ms if half of the places left before", justify="right")
        fixed, running, _ = table.stretches_ms.T
        halves = ["", *(f"{half:.2f}" for half in ms[:-1] + (fixed + running / 2)[1:])]
        rows = [[*row, half] for row, half in zip(rows, halves, strict=True)]
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
