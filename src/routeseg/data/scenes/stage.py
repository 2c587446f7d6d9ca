"""Classes and paints, the camera, the light, and the brushes that paint image and labels at once.

The canvas has twice the asked size; at the end the image is averaged down, and of the labels every other pixel
is taken.

Shapes: H, W image; h, w = 2H, 2W canvas; F faces of P corners; n polygons or rectangles; K = len(CLASSES).
World axes: x to the right, y up from the ground, z forward from the camera, all in metres.
Colours: albedos are RGB in 0..1, colours on the canvas RGB in 0..255.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np

CLASSES = ("sky", "building", "fence", "pole", "road", "pavement", "vegetation", "sign", "car", "pedestrian")
SKY, BUILDING, FENCE, POLE, ROAD, PAVEMENT, VEGETATION, SIGN, CAR, PEDESTRIAN = range(len(CLASSES))
PALETTE = ((142, 202, 230), (94, 84, 108), (188, 138, 95), (238, 238, 226), (58, 64, 84), (200, 170, 200),
           (82, 150, 94), (250, 204, 60), (38, 96, 190), (226, 62, 87))  # fmt: skip

SUPERSAMPLE = 2  # canvas pixels per image pixel
SUBPIXEL = 4  # binary digits after the point in the coordinates that OpenCV fills
NEAR_M = 0.6  # nothing is drawn nearer than this
DETAIL_M = 42  # farther than this, shop fronts, branches and the like are left out
FOCAL = 1.2  # focal length over image height
TILE = 512  # pixels of a noise tile
NEUTRAL = 128  # the grey of a relief tile that changes nothing
NEAREST_ROWS = 512  # canvas rows up to which tiles are sampled to the nearest pixel: 6 times faster (CPU)

WALLS = np.array([
    (0.55, 0.30, 0.24), (0.78, 0.68, 0.50), (0.85, 0.80, 0.70), (0.52, 0.53, 0.55), (0.42, 0.50, 0.58),
    (0.48, 0.55, 0.42), (0.76, 0.55, 0.32), (0.86, 0.86, 0.84), (0.40, 0.31, 0.26), (0.66, 0.46, 0.42),
], np.float32)  # fmt: skip
PAINTS = np.array([
    (0.88, 0.88, 0.86), (0.10, 0.10, 0.12), (0.58, 0.60, 0.62), (0.66, 0.13, 0.12), (0.15, 0.27, 0.52),
    (0.22, 0.36, 0.25), (0.80, 0.62, 0.20), (0.36, 0.37, 0.39), (0.72, 0.62, 0.48), (0.35, 0.55, 0.68),
    (0.48, 0.28, 0.22), (0.55, 0.36, 0.50),
], np.float32)  # fmt: skip
LEAVES = np.array([
    (0.30, 0.46, 0.16), (0.22, 0.38, 0.18), (0.42, 0.48, 0.18), (0.68, 0.42, 0.14), (0.52, 0.22, 0.16),
    (0.34, 0.44, 0.26),
], np.float32)  # fmt: skip
GLASS = np.array((0.20, 0.24, 0.29), np.float32)

Point = tuple[float, float]
Place = tuple[float, float, float]
Rgb = tuple[int, ...]


@dataclass(frozen=True)
class Light:
    """What lights the scene: colours are float32 RGB, 1 being white.

    towards: unit vector to the sun. haze_m: depth with 63 % haze. cloud: cover in 0..1. lamps: whether they are on.
    """

    zenith: np.ndarray
    horizon: np.ndarray
    ambient: np.ndarray
    sun: np.ndarray
    towards: np.ndarray
    haze_m: float
    cloud: float
    lamps: bool


class Glow(NamedTuple):
    """A lamp in canvas pixels; `painted` is its colour on the canvas, None for one that nothing can hide."""

    x: float
    y: float
    radius: float
    colour: Rgb
    painted: list[int] | None


class Patch(NamedTuple):
    """A texture for the rows and columns `where` of the canvas, valid where the uint8 mask is 255."""

    where: tuple[slice, slice]
    texture: np.ndarray
    mask: np.ndarray


class Stage:
    """The canvas, the camera and the light.

    Brushes: `faces` paints plane shapes in space, `flat` upright shapes that face the camera, `limb` thick lines,
    `fill` polygons of the canvas; each writes image [h, w, 3] and labels [h, w] under one mask. Label None keeps
    what is labelled.
    """

    def __init__(self, size: tuple[int, int], dice: np.ndarray, x: float, light: Light) -> None:
        """size: (height, width) of the image. dice [4]: how the camera is held. x: where it stands."""
        height, width = self.shape = (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE)
        self.image, self.labels = np.zeros((height, width, 3), np.uint8), np.full((height, width), SKY, np.uint8)
        self.light, self.focal = light, FOCAL * height
        self.sampling = cv2.INTER_NEAREST if height <= NEAREST_ROWS else cv2.INTER_LINEAR
        self.vanishing = np.array([(0.38 + 0.24 * dice[0]) * width, (0.40 + 0.12 * dice[1]) * height])
        self.eye = np.array([x, 1.4 + 0.6 * dice[2], 0.0])
        self.glows: list[Glow] = []
        self._light_rgb = (light.ambient.tolist(), light.sun.tolist(), light.horizon.tolist())

    # The camera and the light

    def project(self, points: np.ndarray) -> np.ndarray:
        """World [..., 3] to canvas pixels [..., 2]."""
        scale = self.focal / np.maximum(points[..., 2:], NEAR_M)
        return self.vanishing + (points[..., :2] - self.eye[:2]) * (1, -1) * scale - 0.5

    def spot(self, x: float, y: float, z: float) -> Point:
        """One point of the world in canvas pixels."""
        scale = self.focal / z
        (across, down), (eye_x, eye_y, _) = self.vanishing, self.eye
        return (across + (x - eye_x) * scale - 0.5, down - (y - eye_y) * scale - 0.5)

    def shade(self, albedo: np.ndarray, depth: np.ndarray, lit: np.ndarray) -> np.ndarray:
        """Albedo [F, 3] or [3] at depth [F], `lit` [F] the share of sunlight: colours [F, 3] in 0..255."""
        clear = np.exp(-depth / self.light.haze_m)[:, None]
        bright = albedo * (self.light.ambient + self.light.sun * lit[:, None])
        return np.clip(255 * (bright * clear + self.light.horizon * (1 - clear)), 0, 255)

    def tone(self, albedo: np.ndarray, depth: float, lit: float) -> tuple[float, ...]:
        """What `shade` does, for one albedo [3] at one depth, without the cost of small arrays."""
        clear = math.exp(-depth / self.light.haze_m)
        channels = zip(albedo.tolist(), *self._light_rgb, strict=True)
        return tuple(min(255 * (a * (m + s * lit) * clear + h * (1 - clear)), 255) for a, m, s, h in channels)

    # The brushes

    def fill(self, polygons: np.ndarray, colour: Sequence[float], label: int | None) -> None:
        """Fill polygons [n, P, 2] in canvas pixels with one colour."""
        self._fill(list(fixed_point(polygons)), colour, label)

    def _fill(self, corners: Sequence[np.ndarray], colour: Sequence[float], label: int | None) -> None:
        cv2.fillPoly(self.image, corners, colour, cv2.LINE_8, SUBPIXEL)
        if label is not None:
            cv2.fillPoly(self.labels, corners, label, cv2.LINE_8, SUBPIXEL)

    def faces(self, points: np.ndarray, albedo: object, label: int | None, centre: object = None) -> None:
        """Paint faces [F, P, 3] of albedo [F, 3] or [3]; with a `centre`, only those that face us."""
        (ax, ay, az), (bx, by, bz) = (points[:, 1] - points[:, 0]).T, (points[:, 2] - points[:, 1]).T
        normal = np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], 1)  # [F, 3]
        to_us = ((self.eye - points[:, 0]) * normal).sum(1)  # > 0: the normal looks at us
        outward = to_us if centre is None else ((points[:, 0] - centre) * normal).sum(1)
        lit = normal @ self.light.towards * np.sign(outward) / (np.sqrt((normal * normal).sum(1)) + 1e-9)
        colours = self.shade(np.asarray(albedo), points[:, 0, 2], np.maximum(lit, 0)).tolist()
        corners = fixed_point(self.project(points))
        for i in np.flatnonzero(to_us * outward > 0).tolist():
            self._fill([corners[i]], colours[i], label)

    def flat(self, at: Point, outline: object, albedo: np.ndarray, label: int, lit: float = 0.5) -> None:
        """Paint an outline [P, 2], metres (x, y) around the place `at` (x, z), facing the camera."""
        scale = self.focal / at[1]
        points = np.asarray(outline) * (scale, -scale) + self.spot(at[0], 0.0, at[1])
        self.fill(points[None], self.tone(albedo, at[1], lit), label)

    def limb(self, at: Point, points: list, width: float, albedo: Any, label: int, lit: float = 0.5) -> None:
        """Paint a line through points of metres (x, y), `width` metres but one image pixel at least."""
        scale = 2**SUBPIXEL
        ends = [[round(c * scale) for c in self.spot(at[0] + x, y, at[1])] for x, y in points]
        thick = max(SUPERSAMPLE, round(width * self.focal / at[1]))
        colour = self.tone(albedo, at[1], lit)
        for a, b in zip(ends[:-1], ends[1:], strict=True):
            cv2.line(self.image, a, b, colour, thick, cv2.LINE_8, SUBPIXEL)
            cv2.line(self.labels, a, b, label, thick, cv2.LINE_8, SUBPIXEL)

    # Textures and lamps

    def warp(self, quad: np.ndarray, tile: str, per_m: float, shift: np.ndarray, strength: float = 1) -> Patch | None:
        """A noise tile laid on a quad [4, 3], `per_m` of its pixels a metre; None if that is out of sight.

        shift [2]: offset in tiles. strength: 1 for the full contrast of a relief, 0 for none.
        """
        corners = self.project(quad)
        low = np.maximum(np.floor(corners.min(0)).astype(int), 0)
        high = np.minimum(np.ceil(corners.max(0)).astype(int) + 1, self.shape[::-1])
        if (high - low).min() < 2:
            return None
        across, along = (np.linalg.norm(quad[i] - quad[0]) * per_m for i in (1, 3))
        source = np.array([(0, 0), (across, 0), (across, along), (0, along)]) + shift * TILE
        corners, extent = (corners - low).astype(np.float32), tuple((high - low).tolist())
        transform = cv2.getPerspectiveTransform(source.astype(np.float32), corners)
        image = noise_tiles()[tile]
        texture = cv2.warpPerspective(image, transform, extent, flags=self.sampling, borderMode=cv2.BORDER_WRAP)
        if strength < 1:
            texture = cv2.convertScaleAbs(texture, alpha=strength, beta=NEUTRAL * (1 - strength))
        mask = np.zeros(extent[::-1], np.uint8)
        cv2.fillConvexPoly(mask, fixed_point(corners), 255, cv2.LINE_8, SUBPIXEL)
        return Patch((slice(low[1], high[1]), slice(low[0], high[0])), texture, mask)

    def glow(self, at: tuple[float, ...], radius: float, colour: Rgb, pool: bool = False) -> None:
        """A lamp at (x, y, z) that shines at night, `radius` metres wide, unless it is painted over later.

        A `pool` of light on the ground shines in any case.
        """
        x, y = self.spot(*at)
        inside = 0 <= y < self.shape[0] and 0 <= x < self.shape[1]
        if self.light.lamps and (inside or pool):
            painted = None if pool else self.image[int(y), int(x)].tolist()
            self.glows.append(Glow(x, y, radius * self.focal / at[2], colour, painted))


@lru_cache(maxsize=1)
def noise_tiles() -> dict[str, np.ndarray]:
    """Periodic [TILE, TILE] tiles: noise of unit variance (float32), and reliefs (uint8 around NEUTRAL)."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None]) * TILE
    frequency[0, 0] = np.inf

    def fractal(slope: float) -> np.ndarray:
        """Noise whose amplitude falls with the frequency to the power of `slope`: the higher, the smoother."""
        noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((TILE, TILE))) / frequency**slope)
        return (noise / noise.std()).astype(np.float32)

    def relief(noise: np.ndarray, joints: np.ndarray) -> np.ndarray:
        return np.clip(NEUTRAL + 20 * noise - joints, 20, 235).astype(np.uint8)

    row, column = np.mgrid[:TILE, :TILE]
    slabs = 52 * ((row % 64 < 4) | ((column + 32 * (row // 64 % 2)) % 64 < 4))
    bricks = 30 * ((row % 16 < 3) | ((column + 16 * (row // 16 % 2)) % 32 < 2))
    no_joints = 0 * row
    # the order of the calls of `fractal` is part of the images
    blotch, cracks = fractal(1.5), 30 * (np.abs(fractal(1.9)) < 0.012)
    return {
        "cloud": fractal(1.6),
        "leaf": fractal(1.05),
        "blotch": blotch,
        "road": relief(0.6 * fractal(0.3) + 0.7 * blotch, cracks),
        "pavement": relief(0.5 * fractal(0.4) + 0.5 * fractal(1.4), slabs),
        "grass": relief(1.1 * fractal(0.5) + 0.7 * fractal(1.4), no_joints),
        "plaster": relief(0.35 * fractal(0.4) + 0.6 * fractal(1.5), no_joints),
        "brick": relief(0.6 * fractal(0.4) + 0.5 * fractal(1.5), bricks),
    }


def fixed_point(pixels: np.ndarray) -> np.ndarray:
    """Coordinates in pixels as the whole numbers of 1 / 2**SUBPIXEL pixel that OpenCV takes."""
    return np.rint(pixels * 2**SUBPIXEL).astype(np.int32)


def upright(x0: float, z0: float, x1: float, z1: float, top: float) -> np.ndarray:
    """An upright quad [4, 3] over the ground line from (x0, z0) to (x1, z1)."""
    return np.array([(x0, 0, z0), (x1, 0, z1), (x1, top, z1), (x0, top, z0)])


def level(x0: float, x1: float, z0: float, z1: float, y: float = 0.0) -> np.ndarray:
    """A level quad [4, 3] at height y."""
    return np.array([(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)])


def inset(quad: np.ndarray, rectangles: object) -> np.ndarray:
    """Rectangles [n, 4] of (left, right, low, high), in 0..1 of a quad [4, 3], as quads [n, 4, 3]."""
    rectangles = np.asarray(rectangles, float)
    s, t = rectangles[:, (0, 1, 1, 0)], rectangles[:, (2, 2, 3, 3)]
    return np.stack([(1 - s) * (1 - t), s * (1 - t), s * t, (1 - s) * t], 2) @ quad


def grey(plane: np.ndarray) -> np.ndarray:
    """A plane [h, w] as three equal channels [h, w, 3]."""
    return cv2.cvtColor(plane, cv2.COLOR_GRAY2RGB)


def pick(table: np.ndarray, dice: float) -> np.ndarray:
    """The row of a table that a number in [0, 1) falls on."""
    return table[int(dice * len(table))]
