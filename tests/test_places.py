"""Places: squares of an image that leave a network with exits by themselves."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import routeseg
from pictures import noise
from routeseg import DynamicRoutingNetwork, Segmenter, SkipEngine, model_cost
from routeseg.budgets.calibration import calibrate
from routeseg.cli import main
from routeseg.config import NetworkConfig
from routeseg.counting import CONVENTIONS
from routeseg.data.config import DataConfig, open_data
from routeseg.data.loaders import evaluation_loader
from routeseg.data.scenes import CLASSES, PALETTE
from routeseg.errors import BudgetNotKept
from routeseg.model.places import Running, enlarge
from routeseg.space import over_pixels
from routeseg.survey.effort import EffortNotes
from routeseg.survey.routes import observe
from routeseg.training.fused import Fused
from routeseg.training.gate_budget import Budget
from routeseg.training.initialization import initialize
from routeseg.training.recipe import Recipe
from routeseg.training.run import RunOptions
from routeseg.training.segmentation import SegmentationTask, train

NETWORK = {
    **{"num_classes": 10, "depth": 6, "base_channels": 8, "stem_channels": 8, "gate": "fixed", "route": "diagonal"},
    **{"exits": [0, 2, 4], "place": 32},
}
SIZE = (64, 96)
DATA = DataConfig(image_size=SIZE, crop=(64, 64), train_images=16, val_images=8, batch_size=2, workers=0, seed=0)
ALL = 1e6  # a price at which all places leave at once


def network(**options) -> Segmenter:
    """Drawn weights whose exits are sure of some places and not of others."""
    torch.manual_seed(3)
    model = Segmenter(**{**NETWORK, **options}).eval()
    for decoder in [*model.exits.decoders, model.head]:
        decoder.predictor.weight.data.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.cat([one["image"] for one in evaluation_loader(open_data(DATA, "val"))])


def middle_price(model: DynamicRoutingNetwork, images: torch.Tensor) -> float:
    """At which half of the places leave at the first exit."""
    return float(model.exits.see(0, model.exit_features(images)[0]).median())


class TestRunning:
    FLAGS = torch.tensor([[[True, False, True], [False, False, True]]])

    def test_a_place_is_whole_pixels_at_every_scale(self):
        running = Running(self.FLAGS, (64, 96), 32)
        for stride in (4, 8, 16, 32):
            map = torch.zeros(1, 2, 64 // stride, 96 // stride)
            mask = running.mask(map)
            for row, column in np.ndindex(mask.shape[2:]):
                assert mask[0, 0, row, column] == self.FLAGS[0, row * stride // 32, column * stride // 32]

    def test_places_at_the_edges_may_be_smaller(self):
        running = Running(torch.tensor([[[True, False]]]), (64, 96), 64)
        assert running.mask(torch.zeros(1, 1, 16, 24))[0, 0, 0].tolist() == [True] * 16 + [False] * 8

    @pytest.mark.parametrize("reach", [1, 2])
    def test_what_lies_beyond_is_the_mean_of_what_runs_around(self, reach):
        running = Running(self.FLAGS, (64, 96), 32)
        map = torch.randn(1, 3, 8, 12)
        filled, mask = running.filled(map, reach), running.mask(map)[0, 0].numpy()
        for row, column in np.ndindex(8, 12):
            near = [
                map[0, :, r, c]
                for r in range(max(0, row - reach), min(8, row + reach + 1))
                for c in range(max(0, column - reach), min(12, column + reach + 1))
                if mask[r, c]
            ]
            expected = (
                map[0, :, row, column] if mask[row, column] else sum(near) / len(near) if near else torch.zeros(3)
            )
            assert torch.allclose(filled[0, :, row, column], torch.as_tensor(expected), atol=1e-5)

    def test_what_does_not_run_is_not_read(self):
        running, map = Running(self.FLAGS, (64, 96), 32), torch.randn(1, 3, 8, 12)
        other = torch.where(running.mask(map), map, 1e3)
        assert torch.allclose(running.filled(map), running.filled(other))

    def test_what_has_left_stays(self):
        running, new, before = Running(self.FLAGS, (64, 96), 32), torch.randn(1, 3, 8, 12), torch.randn(1, 3, 8, 12)
        mask = running.mask(new)
        assert torch.equal(running.kept(new, before), new * mask + before * ~mask)
        assert torch.equal(running.kept(new, None), new * mask)


class TestForward:
    def test_without_a_price_it_is_the_full_network(self, images):
        model = network()
        result = model(images)
        assert torch.equal(result.logits, model(images, model.route).logits) and result.exits is None
        assert torch.equal(model(images, price=0.0).logits, result.logits), "at 0 nobody leaves, and nobody looks"

    def test_if_all_leave_it_is_the_route_of_that_exit(self, images):
        model = network()
        result = model(images, price=ALL)
        assert not result.exits.any()
        assert torch.allclose(result.logits, model(images, model.config.exit_routes[0]).logits, atol=1e-5)
        assert torch.equal(result.gates, model(images, model.config.exit_routes[0]).gates)

    def test_where_nobody_leaves_looking_changes_nothing(self, images):
        model = network()
        result = model(images, price=1e-30)
        assert (result.exits == 3).all() and torch.allclose(result.logits, model(images).logits, atol=1e-5)

    @pytest.mark.parametrize("backbone", [None, "efficientnet_lite0"])
    def test_what_has_left_does_not_depend_on_what_comes(self, images, backbone):
        """Nor do its own logits change if later layers do; pixels beside another place are enlarged with it."""
        model = network(backbone=backbone)
        price = middle_price(model, images)
        with torch.no_grad():
            before = model(images, price=price)
            assert len(before.exits.unique()) > 1
            for name, node in model.nodes.items():
                if int(name.split("-")[0]) > 0:
                    for values in node.parameters():
                        values.mul_(1.5)
            after = model(images, price=price)
        gone = before.exits == 0
        assert torch.equal(gone, after.exits == 0) and gone.any() and not gone.all()
        inner = torch.zeros(SIZE, dtype=torch.bool)
        for row, column in np.ndindex(2, 3):
            inner[row * 32 + 4 : row * 32 + 28, column * 32 + 4 : column * 32 + 28] = True
        pixels = enlarge(gone, 32, SIZE) & inner
        same = (before.logits == after.logits).all(1)
        assert same[pixels].all() and not same[enlarge(~gone, 32, SIZE) & inner].all()

    def test_a_place_sees_neighbours_that_have_left(self, images):
        """What they left behind, which moves if they leave elsewhere: places are not images of their own."""
        model = network()
        price = middle_price(model, images)
        result = model(images, price=price)
        number, row, column = (result.exits > 0).nonzero()[0].tolist()
        crop = images[number : number + 1, :, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
        own = result.logits[number, :, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
        assert not torch.allclose(model(crop).logits[0], own, atol=1e-2)

    def test_alone_as_in_a_batch_and_in_the_engine(self, images):
        model = network()
        prices = np.linspace(0.5, 1.5, len(images)) * middle_price(model, images)
        together = model(images, price=prices)
        for number in range(len(images)):
            alone = model(images[number : number + 1], price=prices[number])
            assert torch.equal(alone.exits[0], together.exits[number])
            assert torch.allclose(alone.logits[0], together.logits[number], atol=1e-4)
        found = SkipEngine(model)(images, price=prices)
        assert torch.equal(found.exits, together.exits) and torch.allclose(found.logits, together.logits, atol=1e-4)
        assert torch.equal(found.gates, together.gates)

    @pytest.mark.parametrize("size", [(32, 32), (40, 100), (75, 135)])
    @pytest.mark.parametrize("place", [32, 64, 128])
    def test_any_size(self, size, place):
        """Also images that are smaller than a place."""
        model, image = network(place=place), torch.rand(2, 3, *size)
        result = model(image, price=middle_price(model, image))
        padded = [-(-side // 32) * 32 for side in size]
        assert list(result.exits.shape[1:]) == [-(-side // place) for side in padded]
        assert result.logits.shape[-2:] == size and result.logits.isfinite().all()

    def test_the_classes_of_a_place_are_those_of_its_exit(self, images):
        """Of the places that are left at an exit, when all that left before are still as they were there."""
        model = network()
        price = middle_price(model, images)
        result = model(images, price=price)
        first = model(images, model.config.exit_routes[0])
        inner = enlarge(result.exits == 0, 32, SIZE)
        assert (result.labels == first.labels)[inner].float().mean() > 0.95

    def test_costs_are_counted_by_places(self, images):
        model = network()
        table, result = model_cost(model, SIZE), model(images, price=middle_price(model, images))
        routes = [table.of_route(route) for route in model.config.exit_routes]
        decision = model.macs.decision.count(SIZE, CONVENTIONS["authors"])
        at = result.exits.flatten(1).numpy()
        expected = [np.mean([routes[k] + min(k + 1, 3) * decision for k in one]) for one in at]
        assert np.allclose(table.of_result(result.gates, result.exits), expected) and decision > 0
        assert np.allclose(table.of_result(model(images).gates, None), table.full)

    def test_another_choice_is_a_class(self, images, monkeypatch):
        """Registered by name; the kernels do not know it, so that the network's own forward runs."""
        from routeseg.model.choice import EntropyChoice
        from routeseg.registry import CHOICES

        class LeftHalf(EntropyChoice):
            def leaves(self, exit, seen, price, costs):
                columns = torch.arange(seen.shape[-1])
                return (columns < seen.shape[-1] / 2).expand_as(seen)

        monkeypatch.setitem(CHOICES._entries, "left", LeftHalf)
        model = network(choice="left")
        result = SkipEngine(model)(images, price=1.0)
        assert (result.exits[..., :1] == 0).all() and (result.exits[..., 2:] == 3).all()


