"""Routes over a data set: numbers known by hand, tests that find what is there and nothing else, the command."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import routeseg
from conftest import run, scenes_checkpoint
from routeseg import DynamicRoutingNetwork, Route, RoutingSpace, SkipEngine, figures
from routeseg.cli.tables import print_survey
from routeseg.cost.macs import exit_costs
from routeseg.data.config import DataConfig
from routeseg.data.scenes import CLASSES, PALETTE
from routeseg.data.subset import evenly_spread
from routeseg.space import DOWN, KEEP
from routeseg.survey import routes
from routeseg.survey.route_statistics import (
    PermutationTest,
    distinct_routes,
    edge_statistics,
    in_plain_words,
    object_size,
    permutation_test,
    route_distances,
    shift_test,
    size_group_name,
    size_groups,
)

SPACE = RoutingSpace(3)
SCENES = ["--data.image_size=[48,64]", "--data.val_images=3", "--data.workers=0"]
FILES = {"routes.json"} | {
    name + kind
    for name in ("frequency", "strength", "cost_histogram", "extremes", "groups")
    for kind in (".png", ".svg")
}


def gates_of(*images: dict) -> np.ndarray:
    gates = np.zeros((len(images), *SPACE.legal.shape), dtype=np.float32)
    for image, edges in enumerate(images):
        for edge, activation in edges.items():
            gates[image][edge] = activation
    return gates


def two_kinds(images: int, apart: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noisy routes [2*images, ...] of two groups whose activations are `apart`, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat((0, 1), images)
    gates = rng.random((2 * images, *SPACE.legal.shape)) * 0.2 + apart * labels[:, None, None, None]
    return gates * SPACE.legal, labels


class TestEdges:
    def test_frequency_and_strength_by_hand(self):
        first, second = (0, 0, KEEP), (0, 0, DOWN)
        edges = edge_statistics(SPACE, gates_of({first: 0.5}, {first: 0.25, second: 1.0}, {first: 0.75}, {}))
        assert edges.frequency[first] == 0.75 and edges.frequency[second] == 0.25
        assert edges.mean_activation[first] == pytest.approx(1.5 / 4)
        assert edges.mean_when_open[first] == pytest.approx(1.5 / 3)
        listed = {(e["layer"], e["scale"], e["direction"]): e for e in edges.as_list()}
        assert len(listed) == len(SPACE.edges)
        assert listed[0, 0, "down"]["mean_when_open"] == 1.0 and listed[1, 0, "keep"]["mean_when_open"] is None
        assert edges.counts == {"always": 0, "sometimes": 2, "never": len(SPACE.edges) - 2}

    def test_distinct_routes_look_at_open_edges_only(self):
        assert distinct_routes(gates_of({(0, 0, KEEP): 0.1}, {(0, 0, KEEP): 0.9}, {})) == 2

    def test_gates_of_another_space_or_of_no_image_are_refused(self):
        for wrong in (np.zeros((2, 5, 4, 3)), np.zeros((0, *SPACE.legal.shape)), np.zeros(SPACE.legal.shape)):
            with pytest.raises(ValueError, match="the space needs"):
                edge_statistics(SPACE, wrong)


class TestDistances:
    def test_by_hand(self):
        gates = gates_of({(0, 0, KEEP): 0.5, (0, 0, DOWN): 0.2}, {(0, 0, KEEP): 0.1}, {(0, 0, KEEP): 0.5})
        edges = len(SPACE.edges)
        soft, hard = route_distances(SPACE, gates), route_distances(SPACE, gates, binary=True)
        assert soft[0, 1] == pytest.approx((0.4 + 0.2) / edges) and soft[1, 2] == pytest.approx(0.4 / edges)
        assert hard[0, 1] == pytest.approx(1 / edges) and hard[1, 2] == 0
        for distances in (soft, hard):
            assert (distances == distances.T).all() and (np.diag(distances) == 0).all()

    def test_illegal_edges_do_not_count(self):
        gates = np.zeros((2, *SPACE.legal.shape))
        gates[1][~SPACE.legal] = 1
        assert (route_distances(SPACE, gates) == 0).all()


class TestPermutations:
    def test_an_obvious_difference_is_found(self):
        gates, labels = two_kinds(12, apart=0.5)
        test = permutation_test(route_distances(SPACE, gates), labels, 999)
        assert test.p_value == pytest.approx(1 / 1000) and test.between > 3 * test.within

    def test_noise_is_not(self):
        values = [
            permutation_test(route_distances(SPACE, gates), labels, 199, seed).p_value
            for seed in range(40)
            for gates, labels in [two_kinds(8, apart=0, seed=seed)]
        ]
        assert min(values) > 0.004 and np.mean(np.array(values) < 0.05) <= 0.15 and 0.3 < np.mean(values) < 0.7

    def test_means_by_hand(self):
        distances = np.array([[0, 1, 4, 5], [1, 0, 6, 7], [4, 6, 0, 3], [5, 7, 3, 0]])
        test = permutation_test(distances, [0, 0, 1, 1], 200)
        assert (test.between, test.within, test.difference) == ((4 + 5 + 6 + 7) / 4, (1 + 3) / 2, 3.5)
        assert 0.2 < test.p_value < 0.5, "1 of the 3 ways to pair four images"

    def test_the_seed_decides(self):
        gates, labels = two_kinds(6, apart=0.01)
        distances = route_distances(SPACE, gates)
        assert permutation_test(distances, labels, 300, 1) == permutation_test(distances, labels, 300, 1)

    def test_images_that_are_all_alike_are_no_finding(self):
        assert permutation_test(np.zeros((6, 6)), [0, 0, 0, 1, 1, 1], 50).p_value == 1

    def test_likeness_of_neighbours_alone_deceives_permutations_and_not_shifts(self):
        """A slow drift, and groups that come in runs, of which one has nothing to do with the other."""
        rng = np.random.default_rng(3)
        permuted, shifted = [], []
        for _ in range(20):
            drift = np.cumsum(rng.standard_normal(120))
            labels = (np.cumsum(rng.standard_normal(120)) > 0).astype(int)
            if labels.std() == 0:
                continue
            distances = np.abs(drift[:, None] - drift)
            permuted.append(permutation_test(distances, labels, 199).p_value)
            shifted.append(shift_test(distances, labels).p_value)
        assert np.mean(np.array(permuted) < 0.05) > 0.5 > 0.25 > np.mean(np.array(shifted) < 0.05)

    def test_what_cannot_be_tested_is_refused(self):
        for labels in ([0, 0, 0], [0, 1, 2]):
            with pytest.raises(ValueError, match="two groups"):
                permutation_test(np.zeros((3, 3)), labels)
        with pytest.raises(ValueError, match="there are 3 labels"):
            permutation_test(np.zeros((2, 2)), [0, 1, 1])

    def test_words_say_it_whichever_way_it_comes_out(self):
        found, missed = PermutationTest(0.3, 0.2, 0.001, 999), PermutationTest(0.2, 0.2, 0.6, 99)
        assert "Routes follow the preset" in in_plain_words("Routes", "preset", {"permuted": found})
        assert "50.0 % more" in in_plain_words("Routes", "preset", {"permuted": found})
        assert "do not visibly follow" in in_plain_words("Routes", "preset", {"permuted": missed})
        assert "neighbouring images alone" in in_plain_words("Routes", "x", {"permuted": found, "shifted": missed})
        assert "Routes follow" in in_plain_words("Routes", "x", {"permuted": found, "shifted": found})


class TestObjectSize:
    def test_by_hand(self):
        labels = np.zeros((100, 100), dtype=np.uint8)
        labels[10:30, 10:30] = 1
        labels[60:70, 60:70] = labels[70:80, 70:80] = 1  # they touch at a corner: one object of 200 pixels
        area = np.array([10000 - 600, 400, 200])
        assert object_size(labels) == pytest.approx(area.sum() / np.sqrt(area).sum() / 100)

    def test_one_class_is_1_and_a_chequerboard_the_side_of_its_fields(self):
        assert object_size(np.full((30, 50), 3, dtype=np.uint8)) == pytest.approx(1)
        fields = np.arange(16).reshape(4, 4).repeat(8, 0).repeat(8, 1)
        assert object_size(fields) == pytest.approx(1 / 4)

    def test_neither_resolution_nor_ignored_pixels_matter(self):
        labels = np.random.default_rng(0).integers(0, 3, (12, 12)).astype(np.uint8)
        assert object_size(labels.repeat(4, 0).repeat(4, 1)) == pytest.approx(object_size(labels))
        ignored = np.full((20, 20), 255, dtype=np.uint8)
        assert np.isnan(object_size(ignored))
        ignored[:10] = 2
        assert object_size(ignored) == pytest.approx(np.sqrt(200) / 20)

    def test_stray_pixels_hardly_count(self):
        clean = np.zeros((200, 200), dtype=np.uint8)
        clean[:, 100:] = 1
        noisy = clean.copy()
        noisy[10::20, 10:100:20] = 2  # 50 single pixels; a plain mean of the areas would fall 26-fold
        assert object_size(noisy) > 0.8 * object_size(clean)

    def test_quartiles_by_rank(self):
        groups = size_groups([0.5, 0.1, np.nan, 0.4, 0.2, 0.3, 0.9, 0.8, 0.7])
        assert groups.tolist() == [2, 0, -1, 1, 0, 1, 3, 3, 2]
        assert size_groups([0.1, 0.2, 0.3, 0.4]).max() == 1 and size_groups([0.1]).tolist() == [0]
        assert size_groups([np.nan]).tolist() == [-1]
        assert size_group_name(0) == "quartile 1, smallest objects" and size_group_name(1) == "quartile 2"


class TestFigures:
    @pytest.mark.parametrize("depth", [3, 16, 33])
    def test_files_of_every_depth(self, tmp_path, depth):
        space = RoutingSpace(depth)
        rng = np.random.default_rng(0)
        share = rng.random(space.legal.shape) * (rng.random(space.legal.shape) < 0.6) * space.legal
        figures.edge_frequency(tmp_path / "a.png", space, share, 10)
        figures.edge_strength(tmp_path / "b.png", space, share, share, 10)
        for count in (1, 4):
            groups = [(f"group {n}: 3 images\nsize 3 %", share**n) for n in range(1, count + 1)]
            figures.group_frequencies(tmp_path / f"c{count}.svg", space, groups)
        picture = np.zeros((40, 60, 3), dtype=np.uint8)
        panel = (picture, picture, share, "a_very_long_name_of_a_picture " * 3)
        figures.extreme_routes(tmp_path / "d.png", space, {"Cheapest": [panel] * 2, "Dearest": [panel]})
        assert {p.name for p in tmp_path.iterdir()} == {"a.png", "b.png", "c1.svg", "c4.svg", "d.png"}
        assert all(Image.open(tmp_path / name).width < 4000 for name in ("a.png", "b.png", "d.png"))

    def test_nothing_to_draw_is_refused(self, tmp_path):
        for draw, what in (
            (figures.group_frequencies, []),
            (figures.extreme_routes, {}),
            (figures.extreme_routes, {"": []}),
        ):
            with pytest.raises(ValueError, match="at least one"):
                draw(tmp_path / "a.png", SPACE, what)
        with pytest.raises(ValueError, match="the space needs"):
            figures.edge_frequency(tmp_path / "a.png", SPACE, np.zeros((2, 2, 2)), 3)
        assert not list(tmp_path.iterdir())


@pytest.fixture
def checkpoint(tmp_path):
    return scenes_checkpoint(tmp_path / "net")


@pytest.fixture
def own_data(tmp_path, capsys):
    folder = tmp_path / "data"
    assert run(["make-data", "scenes", folder, "--train=1", "--val=9", "--size=[48,64]"], capsys)[0] == 0
    return folder, ["--data.name=folder", f"--data.root={folder}", "--data.workers=0"]


def test_routes_over_scenes_by_preset_and_their_common_route(tmp_path, checkpoint, capsys):
    out = tmp_path / "out"
    code, text, _ = run(["routes", checkpoint, *SCENES, "--permutations=200", "--common=0.6", "--output", out], capsys)
    assert code == 0 and "follow the preset" in text and "large" in text
    assert "edges open in 60 % of the images" in text
    assert {path.name for path in out.iterdir()} == FILES | {"common_route.json"}
    result = json.loads((out / "routes.json").read_text())
    assert result["images"] == len(result["per_image"]) == 3
    assert result["command"][0] == "routes" and "machine" in result and "versions" in result
    costs = [image["cost_gmacs"] for image in result["per_image"]]
    assert result["cost_gmacs"]["mean"] == pytest.approx(np.mean(costs))
    assert (result["cost_gmacs"]["min"], result["cost_gmacs"]["max"]) == (min(costs), max(costs))
    assert {e["direction"] for e in result["edges"]} == {"up", "keep", "down"}
    assert {group["name"]: group["images"] for group in result["groups"]} == {"large": 3, "small": 3, "mixed": 3}
    assert set(result["group_tests"]) == {"activation", "open"}
    assert set(result["group_tests"]["open"]) == {"permuted"}, "scenes come in no order"
    assert all(Image.open(out / name).width > 300 for name in FILES if name.endswith(".png"))
    route = Route.from_json((out / "common_route.json").read_text())
    often = {(e["layer"], e["scale"], e["direction"]) for e in result["edges"] if e["frequency"] >= 0.6}
    assert set(route.named_edges) <= often and not route.dead_ends


def test_routes_over_your_own_data_by_object_size(tmp_path, checkpoint, own_data, capsys):
    folder, words = own_data
    (folder / "images" / "val" / "000004.png").write_bytes(b"no image")
    command = ["routes", checkpoint, *words, "--permutations=50", "--output"]
    code, text, _ = run([*command, tmp_path / "all"], capsys)
    assert code == 0 and "1 skipped" in text
    result = json.loads((tmp_path / "all" / "routes.json").read_text())
    assert result["skipped"] == 1 and "000004" not in {image["name"] for image in result["per_image"]}
    sizes = [group["object_size"] for group in result["groups"]]
    assert [group["images"] for group in result["groups"]] == [2, 2, 2, 2]
    assert all(small["max"] <= large["min"] for small, large in zip(sizes, sizes[1:], strict=False))
    code, text, _ = run([*command, tmp_path / "one", "--images=1"], capsys)
    assert code == 0 and "Too few images" in text
    assert {path.name for path in (tmp_path / "one").iterdir()} == FILES


def test_shares_of_images_of_several_sizes(tmp_path, capsys, own_data, monkeypatch):
    """A share is that of the image's own full cost: in the table, in the order of the cheapest and dearest, in figures,
    and in what choosing is worth."""
    folder, words = own_data
    for kind in ("images", "masks"):
        for path in sorted((folder / kind / "val").iterdir())[::3]:
            with Image.open(path) as image:
                image.resize((160, 128), Image.Resampling.NEAREST).save(path)
    network = scenes_checkpoint(tmp_path / "exits", gate="fixed", route="diagonal", exits=(0, 1))
    leave = iter([0, -1] * 20)
    model = routeseg.load(network)
    drawn = {}
    monkeypatch.setattr(routes.figures, "cost_histogram", lambda path, *how: drawn.setdefault("cost", how))
    monkeypatch.setattr(routes.figures, "extreme_routes", lambda path, space, rows: drawn.setdefault("rows", rows))

    def forward(images):
        return SkipEngine(model)(images, route=model.config.exit_routes[next(leave)])

    data = DataConfig(name="folder", root=str(folder), workers=0)
    survey = routes.survey_routes(model, forward, data, permutations=5)
    routes.draw_survey(survey, model, SkipEngine(model), tmp_path / "out")
    seen = survey.observation
    assert len(set(seen.sizes)) == 2 and sorted(seen.cost_share)[4:] == [*sorted(seen.cost_share)[4:5], *[1.0] * 4]
    full = [exit_costs(model, size)[-1] for size in seen.sizes]
    assert np.allclose(seen.cost_share, seen.evaluation.cost_macs / full) and np.allclose(
        drawn["cost"][1], np.divide(full, 1e9)
    )
    titles = [[panel[3] for panel in panels] for panels in drawn["rows"].values()]
    cheap, dear = ([float(re.search(r"([\d.]+) % of full", title)[1]) for title in row] for row in titles)
    assert max(cheap) < min(dear) == 100
    code, text, _ = run(["routes", network, *words, "--permutations=5", "--output", tmp_path / "cli"], capsys)
    assert code == 0
    result = json.loads((tmp_path / "cli" / "routes.json").read_text())
    assert result["worth_of_choice"]["spent"] == pytest.approx(result["cost_gmacs"]["mean_share"])
    print_survey(survey)
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    dearest = max(survey.as_dict()["per_image"], key=lambda one: one["cost_share"])
    assert f"{dearest['name']}, {dearest['cost_gmacs']:.3f} GMACs (100.0 % of the full network)" in said


def test_a_threshold_that_closes_everything(tmp_path, capsys):
    torch.manual_seed(0)
    model = DynamicRoutingNetwork(
        num_classes=10, depth=3, base_channels=8, stem_channels=8, class_names=CLASSES, palette=PALETTE
    )
    with torch.no_grad():
        for node in model.nodes.values():
            node.gate.score.bias.fill_(-9.0)
    closed = model.save(tmp_path / "closed")
    code, _, err = run(["routes", closed, *SCENES, "--common=0.5", "--output", tmp_path / "out"], capsys)
    assert code == 2 and "closes everything" in err and "Choose a lower one" in err


def test_routes_mistakes(tmp_path, checkpoint, own_data, capsys):
    folder, words = own_data
    static = scenes_checkpoint(tmp_path / "static", gate="fixed")
    four = DynamicRoutingNetwork(num_classes=4, depth=3, base_channels=8, stem_channels=8).save(tmp_path / "four")
    (tmp_path / "file").write_text("")
    for command, expected in (
        ([static, *SCENES], "static has no gates and no exits: its route is the same for every image"),
        ([four, *SCENES], "4 classes"),
        ([tmp_path / "nothing", *SCENES], "no checkpoint folder"),
        ([checkpoint, *SCENES, "--images=0"], "one image at least"),
        ([checkpoint, *SCENES, "--permutations=0"], "at least 1"),
        ([checkpoint, *SCENES, "--common=1.5"], "--common is 1.5"),
        ([checkpoint, *words, "--split=test"], "no folder"),
        ([checkpoint, *SCENES, "--output", tmp_path / "file" / "x"], "cannot write"),
    ):
        code, _, err = run(["routes", *command], capsys)
        assert code == 2 and expected in err, (command, err)
    for path in (folder / "images" / "val").iterdir():
        path.write_bytes(b"no image")
    code, _, err = run(["routes", checkpoint, *words, "--output", tmp_path / "out"], capsys)
    assert code == 2 and "none of the 9 images" in err and "check its files" in err
    assert not list((tmp_path / "out").iterdir()), "nothing is half-written"


def test_some_pictures_are_spread_over_the_whole_set():
    class Numbers:
        classes = None

        def __len__(self):
            return 11

        def read(self, index):
            raise AssertionError

        def name(self, index):
            return str(index)

    some = evenly_spread(Numbers(), 3)
    assert [some.name(i) for i in range(len(some))] == ["0", "5", "10"]
    assert len(evenly_spread(Numbers(), None)) == len(evenly_spread(Numbers(), 50)) == 11
