"""Pictures of what the network does: label maps, routes, training runs, costs. Draws only.

Legend: H, W image size, K classes, L depth, S scales. image    uint8 [H, W, 3]   RGB labels   uint8 [H, W]
class of each pixel, or IGNORE_LABEL palette  uint8 [K, 3]      RGB colour of each class gates    [L+1, S, 3]
activations of one image, 0 is closed (see space.py) Every `path` ends in .png or .svg. The file is written
whole or not at all, and its folder is made where missing.
"""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerBase
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation
from PIL import Image, ImageDraw, ImageFont

from routeseg.space import DOWN, KEEP, STEM_STRIDE, UP, RoutingSpace

STEPS = {UP: -1, KEEP: 0, DOWN: 1}  # scales an edge climbs down
IGNORE_LABEL = 255  # pixels without a class
PNG_DPI = 160
POINTS_PER_INCH = 72

INK, MUTED, FAINT = "#1d2530", "#67707c", "#d9dde2"  # text and nodes; secondary text; closed paths and grids
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#8e4585"  # told apart by colour-blind readers

# Activation 0 to 1, light to dark, so that it survives a greyscale print. The pale end of viridis is left
# out: it would be mistaken for a closed path.
ACTIVATION_COLORS = ListedColormap(
    matplotlib.colormaps["viridis_r"](np.linspace(0.36, 0.97, 256)), name="activation"
)
OPEN_WIDTH = (1.1, 4.2)  # points, at activation 0 and 1, where a layer is 36 points wide
CLOSED_WIDTH = 0.6
SKIP_STYLE = (0, (0.1, 1.9))  # with round caps: a row of dots

MIN_PICTURE = 480  # pixels of the longer side below which an overlay is enlarged
SIDE_LEGEND_RATIO = 1.8  # taller than this: the legend stands beside the picture


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to a temporary name beside `path`, then rename: the file is there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# -------------------------------------------------------------------------------- label maps


def colorize(labels: np.ndarray, palette: Any) -> np.ndarray:
    """The label map in the colours of its classes: uint8 [H, W, 3], RGB. IGNORE_LABEL is black.

    Raises ValueError where `labels` is not a map of whole numbers or has a class that `palette` has no colour
    for.
    """
    labels, palette = np.asarray(labels), np.asarray(palette)
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels are {labels.dtype} {list(labels.shape)}: give whole numbers of shape [H, W]"
        )
    if palette.ndim != 2 or palette.shape[1] != 3:
        raise ValueError(
            f"the palette has shape {list(palette.shape)}: give one RGB colour per class, [K, 3]"
        )
    strange = labels[(labels != IGNORE_LABEL) & ((labels < 0) | (labels >= len(palette)))]
    if strange.size:
        raise ValueError(
            f"label {int(strange[0])} has no colour: the palette has {len(palette)} (classes 0 to "
            f"{len(palette) - 1}; {IGNORE_LABEL} is ignored). Give the palette of the labels' data set"
        )
    table = np.zeros((IGNORE_LABEL + 1, 3), dtype=np.uint8)
    table[: len(palette)] = palette[: len(table)]
    table[IGNORE_LABEL] = 0
    return table[labels]


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    palette: Any,
    alpha: float = 0.55,
    legend: bool = True,
) -> np.ndarray:
    """The image tinted with its segmentation, class borders drawn in, and a legend: uint8 [H', W', 3], RGB.

    The legend names the classes present, largest first, with their share of the picture; it stands below the
    picture, or beside it where the picture is tall. Pictures smaller than MIN_PICTURE are enlarged by a whole
    factor so that the legend can be read. `alpha` is the strength of the tint, 0 to 1; with `legend` False
    the picture comes alone, at the size of the image.

    Raises ValueError where image and labels differ in size, or names, palette and labels do not fit together.
    """
    image, labels = np.asarray(image), np.asarray(labels)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"the image is {image.dtype} {list(image.shape)}: give RGB, uint8 [H, W, 3]")
    if labels.shape != image.shape[:2]:
        raise ValueError(
            f"labels are {list(labels.shape)}, the image {list(image.shape[:2])}: give the same size"
        )
    if len(class_names) != len(palette):
        raise ValueError(f"{len(class_names)} class names, {len(palette)} colours: give one colour per class")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: it must lie in 0 to 1")
    colors = colorize(labels, palette)
    if legend:
        factor = max(1, math.ceil(MIN_PICTURE / max(labels.shape)))
        image, labels, colors = (a.repeat(factor, 0).repeat(factor, 1) for a in (image, labels, colors))
    picture = cv2.addWeighted(colors, alpha, image, 1 - alpha, 0)
    inner = _inner_border(labels)
    picture[inner] = cv2.addWeighted(colors, 0.7, np.full_like(colors, 255), 0.3, 0)[inner]
    return _with_legend(picture, labels, class_names, palette) if legend else picture


