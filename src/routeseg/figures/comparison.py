"""Networks compared: accuracy against real cost, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from routeseg.figures.common import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PNG_DPI,
    POINTS_PER_INCH,
    PURPLE,
    new_figure,
    picture_kind,
    plain_axes,
    save_figure,
)

KINDS = {  # kind of network: name in the legend, marker, colour
    "static": ("known architecture", "s", GREEN),
    "common": ("common route, retrained", "D", ORANGE),
    "fixed": ("all paths open", "P", INK),
    "softmax": ("softmax gates", "^", PURPLE),
    "dynamic": ("dynamic routing", "o", BLUE),
    "exits": ("one network, any budget", "o", BLUE),
}
JOINED = ("dynamic", "exits")
MARKER_SIZE = 6.5  # points
# Where a label may stand, tried in turn: (dx, dy) from the point in steps of LABEL_STEP; -1, 0 or 1 is the side.
SIDES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
LABEL_STEP, LABEL_RINGS = 8.0, 4  # points; how many steps away at most


def accuracy_cost(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """mIoU against real cost, a point for each network, labelled; dynamic ones, and one network asked for several
    budgets, are joined by a line.

    A row has `label`, `kind` (a key of KINDS), `miou_mean` and `miou_std` (0..1; None for one seed) over seeds, drawn
    as an error bar, and `gmacs` with mean, min and max over images, drawn as a horizontal bar.

    Raises ValueError if there is no row, or a kind is unknown.
    """
    kind = picture_kind(path)
    if not rows:
        raise ValueError("nothing to draw: no network is given")
    for row in rows:
        if row["kind"] not in KINDS:
            raise ValueError(f"{row['label']} has kind {row['kind']!r}: choose one of {', '.join(KINDS)}")
    figure = new_figure(7.6, 4.6, layout="constrained")
    ax = figure.subplots()
    plain_axes(ax)
    for joined in JOINED:
        points = sorted((row["gmacs"]["mean"], 100 * row["miou_mean"]) for row in rows if row["kind"] == joined)
        ax.plot([x for x, _ in points], [y for _, y in points], color=BLUE, linewidth=1.2, alpha=0.5, zorder=2)
    for row in rows:
        cost, _, marker, colour = row["gmacs"], *KINDS[row["kind"]]
        point = (cost["mean"], 100 * row["miou_mean"])
        std = 100 * row["miou_std"] if row.get("miou_std") is not None else None
        reach = [[max(0.0, point[0] - cost["min"])], [max(0.0, cost["max"] - point[0])]]  # a mean is rounded
        ax.errorbar(*point, yerr=std, xerr=reach, color=colour, linewidth=1.2, alpha=0.65, capsize=2, zorder=3)
        ax.plot(*point, marker, markersize=MARKER_SIZE, color=colour, markeredgecolor="white", zorder=4)
    ax.margins(x=0.12, y=0.12)
    ax.set_xlabel("real cost in GMACs: mean, and least to most over images", color=INK)
    ax.set_ylabel("mIoU: mean, and standard deviation over seeds", color=INK)
    ax.yaxis.set_major_formatter("{x:g} %")
    present = [look for name, look in KINDS.items() if any(row["kind"] == name for row in rows)]
    handles = [
        Line2D([], [], linestyle="-" if look[1] == "o" else "", marker=look[1], color=look[2], label=look[0])
        for look in present
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=8)
    _label_points(figure, ax, rows)
    save_figure(figure, path, kind)


def _label_points(figure: Figure, ax: Axes, rows: Sequence[Mapping[str, Any]]) -> list[Bbox]:
    """Writes each label at the first place near its point that is free, or at the least crowded if none is.

    Returns the boxes of the labels, in pixels.
    """
    figure.draw_without_rendering()  # fixes the layout
    renderer, inside = figure.canvas.get_renderer(), ax.get_window_extent()  # type: ignore[attr-defined]
    scale = PNG_DPI / POINTS_PER_INCH
    taken = [box for row in rows for box in _marks(ax, row, scale)]
    boxes: list[Bbox] = []
    for row in rows:
        x, y = row["gmacs"]["mean"], 100 * row["miou_mean"]
        colour = KINDS[row["kind"]][2]
        best: tuple[float, int] | None = None
        candidates = [(ring, side) for ring in range(1, LABEL_RINGS + 1) for side in SIDES]
        texts = []
        for order, (ring, (dx, dy)) in enumerate(candidates):
            text = ax.annotate(
                row["label"],
                (x, y),
                (dx * LABEL_STEP * ring, dy * LABEL_STEP * ring),
                textcoords="offset points",
                ha=("right", "center", "left")[dx + 1],
                va=("top", "center", "bottom")[dy + 1],
                fontsize=8,
                color=colour,
                parse_math=False,
                zorder=5,
                arrowprops={"arrowstyle": "-", "color": FAINT, "shrinkA": 0, "shrinkB": 3} if ring > 1 else None,
            )
            box = _text_box(text, renderer)
            crowd = sum(_overlap(box, other) for other in [*taken, *boxes]) + _outside(box, inside)
            texts.append(text)
            if best is None or crowd < best[0]:
                best = (crowd, order)
            if crowd < 1:  # square pixels
                break
        assert best is not None
        for order, text in enumerate(texts):
            if order == best[1]:
                boxes.append(_text_box(text, renderer))
            else:
                text.remove()
    return boxes


def _text_box(text: Any, renderer: Any) -> Bbox:
    """The box of an annotation's text alone, without its line."""
    text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)


def _marks(ax: Axes, row: Mapping[str, Any], scale: float) -> list[Bbox]:
    """The boxes in pixels that a row's marker and its two bars take."""
    cost, y, std = row["gmacs"], 100 * row["miou_mean"], 100 * (row.get("miou_std") or 0.0)
    to_pixels = ax.transData.transform
    left, middle, right = (to_pixels((cost[key], y)) for key in ("min", "mean", "max"))
    low, high = to_pixels((cost["mean"], y - std)), to_pixels((cost["mean"], y + std))
    half, thin = 0.5 * MARKER_SIZE * scale, 1.5 * scale
    return [
        Bbox.from_extents(middle[0] - half, middle[1] - half, middle[0] + half, middle[1] + half),
        Bbox.from_extents(left[0], middle[1] - thin, right[0], middle[1] + thin),
        Bbox.from_extents(middle[0] - thin, low[1], middle[0] + thin, high[1]),
    ]


def _overlap(a: Bbox, b: Bbox) -> float:
    """Area that two boxes share, in square pixels."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Bbox, frame: Bbox) -> float:
    """Area of a box that lies outside a frame, in square pixels."""
    return box.width * box.height - _overlap(box, frame)
