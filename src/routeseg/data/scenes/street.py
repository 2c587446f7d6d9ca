"""What surrounds the things of a street: the light of the hour, the sky, the ground and the houses.

Shapes as in stage.py; T things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from routeseg.data.scenes.stage import (
    BUILDING,
    CLASSES,
    DETAIL_M,
    GLASS,
    LEAVES,
    NEAR_M,
    NEUTRAL,
    PAINTS,
    PAVEMENT,
    ROAD,
    VEGETATION,
    WALLS,
    Light,
    Stage,
    grey,
    inset,
    level,
    pick,
    upright,
)
from routeseg.data.scenes.things import Thing, paint_crown

FAR_M = 3000.0  # where the ground ends
STOREY_M = 3
SHOP_RGB = (110, 86, 56)
FREE_END = 15  # which of a house's dice tells whether its near end stands free
BANDS = ((NEAR_M, 11, 1.0), (11, 26, 0.6), (26, 70, 0.3))  # depth from-to and strength of the grain of the ground
LAWN_BANDS = ((5, 26, 0.8), (26, 70, 0.3))


class Sky(NamedTuple):
    """One hour of the day: RGB of the sky overhead, at the horizon, of the light from all sides and from the sun.

    sun_height: sine of the sun's elevation. share: of the scenes that are under this sky.
    """

    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    ambient: tuple[float, float, float]
    sun: tuple[float, float, float]
    sun_height: float
    share: float


SKIES = {
    "day": Sky((0.25, 0.47, 0.84), (0.72, 0.84, 0.94), (0.46, 0.51, 0.60), (0.66, 0.60, 0.48), 0.75, 0.40),
    "dusk": Sky((0.30, 0.32, 0.56), (0.98, 0.68, 0.44), (0.38, 0.35, 0.43), (0.72, 0.42, 0.20), 0.30, 0.22),
    "overcast": Sky((0.60, 0.64, 0.69), (0.83, 0.84, 0.85), (0.70, 0.72, 0.75), (0.10, 0.10, 0.09), 0.90, 0.20),
    "night": Sky((0.03, 0.05, 0.13), (0.20, 0.19, 0.30), (0.32, 0.33, 0.44), (0.06, 0.07, 0.12), 0.60, 0.18),
}


@dataclass(frozen=True)
class Street:
    """Metres from the middle of the road to the kerb, and to the end of the pavement where the lots begin."""

    kerb: float
    wall: float


def light_of(dice: np.ndarray) -> Light:
    """The light of one of the SKIES, tinted, with its own clouds, haze and direction of the sun. dice: [8]."""
    names = list(SKIES)
    name = names[int(np.searchsorted(np.cumsum([SKIES[n].share for n in names])[:-1], dice[0]))]
    sky = SKIES[name]
    tint = np.exp(0.12 * (dice[1:4] - 0.5)) * (0.88 + 0.24 * dice[4])
    azimuth, across = 2 * np.pi * dice[5], np.sqrt(1 - sky.sun_height**2)
    zenith, horizon, ambient, sun = (np.array(sky[:4]) * tint).astype(np.float32)
    return Light(
        zenith=zenith,
        horizon=horizon,
        ambient=ambient,
        sun=sun,
        towards=np.array([np.sin(azimuth) * across, sky.sun_height, np.cos(azimuth) * across]),
        haze_m=60 + 240 * dice[7] ** 1.5,
        cloud=0.9 if name == "overcast" else dice[6],
        lamps=name in ("night", "dusk"),
    )


def paint_sky(stage: Stage, dice: np.ndarray) -> None:
    """A gradient, clouds on a ceiling in perspective, the glow of the sun. dice: [3]."""
    light, rows = stage.light, int(stage.vanishing[1]) + 2
    fall = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None] ** 1.4  # 0 at the zenith, 1 at the horizon
    sky = np.repeat(light.zenith * (1 - fall) + light.horizon * fall, stage.shape[1], 1)  # [rows, w, 3]
    _add_clouds(stage, sky, fall, dice)
    side, up, ahead = light.towards
    if ahead > 0.3 and light.cloud < 0.85:
        x, y = stage.vanishing + stage.focal * np.array([side, -up]) / ahead
        column, row = np.arange(stage.shape[1]) - x, np.arange(rows)[:, None] - y
        distance = np.sqrt(np.float32(column**2) + np.float32(row**2)) / stage.shape[0]
        disc = grey(np.exp(-9 * distance) * np.float32(0.8) + np.float32(distance < 0.03))
        disc *= light.sun * 1.25 + 0.25 * light.ambient
        sky += disc
    np.minimum(sky, 1, out=sky)
    stage.image[:rows] = cv2.convertScaleAbs(sky, alpha=255)


def _add_clouds(stage: Stage, sky: np.ndarray, fall: np.ndarray, dice: np.ndarray) -> None:
    """Clouds over a sky [rows, w, 3], fading towards the horizon; thick ones are darker."""
    light = stage.light
    ceiling = stage.warp(level(-60, 60, 1.5, 60, stage.eye[1] + 1.6), "cloud", 60 + 60 * dice[0], dice[1:3])
    assert ceiling is not None, "the ceiling fills the sky"
    band = ceiling.where[0]
    fade = 0.55 - 0.5 * fall[band.start : band.stop, :, 0] ** 4
    cover = np.clip(fade * (ceiling.texture[: len(fade)] + np.float32(2.6 * light.cloud - 1.7)), 0, 0.92)
    cover = grey(cover)
    bright = np.minimum(0.52 * (light.ambient + light.sun) + 0.43 * light.horizon, 1)
    part = sky[band.start : band.stop]
    part *= 1 - cover
    cover *= 1 - 0.22 * cover
    part += cover * bright


def paint_skyline(stage: Stage, rng: np.random.Generator) -> None:
    """What closes the street: blocks and trees so far away that they are mostly haze."""
    x, width, height, z, paint = rng.random((5, 16))
    x, z, half = 500 * (x - 0.5), 220 - 60 * np.sort(z), 6 + 15 * width
    outlines = zip(x - half, z, x + half, z, 5 + 40 * height**2.5, strict=True)
    walls = np.stack([pick(WALLS, p) for p in paint])
    stage.faces(np.stack([upright(*outline) for outline in outlines]), walls, BUILDING)
    for x, height, z, paint, *dice in rng.random((9, 8)):
        size = 5 + 6 * height
        paint_crown(stage, (240 * (x - 0.5), size / 2, 140 - 40 * z), (size, size / 2), pick(LEAVES, paint), dice)


def paint_ground(stage: Stage, street: Street, things: list[Thing], dice: np.ndarray) -> None:
    """Lawn, pavement and road in their albedo, then their grain, light, shadows and haze. dice: [23]."""
    top = int(stage.vanishing[1]) + 1
    stage.labels[top:] = VEGETATION
    asphalt = (0.28 + 0.22 * dice[2]) * np.array([1.0, 0.99 - 0.05 * dice[3], 1.04 - 0.14 * dice[3]])
    paving = (0.40 + 0.22 * dice[0]) * np.array([1.0, 0.97 - 0.08 * dice[1], 0.92 - 0.16 * dice[1]])
    lawn = 0.9 * pick(LEAVES, 0.5 * dice[10])
    stones = [level(s * street.kerb, s * (street.kerb + 0.22), NEAR_M, FAR_M) for s in (-1, 1)]
    _paint_area(stage, FAR_M, lawn, VEGETATION)
    _paint_area(stage, street.wall, paving, PAVEMENT)
    _paint_on_ground(stage, stones, 1.25 * paving)
    _paint_area(stage, street.kerb, asphalt, ROAD)
    _paint_on_ground(stage, _road_markings(street, dice), 1.9 * asphalt)
    for x, z, width, length in dice[11:23].reshape(3, 4):  # mended asphalt
        x, z = 1.4 * street.kerb * (x - 0.6), 3 + 20 * z
        _paint_on_ground(stage, [level(x, x + 0.4 + width, z, z + 1 + 4 * length)], 0.8 * asphalt)

    grain = np.full(stage.shape, NEUTRAL, np.uint8)
    for half, tile, per_m, bands in (
        (FAR_M, "grass", 90, LAWN_BANDS),
        (street.wall, CLASSES[PAVEMENT], 90, BANDS),
        (street.kerb, CLASSES[ROAD], 70, BANDS),
    ):
        wide = min(half, 90)
        for near, far, strength in bands:
            patch = stage.warp(level(-wide, wide, near, far), tile, per_m, dice[4:6], strength)
            if patch is not None:
                cv2.copyTo(patch.texture, patch.mask, grain[patch.where])
    _light_ground(stage, top, grain[top:], things)


def _paint_area(stage: Stage, half: float, albedo: np.ndarray, label: int) -> None:
    """The ground to `half` metres left and right of the middle of the road."""
    stage.fill(stage.project(level(-half, half, NEAR_M, FAR_M)[None]), (255 * albedo).tolist(), label)


def _paint_on_ground(stage: Stage, quads: list[np.ndarray], albedo: np.ndarray) -> None:
    """Quads [4, 3] painted on the ground; what is labelled stays."""
    stage.fill(stage.project(np.stack(quads)), np.minimum(255 * albedo, 240).tolist(), None)


def _road_markings(street: Street, dice: np.ndarray) -> list[np.ndarray]:
    """Dashes along the middle, perhaps lines along the edges and a zebra crossing: quads [4, 3]."""
    zebra = 5 + 22 * dice[9] if dice[8] < 0.45 else None  # its depth in metres
    kerb = street.kerb
    dashes = [
        level(-0.08, 0.08, z, z + 2.5) for z in np.arange(1 + 4 * dice[6], 90, 6) if zebra is None or abs(z - zebra) > 4
    ]
    edges = [level(s * (kerb - 0.35), s * (kerb - 0.24), NEAR_M, FAR_M) for s in (-1, 1)] if dice[7] < 0.6 else []
    across = np.arange(-kerb + 0.5, kerb - 0.7, 1.0)
    stripes = [level(x, x + 0.5, zebra, zebra + 3) for x in across] if zebra is not None else []
    return dashes + edges + stripes


def _light_ground(stage: Stage, top: int, grain: np.ndarray, things: list[Thing]) -> None:
    """Turn the albedo from the canvas row `top` on into colours: grain, sun, shadows and haze."""
    shadow, contact = (mask[top:] for mask in _shadows(stage, things))
    depth = stage.focal * stage.eye[1] / (np.arange(top, stage.shape[0]) + 0.5 - stage.vanishing[1])
    clear = np.exp(-depth / stage.light.haze_m).astype(np.float32)[:, None]
    bright = grey(1 - shadow * np.float32(0.9 / 255))
    bright *= stage.light.sun * np.float32(stage.light.towards[1])
    bright += stage.light.ambient
    bright *= grey(grain * (1 - contact * np.float32(0.5 / 255)) * (clear / NEUTRAL))
    bright *= stage.image[top:]
    bright += 255 * stage.light.horizon * (1 - clear[..., None])
    stage.image[top:] = cv2.convertScaleAbs(bright)


def _shadows(stage: Stage, things: list[Thing]) -> tuple[np.ndarray, np.ndarray]:
    """Where things keep the sun from the ground, and where they touch it: two masks [h, w] uint8."""
    turn = np.linspace(0, 2 * np.pi, 8, endpoint=False) + np.pi / 8
    ring = np.stack([np.cos(turn), 0 * turn, np.sin(turn)], 1) * 1.08  # [8, 3]
    place = np.array([(t.x, 0, t.z) for t in things])[:, None]
    foot = place + ring * np.array([(t.foot[0], 0, t.foot[1]) for t in things])[:, None]  # [T, 8, 3]
    cast = np.array([t.height for t in things])[:, None, None] * -stage.light.towards / stage.light.towards[1]
    both = np.concatenate([foot, foot + cast * (1, 0, 1)], 1)  # [T, 16, 3]
    corners = np.clip(stage.project(both), -1e4, 1e4).astype(np.int32)
    shadow, contact = np.zeros((2, *stage.shape), np.uint8)
    for outline in corners:
        cv2.fillConvexPoly(shadow, cv2.convexHull(outline), 255)
        cv2.fillConvexPoly(contact, outline[:8], 255)
    soft = max(1, stage.shape[0] // 48)
    return cv2.blur(shadow, (2 * soft, soft)), cv2.blur(contact, (2 * soft, soft))


def paint_house(stage: Stage, house: Thing) -> None:
    """Walls and roof, windows, and a shop or a door; dice[FREE_END] tells whether the near end is seen."""
    d, height = house.dice, house.height
    half = np.sign(house.x) * house.foot[0]
    front, ridge, back = house.x - half, house.x, house.x + half
    z0, z1 = max(house.z - house.foot[1], NEAR_M + 0.1), house.z + house.foot[1]
    rise = height + (3.5 if d[3] < 0.55 else 0.0)
    wall, end = upright(front, z1, front, z0, height), upright(front, z0, back, z0, height)
    roof = np.array([(front, height, z1), (front, height, z0), (ridge, rise, z0), (ridge, rise, z1)])
    gable = np.array([(front, height, z0), (back, height, z0), (ridge, rise, z0), (ridge, rise, z0)])
    albedo, trim = pick(WALLS, d[0]) * (0.8 + 0.35 * d[1]), pick(WALLS, d[2])
    paints = np.stack([pick(WALLS, d[4]) * 0.6, albedo, albedo, albedo])
    stage.faces(np.stack([roof, end, gable, wall]), paints, BUILDING, (house.x, height / 2, house.z))

    walls = ((wall, z1 - z0), (end, 2 * house.foot[0]))[: 2 if d[FREE_END] else 1]
    tile, strength = "brick" if d[5] < 0.5 else "plaster", 0.99 * np.exp(-max(z0 - 4, 0) / 25)
    for quad, _ in walls if z0 < 30 else ():
        patch = stage.warp(quad, tile, 60, d[6:8], strength)
        if patch is not None:
            seen = stage.image[patch.where]
            cv2.copyTo(cv2.multiply(seen, grey(patch.texture), scale=1 / NEUTRAL), patch.mask, seen)
    _paint_windows(stage, house, walls, trim)
    if z0 <= DETAIL_M:
        _paint_entrance(stage, house, wall, trim)


def _paint_entrance(stage: Stage, house: Thing, wall: np.ndarray, trim: np.ndarray) -> None:
    """A shop over the whole ground floor of the wall [4, 3] to the street, or a door."""
    d, paint = house.dice, pick(PAINTS, house.dice[10])
    ground_floor = inset(wall, [(0.03, 0.97, 0.25 / house.height, 2.9 / house.height)])[0]
    if d[9] < 0.5:
        front, panes = (0, 1, 0, 1), [(0.02, 0.32, 0.12, 0.72), (0.36, 0.66, 0.12, 0.72)]
        door, board = (0.7, 0.98, 0, 0.72), (0, 1, 0.78, 1)
        paints = np.stack([0.7 * trim, GLASS, GLASS, 0.6 * paint, paint])
        stage.faces(inset(ground_floor, [front, *panes, door, board]), paints, None)
        (x, _, z1), (_, _, z0) = wall[:2]
        stage.glow((x, 1.7, (z0 + z1) / 2), 2.0, SHOP_RGB)
    else:
        left = 0.1 + 0.6 * d[11]
        frame, door = (left, left + 0.12, 0, 0.9), (left + 0.015, left + 0.105, 0, 0.84)
        stage.faces(inset(ground_floor, [frame, door]), np.stack([trim, paint]), None)


def _paint_windows(stage: Stage, house: Thing, walls: Sequence[tuple[np.ndarray, float]], trim: np.ndarray) -> None:
    """Rows of windows over the ground floor of the walls, each a quad [4, 3] and its length in metres."""
    d, light, height = house.dice, stage.light, house.height
    found: tuple[list[np.ndarray], list[np.ndarray]] = [], []  # frames and panes of each wall
    for quad, length in walls:
        columns = max(1, int(length / (1.9 + 1.4 * d[12])))
        row, column = (i.ravel() for i in np.mgrid[1 : int(height / STOREY_M), :columns])
        s, t = (column + 0.5) / columns, (row * STOREY_M + 1.7) / height  # the middle of each window
        wide, tall = (0.21 + 0.15 * d[13]) / columns, (0.22 + 0.12 * d[14]) * STOREY_M / height
        for grow, quads in zip((1.22, 1.0), found, strict=True):
            w, h = wide * grow, tall * grow
            quads.append(inset(quad, np.stack([s - w, s + w, t - h, t + h], 1)))
    frames, panes = (stage.project(np.concatenate(quads)) for quads in found)  # [n, 4, 2]
    blinds = panes + 0.4 * (panes[:, (3, 2, 2, 3)] - panes) * np.array([1, 1, 0, 0])[:, None]
    lamp, glint = np.random.default_rng(int(d[8] * 2**32)).random((2, len(panes)))
    near, every = house.z - house.foot[1] < DETAIL_M, np.ones(len(panes), bool)
    lantern = np.array([1.0, 0.78, 0.45]) / (light.ambient + 0.25 * light.sun)
    for shapes, keep, albedo in (
        (frames, near & every, np.minimum(1.15 * trim, 0.9)),
        (panes, every, GLASS + 0.22 * light.horizon),
        (panes, near & (glint < 0.35), 0.5 * GLASS + 0.5 * light.zenith),
        (panes, (lamp < 0.35) & light.lamps, lantern),
        (blinds, near & (glint > 0.8), 0.8 * trim),
    ):
        if keep.any():
            stage.fill(shapes[keep], stage.tone(albedo, house.z, 0.25), None)
