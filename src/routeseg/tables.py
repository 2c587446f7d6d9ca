"""The tables that the commands print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from routeseg.evaluation import Evaluation
from routeseg.route_survey import RouteSurvey


def print_evaluation(result: Evaluation) -> None:
    """The table of `routeseg evaluate`."""
    console = Console()
    table = Table(title="IoU per class", title_justify="left")
    table.add_column("class")
    table.add_column("IoU %", justify="right")
    for name, iou in zip(result.class_names, result.iou, strict=True):
        table.add_row(name, "absent" if iou != iou else f"{100 * iou:.1f}")
    console.print(table)
    data = result.as_dict()
    cost = data["cost_gmacs"]
    summary = Table(show_header=False)
    summary.add_row("mIoU", f"{100 * data['miou']:.2f} %")
    summary.add_row("mIoU of the most frequent class", f"{100 * data['majority_class_miou']:.2f} %")
    summary.add_row("pixel accuracy", f"{100 * data['pixel_accuracy']:.2f} %")
    summary.add_row("images", f"{data['images']}" + (f" ({data['skipped']} skipped)" if data["skipped"] else ""))
    _add_costs(summary, cost)
    console.print(summary)


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
        found = image(data["per_image"], key=lambda entry: entry["cost_gmacs"])
        summary.add_row(f"{key} image", f"{found['name']}, {found['cost_gmacs']:.3f} GMACs")
    console.print(summary)
    units = "object size in % of the picture's side, cost in % of the full network"
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
    for sentence in data["in_words"]:
        print(sentence)


def _add_costs(table: Table, cost: dict[str, float]) -> None:
    """The rows about real cost of a table of two columns."""
    for key in ("mean", "min", "max"):
        table.add_row(
            f"real cost, {key}", f"{cost[key]:.3f} GMACs ({100 * cost[key + '_share']:.1f} % of the full network)"
        )
    table.add_row("full network", f"{cost['full']:.3f} GMACs")


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
