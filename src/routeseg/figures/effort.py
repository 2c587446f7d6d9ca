"""How far each place of an image went through the network, as a heat map over the image.

Legend: H, W image size, hb, wb places of the image, b the side of a place in pixels.
"""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from routeseg.figures.common import INK, new_figure, picture_kind, save_figure
from routeseg.figures.labels import MIN_IMAGE
from routeseg.figures.words import text_font
from routeseg.space import over_pixels

TINT = 0.6  # strength of the heat
BAR = 0.3  # width of the scale, as a share of the image's
WIDE = 6.4  # inches, of the figure of many images


def effort(
    image: np.ndarray, shares: np.ndarray, place: int, legend: bool = True, seen: tuple[int, int] | None = None
) -> np.ndarray:
    """The image uint8 [H,W,3] in grey, and over it what each place cost [hb,wb], a share of what it costs in the full
    network: uint8 [H',W',3], RGB. With the legend images smaller than MIN_IMAGE are enlarged, as overlays are.

    seen  (h, w), the size of the image of which a place is b x b pixels; None: its own
    """
    height, width = image.shape[:2]
    least, most = float(shares.min()), max(float(shares.max()), 1.0)
    picture = _tinted(image, over_pixels(shares, place, (height, width), seen) / most)
    if not legend:
        return picture
    factor = max(1, math.ceil(MIN_IMAGE / max(height, width)))
    return _with_scale(picture.repeat(factor, 0).repeat(factor, 1), least, most, float(shares.mean()))


def mean_effort(path: str | Path, image: np.ndarray, shares: np.ndarray, images: int) -> None:
    """What each point [H,W] cost in the mean over so many images, a share of what it costs in the full network, over
    their mean [H,W,3] in grey. The colours go from the least to the most, so that small differences are seen."""
    kind = picture_kind(path)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    least, most = float(shares.min()), float(shares.max())
    height, width = shares.shape
    figure = new_figure(WIDE, WIDE * height / width + 1.1, layout="constrained")
    ax = figure.subplots()
    ax.imshow(_tinted(image, (shares - least) / max(most - least, 1e-9)))
    ax.axis("off")
    ax.set_title(f"What each place costs, mean over {images} image{'s' * (images != 1)}", color=INK, fontsize=11)
    scale = ScalarMappable(Normalize(100 * least, 100 * most), "viridis")
    bar = figure.colorbar(scale, ax=ax, location="bottom", fraction=0.05)
    bar.set_label(f"% of the full network, {100 * shares.mean():.0f} % in the mean", color=INK)
    save_figure(figure, path, kind)


def _tinted(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The image uint8 [H,W,3] in grey, and over it values [H,W] in 0..1 as colours."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(heat_colours(values), TINT, grey, 1 - TINT, 0)


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Values in 0..1 as colours from dark blue to yellow, uint8 [...,3]."""
    import matplotlib

    table = (255 * matplotlib.colormaps["viridis"](np.linspace(0, 1, 256))[:, :3]).round().astype(np.uint8)
    return table[(255 * np.clip(values, 0, 1)).round().astype(np.uint8)]


def _with_scale(picture: np.ndarray, least: float, most: float, mean: float) -> np.ndarray:
    height, width = picture.shape[:2]
    size = int(np.clip(round(0.7 * math.sqrt(max(height, width))), 14, 44))  # pixels
    font, margin, bar = text_font(size), round(0.9 * size), round(BAR * width)
    canvas = Image.new("RGB", (width, height + 2 * margin + round(1.4 * size)), "white")
    canvas.paste(Image.fromarray(picture))
    draw, top, left = ImageDraw.Draw(canvas), height + margin, margin
    low, high = f"{100 * least:.0f} %", f"{100 * most:.0f} %"
    draw.text((left, top), low, fill=INK, font=font)
    left += math.ceil(font.getlength(low)) + margin // 2
    scale = heat_colours(np.linspace(least / most, 1, bar)[None].repeat(size, 0))
    canvas.paste(Image.fromarray(scale), (left, top + round(0.15 * size)))
    left += bar + margin // 2
    draw.text((left, top), high, fill=INK, font=font)
    left += math.ceil(font.getlength(high)) + 2 * margin
    for words in (f"of the full network, {100 * mean:.0f} % in the mean", f"mean {100 * mean:.0f} %"):
        if left + font.getlength(words) <= width - margin:
            draw.text((left, top), words, fill=INK, font=font)
            break
    return np.asarray(canvas)
