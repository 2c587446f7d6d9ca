"""A procedural street: pictures with exact labels that need no download.

Every picture is a small 3-D world seen through a pinhole camera. It is painted from far to near on a canvas of twice
the asked size; image and labels are painted by the same shapes, and only the image is averaged down. All random
numbers are drawn in metres and fractions, in an order that no pixel count changes, so a scene keeps its composition
at every size. What is painted depends on colour *and* light, texture, haze and occlusion: walls, cars and clothes
share their colours, road and pavement share theirs, and a lawn is as green as a hedge or a fence.

Shapes: H, W picture; h, w = 2H, 2W canvas; F faces of P corners; n rectangles; T things; K = len(CLASSES).
World axes: x to the right, y up from the ground, z forward from the camera, all in metres.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

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
NEAR_RANGE_M, FAR_RANGE_M = (3.4, 8.5), (15.0, 75.0)  # where near and far things stand, log-uniform
DICE = 32  # uniform numbers that each thing owns

WALLS = np.array([(0.55, 0.30, 0.24), (0.78, 0.68, 0.50), (0.85, 0.80, 0.70), (0.52, 0.53, 0.55), (0.42, 0.50, 0.58),
                  (0.48, 0.55, 0.42), (0.76, 0.55, 0.32), (0.86, 0.86, 0.84), (0.40, 0.31, 0.26), (0.66, 0.46, 0.42)],
                 np.float32)  # fmt: skip
PAINTS = np.array([(0.88, 0.88, 0.86), (0.10, 0.10, 0.12), (0.58, 0.60, 0.62), (0.66, 0.13, 0.12), (0.15, 0.27, 0.52),
                   (0.22, 0.36, 0.25), (0.80, 0.62, 0.20), (0.36, 0.37, 0.39), (0.72, 0.62, 0.48),
                   (0.35, 0.55, 0.68), (0.48, 0.28, 0.22), (0.55, 0.36, 0.50)], np.float32)  # fmt: skip
LEAVES = np.array([(0.30, 0.46, 0.16), (0.22, 0.38, 0.18), (0.42, 0.48, 0.18), (0.68, 0.42, 0.14), (0.52, 0.22, 0.16),
                   (0.34, 0.44, 0.26)], np.float32)  # fmt: skip
SKINS = np.array([(0.86, 0.68, 0.56), (0.70, 0.50, 0.38), (0.46, 0.31, 0.23)], np.float32)
GLASS, RUBBER, STEEL, BARK = (np.array(c, np.float32) for c in
                              ((0.20, 0.24, 0.29), (0.07, 0.07, 0.08), (0.40, 0.42, 0.44), (0.33, 0.25, 0.19)))
LAMP_RGB, TAIL_RGB = (255, 206, 140), (255, 60, 40)

# name: zenith, horizon, ambient light, sun light, sun height, share of the scenes
SKIES = {
    "day": ((0.25, 0.47, 0.84), (0.72, 0.84, 0.94), (0.46, 0.51, 0.60), (0.66, 0.60, 0.48), 0.75, 0.40),
    "dusk": ((0.30, 0.32, 0.56), (0.98, 0.68, 0.44), (0.38, 0.35, 0.43), (0.72, 0.42, 0.20), 0.30, 0.22),
    "overcast": ((0.60, 0.64, 0.69), (0.83, 0.84, 0.85), (0.70, 0.72, 0.75), (0.10, 0.10, 0.09), 0.90, 0.20),
    "night": ((0.03, 0.05, 0.13), (0.19, 0.18, 0.28), (0.22, 0.24, 0.35), (0.05, 0.06, 0.10), 0.60, 0.18),
}
# length, width, belt and roof height in metres; cabin from-to at the belt and at the roof, from the rear, in lengths
CARS = (
    (4.5, 1.80, 0.92, 1.45, 0.12, 0.75, 0.27, 0.57),  # saloon
    (3.9, 1.70, 0.92, 1.50, 0.02, 0.74, 0.12, 0.54),  # hatchback
    (4.6, 1.90, 1.05, 1.75, 0.02, 0.76, 0.08, 0.58),  # off-roader
    (5.2, 2.00, 1.10, 2.25, 0.00, 0.88, 0.01, 0.72),  # van
    (5.1, 1.90, 1.05, 1.75, 0.38, 0.76, 0.42, 0.62),  # pick-up
    (9.0, 2.40, 1.20, 3.00, 0.00, 1.00, 0.00, 0.98),  # bus
)
CAR_ODDS = np.cumsum((0.26, 0.26, 0.20, 0.13, 0.08, 0.07))


@dataclass(frozen=True)
class Light:
    """The light of a scene: colours in 0..1, `towards` the unit vector to the sun, `haze_m` the depth of 63 % haze."""

    zenith: np.ndarray
    horizon: np.ndarray
    ambient: np.ndarray
    sun: np.ndarray
    towards: np.ndarray
    haze_m: float
    cloud: float
    lamps: bool


@dataclass(frozen=True)
class Street:
    """Half the road's width, and the distance of kerb and building line from its middle, in metres."""

    road_m: float
    pavement_m: float
    line_m: float


@dataclass(frozen=True)
class Thing:
    """Something that stands on the ground: its painter, place, footprint half-axes, height, and its own dice."""

    paint: object
    x: float
    z: float
    foot: tuple[float, float]
    height: float
    dice: np.ndarray


