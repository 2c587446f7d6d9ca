"""Augmentation: random scale, crop with padding, flip and colour, all drawn from one generator.

Legend: image uint8 [H,W,3] RGB, labels uint8 [H,W] with IGNORE where there is no label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from routeseg.labels import IGNORE

PADDING_RGB = (124, 116, 104)  # the mean of ImageNet, so that padding is about 0 once normalised
LUMA_RGB = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image.

    crop    (height, width) of the result; an image that is smaller after scaling is padded
    scales  one of these factors is drawn; the authors' shorter sides 512..2048 on Cityscapes are 0.5..2.0
    flip    mirror half of the images
    colour  strength of random brightness, contrast and saturation; 0 is none
    """

    crop: tuple[int, int]
    scales: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    flip: bool = True
    colour: float = 0.0

    def __call__(
        self, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """-> image uint8 [*crop,3], labels uint8 [*crop]."""
        height, width = labels.shape
        factor = float(rng.choice(np.asarray(self.scales)))
        top = _offset(round(height * factor), self.crop[0], rng)
        left = _offset(round(width * factor), self.crop[1], rng)
        mirror = self.flip and rng.random() < 0.5
        # One affine map for scale, crop, padding and flip; pixel centres are at half integers.
        matrix = np.array([[factor, 0, factor / 2 - 0.5 - left], [0, factor, factor / 2 - 0.5 - top]], dtype=np.float64)
        if mirror:
            matrix[0] = [-matrix[0, 0], 0, self.crop[1] - 1 - matrix[0, 2]]
        size = (self.crop[1], self.crop[0])
        image = cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR, borderValue=PADDING_RGB)
        labels = cv2.warpAffine(labels, matrix, size, flags=cv2.INTER_NEAREST, borderValue=IGNORE)
        if self.colour > 0:
            image = jitter(image, self.colour, rng)
        return image, labels


def _offset(size: int, crop: int, rng: np.random.Generator) -> int:
    """Where the crop starts in the scaled image; negative where there is padding on both sides."""
    room = size - crop
    return int(rng.integers(min(room, 0), max(room, 0) + 1))


def jitter(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Random brightness, contrast and saturation of an image, each within 1 - strength .. 1 + strength."""
    brightness, contrast, saturation = 1.0 + strength * rng.uniform(-1.0, 1.0, size=3)
    # Brightness; then saturation, about the grey of each pixel; then contrast, about the mean grey: one affine map.
    mean = brightness * LUMA_RGB @ cv2.mean(image)[:3]
    grey = np.broadcast_to(LUMA_RGB, (3, 3))
    matrix = contrast * brightness * (saturation * np.eye(3) + (1 - saturation) * grey)
    return cv2.transform(image, np.column_stack([matrix, np.full(3, (1 - contrast) * mean)]))
