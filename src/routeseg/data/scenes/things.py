"""What stands on the ground beside houses: trees and bushes, fences, lamps, signs, cars and pedestrians.

A thing owns DICE uniform numbers: its painter takes from the front (d[0], d[1], ...), its place in the street
from the back (scene.py). Shapes as in stage.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np

from routeseg.data.scenes.stage import (
    CAR,
    DETAIL_M,
    FENCE,
    GLASS,
    LEAVES,
    NEAR_M,
    PAINTS,
    PEDESTRIAN,
    POLE,
    SIGN,
    TILE,
    VEGETATION,
    Place,
    Point,
    Stage,
    inset,
    noise_tiles,
    pick,
    upright,
)

DICE = 32  # uniform numbers that each thing owns
TALL_M = 1.75  # height of the pedestrian whose measures are given below

SKINS = np.array([(0.86, 0.68, 0.56), (0.70, 0.50, 0.38), (0.46, 0.31, 0.23)], np.float32)
RUBBER, STEEL, BARK = np.array([(0.07, 0.07, 0.08), (0.40, 0.42, 0.44), (0.33, 0.25, 0.19)], np.float32)
LAMP_RGB, POOL_RGB, TAIL_RGB = (255, 206, 140), (70, 52, 32), (255, 60, 40)
LEVELS = np.linspace(0, 1, 256)  # the tones of foliage, dark to bright

_TURN = np.linspace(0, 2 * np.pi, 16, endpoint=False)
CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], 1)
SQUARE = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
TRIANGLE = np.array([(-1, -0.8), (1, -0.8), (0, 1)])


@dataclass(frozen=True)
class Thing:
    """What stands on the ground: painter, place, half-axes of its footprint, height, its own dice [DICE]."""

    paint: Callable[[Stage, Thing], None]
    x: float
    z: float
    foot: Point
    height: float
    dice: np.ndarray


def paint_crown(
    stage: Stage, at: Place, radius: Point, albedo: np.ndarray, dice: Sequence[float] | np.ndarray, cone: float = 0.0
) -> None:
    """Foliage around `at` (x, y, z): an ellipse (`cone` 0) to a cone (1), ragged, with lumps in the light."""
    (x, y), scale = stage.spot(*at), stage.focal / at[2]
    rx, ry = radius[0] * scale, radius[1] * scale
    left, top = max(0, int(x - 1.3 * rx)), max(0, int(y - 1.3 * ry))
    right, bottom = min(stage.shape[1], int(x + 1.3 * rx) + 2), min(stage.shape[0], int(y + 1.3 * ry) + 2)
    if right - left < 1 or bottom - top < 1:
        return
    # u, v: pixels from the centre, in radii
    u = (np.arange(left, right, dtype=np.float32) - np.float32(x)) / np.float32(rx)
    v = ((np.arange(top, bottom, dtype=np.float32) - np.float32(y)) / np.float32(ry))[:, None]

    def noise(tile: str, span: float, shift: Sequence[float] | np.ndarray) -> np.ndarray:
        """A tile of which `span` pixels cover the crown."""
        step = span / (2 * rx)
        x0, y0 = (left - x) * step + shift[0] * TILE, (top - y) * step + shift[1] * TILE
        matrix, extent = np.array([[step, 0, x0], [0, step, y0]]), (right - left, bottom - top)
        flags = stage.sampling | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(noise_tiles()[tile], matrix, extent, flags=flags, borderMode=cv2.BORDER_WRAP)

    lumps, leaves = noise("blotch", 150, dice[:2]), noise("leaf", 90 + 25 * radius[0], dice[2:4])
    distance = (u / (1 - np.float32(cone) * (0.5 - 0.5 * v))) ** 2 + v * v
    mask = (distance + 0.22 * lumps + 0.16 * leaves < 0.95).view(np.uint8)
    tone = (0.5 - 0.22 * v) + np.float32(0.16 * stage.light.towards[0]) * u
    tone = cv2.convertScaleAbs(np.maximum(tone + 0.13 * lumps + 0.15 * leaves, 0), alpha=255)
    colours = stage.shade(albedo * (0.35 + 1.1 * LEVELS)[:, None], np.array([at[2]]), LEVELS**1.5)  # [256, 3]
    where = slice(top, bottom), slice(left, right)
    cv2.copyTo(cv2.applyColorMap(tone, colours.astype(np.uint8)[:, None]), mask, stage.image[where])
    cv2.copyTo(np.full_like(mask, VEGETATION), mask, stage.labels[where])


def paint_tree(stage: Stage, thing: Thing) -> None:
    """A leaning trunk and a crown, round or a cone; near by also branches and a second, smaller crown."""
    d, at, near = thing.dice, (thing.x, thing.z), thing.z < DETAIL_M
    wide = thing.foot[0] * 1.25
    stem = thing.height * (0.24 + 0.12 * d[0])
    tall = (thing.height - stem) / 2
    thick = 0.05 + 0.035 * thing.height
    bark, lean = BARK * (0.7 + 0.7 * d[1]), 0.5 * (d[2] - 0.5)
    for left, shade in ((-thick, 1.0), (0.2 * thick, 0.7))[: 2 if near else 1]:  # the whole trunk, its dark side
        trunk = [(left, 0), (thick, 0), (lean + 0.6 * thick, stem * 1.5), (lean + 0.6 * left, stem * 1.5)]
        stage.flat(at, trunk, shade * bark, VEGETATION)
    for reach in (-0.4, 0.45) if near else ():
        branch = [(lean, stem), (lean + reach * wide, stem + 0.25 * thing.height)]
        stage.limb(at, branch, 0.8 * thick, bark, VEGETATION, 0.3)
    leaves, cone = pick(LEAVES, d[3] ** 1.5) * (0.8 + 0.4 * d[4]), 0.8 * (d[5] < 0.25)
    paint_crown(stage, (thing.x + lean, stem + tall, thing.z), (wide, tall), leaves, d[6:10], cone)
    if not cone and near:
        top = (thing.x + lean + (d[10] - 0.5) * wide, stem + 0.8 * tall, thing.z)
        paint_crown(stage, top, (0.6 * wide, 0.6 * tall), leaves, d[11:15])


def paint_bush(stage: Stage, thing: Thing) -> None:
    """Two low crowns, one behind the other."""
    leaves = pick(LEAVES, thing.dice[0] ** 1.5)
    for k in (-0.5, 0.5):
        at = (thing.x, thing.height * 0.42, thing.z - k * thing.foot[1])
        paint_crown(stage, at, (thing.foot[0], thing.height * 0.6), leaves, thing.dice[4:8] + k)


def paint_fence(stage: Stage, thing: Thing) -> None:
    """Planks, pickets or rails along the street, or a striped barrier across it."""
    if thing.foot[0] > thing.foot[1]:
        _paint_barrier(stage, thing)
        return
    d = thing.dice
    z0, z1 = max(thing.z - thing.foot[1], NEAR_M + 0.1), thing.z + thing.foot[1]
    quad, length, style = upright(thing.x, z1, thing.x, z0, thing.height), z1 - z0, int(3 * d[3])
    albedo = (pick(PAINTS, d[0]) if d[1] < 0.5 else 1.5 * BARK) * (0.8 + 0.3 * d[2])
    start = np.linspace(0, 1, max(2, int(length / 0.3)), endpoint=False)
    wide, top, bright = ((0.26, 1.0, 0.8), (0.19, 0.97, 0.8), (0.07, 0.8, 1.1))[style]
    bars = np.stack([start, start + wide / length, 0 * start + 0.04, 0 * start + top], 1)
    rails = [(0, 1, 0, 0.96)] if style == 0 else [(0, 1, 0.30, 0.42), (0, 1, 0.74, 0.86)]
    tones = (0.85 + 0.3 * np.modf(start * 97 * d[5])[0])[:, None] * albedo
    stage.faces(inset(quad, rails), 0.6 * albedo, FENCE)
    stage.faces(inset(quad, bars), tones * bright, FENCE)


def _paint_barrier(stage: Stage, thing: Thing) -> None:
    """Two boards of red and white stripes on two posts."""
    half = thing.foot[0]
    quad = upright(thing.x - half, thing.z, thing.x + half, thing.z, thing.height)
    stage.faces(inset(quad, [(0.08, 0.13, 0, 1), (0.87, 0.92, 0, 1)]), STEEL, FENCE)
    start = np.linspace(0, 1, 8, endpoint=False)
    for low in (0.34, 0.7):
        stripes = np.stack([start, start + 0.125, 0 * start + low, 0 * start + low + 0.26], 1)
        stage.faces(inset(quad, stripes), np.tile([PAINTS[3], PAINTS[0]], (4, 1)), FENCE)


def paint_lamp(stage: Stage, thing: Thing) -> None:
    """A street lamp whose arm reaches over the road, and its pool of light."""
    d, at, top = thing.dice, (thing.x, thing.z), thing.height
    albedo = (pick(PAINTS, d[0]) if d[1] < 0.4 else STEEL) * (0.6 + 0.6 * d[2])
    reach = -np.sign(thing.x) * (0.8 + 1.2 * d[3])
    stage.limb(at, [(0, 0), (0, 0.9)], 0.26, 0.8 * albedo, POLE)
    stage.limb(at, [(0, 0), (0, top), (reach, top + 0.3)], 0.15, albedo, POLE)
    stage.limb(at, [(0.035, 0), (0.035, top)], 0.03, np.minimum(1.5 * albedo, 0.9), POLE, 0.9)
    stage.limb(at, [(reach, top + 0.3), (1.4 * reach, top + 0.3)], 0.17, np.full(3, 0.75), POLE)
    stage.glow((thing.x + 1.2 * reach, top + 0.3, thing.z), 1.2, LAMP_RGB)
    stage.glow((thing.x + 1.2 * reach, 0, thing.z), 3.5, POOL_RGB, pool=True)


def paint_sign(stage: Stage, thing: Thing) -> None:
    """Traffic lights, a direction board, or a warning, square or round sign on a post."""
    d, at, top = thing.dice, (thing.x, thing.z), thing.height
    paint, border = pick(PAINTS, d[1]), pick(PAINTS, d[2])
    red, white, black = np.array([0.72, 0.10, 0.10]), np.full(3, 0.88), np.full(3, 0.09)
    kind, size = int(6 * d[0]), 0.36 + 0.2 * d[3]
    stage.limb(at, [(0, 0), (0, top)], 0.1, STEEL * (0.7 + 0.6 * d[4]), POLE)

    def plate(shape: Any, half: float, albedo: Any, tall: float = 1, x: float = 0, y: float = 0) -> None:
        """A shape of `half` metres to each side, `tall` times as high, at (x, y) metres from the top."""
        stage.flat(at, shape * (half, half * tall) + (x, top + y), albedo, SIGN, 0.6)

    if kind == 0:  # traffic lights
        lamps, on = np.array([(0.95, 0.15, 0.1), (0.95, 0.6, 0.1), (0.15, 0.9, 0.4)]), int(3 * d[5])
        plate(SQUARE, 0.22, black, 2.4, y=-0.3)
        for k, lamp in enumerate(lamps):
            plate(CIRCLE, 0.13, lamp * (1.2 if k == on else 0.3), y=-0.3 * k)
        stage.glow((thing.x, top - 0.3 * on, thing.z), 0.4, tuple((255 * lamps[on]).tolist()))
    elif kind == 1:  # a direction board with three lines of text
        plate(SQUARE, 2.4 * size, white, 0.4)
        plate(SQUARE, 2.3 * size, paint, 0.37)
        for row in (-0.5, 0.0, 0.5):
            ink = white * (0.95 - 0.4 * paint)
            plate(SQUARE, size * (1.1 + 0.9 * row), ink, 0.1, -0.3 * size, size * row)
    elif kind == 2:  # a warning
        plate(TRIANGLE, 1.2 * size, red)
        plate(TRIANGLE, 0.8 * size, white, y=-0.03)
        plate(SQUARE, 0.1 * size, black, 3.0, y=-0.1)
    else:  # square (3), round with a red rim (4), round (5)
        shape = SQUARE if kind == 3 else CIRCLE
        rim, field, mark = (red, white, black) if kind == 4 else (border, paint, white)
        plate(shape, size, rim)
        plate(shape, 0.76 * size, field)
        plate(SQUARE, 0.45 * size, mark, 0.35)
        if d[6] < 0.4:
            plate(SQUARE, 0.8 * size, white, 0.5, y=-1.7 * size)


def paint_pedestrian(stage: Stage, thing: Thing) -> None:
    """Legs, shoes, arms, coat, head and perhaps a bag, in painting order."""
    d, scale, at = thing.dice, thing.height / TALL_M, (thing.x, thing.z)
    coat, trousers, dark = pick(PAINTS, d[0]), 0.8 * pick(PAINTS, d[1]), 0.62
    bag = pick(PAINTS, d[9]) if d[8] < 0.4 else None
    skin, hair = pick(SKINS, d[2]), 0.45 * pick(SKINS, d[3])
    step, swing, turn = 0.30 * d[4], 0.22 * (d[5] - 0.5), np.sign(d[6] - 0.5)
    hem = 0.62 if d[7] < 0.3 else 0.84
    right = np.array([(0.2, hem), (0.17, 1.1), (0.23, 1.38), (0.1, 1.47)])  # half of the coat
    for points, width, albedo in (  # metres of a body of TALL_M; width 0: an outline; no albedo: left out
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
            stage.flat(at, np.asarray(points) * scale, albedo, PEDESTRIAN)
        elif albedo is not None:
            stage.limb(at, [(x * scale, y * scale) for x, y in points], width * scale, albedo, PEDESTRIAN)


class CarShape(NamedTuple):
    """Metres, but where the cabin begins and ends: lengths from the rear, at the belt and at the roof."""

    length: float
    width: float
    belt: float
    roof: float
    belt_from: float
    belt_to: float
    roof_from: float
    roof_to: float


CARS = (
    CarShape(4.5, 1.80, 0.92, 1.45, 0.12, 0.75, 0.27, 0.57),  # saloon
    CarShape(3.9, 1.70, 0.92, 1.50, 0.02, 0.74, 0.12, 0.54),  # hatchback
    CarShape(4.6, 1.90, 1.05, 1.75, 0.02, 0.76, 0.08, 0.58),  # off-roader
    CarShape(5.2, 2.00, 1.10, 2.25, 0.00, 0.88, 0.01, 0.72),  # van
    CarShape(5.1, 1.90, 1.05, 1.75, 0.38, 0.76, 0.42, 0.62),  # pick-up
    CarShape(9.0, 2.40, 1.20, 3.00, 0.00, 1.00, 0.00, 0.98),  # bus
)
CAR_ODDS = np.cumsum((0.26, 0.26, 0.20, 0.13, 0.08, 0.07))
CAR_CORNERS = 12  # corners of each face of a car; those with fewer repeat the last one
BODY, TRIM, TYRE, HUB, TAIL_LAMP, HEAD_LAMP, WINDOW, GLINT = range(8)  # the parts that have a paint of their own


def car_shape(thing_dice: np.ndarray) -> CarShape:
    """The shape that a car's first number stands for."""
    return CARS[int(np.searchsorted(CAR_ODDS[:-1], thing_dice[0]))]