@lru_cache(maxsize=1)
def _tiles() -> dict[str, np.ndarray]:
    """Periodic noise, unit variance, [TILE, TILE] float32; and relief tiles, uint8 around NEUTRAL."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None]) * TILE
    frequency[0, 0] = np.inf

    def fractal(slope: float) -> np.ndarray:
        noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((TILE, TILE))) / frequency**slope)
        return (noise / noise.std()).astype(np.float32)

    def relief(noise: np.ndarray, joints: np.ndarray | float = 0.0) -> np.ndarray:
        return np.clip(NEUTRAL + 20 * noise - joints, 20, 235).astype(np.uint8)

    row, column = np.mgrid[:TILE, :TILE]
    slab = 52 * ((row % 64 < 4) | ((column + 32 * (row // 64 % 2)) % 64 < 4))
    brick = 30 * ((row % 16 < 3) | ((column + 16 * (row // 16 % 2)) % 32 < 2))
    blotch = fractal(1.5)
    return {"cloud": fractal(1.6), "leaf": fractal(1.05), "blotch": blotch,
            "road": relief(0.6 * fractal(0.3) + 0.7 * blotch, 30 * (np.abs(fractal(1.9)) < 0.012)),
            "pavement": relief(0.5 * fractal(0.4) + 0.5 * fractal(1.4), slab),
            "grass": relief(1.1 * fractal(0.5) + 0.7 * fractal(1.4)),
            "plaster": relief(0.35 * fractal(0.4) + 0.6 * fractal(1.5)),
            "brick": relief(0.6 * fractal(0.4) + 0.5 * fractal(1.5), brick)}  # fmt: skip


class Stage:
    """The canvas, the camera and the light: everything that is painted goes through its four brushes.

    `faces` paints plane shapes in space, `flat` upright shapes that face the camera, `limb` thick lines, `relief`
    lays a texture on a plane. Each writes image [h, w, 3] and labels [h, w] under the same mask.
    """

    def __init__(self, size: tuple[int, int], camera: np.ndarray, x: float, light: Light) -> None:
        self.shape = (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE)
        self.image = np.zeros((*self.shape, 3), np.uint8)
        self.labels = np.zeros(self.shape, np.uint8)
        self.light = light
        self.focal = FOCAL * self.shape[0]
        self.vanishing = np.array([(0.38 + 0.24 * camera[0]) * self.shape[1], (0.40 + 0.12 * camera[1]) * self.shape[0]])
        self.eye = np.array([x, 1.4 + 0.6 * camera[2], 0.0])
        self.glows: list[tuple[float, float, float, tuple[int, int, int]]] = []

    def project(self, points: np.ndarray) -> np.ndarray:
        """World [..., 3] to canvas pixels [..., 2]."""
        scale = self.focal / np.maximum(points[..., 2:], NEAR_M)
        return self.vanishing + (points[..., :2] - self.eye[:2]) * (1, -1) * scale - 0.5

    def colour(self, albedo: np.ndarray, depth: np.ndarray | float, lit: np.ndarray | float) -> np.ndarray:
        """Albedo [..., 3] under the light (`lit`: share of the sun's light) and behind the haze, 0..255."""
        depth, lit = np.asarray(depth)[..., None], np.asarray(lit)[..., None]
        clear = np.exp(-depth / self.light.haze_m)
        bright = albedo * (self.light.ambient + self.light.sun * lit)
        return np.clip(255 * (bright * clear + self.light.horizon * (1 - clear)), 0, 255)

    def fill(self, polygons: list[np.ndarray], colour: np.ndarray, label: int | None) -> None:
        """Fill polygons in canvas pixels, each [P, 2]; no label: paint on what is already labelled."""
        corners = [np.rint(p * 2**SUBPIXEL).astype(np.int32) for p in polygons]
        cv2.fillPoly(self.image, corners, np.asarray(colour).tolist(), cv2.LINE_8, SUBPIXEL)
        if label is not None:
            cv2.fillPoly(self.labels, corners, label, cv2.LINE_8, SUBPIXEL)

    def faces(self, points: np.ndarray, albedo: np.ndarray, label: int | None, centre: np.ndarray | None = None) -> None:
        """Paint faces [F, P, 3] of albedo [F, 3] or [3], in order; with a `centre`, only those that look at us."""
        (ax, ay, az), (bx, by, bz) = (points[:, 1] - points[:, 0]).T, (points[:, 2] - points[:, 1]).T
        normal = np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], 1)
        normal /= np.sqrt((normal**2).sum(1, keepdims=True)) + 1e-9
        middle = points.mean(1)
        outside = self.eye - middle if centre is None else middle - centre
        normal *= np.sign((normal * outside).sum(1, keepdims=True))
        seen = (normal * (self.eye - middle)).sum(1) > 0
        colours = self.colour(albedo, middle[:, 2], np.maximum(normal @ self.light.towards, 0)).tolist()
        corners = np.rint(self.project(points) * 2**SUBPIXEL).astype(np.int32)
        for i in np.flatnonzero(seen):
            cv2.fillPoly(self.image, corners[i : i + 1], colours[i], cv2.LINE_8, SUBPIXEL)
            if label is not None:
                cv2.fillPoly(self.labels, corners[i : i + 1], label, cv2.LINE_8, SUBPIXEL)

    def flat(self, at: tuple[float, float], outline: object, albedo: np.ndarray, label: int, lit: float = 0.5) -> None:
        """Paint an outline [P, 2] of metres (x, y) around the place `at` (x, z), facing the camera."""
        outline = np.asarray(outline, float)
        points = np.column_stack([outline[:, 0] + at[0], outline[:, 1], np.full(len(outline), at[1])])
        self.fill([self.project(points)], self.colour(albedo, at[1], lit), label)

    def limb(self, at: tuple[float, float], a: tuple, b: tuple, width: float, albedo: np.ndarray, label: int,
             lit: float = 0.5) -> None:  # fmt: skip
        """Paint a line of metres (x, y) with round ends, `width` metres and at least one picture pixel thick."""
        ends = self.project(np.array([(at[0] + a[0], a[1], at[1]), (at[0] + b[0], b[1], at[1])]))
        ends = np.rint(ends * 2**SUBPIXEL).astype(int).tolist()
        thick = max(SUPERSAMPLE, round(width * self.focal / at[1]))
        colour = self.colour(albedo, at[1], lit).tolist()
        cv2.line(self.image, *ends, colour, thick, cv2.LINE_8, SUBPIXEL)
        cv2.line(self.labels, *ends, label, thick, cv2.LINE_8, SUBPIXEL)

    def warp(self, quad: np.ndarray, tile: np.ndarray, per_m: float, shift: np.ndarray) -> tuple | None:
        """The tile laid on the plane of quad [4, 3], `per_m` tile pixels a metre: (rows, columns), texture, mask."""
        corners = self.project(quad).astype(np.float32)
        low = np.maximum(np.floor(corners.min(0)).astype(int), 0)
        high = np.minimum(np.ceil(corners.max(0)).astype(int) + 1, self.shape[::-1])
        if (high - low).min() < 2:
            return None
        across, along = (np.linalg.norm(quad[i] - quad[0]) * per_m for i in (1, 3))
        source = np.array([(0, 0), (across, 0), (across, along), (0, along)]) + shift * TILE
        transform = cv2.getPerspectiveTransform(source.astype(np.float32), corners - low.astype(np.float32))
        extent = tuple((high - low).tolist())
        texture = cv2.warpPerspective(tile, transform, extent, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        mask = np.zeros(extent[::-1], np.uint8)
        cv2.fillConvexPoly(mask, np.rint((corners - low) * 2**SUBPIXEL).astype(np.int32), 255, cv2.LINE_8, SUBPIXEL)
        return (slice(low[1], high[1]), slice(low[0], high[0])), texture, mask

    def relief(self, quad: np.ndarray, tile: str, per_m: float, shift: np.ndarray, strength: float) -> None:
        """Lighten and darken what is painted on quad [4, 3] by a relief tile."""
        warped = self.warp(quad, _tiles()[tile], per_m, shift)
        if warped is not None:
            where, texture, mask = warped
            texture = cv2.convertScaleAbs(texture, alpha=strength, beta=NEUTRAL * (1 - strength))
            texture = cv2.cvtColor(texture, cv2.COLOR_GRAY2RGB)
            cv2.copyTo(cv2.multiply(self.image[where], texture, scale=1 / NEUTRAL), mask, self.image[where])

    def glow(self, at: tuple[float, float, float], radius: float, colour: tuple[int, int, int]) -> None:
        """A light that shines at night, `radius` metres."""
        if self.light.lamps:
            x, y = self.project(np.array(at))
            self.glows.append((x, y, radius * self.focal / at[2], colour))


def _patches(quad: np.ndarray, s0: object, s1: object, t0: object, t1: object) -> np.ndarray:
    """The rectangles [s0, s1] x [t0, t1] (numbers or [n], in 0..1) of quad [4, 3]: [n, 4, 3]."""
    s0, s1, t0, t1 = np.broadcast_arrays(*np.atleast_1d(s0, s1, t0, t1))
    s, t = np.stack([s0, s1, s1, s0], 1)[..., None], np.stack([t0, t0, t1, t1], 1)[..., None]
    return (quad[0] * (1 - s) + quad[1] * s) * (1 - t) + (quad[3] * (1 - s) + quad[2] * s) * t


def _upright(x0: float, z0: float, x1: float, z1: float, bottom: float, top: float) -> np.ndarray:
    """An upright quad [4, 3] over the ground line from (x0, z0) to (x1, z1)."""
    return np.array([(x0, bottom, z0), (x1, bottom, z1), (x1, top, z1), (x0, top, z0)])


def _level(x0: float, x1: float, z0: float, z1: float, y: float = 0.0) -> np.ndarray:
    """A level quad [4, 3]."""
    return np.array([(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)])


def _pick(table: np.ndarray, dice: float) -> np.ndarray:
    return table[int(dice * len(table))]


def _light(dice: np.ndarray) -> Light:
    names = list(SKIES)
    name = names[int(np.searchsorted(np.cumsum([SKIES[n][-1] for n in names])[:-1], dice[0]))]
    *colours, height, _ = SKIES[name]
    tint = np.exp(0.16 * (dice[1:4] - 0.5)) * (0.85 + 0.3 * dice[4])
    zenith, horizon, ambient, sun = (np.array(c) * tint for c in colours)
    azimuth = 2 * np.pi * dice[5]
    level = np.sqrt(1 - height**2)
    towards = np.array([np.sin(azimuth) * level, height, np.cos(azimuth) * level])
    cloud = 0.9 if name == "overcast" else dice[6]
    return Light(zenith, horizon, ambient, sun, towards, 60 + 240 * dice[7] ** 1.5, cloud, name in ("night", "dusk"))


def _sky(stage: Stage, dice: np.ndarray) -> None:
    light, rows = stage.light, int(stage.vanishing[1]) + 2
    fall = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None] ** 1.4
    sky = np.broadcast_to(light.zenith * (1 - fall) + light.horizon * fall, (rows, stage.shape[1], 3)).astype(np.float32)
    bright = light.ambient + light.sun
    ceiling = _level(-60, 60, 1.5, 60, stage.eye[1] + 1.6)
    (where, cloud, _) = stage.warp(ceiling, _tiles()["cloud"], 60 + 60 * dice[0], dice[1:3])
    cover = np.clip(0.55 * (cloud + 2.6 * light.cloud - 1.7), 0, 0.92)[..., None]
    part = sky[where[0].start : min(where[0].stop, rows), where[1]]
    cover = cover[: len(part)] * (1 - 0.8 * fall[where[0].start : where[0].start + len(part)] ** 4)
    tone = (0.95 - 0.22 * cover) * np.minimum(0.55 * bright + 0.45 * light.horizon, 1.05)
    part += cover * (tone - part)
    ahead, side, up = light.towards[2], light.towards[0], light.towards[1]
    if ahead > 0.3 and light.cloud < 0.85:
        x, y = stage.vanishing + stage.focal * np.array([side, -up]) / ahead
        column, row = np.arange(stage.shape[1], dtype=np.float32), np.arange(rows, dtype=np.float32)
        distance = np.hypot((column - x)[None], (row - y)[:, None]) / stage.shape[0]
        sky += (np.exp(-9 * distance) * 0.8 + (distance < 0.03))[..., None] * (light.sun + 0.25 * bright)
    stage.image[:rows] = np.clip(255 * sky, 0, 255)


