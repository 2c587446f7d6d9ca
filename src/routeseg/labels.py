"""Classes, their colours, and the value of pixels without a label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

IGNORE = 255  # in labels of data sets, which so have 255 classes at most
Colour = tuple[int, int, int]  # RGB, 0..255


@dataclass(frozen=True)
class Classes:
    """Names and RGB colours of the classes; `palette` may be None."""

    names: tuple[str, ...]
    palette: tuple[Colour, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)


def label_map(labels: np.ndarray, classes: int) -> np.ndarray:
    """What a network of so many classes found, in the dtype of label maps: uint8, or uint16 for more than 256."""
    return labels.astype(label_type(classes), copy=False)


def label_type(classes: int) -> np.dtype[Any]:
    return np.min_scalar_type(classes - 1)


BACKGROUND = "background"  # what class 0 is called, in any case, if it is all that is nothing in particular
GREY: Colour = (128, 128, 128)  # its colour, unless the data set gives one
BLACK: Colour = (0, 0, 0)  # which data sets that give one take for it

# Of OKLCH. Colours that follow each other are 225 degrees apart, so that red comes last of the eight families; after
# each round lightness and chroma change, and the hues move on, so that no colour comes again.
FIRST_HUE, NEXT_HUE, FAMILIES, NEXT_ROUND = 250.0, 225.0, 8, 17.0  # degrees
TONES = ((0.62, 0.15), (0.80, 0.11), (0.46, 0.12))  # lightness and chroma of a round


def default_palette(names: Sequence[str]) -> tuple[Colour, ...]:
    """A colour for each class, far from those of the classes before and behind it; grey for a background."""
    colours = [_oklch(*TONES[k // FAMILIES % len(TONES)], _hue(k)) for k in range(len(names))]
    return (GREY, *colours[:-1]) if names and is_background(names[0]) else tuple(colours)


def is_background(name: str) -> bool:
    return name.strip().lower() == BACKGROUND


def see_through(names: Sequence[str], palette: Sequence[Sequence[int]]) -> bool:
    """Whether class 0 is a background that nobody chose a colour for: images show through it."""
    return is_background(names[0]) and tuple(map(int, palette[0])) in (GREY, BLACK)


def _hue(k: int) -> float:
    return (FIRST_HUE + NEXT_HUE * k + NEXT_ROUND * (k // FAMILIES)) % 360


def _oklch(lightness: float, chroma: float, hue: float) -> Colour:
    """OKLCH (Ottosson 2020; hue in degrees) as RGB 0..255; what sRGB cannot show is clipped."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    red, green, blue = (_gamma(min(max(value, 0.0), 1.0)) for value in linear)
    return red, green, blue


def _gamma(value: float) -> int:
    """Linear light 0..1 as sRGB 0..255."""
    return round(255 * (12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055))
