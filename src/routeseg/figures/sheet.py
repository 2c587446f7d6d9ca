"""Images of a data set on one sheet, tinted with their labels: are they where they belong?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw

from routeseg.figures.common import FAINT, INK, MUTED, ORANGE, png_bytes
from routeseg.figures.labels import even_columns, overlay, percent
from routeseg.figures.words import fitted, text_font
from routeseg.files import write_atomically
from routeseg.labels import IGNORE

WIDTH, MARGIN, GAP = 1680, 36, 16  # pixels
TALLEST = 1.5  # height to width of a cell, at most
COLUMNS = 4
NO_CLASS = (255, 0, 255)  # RGB of label values that mean nothing
STRIPE_RGB, STRIPE_PERIOD = (150, 150, 150), 9  # pixels
TITLE, HEADING, TEXT, CAPTION = 30, 22, 17, 14  # pixels, heights of letters
LEGEND_LINE = 30


@dataclass(frozen=True)
class Section:
    """Images that stand together: (name, image uint8 [H,W,3], labels uint8 [H,W], K for a value without a class)."""

    heading: str
    pictures: Sequence[tuple[str, np.ndarray, np.ndarray]]


def contact_sheet(
    path: str | Path,
    title: str,
    sections: Sequence[Section],
    class_names: Sequence[str],
    palette: Any,
    shares: Sequence[float],
) -> None:
    """Draws the images in rows, and below them what each colour means, into a .png.

    shares  of the labelled pixels of the whole data set, for each class; 0: it never occurs
    """
    names, colours = [*class_names, "value without a class"], [*palette, NO_CLASS]
    cell = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) // COLUMNS
    parts = [_heading(title, TITLE, bold=True)]
    for section in sections:
        parts.append(_heading(section.heading, HEADING))
        tiles = [_tile(*picture, names, colours, cell) for picture in section.pictures]
        parts += [_row(tiles[start : start + COLUMNS], cell) for start in range(0, len(tiles), COLUMNS)]
    seen = {int(value) for section in sections for _, _, labels in section.pictures for value in np.unique(labels)}
    parts += [_heading("Classes, and their share of the labelled pixels", HEADING)]
    parts += [_legend(names, colours, shares, seen)]
    height = MARGIN + sum(part.height for part in parts) + MARGIN // 2
    sheet = Image.new("RGB", (WIDTH, height), "white")
    top = MARGIN // 2
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    write_atomically(path, png_bytes(sheet))


def _heading(text: str, size: int, bold: bool = False) -> Image.Image:
    strip = Image.new("RGB", (WIDTH, round(2.1 * size)), "white")
    text, letters = fitted(text, size, WIDTH - 2 * MARGIN, bold)
    ImageDraw.Draw(strip).text((MARGIN, strip.height // 2), text, fill=INK, font=letters, anchor="lm")
    return strip


def _tile(
    name: str, image: np.ndarray, labels: np.ndarray, names: Sequence[str], colours: Any, cell: int
) -> Image.Image:
    """The tinted image, as wide as a cell or as high as one may be, with its name below."""
    height, width = labels.shape
    factor = min(cell / width, TALLEST * cell / height)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
    tinted = overlay(small, labels, names, colours, legend=False)
    _stripe(tinted, (labels == IGNORE) | (labels == len(names) - 1))
    tile = Image.new("RGB", (cell, size[1] + 2 * CAPTION), "white")
    tile.paste(Image.fromarray(tinted), ((cell - size[0]) // 2, 0))
    caption, letters = fitted(f"{name}   {width}x{height}", CAPTION, cell)
    ImageDraw.Draw(tile).text((0, size[1] + CAPTION), caption, fill=MUTED, font=letters, anchor="lm")
    return tile


def _stripe(picture: np.ndarray, where: np.ndarray) -> None:
    """Slanted stripes on what belongs to no class, so that it is not taken for a class of a similar colour."""
    rows, columns = np.indices(where.shape)
    lines = where & ((rows + columns) % STRIPE_PERIOD < 2)
    picture[lines] = STRIPE_RGB


def _row(tiles: Sequence[Image.Image], cell: int) -> Image.Image:
    row = Image.new("RGB", (WIDTH, max(tile.height for tile in tiles) + GAP // 2), "white")
    for column, tile in enumerate(tiles):
        row.paste(tile, (MARGIN + column * (cell + GAP), 0))
    return row


def _legend(names: Sequence[str], colours: Any, shares: Sequence[float], seen: set[int]) -> Image.Image:
    """The classes, the most frequent first and those that never occur last, in columns; then what is no class."""
    order = sorted(range(len(shares)), key=lambda k: -shares[k])
    entries = [(names[k], colours[k], percent(shares[k]) if shares[k] else "never") for k in order]
    if len(shares) in seen:
        entries.append((names[-1], NO_CLASS, ""))
    if IGNORE in seen:
        entries.append(("ignored", (0, 0, 0), ""))
    columns = COLUMNS
    rows = math.ceil(len(entries) / columns)
    width = (WIDTH - 2 * MARGIN - (columns - 1) * 2 * GAP) // columns
    legend = Image.new("RGB", (WIDTH, rows * LEGEND_LINE), "white")
    draw, letters = ImageDraw.Draw(legend), text_font(TEXT)
    for (column, row), (name, colour, share) in zip(even_columns(len(entries), columns), entries, strict=True):
        x = MARGIN + column * (width + 2 * GAP)
        y = row * LEGEND_LINE + LEGEND_LINE // 2
        draw.rounded_rectangle((x, y - 9, x + 26, y + 9), radius=4, fill=tuple(map(int, colour)), outline=FAINT)
        room = width - 38 - letters.getlength(share) - GAP
        words, font = fitted(name, TEXT, room)
        draw.text((x + 38, y), words, fill=INK, font=font, anchor="lm")
        if not share:
            swatch = np.array(legend.crop((x, y - 9, x + 27, y + 10)))
            _stripe(swatch, (swatch == colour).all(-1))
            legend.paste(Image.fromarray(swatch), (x, y - 9))
        fill = ORANGE if share == "never" else MUTED
        draw.text((x + width, y), share, fill=fill, font=letters, anchor="rm")
    return legend