def _skyline(stage: Stage, rng: np.random.Generator) -> None:
    """What closes the street: blocks and trees so far away that they are mostly haze."""
    for x, width, height, z, tone in rng.random((18, 5)):
        x, z, width = 500 * (x - 0.5), 230 - 70 * z, 12 + 30 * width
        block = _upright(x - width / 2, z, x + width / 2, z, 0, 5 + 40 * height**2.5)
        stage.faces(block[None], _pick(WALLS, tone), BUILDING)
    for x, height, z, tone, *dice in rng.random((14, 8)):
        height = 5 + 6 * height
        _crown(stage, (260 * (x - 0.5), height / 2, 140 - 40 * z), (height, height / 2), _pick(LEAVES, tone), dice)


def _ground(stage: Stage, street: Street, things: list[Thing], dice: np.ndarray) -> None:
    """Lawn, pavement and road with their textures and markings, then the light and the shadows of the things."""
    top, far = int(stage.vanishing[1]) + 1, 3000.0
    paving = (0.40 + 0.22 * dice[0]) * np.array([1.0, 0.97 - 0.08 * dice[1], 0.92 - 0.16 * dice[1]])
    asphalt = (0.28 + 0.22 * dice[2]) * np.array([1.0, 0.99 - 0.05 * dice[3], 1.04 - 0.14 * dice[3]])

    def area(half: float, albedo: np.ndarray, label: int, painted: list[np.ndarray], lighter: float, tile: str,
             per_m: float) -> None:  # fmt: skip
        stage.fill([stage.project(_level(-half, half, NEAR_M, far))], 255 * albedo, label)
        for quad in painted:
            stage.fill([stage.project(quad)], np.minimum(255 * albedo * lighter, 240), None)
        for near, to, strength in ((NEAR_M, 11, 1.0), (11, 26, 0.6), (26, 70, 0.3)):
            stage.relief(_level(-half, half, near, to), tile, per_m, dice[4:6], strength)

    r, p = street.road_m, street.pavement_m
    dashes = [_level(-0.08, 0.08, z, z + 2.5) for z in np.arange(1.0 + 4 * dice[6], 90, 6.0)]
    edges = [_level(s * (r - 0.35) - 0.06, s * (r - 0.35) + 0.06, NEAR_M, far) for s in (-1, 1)] if dice[7] < 0.6 else []
    zebra = 5 + 22 * dice[9]
    stripes = [_level(x, x + 0.5, zebra, zebra + 3) for x in np.arange(-r + 0.5, r - 0.7, 1.0)] if dice[8] < 0.45 else []
    dashes = [d for d in dashes if not stripes or abs(d[0, 2] - zebra) > 4]
    kerbs = [_level(s * r, s * (r + 0.22), NEAR_M, far) for s in (-1, 1)]
    area(far, 0.9 * _pick(LEAVES, 0.5 * dice[10]), VEGETATION, [], 1.0, "grass", 90)
    area(p, paving, PAVEMENT, kerbs, 1.25, "pavement", 90)
    area(r, asphalt, ROAD, dashes + edges + stripes, 1.9, "road", 70)
    for x, z, width, length in dice[11:23].reshape(3, 4):  # mended asphalt
        x, z = 1.4 * r * (x - 0.6), 3 + 20 * z
        stage.fill([stage.project(_level(x, x + 0.4 + width, z, z + 1 + 4 * length))], 255 * 0.8 * asphalt, None)

    shadow, contact = _shadows(stage, things)
    depth = stage.focal * stage.eye[1] / (np.arange(top, stage.shape[0]) + 0.5 - stage.vanishing[1])
    clear = np.exp(-depth / stage.light.haze_m).astype(np.float32)[:, None, None]
    sun = (stage.light.sun * stage.light.towards[1]).astype(np.float32)
    light = (stage.light.ambient.astype(np.float32) + sun * shadow[top:, :, None]) * contact[top:, :, None]
    lit = stage.image[top:] * light * clear + (255 * stage.light.horizon).astype(np.float32) * (1 - clear)
    stage.image[top:] = np.minimum(lit, 255)


