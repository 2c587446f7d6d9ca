"""Boundary IoU: intersection over union near contours alone; the IoU of large objects hardly sees those.

B. Cheng, R. Girshick, P. Dollar, A. C. Berg, A. Kirillov, "Boundary IoU: Improving Object-Centric Image Segmentation
Evaluation", CVPR 2021.

Legend: K classes, H, W image size, labels integers [H,W].
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from routeseg.labels import IGNORE

BOUNDARY_WIDTH = 0.02  # of the image's diagonal, the paper's default


def boundary_counts(truth: np.ndarray, prediction: np.ndarray, num_classes: int, width: float) -> np.ndarray:
    """Intersection and union of each class's boundary bands in one image, pixels: int64 [2,K]; sum them over a set.

    The band of a class is its pixels within distance d of its contour; the image's border is a contour too. d is
    `width` times the diagonal, at least 1 pixel; the distance is that of a square neighbourhood, as in the authors'
    code. Pixels that the truth ignores (IGNORE) belong to no class in either map, so their edge is a contour in
    both.
    """
    truth = truth.astype(np.uint8)
    prediction = np.where(truth == IGNORE, IGNORE, prediction).astype(np.uint8)
    distance = max(1, round(width * math.hypot(*truth.shape)))
    true_band, found_band = (np.where(_band(x, distance), x, IGNORE) for x in (truth, prediction))
    sizes = [np.bincount(x[x != IGNORE], minlength=num_classes) for x in (true_band, found_band)]
    both = true_band[(true_band == found_band) & (true_band != IGNORE)]
    intersection = np.bincount(both, minlength=num_classes)
    return np.stack([intersection, sizes[0] + sizes[1] - intersection])


def _band(labels: np.ndarray, distance: int) -> np.ndarray:
    """The pixels within this distance of another label or of the image's border, bool [H,W].

    A pixel is outside the eroded mask of its own class exactly if its neighbourhood holds two labels: one erosion and
    one dilation of the label map serve all classes.
    """
    square = np.ones((2 * distance + 1, 2 * distance + 1), dtype=np.uint8)
    highest = cv2.dilate(labels, square, borderType=cv2.BORDER_CONSTANT, borderValue=IGNORE)  # outside: no class
    return np.not_equal(cv2.erode(labels, square), highest)
