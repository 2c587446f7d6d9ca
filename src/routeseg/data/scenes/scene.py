"""One image: lay out a street, paint it from far to near, and look at it through a lens and a sensor.

Shapes as in stage.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import cv2
import numpy as np

from routeseg.data.scenes.stage import NEAR_M, SUPERSAMPLE, TILE, Stage, noise_tiles
from routeseg.data.scenes.street import (
    FREE_END,
    STOREY_M,
    Street,
    light_of,
    paint_ground,
    paint_house,
    paint_sky,
    paint_skyline,
)
from routeseg.data.scenes.things import (
    DICE,
    Thing,
    car_shape,
    paint_bush,
    paint_car,
    paint_fence,
    paint_lamp,
    paint_pedestrian,
    paint_sign,
    paint_tree,
)

Scale = Literal["large", "small", "mixed"]
PRESETS: tuple[Scale, ...] = get_args(Scale)  # by the scale of their things
Preset = Literal[Scale, "varied"]
MIN_SIZE = 32  # pixels; below this the far things vanish
NEAR_RANGE_M, FAR_RANGE_M = (3.0, 7.5), (15.0, 70.0)  # where near and far things stand, log-uniform
USED = 0.85  # share of the tried places on which a thing stands
CROSSING = 0.14  # share of the cars that stand across the street
PARKED = 0.35  # share of the cars that stand at the kerb
BARRIERS = 0.35  # share of the fences that are barriers across the street
STROLLING = 0.75  # share of the pedestrians on the pavement; the others cross the road
LAWNS = 0.24  # share of the lots without a house


class Kind(NamedTuple):
    """A kind of thing: its painter, and how many places are tried near and far."""

    paint: Callable[[Stage, Thing], None]
    near: int
    far: int


KINDS = {
    "car": Kind(paint_car, 3, 8),
    "pedestrian": Kind(paint_pedestrian, 2, 9),
    "tree": Kind(paint_tree, 2, 6),
    "bush": Kind(paint_bush, 1, 3),
    "lamp": Kind(paint_lamp, 1, 5),
    "sign": Kind(paint_sign, 2, 7),
    "fence": Kind(paint_fence, 2, 5),
}


def draw_scene(
    seed: int, index: int, size: tuple[int, int] = (128, 256), preset: str = "mixed"
) -> tuple[np.ndarray, np.ndarray]:
    """One image of the street world, the same for the same arguments.

    seed, index: the world and the image in it, not negative. size: (height, width) in pixels, each >= 32.
    preset: "large" has a few near things that fill up to half of the image, "small" many far ones from a
    few pixels on, "mixed" both; light, paints and textures are drawn alike in all three. "varied" is each of them in
    turn: image number `index` is the one of `preset_of`.
    Returns image uint8 [H, W, 3] (RGB) and labels uint8 [H, W], indices into CLASSES.
    Raises ValueError for an unknown preset, a size under 32 and a negative seed or index.
    """
    if preset not in get_args(Preset):
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(get_args(Preset))}")
    if len(size) != 2 or min(size) < MIN_SIZE:
        raise ValueError(f"size {size} is too small: give (height, width) of at least {MIN_SIZE} pixels each")
    if seed < 0 or index < 0:
        raise ValueError(f"seed {seed} and index {index} must not be negative: count from 0")
    size, preset = (int(size[0]), int(size[1])), preset_of(preset, index)
    rng = np.random.default_rng([seed, index, PRESETS.index(preset)])
    light, camera, widths = light_of(rng.random(8)), rng.random(4), rng.random(2)
    kerb = 3.2 + 1.8 * widths[0]
    street = Street(kerb=kerb, wall=kerb + 2.0 + 1.6 * widths[1])
    stage = Stage(size, camera, 0.85 * kerb * (2 * camera[3] - 1), light)
    houses = _rows_of_houses(street, rng)
    things = _things(preset, street, stage.eye[0], rng)
    paint_sky(stage, rng.random(3))
    paint_ground(stage, street, houses + things, rng.random(23))
    paint_skyline(stage, rng)
    for thing in houses + things:
        if thing.z + thing.foot[1] > NEAR_M + 1:
            thing.paint(stage, thing)
    return _photograph(stage, size, rng), stage.labels[::SUPERSAMPLE, ::SUPERSAMPLE].copy()


def preset_of(preset: str, index: int) -> str:
    """The scale preset of an image: of "varied", all three in turn."""
    return PRESETS[index % len(PRESETS)] if preset == "varied" else preset


def _rows_of_houses(street: Street, rng: np.random.Generator) -> list[Thing]:
    """Both rows of houses, far to near, with gaps where trees stand on the lawn."""
    things = []
    for side in (-1, 1):
        z, storeys, free_end = 3 * rng.random() - 2, 2 + 4 * rng.random(), False
        for dice in rng.random((8, DICE)):
            length, lawn = 8 + 11 * dice[-1], dice[-3] < LAWNS
            if lawn:
                for k in range(2):
                    tall, x = 4 + 6 * dice[-6 - k], side * (street.wall + 3 + 9 * dice[-10 - k])
                    foot = (0.25 * tall, 0.25 * tall)
                    things.append(Thing(paint_tree, x, z + length * (k + 0.5) / 2, foot, tall, np.roll(dice, k)))
            else:
                dice[FREE_END] = free_end
                height = STOREY_M * max(2, round(storeys + 3 * dice[-4] - 1.5)) + 0.6
                x = side * (street.wall + 5.8 + 2 * dice[-2])
                things.append(Thing(paint_house, x, z + length / 2, (5.0, length / 2), height, dice))
            free_end, z = lawn, z + length
    return sorted(things, key=lambda thing: -thing.z)


def _things(preset: str, street: Street, eye_x: float, rng: np.random.Generator) -> list[Thing]:
    """The things of a preset, far to near, none standing in another."""
    things: list[Thing] = []
    for low, high in [NEAR_RANGE_M] * (preset != "small") + [FAR_RANGE_M] * (preset != "large"):
        for name, kind in KINDS.items():
            for dice in rng.random((kind.near if low < FAR_RANGE_M[0] else kind.far, DICE)):
                new = _stand(name, street, eye_x, low * (high / low) ** dice[-5], dice)
                if dice[-6] < USED and all(_apart(new, other) for other in things):
                    things.append(new)
    # a long fence stands behind all that is beside it
    return sorted(things, key=lambda thing: -thing.z - thing.foot[1] * (thing.paint is paint_fence))


def _stand(name: str, street: Street, eye_x: float, z: float, dice: np.ndarray) -> Thing:
    """One thing of a kind at depth z, where such things stand: cars on the road, most others beside it."""
    if name == "car":
        return _stand_car(street, eye_x, z, dice)
    paint, kerb, wall = KINDS[name].paint, street.kerb, street.wall
    side = 1.0 if dice[-1] < 0.5 else -1.0
    a, b, c = dice[-4:-1]
    if name == "pedestrian":
        x = side * (kerb + 0.5 + a * (wall - kerb - 0.6)) if b < STROLLING else (2 * c - 1) * kerb
        return Thing(paint, x, z, (0.25, 0.2), 1.5 + 0.4 * c, dice)
    if name == "tree":
        height = 4.0 + 5.0 * b
        return Thing(paint, side * (kerb + 0.9), z, (height * (0.2 + 0.1 * c),) * 2, height, dice)
    if name == "bush":
        return Thing(paint, side * (wall + 0.4), z, (0.8 + 0.6 * a, 1.5), 0.9 + 0.9 * b, dice)
    if name == "fence":
        if b < BARRIERS:
            return Thing(paint, (2 * c - 1) * wall, z, (0.9 + 0.6 * a, 0.1), 1.05, dice)
        return Thing(paint, side * (wall + 0.2), z + 2, (0.05, 2.0 + 4 * c), 1.0 + 0.9 * a, dice)
    height = 4.5 + 2.0 * b if name == "lamp" else 2.2 + 0.8 * b
    return Thing(paint, side * (kerb + 0.35 + 0.5 * a), z, (0.08, 0.08), height, dice)


def _stand_car(street: Street, eye_x: float, z: float, dice: np.ndarray) -> Thing:
    """A car across the street, parked, or in its lane; writes its heading in turns to dice[1]."""
    shape, kerb = car_shape(dice), street.kerb
    side = 1.0 if dice[-1] < 0.5 else -1.0
    a, b, c = dice[-4:-1]
    z += 2.2 * (shape.roof - 1.45)  # vans and buses keep their distance
    if a > 1 - CROSSING:
        dice[1] = 0.25 * np.sign(b - 0.5) + 0.06 * (c - 0.5)
        x = float(np.clip(eye_x + (b - 0.5) * 1.2 * z, -kerb, kerb))
        return Thing(paint_car, x, z + shape.width / 2, (shape.length / 2, shape.width / 2), shape.roof, dice)
    dice[1] = 0.5 * (side < 0) + 0.012 * (c - 0.5)
    x = side * (kerb - 1.1 if a < PARKED else 0.5 * kerb)
    return Thing(paint_car, x, z + shape.length / 2, (shape.width / 2, shape.length / 2), shape.roof, dice)


def _apart(a: Thing, b: Thing) -> bool:
    """Whether two things can stand beside each other; of a tree only the trunk is in the way."""
    wide, deep = (sum(0.5 if t.paint is paint_tree else t.foot[axis] for t in (a, b)) for axis in (0, 1))
    return abs(a.x - b.x) > wide or abs(a.z - b.z) > deep + 0.3


def _photograph(stage: Stage, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Canvas to image [H, W, 3]: average down, let the lamps glow, then the lens and the sensor."""
    image = cv2.resize(stage.image, size[::-1], interpolation=cv2.INTER_AREA).astype(np.float32)
    _add_glows(image, stage)
    dice = rng.random(4).astype(np.float32)
    drift = cv2.resize(noise_tiles()["blotch"][: TILE // 2], size[::-1])
    v, u = (np.linspace(-1, 1, count, dtype=np.float32) for count in size)
    v = v[:, None]
    image *= ((1.06 - 0.13 * (u * u + v * v)) * (1 + 0.05 * drift))[..., None]  # the corners are darker
    image *= 0.94 + 0.12 * dice[:3]  # the white balance is off
    noise = rng.standard_normal((*size, 3), dtype=np.float32)
    noise *= 2 + 6 * dice[3]
    image += noise
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def _add_glows(image: np.ndarray, stage: Stage) -> None:
    """Add to an image [H, W, 3] the light of all lamps that nothing hides."""
    strength = 1 - 0.6 * min(1.0, float(stage.light.horizon.max()))  # lamps pale before a bright sky
    for glow in stage.glows:
        if glow.painted is not None and stage.image[int(glow.y), int(glow.x)].tolist() != glow.painted:
            continue
        x, y, radius = glow.x / SUPERSAMPLE, glow.y / SUPERSAMPLE, glow.radius / SUPERSAMPLE
        power, radius = strength * min(1.0, 0.25 + 0.5 * radius), max(radius, 0.7)
        falls, spans = [], []
        for centre, count in ((y, image.shape[0]), (x, image.shape[1])):
            span = slice(max(0, int(centre - 3 * radius)), max(0, int(centre + 3 * radius) + 2))
            falls.append(np.exp(-(np.abs((np.arange(count)[span] - centre) / radius) ** 1.3)))
            spans.append(span)
        image[tuple(spans)] += np.outer(*falls)[..., None] * (power * np.array(glow.colour, np.float32))