def _shadows(stage: Stage, things: list[Thing]) -> tuple[np.ndarray, np.ndarray]:
    """How much of the sun, and of all light, reaches the ground: two [h, w] float32 in 0..1."""
    turn = np.linspace(0, 2 * np.pi, 8, endpoint=False) + np.pi / 8
    ring = np.stack([np.cos(turn), np.zeros(8), np.sin(turn)], 1) * 1.08
    foot = np.array([(t.x, 0, t.z) for t in things])[:, None] + ring * np.array([(t.foot[0], 0, t.foot[1]) for t in things])[:, None]
    cast = -stage.light.towards / stage.light.towards[1] * np.array([t.height for t in things])[:, None]
    thrown = foot + (cast * (1, 0, 1))[:, None]
    masks = np.zeros((2, *stage.shape), np.uint8)
    for base, whole in zip(stage.project(foot), stage.project(np.concatenate([foot, thrown], 1)), strict=True):
        for mask, corners in ((masks[0], whole), (masks[1], base)):
            hull = cv2.convexHull(corners.astype(np.float32))
            cv2.fillConvexPoly(mask, np.rint(hull).astype(np.int32), 255)
    soft = max(1, stage.shape[0] // 48)
    shadow, contact = (cv2.blur(m, (2 * soft, soft)).astype(np.float32) / 255 for m in masks)
    return 1 - 0.9 * shadow, 1 - 0.5 * contact


def _house(stage: Stage, thing: Thing) -> None:
    """A house beside the street: walls, roof, rows of windows, and a shop or doors at the ground floor."""
    d, side, height = thing.dice, np.sign(thing.x), thing.height
    front, back = thing.x - side * thing.foot[0], thing.x + side * thing.foot[0]
    z0, z1 = max(thing.z - thing.foot[1], NEAR_M + 0.1), thing.z + thing.foot[1]
    albedo, trim = _pick(WALLS, d[0]) * (0.8 + 0.35 * d[1]), _pick(WALLS, d[2])
    wall, gable_wall = _upright(front, z1, front, z0, 0, height), _upright(front, z0, back, z0, 0, height)
    ridge, rise = (front + back) / 2, height + (3.5 if d[3] < 0.55 else 0.0)
    roof = np.array([(front, height, z1), (front, height, z0), (ridge, rise, z0), (ridge, rise, z1)])
    gable = np.array([(front, height, z0), (back, height, z0), (ridge, rise, z0), (ridge, rise, z0)])
    centre = np.array([thing.x, height / 2, thing.z])
    solid = np.stack([roof, gable_wall, gable, wall])
    stage.faces(solid, np.stack([_pick(WALLS, d[4]) * 0.6, albedo, albedo, albedo]), BUILDING, centre)
    tile = "brick" if d[5] < 0.5 else "plaster"
    for quad in (gable_wall, wall):
        stage.relief(quad, tile, 60, d[6:8], np.exp(-max(z0 - 4, 0) / 30))
    rng = np.random.default_rng(int(d[8] * 2**32))
    for quad, length in ((gable_wall, 2 * thing.foot[0]), (wall, z1 - z0)):
        _windows(stage, quad, length, height, thing, trim, rng)
    shop = _patches(wall, 0.03, 0.97, 0.25 / height, 2.9 / height)[0]
    if d[9] < 0.5:
        paint = _pick(PAINTS, d[10])
        parts = _patches(shop, [0, 0.02, 0.36, 0.70, 0], [1, 0.32, 0.66, 0.98, 1], [0, 0.12, 0.12, 0, 0.78], [1, 0.72, 0.72, 0.72, 1])
        stage.faces(parts, np.stack([0.7 * trim, GLASS, GLASS, 0.6 * paint, paint]), None)
        if stage.light.lamps:
            stage.glow((front, 1.7, (z0 + z1) / 2), 2.0, LAMP_RGB)
    else:
        door = 0.1 + 0.6 * d[11]
        stage.faces(_patches(shop, [door, door + 0.015], [door + 0.12, door + 0.105], 0, [0.9, 0.84]), np.stack([trim, _pick(PAINTS, d[10])]), None)


def _windows(stage: Stage, quad: np.ndarray, length: float, height: float, house: Thing, trim: np.ndarray,
             rng: np.random.Generator) -> None:  # fmt: skip
    d, storeys, columns = house.dice, int(height / 3), max(1, int(length / (1.9 + 1.4 * house.dice[12])))
    row, column = (i.ravel() for i in np.mgrid[1:storeys, :columns])
    lamp, glint = rng.random((2, len(row)))
    if not len(row):
        return
    wide, tall = (0.42 + 0.3 * d[13]) / columns, (0.45 + 0.25 * d[14]) * 3 / height
    s, t = (column + 0.5) / columns, (row * 3 + 1.7) / height
    depth = float(quad[:, 2].mean())
    lit = 0.25 * np.ones(1)

    def panes(keep: np.ndarray, grow: float, rgb: np.ndarray, up: float = 1.0) -> None:
        parts = _patches(quad, s - wide * grow / 2, s + wide * grow / 2, t - tall * grow / 2, t + tall * grow * (up - 0.5))[keep]
        if len(parts):
            stage.fill(list(stage.project(parts)), stage.colour(rgb, depth, lit)[0], None)

    bands = _patches(quad, 0, 1, np.arange(1, storeys + 1) * 3 / height - 0.035, np.arange(1, storeys + 1) * 3 / height)
    if d[15] < 0.5:
        stage.faces(bands, 0.85 * trim, None)
    panes(lamp >= 0, 1.22, np.minimum(1.15 * trim, 0.9))
    panes(lamp >= 0, 1.0, GLASS + 0.22 * stage.light.horizon)
    panes(glint < 0.35, 1.0, 0.5 * GLASS + 0.5 * stage.light.zenith)
    panes((glint > 0.4) & (glint < 0.6), 1.0, 0.8 * trim, 0.75)  # blinds
    if stage.light.lamps:
        panes(lamp < 0.35, 1.0, np.array([1.0, 0.78, 0.45]) / (stage.light.ambient + 0.25 * stage.light.sun))


def _crown(stage: Stage, at: tuple[float, float, float], radius: tuple[float, float], albedo: np.ndarray, dice: object,
           cone: float = 0.0) -> None:  # fmt: skip
    """Foliage around `at` (x, y, z): an ellipse (`cone` 0) to a cone (1) with a ragged edge and lit lumps of leaves."""
    (x, y), scale = stage.project(np.array(at)), stage.focal / at[2]
    rx, ry = radius[0] * scale, radius[1] * scale
    left, top = max(0, int(x - 1.3 * rx)), max(0, int(y - 1.3 * ry))
    right, bottom = min(stage.shape[1], int(x + 1.3 * rx) + 2), min(stage.shape[0], int(y + 1.3 * ry) + 2)
    if right - left < 1 or bottom - top < 1:
        return
    u = ((np.arange(left, right, dtype=np.float32) - x) / rx)[None]
    v = ((np.arange(top, bottom, dtype=np.float32) - y) / ry)[:, None]

    def noise(tile: str, span: float, k: int) -> np.ndarray:
        step = span / (2 * rx)
        matrix = np.array([[step, 0, (left - x) * step + dice[k] * TILE], [0, step, (top - y) * step + dice[k + 1] * TILE]])
        return cv2.warpAffine(_tiles()[tile], matrix, (right - left, bottom - top),
                              flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_WRAP)  # fmt: skip

    lumps, leaves = noise("blotch", 150, 0), noise("leaf", 90 + 25 * radius[0], 2)
    distance = (u / (1 - cone * (0.5 - 0.5 * v))) ** 2 + v * v
    mask = (distance + 0.22 * lumps + 0.16 * leaves < 0.95).astype(np.uint8)
    sunny = float(stage.light.towards[0])
    tone = 0.5 - 0.22 * v + 0.16 * sunny * u + 0.13 * lumps + 0.15 * leaves
    levels = np.linspace(0, 1, 256)[:, None]
    table = stage.colour(albedo * (0.35 + 1.1 * levels), at[2], np.linspace(0, 1, 256) ** 1.5).astype(np.uint8)
    tone = cv2.convertScaleAbs(np.maximum(tone, 0), alpha=255)
    where = slice(top, bottom), slice(left, right)
    cv2.copyTo(cv2.applyColorMap(tone, table[:, None]), mask, stage.image[where])
    stage.labels[where][mask > 0] = VEGETATION


def _tree(stage: Stage, thing: Thing) -> None:
    d, height, z = thing.dice, thing.height, thing.z
    wide, stem = thing.foot[0] * 1.25, height * (0.24 + 0.12 * d[0])
    bark, at, lean = BARK * (0.7 + 0.7 * d[1]), (thing.x, z), 0.5 * (d[2] - 0.5)
    thick = 0.05 + 0.035 * height
    stage.flat(at, [(-thick, 0), (thick, 0), (lean + 0.6 * thick, stem * 1.5), (lean - 0.6 * thick, stem * 1.5)], bark, VEGETATION)
    stage.flat(at, [(0.2 * thick, 0), (thick, 0), (lean + 0.6 * thick, stem * 1.5), (lean, stem * 1.5)], 0.7 * bark, VEGETATION)
    for reach in (-0.4, 0.45):
        stage.limb(at, (lean, stem), (lean + reach * wide, stem + 0.25 * height), 0.8 * thick, bark, VEGETATION, 0.3)
    leaves, cone = _pick(LEAVES, d[3] ** 1.5) * (0.8 + 0.4 * d[4]), 0.8 * (d[5] < 0.25)
    tall = (height - stem) / 2
    _crown(stage, (thing.x + lean, stem + tall, z), (wide, tall), leaves, d[6:10], cone)
    if not cone:
        _crown(stage, (thing.x + lean + (d[10] - 0.5) * wide, stem + 0.8 * tall, z), (0.6 * wide, 0.6 * tall), leaves, d[11:15])


def _bush(stage: Stage, thing: Thing) -> None:
    leaves = _pick(LEAVES, thing.dice[0] ** 1.5)
    for k in (-0.5, 0.5):
        at = (thing.x, thing.height * 0.42, thing.z - k * thing.foot[1])
        _crown(stage, at, (thing.foot[0], thing.height * 0.6), leaves, thing.dice[4:8] + k)


def _fence(stage: Stage, thing: Thing) -> None:
    """A fence along the street: planks, pickets or rails."""
    d, height = thing.dice, thing.height
    z0, z1 = max(thing.z - thing.foot[1], NEAR_M + 0.1), thing.z + thing.foot[1]
    quad, length = _upright(thing.x, z1, thing.x, z0, 0, height), z1 - z0
    albedo = (_pick(PAINTS, d[0]) if d[1] < 0.5 else np.array([0.50, 0.36, 0.24])) * (0.8 + 0.3 * d[2])
    style, posts = int(3 * d[3]), np.linspace(0, 1 - 0.09 / length, max(2, int(length / 1.5)))
    bars = np.linspace(0, 1, int(length / 0.3), endpoint=False)
    if style == 0:  # planks
        stage.faces(quad[None], albedo, FENCE)
        stage.relief(quad, "road", 60, d[4:6], 1.0)
        stage.faces(_patches(quad, bars, bars + 0.04 / length, 0, 1), 0.55 * albedo, None)
        stage.faces(_patches(quad, 0, 1, 0.93, 1), 1.15 * albedo, None)
        return
    wide = (0.19 if style == 1 else 0.07) / length
    stage.faces(_patches(quad, 0, 1, [0.30, 0.74], [0.42, 0.86]), 0.8 * albedo, FENCE)
    stage.faces(_patches(quad, bars, bars + wide, 0.05, 0.97 if style == 1 else 0.8), albedo, FENCE)
    stage.faces(_patches(quad, posts, posts + 0.1 / length, 0, 1), 0.9 * albedo, FENCE)


def _lamp(stage: Stage, thing: Thing) -> None:
    d, at, top = thing.dice, (thing.x, thing.z), thing.height
    albedo = (_pick(PAINTS, d[0]) if d[1] < 0.4 else STEEL) * (0.6 + 0.6 * d[2])
    reach = -np.sign(thing.x) * (0.8 + 1.2 * d[3])
    stage.limb(at, (0, 0), (0, 0.9), 0.26, 0.8 * albedo, POLE)
    stage.limb(at, (0, 0), (0, top), 0.15, albedo, POLE)
    stage.limb(at, (0.035, 0), (0.035, top), 0.03, np.minimum(1.5 * albedo, 0.9), POLE, 0.9)
    stage.limb(at, (0, top), (reach, top + 0.3), 0.09, albedo, POLE)
    stage.limb(at, (reach, top + 0.3), (1.4 * reach, top + 0.3), 0.17, np.full(3, 0.75), POLE)
    stage.glow((thing.x + 1.2 * reach, top + 0.2, thing.z), 1.3, LAMP_RGB)
    stage.glow((thing.x + 1.2 * reach, 0, thing.z), 3.0, (90, 66, 40))


def _sign(stage: Stage, thing: Thing) -> None:
    """A traffic sign, a pair of them, a direction board or traffic lights on a post."""
    d, at, top = thing.dice, (thing.x, thing.z), thing.height
    turn = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    circle, triangle = np.stack([np.cos(turn), np.sin(turn)], 1), np.array([(-1, -0.8), (1, -0.8), (0, 1)])
    square = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    ground, border = _pick(PAINTS, d[1]), _pick(PAINTS, d[2])
    red, white = np.array([0.72, 0.10, 0.10]), np.full(3, 0.88)
    kind, half = int(6 * d[0]), 0.36 + 0.2 * d[3]
    stage.limb(at, (0, 0), (0, top), 0.1, STEEL * (0.7 + 0.6 * d[4]), POLE)

    def plate(shape: np.ndarray, y: float, size: float, albedo: np.ndarray, x: float = 0.0) -> None:
        stage.flat(at, shape * size + (x, y), albedo, SIGN, 0.6)

    if kind == 0:
        for k, lamp in enumerate(((0.95, 0.15, 0.1), (0.95, 0.6, 0.1), (0.15, 0.9, 0.4))):
            plate(square, top - 0.3 * k, 0.22, np.full(3, 0.09))
            plate(circle, top - 0.3 * k, 0.13, np.array(lamp) * (1.2 if k == int(3 * d[5]) else 0.3))
        stage.glow((thing.x, top - 0.3 * int(3 * d[5]), thing.z), 0.5, ((255, 40, 30), (255, 150, 30), (40, 255, 120))[int(3 * d[5])])
    elif kind == 1:
        plate(square * (1.9, 0.75), top, 1.25 * half, white)
        plate(square * (1.84, 0.69), top, 1.25 * half, ground)
        for k in (-0.35, 0.05, 0.4):
            plate(square * (1.0 + k, 0.12), top + 1.2 * half * k, half, white * (0.9 - 0.5 * ground), -0.2)
    elif kind == 2:
        plate(triangle, top, 1.2 * half, red)
        plate(triangle, top - 0.03, 0.8 * half, white)
        plate(square * (0.3, 1), top - 0.1, 0.3 * half, np.full(3, 0.1))
    else:
        shape = square if kind == 3 else circle
        plate(shape, top, half, red if kind == 4 else border)
        plate(shape, top, 0.76 * half, white if kind == 4 else ground)
        plate(square * (1, 0.35), top, 0.45 * half, white * (1 - 0.9 * (kind == 4)))
        if d[6] < 0.4:
            plate(square * (1, 0.5), top - 1.7 * half, 0.8 * half, white)


def _car(stage: Stage, thing: Thing) -> None:
    """A car of one of the shapes in CARS, heading along the street, against us, or across."""
    d = thing.dice
    length, width, belt, top, b0, b1, r0, r1 = CARS[int(np.searchsorted(CAR_ODDS[:-1], d[0]))]
    yaw = d[1] * 2 * np.pi
    ahead, right = np.array([np.sin(yaw), 0, np.cos(yaw)]), np.array([np.cos(yaw), 0, -np.sin(yaw)])
    origin = np.array([thing.x, 0, thing.z])

    def place(u: object, y: object, w: object) -> np.ndarray:
        """Lengths from the rear, metres up, half widths to the right -> world [..., 3]."""
        u, y, w = np.broadcast_arrays(u, y, w)
        return origin + (u - 0.5)[..., None] * length * ahead + y[..., None] * (0, 1, 0) + w[..., None] * (width / 2) * right

    def prism(profile: list[tuple[float, float]], half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The strips [P, 4, 3] and the two flanks [2, P, 3] of a profile (u, y) with half widths [P]."""
        u, y = np.array(profile).T
        flanks = np.stack([place(u, y, -half), place(u, y, half)])
        after = np.roll(flanks, -1, 1)
        return np.stack([flanks[0], after[0], after[1], flanks[1]], 1), flanks

    paint = _pick(PAINTS, d[2]) * (0.8 + 0.4 * d[3])
    body, sides = prism([(0, 0.25), (0, 0.9 * belt), (0.04, belt), (b1, belt), (0.96, 0.8 * belt), (1, 0.62 * belt), (1, 0.25)], np.ones(7))
    cabin, cabin_sides = prism([(b0, belt), (r0, top), (r1, top), (b1, belt)], np.array([0.96, 0.8, 0.8, 0.96]))
    middle, upper = place(0.5, 0.5 * belt, 0.0), place((b0 + b1) / 2, belt, 0.0)
    stage.faces(body, paint, CAR, middle)
    stage.faces(sides, paint, CAR, middle)
    rear, nose = body[0], body[5]
    lamps = [_patches(q, [0, 0, 0.30, 0], [1, 1, 0.55, 1], [0.03, 0.80, 0.36, 0], [0.2, 0.97, 0.64, 0.08]) for q in (rear, nose)]
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    radius, axles = 0.2 + 0.1 * belt, np.array([0.19, 0.80])[:, None]
    sill = place([0.02, 0.98, 0.98, 0.02], [0.24, 0.24, 0.38, 0.38], np.array([[1.0], [-1.0]]))
    stage.faces(sill, 0.45 * paint, CAR, middle)
    for share, albedo in ((1.25, 0.4 * paint), (1.0, RUBBER), (0.55, np.full(3, 0.55))):
        for flank in (-1.0, 1.0):
            wheel = place(axles + np.cos(turn) * radius * share / length, radius + np.sin(turn) * radius * share, flank * 1.01)
            stage.faces(wheel, albedo, CAR, middle)
    for lamp, albedo in zip(lamps, ((0.75, 0.10, 0.08), (0.92, 0.92, 0.85)), strict=True):
        stage.faces(lamp, np.stack([np.array(albedo), np.array(albedo), np.full(3, 0.85), 0.4 * paint]), None, middle)
    stage.faces(np.concatenate([cabin, cabin_sides]), paint, CAR, upper)
    glass = GLASS + 0.3 * stage.light.zenith * d[4]
    screens = [_patches(cabin[i], 0.1, 0.92, 0.08, 0.92) for i in (0, 2)]
    split = 0.40 + 0.2 * d[5]
    windows = [_patches(q[[0, 3, 2, 1]], [0.08, split + 0.03], [split - 0.03, 0.93], 0.12, 0.86) for q in cabin_sides]
    stage.faces(np.concatenate(screens + windows), 0.8 * glass, None, upper)
    rear_seen = ahead[2] > 0
    for flank in (-0.8, 0.8):
        at = place(0.0 if rear_seen else 1.0, 0.7 * belt, flank)
        stage.glow(tuple(at), 0.3 if rear_seen else 0.55, TAIL_RGB if rear_seen else (255, 240, 210))


def _pedestrian(stage: Stage, thing: Thing) -> None:
    d, at, m = thing.dice, (thing.x, thing.z), thing.height / 1.75
    coat, trousers = _pick(PAINTS, d[0]), 0.8 * _pick(PAINTS, d[1])
    skin, hair = _pick(SKINS, d[2]), _pick(SKINS, d[3]) * 0.45
    stride, swing, turn = 0.30 * d[4] * m, 0.22 * (d[5] - 0.5) * m, np.sign(d[6] - 0.5)
    shade = 0.62

    def limb(points: list[tuple[float, float]], width: float, albedo: np.ndarray, lit: float = 0.5) -> None:
        for a, b in zip(points[:-1], points[1:], strict=True):
            stage.limb(at, (a[0] * m, a[1] * m), (b[0] * m, b[1] * m), width * m, albedo, PEDESTRIAN, lit)

    limb([(0.05, 0.85), (stride, 0.46), (stride * 0.7, 0.06)], 0.15, shade * trousers)
    limb([(stride * 0.7, 0.04), (stride * 0.7 + 0.1 * turn, 0.04)], 0.09, RUBBER)
    limb([(-0.05, 0.85), (-stride * 0.8, 0.46), (-stride * 1.1, 0.06)], 0.16, trousers)
    limb([(-stride * 1.1, 0.04), (-stride * 1.1 + 0.1 * turn, 0.04)], 0.09, RUBBER)
    limb([(0.2, 1.36), (0.26, 1.1), (0.24 + swing, 0.86)], 0.11, shade * coat)
    hem = 0.62 if d[7] < 0.3 else 0.84
    stage.flat(at, m * np.array([(-0.2, hem), (0.2, hem), (0.17, 1.1), (0.23, 1.38), (0.1, 1.47), (-0.1, 1.47), (-0.23, 1.38), (-0.17, 1.1)]),
               coat, PEDESTRIAN)  # fmt: skip
    stage.flat(at, m * np.array([(0.04, hem), (0.2, hem), (0.17, 1.1), (0.23, 1.38), (0.1, 1.47), (0.03, 1.2)]), shade * coat, PEDESTRIAN)
    limb([(-0.21, 1.36), (-0.27, 1.1), (-0.24 - swing, 0.86)], 0.11, 0.85 * coat)
    limb([(-0.24 - swing, 0.84), (-0.24 - swing, 0.82)], 0.09, skin)
    if d[8] < 0.4:
        bag = np.array([(-0.40, 0.5), (-0.12, 0.5), (-0.14, 0.8), (-0.38, 0.8)]) * m
        stage.flat(at, bag, _pick(PAINTS, d[9]), PEDESTRIAN)
    limb([(0, 1.45), (0, 1.56)], 0.1, 0.8 * skin)
    limb([(0, 1.62), (0, 1.66)], 0.20, hair)
    limb([(0.025 * turn, 1.59), (0.025 * turn, 1.62)], 0.16, skin, 0.7)


KINDS = {  # painter: near things, far things (most of each), whether it stands on the road
    "car": (_car, 3, 8), "pedestrian": (_pedestrian, 2, 9), "tree": (_tree, 2, 6), "bush": (_bush, 1, 3),
    "lamp": (_lamp, 1, 5), "sign": (_sign, 2, 7), "fence": (_fence, 2, 5),
}  # fmt: skip


def _stand(kind: str, street: Street, eye_x: float, z: float, dice: np.ndarray) -> Thing:
    """One thing of a kind at depth z, where such things stand."""
    paint, side = KINDS[kind][0], 1.0 if dice[-1] < 0.5 else -1.0
    a, b, c = dice[-4:-1]
    kerb = side * (street.road_m + 0.35 + 0.5 * a)
    if kind == "car":
        shape = CARS[int(np.searchsorted(CAR_ODDS[:-1], dice[0]))]
        parked, crossing = a < 0.35, a > 0.86
        yaw = 0.25 * np.sign(b - 0.5) + 0.06 * (c - 0.5) if crossing else 0.5 * (side < 0) + 0.012 * (c - 0.5)
        dice[1] = yaw
        x = side * (street.road_m - (1.1 if parked else 0.5 * street.road_m)) if not crossing else eye_x + (b - 0.5) * 1.2 * z
        half = shape[0] / 2, shape[1] / 2
        foot = half if crossing else half[::-1]
        return Thing(paint, x, z + foot[1], foot, shape[3], dice)
    if kind == "pedestrian":
        x = side * (street.road_m + 0.5 + a * (street.pavement_m - street.road_m - 0.6)) if b < 0.75 else (2 * c - 1) * street.road_m
        return Thing(paint, x, z, (0.25, 0.2), 1.5 + 0.4 * c, dice)
    if kind == "tree":
        height = 4.0 + 5.0 * b
        return Thing(paint, kerb + side * 0.5, z, (height * (0.2 + 0.1 * c),) * 2, height, dice)
    if kind == "bush":
        return Thing(paint, side * (street.pavement_m + 0.4), z, (0.8 + 0.6 * a, 1.5), 0.9 + 0.9 * b, dice)
    if kind == "fence":
        guard = b < 0.4
        x = side * (street.road_m + 0.3 if guard else street.pavement_m + 0.3)
        return Thing(paint, x, z + 2, (0.05, 2.0 + 4 * c), 1.0 if guard else 1.0 + 0.9 * a, dice)
    height = 4.5 + 2.0 * b if kind == "lamp" else 2.2 + 0.8 * b
    return Thing(paint, kerb, z, (0.08, 0.08), height, dice)


def _houses(street: Street, rng: np.random.Generator) -> list[Thing]:
    """Both rows of houses, with gaps where trees stand on the lawn."""
    things = []
    for side in (-1, 1):
        z = 3 * rng.random() - 2
        storeys = 2 + 4 * rng.random()
        for dice in rng.random((11, DICE)):
            length, setback = 7 + 11 * dice[-1], 1.5 * dice[-2]
            if dice[-3] < 0.24:
                for k, spot in enumerate(dice[-9:-5]):
                    tall = 4 + 6 * dice[-10 - k]
                    things.append(Thing(_tree, side * (street.line_m + 2.5 + 9 * spot), z + length * (k + 0.5) / 4, (0.25 * tall,) * 2, tall,
                                        np.roll(dice, k)))  # fmt: skip
            else:
                height = 3 * max(2, round(storeys + 3 * dice[-4] - 1.5)) + 0.6
                things.append(Thing(_house, side * (street.line_m + setback + 5), z + length / 2, (5.0, length / 2), height, dice))
            z += length
    return sorted(things, key=lambda t: -t.z)


def _layout(preset: str, street: Street, eye_x: float, rng: np.random.Generator) -> list[Thing]:
    """The things of a preset, far to near, none standing in another."""
    things: list[Thing] = []
    for (low, high), column, drawn in ((NEAR_RANGE_M, 1, preset != "small"), (FAR_RANGE_M, 2, preset != "large")):
        for kind, row in KINDS.items():
            for dice in rng.random((row[column] if drawn else 0, DICE)):
                thing = _stand(kind, street, eye_x, low * (high / low) ** dice[-5], dice)
                clear = all(abs(thing.x - o.x) > 0.7 * (thing.foot[0] + o.foot[0]) or abs(thing.z - o.z) > thing.foot[1] + o.foot[1] + 0.3
                            for o in things)  # fmt: skip
                if clear and dice[-6] < 0.85:
                    things.append(thing)
    return sorted(things, key=lambda t: -t.z)


def _finish(stage: Stage, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Canvas to picture: average down, let the lamps glow, then lens and sensor."""
    image = cv2.resize(stage.image, size[::-1], interpolation=cv2.INTER_AREA).astype(np.float32)
    dice = rng.random(8)
    if stage.glows:
        small = (max(8, size[1] // 2), max(8, size[0] // 2))
        glow = np.zeros((small[1], small[0], 3), np.float32)
        for x, y, radius, colour in stage.glows:
            k = small[1] / stage.shape[0]
            layer = np.zeros_like(glow)
        image += cv2.resize(glow, size[::-1])
    drift = cv2.resize(_tiles()["blotch"][: TILE // 2], size[::-1], interpolation=cv2.INTER_LINEAR)
    u, v = np.linspace(-1, 1, size[1], dtype=np.float32), np.linspace(-1, 1, size[0], dtype=np.float32)[:, None]
    gain = (1.06 - 0.13 * (u * u + v * v)) * (1 + 0.05 * drift)
    image *= gain[..., None] * (0.94 + 0.12 * dice[:3]).astype(np.float32)
    noise = rng.standard_normal((*size, 3), dtype=np.float32)
    image += noise * (2.0 + 6.0 * np.float32(dice[3]))
    return np.clip(image, 0, 255).astype(np.uint8)


def draw_scene(seed: int, index: int, size: tuple[int, int] = (128, 256), preset: str = "mixed") -> tuple[np.ndarray, np.ndarray]:
    """..."""
    rng = np.random.default_rng([seed, index, PRESETS.index(preset)])
    light, camera, u = _light(rng.random(8)), rng.random(4), rng.random(3)
    road = 3.2 + 1.8 * u[0]
    street = Street(road, road + 2 + 1.6 * u[1], road + 2.4 + 2.5 * u[1] + u[2])
    stage = Stage(size, camera, 0.85 * road * (2 * camera[3] - 1), light)
    houses, things = _houses(street, rng), _layout(preset, street, stage.eye[0], rng)
    _sky(stage, rng.random(4))
    stage.labels[int(stage.vanishing[1]) + 1 :] = VEGETATION
    _ground(stage, street, houses + things, rng.random(23))
    _skyline(stage, rng)
    for thing in houses + things:
        if thing.z > NEAR_M + 0.5:
            thing.paint(stage, thing)
    image = _finish(stage, size, rng)
    return image, stage.labels[::SUPERSAMPLE, ::SUPERSAMPLE].copy()
