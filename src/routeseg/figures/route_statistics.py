"""Routes over a data set as images: how often and how strongly each edge is open, the cheapest and the dearest
images with their routes, and routes by group. All are drawn on the grid of routes.py.

Legend: L depth, S scales, H, W image size.
    shares, activations  float [L+1, S, 3] in 0..1, one number per edge
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from routeseg.figures.common import BLUE, FAINT, INK, ORANGE, POINTS_PER_INCH, new_figure, picture_kind, save_figure
from routeseg.figures.routes import (
    CLOSED_WIDTH,
    OPEN_WIDTH,
    RouteWords,
    draw_frame,
    draw_route,
    edge_line,
    route_legend,
    title_height,
)
from routeseg.space import DOWN, KEEP, UP, RoutingSpace

OVER_IMAGES = {
    "closed": "path closed in all images",
    "runs": "cell runs in some images",
    "dropped": "cell dropped in all images",
    "idle": "nothing arrives in any image",
}
FREQUENCY = RouteWords("path open in 0 to 100 % of the images", **OVER_IMAGES)
STRENGTH = RouteWords("mean activation of a path, 0 to 1", **OVER_IMAGES)
Line = tuple[float, tuple[tuple[float, float], tuple[float, float]]]  # size of a difference, its edge
DASHED = (0, (2.4, 1.3))
NUMBER_PITCH = 34  # points between layers; with fewer, numbers would run into each other
MIN_DIFFERENCE = 0.005  # share of the images; a path that differs less is drawn as not different
DIFFERENCE_RANGES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # shares at which lines may have their full width
THIN_SPACE = "\u2009"
TITLE, HEADING = 0.34, 0.42  # inches for a panel's title line, and for a heading above several panels
AXIS, LEGEND_GAP = 0.34, 0.1  # inches for the layer axis under a panel, and from there to the legend


def edge_frequency(path: str | Path, space: RoutingSpace, frequency: np.ndarray, images: int) -> None:
    """How often each edge is open: the grid, each edge with its share of the `images`. An edge that is open in only
    some has the percentage beside it (up to about depth 16; deeper grids have no room for numbers).

    Raises ValueError if the shares do not fit the space.
    """
    kind = picture_kind(path)
    title = f"How often each path is open, over {images} images"
    figure, (ax,) = _stacked(space, [(title, frequency)], FREQUENCY)
    roomy = ax.get_window_extent().width / figure.dpi * POINTS_PER_INCH / (space.depth + 2.9) >= NUMBER_PITCH
    for layer, scale, direction in space.edges if roomy else ():
        share = frequency[layer, scale, direction]
        if 0 < share < 1:
            _, (_, end) = edge_line(layer, scale, direction)
            # Where neither another edge nor another number is: above keep, near the upper end of up and down.
            along = {UP: 0.73, KEEP: 0.5, DOWN: 0.27}[direction]
            at = layer + along, scale + along * (end - scale) - 0.17 * (direction == KEEP)
            text = f"{100 * share:.0f}" if 0.01 <= share <= 0.99 else "<1" if share < 0.5 else ">99"
            pale = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 0.5}
            ax.text(*at, f"{text}{THIN_SPACE}%", fontsize=6.5, color=INK, ha="center", va="center", bbox=pale, zorder=6)
    save_figure(figure, path, kind)


def edge_strength(
    path: str | Path, space: RoutingSpace, mean_activation: np.ndarray, mean_when_open: np.ndarray, images: int
) -> None:
    """How strongly each edge is open: its mean activation over all images, and below over those in which it is open.

    Raises ValueError if the activations do not fit the space.
    """
    panels = [
        (f"Mean activation over all {images} images (0 if closed)", mean_activation),
        ("Mean activation over the images in which the path is open", mean_when_open),
    ]
    kind = picture_kind(path)
    save_figure(_stacked(space, panels, STRENGTH)[0], path, kind)


def extreme_routes(
    path: str | Path,
    space: RoutingSpace,
    rows: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, str]]],
) -> None:
    """Images with their routes, in rows under headings (such as the cheapest and the dearest images).

    A panel is (image uint8 [H, W, 3], segmentation uint8 [H, W, 3], gates [L+1, S, 3], title): image and
    segmentation side by side, the route below.

    Raises ValueError if there is no panel, or gates do not fit the space.
    """
    kind = picture_kind(path)
    if not rows or not all(rows.values()):
        raise ValueError("no images to draw: give each row at least one (image, segmentation, gates, title)")
    columns = max(map(len, rows.values()))
    wide, tall = _panel_size(space, 0.36, 4.2, 5.6)
    between, inner = 0.55, 0.06  # inches between columns, and between image and segmentation
    half = (wide - inner) / 2
    title = 0.1 + title_height([panel[3] for row in rows.values() for panel in row], space, wide, tall)
    thumbs = [  # inches high, by row
        min(max(half * p[0].shape[0] / p[0].shape[1] for p in panels), 0.62 * wide) for panels in rows.values()
    ]
    below = title + tall + AXIS + 0.25  # inches, of a row below its images
    figure = new_figure(columns * (wide + between) - between, sum(thumbs) + (HEADING + below) * len(thumbs))
    place = _Placer(figure)
    top = 0.0
    for (heading, panels), thumb in zip(rows.items(), thumbs, strict=True):
        place.heading(heading, top)
        top += HEADING
        for column, (image, segmentation, gates, name) in enumerate(panels):
            left = column * (wide + between)
            for at, picture, anchor in ((left, image, "SE"), (left + half + inner, segmentation, "SW")):
                ax = place.axes(at, top, half, thumb)
                ax.imshow(picture)
                ax.axis("off")
                ax.set_anchor(anchor)
            ax = place.axes(left, top + thumb + title, wide, tall)
            draw_route(ax, space, gates, name, legend=False)
            if column:
                ax.set_ylabel("")
        top += thumb + below
    place.legend(route_legend(_columns(figure)))
    save_figure(figure, path, kind)


def group_frequencies(path: str | Path, space: RoutingSpace, groups: Sequence[tuple[str, np.ndarray]]) -> None:
    """How often each edge is open in each group of images, a column per group: (title, shares [L+1, S, 3]).

    With several groups a second row shows how far each lies from the mean of all groups: more often open is a
    solid blue line, less often a dashed orange one, wider the more the shares differ.

    Raises ValueError if there is no group, or shares do not fit the space.
    """
    kind = picture_kind(path)
    if not groups:
        raise ValueError("no groups to draw: give at least one (title, shares)")
    wide, tall = _panel_size(space, 0.34, 3.7, max(3.8, 16 / max(1, len(groups))))
    between = 0.35
    mean = np.mean([shares for _, shares in groups], axis=0)
    compared = len(groups) > 1
    first = HEADING + title_height([title for title, _ in groups], space, wide, tall)
    row_height = first + tall + AXIS
    second = row_height + 0.55  # room for the legend of the first row
    figure = new_figure(len(groups) * (wide + between) - between, second + HEADING + tall + AXIS if compared else first)
    if not compared:
        figure.set_figheight(row_height)
    place = _Placer(figure)
    place.heading("How often each path is open", 0)
    for column, (title, shares) in enumerate(groups):
        ax = place.axes(column * (wide + between), first, wide, tall)
        draw_route(ax, space, shares, title, legend=False)
        if column:
            ax.set_ylabel("")
    place.legend(route_legend(_columns(figure), FREQUENCY), row_height + LEGEND_GAP)
    if compared:
        differences = [np.asarray(shares) - mean for _, shares in groups]
        largest = max(float(np.abs(d).max()) for d in differences)
        full = next(share for share in DIFFERENCE_RANGES if share >= min(largest, 1.0))
        place.heading("Difference from the mean of the groups", second)
        for column, difference in enumerate(differences):
            ax = place.axes(column * (wide + between), second + HEADING, wide, tall)
            draw_difference(ax, space, difference, full)
            if column:
                ax.set_ylabel("")
        place.legend(_difference_legend(full), second + HEADING + tall + AXIS + LEGEND_GAP)
    save_figure(figure, path, kind)


def draw_difference(ax: Axes, space: RoutingSpace, difference: np.ndarray, full: float) -> None:
    """Draw on `ax` by how much each edge is more (solid, blue) or less often open (dashed, orange).

    `difference` [L+1, S, 3] in -1..1; lines have their full width at a difference of `full` and more.

    Raises ValueError if it does not fit the space.
    """
    difference = np.asarray(difference, dtype=np.float64)
    if difference.shape != space.legal.shape:
        raise ValueError(f"differences have shape {difference.shape}, the space needs {space.legal.shape}")
    unit = draw_frame(ax, space)
    lines: dict[str, list[Line]] = {"none": [], "more": [], "less": []}
    for edge in space.edges:
        value = float(difference[edge])
        where = "none" if abs(value) < MIN_DIFFERENCE else "more" if value > 0 else "less"
        lines[where].append((abs(value), edge_line(*edge)))
    ax.add_collection(LineCollection([line for _, line in lines["none"]], colors=FAINT, linewidths=CLOSED_WIDTH * unit))
    for where, color, style in (("more", BLUE, "solid"), ("less", ORANGE, DASHED)):
        entries = sorted(lines[where], key=lambda entry: entry[0])
        widths = np.interp([size for size, _ in entries], (0, full), OPEN_WIDTH) * unit
        drawn = [line for _, line in entries]
        ax.add_collection(LineCollection(drawn, colors=color, linewidths=widths, linestyles=[style], zorder=3))
    layers, scales = np.array(space.nodes).T
    ax.scatter(layers, scales, s=(5.5 * unit) ** 2, color="#8b949f", zorder=4, linewidths=0)


def _difference_legend(full: float) -> dict[str, Any]:
    points = f"{100 * full:g} points"
    signs = {
        f"more often open, thickest at {points}": Line2D([], [], color=BLUE, linewidth=3),
        f"less often open, thickest at {points}": Line2D([], [], color=ORANGE, linewidth=3, linestyle=DASHED),
        f"within {100 * MIN_DIFFERENCE:g} points": Line2D([], [], color="#b4bac2", linewidth=0.9),
    }
    return route_legend(3) | {"handles": list(signs.values()), "labels": list(signs)}


def _stacked(
    space: RoutingSpace, panels: Sequence[tuple[str, np.ndarray]], words: RouteWords
) -> tuple[Figure, list[Axes]]:
    """One grid above the other, and one legend."""
    wide, tall = _panel_size(space, 0.55, 6.4, 14.0)
    row_height = TITLE + tall + AXIS + 0.1
    figure = new_figure(wide, row_height * len(panels) - 0.1)
    place = _Placer(figure)
    drawn = [place.axes(0, row * row_height + TITLE, wide, tall) for row in range(len(panels))]
    for ax, (title, shares) in zip(drawn, panels, strict=True):
        draw_route(ax, space, shares, title, legend=False)
    place.legend(route_legend(_columns(figure), words))
    return figure, drawn


def _panel_size(space: RoutingSpace, pitch: float, least: float, most: float) -> tuple[float, float]:
    """Width and height of a grid in inches: `pitch` for a layer, but the width within bounds."""
    wide = float(np.clip(pitch * (space.depth + 2.9), least, most))
    return wide, max(0.42 * space.num_scales, 0.27 * min(wide, 6.5))


def _columns(figure: Figure) -> int:
    """How many entries of a route's legend stand beside each other."""
    return int(np.clip(figure.get_figwidth() * POINTS_PER_INCH / 190, 2, 5))


class _Placer:
    """Places axes, headings and legends on a figure in inches, from its top left corner."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.width, self.height = figure.get_figwidth(), figure.get_figheight()

    def axes(self, left: float, top: float, wide: float, tall: float) -> Axes:
        bottom = self.height - top - tall
        return self.figure.add_axes((left / self.width, bottom / self.height, wide / self.width, tall / self.height))

    def heading(self, text: str, top: float) -> None:
        at = 0, (self.height - top) / self.height
        self.figure.text(*at, text, fontsize=13, color=INK, weight="bold", va="top", ha="left", parse_math=False)

    def legend(self, options: dict[str, Any], top: float | None = None) -> None:
        """Centred, its upper edge at `top`, or below everything."""
        y = (self.height - (self.height + LEGEND_GAP if top is None else top)) / self.height
        self.figure.legend(loc="upper center", bbox_to_anchor=(0.5, y), borderaxespad=0, **options)
