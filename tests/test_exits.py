"""Networks with exits: one network for any budget."""

import copy
import json
import math
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import routeseg
from routeseg import DynamicRoutingNetwork, LatencyTable, Route, SkipEngine, model_cost
from routeseg.budgets.asked import Asked
from routeseg.budgets.budgeted import Budgeted
from routeseg.budgets.calibration import calibrate, choose, price_table
from routeseg.budgets.worth import AllExits, mean_iou, oracle
from routeseg.cli import main
from routeseg.cost.latency import network_shape, stretches_at
from routeseg.cost.macs import exit_costs
from routeseg.data.config import DataConfig, open_data
from routeseg.data.loaders import evaluation_loader
from routeseg.engine.compiled import CompiledForward, is_compiled
from routeseg.engine.folding import FoldedForward
from routeseg.evaluation import evaluate
from routeseg.model.choice import LossChoice, ridge
from routeseg.model.exits import TABLE
from routeseg.model.request import exit_of
from routeseg.training.callbacks import ValidateAndSave
from routeseg.training.fused import Fused
from routeseg.training.gate_budget import Budget
from routeseg.training.recipe import Recipe
from routeseg.training.run import RunOptions
from routeseg.training.segmentation import train

NETWORK = {"depth": 6, "base_channels": 8, "stem_channels": 8, "gate": "fixed", "route": "diagonal", "exits": [0, 2, 4]}
SIZE = (64, 96)
DATA = DataConfig(image_size=SIZE, crop=(64, 64), train_images=24, val_images=12, batch_size=4, workers=0, seed=0)
# A training that says nothing about size.
LITTLE = {"depth": 3, "exits": [1], "route": None}
FEW = replace(DATA, image_size=(32, 64), crop=(32, 64), train_images=8, val_images=8)

needs_kernels, needs_bfloat16 = (
    pytest.mark.skipif(not is_compiled(dtype), reason=f"there are no kernels for {dtype} here")
    for dtype in (torch.float32, torch.bfloat16)
)


