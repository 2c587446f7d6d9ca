"""Square crops of images that have one label: random ones to train on, the one in the middle to evaluate; and the size
of crops that images fill."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from routeseg.data.decoding import UnreadableImage
from routeseg.data.pairs import SegmentationData
from routeseg.data.subset import evenly_spread
from routeseg.data.transforms import jitter

SIZES = 40  # images, evenly spread, whose sizes tell the size of crops
SMALLER = 0.25  # of the images may be smaller than a crop, in height or width
CROP_STEP = 32  # pixels: the sides of a crop are multiples of it
CROP_ATTEMPTS = 10  # to draw a crop that fits in; then the largest one in the middle


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of an image, resized to a square, mirrored half of the time, in other colours."""

    side: int
    area: tuple[float, float]
    aspect: tuple[float, float]
    flip: bool = True
    colour: float = 0.0

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 [H,W,3] -> uint8 [side,side,3]."""
        top, left, height, width = self.box(image.shape[0], image.shape[1], rng)
        crop = resize(image[top : top + height, left : left + width], self.side, self.side)
        if self.flip and rng.random() < 0.5:
            crop = crop[:, ::-1]
        return jitter(crop, self.colour, rng) if self.colour > 0 else crop

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(top, left, height, width): area and log aspect are uniform; if none fits, the largest in the middle."""
        low, high = self.aspect
        for _ in range(CROP_ATTEMPTS):
            area = height * width * rng.uniform(*self.area)
            aspect = float(np.exp(rng.uniform(np.log(low), np.log(high))))
            w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 0 < h <= height and 0 < w <= width:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        w, h = min(width, max(round(height * high), 1)), min(height, max(round(width / low), 1))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class CentreCrop:
    """The shorter side to `shorter`, then the square in the middle."""

    shorter: int
    side: int

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H,W,3] -> uint8 [side,side,3]."""
        height, width = image.shape[:2]
        factor = self.shorter / min(height, width)
        height, width = max(round(height * factor), self.shorter), max(round(width * factor), self.shorter)
        top, left = (height - self.side) // 2, (width - self.side) // 2
        return resize(image, height, width)[top : top + self.side, left : left + self.side]


def filled_crop(data: SegmentationData, crop: tuple[int, int]) -> tuple[int, int]:
    """The size (height, width) of crops, no larger than `crop`, that most of the images fill."""
    some, sizes = evenly_spread(data, SIZES), []
    for index in range(len(some)):
        try:
            sizes.append(some.read(index)[0].shape[:2])
        except UnreadableImage:
            continue
    if not sizes:
        return crop
    sides = np.quantile(np.array(sizes), SMALLER, axis=0, method="lower").astype(int).tolist()
    height, width = (
        most if side >= most else max(CROP_STEP, side // CROP_STEP * CROP_STEP)
        for side, most in zip(sides, crop, strict=True)
    )
    return height, width


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear when it grows; averaged over the pixels that fall together when it shrinks."""
    shrinks = height * width < image.shape[0] * image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
