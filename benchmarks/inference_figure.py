"""The figure of docs/inference.md: what a forward takes with all paths open, and how its time follows the route."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from routeseg.figures.common import (
    BLUE,
    FAINT,
    INK,
    MUTED,
    ORANGE,
    new_figure,
    picture_kind,
    plain_axes,
    save_figure,
)

OTHERS = MUTED
COLOURS = {"float32": BLUE, "bfloat16": ORANGE}
# Methods of the section latency with all paths open and no gates: name there, name here, colour.
ALL_OPEN = (
    ("plain", "plain PyTorch (gates too)", OTHERS),
    ("eager, all open", "without kernels of our own", BLUE),
    ("static, ONNX Runtime", "ONNX Runtime", OTHERS),
    ("static, OpenVINO float32", "OpenVINO, float32", OTHERS),
    ("engine float32, all open", "SkipEngine, float32", BLUE),
    ("engine bfloat16, all open", "SkipEngine, bfloat16", ORANGE),
    ("static, OpenVINO bfloat16", "OpenVINO, bfloat16", OTHERS),
)


def time_against_macs(path: str | Path, facts: Mapping[str, Any]) -> None:
    """Two panels from results/inference_cpu.json, one image; all methods took turns. Left: medians with all paths open,
    and the bound of matrix products as a tick. Right: medians over the share f of the MACs that a route keeps.

    Raises ValueError if the file lacks the methods; those in bfloat16 not every machine has.
    """
    kind = picture_kind(path)
    size, by_batch = next(iter(facts["latency"].items()))
    methods = by_batch["1"]
    if missing := [name for name, *_ in ALL_OPEN if name not in methods and "bfloat16" not in name]:
        raise ValueError(f"nothing to draw: {', '.join(missing)} was not measured")
    figure = new_figure(10.4, 4.3, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.15))
    _all_open(left, methods)
    _against_macs(right, methods)
    machine = facts["machine"]
    words = f"one image of {size}, depth {facts['network']['depth']}, {facts['network']['channels']} channels; "
    words += f"{machine['gpu'] or machine['cpu']}, {facts['threads']} threads; medians"
    figure.supxlabel(words, fontsize=8, color=MUTED)
    save_figure(figure, path, kind)


def _all_open(ax: Axes, methods: Mapping[str, Any]) -> None:
    """A bar for each method, the slowest on top; a tick for the bound of its precision."""
    plain_axes(ax)
    ax.grid(visible=False, axis="y")
    ax.grid(visible=True, axis="x", color=FAINT, linewidth=0.6)
    rows = [(methods[name], words, colour) for name, words, colour in ALL_OPEN if name in methods]
    rows.sort(key=lambda row: row[0]["median_ms"])
    for place, (row, _, colour) in enumerate(rows):
        ax.barh(place, row["median_ms"], height=0.62, color=colour, alpha=0.85 if colour != OTHERS else 0.45)
        ax.annotate(
            f"{row['median_ms']:.0f}", (row["median_ms"], place), (4, 0), textcoords="offset points", va="center",
            fontsize=8.5, color=INK,
        )  # fmt: skip
        ax.plot([row["bound_ms"]] * 2, [place - 0.4, place + 0.4], color=INK, linewidth=1.4)
    ax.set_yticks(range(len(rows)), [words for _, words, _ in rows])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlim(0, 1.1 * rows[-1][0]["median_ms"])
    ax.set_xlabel("ms, all paths open", color=INK)
    ax.set_title("everything open", fontsize=10, color=INK, loc="left")
    ax.annotate(
        "| bound: the products of matrices in it", (rows[-1][0]["bound_ms"], len(rows) - 0.5), (-1, 0),
        textcoords="offset points", va="bottom", fontsize=8, color=INK,
    )  # fmt: skip
    ax.set_ylim(-0.6, len(rows) - 0.1)


def _against_macs(ax: Axes, methods: Mapping[str, Any]) -> None:
    """Points: routes that were given; line: what their MACs would take, from no node to all; dashes: the bound."""
    plain_axes(ax)
    for precision, colour in COLOURS.items():
        named = {n: r for n, r in methods.items() if n.startswith(f"engine {precision}, ") and "gates" not in n}
        if not named:
            continue
        rows = [row for name, row in named.items() if not name.endswith("static")]
        ends = [named[f"engine {precision}, {words}"] for words in ("0 %", "all open")]
        shares = [100 * row["open_share"] for row in ends]
        ax.plot(shares, [row["median_ms"] for row in ends], color=colour, linewidth=1.2, alpha=0.55)
        ax.plot(shares, [row["bound_ms"] for row in ends], color=colour, linewidth=1.1, linestyle=(0, (4, 3)))
        xs, ys = [100 * row["open_share"] for row in rows], [row["median_ms"] for row in rows]
        ax.plot(xs, ys, "o", color=colour, markeredgecolor="white", markersize=7, zorder=4, clip_on=False)
        top = ends[1]
        note = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8.5}
        ax.annotate(f"SkipEngine,\n{precision}", (100, top["median_ms"]), color=colour, **note)
        ax.annotate("bound", (100, top["bound_ms"]), color=colour, **note)
    ax.set(xlim=(-1, 100), ylim=(0, None))
    ax.xaxis.set_major_formatter("{x:g} %")
    ax.set_xlabel("MACs of cells and transforms that the route keeps", color=INK)
    ax.set_ylabel("ms", color=INK)
    ax.set_title("time follows the route", fontsize=10, color=INK, loc="left")
