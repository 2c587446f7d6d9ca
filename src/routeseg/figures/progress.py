"""How a network learns to see: a few images, and what it makes of them, time after time.

Legend: H, W size of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from routeseg.figures.common import INK, MUTED, png_bytes
from routeseg.figures.words import text_font
from routeseg.files import write_atomically

CELL = 280  # pixels, of the longer side of an image
GAP, MARGIN, WORDS = 8, 16, 118  # pixels; WORDS is what the words of a row take
TEXT = 16  # pixels, height of letters


def shrunk(picture: np.ndarray) -> np.ndarray:
    """An image [H,W,3], or labels [H,W], uint8, as large as a cell of the sheet at most."""
    factor = min(1.0, CELL / max(picture.shape[:2]))
    size = tuple(max(1, round(side * factor)) for side in picture.shape[1::-1])
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if picture.ndim == 3 else cv2.INTER_NEAREST)


def progress_sheet(path: str | Path, rows: Sequence[tuple[Sequence[str], Sequence[np.ndarray | None]]]) -> None:
    """Draws rows of images into a .png, the same number in each: (lines of words that stand before them, images
    uint8 [H,W,3] or None for one that is missing).

    Raises OSError if it cannot be written.
    """
    columns = list(zip(*(pictures for _, pictures in rows), strict=True))
    widths = [max((some.shape[1] for some in column if some is not None), default=CELL) for column in columns]
    heights = [max((some.shape[0] for some in pictures if some is not None), default=0) for _, pictures in rows]
    heights = [max(height, 3 * TEXT) for height in heights]
    width = 2 * MARGIN + WORDS + sum(widths) + GAP * len(widths)
    sheet = Image.new("RGB", (width, 2 * MARGIN + sum(heights) + GAP * (len(rows) - 1)), "white")
    draw, top = ImageDraw.Draw(sheet), MARGIN
    for (words, pictures), height in zip(rows, heights, strict=True):
        for number, line in enumerate(words):
            y = top + height / 2 + (number - (len(words) - 1) / 2) * 1.4 * TEXT
            draw.text((MARGIN, y), line, fill=MUTED if number else INK, font=text_font(TEXT), anchor="lm")
        left = MARGIN + WORDS + GAP
        for picture, room in zip(pictures, widths, strict=True):
            if picture is not None:
                sheet.paste(Image.fromarray(picture), (left + (room - picture.shape[1]) // 2, top))
            left += room + GAP
        top += height + GAP
    write_atomically(path, png_bytes(sheet))