def network(**options) -> DynamicRoutingNetwork:
    torch.manual_seed(3)
    return DynamicRoutingNetwork(**{"num_classes": 10, **NETWORK, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint folder of a network that was trained for some steps, and calibrated."""
    output = tmp_path_factory.mktemp("exits")
    recipe = Recipe(
        iterations=20, warmup_steps=2, lr=0.1, precise_bn_batches=2, validate_every=20, save_every=20, log_every=5
    )
    train(network(), DATA, recipe, Budget(), RunOptions(output, progress=False))
    return output / "last"


@pytest.fixture
def model(folder) -> DynamicRoutingNetwork:
    return routeseg.load(folder)


@cache
def examples(split: str) -> list[dict]:
    """The images of DATA, as an evaluation gets them; only to be read."""
    return list(evaluation_loader(open_data(DATA, split)))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.cat([picture["image"] for picture in examples("val")])


def budgets(model) -> list[float]:
    least = float(model.exits.costs[0])
    return [least + share * (1 - least) for share in (0.0, 0.3, 0.6, 0.9, 1.0)]


class TestNetwork:
    def test_routes_end_at_the_exits(self, model):
        assert model.config.exits == (0, 2, 4, 6), "the last layer is an exit in any case"
        for exit, route in zip(model.config.exits, model.config.exit_routes, strict=True):
            assert route == Route(model.space, [edge for edge in model.route.edges if edge[0] <= exit]).check()

    def test_training_gives_the_logits_of_all_exits(self, images):
        """Those of the routes that end there, and it computes a cell once."""
        model, ran = network().train(), []
        model.node(0, 0).cell.register_forward_hook(lambda *_: ran.append(1))
        result = model(images)
        assert len(ran) == 1 and len(result.earlier) == 3
        for logits, route in zip((*result.earlier, result.logits), model.config.exit_routes, strict=True):
            assert torch.allclose(logits, model(images, route).logits, atol=1e-5)

    def test_kernels_of_training_agree(self, images):
        gradients = []
        for compute in (None, Fused()):
            model = network().train()
            model.compute = compute
            result = model(images)
            torch.stack([logits.square().mean() for logits in (*result.earlier, result.logits)]).sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert (gradients[0] - gradients[1]).norm() <= 1e-3 * gradients[0].norm()

    def test_every_parameter_learns(self, images):
        model = network().train()
        result = model(images)
        torch.stack([logits.square().mean() for logits in (*result.earlier, result.logits)]).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    @pytest.mark.parametrize("how", ["dense", "kernels", "eager"])
    def test_every_engine_is_the_route_that_it_returns(self, model, images, how):
        """For an image alone as in a batch, with one budget or one for each image."""
        forward = model if how == "dense" else SkipEngine(model, backend="auto" if how == "kernels" else how)
        exits = set()
        with torch.no_grad():
            for budget in (None, *budgets(model), np.linspace(*budgets(model)[::4], len(images)).tolist()):
                result = forward(images, budget=budget)
                expected = model(images, budget=budget)
                assert torch.equal(result.gates, expected.gates)
                assert torch.allclose(result.logits, expected.logits, atol=1e-4)
                for number, gates in enumerate(result.gates):
                    route = Route.from_gates(model.space, gates.numpy())
                    exits.add(model.config.exit_routes.index(route))
                    given = forward(images[number : number + 1], route)
                    assert torch.allclose(given.logits, result.logits[number : number + 1], atol=1e-4)
                    assert torch.equal(given.gates[0], gates)
        assert exits == {0, 1, 2, 3}, "the images should leave at all exits"

    @pytest.mark.parametrize("route", ["fcn-32s", "u-net"])
    def test_scales_that_a_route_leaves(self, images, route):
        """What images that have left bring along at other scales is no matter of those that go on."""
        model = network(route=route, exits=[2, 3, 4, 5])
        pictures = examples("val")
        for decoder in model.exits.decoders:
            decoder.predictor.weight.data.normal_()  # images differ in what is found
        calibrate(model, pictures, pictures)
        model.eval()
        asked = np.linspace(float(model.exits.costs[0]) + 0.01, 1, len(images)).tolist()
        engine = SkipEngine(model)
        with torch.no_grad():
            together = model(images, budget=asked)
            alone = [model(images[i : i + 1], budget=asked[i]) for i in range(len(images))]
        assert len({tuple(gates.flatten().tolist()) for gates in together.gates}) > 1
        assert torch.equal(torch.cat([one.gates for one in alone]), together.gates)
        assert torch.allclose(torch.cat([one.logits for one in alone]), together.logits, atol=1e-4)
        assert torch.equal(engine(images, budget=asked).gates, together.gates)

    def test_a_route_is_a_static_network(self, model, images):
        for route in model.config.exit_routes:
            static = model.specialize(route)
            assert static.exits is None
            with torch.no_grad():
                assert torch.allclose(static(images).logits, model(images, route).logits, atol=1e-5)

    @pytest.mark.parametrize("compute", [None, Fused()], ids=["plain", "fused"])
    def test_given_routes_can_be_trained(self, images, compute):
        model = network().train()
        model.compute = compute
        routes = [model.config.exit_routes[number % 4] for number in range(len(images))]
        result = model(images, routes)
        result.logits.square().mean().backward()
        assert not result.earlier and all(decoder.predictor.weight.grad is not None for decoder in model.exits.decoders)

    def test_any_route_runs_to_the_exit_behind_it(self, model, images):
        engine, rng = SkipEngine(model), np.random.default_rng(0)
        for last, exit in ((0, 0), (1, 2), (3, 4), (5, 6), (6, 6)):
            some = [edge for edge in model.route.edges if edge[0] <= last and rng.random() < 0.8]
            route = Route(model.space, {*some, *[edge for edge in model.route.edges if edge[0] == last]})
            with torch.no_grad():
                dense, skipping = model(images, route), engine(images, route)
            assert dense.gates.any() and not (dense.gates[0] > torch.from_numpy(route.to_gates())).any()
            assert torch.equal(dense.gates, skipping.gates)
            assert torch.allclose(dense.logits, skipping.logits, atol=1e-4)
            assert exit_of(model.config, route) == model.config.exits.index(exit)

    def test_a_route_and_a_budget_are_refused(self, model, images):
        with pytest.raises(ValueError, match="a route or a budget, not both"):
            model(images, model.route, budget=0.5)

    @pytest.mark.parametrize(
        ("budget", "message"),
        [
            (0, "no share of the full network"),
            (-0.5, "no share"),
            (1.2, "no share"),
            (float("nan"), "no share"),
            (0.01, "cannot be kept: the cheapest route costs"),
            ([0.5, 0.6], "2 budgets for 12 images"),
            ("40%", "is no number"),
        ],
    )
    def test_budgets_that_cannot_be_kept(self, model, images, budget, message):
        for forward in (model, SkipEngine(model)):
            with pytest.raises(ValueError, match=message):
                forward(images, budget=budget)

    @needs_kernels
    @pytest.mark.parametrize("part", ["glance", "features", "weight", "classes"])
    def test_kernels_refuse_what_they_cannot_glance_at(self, model, images, part):
        forward, request = CompiledForward(model, torch.float32), model.request(1, budget=0.6)
        forward(images[:1], request)
        exit = forward._packed.network.exit[0]
        if part == "classes":  # fewer scores than classes
            exit.glance.outputs = exit.predictor.outputs = 0
        elif part == "glance":
            exit.glance.weights = None
        else:
            setattr(exit, part, None if part == "weight" else 1000)
        with pytest.raises(RuntimeError, match="the compiled kernels failed in a forward of 64x96 pixels: [a-z]"):
            forward(images[:1], request)

    @pytest.mark.parametrize("backend", ["auto", "eager"])
    def test_sizes_that_are_padded(self, model, backend):
        """A glance's windows at the edges are smaller there."""
        torch.manual_seed(1)
        images = torch.rand(8, 3, 75, 135)
        asked = np.linspace(*budgets(model)[::4], len(images)).tolist()
        with torch.no_grad():
            expected = model(images, budget=asked)
        result = SkipEngine(model, backend=backend)(images, budget=asked)
        assert torch.equal(result.gates, expected.gates) and torch.allclose(result.logits, expected.logits, atol=1e-4)

    @needs_bfloat16
    def test_bfloat16(self, model, images):
        """Nearly all images leave where they do in float32."""
        engine = SkipEngine(copy.deepcopy(model).to(torch.bfloat16))
        same = [
            torch.equal(a, b)
            for budget in budgets(model)
            for a, b in zip(
                engine(images, budget=budget).gates, SkipEngine(model)(images, budget=budget).gates, strict=True
            )
        ]
        assert np.mean(same) > 0.8

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_without_kernels(self, model, images, dtype):
        """Maps are rounded; what decides at the exits, and its prices, are not."""
        half, forward = FoldedForward(model, dtype), SkipEngine(model)
        assert {node.cell["sep_conv_3x3"][0][0].weight.dtype for node in half.model.nodes.values()} == {dtype}
        for name, values in model.exits.state_dict().items():
            if not name.startswith("decoders"):
                assert torch.equal(half.model.exits.state_dict()[name], values)
        same = []
        for budget in budgets(model):
            result = half(images, model.request(len(images), budget=budget))
            expected = forward(images, budget=budget)
            assert result.logits.dtype == result.gates.dtype == torch.float32
            for number, gates in enumerate(result.gates):
                same.append(torch.equal(gates, expected.gates[number]))
                if same[-1]:
                    error = (result.logits[number] - expected.logits[number]).abs().max()
                    assert error < 0.05 * expected.logits[number].abs().max()
        assert np.mean(same) > 0.8

    @pytest.mark.parametrize("backend", ["auto", "eager"])
    def test_images_that_are_not_finite(self, model, backend):
        with pytest.raises(ValueError, match="finite"):
            SkipEngine(model, backend=backend)(torch.full((1, 3, 64, 64), float("nan")), budget=0.6)

    def test_networks_without_exits_take_no_budget(self, images):
        with pytest.raises(ValueError, match="takes no budget"):
            network(exits=None).eval()(images, budget=0.5)

    def test_it_must_be_calibrated(self, images):
        model = network().eval()
        with pytest.raises(ValueError, match="run `routeseg calibrate`"):
            model(images, budget=0.5)
        assert (model(images).gates[:, -1, :, 1] > 0).all(), "without a budget all images run all layers"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"exits": [7]}, "from 0 to 6"),
            ({"exits": [-1]}, "from 0 to 6"),
            ({"exits": ["a"]}, "whole numbers"),
            ({"exits": 3}, "must be a list"),
            ({"exits": []}, "name a layer before the last one"),
            ({"exits": [3, 4], "route": [[0, 0, "keep"]]}, "no open path in the layers"),
            ({"gate": "soft", "route": None}, "has no gates beside them"),
        ],
    )
    def test_configurations_that_make_no_network(self, options, message):
        with pytest.raises(ValueError, match=message):
            network(**options)

    def test_a_glance_is_the_decoder_on_small_maps(self, model):
        """Of features that are the same everywhere it sees what the decoder sees; a size need not be a multiple."""
        torch.manual_seed(0)
        for decoder, reached in zip(model.exits.decoders, model.exits.reached, strict=False):
            maps = [
                torch.randn(1, 8 << s, 1, 1).expand(2, -1, 88 >> s, 72 >> s) for s, flag in enumerate(reached) if flag
            ]
            zeros = [torch.zeros(2, 8 << s, 88 >> s, 72 >> s) for s in range(len(maps), 4)]
            whole = decoder([*maps, *zeros])[..., 100:101, 100:101]  # far from the edges
            small = decoder.glance(maps)
            assert small.shape == (2, 10, 22, 18) and torch.allclose(small, whole.expand_as(small), atol=1e-5)

    def test_what_a_glance_sees(self, model, images):
        """The share of each class, near that of the whole logits, and the entropy where it is."""
        model.exits.decoders[2].glance = lambda maps: logits
        logits = torch.tensor([[[[0.0, 9.0]], [[0.0, -9.0]]]])
        share, entropy = model.exits.see(2, [])[0].split(2)
        sure = torch.tensor([9.0, -9.0]).softmax(0)
        assert torch.allclose(share, (torch.tensor([0.5, 0.5]) + sure) / 2)
        rest = -(sure * sure.log()).sum()
        assert torch.allclose(entropy, (torch.tensor([0.5, 0.5]) * np.log(2) + sure * rest) / 2)
        del model.exits.decoders[2].glance
        with torch.no_grad():
            result, kept = model.all_exits(images)
            seen = model.exits.see(2, kept[2])[:, :10]
        whole = result.earlier[2].softmax(1).mean((2, 3))
        assert np.corrcoef(seen.flatten(), whole.flatten())[0, 1] > 0.9


