"""What all images share: colours, and a figure that no global state knows of.

Every `path` of this package ends in .png or .svg. The file is written whole or not at all, and its folder is
made if missing. Matplotlib is not imported by what draws without it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from routeseg.figures.words import make_drawable
from routeseg.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PNG_DPI = 160
POINTS_PER_INCH = 72

INK, MUTED, FAINT = "#1d2530", "#67707c", "#d9dde2"  # text and nodes; secondary text; closed paths and grids
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#8e4585"  # told apart by colour-blind readers


def png_bytes(picture: np.ndarray | Image.Image) -> bytes:
    """An RGB array uint8 [H,W,3], or a PIL image, as the bytes of a PNG file."""
    data = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(data, format="PNG", compress_level=4)  # in half of the time of zlib's 6, and about as small
    return data.getvalue()


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """An empty white figure, size in inches, that no global state knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=PNG_DPI, facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def picture_kind(path: str | Path) -> str:
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"{path}: an image is written as .png or .svg, name it so")
    return kind


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as the bytes of a file, `kind` "png" or "svg"."""
    make_drawable(figure)
    data = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None  # the same figure gives the same text
    figure.savefig(data, format=kind, bbox_inches="tight", pad_inches=0.12, metadata=metadata)
    return data.getvalue()


def save_figure(figure: Figure, path: str | Path, kind: str) -> None:
    write_atomically(path, figure_bytes(figure, kind))


def plain_axes(ax: Axes) -> None:
    """Two spines and faint horizontal lines."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#aab1ba")
    ax.tick_params(labelsize=8.5, color="#aab1ba", labelcolor=INK, length=3)
    ax.grid(True, axis="y", color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
