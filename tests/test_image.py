"""Images in Python: whatever holds one, and what comes back."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import routeseg
from conftest import spread_gates
from routeseg import DynamicRoutingNetwork, SkipEngine
from routeseg.cli import main
from routeseg.engine import build_engine
from routeseg.prediction import image as images_in_python

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


@pytest.fixture
def model() -> DynamicRoutingNetwork:
    torch.manual_seed(0)
    return spread_gates(DynamicRoutingNetwork(num_classes=5, depth=3, base_channels=8, stem_channels=8)).eval()


def tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture.transpose(2, 0, 1).copy())


class TestWhatHoldsAnImage:
    def test_all_of_them_give_the_same(self, model, picture, tmp_path, server):
        path = tmp_path / "photo.png"
        Image.fromarray(picture).save(path)
        expected = SkipEngine(model)(tensor(picture)[None]).labels[0].numpy()
        for image in (
            str(path),
            path,
            Image.fromarray(picture),
            picture,
            picture.astype(np.float32) / 255,
            tensor(picture),
            tensor(picture).double() / 255,
        ):
            found = model.predict(image)
            assert np.array_equal(found.labels, expected) and np.array_equal(found.image, picture)
        assert model.predict(path).name == "photo" and model.predict(picture).name == "image"

    def test_several_give_a_list(self, model, picture):
        other = picture[::-1]
        batch = torch.stack([tensor(picture), tensor(other)])
        for images in ([picture, other], (picture, Image.fromarray(other)), batch, np.stack([picture, other])):
            found = model.predict(images)
            assert isinstance(found, list) and len(found) == 2
            assert np.array_equal(found[1].labels, model.predict(other).labels)
        assert [one.name for one in found] == ["image", "image-2"] and model.predict([]) == []

    def test_a_call_is_the_same(self, model, picture):
        """A tensor is segmented as ever, so that training and engines see no difference."""
        assert np.array_equal(model(picture).labels, model.predict(picture).labels)
        assert isinstance(model(tensor(picture)[None]), routeseg.Segmentation)

    def test_an_image_smaller_than_the_network_takes(self, model, picture):
        assert model.predict(picture[:10, :20]).labels.shape == (10, 20)

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (np.full((50, 70, 3), 200.0), "divide by 255"),
            (np.full((50, 70, 3), -1.0, np.float32), "normalised already"),
            (np.full((50, 70, 3), np.nan), "taken as 0..1"),
            (np.zeros((50, 70, 3), np.int64), "an image of int64"),
            (np.zeros((3, 50, 70), np.uint8), r"image.transpose\(1, 2, 0\)"),
            (np.zeros((50, 70, 4), np.uint8), r"image\[..., :3\]"),
            (np.zeros((50, 70), np.uint8), "no channels"),
            (torch.zeros(50, 70, 3), r"give \[3,H,W\]"),
            (3, "int is no image"),
            (None, "NoneType is no image"),
            ("/nowhere/photo.jpg", "cannot read /nowhere/photo.jpg"),
        ],
    )
    def test_what_is_none(self, model, image, message):
        with pytest.raises(ValueError, match=message):
            model.predict(image)


class TestWhatComesBack:
    def test_numbers(self, model, picture):
        found = model.predict(picture)
        assert found.labels.dtype == np.uint8 and found.labels.shape == (50, 70)
        assert sum(found.shares.values()) == pytest.approx(1) and list(found.shares) == sorted(
            found.shares, key=found.shares.get, reverse=True
        )
        macs = routeseg.model_cost(model, (50, 70)).of_gates(found.gates)
        assert found.cost_gmacs == pytest.approx(float(macs) / 1e9) and found.cost_gmacs < found.full_gmacs
        assert found.route == routeseg.Route.from_gates(model.space, found.gates)
        assert found.milliseconds > 0 and "70x50" in repr(found) and "% of the network" in repr(found)

    def test_pictures(self, model, picture):
        found = model.predict(picture)
        assert found.overlay(legend=False).size == (70, 50)
        assert Image.open(io.BytesIO(found._repr_png_())).size == found.overlay().size

    def test_saved_as_the_command_saves(self, model, picture, tmp_path):
        Image.fromarray(picture).save(tmp_path / "photo.png")
        model.save(tmp_path / "net")
        words = ["predict", str(tmp_path / "net"), str(tmp_path / "photo.png"), "--output", str(tmp_path / "command")]
        assert main([*words, "--precision=float32"]) == 0
        paths = routeseg.load(tmp_path / "net").predict(tmp_path / "photo.png").save(tmp_path / "python")
        assert sorted(path.name for path in paths) == sorted(p.name for p in (tmp_path / "command").iterdir())
        for path in paths:
            assert path.read_bytes() == (tmp_path / "command" / path.name).read_bytes(), path
        data = json.loads((tmp_path / "python" / "photo_route.json").read_text())
        assert data["class_shares"] == routeseg.load(tmp_path / "net").predict(tmp_path / "photo.png").shares


def by_data(model):
    model.decoder.predictor.bias.data.add_(torch.tensor([0.0, 0.0, 100.0, 0.0, 0.0]))


def by_an_array(model):
    model.decoder.predictor.bias.detach().numpy()[2] += 100


def in_place(model):
    with torch.no_grad():
        model.decoder.predictor.bias[2] += 100


def by_a_state(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["decoder.predictor.bias"][2] += 100
    model.load_state_dict(state)


def by_assigning_a_state(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["decoder.predictor.bias"][2] += 100
    model.load_state_dict(state, assign=True)


def by_a_new_parameter(model):
    model.decoder.predictor.bias = torch.nn.Parameter(model.decoder.predictor.bias + 100 * torch.eye(5)[2])


def by_an_order(model):
    """The same numbers, elsewhere."""
    model.decoder.predictor.weight.data.copy_(model.decoder.predictor.weight.flip(0))


def by_a_statistic(model):
    model.stem[0][1].running_mean.data.numpy()[:] += 3


def by_no_number(model):
    model.decoder.predictor.bias.data[0] = torch.nan


CHANGES = [by_data, by_an_array, in_place, by_a_state, by_assigning_a_state, by_a_new_parameter, by_an_order]


class TestTheEngine:
    def test_it_is_built_once(self, model, picture, monkeypatch):
        built = []
        monkeypatch.setattr(images_in_python, "build_engine", lambda *args: built.append(1) or build_engine(*args))
        model.predict(picture), model.predict(picture)
        assert len(built) == 1

    @pytest.mark.parametrize("change", [*CHANGES, by_a_statistic])
    def test_it_is_built_anew_however_weights_change(self, model, picture, change):
        before = model.predict(picture).labels
        change(model)
        expected = model.forward(tensor(picture)[None]).labels[0].numpy()
        assert not np.array_equal(before, expected)
        assert np.array_equal(model.predict(picture).labels, expected)

    def test_weights_that_are_no_numbers_are_seen_too(self, model, picture):
        model.predict(picture)
        by_no_number(model)
        with pytest.raises(ValueError, match="NaN"):
            model.predict(picture)

    def test_threads_with_images_of_different_sizes(self):
        model = routeseg.load()
        random = np.random.default_rng(0)
        images = [
            random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((40, 70), (70, 40), (64, 64), (33, 99))
        ]
        budgets = ("30%", None)  # that of few scales, and that of all
        expected = [[model.predict(image, budget).labels for budget in budgets] for image in images]
        model.train()  # however it stands: it is left so
        images_in_python._runners.clear()  # they also build it

        def work(number: int) -> None:
            for turn in range(12):
                place = (number + turn) % len(images)
                for budget, labels in zip(budgets, expected[place], strict=True):
                    assert np.array_equal(model.predict(images[place], budget).labels, labels)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))  # raises what a thread raised
        assert model.training

    def test_a_network_in_training_stays_so(self, model, picture):
        model.train()
        model.predict(picture)
        assert model.training

    def test_a_budget(self, picture):
        model = DynamicRoutingNetwork(
            num_classes=5, depth=4, base_channels=8, stem_channels=8, gate="fixed", route="diagonal", exits=[0, 1, 2]
        ).eval()
        with pytest.raises(ValueError, match="calibrate"):
            model.predict(picture, budget=0.5)
        with torch.no_grad():
            model.exits.costs.copy_(torch.tensor([0.3, 0.5, 0.7, 1.0]))
            model.exits.prices.copy_(torch.arange(len(model.exits.prices)))
            model.exits.frequencies[:, 3], model.exits.frequencies[-1] = 1.0, torch.tensor([1.0, 0, 0, 0])
            for k, gate in enumerate(model.exits.gates):
                gate.bias.copy_(torch.tensor([0.3, 0.2, 0.1, 0.0])[k:])  # each exit is better than the one before
        for budget in (0.3, "30%"):
            cheap = model.predict(picture, budget=budget)
            assert cheap.cost_gmacs < model.predict(picture, budget=1.0).cost_gmacs
        with pytest.raises(ValueError, match="cannot be kept"):
            model.predict(picture, budget=0.1)
        with pytest.raises(ValueError, match="no gates|exits|budget"):
            DynamicRoutingNetwork(num_classes=5, depth=3, base_channels=8).predict(picture, budget=0.5)


def test_the_network_that_comes_along(picture):
    """The first lines of the README."""
    result = routeseg.load()(picture)
    assert set(result.shares) <= set(routeseg.load().config.class_names)