def predicting(exits: int) -> SimpleNamespace:
    """So many exits and the last one, whose rule sees the losses themselves."""
    choice = LossChoice(replace(network().config, exits=range(exits)))
    for exit in range(exits):
        choice[exit] = torch.nn.Identity()
    return SimpleNamespace(gates=choice)


class TestCalibration:
    def test_ridge(self):
        """It finds what made the targets, and of features that tell nothing or never change it expects nothing."""
        rng = np.random.default_rng(0)
        features, weights = rng.normal(size=(60, 4)), rng.normal(size=(4, 2))
        center, found = ridge(features, features @ weights + 0.1 * rng.normal(size=(60, 2)))
        assert np.allclose(center, features.mean(0)) and np.allclose(found.T, weights, atol=0.1)
        _, found = ridge(np.c_[features, np.ones(60)], rng.normal(size=(60, 3)))
        assert np.abs(found).max() < 0.05 and (found[:, 4] == 0).all()

    def test_a_picture_leaves_where_nothing_later_is_worth_its_price(self):
        predicted = [np.float32([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0]]), np.float32([[2.0, 1.0], [1.0, 0.5]])]
        costs, exits = np.array([0.2, 0.5, 1.0]), predicting(2)
        for price, at in ((0.0, [2, 0]), (1.5, [2, 0]), (3.0, [1, 0]), (100.0, [0, 0]), (-100.0, [2, 2])):
            assert choose(exits, predicted, costs, price).tolist() == at

    def test_the_table_goes_from_the_dearest_to_the_cheapest(self):
        rng = np.random.default_rng(0)
        losses = rng.normal(size=(200, 3)) * 0.1 + (0.9, 0.6, 0.5)
        predicted, costs = [losses, losses[:, 1:]], np.array([0.2, 0.5, 1.0])
        prices, frequencies = price_table(predicting(2), predicted, costs)
        assert prices.shape == (TABLE,) and (np.diff(prices) >= 0).all()
        assert np.allclose(frequencies.sum(1), 1) and frequencies[0, 2] == 1 and frequencies[-1, 0] == 1
        means = frequencies @ (0.2, 0.5, 1.0)
        assert np.allclose(means[1:-1], np.linspace(1.0, 0.2, TABLE - 2), atol=0.02)

    def test_budgets_are_kept(self, model, images):
        """Over the images that they were set with, whose labels are not read; dearer budgets cost more."""
        pictures = [{**picture, "labels": None} for picture in examples("val")]
        assert calibrate(model, examples("train"), pictures) == 24
        table = model_cost(model, SIZE)
        spent = []
        for budget in budgets(model):
            with torch.no_grad():
                spent.append(float(table.of_gates(model(images, budget=budget).gates).mean() / table.full))
        assert spent == sorted(spent)
        assert spent[0] == pytest.approx(budgets(model)[0], abs=1e-6) and spent[-1] == pytest.approx(1)
        assert spent == pytest.approx(budgets(model), abs=0.06), "12 images cannot cost every mean"

    def test_budgets_are_those_of_the_other_pictures(self, model):
        """What exits expect comes from the labels, what budgets cost from the others."""
        train, val = (examples(split) for split in ("train", "val"))
        other = copy.deepcopy(model)
        calibrate(model, train, train)
        calibrate(other, train, val)
        for one, two in zip(model.exits.gates.buffers(), other.exits.gates.buffers(), strict=True):
            assert torch.equal(one, two)
        assert not torch.equal(model.exits.frequencies, other.exits.frequencies)
        assert (other.exits.frequencies * 12).round().allclose(other.exits.frequencies * 12, atol=1e-4)

    def test_a_calibration_that_fails_changes_nothing(self, model):
        before, model = [tensor.clone() for tensor in model.exits.calibration()], model.train()
        with pytest.raises(ValueError, match="0 images to set budgets with are too few"):
            calibrate(model, examples("val"), [])
        assert all(torch.equal(a, b) for a, b in zip(before, model.exits.calibration(), strict=True)) and model.training

    def test_what_pictures_lose_is_the_loss_of_the_set(self):
        """Of many images whose exits differ little, the mean is the difference in mIoU; of one, the exact change."""
        rng = np.random.default_rng(0)
        confusion = rng.integers(40, 50, (200, 1, 3, 3)) + 300 * np.eye(3, dtype=int)
        change = np.array([-8, 0, 5]) + rng.integers(-2, 3, (200, 3)) * (1, 0, 1)
        confusion = confusion + change[..., None, None] * np.eye(3, dtype=int)
        seen = AllExits.of(confusion)
        scores = [mean_iou(seen, np.full(200, exit)) for exit in range(3)]
        lost = seen.lost()
        assert np.allclose(lost.mean(0), scores[1] - np.array(scores), atol=2e-4) and lost[:, 0].std() > 0
        for number, exit in ((0, 0), (7, 2)):
            alone = np.where(np.arange(200) == number, exit, 1)
            assert lost[number, exit] == pytest.approx(200 * (scores[1] - mean_iou(seen, alone)))
        unseen = np.pad(confusion, ((0, 0), (0, 0), (0, 1), (0, 1)))
        assert np.allclose(AllExits.of(unseen).lost(), lost), "a class that never occurs does not count"
        unseen[:, :, 0, 3] = 5  # it is predicted, though
        everywhere = np.ones(200, dtype=int)
        total = unseen[:, 1].sum(0)[:3]
        expected = np.diag(total) / (total.sum(0)[:3] + total.sum(1) - np.diag(total))
        assert mean_iou(AllExits.of(unseen), everywhere) == pytest.approx(expected.mean()), "nor does it count"

    def test_the_oracle_costs_what_was_spent(self):
        rng, costs = np.random.default_rng(1), np.array([0.2, 0.5, 1.0])
        loss = rng.random((500, 3)) + (0.4, 0.2, 0.0)
        for cost in (0.3, 0.5, 0.8):
            assert costs[oracle(loss, costs, cost)].mean() == pytest.approx(cost, abs=0.005)

    def test_pictures_without_labels_do_not_count(self, model):
        pictures = examples("val")
        blank = {**pictures[0], "labels": torch.full_like(pictures[0]["labels"], 255)}
        assert calibrate(model, pictures, pictures) == 12
        found = [tensor.clone() for tensor in model.exits.calibration()]
        assert calibrate(model, [blank, *pictures, blank], pictures) == 12
        assert all(torch.equal(a, b) for a, b in zip(found, model.exits.calibration(), strict=True))

    def test_too_few_pictures_or_no_exits(self, model):
        with pytest.raises(ValueError, match="2 images with labels are too few"):
            calibrate(model, examples("val")[:2], [])
        with pytest.raises(ValueError, match="nothing to calibrate"):
            calibrate(network(exits=None), [], [])


