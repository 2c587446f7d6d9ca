"""Predicted against measured milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from routeseg.figures.common import BLUE, INK, MUTED, ORANGE, new_figure, picture_kind, plain_axes, save_figure

NEAR = 0.05  # of the band that is drawn around equality


def latency_scatter(path: str | Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """A point for each route: `measured_ms` over `predicted_ms`, in another colour if its `gates` ran; the line on
    which they are equal, and a band of 5 % around it.

    Raises ValueError if there is no row.
    """
    kind = picture_kind(path)
    if not rows:
        raise ValueError("nothing to draw: no route was measured")
    figure = new_figure(5.2, 4.8, layout="constrained")
    ax = figure.subplots()
    plain_axes(ax)
    end = 1.08 * max(max(row["predicted_ms"], row["measured_ms"]) for row in rows)
    ax.plot((0, end), (0, end), color=MUTED, linewidth=1)
    ax.fill_between((0, end), (0, end * (1 - NEAR)), (0, end * (1 + NEAR)), color=MUTED, alpha=0.18, linewidth=0)
    ax.annotate(f"equal, ± {100 * NEAR:g} %", (0.97 * end, 0.78 * end), ha="right", va="top", fontsize=8, color=MUTED)
    for gates, label, marker, colour in ((False, "route given", "o", BLUE), (True, "gates run too", "^", ORANGE)):
        some = [row for row in rows if row["gates"] == gates]
        if some:
            xs, ys = ([row[key] for row in some] for key in ("predicted_ms", "measured_ms"))
            ax.plot(xs, ys, marker, color=colour, markeredgecolor="white", markersize=6.5, label=label, zorder=3)
    ax.set(xlim=(0, end), ylim=(0, end))
    ax.set_xlabel("predicted, ms", color=INK)
    ax.set_ylabel("measured, ms", color=INK)
    ax.set_title(title, fontsize=9, color=INK, loc="left")
    ax.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    save_figure(figure, path, kind)