class TestMistakes:
    @pytest.mark.parametrize("place", [0, -32, 16, 48, 2048, 32.0, True, "32"])
    def test_what_is_no_place(self, place):
        with pytest.raises(ValueError, match="place is .*: it must be a multiple of 32 up to 1024"):
            NetworkConfig(**{**NETWORK, "place": place})

    def test_places_need_exits(self):
        with pytest.raises(ValueError, match="place is 32, but there are no exits"):
            NetworkConfig(**{**NETWORK, "exits": None})

    def test_a_rule_for_whole_images(self):
        with pytest.raises(ValueError, match="choice is loss, about whole images"):
            network(choice="loss")
        with pytest.raises(ValueError, match="choice is 'much': choose one of loss, entropy"):
            network(choice="much")

    @pytest.mark.parametrize("price", [float("nan"), float("inf"), [0.1, 0.2], "much"])
    def test_what_is_no_price(self, images, price):
        with pytest.raises(ValueError, match="price"):
            network()(images, price=price)

    def test_a_price_and_something_else(self, images):
        model = network()
        with pytest.raises(ValueError, match="a route or a price, not both"):
            model(images, model.route, price=0.1)
        with pytest.raises(ValueError, match="a budget or a price, not both"):
            model(images, budget=0.5, price=0.1)

    def test_a_network_without_places_has_no_map_of_effort(self):
        result = network(place=None, choice="entropy").predict(noise(*SIZE))
        with pytest.raises(ValueError, match="Train one with --model.place 32"):
            result.effort()


