"""A closer look: an image is looked at twice, the second time where the first look was unsure."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import routeseg
from conftest import uneven, uneven_images
from pictures import noise
from routeseg import Segmenter, SkipEngine, model_cost
from routeseg.budgets.asked import Asked
from routeseg.budgets.budgeted import Budgeted, Steered
from routeseg.budgets.calibration import calibrate, with_sizes
from routeseg.cli import main
from routeseg.config import NetworkConfig
from routeseg.cost.latency import LatencyTable, network_shape
from routeseg.data.config import DataConfig, open_data
from routeseg.data.loaders import evaluation_loader
from routeseg.data.scenes import CLASSES, PALETTE
from routeseg.description import fingerprint
from routeseg.engine.compiled import is_compiled
from routeseg.engine.profiling import profile
from routeseg.errors import BudgetNotKept
from routeseg.model import grid
from routeseg.model.closer import enlarged_by, over_places
from routeseg.model.prices import Prices
from routeseg.space import FIRST_LOOK
from routeseg.survey.effort import EffortNotes
from routeseg.training.gate_budget import Budget
from routeseg.training.recipe import Recipe
from routeseg.training.run import RunOptions
from routeseg.training.segmentation import train

TWICE = (0.5, 1.0)
DATA = DataConfig(image_size=(96, 128), crop=(96, 128), train_images=8, val_images=8, batch_size=2, workers=0, seed=0)


def network(**options) -> Segmenter:
    """Drawn weights that are sure of some places and not of others."""
    torch.manual_seed(3)
    known = {
        **{"num_classes": 10, "depth": 4, "base_channels": 8, "gate": "fixed", "route": "diagonal", "exits": [0, 2]},
        **{"place": 32, "backbone": "efficientnet_lite0", "sizes": [0.5, 1, list(TWICE)]},
        **{"class_names": CLASSES, "palette": PALETTE},
    }
    return uneven(Segmenter(**(known | options)).eval().requires_grad_(False))


def images(batch: int = 2, height: int = 160, width: int = 200) -> torch.Tensor:
    return uneven_images(batch, height, width, side=40)


def price_of(model, batch, share: float, size=TWICE) -> float:
    """At which about this share of the places is not looked at again, halfway between two of them."""
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "over_places", lambda *what: seen.append(over_places(*what)) or seen[-1])
        model(batch, price=100.0, size=size)
    need = seen[0].flatten().sort().values
    last = min(int(share * len(need)), len(need) - 2)
    return float(need[last : last + 2].mean())


class TestLook:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        return network()

    def test_a_map_in_another_size_is_bilinear(self):
        map = torch.rand(2, 3, 5, 7)
        expected = torch.nn.functional.interpolate(map, scale_factor=2, mode="bilinear")
        assert torch.allclose(enlarged_by(map, (2.0, 2.0), (10, 14)), expected, atol=1e-6)
        beyond = enlarged_by(map, (2.0, 2.0), (12, 16))
        assert torch.allclose(beyond[..., :10, :14], expected, atol=1e-6)
        assert torch.equal(beyond[..., 10:, :], beyond[..., 9:10, :].expand_as(beyond[..., 10:, :]))

    def test_how_unsure_a_place_is(self, model):
        scores = torch.zeros(1, 10, 8, 12)  # at a quarter of 32x48, looked at in twice the size: places of 32 there
        scores[:, 0, :4] = 50.0
        found = over_places(model.exits.gates.unsure(scores), (2.0, 2.0), 32, (2, 3))
        assert torch.allclose(found[0, 0], torch.zeros(3), atol=1e-6)
        assert torch.allclose(found[0, 1], torch.full((3,), float(np.log(10))), atol=1e-5)
        beyond = over_places(model.exits.gates.unsure(scores), (2.0, 2.0), 32, (3, 3))
        assert beyond[0, 2].eq(0).all(), "the first look has nothing of it"

    def test_a_pixel_counts_as_the_classes_that_it_may_be_of(self):
        choice, scores = network().exits.gates, torch.zeros(1, 10, 1, 2)
        scores[0, :2, 0, 0] = scores[0, 2:4, 0, 1] = 50.0
        assert torch.allclose(choice.unsure(scores), torch.full((1, 1, 2), float(np.log(2))), atol=1e-5)
        choice.weights.copy_(torch.tensor([1.0, 3.0] + 8 * [0.5]))
        expected = torch.tensor([[[2 * np.log(2), 0.5 * np.log(2)]]]).float()
        assert torch.allclose(choice.unsure(scores), expected, atol=1e-5)

    def test_without_a_price_all_is_looked_at_again(self, model):
        twice, once = model(images(), price=0.0, size=list(TWICE)), model(images(), price=0.0)
        assert torch.allclose(twice.logits, once.logits, atol=1e-5) and (twice.exits == 2).all()
        assert twice.first == (80, 100) and twice.seen is None

    def test_where_all_is_sure_it_is_the_first_look(self, model):
        twice, once = model(images(), price=100.0, size=TWICE), model(images(), price=0.0, size=0.5)
        assert (twice.exits == FIRST_LOOK).all()
        same = (twice.labels == once.labels).float().mean()
        assert same > 0.9, "they are enlarged a little otherwise"

    def test_only_unsure_places_change(self, model):
        batch = images()
        result, first = (model(batch, price=price, size=TWICE) for price in (price_of(model, batch, 0.5), 100.0))
        again = result.exits != FIRST_LOOK
        assert 0.2 < again.float().mean() < 0.8
        inside = torch.zeros_like(result.labels, dtype=torch.bool)
        for image, row, column in again.nonzero().tolist():  # scores are enlarged by four: two pixels beyond
            inside[image, max(0, 32 * row - 2) : 32 * row + 34, max(0, 32 * column - 2) : 32 * column + 34] = True
        same = ((result.logits - first.logits).abs() < 1e-5).all(1)
        assert same[~inside].all() and not same[inside].all()

    def test_a_closer_look_reads_the_first_one_around(self, model):
        """Another place, which is not looked at again, changes what its neighbours see, through the first look."""
        batch = images(1)
        price = price_of(model, batch, 0.5)
        result = model(batch, price=price, size=TWICE)
        row, column = (result.exits[0] == FIRST_LOOK).nonzero()[0].tolist()
        other = batch.clone()
        other[..., 32 * row : 32 * row + 32, 32 * column : 32 * column + 32] += 0.01
        assert not torch.equal(model(other, price=price, size=TWICE).logits, result.logits)

    def test_alone_as_in_a_batch(self, model):
        batch = images()
        together = model(batch, price=price_of(model, batch, 0.4), size=TWICE)
        for number in range(2):
            alone = model(batch[number : number + 1], price=price_of(model, batch, 0.4), size=TWICE)
            assert torch.equal(alone.exits[0], together.exits[number])
            assert torch.allclose(alone.logits[0], together.logits[number], atol=1e-4)

    @pytest.mark.parametrize(
        ("size", "sides", "changes"),
        [
            *((size, sides, {}) for size in ((0.5, 1), (0.35, 0.7), (0.6, 1.3)) for sides in ((160, 200), (97, 33))),
            *(
                ((0.6, 1.3), (32, 300), one)
                for one in ({"route": None}, {"place": 64}, {"cell_operations": ["identity"]})
            ),
        ],
    )
    @pytest.mark.skipif(not is_compiled(torch.float32), reason="there are no kernels")
    def test_kernels_equal_the_network(self, size, sides, changes):
        model, batch = network(**changes), images(2, *sides)
        model.exits.gates.weights.copy_(torch.rand(10) + 0.5)
        engine = SkipEngine(model, backend="kernels")
        prices = [0.0, price_of(model, batch, 0.3, size), price_of(model, batch, 0.7, size), 100.0]
        for price in prices:
            expected, found = (one(batch, price=price, size=size) for one in (model, engine))
            assert torch.equal(found.exits, expected.exits) and found.first == expected.first
            assert found.seen == expected.seen
            if (expected.exits != FIRST_LOOK).flatten(1).any(1).all():
                assert torch.equal(found.gates, expected.gates)
            assert float((found.logits - expected.logits).abs().max() / expected.logits.abs().max()) < 1e-5
            labels = engine.labels(batch, price=price, size=size)
            assert torch.equal(labels.labels.long(), found.labels) and torch.equal(labels.exits, found.exits)
            assert torch.equal(engine(batch, exits=found.exits, size=size).logits, found.logits)
        told = model(batch, exits=found.exits, size=size)
        assert torch.equal(told.logits, expected.logits) and torch.equal(told.exits, expected.exits)

    @pytest.mark.skipif(not is_compiled(torch.bfloat16), reason="this CPU has no AVX512_BF16")
    def test_in_bfloat16(self, model):
        batch = images()
        price = price_of(model, batch, 0.5)
        expected, found = (one(batch, price=price, size=TWICE) for one in (model, SkipEngine(model, "bfloat16")))
        assert (found.exits == expected.exits).float().mean() > 0.8
        assert (found.labels == expected.labels).float().mean() > 0.9

    def test_other_sizes_between(self, model):
        """Memory that one size has left is not read by another."""
        engine, batch = SkipEngine(model), images()
        price = price_of(model, batch, 0.5)
        first = engine(batch, price=price, size=TWICE)
        engine(images(1, 97, 64), price=price, size=(0.6, 1.3))
        engine(batch, price=0.0, size=0.5)
        assert torch.equal(engine(batch, price=price, size=TWICE).logits, first.logits)

    def test_costs_are_counted_by_places(self, model):
        batch = images()
        result = model(batch, price=price_of(model, batch, 0.5), size=TWICE)
        first, closer = model_cost(model, (80, 100)), model_cost(model, (160, 200))
        again = (result.exits != FIRST_LOOK).double().mean((1, 2)).numpy()
        assert np.allclose(closer.of_result(result.gates, result.exits, first), first.full + again * closer.full)


class TestBudgets:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        model = network()
        assert calibrate(model, [], list(evaluation_loader(open_data(DATA, "val"))), least=1) == 0
        return model

    def test_prices_of_a_closer_look(self, model):
        table = model.prices.at(TWICE)
        first, full = (model_cost(model, size).full for size in ((48, 64), (96, 128)))
        assert np.allclose(table.costs, [first / full, first / full + 1])
        assert table.frequencies.shape == (len(table.prices), 2) and np.allclose(table.frequencies.sum(1), 1)
        assert np.isfinite(table.scores).all() and (np.diff(table.scores) <= 1e-9).all()
        assert (np.diff(table.frequencies[:, 0]) >= -1e-9).all(), "a higher price, fewer places"
        assert table.frequencies[-2, 1] < 0.01, "at the last price that was tried nobody is left to go on"

    def test_rare_classes_count_more(self, model):
        labels = torch.cat([one["labels"].flatten() for one in evaluation_loader(open_data(DATA, "val"))])
        shares = torch.bincount(labels[labels < 10].long(), minlength=10) / (labels < 10).sum()
        weights = model.exits.gates.weights
        assert float(weights @ shares.float()) == pytest.approx(1, abs=1e-4)
        common = shares > 0.05
        assert torch.allclose(
            weights[common] * shares[common], (weights * shares)[common].mean().expand(common.sum()), atol=1e-4
        )
        assert weights.argmax() == shares.argmin()

    def test_a_network_of_before_has_no_weights(self, model, tmp_path):
        from safetensors.torch import load_file, save_file

        plain = network()
        plain.save(tmp_path)
        file = tmp_path / "model.safetensors"
        stored = load_file(file)
        assert "exits.gates.weights" in stored
        save_file({key: one for key, one in stored.items() if key != "exits.gates.weights"}, file)
        loaded = routeseg.load(tmp_path)
        assert loaded.exits.gates.weights.eq(1).all() and fingerprint(loaded) == fingerprint(plain)
        assert fingerprint(model) != fingerprint(plain)

    def test_a_budget_takes_it_if_it_scores_best(self, model):
        known = model.prices
        for number, size in enumerate(known.sizes):
            known.tables[number].scores[:] = 0.9 if size == TWICE else 0.1
        look = known.look_up(0.7)
        assert look.size == TWICE
        assert known.tables[-1].cost_at(look.price) == pytest.approx(0.7, abs=0.01)
        assert known.look_up(1.0).size == 1, "all of the network at the image's own size"

    def test_each_image_keeps_it(self, model):
        batch = images(3)
        spent = []
        for engine in (model, SkipEngine(model)):
            result = engine(batch, budget=0.8, size=TWICE, per_image=True)
            first, closer = model_cost(model, (80, 100)), model_cost(model, (160, 200))
            spent.append(closer.of_result(result.gates, result.exits, first) / closer.full)
            assert np.abs(spent[-1] - 0.8).max() < 1.5 / result.exits[0].numel() + 0.05
        assert np.array_equal(*spent)

    def test_the_mean_is_kept_by_what_was_spent(self, model, monkeypatch):
        monkeypatch.setattr(Prices, "look_up", _twice(Prices.look_up))
        forward = Budgeted(SkipEngine(model), model, Asked.parse("70%"))
        spent = []
        for _ in range(30):
            result = forward(images(1, 96, 128))
            assert result.first is not None
            macs = model_cost(model, (96, 128)).of_result(result.gates, result.exits, model_cost(model, (48, 64)))
            spent.append(float(macs[0]) / model_cost(model, (96, 128)).full)
        assert np.mean(spent) == pytest.approx(0.7, abs=0.05)

    def test_milliseconds(self, model, monkeypatch):
        """A look has a table of its own; one that nobody has measured is not chosen."""
        shape, times = network_shape(model.config), np.array([[0.0, 4.0, 4.0], [2.0, 16.0, 15.0]])
        closer = LatencyTable((96, 128), "cpu", "float32", shape, times, look=TWICE)
        asked = Asked.parse("15ms", closer, "x.json")
        costs = asked.costs(model, (96, 128))
        assert costs[-1].tolist() == [4, 19] and all(np.isinf(some).all() for some in costs[:-1])
        look = asked.look(model, (96, 128))
        assert look.size == TWICE
        going_on = 1 - np.interp(look.price, model.prices.at(TWICE).prices, model.prices.at(TWICE).frequencies[:, 0])
        assert 4 + 2 + 16 * going_on == pytest.approx(15.0, abs=1.0)
        nearly = Asked.parse("18.9ms", closer, "x.json").look(model, (96, 128))
        going_on = 1 - np.interp(nearly.price, model.prices.at(TWICE).prices, model.prices.at(TWICE).frequencies[:, 0])
        assert 0.6 < going_on < 0.95, "all of them would be faster than nearly all, but take longer than was asked"
        with pytest.raises(BudgetNotKept, match="the cheapest route costs 4 ms, the full network 19 ms"):
            Asked.parse("3ms", closer, "x.json").look(model, (96, 128))

    def test_profile(self, model, tmp_path):
        """Nothing, all and half of the places are looked at again; the file knows the look."""
        table = profile(model, (96, 128), repeats=1, look=TWICE)
        assert table.stretches_ms.shape == (2, 3) and table.exits_ms[1] >= table.exits_ms[0] > 0
        assert table.name == "latency_cpu_96x128_in_0.5-1_float32"
        table.write(tmp_path / "t.json")
        assert LatencyTable.read(tmp_path / "t.json").as_dict() == table.as_dict()
        with pytest.raises(ValueError, match="knows no images at 0.3 times their sides"):
            profile(model, (96, 128), look=0.3)

    def test_frames_of_a_video_cost_what_they_are_told(self, model):
        """Each of them: so many of its places go on, in whichever look; never more than was told, but for a place."""
        steered, batch = Steered(SkipEngine(model), model), images(3, 96, 128)
        shares, full = steered.costs((96, 128)), model_cost(model, (96, 128)).full
        assert (np.diff(shares) > 0).all() and shares[-1] == 1
        spent = []
        for steered.level in range(len(shares)):
            result = steered(batch)
            first = None if result.first is None else model_cost(model, result.first)
            macs = model_cost(model, result.seen or (96, 128)).of_result(result.gates, result.exits, first)
            assert np.ptp(macs) == pytest.approx(0), "all images the same"
            spent.append(float(macs[0]) / full)
        assert (np.array(spent) <= shares + 1 / 12 + 0.01).all() and spent[-1] == 1
        assert (np.diff(spent) >= 0).all() and len(set(spent)) > 4

    def test_below_the_first_look(self, model):
        with pytest.raises(BudgetNotKept):
            model(images(), budget=0.1, size=TWICE)

    def test_prices_of_a_file_are_those_of_one_look(self, model):
        singles = model.as_wholes().prices
        assert singles is not None and list(singles.sizes) == [0.5, 1.0]
        assert list(Prices.from_json(model.prices.as_json(), 3).sizes) == [0.5, 1.0, TWICE]

    def test_other_sizes_are_not_calibrated_yet(self, model):
        other = with_sizes(model, [1, [0.35, 0.7]])
        assert not other.exits.at((0.35, 0.7)).table.calibrated

    def test_predict_says_where(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr(Prices, "look_up", _twice(Prices.look_up))
        model.save(tmp_path / "net")
        Image.fromarray(noise(75, 135)).save(tmp_path / "a.png")
        words = ["predict", str(tmp_path / "net"), str(tmp_path / "a.png"), "--budget=90%", "--per_image"]
        assert main([*words, f"--output={tmp_path / 'out'}"]) == 0
        told = json.loads((tmp_path / "out" / "a_route.json").read_text())
        result = routeseg.load(tmp_path / "net").predict(tmp_path / "a.png", budget=0.9, per_image=True)
        assert np.array_equal(told["exits"], result.exits) and set(result.exits.ravel()) <= {FIRST_LOOK, 2}
        assert told["first_size"] == [38, 68] and (tmp_path / "out" / "a_effort.png").is_file()
        first, closer = model_cost(model, (38, 68)), model_cost(model, (75, 135))
        again = (result.exits != FIRST_LOOK).mean()
        assert told["share_of_full"] == pytest.approx(first.full / closer.full + again)
        assert result.effort(legend=False).size == (135, 75)

    def test_effort_by_class(self, model):
        notes = EffortNotes(lambda one: model(one, price=1.5, size=TWICE), model)
        for one in evaluation_loader(open_data(DATA, "val")):
            notes(one["image"])
            notes.saw(one["image"], one["labels"][0].numpy())
        told = notes.found().as_dict()["all"]
        assert told["first_look"] + sum(told["leave"]) == pytest.approx(1)
        first, closer = (model_cost(model, size).full for size in ((48, 64), (96, 128)))
        assert told["cost_share"] == pytest.approx(first / closer + told["leave"][-1])


def _twice(look_up):
    """`Prices.look_up` that knows two looks alone."""

    def found(self, budget, costs=None, unit="", size=None, means=None):
        return look_up(self, budget, costs, unit, TWICE, means)

    return found


def test_a_run_sets_its_budgets(tmp_path):
    model = network().requires_grad_(True)
    recipe = Recipe(iterations=2, lr=1e-4, optimizer="adamw", validate_every=2, warmup_steps=0, precise_bn_batches=0)
    train(model, DATA, recipe, Budget(), RunOptions(tmp_path / "run", progress=False))
    assert routeseg.load(tmp_path / "run" / "last").prices.at(TWICE).calibrated


class TestBadInput:
    @pytest.mark.parametrize(
        "sizes", [[1, [0.5]], [1, [1, 0.5]], [1, [0.5, 1, 2]], [[0.5, 1]], [1, [0.5, [0.7, 1]]], [1, ["a", 1]]]
    )
    def test_what_is_no_pair(self, sizes):
        with pytest.raises(ValueError, match="sizes is "):
            NetworkConfig(gate="fixed", exits=[0], place=32, backbone="efficientnet_lite0", sizes=sizes)

    @pytest.mark.parametrize("lacking", [{"place": None}, {"backbone": None}])
    def test_what_a_closer_look_needs(self, lacking):
        with pytest.raises(ValueError, match="a closer look needs"):
            network(**lacking)
        with pytest.raises(ValueError, match="a closer look is for"):
            network(sizes=[1], **lacking)(images(), price=1.0, size=TWICE)

    @pytest.mark.parametrize("size", [(1.0, 0.5), (0.5,), (0.5, 0.5), (0.0, 1.0), (0.5, float("nan")), "1"])
    def test_what_is_no_size(self, size):
        with pytest.raises(ValueError, match="size is "):
            network()(images(), price=1.0, size=size)

    def test_with_a_route(self):
        model = network()
        with pytest.raises(ValueError, match="without a route"):
            model(images(), model.route, size=TWICE)

    def test_one_that_was_not_calibrated(self):
        with pytest.raises(ValueError, match="budgets are known for"):
            network(sizes=[1])(images(), budget=0.5, size=TWICE)
