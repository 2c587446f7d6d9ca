"""Routes as images: which paths of the grid are open, and how far.

Legend: H, W image size, L depth, S scales.
    gates  [L+1, S, 3]   activations of one image, 0 is closed (see space.py)
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.legend_handler import HandlerBase
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.transforms import ScaledTranslation
from PIL import Image, ImageDraw

from routeseg.figures.common import (
    FAINT,
    INK,
    MUTED,
    ORANGE,
    PNG_DPI,
    POINTS_PER_INCH,
    figure_bytes,
    new_figure,
    picture_kind,
    png_bytes,
    save_figure,
)
from routeseg.figures.words import cut, drawable, fitted
from routeseg.files import write_atomically
from routeseg.space import DOWN, KEEP, SCALE_STEP, STEM_STRIDE, RoutingSpace

# Activation 0 to 1, light to dark, so that it survives a greyscale print. The pale end of viridis is left
# out: it would be mistaken for a closed path.
ACTIVATION_COLORS = ListedColormap(matplotlib.colormaps["viridis_r"](np.linspace(0.36, 0.97, 256)), name="activation")
OPEN_WIDTH = (1.1, 4.2)  # points, at activation 0 and 1, if a layer is 36 points wide
CLOSED_WIDTH = 0.6
SMALL_PITCH, TITLE_SIZES = 24, {True: 9, False: 11}  # points between layers below which letters are small
STAGE_COLOR = ORANGE
SKIP_STYLE = (0, (0.1, 1.9))  # with round caps: a row of dots
ROW_NAME: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 9, "color": MUTED}


@dataclass(frozen=True)
class RouteWords:
    """What the legend of a drawn route calls its signs; as they stand, for the activations of one image."""

    opened: str = "open path, activation 0 to 1"
    closed: str = "closed path"
    runs: str = "cell runs"
    dropped: str = "cell dropped, free skip"
    idle: str = "nothing arrives"
    stage: str = "stage of the backbone, runs with its path"


ONE_IMAGE = RouteWords()
FIXED = RouteWords(opened="open path", dropped="no cell, free skip")


def draw_route(
    ax: Axes,
    space: RoutingSpace,
    gates: np.ndarray,
    title: str | None = None,
    legend: bool = True,
    words: RouteWords = ONE_IMAGE,
    stages: int = 0,
) -> None:
    """Draw one image's route on `ax`: layers from left to right, scales from fine (top) to coarse.

    An open path is a line whose colour and width say its activation. A node whose cell runs is a filled
    circle, also if only the zeros of closed paths arrive. A node that is reached and has no open path is
    hollow, and the dotted line along keep is its free skip (Eq. 5). The others are faint dots. A network with a
    backbone of so many `stages` has a square behind the stem and on each path that a stage belongs to, filled if it
    runs. Sizes follow the size `ax` has now, so lay the figure out first. `legend` explains the signs below it, in
    `words`. Other numbers in 0..1 for each edge, over several images, can be drawn as `gates` if the words say what
    they are: then every node of an edge above 0 runs in some image.

    Raises ValueError if `gates` is not [L+1, S, 3] of this space, or holds NaN.
    """
    gates = _checked_gates(space, gates)
    gates = gates * space.reached(gates, zeros_arrive=True)[..., None]  # zeros may be all that arrives
    fed = space.reached(gates)
    runs = np.any(gates > 0, axis=-1)  # [L+1, S]
    unit = draw_frame(ax, space, title)

    closed, opened = [], []
    for layer, scale, direction in space.edges:
        line = edge_line(layer, scale, direction)
        strength = float(gates[layer, scale, direction])
        if strength > 0:
            opened.append((strength, line))
        elif not (direction == KEEP and fed[layer, scale] and not runs[layer, scale]):
            closed.append(line)
    opened.sort(key=lambda entry: entry[0])  # the strongest on top
    skips = [edge_line(layer, s, KEEP) for layer, s in space.nodes if fed[layer, s] and not runs[layer, s]]
    strengths = np.clip([strength for strength, _ in opened], 0, 1)

    ax.add_collection(LineCollection(closed, colors=FAINT, linewidths=CLOSED_WIDTH * unit, zorder=1))
    ax.add_collection(
        LineCollection(skips, colors=MUTED, linewidths=1.9 * unit, linestyles=[SKIP_STYLE], capstyle="round", zorder=2)
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
    layers, scales = np.array(space.nodes).T
    run, feeds = runs[layers, scales], fed[layers, scales]
    idle, skip = ~run & ~feeds, feeds & ~run
    ring: dict[str, Any] = {"zorder": 4, "linewidths": 1.1 * unit}
    ax.scatter(layers[idle], scales[idle], s=(3.6 * unit) ** 2, color="#c3c9d0", zorder=4, linewidths=0)
    ax.scatter(layers[skip], scales[skip], s=(8.2 * unit) ** 2, facecolor="white", edgecolor=INK, **ring)
    ax.scatter(layers[run], scales[run], s=(10.5 * unit) ** 2, facecolor=INK, edgecolor="white", **ring)
    for s in range(stages):
        ran = not s or gates[s - 1, s - 1, DOWN] > 0
        face, edge = (STAGE_COLOR, "white") if ran else ("white", FAINT)
        ax.scatter(s - 0.5, max(s - 0.5, 0), s=(8.6 * unit) ** 2, marker="s", facecolor=face, edgecolor=edge, **ring)
    if legend:
        below = ax.transAxes + ScaledTranslation(0, -32 / POINTS_PER_INCH, ax.figure.dpi_scale_trans)
        columns = int(np.clip(ax.get_window_extent().width * POINTS_PER_INCH / ax.figure.dpi / 140, 2, 5))
        ax.legend(
            loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, **route_legend(columns, words, stages)
        )


def draw_frame(ax: Axes, space: RoutingSpace, title: str | None = None) -> float:
    """What every drawn route has around its paths: limits, stem, decoder, axis labels, title.

    Returns the size of lines and nodes, 1 if a layer is 36 points wide.
    """
    last, coarsest = space.depth, space.num_scales - 1
    left, right, bottom, top = -1.45, last + 1.45, coarsest + 0.5, -0.5
    ax.set(xlim=(left, right), ylim=(bottom, top))
    box = ax.get_window_extent()
    points = POINTS_PER_INCH / ax.figure.dpi
    pitch_x = box.width * points / (right - left)  # points between layers
    pitch = min(pitch_x, box.height * points / (bottom - top))
    unit = float(np.clip((pitch / 36) ** 0.8, 0.3, 1.25))

    ax.plot((-0.82, 0), (0, 0), color=MUTED, linewidth=1.2 * unit, zorder=1)
    for x, y, name, tall in ((-0.98, 0, "stem", 0), (last + 1, coarsest / 2, "decoder", coarsest)):
        half, half_wide = tall / 2 + 0.34, max(0.2, 4 / pitch_x)
        style: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.1", "linewidth": 0.9 * unit, "zorder": 4}
        style |= {"facecolor": "#eef0f3", "edgecolor": MUTED}
        ax.add_patch(FancyBboxPatch((x - half_wide, y - half), 2 * half_wide, 2 * half, **style))
        size = max(7.5 * unit, 5.2)
        ax.text(x, y, name, ha="center", va="center", rotation=90, fontsize=size, color=INK, zorder=5)

    small = pitch < SMALL_PITCH
    ax.set_yticks(range(space.num_scales), [f"1/{STEM_STRIDE * 2**s}" for s in range(space.num_scales)])
    ax.set_xticks(range(0, last + 1, next((step for step in (1, 2, 5, 10) if step * pitch_x >= 22), 20)))
    font_size = 7 if small else 8.5
    ax.tick_params(length=0, labelsize=font_size, labelcolor=MUTED, pad=2)
    ax.set_xlabel("layer", fontsize=font_size, color=MUTED, labelpad=1)
    ax.set_ylabel("resolution", fontsize=font_size, color=MUTED, labelpad=3)
    ax.spines[:].set_visible(False)
    if title:
        lines = title_lines(title, box.width * points, small)
        ax.set_title("\n".join(lines), fontsize=TITLE_SIZES[small], color=INK, pad=5, parse_math=False)
    return unit


def title_lines(title: str, wide: float, small: bool) -> list[str]:
    """A title as it stands above a route of so many points: lines that fit, with long names cut in their middle."""
    most = max(12, int(wide / (0.6 * TITLE_SIZES[small])))
    words = [[cut(word, most) for word in drawable(line)[0].split(" ")] for line in title.splitlines()]
    return [part for line in words for part in textwrap.wrap(" ".join(line), most)]


def title_height(titles: Iterable[str], space: RoutingSpace, wide: float, tall: float) -> float:
    """Inches that the highest of these titles takes, above a route of this width and height in inches."""
    pitch = POINTS_PER_INCH * min(wide / (space.depth + 2.9), tall / space.num_scales)
    small = pitch < SMALL_PITCH
    lines = max(len(title_lines(title, POINTS_PER_INCH * wide, small)) for title in titles)
    return (1.3 * lines * TITLE_SIZES[small] + 5) / POINTS_PER_INCH


def _checked_gates(space: RoutingSpace, gates: Any) -> np.ndarray:
    values = np.asarray(gates, dtype=np.float64)
    if values.shape != space.legal.shape:
        raise ValueError(f"gates have shape {values.shape}, the space needs {space.legal.shape}: give one image's")
    if np.isnan(values).any():
        raise ValueError("gates hold NaN: the network that made them has diverged")
    return np.where(space.legal, np.maximum(values, 0), 0)


def edge_line(layer: int, scale: int, direction: int) -> tuple[tuple[float, float], tuple[float, float]]:
    return (layer, scale), (layer + 1, scale + SCALE_STEP[direction])


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


def route_legend(columns: int, words: RouteWords = ONE_IMAGE, stages: int = 0) -> dict[str, Any]:
    """Keyword arguments of `legend` that explain the signs of a route."""
    dot: dict[str, Any] = {"linestyle": "none", "marker": "o"}
    signs = {
        words.opened: _Wedge(),
        words.closed: Line2D([], [], color="#b4bac2", linewidth=0.9),
        words.runs: Line2D([], [], color=INK, markeredgecolor="white", markersize=8, **dot),
        words.dropped: Line2D(
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
        words.idle: Line2D([], [], color="#b4bac2", markersize=3.6, markeredgewidth=0, **dot),
    }
    if stages:
        signs[words.stage] = Line2D([], [], color=STAGE_COLOR, markersize=7, linestyle="none", marker="s")
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


def save_route(
    path: str | Path, space: RoutingSpace, gates: np.ndarray, title: str | None = None, stages: int = 0
) -> None:
    """One route as an image file (see `draw_route`, and for its ValueErrors). `gates` [L+1, S, 3]."""
    write_atomically(path, route_picture(space, gates, title, picture_kind(path), stages))


def route_picture(
    space: RoutingSpace, gates: np.ndarray, title: str | None = None, kind: str = "png", stages: int = 0
) -> bytes:
    """The image of `save_route` as the bytes of a file, `kind` "png" or "svg". As PNG, images of one route are drawn
    once, and each gets its own title."""
    if kind != "png" or not title or "\n" in title:
        return _drawn(space, gates, title, kind, stages)
    checked = _checked_gates(space, gates)
    drawn = _untitled(space, checked.tobytes(), stages)
    size = round(TITLE_SIZES[True] * PNG_DPI / POINTS_PER_INCH)
    text, font = fitted(title, size, drawn.width - 2 * size)
    canvas = Image.new("RGB", (drawn.width, drawn.height + size), "white")
    canvas.paste(drawn, (0, size))
    ImageDraw.Draw(canvas).text((drawn.width / 2, size), text, fill=INK, font=font, anchor="mm")
    return png_bytes(canvas)


@lru_cache(maxsize=64)
def _untitled(space: RoutingSpace, gates: bytes, stages: int) -> Image.Image:
    """A route, of which the gates are the bytes, without a title."""
    data = _drawn(space, np.frombuffer(gates).reshape(space.legal.shape), None, "png", stages)
    return Image.open(io.BytesIO(data)).convert("RGB")


def _drawn(space: RoutingSpace, gates: np.ndarray, title: str | None, kind: str, stages: int) -> bytes:
    wide = (space.depth + 2.9) * float(np.clip(10 / (space.depth + 2.9), 0.42, 0.64))  # inches
    tall = 0.6 * space.num_scales
    figure = new_figure(wide, tall)
    draw_route(figure.add_axes((0, 0, 1, 1)), space, gates, title, stages=stages)
    return figure_bytes(figure, kind)


def route_grid(
    path: str | Path, space: RoutingSpace, panels: Sequence[tuple[str, np.ndarray]], columns: int = 2
) -> None:
    """Routes in `columns`, row by row, with one legend: (title, gates [L+1, S, 3]).

    Raises ValueError if there is no panel, or the gates do not fit the space.
    """
    kind = picture_kind(path)
    if not panels:
        raise ValueError("no panels to draw: give at least one (title, gates)")
    wide, tall = float(np.clip(0.33 * (space.depth + 2.9), 4.2, 10.0)), 0.4 * space.num_scales  # inches
    across, down = 0.45, 0.75  # between panels
    rows = -(-len(panels) // columns)
    width, height = columns * (wide + across) - across, rows * (tall + down) - down
    figure = new_figure(width, height)
    for number, (title, gates) in enumerate(panels):
        row, column = divmod(number, columns)
        left, bottom = column * (wide + across), height - row * (tall + down) - tall
        ax = figure.add_axes((left / width, bottom / height, wide / width, tall / height))
        draw_route(ax, space, gates, title, legend=False)
        if column:
            ax.set_ylabel("")
    figure.legend(loc="upper center", bbox_to_anchor=(0.5, -0.42 / height), **route_legend(5, FIXED))
    save_figure(figure, path, kind)


def routes_side_by_side(
    path: str | Path,
    space: RoutingSpace,
    panels: Sequence[tuple[Sequence[np.ndarray], np.ndarray, str]],
    stages: int = 0,
    row_names: Sequence[str] = (),
) -> None:
    """One column per panel: its images, one below the other, and its route under them (the paper's Figure 1).

    A panel is (images uint8 [H, W, 3] each, gates [L+1, S, 3], title): an image and its segmentation, say, which is
    any RGB image (`overlay` with or without its legend, or `colorize`). Sizes may differ between panels, the number
    of images may not. `row_names` stand beside the images of the first column.

    Raises ValueError if there is no panel, or the gates do not fit the space.
    """
    kind = picture_kind(path)
    if not panels:
        raise ValueError("no panels to draw: give at least one (images, gates, title)")
    count = len(panels[0][0])
    wide = float(np.clip(0.25 * (space.depth + 2.9), 3.4, 8))  # inches, of a column
    rows = [[pictures[row] for pictures, _, _ in panels] for row in range(count)]
    picture_heights = [max(min(wide * p.shape[0] / p.shape[1], 1.25 * wide) for p in row) for row in rows]
    heights = [*picture_heights, max(0.4 * space.num_scales, 0.3 * wide)]
    above_route = 0.2 + title_height([title for _, _, title in panels], space, wide, heights[-1])
    gaps = [0.0, *[0.08] * (count - 1), above_route]  # above each row
    between, total = 0.5, sum(heights) + sum(gaps)
    figure = new_figure(len(panels) * (wide + between), total)
    for column, (pictures, gates, title) in enumerate(panels):
        top = total
        axes = []
        for height, gap in zip(heights, gaps, strict=True):
            top -= gap + height
            place = column / len(panels), top / total, wide / figure.get_figwidth(), height / total
            axes.append(figure.add_axes(place))
        for number, (ax, picture) in enumerate(zip(axes[:-1], pictures, strict=True)):
            ax.imshow(picture)
            ax.axis("off")
            ax.set_anchor("S" if number == 0 else "N")  # images of unlike shapes meet their segmentation below them
        if not column:
            for ax, name in zip(axes, row_names, strict=False):
                ax.text(-0.01, 0.5, name, transform=ax.transAxes, **ROW_NAME)
        draw_route(axes[-1], space, gates, title, legend=False, stages=stages)
        if column:
            axes[-1].set_ylabel("")
    middle = 0.5 - between / 2 / figure.get_figwidth()
    columns = int(np.clip(figure.get_figwidth() * POINTS_PER_INCH / 140, 2, 5))
    figure.legend(loc="upper center", bbox_to_anchor=(middle, -0.42 / total), **route_legend(columns, stages=stages))
    save_figure(figure, path, kind)