class TestTraining:
    def test_kernels_of_training_agree(self, images):
        """Logits of every exit and where places left come back, and gradients are those of PyTorch's operations."""
        found, price = [], middle_price(network(), images)
        for compute in (None, Fused()):
            model = network().train()
            for norm in (one for one in model.modules() if isinstance(one, torch.nn.BatchNorm2d)):
                norm.eval()
            model.compute = compute
            result = model(images, price=price, coarse=True)
            assert len(result.earlier) == 3 and result.logits.shape[-2:] == (16, 24)
            torch.stack([logits.square().mean() for logits in (*result.earlier, result.logits)]).sum().backward()
            found.append((result.exits, torch.cat([p.grad.flatten() for p in model.parameters()])))
        assert torch.equal(found[0][0], found[1][0]) and len(found[0][0].unique()) > 1
        assert (found[0][1] - found[1][1]).norm() <= 1e-3 * found[0][1].norm()

    def test_an_exit_learns_from_the_places_that_come_to_it(self, images):
        model = network().train()
        task = SegmentationTask(model, Recipe(iterations=10, warmup_steps=0), Budget(), (64, 64))
        model.eval()
        price = middle_price(model, images)
        model.train()
        labels = torch.randint(0, 10, (len(images), *SIZE))
        result = model(images, price=price, coarse=True)
        loss, _ = task.loss(result, labels, (labels >= 0).sum())
        at = enlarge(result.exits, 32, SIZE)
        total = 0.0
        for exit, logits in enumerate((*result.earlier, result.logits)):
            whole = torch.nn.functional.interpolate(logits, scale_factor=4.0, mode="bilinear")
            each = torch.nn.functional.cross_entropy(whole, labels, reduction="none")
            total += float((each * (at >= exit)).sum())
        assert float(loss) == pytest.approx(total / labels.numel(), rel=1e-4)

    def test_from_a_share_of_the_steps_on_places_leave_and_statistics_stay(self, tmp_path, monkeypatch):
        prices, statistics, asked = [], [], SegmentationTask.asked

        def note(self, count):
            found = asked(self, count)
            prices.append(found.get("price"))
            statistics.append(self.model.head.merge[0][1].running_mean.clone())
            return found

        monkeypatch.setattr(SegmentationTask, "asked", note)
        recipe = Recipe(
            iterations=6, warmup_steps=0, lr=0.01, precise_bn_batches=2, validate_every=6, save_every=3, places_from=0.5
        )
        model = network()
        train(model, DATA, recipe, Budget(), RunOptions(tmp_path / "run", progress=False))
        assert [price is None for price in prices] == [True] * 3 + [False] * 3
        assert all((price >= 0).all() and len(price) == 2 for price in prices[3:])
        assert not torch.equal(statistics[1], statistics[2]) and all(
            torch.equal(statistics[3], s) for s in statistics[4:]
        )
        saved = routeseg.load(tmp_path / "run" / "last")
        assert torch.equal(saved.head.merge[0][1].running_mean, statistics[3]) and saved.exits.calibrated
        # A run that was interrupted ends with the very same weights.
        other = network()
        train(
            other,
            DATA,
            Recipe(**{**vars(recipe), "iterations": 6}),
            Budget(),
            RunOptions(tmp_path / "b", progress=False),
        )
        (tmp_path / "b" / "last.ckpt").unlink()
        assert all(
            torch.equal(a, b) for a, b in zip(saved.state_dict().values(), other.state_dict().values(), strict=True)
        )

    def test_budgets_of_another_place_are_not_taken_over(self, tmp_path):
        model = network()
        model.exits.frequencies.fill_(0.25)
        model.save(tmp_path)
        same, other, looked_at = network(), network(place=64), network(sizes=[0.5, 1])
        for one in (same, other, looked_at):
            initialize(one, tmp_path)
        assert same.exits.calibrated and not other.exits.calibrated and not looked_at.exits.calibrated
        looked_at.exits.at(0.5).frequencies.fill_(0.25)
        looked_at.save(tmp_path / "sizes")
        initialize(other := network(sizes=[0.7, 1]), tmp_path / "sizes")
        assert not other.exits.at(0.7).table.calibrated


