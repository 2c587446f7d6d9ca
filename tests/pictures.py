"""Image files that several tests write, and damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

ROTATED_RIGHT = 6  # EXIF orientation: the camera stood on its side
ORIENTATION_TAG = 274


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def truncate(path: Path) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