class TestAsked:
    @pytest.mark.parametrize(
        ("text", "value", "unit"),
        [("40%", 0.4, "share"), ("0.4", 0.4, "share"), ("0.5GMACs", 5e8, "macs"), ("3 mmacs", 3e6, "macs")],
    )
    def test_units(self, text, value, unit):
        asked = Asked.parse(text)
        assert asked.value == pytest.approx(value) and asked.unit == unit

    @pytest.mark.parametrize("number", [0.4, np.float32(0.4), np.array(0.4), torch.tensor(0.4), Fraction(2, 5)])
    def test_numbers_of_any_kind_are_shares(self, number):
        asked = Asked.parse(number)
        assert asked.value == pytest.approx(0.4) and asked.unit == "share"
        assert Asked.parse(np.int64(1)).value == 1

    @pytest.mark.parametrize("number", [40, np.int64(40), np.float32(40)])
    def test_percents_are_no_number(self, number):
        with pytest.raises(ValueError, match='40.*a share of the full network.*40 percent is the text "40%"'):
            Asked.parse(number)

    @pytest.mark.parametrize("number", [0, -0.5, math.nan, math.inf, 10**400, True, [0.4, 0.5], b"x", np.ones(3)])
    def test_numbers_that_are_no_share(self, number):
        with pytest.raises(ValueError, match="is a share of the full network, above 0 up to 1"):
            Asked.parse(number)

    @pytest.mark.parametrize("text", ["", "much", "-1", "0", "0%", "nan", "inf", "1001%", "1.5", "1.2.3%", "5 hours"])
    def test_what_is_no_budget(self, text):
        with pytest.raises(ValueError, match="give a share of the full network"):
            Asked.parse(text)

    def test_milliseconds_need_a_table(self):
        with pytest.raises(ValueError, match="need --latency"):
            Asked.parse("25ms")

    def test_macs_are_of_the_size(self, model):
        """The share that costs so many MACs in the mean, at each size of image."""
        for size in (SIZE, (128, 160)):
            full = model_cost(model, size).full
            price = Asked.parse(f"{0.7 * full / 1e6}MMACs").look(model, size).price
            assert model.exits.table.cost_at(price) == pytest.approx(0.7, abs=0.01)

    def test_milliseconds_of_a_machine_of_another_speed(self, model):
        """Twice the time of everything, and the same share for twice the milliseconds; the cheapest and the dearest
        routes are the ends."""
        table = LatencyTable(
            SIZE, "cpu", "float32", network_shape(model.config), np.array([[0, 3, 3], [0, 1, 1], [0, 2, 2], [0, 4, 4]])
        )
        slower = replace(table, stretches_ms=2 * table.stretches_ms)
        assert table.exits_ms.tolist() == [3, 4, 6, 10]
        shares = [
            model.exits.table.cost_at(Asked.parse(f"{ms}ms", one, "t.json").look(model, SIZE).price)
            for ms, one in ((6.5, table), (13, slower))
        ]
        assert shares[0] == pytest.approx(shares[1]) and model.exits.costs[0] < shares[0] < 1
        most = Asked.parse("20ms", table).look(model, SIZE).price
        assert model.exits.table.cost_at(most) == 1, "more than it can spend"
        with pytest.raises(
            ValueError, match="ms cannot be kept: the cheapest route costs 3 ms, the full network 10 ms"
        ):
            Asked.parse("1.5ms", table).look(model, SIZE)
        half = replace(table, precision="bfloat16")
        with pytest.raises(ValueError, match="is for bfloat16, the network runs in float32"):
            Budgeted(SkipEngine(model), model, Asked.parse("9ms", half, "t.json"))
        for other in (network(base_channels=16), network(exits=[0, 2])):
            with pytest.raises(ValueError, match="t.json is the latency of another network"):
                Budgeted(SkipEngine(other), other, Asked.parse("9ms", table, "t.json"))

    def test_milliseconds_at_other_sizes(self, model, tmp_path):
        """Between two tables linear in the pixels, beyond them in proportion."""
        times = np.array([[0, 3, 3], [0, 1, 1], [0, 2, 2], [0, 4, 4]])
        small = LatencyTable((64, 64), "cpu", "float32", network_shape(model.config), times)
        large = replace(small, size=(128, 128), stretches_ms=3 * times)
        for number, one in enumerate((large, small, replace(small, precision="bfloat16"))):
            one.write(tmp_path / f"latency_{number}.json")
        tables = LatencyTable.read_all(tmp_path)
        for size, factor in (
            ((64, 64), 1), ((50, 60), 1), ((128, 128), 3), ((64, 160), 2), ((256, 128), 6), ((32, 64), 0.5)
        ):  # fmt: skip
            found = stretches_at(tables[:2], model.config, size, "t")
            assert np.allclose(found, factor * small.stretches_ms), size
        engine = Budgeted(SkipEngine(model), model, Asked.parse("20ms", tables, tmp_path))
        assert [one.precision for one in engine.asked.latency] == ["float32"] * 2
        for size in ((64, 64), (96, 128), (128, 128)):
            engine(torch.rand(1, 3, *size))
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="no latency table in .*empty"):
            LatencyTable.read_all(tmp_path / "empty")

    def test_an_engine_that_keeps_it(self, model, images):
        engine = Budgeted(SkipEngine(model), model, Asked.parse("70%"))
        with torch.no_grad():
            assert torch.equal(engine(images).gates, model(images, budget=0.7).gates)
        with pytest.raises(ValueError, match="takes no budget"):
            Budgeted(None, network(exits=None), Asked.parse("70%"))


