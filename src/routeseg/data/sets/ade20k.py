"""ADE20K scene parsing (Zhou et al., CVPR 2017): the 150 classes of the 2016 challenge, in its official layout.

Label files hold 1 to 150, which become the classes 0 to 149, and 0 where there is no label.
"""

from __future__ import annotations

import colorsys
from functools import partial
from pathlib import Path

from routeseg.data.label_files import LabelMap
from routeseg.data.pairs import LeftOut, PairedFiles, pair_folders
from routeseg.data.sets.roots import need_folders, no_split, read_class_numbers
from routeseg.labels import IGNORE, Classes

TREE = """
ROOT/ADEChallengeData2016/images/{training,validation}/NAME.jpg
ROOT/ADEChallengeData2016/annotations/{training,validation}/NAME.png
(ROOT may also be ADEChallengeData2016 itself)
"""
SPLITS = {"train": "training", "val": "validation"}
# The first name in each line of objectInfo150.txt.
NAMES = tuple(
    name.strip()
    for name in (
        "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, "
        "door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, "
        "field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, "
        "signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, "
        "stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, "
        "coffee table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, "
        "swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, "
        "streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, "
        "ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, "
        "swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, "
        "trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, "
        "vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, "
        "glass, clock, flag"
    ).split(",")
)
NATURAL = {
    "wall": (170, 160, 150),
    "building": (120, 100, 120),
    "sky": (135, 190, 235),
    "floor": (180, 140, 100),
    "tree": (60, 130, 60),
    "ceiling": (215, 210, 200),
    "road": (95, 95, 105),
    "grass": (120, 180, 70),
    "sidewalk": (200, 160, 190),
    "person": (220, 50, 80),
    "earth": (140, 110, 70),
    "mountain": (110, 130, 120),
    "plant": (90, 170, 100),
    "car": (40, 80, 190),
    "water": (60, 140, 190),
    "sea": (40, 110, 170),
}
GOLDEN_RATIO = 0.618034  # hues that are this far apart stay apart
SHADES = ((0.85, 0.90), (0.55, 0.98), (0.90, 0.62), (0.45, 0.70), (0.70, 0.42))  # (saturation, value), in turn
REMEDY = "use annotations/*/*.png of ADEChallengeData2016, not the masks of the full ADE20K"


def _palette() -> tuple[tuple[int, int, int], ...]:
    """A colour for each class, all different. They are this project's own: the annotations come without any."""
    colours = []
    for index in range(len(NAMES)):
        rgb = colorsys.hsv_to_rgb(index * GOLDEN_RATIO % 1, *SHADES[index % len(SHADES)])
        red, green, blue = (round(255 * part) for part in rgb)
        colours.append(NATURAL.get(NAMES[index], (red, green, blue)))
    return tuple(colours)


CLASSES = Classes(NAMES, _palette())
LABELS = LabelMap(
    len(NAMES),
    {0: IGNORE} | {index + 1: index for index in range(len(NAMES))},
    {},
    strict=True,
    remedy="ADE20K has 1 to 150 and 0 = no label. Are these masks renumbered?",
)


def open_ade20k(root: Path, split: str, left_out: list[LeftOut] | None = None) -> PairedFiles:
    """A split of ADE20K, train or val. Raises ValueError, showing the expected tree, if something is missing.

    left_out  takes files without a partner; without it they are an error, too
    """
    if split not in SPLITS:
        raise no_split("ADE20K", split, SPLITS)
    inner = root / "ADEChallengeData2016"
    root = inner if inner.is_dir() else root
    images, labels = (f"{kind}/{SPLITS[split]}" for kind in ("images", "annotations"))
    need_folders(root, (images, labels), "ADE20K", TREE)
    pairs = pair_folders(root / images, root / labels, left_out)
    return PairedFiles(pairs, CLASSES, LABELS, partial(read_class_numbers, remedy=REMEDY))