@lru_cache(maxsize=len(CARS))
def _car_model(shape: CarShape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A car in its own axes: faces [F, CAR_CORNERS, 3] in painting order, part [F] and centre [F, 3] of each."""
    length, width, belt, roof = shape[:4]
    faces, parts, centres = [], [], []
    floor, mid = 0.25, 0.5 * belt
    body_centre, cabin_centre = (0, mid, 0), (0, belt, ((shape.belt_from + shape.belt_to) / 2 - 0.5) * length)

    def add(polygons: np.ndarray, part: int, centre: tuple[float, float, float] = body_centre) -> None:
        for polygon in polygons:
            faces.append(np.concatenate([polygon, np.repeat(polygon[-1:], CAR_CORNERS - len(polygon), 0)]))
            parts.append(part)
            centres.append(centre)

    def prism(profile: Any, half_widths: list[float]) -> tuple[np.ndarray, np.ndarray]:
        """Strips [P, 4, 3] and flanks [2, P, 3] of a profile of (lengths from the rear, metres up)."""
        (u, y), w = np.array(profile).T, np.array(half_widths) * width / 2
        left, right = (np.stack([s * w, y, (u - 0.5) * length], 1) for s in (-1, 1))
        strips = np.stack([left, np.roll(left, -1, 0), np.roll(right, -1, 0), right], 1)
        return strips, np.stack([left, right])

    rear = [(0, floor), (0, 0.9 * belt), (0.04, belt)]
    nose = [(0.96, 0.8 * belt), (1, 0.62 * belt), (1, floor)]
    sill = [(0.02, floor), (0.02, floor + 0.14), (0.98, floor + 0.14), (0.98, floor)]
    top = [(shape.belt_from, belt), (shape.roof_from, roof), (shape.roof_to, roof), (shape.belt_to, belt)]
    body, body_flanks = prism([*rear, (shape.belt_to, belt), *nose], [1] * 7)
    cabin, cabin_flanks = prism(top, [0.96, 0.8, 0.8, 0.96])
    add(body, BODY)
    add(body_flanks, BODY)
    add(prism(sill, [1.005] * 4)[1], TRIM)

    turn = np.linspace(0, 2 * np.pi, CAR_CORNERS, endpoint=False)
    radius = 0.2 + 0.1 * belt
    for share, part in ((1.25, TRIM), (1.0, TYRE), (0.55, HUB)):
        for axle in (0.19, 0.80):
            rim = radius * share * np.stack([np.cos(turn) / length, np.sin(turn)], 1) + (axle, radius)
            if part == TRIM:  # the wheel house ends where the body ends
                rim[:, 1] = np.maximum(rim[:, 1], floor)
            add(prism(rim, [1.01] * CAR_CORNERS)[1], part)
    for end, lamp in ((body[0][[0, 3, 2, 1]], TAIL_LAMP), (body[5][[1, 2, 3, 0]], HEAD_LAMP)):
        add(inset(end, [(0, 1, 0, 0.12)]), TRIM)
        add(inset(end, [(0.36, 0.64, 0.3, 0.5)]), HUB)
        add(inset(end, [(0.03, 0.2, 0.5, 0.9), (0.8, 0.97, 0.5, 0.9)]), lamp)

    add(cabin, BODY, cabin_centre)
    add(cabin_flanks, BODY, cabin_centre)
    for screen in (cabin[0], cabin[2]):
        add(inset(screen, [(0.1, 0.92, 0.08, 0.92)]), WINDOW, cabin_centre)
        add(inset(screen, [(0.1, 0.5, 0.3, 0.75)]), GLINT, cabin_centre)
    for flank in cabin_flanks[:, (0, 3, 2, 1)]:
        add(inset(flank, [(0.08, 0.47, 0.12, 0.86), (0.53, 0.93, 0.12, 0.86)]), WINDOW, cabin_centre)
        add(inset(flank, [(0.08, 0.47, 0.55, 0.86), (0.53, 0.93, 0.55, 0.86)]), GLINT, cabin_centre)
    return np.stack(faces), np.array(parts), np.array(centres)


def paint_car(stage: Stage, thing: Thing) -> None:
    """A car of one of the shapes in CARS; dice[1] is its heading in turns."""
    d, yaw = thing.dice, thing.dice[1] * 2 * np.pi
    shape = car_shape(d)
    faces, parts, centres = _car_model(shape)
    turned = np.array([(np.cos(yaw), 0, -np.sin(yaw)), (0, 1, 0), (np.sin(yaw), 0, np.cos(yaw))])
    place = np.array([thing.x, 0, thing.z])
    paint, glass = pick(PAINTS, d[2]) * (0.8 + 0.4 * d[3]), GLASS + 0.15 * stage.light.zenith
    hub, tail, head = np.full(3, 0.6), np.array([0.72, 0.1, 0.08]), np.array([0.92, 0.92, 0.85])
    glint = glass + 0.2 * stage.light.horizon * d[4]
    paints = np.stack([paint, 0.4 * paint, RUBBER, hub, tail, head, 0.75 * glass, glint])  # by part
    stage.faces(faces @ turned + place, paints[parts], CAR, centres @ turned + place)
    away = turned[2, 2] > 0
    for side in (-0.42, 0.42):
        lamp = np.array([side * shape.width, 0.7 * shape.belt, (-0.5 if away else 0.5) * shape.length])
        at = lamp @ turned + place
        stage.glow(tuple(at), 0.2 if away else 0.38, TAIL_RGB if away else LAMP_RGB)