class TestCommands:
    WORDS = ("--data.image_size=[64,96]", "--data.val_images=12", "--data.train_images=24", "--data.workers=0")

    def test_evaluate_keeps_the_budget(self, folder, tmp_path, capsys):
        costs = []
        for budget in ("60%", "90%"):
            file = tmp_path / "e.json"
            assert main(["evaluate", str(folder), *self.WORDS, f"--budget={budget}", f"--json={file}"]) == 0
            costs.append(json.loads(file.read_text())["cost_gmacs"]["mean_share"])
            assert json.loads(file.read_text())["budget"] == budget
        assert costs[0] < costs[1] < 1

    def test_calibrate_writes_the_checkpoint(self, folder, tmp_path, capsys):
        model = routeseg.load(folder)
        model.exits.frequencies.zero_()
        own = model.save(tmp_path / "own")
        assert main(["evaluate", str(own), *self.WORDS, "--budget=60%"]) == 2
        assert "run `routeseg calibrate`" in capsys.readouterr().err
        assert main(["calibrate", str(own), *self.WORDS]) == 0
        assert "calibrated with 24 images" in capsys.readouterr().out
        for one, other in zip(*(routeseg.load(name).exits.gates.buffers() for name in (own, folder)), strict=True):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-3), "the training reads the same images"

    def test_images_that_are_too_large_for_a_budget_are_skipped(self, folder, tmp_path, capsys):
        """In MACs; the others are segmented."""
        for number, size in enumerate(("[64,96]", "[256,512]")):
            main(["make-data", "scenes", str(tmp_path / f"d{number}"), "--train=1", "--val=1", f"--size={size}"])
        images = [str(next((tmp_path / f"d{number}" / "images").rglob("*.png"))) for number in (0, 1)]
        macs = 0.8 * model_cost(routeseg.load(folder), SIZE).full / 1e6
        words = ["predict", str(folder), *images, f"--output={tmp_path / 'out'}", f"--budget={macs}MMACs"]
        assert main(words) == 2
        assert "MMACs cannot be kept" in capsys.readouterr().out
        assert len(list((tmp_path / "out").rglob("*_labels.png"))) == 1

    def test_predict_and_export(self, folder, tmp_path, capsys):
        main(["make-data", "scenes", str(tmp_path / "data"), "--train=1", "--val=1", "--size=[64,96]"])
        image = str(next((tmp_path / "data" / "images").rglob("*.png")))
        costs = []
        for budget in ("50%", "100%"):
            output = tmp_path / budget
            assert main(["predict", str(folder), image, f"--output={output}", f"--budget={budget}"]) == 0
            written = json.loads(next(output.glob("*.json")).read_text())
            costs.append(written["cost_gmacs"])
            levels, macs = np.array(written["levels_of_full"]), exit_costs(routeseg.load(folder), SIZE)
            assert np.allclose(levels, macs / macs[-1]) and np.isclose(written["share_of_full"], levels).any()
        assert costs[0] < costs[1]
        steps = ", ".join(f"{100 * level:.3g}" for level in written["levels_of_full"])
        assert f"an image costs one of {steps} % of the full network" in capsys.readouterr().out
        assert main(["export", str(folder), str(tmp_path / "n.onnx"), "--route=exit-2"]) == 0
        assert main(["predict", str(tmp_path / "n.onnx"), image, "--budget=40%"]) == 2
        assert "n.onnx takes no budget, it has one cost" in capsys.readouterr().err

    def test_routes_over_a_data_set(self, folder, tmp_path, capsys):
        words = [*self.WORDS, f"--output={tmp_path}", "--budget=60%", "--images=4", "--permutations=20"]
        assert main(["routes", str(folder), *words]) == 0
        worth = json.loads((tmp_path / "routes.json").read_text())["worth_of_choice"]
        assert 0 < worth["spent"] < 1 and worth["oracle"] > 0 and "as images choose" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--budget=0"], "give a share"),
            (["--budget=1%"], "cannot be kept"),
            (["--budget=5ms"], "need --latency"),
            (["--latency=t.json"], "only applies to --budget in ms"),
            (["--budget=40%", "--budget=huge"], "give a share"),
            (["--budget=5ms", "--latency=none.json"], "no latency table none.json"),
        ],
    )
    def test_mistakes(self, folder, capsys, words, message):
        assert main(["evaluate", str(folder), *self.WORDS, *words]) == 2
        assert message in capsys.readouterr().err

    def test_few_pictures_train_and_are_told(self, tmp_path, capsys):
        """They serve for all of the calibration; one line says so."""
        words = ["train", f"--output={tmp_path / 'run'}", "--model.gate=fixed", "--model.exits=[2]", *self.WORDS]
        words += ["--model.depth=3", "--data.train_images=3", "--data.val_images=3", "--recipe.precise_bn_batches=1"]
        assert main([*words, "--recipe.iterations=1"]) == 0
        err = capsys.readouterr().err
        assert err.count("too few") == 1 and "3 training images are too few" in err
        assert routeseg.load(tmp_path / "run" / "last").exits.calibrated

    @pytest.mark.usefixtures("no_report")
    def test_with_few_validation_pictures_the_training_pictures_set_budgets(self, tmp_path, capsys, monkeypatch):
        images = []
        monkeypatch.setattr(
            "routeseg.budgets.calibration._set_budgets", lambda model, exits, batches, *_: images.extend(batches())
        )
        words = ["train", *self.WORDS, "--model.gate=fixed", "--model.exits=[2]", "--model.depth=3"]
        words += [
            "--model.base_channels=4",
            "--model.stem_channels=4",
            "--data.crop=[32,64]",
            "--data.train_images=9",
            "--recipe.iterations=1",
            "--recipe.precise_bn_batches=1",
        ]
        for count, sets in ((3, 9), (8, 8)):
            images.clear()
            assert main([*words, f"--data.val_images={count}", f"--output={tmp_path / str(count)}"]) == 0
            assert len(images) == sets
            assert ("3 validation images are too few" in capsys.readouterr().err) == (count == 3)


