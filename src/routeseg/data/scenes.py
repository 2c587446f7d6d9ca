"""A procedural street: pictures with exact labels that need no download.

Every picture is a small 3-D world seen through a pinhole camera. It is painted from far to near on a canvas
of twice the asked size; image and labels are painted by the same shapes, and only the image is averaged down.
All random numbers are drawn in metres and fractions, in an order that no pixel count changes, so a scene has
the same composition at every size. Colour alone does not give the class: walls, cars and clothes share
paints, road and pavement greys, lawns, hedges and fences greens, by day, dusk, clouds or night.

Shapes: H, W picture; h, w = 2H, 2W canvas; F faces of P corners; n rectangles; T things; K = len(CLASSES).
World axes: x to the right, y up from the ground, z forward from the camera, all in metres.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np

CLASSES = ("sky", "building", "fence", "pole", "road", "pavement", "vegetation", "sign", "car", "pedestrian")
SKY, BUILDING, FENCE, POLE, ROAD, PAVEMENT, VEGETATION, SIGN, CAR, PEDESTRIAN = range(len(CLASSES))
PALETTE = ((142, 202, 230), (94, 84, 108), (188, 138, 95), (238, 238, 226), (58, 64, 84), (200, 170, 200),
           (82, 150, 94), (250, 204, 60), (38, 96, 190), (226, 62, 87))  # fmt: skip
PRESETS = ("large", "small", "mixed")

MIN_SIZE = 32  # pixels; below this the far things vanish
SUPERSAMPLE = 2  # canvas pixels per picture pixel
SUBPIXEL = 4  # binary digits after the point in the coordinates that OpenCV fills
NEAR_M = 0.6  # nothing is drawn nearer than this
FOCAL = 1.2  # focal length over picture height
TILE = 512  # pixels of a noise tile
NEUTRAL = 128  # the grey of a relief tile that changes nothing
NEAR_RANGE_M, FAR_RANGE_M = (3.0, 7.5), (15.0, 70.0)  # where near and far things stand, log-uniform
SHARP_TILES = 512  # canvas rows up to which tiles are sampled to the nearest pixel: 6 times faster (CPU)
BARRIERS = 0.35  # share of the fences that are barriers across the street
DETAIL_M = 42  # farther than this, shop fronts, hands and the like are left out
DICE = 32  # uniform numbers that each thing owns

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
SKINS = np.array([(0.86, 0.68, 0.56), (0.70, 0.50, 0.38), (0.46, 0.31, 0.23)], np.float32)
GLASS, RUBBER = np.array([(0.20, 0.24, 0.29), (0.07, 0.07, 0.08)], np.float32)
STEEL, BARK = np.array([(0.40, 0.42, 0.44), (0.33, 0.25, 0.19)], np.float32)
LEVELS = np.linspace(0, 1, 256)
_TURN = np.linspace(0, 2 * np.pi, 16, endpoint=False)
CIRCLE, SQUARE = np.stack([np.cos(_TURN), np.sin(_TURN)], 1), np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
TRIANGLE = np.array([(-1, -0.8), (1, -0.8), (0, 1)])
LAMP_RGB, SHOP_RGB, POOL_RGB, TAIL_RGB = (255, 206, 140), (110, 86, 56), (70, 52, 32), (255, 60, 40)

# name: zenith, horizon, ambient light, sun light, sun height, share of the scenes
SKIES = {
    "day": ((0.25, 0.47, 0.84), (0.72, 0.84, 0.94), (0.46, 0.51, 0.60), (0.66, 0.60, 0.48), 0.75, 0.40),
    "dusk": ((0.30, 0.32, 0.56), (0.98, 0.68, 0.44), (0.38, 0.35, 0.43), (0.72, 0.42, 0.20), 0.30, 0.22),
    "overcast": ((0.60, 0.64, 0.69), (0.83, 0.84, 0.85), (0.70, 0.72, 0.75), (0.10, 0.10, 0.09), 0.90, 0.20),
    "night": ((0.03, 0.05, 0.13), (0.20, 0.19, 0.30), (0.32, 0.33, 0.44), (0.06, 0.07, 0.12), 0.60, 0.18),
}
# length, width, belt, roof height in metres; cabin from-to at belt and roof, in lengths from the rear
CARS = (
    (4.5, 1.80, 0.92, 1.45, 0.12, 0.75, 0.27, 0.57),  # saloon
    (3.9, 1.70, 0.92, 1.50, 0.02, 0.74, 0.12, 0.54),  # hatchback
    (4.6, 1.90, 1.05, 1.75, 0.02, 0.76, 0.08, 0.58),  # off-roader
    (5.2, 2.00, 1.10, 2.25, 0.00, 0.88, 0.01, 0.72),  # van
    (5.1, 1.90, 1.05, 1.75, 0.38, 0.76, 0.42, 0.62),  # pick-up
    (9.0, 2.40, 1.20, 3.00, 0.00, 1.00, 0.00, 0.98),  # bus
)
CAR_ODDS = np.cumsum((0.26, 0.26, 0.20, 0.13, 0.08, 0.07))


Point = tuple[float, float]


@dataclass(frozen=True)
class Light:
    """Float32 RGB in 0..1; `towards` is the unit vector to the sun, `haze_m` the depth with 63 % haze."""

    zenith: np.ndarray
    horizon: np.ndarray
    ambient: np.ndarray
    sun: np.ndarray
    towards: np.ndarray
    haze_m: float
    cloud: float
    lamps: bool


@dataclass(frozen=True)
class Thing:
    """What stands on the ground: painter, place, half-axes of its footprint, height, its own dice [DICE]."""

    paint: Callable[[Stage, Thing], None]
    x: float
    z: float
    foot: Point
    height: float
    dice: np.ndarray


@lru_cache(maxsize=1)
def _tiles() -> dict[str, np.ndarray]:
    """Periodic [TILE, TILE] tiles: noise of unit variance (float32), and reliefs (uint8 around NEUTRAL)."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None]) * TILE
    frequency[0, 0] = np.inf

    def fractal(slope: float) -> np.ndarray:
        noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((TILE, TILE))) / frequency**slope)
        return (noise / noise.std()).astype(np.float32)

    def relief(noise: np.ndarray, joints: np.ndarray) -> np.ndarray:
        return np.clip(NEUTRAL + 20 * noise - joints, 20, 235).astype(np.uint8)

    row, column = np.mgrid[:TILE, :TILE]
    slabs = 52 * ((row % 64 < 4) | ((column + 32 * (row // 64 % 2)) % 64 < 4))
    bricks = 30 * ((row % 16 < 3) | ((column + 16 * (row // 16 % 2)) % 32 < 2))
    blotch, cracks = fractal(1.5), 30 * (np.abs(fractal(1.9)) < 0.012)
    return {
        "cloud": fractal(1.6),
        "leaf": fractal(1.05),
        "blotch": blotch,
        "road": relief(0.6 * fractal(0.3) + 0.7 * blotch, cracks),
        "pavement": relief(0.5 * fractal(0.4) + 0.5 * fractal(1.4), slabs),
        "grass": relief(1.1 * fractal(0.5) + 0.7 * fractal(1.4), 0 * row),
        "plaster": relief(0.35 * fractal(0.4) + 0.6 * fractal(1.5), 0 * row),
        "brick": relief(0.6 * fractal(0.4) + 0.5 * fractal(1.5), bricks),
    }


class Stage:
    """The canvas, the camera and the light.

    Brushes: `faces` paints plane shapes in space, `flat` upright shapes that face the camera, `limb` thick
    lines; each writes image [h, w, 3] and labels [h, w] under one mask. Label None keeps what is labelled.
    """

    def __init__(self, size: tuple[int, int], dice: np.ndarray, x: float, light: Light) -> None:
        height, width = self.shape = (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE)
        self.image, self.labels = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
        self.light, self.focal = light, FOCAL * height
        self.rgb = (light.ambient.tolist(), light.sun.tolist(), light.horizon.tolist())
        self.sampling = cv2.INTER_NEAREST if height <= SHARP_TILES else cv2.INTER_LINEAR
        self.vanishing = np.array([(0.38 + 0.24 * dice[0]) * width, (0.40 + 0.12 * dice[1]) * height])
        self.eye = np.array([x, 1.4 + 0.6 * dice[2], 0.0])
        self.glows: list[tuple[float, float, float, tuple[int, ...], list[int] | None]] = []

    def project(self, points: np.ndarray) -> np.ndarray:
        """World [..., 3] to canvas pixels [..., 2]."""
        scale = self.focal / np.maximum(points[..., 2:], NEAR_M)
        return self.vanishing + (points[..., :2] - self.eye[:2]) * (1, -1) * scale - 0.5

    def spot(self, x: float, y: float, z: float) -> Point:
        """One point of the world in canvas pixels."""
        scale = self.focal / z
        (across, down), (x0, y0, _) = self.vanishing, self.eye
        return (across + (x - x0) * scale - 0.5, down - (y - y0) * scale - 0.5)

    def shade(self, albedo: np.ndarray, depth: np.ndarray, lit: np.ndarray) -> np.ndarray:
        """Albedo [F, 3] or [3] at depth [F], `lit` [F] the share of sunlight: colours [F, 3] in 0..255."""
        clear = np.exp(-depth / self.light.haze_m)[:, None]
        bright = albedo * (self.light.ambient + self.light.sun * lit[:, None])
        return np.clip(255 * (bright * clear + self.light.horizon * (1 - clear)), 0, 255)

    def tone(self, albedo: np.ndarray, depth: float, lit: float) -> tuple[float, ...]:
        """The same for one albedo [3] at one depth, without the cost of small arrays."""
        clear = math.exp(-depth / self.light.haze_m)
        light = zip(albedo.tolist(), *self.rgb, strict=True)
        return tuple(min(255 * (a * (m + s * lit) * clear + h * (1 - clear)), 255) for a, m, s, h in light)

    def fill(self, polygons: np.ndarray, colour: Sequence[float], label: int | None) -> None:
        """Fill polygons [n, P, 2] in canvas pixels with one colour."""
        corners = np.rint(polygons * 2**SUBPIXEL).astype(np.int32)
        cv2.fillPoly(self.image, corners, colour, cv2.LINE_8, SUBPIXEL)
        if label is not None:
            cv2.fillPoly(self.labels, corners, label, cv2.LINE_8, SUBPIXEL)

    def faces(self, points: np.ndarray, albedo: object, label: int | None, centre: object = None) -> None:
        """Paint faces [F, P, 3] of albedo [F, 3] or [3]; with a `centre`, only those that face us."""
        (ax, ay, az), (bx, by, bz) = (points[:, 1] - points[:, 0]).T, (points[:, 2] - points[:, 1]).T
        normal = np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], 1)
        ours = ((self.eye - points[:, 0]) * normal).sum(1)  # > 0: the normal looks at us
        outward = ours if centre is None else ((points[:, 0] - centre) * normal).sum(1)
        lit = normal @ self.light.towards * np.sign(outward) / (np.sqrt((normal * normal).sum(1)) + 1e-9)
        colours = self.shade(np.asarray(albedo), points[:, 0, 2], np.maximum(lit, 0)).tolist()
        corners = np.rint(self.project(points) * 2**SUBPIXEL).astype(np.int32)
        for i in np.flatnonzero(ours * outward > 0).tolist():
            cv2.fillPoly(self.image, corners[i : i + 1], colours[i], cv2.LINE_8, SUBPIXEL)
            if label is not None:
                cv2.fillPoly(self.labels, corners[i : i + 1], label, cv2.LINE_8, SUBPIXEL)

    def flat(self, at: Point, outline: object, albedo: np.ndarray, label: int, lit: float = 0.5) -> None:
        """Paint an outline [P, 2], metres (x, y) around the place `at` (x, z), facing the camera."""
        scale = self.focal / at[1]
        points = np.asarray(outline) * (scale, -scale) + self.spot(at[0], 0.0, at[1])
        self.fill(points[None], self.tone(albedo, at[1], lit), label)

    def limb(self, at: Point, points: list, width: float, albedo: Any, label: int, lit: float = 0.5) -> None:
        """Paint a line through points of metres (x, y), `width` metres but one pixel at least."""
        scale = 2**SUBPIXEL
        ends = [[round(c * scale) for c in self.spot(at[0] + x, y, at[1])] for x, y in points]
        thick = max(SUPERSAMPLE, round(width * self.focal / at[1]))
        colour = self.tone(albedo, at[1], lit)
        for a, b in zip(ends[:-1], ends[1:], strict=True):
            cv2.line(self.image, a, b, colour, thick, cv2.LINE_8, SUBPIXEL)
            cv2.line(self.labels, a, b, label, thick, cv2.LINE_8, SUBPIXEL)

    def warp(self, quad: np.ndarray, tile: str, per_m: float, shift: np.ndarray, strength: float = 1) -> Any:
        """A tile laid on quad [4, 3] with `per_m` pixels a metre: (rows, columns), texture, mask; or None."""
        corners = self.project(quad)
        low = np.maximum(np.floor(corners.min(0)).astype(int), 0)
        high = np.minimum(np.ceil(corners.max(0)).astype(int) + 1, self.shape[::-1])
        if (high - low).min() < 2:
            return None
        across, along = (np.linalg.norm(quad[i] - quad[0]) * per_m for i in (1, 3))
        source = np.array([(0, 0), (across, 0), (across, along), (0, along)]) + shift * TILE
        corners, extent = (corners - low).astype(np.float32), tuple((high - low).tolist())
        transform = cv2.getPerspectiveTransform(source.astype(np.float32), corners)
        texture = cv2.warpPerspective(
            _tiles()[tile], transform, extent, flags=self.sampling, borderMode=cv2.BORDER_WRAP
        )
        if strength < 1:
            texture = cv2.convertScaleAbs(texture, alpha=strength, beta=NEUTRAL * (1 - strength))
        mask = np.zeros(extent[::-1], np.uint8)
        cv2.fillConvexPoly(mask, np.rint(corners * 2**SUBPIXEL).astype(np.int32), 255, cv2.LINE_8, SUBPIXEL)
        return (slice(low[1], high[1]), slice(low[0], high[0])), texture, mask

    def glow(self, at: tuple[float, ...], radius: float, colour: tuple[int, ...], pool: bool = False) -> None:
        """A lamp at (x, y, z) that shines at night, `radius` metres wide, unless it is painted over later.

        A `pool` of light on the ground shines in any case.
        """
        x, y = self.spot(*at)
        inside = 0 <= y < self.shape[0] and 0 <= x < self.shape[1]
        if self.light.lamps and (inside or pool):
            painted = None if pool else self.image[int(y), int(x)].tolist()
            self.glows.append((x, y, radius * self.focal / at[2], colour, painted))


def _parts(quad: np.ndarray, rectangles: object) -> np.ndarray:
    """The rectangles [n, 4] of (left, right, low, high), in 0..1, of quad [4, 3]: corners [n, 4, 3]."""
    rectangles = np.asarray(rectangles, float)
    s, t = rectangles[:, (0, 1, 1, 0)], rectangles[:, (2, 2, 3, 3)]
    return np.stack([(1 - s) * (1 - t), s * (1 - t), s * t, (1 - s) * t], 2) @ quad


def _upright(x0: float, z0: float, x1: float, z1: float, top: float) -> np.ndarray:
    """An upright quad [4, 3] over the ground line from (x0, z0) to (x1, z1)."""
    return np.array([(x0, 0, z0), (x1, 0, z1), (x1, top, z1), (x0, top, z0)])


def _level(x0: float, x1: float, z0: float, z1: float, y: float = 0.0) -> np.ndarray:
    """A level quad [4, 3]."""
    return np.array([(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)])


def _grey(plane: np.ndarray) -> np.ndarray:
    """A plane [h, w] as three equal channels."""
    return cv2.cvtColor(plane, cv2.COLOR_GRAY2RGB)


def _pick(table: np.ndarray, dice: float) -> np.ndarray:
    return table[int(dice * len(table))]


def _light(dice: np.ndarray) -> Light:
    names = list(SKIES)
    name = names[int(np.searchsorted(np.cumsum([SKIES[n][-1] for n in names])[:-1], dice[0]))]
    height = SKIES[name][4]
    tint = np.exp(0.12 * (dice[1:4] - 0.5)) * (0.88 + 0.24 * dice[4])
    azimuth, level = 2 * np.pi * dice[5], np.sqrt(1 - height**2)
    towards = np.array([np.sin(azimuth) * level, height, np.cos(azimuth) * level])
    cloud = 0.9 if name == "overcast" else dice[6]
    zenith, horizon, ambient, sun = (np.array(SKIES[name][:4]) * tint).astype(np.float32)
    haze_m, lamps = 60 + 240 * dice[7] ** 1.5, name in ("night", "dusk")
    return Light(zenith, horizon, ambient, sun, towards, haze_m, cloud, lamps)


def _sky(stage: Stage, dice: np.ndarray) -> None:
    """A gradient, clouds on a ceiling in perspective, the glow of the sun."""
    light, rows = stage.light, int(stage.vanishing[1]) + 2
    fall = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None] ** 1.4
    sky = np.repeat(light.zenith * (1 - fall) + light.horizon * fall, stage.shape[1], 1)
    ceiling = _level(-60, 60, 1.5, 60, stage.eye[1] + 1.6)
    (band, _), cloud, _ = stage.warp(ceiling, "cloud", 60 + 60 * dice[0], dice[1:3])
    fade = 0.55 - 0.5 * fall[band.start : band.stop, :, 0] ** 4
    cover = np.clip(fade * (cloud[: len(fade)] + np.float32(2.6 * light.cloud - 1.7)), 0, 0.92)
    cover = _grey(cover)
    bright = np.minimum(0.52 * (light.ambient + light.sun) + 0.43 * light.horizon, 1)
    part = sky[band.start : band.stop]
    part *= 1 - cover
    cover *= 1 - 0.22 * cover
    part += cover * bright
    side, up, ahead = light.towards
    if ahead > 0.3 and light.cloud < 0.85:
        x, y = stage.vanishing + stage.focal * np.array([side, -up]) / ahead
        column, row = np.arange(stage.shape[1]) - x, np.arange(rows)[:, None] - y
        distance = np.sqrt(np.float32(column**2) + np.float32(row**2)) / stage.shape[0]
        disc = _grey(np.exp(-9 * distance) * np.float32(0.8) + np.float32(distance < 0.03))
        disc *= light.sun * 1.25 + 0.25 * light.ambient
        sky += disc
    np.minimum(sky, 1, out=sky)
    stage.image[:rows] = cv2.convertScaleAbs(sky, alpha=255)


def _skyline(stage: Stage, rng: np.random.Generator) -> None:
    """What closes the street: blocks and trees so far away that they are mostly haze."""
    x, width, height, z, tone = rng.random((5, 16))
    x, z, half = 500 * (x - 0.5), 220 - 60 * np.sort(z), 6 + 15 * width
    outlines = zip(x - half, z, x + half, z, 5 + 40 * height**2.5, strict=True)
    walls = np.stack([_pick(WALLS, t) for t in tone])
    stage.faces(np.stack([_upright(*outline) for outline in outlines]), walls, BUILDING)
    for x, height, z, tone, *dice in rng.random((9, 8)):
        size = 5 + 6 * height
        _crown(stage, (240 * (x - 0.5), size / 2, 140 - 40 * z), (size, size / 2), _pick(LEAVES, tone), dice)


def _ground(stage: Stage, kerb: float, wall: float, things: list[Thing], dice: np.ndarray) -> None:
    """Lawn, pavement (out to `wall` metres) and road (to `kerb`): albedo, grain, light, shadows and haze."""
    top, far = int(stage.vanishing[1]) + 1, 3000.0
    grain = np.full(stage.shape, NEUTRAL, np.uint8)
    stage.labels[top:] = VEGETATION

    def area(
        half: float, albedo: np.ndarray, label: int, lines: list, lighter: float, per_m: float, bands: tuple
    ) -> None:
        whole = stage.project(_level(-half, half, NEAR_M, far)[None])
        stage.fill(whole, (255 * albedo).tolist(), label)
        if lines:
            stage.fill(stage.project(np.stack(lines)), np.minimum(255 * albedo * lighter, 240).tolist(), None)
        tile, wide = "grass" if label == VEGETATION else CLASSES[label], min(half, 90)
        for near, to, strength in bands:
            warped = stage.warp(_level(-wide, wide, near, to), tile, per_m, dice[4:6], strength)
            if warped is not None:
                cv2.copyTo(warped[1], warped[2], grain[warped[0]])

    asphalt = (0.28 + 0.22 * dice[2]) * np.array([1.0, 0.99 - 0.05 * dice[3], 1.04 - 0.14 * dice[3]])
    paving = (0.40 + 0.22 * dice[0]) * np.array([1.0, 0.97 - 0.08 * dice[1], 0.92 - 0.16 * dice[1]])
    zebra = 5 + 22 * dice[9] if dice[8] < 0.45 else -9
    across, along = np.arange(-kerb + 0.5, kerb - 0.7, 1.0), np.arange(1 + 4 * dice[6], 90, 6)
    stripes = [_level(x, x + 0.5, zebra, zebra + 3) for x in across if zebra > 0]
    dashes = [_level(-0.08, 0.08, z, z + 2.5) for z in along if abs(z - zebra) > 4]
    edges = [_level(s * (kerb - 0.35), s * (kerb - 0.24), NEAR_M, far) for s in (-1, 1) if dice[7] < 0.6]
    stones = [_level(s * kerb, s * (kerb + 0.22), NEAR_M, far) for s in (-1, 1)]
    area(far, 0.9 * _pick(LEAVES, 0.5 * dice[10]), VEGETATION, [], 1, 90, ((5, 26, 0.8), (26, 70, 0.3)))
    bands = ((NEAR_M, 11, 1.0), (11, 26, 0.6), (26, 70, 0.3))
    area(wall, paving, PAVEMENT, stones, 1.25, 90, bands)
    area(kerb, asphalt, ROAD, dashes + edges + stripes, 1.9, 70, bands)
    for x, z, width, length in dice[11:23].reshape(3, 4):  # mended asphalt
        x, z = 1.4 * kerb * (x - 0.6), 3 + 20 * z
        patch = _level(x, x + 0.4 + width, z, z + 1 + 4 * length)
        stage.fill(stage.project(patch[None]), (204 * asphalt).tolist(), None)

    shadow, contact = (m[top:] for m in _shadows(stage, things))
    depth = stage.focal * stage.eye[1] / (np.arange(top, stage.shape[0]) + 0.5 - stage.vanishing[1])
    clear = np.exp(-depth / stage.light.haze_m).astype(np.float32)[:, None]
    bright = _grey(1 - shadow * np.float32(0.9 / 255))
    bright *= stage.light.sun * np.float32(stage.light.towards[1])
    bright += stage.light.ambient
    bright *= _grey(grain[top:] * (1 - contact * np.float32(0.5 / 255)) * (clear / NEUTRAL))
    bright *= stage.image[top:]
    bright += 255 * stage.light.horizon * (1 - clear[..., None])
    stage.image[top:] = cv2.convertScaleAbs(bright)


def _shadows(stage: Stage, things: list[Thing]) -> tuple[np.ndarray, np.ndarray]:
    """Where things keep the sun from the ground, and where they touch it: two masks [h, w] uint8."""
    turn = np.linspace(0, 2 * np.pi, 8, endpoint=False) + np.pi / 8
    ring = np.stack([np.cos(turn), 0 * turn, np.sin(turn)], 1) * 1.08
    place = np.array([(t.x, 0, t.z) for t in things])[:, None]
    foot = place + ring * np.array([(t.foot[0], 0, t.foot[1]) for t in things])[:, None]  # [T, 8, 3]
    cast = np.array([t.height for t in things])[:, None, None] * -stage.light.towards / stage.light.towards[1]
    both = np.concatenate([foot, foot + cast * (1, 0, 1)], 1)  # [T, 16, 3]
    corners = np.clip(stage.project(both), -1e4, 1e4).astype(np.int32)
    masks = np.zeros((2, *stage.shape), np.uint8)
    for outline in corners:
        cv2.fillConvexPoly(masks[0], cv2.convexHull(outline), 255)
        cv2.fillConvexPoly(masks[1], outline[:8], 255)
    soft = max(1, stage.shape[0] // 48)
    return cv2.blur(masks[0], (2 * soft, soft)), cv2.blur(masks[1], (2 * soft, soft))


def _house(stage: Stage, thing: Thing) -> None:
    """Walls, roof, windows, and a shop or a door; dice[15] tells whether the near end stands free."""
    d, side, height = thing.dice, np.sign(thing.x), thing.height
    front, back = thing.x - side * thing.foot[0], thing.x + side * thing.foot[0]
    z0, z1 = max(thing.z - thing.foot[1], NEAR_M + 0.1), thing.z + thing.foot[1]
    albedo, trim, ridge = _pick(WALLS, d[0]) * (0.8 + 0.35 * d[1]), _pick(WALLS, d[2]), thing.x
    wall, end = _upright(front, z1, front, z0, height), _upright(front, z0, back, z0, height)
    rise = height + (3.5 if d[3] < 0.55 else 0.0)
    roof = np.array([(front, height, z1), (front, height, z0), (ridge, rise, z0), (ridge, rise, z1)])
    gable = np.array([(front, height, z0), (back, height, z0), (ridge, rise, z0), (ridge, rise, z0)])
    paints = np.stack([_pick(WALLS, d[4]) * 0.6, albedo, albedo, albedo])
    centre = (thing.x, height / 2, thing.z)
    stage.faces(np.stack([roof, end, gable, wall]), paints, BUILDING, centre)
    walls = ((wall, z1 - z0), (end, 2 * thing.foot[0]))[: 2 if d[15] else 1]
    tile, strength = "brick" if d[5] < 0.5 else "plaster", 0.99 * np.exp(-max(z0 - 4, 0) / 25)
    for quad, _ in walls if z0 < 30 else ():
        warped = stage.warp(quad, tile, 60, d[6:8], strength)
        if warped is not None:
            where, texture, mask = warped
            lit = cv2.multiply(stage.image[where], _grey(texture), scale=1 / NEUTRAL)
            cv2.copyTo(lit, mask, stage.image[where])
    _windows(stage, thing, walls, trim)
    if z0 > DETAIL_M:
        return
    ground, paint = _parts(wall, [(0.03, 0.97, 0.25 / height, 2.9 / height)])[0], _pick(PAINTS, d[10])
    if d[9] < 0.5:
        panes = [(0.02, 0.32, 0.12, 0.72), (0.36, 0.66, 0.12, 0.72), (0.7, 0.98, 0, 0.72)]
        front_parts = [(0, 1, 0, 1), *panes, (0, 1, 0.78, 1)]
        paints = np.stack([0.7 * trim, GLASS, GLASS, 0.6 * paint, paint])
        stage.faces(_parts(ground, front_parts), paints, None)
        stage.glow((front, 1.7, (z0 + z1) / 2), 2.0, SHOP_RGB)
    else:
        x = 0.1 + 0.6 * d[11]
        door = [(x, x + 0.12, 0, 0.9), (x + 0.015, x + 0.105, 0, 0.84)]
        stage.faces(_parts(ground, door), np.stack([trim, paint]), None)


def _windows(stage: Stage, house: Thing, walls: Sequence[tuple[np.ndarray, float]], trim: np.ndarray) -> None:
    """Rows of windows over the ground floor of the walls, each a quad [4, 3] and its length in metres."""
    d, light, height = house.dice, stage.light, house.height
    found: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for quad, length in walls:
        columns = max(1, int(length / (1.9 + 1.4 * d[12])))
        row, column = (i.ravel() for i in np.mgrid[1 : int(height / 3), :columns])
        s, t = (column + 0.5) / columns, (row * 3 + 1.7) / height
        wide, tall = (0.21 + 0.15 * d[13]) / columns, (0.22 + 0.12 * d[14]) * 3 / height
        for grow, rectangles in zip((1.22, 1.0), found, strict=True):
            w, h = wide * grow, tall * grow
            rectangles.append(_parts(quad, np.stack([s - w, s + w, t - h, t + h], 1)))
    frames, panes = (stage.project(np.concatenate(rectangles)) for rectangles in found)
    lamp, glint = np.random.default_rng(int(d[8] * 2**32)).random((2, len(panes)))
    near = house.z - house.foot[1] < DETAIL_M
    blinds = panes + 0.4 * (panes[:, (3, 2, 2, 3)] - panes) * np.array([1, 1, 0, 0])[:, None]
    lantern = np.array([1.0, 0.78, 0.45]) / (light.ambient + 0.25 * light.sun)
    for shapes, keep, albedo in (
        (frames, near & (lamp < 2), np.minimum(1.15 * trim, 0.9)),
        (panes, lamp < 2, GLASS + 0.22 * light.horizon),
        (panes, near & (glint < 0.35), 0.5 * GLASS + 0.5 * light.zenith),
        (panes, (lamp < 0.35) & light.lamps, lantern),
        (blinds, near & (glint > 0.8), 0.8 * trim),
    ):
        if keep.any():
            stage.fill(shapes[keep], stage.tone(albedo, house.z, 0.25), None)


def _crown(
    stage: Stage, at: tuple[float, ...], radius: Point, albedo: np.ndarray, dice: Any, cone: float = 0.0
) -> None:
    """Foliage around `at` (x, y, z): an ellipse (`cone` 0) to a cone (1), ragged, with lumps in the light."""
    (x, y), scale = stage.spot(*at), stage.focal / at[2]
    rx, ry = radius[0] * scale, radius[1] * scale
    left, top = max(0, int(x - 1.3 * rx)), max(0, int(y - 1.3 * ry))
    right, bottom = min(stage.shape[1], int(x + 1.3 * rx) + 2), min(stage.shape[0], int(y + 1.3 * ry) + 2)
    if right - left < 1 or bottom - top < 1:
        return
    u = (np.arange(left, right, dtype=np.float32) - np.float32(x)) / np.float32(rx)
    v = ((np.arange(top, bottom, dtype=np.float32) - np.float32(y)) / np.float32(ry))[:, None]

    def noise(tile: str, span: float, shift: Sequence) -> np.ndarray:
        step = span / (2 * rx)
        x0, y0 = (left - x) * step + shift[0] * TILE, (top - y) * step + shift[1] * TILE
        matrix, extent = np.array([[step, 0, x0], [0, step, y0]]), (right - left, bottom - top)
        flags = stage.sampling | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(_tiles()[tile], matrix, extent, flags=flags, borderMode=cv2.BORDER_WRAP)

    lumps, leaves = noise("blotch", 150, dice[:2]), noise("leaf", 90 + 25 * radius[0], dice[2:4])
    distance = (u / (1 - np.float32(cone) * (0.5 - 0.5 * v))) ** 2 + v * v
    mask = (distance + 0.22 * lumps + 0.16 * leaves < 0.95).view(np.uint8)
    tone = (0.5 - 0.22 * v) + np.float32(0.16 * stage.light.towards[0]) * u
    tone = cv2.convertScaleAbs(np.maximum(tone + 0.13 * lumps + 0.15 * leaves, 0), alpha=255)
    table = stage.shade(albedo * (0.35 + 1.1 * LEVELS)[:, None], np.array([at[2]]), LEVELS**1.5)
    where = slice(top, bottom), slice(left, right)
    cv2.copyTo(cv2.applyColorMap(tone, table.astype(np.uint8)[:, None]), mask, stage.image[where])
    cv2.copyTo(np.full_like(mask, VEGETATION), mask, stage.labels[where])


def _tree(stage: Stage, thing: Thing) -> None:
    d, height, z = thing.dice, thing.height, thing.z
    wide, stem, thick = thing.foot[0] * 1.25, height * (0.24 + 0.12 * d[0]), 0.05 + 0.035 * height
    bark, at, lean, tall = BARK * (0.7 + 0.7 * d[1]), (thing.x, z), 0.5 * (d[2] - 0.5), (height - stem) / 2
    for left, shade in ((-thick, 1.0), (0.2 * thick, 0.7))[: 2 if z < DETAIL_M else 1]:
        trunk = [(left, 0), (thick, 0), (lean + 0.6 * thick, stem * 1.5), (lean + 0.6 * left, stem * 1.5)]
        stage.flat(at, trunk, shade * bark, VEGETATION)
    for reach in (-0.4, 0.45) if z < DETAIL_M else ():
        branch = [(lean, stem), (lean + reach * wide, stem + 0.25 * height)]
        stage.limb(at, branch, 0.8 * thick, bark, VEGETATION, 0.3)
    leaves, cone = _pick(LEAVES, d[3] ** 1.5) * (0.8 + 0.4 * d[4]), 0.8 * (d[5] < 0.25)
    _crown(stage, (thing.x + lean, stem + tall, z), (wide, tall), leaves, d[6:10], cone)
    if not cone and z < DETAIL_M:
        top = (thing.x + lean + (d[10] - 0.5) * wide, stem + 0.8 * tall, z)
        _crown(stage, top, (0.6 * wide, 0.6 * tall), leaves, d[11:15])


def _bush(stage: Stage, thing: Thing) -> None:
    leaves = _pick(LEAVES, thing.dice[0] ** 1.5)
    for k in (-0.5, 0.5):
        at = (thing.x, thing.height * 0.42, thing.z - k * thing.foot[1])
        _crown(stage, at, (thing.foot[0], thing.height * 0.6), leaves, thing.dice[4:8] + k)


def _fence(stage: Stage, thing: Thing) -> None:
    """Planks, pickets or rails along the street, or a striped barrier across it."""
    d, height, (half, depth) = thing.dice, thing.height, thing.foot
    if half > depth:
        quad = _upright(thing.x - half, thing.z, thing.x + half, thing.z, height)
        stage.faces(_parts(quad, [(0.08, 0.13, 0, 1), (0.87, 0.92, 0, 1)]), STEEL, FENCE)
        start = np.linspace(0, 1, 8, endpoint=False)
        for low in (0.34, 0.7):
            stripes = np.stack([start, start + 0.125, 0 * start + low, 0 * start + low + 0.26], 1)
            stage.faces(_parts(quad, stripes), np.tile([PAINTS[3], PAINTS[0]], (4, 1)), FENCE)
        return
    z0, z1 = max(thing.z - depth, NEAR_M + 0.1), thing.z + depth
    quad, length, style = _upright(thing.x, z1, thing.x, z0, height), z1 - z0, int(3 * d[3])
    albedo = (_pick(PAINTS, d[0]) if d[1] < 0.5 else 1.5 * BARK) * (0.8 + 0.3 * d[2])
    start = np.linspace(0, 1, max(2, int(length / 0.3)), endpoint=False)
    wide, top, joint = ((0.26, 1.0, 0.8), (0.19, 0.97, 0.8), (0.07, 0.8, 1.1))[style]
    bars = np.stack([start, start + wide / length, 0 * start + 0.04, 0 * start + top], 1)
    rails = [(0, 1, 0, 0.96)] if style == 0 else [(0, 1, 0.30, 0.42), (0, 1, 0.74, 0.86)]
    tones = (0.85 + 0.3 * np.modf(start * 97 * d[5])[0])[:, None] * albedo
    stage.faces(_parts(quad, rails), 0.6 * albedo, FENCE)
    stage.faces(_parts(quad, bars), tones * joint, FENCE)


def _lamp(stage: Stage, thing: Thing) -> None:
    d, at, top = thing.dice, (thing.x, thing.z), thing.height
    albedo = (_pick(PAINTS, d[0]) if d[1] < 0.4 else STEEL) * (0.6 + 0.6 * d[2])
    reach = -np.sign(thing.x) * (0.8 + 1.2 * d[3])
    stage.limb(at, [(0, 0), (0, 0.9)], 0.26, 0.8 * albedo, POLE)
    stage.limb(at, [(0, 0), (0, top), (reach, top + 0.3)], 0.15, albedo, POLE)
    stage.limb(at, [(0.035, 0), (0.035, top)], 0.03, np.minimum(1.5 * albedo, 0.9), POLE, 0.9)
    stage.limb(at, [(reach, top + 0.3), (1.4 * reach, top + 0.3)], 0.17, np.full(3, 0.75), POLE)
    stage.glow((thing.x + 1.2 * reach, top + 0.3, thing.z), 1.2, LAMP_RGB)
    stage.glow((thing.x + 1.2 * reach, 0, thing.z), 3.5, POOL_RGB, pool=True)


def _sign(stage: Stage, thing: Thing) -> None:
    """Traffic lights, a direction board, or a round, square or warning sign on a post."""
    d, at, top = thing.dice, (thing.x, thing.z), thing.height
    paint, border = _pick(PAINTS, d[1]), _pick(PAINTS, d[2])
    red, white, black = np.array([0.72, 0.10, 0.10]), np.full(3, 0.88), np.full(3, 0.09)
    kind, size = int(6 * d[0]), 0.36 + 0.2 * d[3]
    stage.limb(at, [(0, 0), (0, top)], 0.1, STEEL * (0.7 + 0.6 * d[4]), POLE)

    def plate(shape: Any, half: float, albedo: Any, tall: float = 1, x: float = 0, y: float = 0) -> None:
        stage.flat(at, shape * (half, half * tall) + (x, top + y), albedo, SIGN, 0.6)

    if kind == 0:
        lamps, on = np.array([(0.95, 0.15, 0.1), (0.95, 0.6, 0.1), (0.15, 0.9, 0.4)]), int(3 * d[5])
        plate(SQUARE, 0.22, black, 2.4, y=-0.3)
        for k, lamp in enumerate(lamps):
            plate(CIRCLE, 0.13, lamp * (1.2 if k == on else 0.3), y=-0.3 * k)
        stage.glow((thing.x, top - 0.3 * on, thing.z), 0.4, tuple((255 * lamps[on]).tolist()))
    elif kind == 1:
        plate(SQUARE, 2.4 * size, white, 0.4)
        plate(SQUARE, 2.3 * size, paint, 0.37)
        for row in (-0.5, 0.0, 0.5):
            ink = white * (0.95 - 0.4 * paint)
            plate(SQUARE, size * (1.1 + 0.9 * row), ink, 0.1, -0.3 * size, size * row)
    elif kind == 2:
        plate(TRIANGLE, 1.2 * size, red)
        plate(TRIANGLE, 0.8 * size, white, y=-0.03)
        plate(SQUARE, 0.1 * size, black, 3.0, y=-0.1)
    else:
        shape = SQUARE if kind == 3 else CIRCLE
        rim, field, mark = (red, white, black) if kind == 4 else (border, paint, white)
        plate(shape, size, rim)
        plate(shape, 0.76 * size, field)
        plate(SQUARE, 0.45 * size, mark, 0.35)
        if d[6] < 0.4:
            plate(SQUARE, 0.8 * size, white, 0.5, y=-1.7 * size)


@lru_cache(maxsize=len(CARS))
def _car_model(shape: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A car of CARS in its own axes: faces [F, 12, 3] in painting order, part (0..7) and centre of each."""
    length, width, belt, top, b0, b1, r0, r1 = CARS[shape]
    faces, parts, centres = [], [], []

    def add(corners: np.ndarray, part: int, centre: float) -> None:
        for polygon in corners:
            faces.append(np.concatenate([polygon, np.repeat(polygon[-1:], 12 - len(polygon), 0)]))
            parts.append(part)
            centres.append((0, centre, ((b0 + b1) / 2 - 0.5) * length if centre == belt else 0))

    def prism(profile: Any, half: list[float]) -> tuple[np.ndarray, np.ndarray]:
        """Strips [P, 4, 3] and flanks [2, P, 3] of a profile of (lengths from the rear, metres up)."""
        (u, y), w = np.array(profile).T, np.array(half) * width / 2
        left, right = (np.stack([s * w, y, (u - 0.5) * length], 1) for s in (-1, 1))
        strips = np.stack([left, np.roll(left, -1, 0), np.roll(right, -1, 0), right], 1)
        return strips, np.stack([left, right])

    low, mid = 0.25, 0.5 * belt
    rear, nose = [(0, low), (0, 0.9 * belt), (0.04, belt)], [(0.96, 0.8 * belt), (1, 0.62 * belt), (1, low)]
    body, flanks = prism([*rear, (b1, belt), *nose], [1] * 7)
    cabin, cabin_flanks = prism([(b0, belt), (r0, top), (r1, top), (b1, belt)], [0.96, 0.8, 0.8, 0.96])
    add(body, 0, mid)
    add(flanks, 0, mid)
    add(prism([(0.02, low), (0.02, low + 0.14), (0.98, low + 0.14), (0.98, low)], [1.005] * 4)[1], 1, mid)
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    radius = 0.2 + 0.1 * belt
    for share, part in ((1.25, 1), (1.0, 2), (0.55, 3)):
        for axle in (0.19, 0.80):
            rim = radius * share * np.stack([np.cos(turn) / length, np.sin(turn)], 1) + (axle, radius)
            if part == 1:  # the wheel house ends where the body ends
                rim[:, 1] = np.maximum(rim[:, 1], low)
            add(prism(rim, [1.01] * 12)[1], part, mid)
    for end, lamp in ((body[0][[0, 3, 2, 1]], 4), (body[5][[1, 2, 3, 0]], 5)):
        add(_parts(end, [(0, 1, 0, 0.12)]), 1, mid)
        add(_parts(end, [(0.36, 0.64, 0.3, 0.5)]), 3, mid)
        add(_parts(end, [(0.03, 0.2, 0.5, 0.9), (0.8, 0.97, 0.5, 0.9)]), lamp, mid)
    add(cabin, 0, belt)
    add(cabin_flanks, 0, belt)
    for screen in (cabin[0], cabin[2]):
        add(_parts(screen, [(0.1, 0.92, 0.08, 0.92)]), 6, belt)
        add(_parts(screen, [(0.1, 0.5, 0.3, 0.75)]), 7, belt)
    for flank in cabin_flanks[:, (0, 3, 2, 1)]:
        add(_parts(flank, [(0.08, 0.47, 0.12, 0.86), (0.53, 0.93, 0.12, 0.86)]), 6, belt)
        add(_parts(flank, [(0.08, 0.47, 0.55, 0.86), (0.53, 0.93, 0.55, 0.86)]), 7, belt)
    return np.stack(faces), np.array(parts), np.array(centres)


def _car(stage: Stage, thing: Thing) -> None:
    """A car of one of the shapes in CARS; dice[1] is its heading in turns."""
    d, yaw = thing.dice, thing.dice[1] * 2 * np.pi
    shape = int(np.searchsorted(CAR_ODDS[:-1], d[0]))
    faces, parts, centres = _car_model(shape)
    turned = np.array([(np.cos(yaw), 0, -np.sin(yaw)), (0, 1, 0), (np.sin(yaw), 0, np.cos(yaw))])
    place = np.array([thing.x, 0, thing.z])
    paint, glass = _pick(PAINTS, d[2]) * (0.8 + 0.4 * d[3]), GLASS + 0.15 * stage.light.zenith
    hub, tail, head = np.full(3, 0.6), np.array([0.72, 0.1, 0.08]), np.array([0.92, 0.92, 0.85])
    glint = glass + 0.2 * stage.light.horizon * d[4]
    paints = np.stack([paint, 0.4 * paint, RUBBER, hub, tail, head, 0.75 * glass, glint])
    stage.faces(faces @ turned + place, paints[parts], CAR, centres @ turned + place)
    length, width, belt, *_ = CARS[shape]
    away = turned[2, 2] > 0
    for side in (-0.42, 0.42):
        at = np.array([side * width, 0.7 * belt, (-0.5 if away else 0.5) * length]) @ turned + place
        stage.glow(tuple(at), 0.2 if away else 0.38, TAIL_RGB if away else LAMP_RGB)


def _pedestrian(stage: Stage, thing: Thing) -> None:
    d, m, at = thing.dice, thing.height / 1.75, (thing.x, thing.z)
    coat, trousers = _pick(PAINTS, d[0]), 0.8 * _pick(PAINTS, d[1])
    bag = _pick(PAINTS, d[9]) if d[8] < 0.4 else None
    skin, hair = _pick(SKINS, d[2]), 0.45 * _pick(SKINS, d[3])
    step, swing, turn, dark = 0.30 * d[4], 0.22 * (d[5] - 0.5), np.sign(d[6] - 0.5), 0.62
    hem = 0.62 if d[7] < 0.3 else 0.84
    right = np.array([(0.2, hem), (0.17, 1.1), (0.23, 1.38), (0.1, 1.47)])
    for points, width, albedo in (  # width 0: an outline; without a paint: left out
        ([(0.05, 0.85), (step, 0.46), (0.7 * step, 0.06)], 0.15, dark * trousers),
        ([(-0.05, 0.85), (-0.8 * step, 0.46), (-1.1 * step, 0.06)], 0.16, trousers),
        ([(0.7 * step, 0.04), (0.7 * step + 0.1 * turn, 0.04)], 0.09, RUBBER),
        ([(-1.1 * step, 0.04), (-1.1 * step + 0.1 * turn, 0.04)], 0.09, RUBBER),
        ([(0.2, 1.36), (0.26, 1.1), (0.24 + swing, 0.86)], 0.11, dark * coat),
        (np.concatenate([right, right[::-1] * (-1, 1)]), 0.0, coat),
        (right * (0.9, 1), 0.0, dark * coat),
        ([(-0.21, 1.36), (-0.27, 1.1), (-0.24 - swing, 0.86)], 0.11, 0.85 * coat),
        ([(-0.24 - swing, 0.84), (-0.24 - swing, 0.82)], 0.09, skin),
        (SQUARE * (0.13, 0.15) + (-0.26, 0.66), 0.0, bag),
        ([(0, 1.45), (0, 1.56)], 0.1, 0.8 * skin),
        ([(0, 1.62), (0, 1.66)], 0.20, hair),
        ([(0.025 * turn, 1.59), (0.025 * turn, 1.62)], 0.16, skin),
    ):
        if albedo is not None and width == 0:
            stage.flat(at, np.asarray(points) * m, albedo, PEDESTRIAN)
        elif albedo is not None:
            stage.limb(at, [(x * m, y * m) for x, y in points], width * m, albedo, PEDESTRIAN)


# kind: painter, how many near and far places are tried
KINDS: dict[str, tuple[Callable[[Stage, Thing], None], int, int]] = {
    "car": (_car, 3, 8),
    "pedestrian": (_pedestrian, 2, 9),
    "tree": (_tree, 2, 6),
    "bush": (_bush, 1, 3),
    "lamp": (_lamp, 1, 5),
    "sign": (_sign, 2, 7),
    "fence": (_fence, 2, 5),
}


def _stand(kind: str, kerb: float, wall: float, eye_x: float, z: float, dice: np.ndarray) -> Thing:
    """One thing of a kind at depth z, where such things stand: cars on the road, most others beside it."""
    paint, side = KINDS[kind][0], 1.0 if dice[-1] < 0.5 else -1.0
    a, b, c = dice[-4:-1]
    if kind == "car":
        length, width, _, top, *_ = CARS[int(np.searchsorted(CAR_ODDS[:-1], dice[0]))]
        z += 2.2 * (top - 1.45)  # vans and buses keep their distance
        if a > 0.86:  # across the street
            dice[1] = 0.25 * np.sign(b - 0.5) + 0.06 * (c - 0.5)
            x = float(np.clip(eye_x + (b - 0.5) * 1.2 * z, -kerb, kerb))
            return Thing(paint, x, z + width / 2, (length / 2, width / 2), top, dice)
        dice[1] = 0.5 * (side < 0) + 0.012 * (c - 0.5)
        x = side * (kerb - 1.1 if a < 0.35 else 0.5 * kerb)  # parked, or in its lane
        return Thing(paint, x, z + length / 2, (width / 2, length / 2), top, dice)
    if kind == "pedestrian":
        x = side * (kerb + 0.5 + a * (wall - kerb - 0.6)) if b < 0.75 else (2 * c - 1) * kerb
        return Thing(paint, x, z, (0.25, 0.2), 1.5 + 0.4 * c, dice)
    if kind == "tree":
        height = 4.0 + 5.0 * b
        return Thing(paint, side * (kerb + 0.9), z, (height * (0.2 + 0.1 * c),) * 2, height, dice)
    if kind == "bush":
        return Thing(paint, side * (wall + 0.4), z, (0.8 + 0.6 * a, 1.5), 0.9 + 0.9 * b, dice)
    if kind == "fence":
        if b < BARRIERS:
            return Thing(paint, (2 * c - 1) * wall, z, (0.9 + 0.6 * a, 0.1), 1.05, dice)
        return Thing(paint, side * (wall + 0.2), z + 2, (0.05, 2.0 + 4 * c), 1.0 + 0.9 * a, dice)
    height = 4.5 + 2.0 * b if kind == "lamp" else 2.2 + 0.8 * b
    return Thing(paint, side * (kerb + 0.35 + 0.5 * a), z, (0.08, 0.08), height, dice)


def _apart(a: Thing, b: Thing) -> bool:
    """Whether two things can stand beside each other; of a tree only the trunk is in the way."""
    wide, deep = (sum(0.5 if t.paint is _tree else t.foot[axis] for t in (a, b)) for axis in (0, 1))
    return abs(a.x - b.x) > wide or abs(a.z - b.z) > deep + 0.3


def _things(preset: str, kerb: float, wall: float, eye_x: float, rng: np.random.Generator) -> list[Thing]:
    """The things of a preset, far to near, none standing in another."""
    things: list[Thing] = []
    for low, high in [NEAR_RANGE_M] * (preset != "small") + [FAR_RANGE_M] * (preset != "large"):
        for kind, (_, near, far) in KINDS.items():
            for dice in rng.random((near if low < FAR_RANGE_M[0] else far, DICE)):
                new = _stand(kind, kerb, wall, eye_x, low * (high / low) ** dice[-5], dice)
                if dice[-6] < 0.85 and all(_apart(new, other) for other in things):
                    things.append(new)
    # a long fence stands behind all that is beside it
    return sorted(things, key=lambda thing: -thing.z - thing.foot[1] * (thing.paint is _fence))


def _houses(wall: float, rng: np.random.Generator) -> list[Thing]:
    """Both rows of houses, far to near, with gaps where trees stand on the lawn."""
    things = []
    for side in (-1, 1):
        z, storeys, free = 3 * rng.random() - 2, 2 + 4 * rng.random(), False
        for dice in rng.random((8, DICE)):
            length = 8 + 11 * dice[-1]
            for k in range(2 if dice[-3] < 0.24 else 0):
                tall, x = 4 + 6 * dice[-6 - k], side * (wall + 3 + 9 * dice[-10 - k])
                foot = (0.25 * tall, 0.25 * tall)
                things.append(Thing(_tree, x, z + length * (k + 0.5) / 2, foot, tall, np.roll(dice, k)))
            if dice[-3] >= 0.24:
                height, dice[15] = 3 * max(2, round(storeys + 3 * dice[-4] - 1.5)) + 0.6, free
                x = side * (wall + 5.8 + 2 * dice[-2])
                things.append(Thing(_house, x, z + length / 2, (5.0, length / 2), height, dice))
            free, z = dice[-3] < 0.24, z + length
    return sorted(things, key=lambda thing: -thing.z)


def _finish(stage: Stage, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Canvas to picture: average down, let the lamps glow, then the lens and the sensor."""
    image = cv2.resize(stage.image, size[::-1], interpolation=cv2.INTER_AREA).astype(np.float32)
    dice = rng.random(4).astype(np.float32)
    strength = 1 - 0.6 * min(1.0, float(stage.light.horizon.max()))  # lamps pale before a bright sky
    for x, y, radius, colour, painted in stage.glows:
        if painted is None or stage.image[int(y), int(x)].tolist() == painted:
            x, y, radius = x / SUPERSAMPLE, y / SUPERSAMPLE, radius / SUPERSAMPLE
            power, radius = strength * min(1.0, 0.25 + 0.5 * radius), max(radius, 0.7)
            falls, spans = [], []
            for centre, count in ((y, size[0]), (x, size[1])):
                spans.append(slice(max(0, int(centre - 3 * radius)), max(0, int(centre + 3 * radius) + 2)))
                falls.append(np.exp(-np.abs((np.arange(count)[spans[-1]] - centre) / radius) ** 1.3))
            image[tuple(spans)] += np.outer(*falls)[..., None] * (power * np.array(colour, np.float32))
    drift = cv2.resize(_tiles()["blotch"][: TILE // 2], size[::-1])
    v, u = (np.linspace(-1, 1, count, dtype=np.float32) for count in size)
    v = v[:, None]
    image *= ((1.06 - 0.13 * (u * u + v * v)) * (1 + 0.05 * drift))[..., None]
    image *= 0.94 + 0.12 * dice[:3]
    noise = rng.standard_normal((*size, 3), dtype=np.float32)
    noise *= 2 + 6 * dice[3]
    image += noise
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def draw_scene(
    seed: int, index: int, size: tuple[int, int] = (128, 256), preset: str = "mixed"
) -> tuple[np.ndarray, np.ndarray]:
    """One picture of the street world, the same for the same arguments.

    seed, index: the world and the picture in it, not negative. size: (height, width) in pixels, each >= 32.
    preset: "large" has a few near things that fill up to half of the picture, "small" many far ones from a
    few pixels on, "mixed" both; light, paints and textures are drawn alike in all three.
    Returns image uint8 [H, W, 3] (RGB) and labels uint8 [H, W], indices into CLASSES.
    Raises ValueError for an unknown preset, a size under 32 and a negative seed or index.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    if len(size) != 2 or min(size) < MIN_SIZE:
        raise ValueError(f"size {size} is too small: give (height, width) of at least {MIN_SIZE} pixels each")
    if seed < 0 or index < 0:
        raise ValueError(f"seed {seed} and index {index} must not be negative: count from 0")
    size = (int(size[0]), int(size[1]))
    rng = np.random.default_rng([seed, index, PRESETS.index(preset)])
    light, camera, u = _light(rng.random(8)), rng.random(4), rng.random(2)
    kerb = 3.2 + 1.8 * u[0]
    wall = kerb + 2.0 + 1.6 * u[1]
    stage = Stage(size, camera, 0.85 * kerb * (2 * camera[3] - 1), light)
    houses, things = _houses(wall, rng), _things(preset, kerb, wall, stage.eye[0], rng)
    _sky(stage, rng.random(3))
    _ground(stage, kerb, wall, houses + things, rng.random(23))
    _skyline(stage, rng)
    for thing in houses + things:
        if thing.z + thing.foot[1] > NEAR_M + 1:
            thing.paint(stage, thing)
    return _finish(stage, size, rng), stage.labels[::SUPERSAMPLE, ::SUPERSAMPLE].copy()
