"""Tables of prices: the best size and price for a budget, and a mean that is kept on images of any source."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from routeseg.app.explorer import Explorer
from routeseg.budgets import calibration
from routeseg.budgets.asked import Asked
from routeseg.budgets.budgeted import Budgeted
from routeseg.budgets.calibration import calibrate, with_sizes
from routeseg.budgets.keeping import Keeper
from routeseg.cost.macs import model_cost
from routeseg.data.config import DataConfig, open_data
from routeseg.data.loaders import evaluation_loader
from routeseg.engine import SkipEngine
from routeseg.errors import BudgetNotKept
from routeseg.evaluation import evaluate
from routeseg.export import export
from routeseg.model import DynamicRoutingNetwork, checkpoints
from routeseg.model.prices import Prices, PriceTable
from routeseg.prediction.onnx_runner import OnnxNetwork
from routeseg.prediction.segmenter import Segmenter
from routeseg.space import seen_size

DATA = DataConfig(name="scenes", image_size=(128, 192), train_images=12, val_images=10, workers=0)
SIZES = (0.5, 1.0, 1.5)


def table(factor: float, scores: tuple[float, float]) -> PriceTable:
    """Two exits, whose costs are those of size 1 times a factor; a price of p lets a share p leave at the first."""
    prices = np.array([-1e6, 0.0, 1.0, 1e6])
    shares = np.array([0.0, 0.0, 1.0, 1.0])
    return PriceTable(
        factor * np.array([0.4, 1.0]), prices, np.stack([shares, 1 - shares], 1), np.array(scores)[[0, 0, 1, 1]]
    )


@pytest.fixture
def prices() -> Prices:
    return Prices(SIZES, [table(0.25, (0.60, 0.50)), table(1.0, (0.70, 0.45)), table(2.25, (0.75, 0.55))])


class TestLookUp:
    @pytest.mark.parametrize(
        ("budget", "size", "price"),
        [
            (0.1, 0.5, 1e6),  # the cheapest route there is
            (0.2, 0.5, 1 / 3),
            (0.45, 0.5, -1e6),  # all of a smaller image; the first exit of the image as it is has 47 %
            (0.85, 1.0, 0.25),  # 64 %; a smaller image has 60
            (1.0, 1.0, -1e6),  # all of it, although a larger image may score as well
            (1.5, 1.0, -1e6),  # a larger image scores less at that cost
            (2.0, 1.5, 5 / 27),
            (3.0, 1.5, -1e6),
        ],
    )
    def test_the_best_pair_of_what_was_asked(self, prices, budget, size, price):
        found = prices.look_up(budget)
        assert found.size == size and found.price == pytest.approx(price, rel=1e-6)

    def test_only_one_size(self, prices):
        assert prices.look_up(0.45, size=1.0) == (1.0, pytest.approx(11 / 12))
        with pytest.raises(BudgetNotKept, match=r"a budget of 0.2 cannot be kept: the cheapest route costs 0.4"):
            prices.look_up(0.2, size=1.0)
        with pytest.raises(ValueError, match="known for images at 0.5, 1, 1.5 times their sides, not at 0.7"):
            prices.look_up(0.2, size=0.7)

    def test_below_everything(self, prices):
        with pytest.raises(BudgetNotKept, match="a budget of 0.05 cannot be kept: the cheapest route costs 0.1"):
            prices.look_up(0.05)

    def test_other_units(self, prices):
        costs = [10 * one.costs for one in prices.tables]
        assert prices.look_up(4.5, costs, " MMACs") == prices.look_up(0.45)
        assert prices.look_up(10.0, costs, " MMACs") == (1.0, -1e6)

    def test_without_scores_images_stay_as_they_are_where_they_can(self, prices):
        blind = Prices(SIZES, [replace(one, scores=np.full(4, np.nan)) for one in prices.tables])
        assert blind.look_up(0.45).size == 1 and blind.look_up(0.2).size == 0.5

    def test_json(self, prices):
        again = Prices.from_json(json.loads(json.dumps(prices.as_json())), 2)
        assert again.sizes == list(SIZES)
        for budget in (0.1, 0.2, 0.45, 0.85, 1.0, 1.5):
            assert again.look_up(budget) == prices.look_up(budget)
        for damage in ({"sizes": 3}, {"sizes": {"0.5": {}}}, {"costs": [1]}, {"scores": [0.1]}):
            with pytest.raises(ValueError, match="its table of prices is damaged"):
                Prices.from_json(prices.as_json() | damage, 2)

    def test_files_of_before_have_one_size(self, prices):
        old = Prices((1.0,), [replace(table(1.0, (0, 0)), scores=np.full(4, np.nan))]).as_json()
        assert set(old) == {"costs", "prices", "frequencies", "means"}
        assert list(Prices.from_json(old, 2).sizes) == [1.0]


class TestKeeper:
    @pytest.mark.parametrize("factor", [0.5, 0.75, 1.0, 1.3, 1.8])
    def test_the_mean_holds_on_other_sources(self, factor):
        """All images cost so many times what the table says, each a third more or less; at least 25 %, at most all."""
        rng, keeper, spent = np.random.default_rng(0), Keeper(0.5), []
        for _ in range(100):
            promised = min(max(keeper.next(), 0.25), 1.0)
            spent.append(min(max(promised * factor * rng.uniform(0.67, 1.33), 0.25), 1.0))
            keeper.saw(promised, spent[-1])
        assert np.mean(spent) == pytest.approx(0.5, abs=0.01)
        assert np.std(spent) < 0.16, "it does not swing"

    def test_what_cannot_be_kept_does_not_break_it(self):
        keeper = Keeper(0.5)
        for _ in range(200):
            keeper.saw(max(keeper.next(), 0.25), 0.9)  # whatever is asked
        assert np.isfinite(keeper.next()) and keeper.next() < 0.25


@pytest.fixture(scope="module")
def model() -> Segmenter:
    """Random weights, calibrated in three sizes: places of 32, and 4 layers with an exit behind three of them."""
    torch.manual_seed(0)
    fields = {
        "depth": 4,
        "base_channels": 8,
        "stem_channels": 8,
        "num_classes": len(open_data(DATA, "val").classes.names),
        "gate": "fixed",
        "route": "diagonal",
    }
    model = Segmenter(**fields, exits=[0, 1, 2], place=32).eval()
    model = with_sizes(model, SIZES)
    train, val = (evaluation_loader(open_data(DATA, split), 0) for split in ("train", "val"))
    calibrate(model, train, val)
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.cat([batch["image"] for batch in evaluation_loader(open_data(DATA, "val"), 0)])


class TestNetwork:
    def test_every_size_is_calibrated(self, model):
        for size, one in zip(SIZES, model.prices.tables, strict=True):
            assert one.calibrated and np.isfinite(one.scores).all()
            assert one.costs[-1] == pytest.approx(model.prices.at(1.0).costs[-1] * size**2, rel=0.35)

    def test_a_budget_chooses_the_size(self, model, images):
        least = float(model.prices.at(0.5).costs[0])
        result = model(images, budget=1.5 * least)
        assert result.seen == (64, 96) and result.logits.shape == (10, model.config.num_classes, 128, 192)
        assert result.exits.shape == (10, 2, 3)
        spent = (
            model_cost(model, result.seen).of_result(result.gates, result.exits).mean()
            / model_cost(model, (128, 192)).full
        )
        assert spent == pytest.approx(1.5 * least, abs=0.04)
        assert model(images, budget=1.0).seen is None

    def test_engine_and_network_agree(self, model, images):
        for asked in ({"budget": 0.2}, {"size": 1.5, "price": 0.5}, {"size": 0.5, "budget": 0.2, "per_image": True}):
            with torch.no_grad():
                own, fast = model(images, **asked), SkipEngine(model)(images, **asked)
            # Resized to rounding alike: two places of the same need may change places.
            same = (own.exits == fast.exits).flatten(1)
            assert own.seen == fast.seen and same.float().mean() > 0.95
            agree = same.all(dim=1)
            assert agree.any() and torch.allclose(own.logits[agree], fast.logits[agree], atol=1e-4)

    def test_a_smaller_image_is_what_one_would_shrink_oneself(self, model, images):
        small = torch.nn.functional.interpolate(images / 255, (64, 96), mode="bilinear", antialias=True)
        own, shrunk = model(images, size=0.5, price=0.0), model(small, price=0.0)
        again = torch.nn.functional.interpolate(shrunk.logits, (128, 192), mode="bilinear")
        assert torch.allclose(own.logits, again, atol=1e-5)

    def test_the_level_of_a_size_is_that_of_more_images(self, model, monkeypatch):
        """Half of the way to a parabola over the sizes, so that none is taken for its luck; what leaving takes away
        comes from fewer."""
        measured = iter([0.30, 0.52, 0.50, 0.49])
        monkeypatch.setattr(calibration, "_miou", lambda *_: next(measured))
        images = [{"image": torch.zeros(1, 3, 64, 96, dtype=torch.uint8), "labels": torch.zeros(1, 64, 96).long()}]
        sizes = (0.5, 0.7, 1.0, 1.4)
        found = calibration._levels(model, sizes, lambda: iter(images))
        smooth = np.polyval(np.polyfit(np.log(sizes), [0.30, 0.52, 0.50, 0.49], 2), np.log(sizes))
        assert found == pytest.approx((smooth + [0.30, 0.52, 0.50, 0.49]) / 2) and next(measured, None) is None
        table = calibration._levelled(model.prices.at(0.5), 0.7)
        assert table.scores[0] == pytest.approx(0.7)
        assert (np.diff(table.scores) <= 1e-9).all()
        assert calibration._levelled(table, np.nan) is table

    def test_scores_fall_with_the_price(self):
        found = calibration._falling(np.array([5, 4, 4.5, 3, 3.5, 4, 1]))
        assert found == pytest.approx([5, 4.25, 4.25, 3.5, 3.5, 3.5, 1])
        assert calibration._falling(np.array([1.0, 2.0, 3.0])) == pytest.approx([2, 2, 2])

    def test_the_explorer_goes_below_the_first_exit(self, model, images):
        explorer, file = Explorer(model, "x"), io.BytesIO()
        Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(file, "PNG")
        opened = explorer.open({"file": base64.b64encode(file.getvalue()).decode()})
        low = opened["range"]["share"][0]
        assert low == pytest.approx(min(table.costs[0] for table in model.prices.tables)) and low < model.exits.costs[0]
        view = explorer.look({"picture": opened["picture"], "budget": {"value": low, "unit": "share"}})
        assert view["asked"] == pytest.approx(low)

    def test_bytes_are_resized_too(self, model, images):
        assert images.dtype == torch.uint8
        own, again = model(images, size=0.5), model(images / 255, size=0.5)
        assert torch.allclose(own.logits, again.logits, atol=1e-5)

    def test_evaluation_counts_what_was_looked_at(self, model):
        val = evaluation_loader(open_data(DATA, "val"), 0)
        asked = 1.6 * float(model.prices.at(0.5).costs[0])
        found = evaluate(model, val, Budgeted(SkipEngine(model), model, Asked.parse(asked)))
        assert (found.cost_macs / found.full_macs).mean() == pytest.approx(asked, abs=0.03)

    def test_a_prediction_says_at_what_size(self, model):
        pixels = open_data(DATA, "val").read(0)[0]
        found = model.predict(pixels, budget=1.5 * float(model.prices.at(0.5).costs[0]))
        assert found.seen == (64, 96) and found.labels.shape == (128, 192)
        assert found.effort().size[0] >= 192 and model.predict(pixels).seen == (128, 192)

    def test_a_file_has_images_leave_as_wholes(self, model, images, tmp_path):
        """ONNX holds no places: the file keeps budgets in the mean of images, in the sizes that the network knows."""
        file = export(model, tmp_path / "net.onnx")
        whole = model.as_wholes()
        assert whole.config.place is None and torch.equal(whole(images).logits, model(images).logits)
        least = float(whole.prices.at(0.5).costs[0])
        for budget in (1.2 * least, 0.7):
            onnx = OnnxNetwork(file, budget=budget)
            own = Budgeted(SkipEngine(whole), whole, Asked.parse(budget))
            for image in images:
                ran, expected = onnx(image.permute(1, 2, 0).numpy()), own(image[None])
                assert ran.seen == expected.seen and np.array_equal(ran.gates, expected.gates[0])
                assert (ran.labels == expected.labels[0].numpy()).mean() > 0.97, "bytes are resized by other code"

    def test_it_survives_a_checkpoint(self, model, images, tmp_path):
        again = checkpoints.load(model.save(tmp_path))
        assert again.config.sizes == SIZES
        assert again.prices.look_up(0.2) == model.prices.look_up(0.2)

    def test_small_images_stay_above_the_least_size(self):
        assert seen_size((40, 400), 0.5) == (32, 200)
        assert seen_size((128, 192), 0.5) == (64, 96) and seen_size((128, 192), 1.0) == (128, 192)


class TestMistakes:
    @pytest.mark.parametrize("sizes", [[], [0.5], [0.0, 1.0], [1, 5], "1", [True, 1.0], [float("nan"), 1]])
    def test_sizes_that_are_none(self, sizes):
        with pytest.raises(ValueError, match=r"sizes"):
            DynamicRoutingNetwork(depth=4, base_channels=8, gate="fixed", exits=[1], sizes=sizes)

    def test_sizes_without_exits(self):
        with pytest.raises(ValueError, match="sizes is .* but there are no exits"):
            DynamicRoutingNetwork(depth=4, base_channels=8, sizes=[0.5, 1])

    def test_sizes_of_a_forward(self, model, images):
        for size in (0, -1, 9, float("nan")):
            with pytest.raises(ValueError, match="it is a factor of an image's sides"):
                model(images, size=size)
        with pytest.raises(ValueError, match="not at 0.7"):
            model(images, size=0.7, budget=0.5)

    def test_more_than_there_is(self, model):
        with pytest.raises(ValueError, match="the full network costs on images of 1.5 times the sides, the largest"):
            Asked.parse("300%").look(model, (128, 192))
        assert Asked.parse("200%").look(model, (128, 192)).size in SIZES