class TestBudgets:
    @pytest.fixture(scope="class")
    def model(self):
        model, pictures = network(), list(evaluation_loader(open_data(DATA, "val")))
        assert calibrate(model, [], pictures) == 0, "there is nothing to fit"
        return model

    def test_they_are_kept_over_the_images_that_they_were_set_with(self, model, images):
        table, asked = model_cost(model, SIZE), np.linspace(float(model.exits.costs[0]) + 0.02, 0.95, 5)
        spent = []
        for budget in asked:
            result = model(images, budget=float(budget))
            spent.append(table.of_result(result.gates, result.exits).mean() / table.full)
        assert spent == sorted(spent) and np.abs(np.array(spent) - asked).max() < 0.08
        assert model(images, budget=1.0).exits is None, "all of it: nobody decides"

    def test_each_image_keeps_it(self, model):
        """Whatever it shows: also darkened, noisy and of another size. Of 48 places one is 2 % of them."""
        scene = open_data(DATA, "val").read(0)[0]
        rng, large = np.random.default_rng(0), np.asarray(Image.fromarray(scene).resize((256, 192)))
        noisy = np.clip(large + rng.normal(0, 60, large.shape), 0, 255).astype(np.uint8)
        for image in (large, large // 4, noisy, np.asarray(Image.fromarray(large).resize((512, 384)))):
            pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
            table = model_cost(model, image.shape[:2])
            for budget in (0.5, 0.7, 0.9):
                result = model(pixels, budget=budget, per_image=True)
                spent = float(table.of_result(result.gates, result.exits)[0]) / table.full
                assert spent == pytest.approx(budget, abs=0.02)
        result = model.predict(large, budget=0.6, per_image=True)
        assert result.found.prediction.share == pytest.approx(0.6, abs=0.02)
        assert result.found.asked["budget"] == "60% for each image"

    def test_those_go_on_that_need_it_most(self, model, images):
        result, seen = model(images, budget=0.6, per_image=True), model.exits.see(0, model.exit_features(images)[0])
        for at, entropy in zip(result.exits, seen, strict=True):
            assert not (at == 0).any() or not (at > 0).any() or entropy[at == 0].max() <= entropy[at > 0].min()

    def test_each_image_of_a_network_without_places(self, images):
        with pytest.raises(ValueError, match="Train one with --model.place 32"):
            network(place=None, choice="entropy")(images, price=0.5, per_image=True)
        with pytest.raises(ValueError, match="was not calibrated"):
            network()(images, price=0.5, per_image=True)

    def test_one_below_the_cheapest_exit(self, model, images):
        with pytest.raises(BudgetNotKept, match="the cheapest route costs"):
            model(images, budget=float(model.exits.costs[0]) / 2)

    def test_predict_says_where(self, model, tmp_path, capsys):
        model.save(tmp_path / "net")
        Image.fromarray(noise(75, 135)).save(tmp_path / "a.png")
        words = [str(tmp_path / "net"), str(tmp_path / "a.png"), "--budget=60%", f"--output={tmp_path / 'out'}"]
        each = [*words[:2], "--budget=60%", "--per_image", f"--output={tmp_path / 'each'}"]
        assert main(["predict", *each]) == 0
        assert json.loads((tmp_path / "each" / "a_route.json").read_text())["budget"] == "60% for each image"
        capsys.readouterr()
        assert main(["predict", *words]) == 0
        assert "an image costs one of" not in capsys.readouterr().out, "its cost is no step"
        assert {path.name for path in (tmp_path / "out").glob("*_effort.png")} == {"a_effort.png"}
        told = json.loads((tmp_path / "out" / "a_route.json").read_text())
        result = routeseg.load(tmp_path / "net").predict(tmp_path / "a.png", budget=0.6)
        assert np.array_equal(told["exits"], result.exits) and result.exits.shape == (3, 5)
        table = model_cost(model, (75, 135))
        assert told["share_of_full"] == pytest.approx(table.exits[result.exits].mean() / table.full)
        assert result.effort(legend=False).size == (135, 75) and not result.levels
        with pytest.raises(ValueError, match="no budget was asked for"):
            routeseg.load(tmp_path / "net").predict(tmp_path / "a.png").effort()


class TestEffort:
    """`routeseg routes`: how far places go over a data set."""

    WORDS = ("--data.image_size=[64,96]", "--data.val_images=8", "--data.workers=0", "--permutations=5")

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        model = network(class_names=CLASSES, palette=PALETTE)
        assert calibrate(model, [], list(evaluation_loader(open_data(DATA, "val")))) == 0
        return model

    def test_by_class_and_as_a_figure(self, model, tmp_path, capsys):
        folder = str(model.save(tmp_path / "net"))
        words = ["routes", folder, *self.WORDS, "--budget=60%", "--per_image", f"--output={tmp_path / 'out'}"]
        assert main(words) == 0
        said, told = capsys.readouterr().out, json.loads((tmp_path / "out" / "routes.json").read_text())
        assert "Where pixels of each class leave" in said and "all pixels" in said and "effort.png, " in said
        assert "worth_of_choice" not in told, "that is about whole images"
        pixels, cost, table = np.zeros((len(CLASSES), 4)), np.zeros(len(CLASSES)), model_cost(model, SIZE)
        for one in evaluation_loader(open_data(DATA, "val")):
            left = model(one["image"], budget=0.6, per_image=True).exits[0].numpy()
            at, labels = np.kron(left, np.ones((32, 32), int)), one["labels"][0].numpy()
            np.add.at(pixels, (labels, at), 1)
            np.add.at(cost, labels, table.exits[at] / table.full)
        effort = told["effort"]
        assert effort["behind_layers"] == [0, 2, 4, 6] and list(effort["classes"]) == list(CLASSES)
        for number, row in enumerate(effort["classes"].values()):
            if row is None:
                assert not pixels[number].any()
                continue
            assert np.allclose(row["leave"], pixels[number] / pixels[number].sum())
            assert row["cost_share"] == pytest.approx(cost[number] / pixels[number].sum())
        assert effort["all"]["cost_share"] == pytest.approx(told["cost_gmacs"]["mean_share"])
        with Image.open(tmp_path / "out" / "effort.png") as figure:
            assert figure.width > 300
        assert (tmp_path / "out" / "effort.svg").is_file()

    def test_without_a_budget_nobody_decided(self, model):
        seen = observe(model, open_data(replace(DATA, val_images=2), "val"), SkipEngine(model))
        assert seen.effort is None and seen.evaluation.precision == "float32"

    def test_images_of_several_sizes(self, model):
        """Also one that was looked at in another size, one that went all the way, and one without labels."""
        asked = iter([{"budget": 0.6}, {"budget": 0.7, "size": 1.0}, {"price": 0.3, "size": 0.5}, {"budget": 1.0}])
        notes, spent = EffortNotes(lambda pixels: model(pixels, **next(asked)), model), []
        for size in ((96, 64), (75, 135), (128, 192), (96, 64)):
            pixels = torch.from_numpy(noise(*size)).permute(2, 0, 1)[None]
            result = notes(pixels)
            notes.saw(pixels, np.full(size, 255 if size == (75, 135) else 3))
            seen, full = model_cost(model, result.seen or size), model_cost(model, size).full
            spent.append(float(seen.of_result(result.gates, result.exits)[0]) / full)
        found = notes.found()
        assert found.shares.shape == found.image.shape[:2] == (96, 64) and found.images == 4
        assert found.pixels[3].sum() == 2 * 96 * 64 + 128 * 192 and found.pixels[-1].sum() == 75 * 135
        assert not np.delete(found.pixels, (3, -1), axis=0).any()
        expected = 96 * 64 * (spent[0] + spent[3]) + 128 * 192 * spent[2]
        assert spent[3] == pytest.approx(1) and spent[2] < 0.3, "a share of the full network at its own size"
        assert found.spent[3] == pytest.approx(expected, rel=1e-3)
        assert found.shares.mean() == pytest.approx(np.mean(spent), abs=0.03), "at the edges places are smaller"

    def test_a_value_for_each_pixel(self):
        places = np.arange(6).reshape(2, 3)
        own, half = over_pixels(places, 32, (40, 70)), over_pixels(places, 32, (80, 140), seen=(40, 70))
        assert own.shape == (40, 70) and own[31, 63] == 1 and own[32, 64] == 5 and own[39, 0] == 3
        assert np.array_equal(half, own.repeat(2, 0).repeat(2, 1))
