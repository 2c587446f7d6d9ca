"""Label maps as images: in the colours of their classes, and laid over the image with a legend.

Legend: H, W image size, K classes.
    image    uint8 [H, W, 3]   RGB
    labels   integers [H, W]   class of each pixel, or IGNORE if there are no more than 255
    palette  uint8 [K, 3]      RGB colour of each class
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw

from routeseg.figures.common import INK, MUTED
from routeseg.figures.words import fitted, text_font
from routeseg.labels import IGNORE, see_through

MIN_IMAGE = 480  # pixels of the longer side below which an overlay is enlarged
SIDE_LEGEND_RATIO = 1.8  # taller than this: the legend stands beside the image


def colorize(labels: np.ndarray, palette: Any) -> np.ndarray:
    """The label map in the colours of its classes: uint8 [H, W, 3], RGB. IGNORE is black.

    Raises ValueError if `labels` is not a map of whole numbers or has a class that `palette` has no colour
    for.
    """
    labels, palette = np.asarray(labels), np.asarray(palette)
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}: give whole numbers of shape [H, W]")
    if palette.ndim != 2 or palette.shape[1] != 3:
        raise ValueError(f"the palette has shape {list(palette.shape)}: give one RGB colour per class, [K, 3]")
    strange = labels[(labels != IGNORE) & ((labels < 0) | (labels >= len(palette)))]
    if strange.size:
        raise ValueError(
            f"label {int(strange[0])} has no colour: the palette has {len(palette)} (classes 0 to "
            f"{len(palette) - 1}; {IGNORE} is ignored). Give the palette of the labels' data set"
        )
    table = np.zeros((max(IGNORE + 1, len(palette)), 3), dtype=np.uint8)
    table[: len(palette)] = palette
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

    The image shows through a class 0 called background, unless it has a colour of its own (`labels.see_through`).
    The legend names the classes present, largest first, with their share of the image; it stands below the
    image, or beside it if the image is tall. Images smaller than MIN_IMAGE are enlarged by a whole
    factor so that the legend can be read. `alpha` is the strength of the tint, 0 to 1; with `legend` False
    the image comes alone, at the size of the image.

    Raises ValueError if image and labels differ in size, or names, palette and labels do not fit together.
    """
    image, labels = np.asarray(image), np.asarray(labels)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"the image is {image.dtype} {list(image.shape)}: give RGB, uint8 [H, W, 3]")
    if labels.shape != image.shape[:2]:
        raise ValueError(f"labels are {list(labels.shape)}, the image {list(image.shape[:2])}: give the same size")
    if len(class_names) != len(palette):
        raise ValueError(f"{len(class_names)} class names, {len(palette)} colours: give one colour per class")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: it must lie in 0 to 1")
    colors = colorize(labels, palette)
    if legend:
        factor = max(1, math.ceil(MIN_IMAGE / max(labels.shape)))
        image, labels, colors = (a.repeat(factor, 0).repeat(factor, 1) for a in (image, labels, colors))
    picture = cv2.addWeighted(colors, alpha, image, 1 - alpha, 0)
    clear = (labels == 0) & see_through(class_names, palette)
    picture[clear] = image[clear]
    inner = _inner_border(labels) & ~clear
    picture[inner] = cv2.addWeighted(colors, 0.7, np.full_like(colors, 255), 0.3, 0)[inner]
    return _with_legend(picture, labels, class_names, palette) if legend else picture


def _inner_border(labels: np.ndarray) -> np.ndarray:
    """The pixels of each class that lie next to another class, bool [H, W]; thicker in larger images."""
    longer = max(labels.shape)
    window = 2 if longer < MIN_IMAGE else 1 + 2 * max(1, round(longer / 900))  # 2: on one side of a border
    kernel = np.ones((window, window), dtype=np.uint8)
    values = labels.astype(np.uint16)
    return cv2.dilate(values, kernel) != cv2.erode(values, kernel)


def legend_entries(labels: np.ndarray, class_names: Sequence[str], palette: Any) -> list[tuple[str, tuple, float]]:
    """(name, RGB colour, share of the image 0..1) of the classes present, largest first; ignored last."""
    values, counts = np.unique(labels, return_counts=True)
    ignored = IGNORE if len(palette) <= IGNORE else None
    order = sorted(zip(values.tolist(), counts.tolist(), strict=True), key=lambda e: (e[0] == ignored, -e[1]))
    named = {value: (class_names[value], palette[value]) for value, _ in order if value != ignored}
    named[IGNORE] = named.get(IGNORE, ("ignored", (0, 0, 0)))
    return [(named[v][0], tuple(int(c) for c in named[v][1]), count / labels.size) for v, count in order]


def percent(share: float) -> str:
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _with_legend(picture: np.ndarray, labels: np.ndarray, class_names: Sequence[str], palette: Any) -> np.ndarray:
    height, width = picture.shape[:2]
    beside = height > SIDE_LEGEND_RATIO * width
    size = int(np.clip(round(0.7 * math.sqrt(max(height, width))), 14, 44))  # pixels
    font, line, gap = text_font(size), round(1.75 * size), round(0.6 * size)
    margin, swatch = round(0.9 * size), round(1.05 * size)
    space = round(2.2 * size)  # between columns
    entries = [(name, color, percent(share)) for name, color, share in legend_entries(labels, class_names, palette)]
    share_width = max(font.getlength(share) for _, _, share in entries)
    room = (20 * size if beside else width - 2 * margin) - swatch - 2 * gap - share_width
    names = [fitted(name, size, room) for name, _, _ in entries]
    name_width = max(letters.getlength(name) for name, letters in names)
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
    places = even_columns(len(entries), columns)
    clear = (class_names[0], tuple(map(int, palette[0]))) if see_through(class_names, palette) else None
    for (number, row), (name, letters), (whole, color, share) in zip(places, names, entries, strict=True):
        x, y = left + number * (column + space), top + row * line + line // 2
        box = (x, y - swatch // 2, x + swatch, y - swatch // 2 + swatch)
        fill = "white" if (whole, color) == clear else color
        draw.rounded_rectangle(box, radius=swatch // 5, fill=fill, outline=MUTED, width=max(1, size // 16))
        draw.text((x + swatch + gap, y), name, fill=INK, font=letters, anchor="lm")
        draw.text((x + column, y), share, fill=MUTED, font=font, anchor="rm")
    return np.array(canvas)


def even_columns(count: int, columns: int) -> list[tuple[int, int]]:
    """(column, row) of each of so many entries, column by column; no column has two more than another."""
    return [(column, row) for column in range(columns) for row in range(len(range(column, count, columns)))]
