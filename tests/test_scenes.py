"""The procedural street world: the same everywhere, made of exact labels, and not to be solved by colour."""

import cv2
import numpy as np
import pytest

from routeseg.data.config import DataConfig, open_data
from routeseg.data.scenes import CLASSES, PALETTE, PRESETS, draw_scene

THINGS = [CLASSES.index(name) for name in ("car", "pedestrian", "sign")]
SIZE = (96, 192)
SMALLEST = 4  # pixels; smaller fragments are what an occluder left over


@pytest.fixture(scope="module")
def worlds() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images [N, H, W, 3] and labels [N, H, W] of every preset."""
    drawn = {preset: [draw_scene(0, i, SIZE, preset) for i in range(30)] for preset in PRESETS}
    return {preset: tuple(map(np.stack, zip(*scenes, strict=True))) for preset, scenes in drawn.items()}


def mean_iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    counts = np.bincount(truth * len(CLASSES) + predicted, minlength=len(CLASSES) ** 2)
    counts = counts.reshape(len(CLASSES), len(CLASSES))
    return float(np.mean(counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())))


def object_sizes(labels: np.ndarray) -> np.ndarray:
    """Pixels of every connected car, pedestrian and sign in label maps [N, H, W]."""
    sizes = []
    for picture in labels:
        for label in THINGS:
            stats = cv2.connectedComponentsWithStats((picture == label).astype(np.uint8))[2]
            sizes.extend(stats[1:, cv2.CC_STAT_AREA])
    return np.array([size for size in sizes if size >= SMALLEST])


@pytest.mark.parametrize("preset", PRESETS)
def test_same_arguments_same_picture_and_other_arguments_another(preset: str) -> None:
    image, labels = draw_scene(3, 5, (64, 128), preset)
    again = draw_scene(3, 5, (64, 128), preset)
    assert np.array_equal(image, again[0]) and np.array_equal(labels, again[1])
    for other in (draw_scene(3, 6, (64, 128), preset), draw_scene(4, 5, (64, 128), preset)):
        assert not np.array_equal(image, other[0]) and not np.array_equal(labels, other[1])


def test_presets_are_different_worlds() -> None:
    first, second, third = (draw_scene(0, 0, (64, 128), preset)[1] for preset in PRESETS)
    assert not np.array_equal(first, second) and not np.array_equal(second, third)


@pytest.mark.parametrize("size", [(32, 32), (33, 97), (101, 67), (64, 300), (300, 64), (256, 512)])
def test_type_shape_and_range(size: tuple[int, int]) -> None:
    for index in range(3):
        image, labels = draw_scene(1, index, size)
        assert image.dtype == labels.dtype == np.uint8
        assert image.shape == (*size, 3) and labels.shape == size
        assert labels.max() < len(CLASSES) and image.std() > 10


def test_composition_does_not_depend_on_the_size() -> None:
    for index in range(4):
        small = draw_scene(0, index, (64, 128))[1]
        large = draw_scene(0, index, (256, 512))[1][2::4, 2::4]
        assert (small == large).mean() > 0.9


def test_classes_have_names_and_colours() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == len(PALETTE) == len(set(PALETTE)) >= 8


def test_every_class_has_its_share(worlds: dict) -> None:
    labels = worlds["mixed"][1]
    share = np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size
    assert share.min() > 0.004, dict(zip(CLASSES, share.round(4), strict=True))
    for _, labels in worlds.values():
        assert set(np.unique(labels)) == set(range(len(CLASSES)))


def test_varied_is_the_other_presets_in_turn() -> None:
    for index in range(6):
        image, labels = draw_scene(1, index, SIZE, "varied")
        expected = draw_scene(1, index, SIZE, PRESETS[index % 3])
        assert (image == expected[0]).all() and (labels == expected[1]).all()


def test_presets_are_ordered_by_scale(worlds: dict) -> None:
    mean = {preset: object_sizes(labels).mean() for preset, (_, labels) in worlds.items()}
    assert mean["large"] > 1.5 * mean["mixed"] > 1.5 * 3 * mean["small"], mean
    median = {preset: np.median(object_sizes(labels)) for preset, (_, labels) in worlds.items()}
    assert median["large"] > 4 * median["small"], median


def test_presets_share_their_light(worlds: dict) -> None:
    brightness = [images.mean() for images, _ in worlds.values()]
    assert max(brightness) < 1.35 * min(brightness)


def test_colour_alone_does_not_solve_it(worlds: dict) -> None:
    """The best guess from a pixel's colour, by the nearest class mean and by a table of all colours."""
    images, labels = worlds["mixed"]
    colours = images[:, ::2, ::2].reshape(-1, 3).astype(int)
    truth = labels[:, ::2, ::2].reshape(-1).astype(int)
    half = len(truth) // 2
    means = np.stack([colours[:half][truth[:half] == k].mean(0) for k in range(len(CLASSES))])
    nearest = ((colours[half:, None] - means) ** 2).sum(2).argmin(1)
    assert mean_iou(nearest, truth[half:]) < 0.3
    cell = colours // 16 @ (256, 16, 1)
    table = np.zeros((16**3, len(CLASSES)))
    np.add.at(table, (cell[:half], truth[:half]), 1)
    assert 0.05 < mean_iou(table.argmax(1)[cell[half:]], truth[half:]) < 0.4


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"preset": "huge"}, "large, small, mixed"),
        ({"size": (31, 64)}, "at least 32"),
        ({"size": (64, 31)}, "at least 32"),
        ({"size": (64,)}, "height, width"),
        ({"seed": -1}, "count from 0"),
        ({"index": -1}, "count from 0"),
    ],
)
def test_mistakes_are_named_with_a_remedy(arguments: dict, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        draw_scene(**{"seed": 0, "index": 0, **arguments})


def test_scenes_are_those_of_the_data_seed():
    config = DataConfig(image_size=(32, 64), val_images=1, seed=3)
    one, other = (open_data(config, "val", seed).read(0)[0] for seed in (0, 1))
    assert (one == other).all()
    config.seed = None
    assert (open_data(config, "val", 3).read(0)[0] == one).all() and (
        open_data(config, "val", 0).read(0)[0] != one
    ).any()