def _inner_border(labels: np.ndarray) -> np.ndarray:
    """The pixels of each class that lie next to another class, bool [H, W]; thicker in larger pictures."""
    longer = max(labels.shape)
    window = 2 if longer < MIN_PICTURE else 1 + 2 * max(1, round(longer / 900))  # 2: on one side of a border
    kernel = np.ones((window, window), dtype=np.uint8)
    values = labels.astype(np.uint8)
    return cv2.dilate(values, kernel) != cv2.erode(values, kernel)


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def legend_entries(
    labels: np.ndarray, class_names: Sequence[str], palette: Any
) -> list[tuple[str, tuple, float]]:
    """(name, RGB colour, share of the picture 0..1) of the classes present, largest first; ignored last."""
    values, counts = np.unique(labels, return_counts=True)
    order = sorted(
        zip(values.tolist(), counts.tolist(), strict=True), key=lambda e: (e[0] == IGNORE_LABEL, -e[1])
    )
    named = {value: (class_names[value], palette[value]) for value, _ in order if value != IGNORE_LABEL}
    named[IGNORE_LABEL] = ("ignored", (0, 0, 0))
    return [(named[v][0], tuple(int(c) for c in named[v][1]), count / labels.size) for v, count in order]


def _percent(share: float) -> str:
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _with_legend(
    picture: np.ndarray, labels: np.ndarray, class_names: Sequence[str], palette: Any
) -> np.ndarray:
    height, width = picture.shape[:2]
    beside = height > SIDE_LEGEND_RATIO * width
    size = int(np.clip(round(0.7 * math.sqrt(max(height, width))), 14, 44))  # pixels
    font, line, gap = _font(size), round(1.75 * size), round(0.6 * size)
    margin, swatch = round(0.9 * size), round(1.05 * size)
    space = round(2.2 * size)  # between columns
    entries = [
        (name, color, _percent(share)) for name, color, share in legend_entries(labels, class_names, palette)
    ]
    share_width = max(font.getlength(share) for _, _, share in entries)
    room = (20 * size if beside else width - 2 * margin) - swatch - 2 * gap - share_width
    names = [_shorten(name, font, room) for name, _, _ in entries]
    name_width = max(font.getlength(name) for name in names)
    column = math.ceil(swatch + 2 * gap + name_width + share_width)
    if beside:
        columns = math.ceil(len(entries) * line / max(line, height - 2 * margin))
    else:
        columns = max(1, min(len(entries), int((width - 2 * margin + space) // (column + space))))
    rows = math.ceil(len(entries) / columns)
    columns = math.ceil(len(entries) / rows)  # no empty column
    needed = 2 * margin + columns * column + (columns - 1) * space, 2 * margin + rows * line
    if beside:
        canvas = Image.new("RGB", (width + needed[0], max(height, needed[1])), "white")
        left, top = width + margin, margin
    else:
        canvas = Image.new("RGB", (max(width, needed[0]), height + needed[1]), "white")
        left, top = margin, height + margin
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for index, (name, (_, color, share)) in enumerate(zip(names, entries, strict=True)):
        x, y = left + index // rows * (column + space), top + index % rows * line + line // 2
        box = (x, y - swatch // 2, x + swatch, y - swatch // 2 + swatch)
        draw.rounded_rectangle(box, radius=swatch // 5, fill=color, outline=MUTED, width=max(1, size // 16))
        draw.text((x + swatch + gap, y), name, fill=INK, font=font, anchor="lm")
        draw.text((x + column, y), share, fill=MUTED, font=font, anchor="rm")
    return np.array(canvas)


def _shorten(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    text = " ".join(str(text).split())
    if font.getlength(text) <= room:
        return text
    while len(text) > 1 and font.getlength(text + "…") > room:
        text = text[:-1]
    return text.rstrip() + "…"


# ------------------------------------------------------------------------------------ routes


def draw_route(
    ax: Axes, space: RoutingSpace, gates: np.ndarray, title: str | None = None, legend: bool = True
) -> None:
    """Draw one image's route on `ax`: layers from left to right, scales from fine (top) to coarse.

    An open path is a line whose colour and width say its activation. A node whose cell runs is a filled
    circle, also where only the zeros of closed paths arrive. One that something arrives at and that has no
    open path is hollow, and the dotted line along keep is its free skip (Eq. 5). The others are faint dots.
    Sizes follow the size `ax` has now, so lay the figure out first. `legend` explains the signs below it.

    Raises ValueError where `gates` is not [L+1, S, 3] of this space, or holds NaN.
    """
    gates = _checked_gates(space, gates)
    reached = space.reached(gates)  # [L+1, S]
    gates = gates * reached[..., None]
    runs = (gates > 0).any(-1)
    carries = _carries(space, gates, runs)
    last, coarsest = space.depth, space.num_scales - 1

    left, right, bottom, top = -1.45, last + 1.45, coarsest + 0.5, -0.5
    ax.set(xlim=(left, right), ylim=(bottom, top))
    box = ax.get_window_extent()
    points = POINTS_PER_INCH / ax.figure.dpi
    pitch_x = box.width * points / (right - left)  # points between layers
    pitch = min(pitch_x, box.height * points / (bottom - top))
    unit = float(np.clip((pitch / 36) ** 0.8, 0.3, 1.25))

    closed, opened = [], []
    for layer, scale, direction in space.edges:
        line = _edge_line(layer, scale, direction)
        strength = float(gates[layer, scale, direction])
        if strength > 0:
            opened.append((strength, line))
        elif not (direction == KEEP and carries[layer, scale] and not runs[layer, scale]):
            closed.append(line)
    opened.sort(key=lambda entry: entry[0])  # the strongest on top
    skips = [
        _edge_line(layer, s, KEEP) for layer, s in space.nodes if carries[layer, s] and not runs[layer, s]
    ]
    strengths = np.clip([strength for strength, _ in opened], 0, 1)

    ax.add_collection(LineCollection(closed, colors=FAINT, linewidths=CLOSED_WIDTH * unit, zorder=1))
    ax.add_collection(
        LineCollection(
            skips, colors=MUTED, linewidths=1.9 * unit, linestyles=[SKIP_STYLE], capstyle="round", zorder=2
        )
    )
    ax.add_collection(
        LineCollection(
            [line for _, line in opened],
            colors=ACTIVATION_COLORS(strengths),
            linewidths=np.interp(strengths, (0, 1), OPEN_WIDTH) * unit,
            capstyle="round",
            zorder=3,
        )
    )
    nodes = np.array(space.nodes)
    run, carry = runs[tuple(nodes.T)], carries[tuple(nodes.T)]
    ring = {"zorder": 4, "linewidths": 1.1 * unit}
    ax.scatter(*nodes[~run & ~carry].T, s=(3.6 * unit) ** 2, color="#c3c9d0", zorder=4, linewidths=0)
    ax.scatter(*nodes[carry & ~run].T, s=(8.2 * unit) ** 2, facecolor="white", edgecolor=INK, **ring)
    ax.scatter(*nodes[run].T, s=(10.5 * unit) ** 2, facecolor=INK, edgecolor="white", **ring)

    ax.plot((-0.82, 0), (0, 0), color=MUTED, linewidth=1.2 * unit, zorder=1)
    for x, y, name, tall in ((-0.98, 0, "stem", 0), (last + 1, coarsest / 2, "decoder", coarsest)):
        half, half_wide = tall / 2 + 0.34, max(0.2, 4 / pitch_x)
        style = {"boxstyle": "round,pad=0,rounding_size=0.1", "linewidth": 0.9 * unit, "zorder": 4}
        style |= {"facecolor": "#eef0f3", "edgecolor": MUTED}
        ax.add_patch(FancyBboxPatch((x - half_wide, y - half), 2 * half_wide, 2 * half, **style))
        size = max(7.5 * unit, 5.2)
        ax.text(x, y, name, ha="center", va="center", rotation=90, fontsize=size, color=INK, zorder=5)

    small = pitch < 24
    ax.set_yticks(range(space.num_scales), [f"1/{STEM_STRIDE * 2**s}" for s in range(space.num_scales)])
    ax.set_xticks(range(0, last + 1, next((step for step in (1, 2, 5, 10) if step * pitch_x >= 22), 20)))
    font_size = 7 if small else 8.5
    ax.tick_params(length=0, labelsize=font_size, labelcolor=MUTED, pad=2)
    ax.set_xlabel("layer", fontsize=font_size, color=MUTED, labelpad=1)
    ax.set_ylabel("resolution", fontsize=font_size, color=MUTED, labelpad=3)
    ax.spines[:].set_visible(False)
    if title:
        title_size = 9 if small else 11
        wide = int(box.width * points / (0.56 * title_size))
        ax.set_title(
            textwrap.fill(title, max(12, wide)), fontsize=title_size, color=INK, pad=5, parse_math=False
        )
    if legend:
        below = ax.transAxes + ScaledTranslation(0, -32 / POINTS_PER_INCH, ax.figure.dpi_scale_trans)
        columns = int(np.clip(box.width * points / 140, 2, 5))
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, **_route_legend(columns))


def _checked_gates(space: RoutingSpace, gates: Any) -> np.ndarray:
    values = np.asarray(gates, dtype=np.float64)
    if values.shape != space.legal.shape:
        raise ValueError(
            f"gates have shape {values.shape}, the space needs {space.legal.shape}: give one image's"
        )
    if np.isnan(values).any():
        raise ValueError("gates hold NaN: the network that made them has diverged")
    return np.where(space.legal, np.maximum(values, 0), 0)


def _carries(space: RoutingSpace, gates: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Which nodes get more than zeros, along an open path or a free skip from such a node: bool [L+1, S]."""
    carries = np.zeros_like(runs)
    carries[0, 0] = True
    for layer, scale, direction in space.edges:  # layer by layer
        skips = direction == KEEP and carries[layer, scale] and not runs[layer, scale]
        if layer < space.depth and (gates[layer, scale, direction] > 0 or skips):
            carries[layer + 1, scale + STEPS[direction]] = True
    return carries


def _edge_line(layer: int, scale: int, direction: int) -> tuple[tuple[float, float], tuple[float, float]]:
    return (layer, scale), (layer + 1, scale + STEPS[direction])


class _Wedge:
    """Legend handle: the scale of activations, a wedge that grows wider and darker."""


class _WedgeHandler(HandlerBase):
    PIECES = 24

    def create_artists(self, legend, handle, xdescent, ydescent, width, height, fontsize, trans):
        shares = (np.arange(self.PIECES) + 0.5) / self.PIECES
        tall = np.interp(shares, (0, 1), OPEN_WIDTH)
        step = width / self.PIECES
        return [
            Rectangle(
                (i * step - xdescent, height / 2 - ydescent - h / 2),
                1.6 * step,
                h,
                color=ACTIVATION_COLORS(share),
                linewidth=0,
                transform=trans,
                snap=False,
            )
            for i, (share, h) in enumerate(zip(shares, tall, strict=True))
        ]


def _route_legend(columns: int) -> dict[str, Any]:
    """Keyword arguments of `legend` that explain the signs of a route."""
    dot = {"linestyle": "none", "marker": "o"}
    signs = {
        "open path, activation 0 to 1": _Wedge(),
        "closed path": Line2D([], [], color="#b4bac2", linewidth=0.9),
        "cell runs": Line2D([], [], color=INK, markeredgecolor="white", markersize=8, **dot),
        "cell dropped, free skip": Line2D(
            [],
            [],
            color=MUTED,
            linestyle=SKIP_STYLE,
            linewidth=1.9,
            dash_capstyle="round",
            marker="o",
            markersize=6,
            markerfacecolor="white",
            markeredgecolor=INK,
        ),
        "nothing arrives": Line2D([], [], color="#b4bac2", markersize=3.6, markeredgewidth=0, **dot),
    }
    return {
        "handles": list(signs.values()),
        "labels": list(signs),
        "handler_map": {_Wedge: _WedgeHandler()},
        "ncols": columns,
        "frameon": False,
        "fontsize": 8,
        "labelcolor": INK,
        "handlelength": 2.8,
        "columnspacing": 1.6,
        "handletextpad": 0.6,
    }


def save_route(path: str | Path, space: RoutingSpace, gates: np.ndarray, title: str | None = None) -> None:
    """One route as a picture file (see `draw_route`, and for its ValueErrors). `gates` [L+1, S, 3]."""
    kind = _picture_kind(path)
    wide = (space.depth + 2.9) * float(np.clip(10 / (space.depth + 2.9), 0.42, 0.64))  # inches
    tall = 0.6 * space.num_scales
    figure = _figure(wide, tall)
    draw_route(figure.add_axes((0, 0, 1, 1)), space, gates, title)
    _save(figure, path, kind)


def routes_side_by_side(
    path: str | Path, space: RoutingSpace, panels: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, str]]
) -> None:
    """One column per picture: the picture, its segmentation, its route under them (the paper's Figure 1).

    A panel is (image uint8 [H, W, 3], segmentation uint8 [H', W', 3], gates [L+1, S, 3], title). The
    segmentation is any RGB picture: `overlay` with or without its legend, or `colorize`. Sizes may differ
    between panels.

    Raises ValueError where there is no panel, or the gates do not fit the space.
    """
    kind = _picture_kind(path)
    if not panels:
        raise ValueError("no panels to draw: give at least one (image, segmentation, gates, title)")
    wide = float(np.clip(0.25 * (space.depth + 2.9), 3.4, 8))  # inches, of a column
    rows = [[np.asarray(panel[row]) for panel in panels] for row in (0, 1)]
    picture_heights = [max(min(wide * p.shape[0] / p.shape[1], 1.25 * wide) for p in row) for row in rows]
    heights = [*picture_heights, max(0.4 * space.num_scales, 0.3 * wide)]
    gaps = (0.0, 0.08, 0.48)  # above each row; the last holds the title of the route
    lines = max(len(textwrap.wrap(panel[3], int(wide * POINTS_PER_INCH / 5.04))) for panel in panels)
    gaps = (*gaps[:2], gaps[2] + 0.15 * max(0, lines - 1))
    between, total = 0.5, sum(heights) + sum(gaps)
    figure = _figure(len(panels) * (wide + between), total)
    for column, (image, segmentation, gates, title) in enumerate(panels):
        top = total
        axes = []
        for height, gap in zip(heights, gaps, strict=True):
            top -= gap + height
            place = column / len(panels), top / total, wide / figure.get_figwidth(), height / total
            axes.append(figure.add_axes(place))
        for ax, picture, side in zip(axes[:2], (image, segmentation), "SN", strict=True):
            ax.imshow(picture)
            ax.axis("off")
            ax.set_anchor(side)  # pictures of unlike shapes meet their segmentation in the middle
        draw_route(axes[2], space, gates, title, legend=False)
        if column:
            axes[2].set_ylabel("")
    middle = 0.5 - between / 2 / figure.get_figwidth()
    columns = int(np.clip(figure.get_figwidth() * POINTS_PER_INCH / 140, 2, 5))
    figure.legend(loc="upper center", bbox_to_anchor=(middle, -0.42 / total), **_route_legend(columns))
    _save(figure, path, kind)


# ------------------------------------------------------------------- training and evaluation

LOSS_LINES = {
    "loss": ("loss", INK, "-"),
    "cross_entropy": ("cross-entropy", BLUE, (0, (5, 1.5))),
    "budget_loss": ("budget loss", ORANGE, (0, (2, 1))),
}
COST_LINES = {"expected_cost": ("expected", ORANGE, (0, (5, 1.5))), "real_cost": ("real", BLUE, "-")}
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
    skipped; other keys are left alone. `budget_start_step` marks where the budget sets in, `budget_target`
    the share it aims at (mu, 0..1).

    Raises ValueError where a row has no step, or no row has anything to draw.
    """
    kind = _picture_kind(path)
    lines = {key: _column(rows, key) for key in (*LOSS_LINES, *COST_LINES, "val_miou", "lr")}
    groups = {
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
    figure = _figure(7.6, sum(heights) + 0.5, layout="constrained")
    axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (name, keys) in zip(axes, groups.items(), strict=True):
        _plain_axes(ax)
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
    _save(figure, path, kind)


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
    return tuple(np.array(points, dtype=np.float64).reshape(-1, 2).T)


def _number(value: Any) -> float:
    return math.nan if value is None or value == "" else float(value)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a Gaussian window, about a fortieth of the line wide; no shift, no droop at the ends."""
    sigma = len(values) / 80
    reach = max(1, int(3 * sigma))
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weight = np.convolve(np.ones_like(values), window)[reach:-reach]
    return np.convolve(values, window)[reach:-reach] / weight


def _smoothed_line(
    ax: Axes, steps: np.ndarray, values: np.ndarray, label: str, color: str, style: Any
) -> None:
    noisy = len(values) >= SMOOTH_FROM
    if noisy:
        ax.plot(steps, values, color=color, linewidth=0.7, alpha=0.28)
    line = _smooth(values) if noisy else values
    marker = "o" if len(values) == 1 else None
    ax.plot(
        steps, line, color=color, linewidth=1.9, linestyle=style, label=label, marker=marker, markersize=4
    )


def _fit_losses(ax: Axes, values: Sequence[np.ndarray]) -> None:
    """Show all but the rare spikes, from zero where no loss is negative."""
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


def class_iou_bars(path: str | Path, names: Sequence[str], iou: Sequence[float], palette: Any) -> None:
    """IoU of each class as a horizontal bar in the class's colour, and a line at their mean.

    `iou` [K] lies in 0..1; NaN is a class that the images do not have: written as absent, and left out of the
    mean.

    Raises ValueError where names, IoU and palette differ in number.
    """
    kind = _picture_kind(path)
    iou = np.asarray(iou, dtype=np.float64)
    if not len(names) == len(iou) == len(palette) or not len(names):
        raise ValueError(
            f"{len(names)} names, {len(iou)} IoU values, {len(palette)} colours: give one per class"
        )
    present = np.isfinite(iou)
    percent = 100 * np.where(present, iou, 0)
    figure = _figure(7.6, 0.27 * len(names) + 0.9, layout="constrained")
    ax = figure.subplots()
    _plain_axes(ax)
    ax.grid(False, axis="y")
    ax.grid(True, axis="x", color=FAINT, linewidth=0.6)
    where = np.arange(len(names))
    ax.barh(
        where, percent, height=0.68, color=np.asarray(palette) / 255, edgecolor=MUTED, linewidth=0.7, zorder=2
    )
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
    ax.set_yticks(where, names, color=INK, parse_math=False)
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(0, 107), ylim=(len(names) - 0.4, -0.6), xticks=range(0, 101, 20))
    ax.set_xlabel("IoU in percent", color=INK)
    if present.any():
        mean = percent[present].mean()
        ax.axvline(mean, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=3)
        _note(ax, (mean, 1), f"mIoU {mean:.1f}", (0, 3), ax.get_xaxis_transform(), ha="center", color=INK)
    _save(figure, path, kind)


def cost_histogram(path: str | Path, cost_gmacs: Sequence[float], full_gmacs: float) -> None:
    """How the real cost spreads over images: a histogram, and where that lies between 0 and full.

    `cost_gmacs` [B] is the real cost of each image, `full_gmacs` the cost of the network with everything
    open.

    Raises ValueError where there is no image, a cost is not a finite number, or the full cost is not
    positive.
    """
    kind = _picture_kind(path)
    cost = np.asarray(cost_gmacs, dtype=np.float64).ravel()
    if not cost.size or not np.isfinite(cost).all():
        raise ValueError(
            f"{cost.size} costs, {int(np.isfinite(cost).sum())} of them finite: give one cost per image"
        )
    if not full_gmacs > 0:
        raise ValueError(f"the full cost is {full_gmacs} GMACs: it must be positive")
    low, high, mean = cost.min(), cost.max(), cost.mean()
    pad = max(0.08 * (high - low), 0.004 * full_gmacs)
    figure = _figure(7.6, 3.7, layout="constrained")
    ax, strip = figure.subplots(2, 1, height_ratios=(6, 1))
    _plain_axes(ax)
    bins = int(np.clip(2 * math.sqrt(cost.size), 8, 40)) if high > low else 1
    ax.hist(
        cost,
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
    ax.set_xlabel("real cost in GMACs", color=INK)
    ax.axvline(mean, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), zorder=3)
    right_half = mean > (low + high) / 2
    label = f"mean {mean:.3g} GMACs, {100 * mean / full_gmacs:.0f} % of full"
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
    share = ax.secondary_xaxis(
        "top", functions=(lambda x: 100 * x / full_gmacs, lambda x: x * full_gmacs / 100)
    )
    share.xaxis.set_major_formatter("{x:g} %")
    share.tick_params(labelsize=8, color=MUTED, labelcolor=MUTED, length=2)
    share.spines["top"].set_visible(False)
    share.set_xlabel("share of the full network", fontsize=8, color=MUTED)

    end = max(full_gmacs, high)
    strip.barh(0, full_gmacs, height=0.5, color="#eef0f3", edgecolor=MUTED, linewidth=0.7)
    strip.barh(0, max(high - low, 0.004 * end), left=low, height=0.5, color=BLUE, alpha=0.8)
    strip.plot((mean, mean), (-0.42, 0.42), color=INK, linewidth=1.4)
    strip.set(xlim=(-0.005 * end, 1.005 * end), ylim=(-0.6, 0.6), yticks=[])
    reach = f"{low:.3g} to {high:.3g}" if high > low else f"{low:.3g}"
    middle = float(np.clip((low + high) / 2, 0.12 * end, 0.7 * end))  # clear of the other two
    strip.set_xticks([0, middle, full_gmacs], ["0", reach, f"full: {full_gmacs:.4g} GMACs"])
    strip.get_xticklabels()[2].set_ha("right")
    strip.tick_params(length=0, labelsize=8, labelcolor=MUTED)
    strip.spines[:].set_visible(False)
    _save(figure, path, kind)


# ------------------------------------------------------------------------------------ common


def _plain_axes(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#aab1ba")
    ax.tick_params(labelsize=8.5, color="#aab1ba", labelcolor=INK, length=3)
    ax.grid(True, axis="y", color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)


def _note(ax: Axes, point: tuple, text: str, offset: tuple, transform: Any = "data", **style: Any) -> None:
    """Small text beside a point; the offset is in points."""
    style = {"fontsize": 8, "color": MUTED, "parse_math": False, **style}
    ax.annotate(
        text, point, offset, xycoords=transform, textcoords="offset points", annotation_clip=False, **style
    )


def _short_number(value: float, _: Any = None) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _figure(width: float, height: float, **options: Any) -> Figure:
    """An empty white figure, size in inches, that no global state knows of."""
    figure = Figure(figsize=(width, height), dpi=PNG_DPI, facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def _picture_kind(path: str | Path) -> str:
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"{path}: a picture is written as .png or .svg, name it so")
    return kind


def _save(figure: Figure, path: str | Path, kind: str) -> None:
    data = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None  # the same figure gives the same text
    figure.savefig(data, format=kind, bbox_inches="tight", pad_inches=0.12, metadata=metadata)
    write_atomically(path, data.getvalue())
