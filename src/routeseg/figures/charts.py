"""Charts of numbers: how a run went, the score of each class, what it is taken for, how the cost spreads over images.

Legend: B images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from routeseg.figures.common import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    new_figure,
    picture_kind,
    plain_axes,
    save_figure,
)
from routeseg.figures.words import drawable

Look = tuple[str, str, Any]  # label, colour, line style
LOSS_LINES: dict[str, Look] = {
    "loss": ("loss", INK, "-"),
    "cross_entropy": ("cross-entropy", BLUE, (0, (5, 1.5))),
    "budget_loss": ("budget loss", ORANGE, (0, (2, 1))),
}
COST_LINES: dict[str, Look] = {"expected_cost": ("expected", ORANGE, (0, (5, 1.5))), "real_cost": ("real", BLUE, "-")}
CONFUSION_COLOURS = LinearSegmentedColormap.from_list("confusion", ["#f4f6f8", "#9cc4e4", BLUE, "#08306b"])
NUMBERED = 40  # classes up to which a confusion matrix has numbers in its cells
ALIKE = 1e-6  # costs that differ by less of themselves are the same
SMOOTH_FROM = 30  # points; shorter lines are drawn as they are


def learning_curves(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    budget_start_step: int | None = None,
    budget_target: float | None = None,
) -> None:
    """How a run went: losses, validation mIoU, cost and learning rate over the steps, a panel each.

    A row has `step` and some of `loss`, `cross_entropy`, `budget_loss`, `expected_cost` and `real_cost`
    (shares of the full network, 0..1), `val_miou` (0..1), `lr`. Keys that are missing, empty or NaN are
    skipped; other keys are left alone. `budget_start_step` is the step at which the budget sets in,
    `budget_target` the share it aims at (mu, 0..1).

    Raises ValueError if a row has no step, or no row has anything to draw.
    """
    kind = picture_kind(path)
    lines = {key: _column(rows, key) for key in (*LOSS_LINES, *COST_LINES, "val_miou", "lr")}
    groups: dict[str, Sequence[str]] = {
        "loss": tuple(LOSS_LINES),
        "mIoU, validation": ("val_miou",),
        "cost": tuple(COST_LINES),
        "lr": ("lr",),
    }
    groups = {name: [key for key in keys if len(lines[key][0])] for name, keys in groups.items()}
    groups = {name: keys for name, keys in groups.items() if keys}
    if not groups:
        raise ValueError(f"nothing to draw: no row has any of {', '.join(lines)}")
    heights = [0.8 if name == "lr" else 2.1 for name in groups]
    figure = new_figure(7.6, sum(heights) + 0.5, layout="constrained")
    axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (name, keys) in zip(axes, groups.items(), strict=True):
        plain_axes(ax)
        ax.set_ylabel({"lr": "learning\nrate", "cost": "share of full cost"}.get(name, name), color=INK)
        if name == "loss":
            for key in keys:
                _smoothed_line(ax, *lines[key], *LOSS_LINES[key])
            _fit_losses(ax, [lines[key][1] for key in keys])
        elif name == "cost":
            for key in keys:
                steps, share = lines[key]
                _smoothed_line(ax, steps, 100 * share, *COST_LINES[key])
            if budget_target is not None:
                ax.axhline(100 * budget_target, color=MUTED, linewidth=1, linestyle=(0, (1, 1.5)))
                label = f"target {100 * budget_target:.3g} %"
                _note(ax, (0, 100 * budget_target), label, (4, 3), ax.get_yaxis_transform())
            ax.set_ylim(0, max(105, 1.05 * ax.get_ylim()[1]))
            ax.yaxis.set_major_formatter("{x:g} %")
        elif name == "lr":
            ax.plot(*lines["lr"], color=MUTED, linewidth=1.4)
            ax.set_ylim(0, 1.1 * max(lines["lr"][1].max(), 1e-12))
            ax.yaxis.set_major_locator(MaxNLocator(2))
        else:
            _miou_line(ax, *lines["val_miou"])
        if len(keys) > 1 or name == "cost":
            place = {"loc": "lower right", "bbox_to_anchor": (1, 0.98), "borderaxespad": 0.2}
            ax.legend(frameon=False, fontsize=8, labelcolor=INK, handlelength=2.6, ncols=3, **place)
        if budget_start_step is not None:
            ax.axvline(budget_start_step, color=PURPLE, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
    if budget_start_step is not None:
        _note(
            axes[0],
            (budget_start_step, 1),
            "budget starts",
            (4, -3),
            axes[0].get_xaxis_transform(),
            va="top",
            color=PURPLE,
        )
    axes[-1].set_xlabel("step", color=INK)
    axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=(1, 2, 5, 10)))
    axes[-1].xaxis.set_major_formatter(FuncFormatter(_short_number))
    axes[-1].margins(x=0.015)
    figure.align_ylabels(list(axes))
    save_figure(figure, path, kind)


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have this key, by step."""
    points = []
    for number, row in enumerate(rows):
        step, value = _number(row.get("step")), _number(row.get(key))
        if not math.isfinite(step):
            raise ValueError(f"row {number} has no step: every row of the metrics needs one")
        if math.isfinite(value):
            points.append((step, value))
    points.sort(key=lambda point: point[0])
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _number(value: Any) -> float:
    return math.nan if value is None or value == "" else float(value)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a Gaussian window, about a fortieth of the line wide; no shift, no droop at the ends."""
    sigma = len(values) / 80
    reach = max(1, int(3 * sigma))
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weight = np.convolve(np.ones_like(values), window)[reach:-reach]
    return np.convolve(values, window)[reach:-reach] / weight


def _smoothed_line(ax: Axes, steps: np.ndarray, values: np.ndarray, label: str, color: str, style: Any) -> None:
    noisy = len(values) >= SMOOTH_FROM
    if noisy:
        ax.plot(steps, values, color=color, linewidth=0.7, alpha=0.28)
    line = _smooth(values) if noisy else values
    marker = "o" if len(values) == 1 else None
    ax.plot(steps, line, color=color, linewidth=1.9, linestyle=style, label=label, marker=marker, markersize=4)


def _fit_losses(ax: Axes, values: Sequence[np.ndarray]) -> None:
    """Show all but the rare spikes, from zero if no loss is negative."""
    joined = np.concatenate(list(values))
    low, high = min(0.0, joined.min()), np.quantile(joined, 0.995)
    ax.set_ylim(low, high + 0.12 * max(high - low, 1e-9))


def _miou_line(ax: Axes, steps: np.ndarray, miou: np.ndarray) -> None:
    marker_size = 4 if len(steps) <= 40 else 0
    ax.plot(steps, 100 * miou, color=GREEN, linewidth=1.9, marker="o", markersize=marker_size)
    best = int(miou.argmax())
    ax.plot(steps[best], 100 * miou[best], "o", color=GREEN, markeredgecolor="white", markersize=8)
    label = f"best {100 * miou[best]:.1f} % at step {steps[best]:,.0f}"
    late = steps[best] > (steps[0] + steps[-1]) / 2
    low, high = 100 * miou.min(), 100 * miou.max()
    pad = max(high - low, 10.0)  # percent points
    ax.set_ylim(max(0, low - 0.08 * pad), high + 0.25 * pad)
    _note(ax, (steps[best], 100 * miou[best]), label, (-2 if late else 2, 7), ha="right" if late else "left")
    ax.yaxis.set_major_formatter("{x:g} %")


def class_iou_bars(path: str | Path, names: Sequence[str], iou: Sequence[float] | np.ndarray, palette: Any) -> None:
    """IoU of each class as a horizontal bar in the class's colour, and a line at their mean.

    `iou` [K] lies in 0..1; NaN is a class that the images do not have: written as absent, and left out of the
    mean.

    Raises ValueError if names, IoU and palette differ in number.
    """
    kind = picture_kind(path)
    iou = np.asarray(iou, dtype=np.float64)
    if not len(names) == len(iou) == len(palette) or not len(names):
        raise ValueError(f"{len(names)} names, {len(iou)} IoU values, {len(palette)} colours: give one per class")
    present = np.isfinite(iou)
    percent = 100 * np.where(present, iou, 0)
    figure = new_figure(7.6, 0.27 * len(names) + 0.9, layout="constrained")
    ax = figure.subplots()
    plain_axes(ax)
    ax.grid(False, axis="y")
    ax.grid(True, axis="x", color=FAINT, linewidth=0.6)
    where = np.arange(len(names))
    ax.barh(where, percent, height=0.68, color=np.asarray(palette) / 255, edgecolor=MUTED, linewidth=0.7, zorder=2)
    for y, value, there in zip(where, percent, present, strict=True):
        label, color, style = (f"{value:.1f}", INK, "normal") if there else ("absent", MUTED, "italic")
        shade = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        _note(
            ax,
            (value, y),
            label,
            (4, 0),
            va="center_baseline",
            color=color,
            style=style,
            bbox=shade,
            zorder=4,
        )
    ax.set_yticks(where, [drawable(name)[0] for name in names], color=INK, parse_math=False)
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(0, 107), ylim=(len(names) - 0.4, -0.6), xticks=range(0, 101, 20))
    ax.set_xlabel("IoU in percent", color=INK)
    if present.any():
        mean = percent[present].mean()
        ax.axvline(mean, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=3)
        _note(ax, (mean, 1), f"mIoU {mean:.1f}", (0, 3), ax.get_xaxis_transform(), ha="center", color=INK)
    save_figure(figure, path, kind)


def confusion_matrix(path: str | Path, names: Sequence[str], confusion: np.ndarray) -> None:
    """What each class is taken for, in percent of its pixels: a row is a true class, a column a predicted one.

    `confusion` [K,K] counts pixels. Rows of classes that never occur are hatched. Shares from half a percent on are
    written into their cells, up to NUMBERED classes.

    Raises ValueError if names and matrix do not fit together.
    """
    kind = picture_kind(path)
    confusion, count = np.asarray(confusion, dtype=np.float64), len(names)
    if confusion.shape != (count, count) or not count:
        raise ValueError(f"{count} names, a matrix of {list(confusion.shape)}: give a row and a column per class")
    truth = confusion.sum(1)
    percent = 100 * confusion / np.maximum(truth, 1)[:, None]
    numbered = count <= NUMBERED
    cell = float(np.clip(6.4 / count, 0.33, 0.9)) if numbered else max(0.13, 13.2 / count)  # inches
    letters = float(np.clip(22 * cell, 5.5, 10))  # points
    figure = new_figure(count * cell + 2.4, count * cell + 1.6)
    ax = figure.add_axes((1.8 / figure.get_figwidth(), 0.1 / figure.get_figheight(), *_share_of(figure, count * cell)))
    ax.imshow(percent, cmap=CONFUSION_COLOURS, norm=PowerNorm(0.5, 0, 100))  # mistakes are small shares
    for k in np.flatnonzero(truth == 0).tolist():
        ax.axhspan(k - 0.5, k + 0.5, facecolor="white", edgecolor=FAINT, hatch="////", linewidth=0)
        shade: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": letters, "color": MUTED, "bbox": shade}
        ax.text((count - 1) / 2, k, "never occurs", **style)
    for row, column in np.argwhere(percent >= 0.5).tolist() if numbered else []:
        value, weight = percent[row, column], "bold" if row == column else "normal"
        style = {"ha": "center", "va": "center", "fontsize": letters, "weight": weight}
        ax.text(column, row, f"{value:.0f}", color="white" if value > 28 else INK, **style)
    said, name_letters = [drawable(name)[0] for name in names], letters if numbered else 60 * cell
    for set_ticks in (ax.set_xticks, ax.set_yticks):
        set_ticks(range(count), said, color=INK, fontsize=name_letters, parse_math=False)
    ax.xaxis.tick_top()
    for label in ax.get_xticklabels():
        label.set(
            rotation=45 if numbered else 90, ha="left", va="bottom" if numbered else "center", rotation_mode="anchor"
        )
    ax.tick_params(length=0, pad=3)
    ax.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    ax.grid(True, which="minor", color="white", linewidth=1 if numbered else 0.3)
    ax.tick_params(which="minor", length=0)
    ax.spines[:].set_visible(False)
    ax.set_ylabel("label", color=MUTED, fontsize=9)
    ax.set_xlabel("taken for, % of the label's pixels", color=MUTED, fontsize=9)
    save_figure(figure, path, kind)


def _share_of(figure: Figure, inches: float) -> tuple[float, float]:
    """A square's sides as shares of the figure's."""
    return inches / figure.get_figwidth(), inches / figure.get_figheight()


def cost_histogram(
    path: str | Path, cost_gmacs: Sequence[float] | np.ndarray, full_gmacs: float | Sequence[float] | np.ndarray
) -> None:
    """How the real cost spreads over images: a histogram, and its place between 0 and full.

    `cost_gmacs` [B] is the real cost of each image, `full_gmacs` the cost of the network with everything open, for all
    or [B] for each: images of several sizes are compared by the share of what each would cost at most.

    Raises ValueError if there is no image, a cost is not a finite number, or a full cost is not
    positive.
    """
    kind = picture_kind(path)
    cost = np.asarray(cost_gmacs, dtype=np.float64).ravel()
    if not cost.size or not np.isfinite(cost).all():
        raise ValueError(f"{cost.size} costs, {int(np.isfinite(cost).sum())} of them finite: give one cost per image")
    full = np.broadcast_to(np.asarray(full_gmacs, dtype=np.float64), cost.shape)
    if not (full > 0).all():
        raise ValueError(f"the full cost is {full.min()} GMACs: it must be positive")
    one_size = bool(full.min() == full.max())
    share = 100 * cost / full
    low, high, mean = share.min(), share.max(), share.mean()
    if high - low < ALIKE * high:  # all cost the same, to rounding: bins cannot be that narrow
        low = high = mean
    pad = max(0.08 * (high - low), 0.4)
    figure = new_figure(7.6, 3.7, layout="constrained")
    ax, strip = figure.subplots(2, 1, height_ratios=(6, 1))
    plain_axes(ax)
    bins = int(np.clip(2 * math.sqrt(cost.size), 8, 40)) if high > low else 1
    ax.hist(
        share,
        bins=bins,
        range=(low, high) if high > low else (low - pad, high + pad),
        color=BLUE,
        alpha=0.8,
        edgecolor="white",
        linewidth=0.8,
        zorder=2,
    )
    around = 1.5 * pad if high > low else 8 * pad
    ax.set_xlim(low - around, high + around)
    ax.set_ylim(0, 1.16 * ax.get_ylim()[1])
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_ylabel("images", color=INK)
    ax.set_xlabel("real cost, share of the full network" + ("" if one_size else " at the image's size"), color=INK)
    ax.xaxis.set_major_formatter("{x:g} %")
    ax.axvline(mean, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), zorder=3)
    right_half = mean > (low + high) / 2
    label = f"mean {cost.mean():.3g} GMACs, {mean:.0f} % of full"
    _note(
        ax,
        (mean, 1),
        label,
        (-5 if right_half else 5, -4),
        ax.get_xaxis_transform(),
        va="top",
        color=INK,
        ha="right" if right_half else "left",
    )
    if one_size:
        of_full = full[0] / 100
        gmacs = ax.secondary_xaxis("top", functions=(lambda x: x * of_full, lambda x: x / of_full))
        gmacs.tick_params(labelsize=8, color=MUTED, labelcolor=MUTED, length=2)
        gmacs.spines["top"].set_visible(False)
        gmacs.set_xlabel("GMACs", fontsize=8, color=MUTED)

    end = max(100, high)
    strip.barh(0, 100, height=0.5, color="#eef0f3", edgecolor=MUTED, linewidth=0.7)
    strip.barh(0, max(high - low, 0.004 * end), left=low, height=0.5, color=BLUE, alpha=0.8)
    strip.plot((mean, mean), (-0.42, 0.42), color=INK, linewidth=1.4)
    strip.set(xlim=(-0.005 * end, 1.005 * end), ylim=(-0.6, 0.6), yticks=[])
    reach = f"{low:.3g} to {high:.3g} %" if high > low else f"{low:.3g} %"
    middle = float(np.clip((low + high) / 2, 0.12 * end, 0.6 * end))  # clear of the other two
    whole = f"{full[0]:.4g}" if one_size else f"{full.min():.3g} to {full.max():.3g}"
    strip.set_xticks([0, middle, 100], ["0", reach, f"full: {whole} GMACs"])
    strip.get_xticklabels()[2].set_ha("right")
    strip.tick_params(length=0, labelsize=8, labelcolor=MUTED)
    strip.spines[:].set_visible(False)
    save_figure(figure, path, kind)


def _note(ax: Axes, point: tuple, text: str, offset: tuple, transform: Any = "data", **style: Any) -> None:
    """Small text beside a point; the offset is in points."""
    style = {"fontsize": 8, "color": MUTED, "parse_math": False, **style}
    ax.annotate(text, point, offset, xycoords=transform, textcoords="offset points", annotation_clip=False, **style)


def _short_number(value: float, _: Any = None) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