def test_a_training_with_exits_resumes_to_the_same_weights(tmp_path):
    recipe = Recipe(iterations=4, warmup_steps=1, precise_bn_batches=1, validate_every=2, save_every=2, log_every=1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(network(**LITTLE), FEW, recipe, Budget(), RunOptions(whole, progress=False))
    half = copy.deepcopy(recipe)
    model = network(**LITTLE)
    with pytest.raises(KeyboardInterrupt):
        model.register_forward_hook(_stop_at(model, 3))
        train(model, FEW, half, Budget(), RunOptions(parts, progress=False))
    found = train(network(**LITTLE), FEW, recipe, Budget(), RunOptions(parts, resume=True, progress=False))
    assert found.found is not None
    one, other = (routeseg.load(folder / "last").state_dict() for folder in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_average_of_the_weights_keeps_its_calibration(tmp_path, monkeypatch):
    """Between validations, too: a network that is saved then takes budgets."""
    recipe = Recipe(
        iterations=4, warmup_steps=1, precise_bn_batches=1, validate_every=2, save_every=1, log_every=1, ema_decay=0.5
    )
    saved, save = [], ValidateAndSave._save
    monkeypatch.setattr(
        ValidateAndSave, "_save", lambda self, *a: (saved.append(a[1].network.exits.calibrated), save(self, *a))
    )
    train(network(**LITTLE), FEW, recipe, Budget(), RunOptions(tmp_path / "run", progress=False))
    assert saved == [False, True, True, True]


def _stop_at(model, step):
    """A hook that ends the training in its step number `step`."""
    seen = []

    def hook(module, args, result):
        seen.append(module.training)
        if sum(seen) > step + 2:  # precise BatchNorm runs a batch in training mode, too
            raise KeyboardInterrupt

    return hook


def test_scores_depend_on_the_budget_alone(model):
    """Two evaluations at one budget are the same, whatever was asked before."""
    engine = SkipEngine(model)
    asked = ("50%", "95%", "50%")
    found = [evaluate(model, examples("val"), Budgeted(engine, model, Asked.parse(text))).miou for text in asked]
    assert found[0] == found[2]
