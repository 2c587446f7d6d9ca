"""Images in Python: whatever holds one, and what comes back."""

import io
import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import routeseg
from conftest import spread_gates
from routeseg import DynamicRoutingNetwork, SkipEngine
from routeseg.cli import main
from routeseg.data.pairs import LabelMap, Pair, PairedFiles, read_image
from routeseg.labels import Classes
from routeseg.prediction import image as images_in_python
from routeseg.prediction.clips import open_clip
from routeseg.prediction.torch_runner import open_network

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

    @pytest.mark.parametrize("kind", ["grey 16 bits", "colour 12 bits", "grey float"])
    def test_of_other_ranges_too(self, model, tmp_path, web_server, kind):
        """Also as training reads it."""
        rng = np.random.default_rng(0)
        if kind == "grey float":
            values, path = rng.random((50, 70), np.float32), tmp_path / "photo.tif"
        else:
            shape, most = ((50, 70), 65536) if kind == "grey 16 bits" else ((50, 70, 3), 4096)
            values, path = rng.integers(0, most, shape).astype(np.uint16), tmp_path / "photo.png"
        cv2.imwrite(str(path), values[..., ::-1] if values.ndim == 3 else values)
        colours = values if values.ndim == 3 else np.stack([values] * 3, axis=-1)
        expected = model.predict(path)
        assert expected.image.max() == 255 and expected.image.std() > 70, "neither dark nor cut off"
        held = colours if values.dtype == np.float32 else colours.astype(np.int32)
        for image in (f"{web_server(tmp_path)}/{path.name}", Image.open(path), colours, tensor(held), expected.image):
            found = model.predict(image)
            assert np.array_equal(found.image, expected.image) and np.array_equal(found.labels, expected.labels)
        pair = Pair("photo", path, None)
        trained = PairedFiles([pair], Classes(("a", "b")), LabelMap(2, {}, {})).read(0)[0]
        assert np.array_equal(trained, expected.image)

    def test_a_frame_of_a_video_is_the_image_that_was_written(self, picture, tmp_path):
        av = pytest.importorskip("av")
        with av.open(str(tmp_path / "clip.mkv"), "w") as file:
            stream = file.add_stream("ffv1", rate=25)
            stream.width, stream.height, stream.pix_fmt = 70, 50, "bgr0"
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="bgr0")
            file.mux([*stream.encode(frame), *stream.encode()])
        Image.fromarray(picture).save(tmp_path / "photo.png")
        (frame,) = open_clip(tmp_path / "clip.mkv")
        assert np.array_equal(frame.pixels, read_image(tmp_path / "photo.png"))

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

    def test_saved_as_the_command_saves(self, model, picture, tmp_path, capsys):
        Image.fromarray(picture).save(tmp_path / "photo.png")
        model.save(tmp_path / "net")
        (tmp_path / "other.heic").touch()
        words = ["predict", str(tmp_path / "net"), str(tmp_path), "--output", str(tmp_path / "command")]
        assert main([*words, "--precision=float32"]) == 0
        assert "passed over, as no images: 1 .heic\n" in capsys.readouterr().out
        paths = routeseg.load(tmp_path / "net").predict(tmp_path / "photo.png").save(tmp_path / "python")
        assert sorted(path.name for path in paths) == sorted(p.name for p in (tmp_path / "command").iterdir())
        for path in paths:
            assert path.read_bytes() == (tmp_path / "command" / path.name).read_bytes(), path
        data = json.loads((tmp_path / "python" / "photo_route.json").read_text())
        assert data["class_shares"] == routeseg.load(tmp_path / "net").predict(tmp_path / "photo.png").shares


class TestTheEngine:
    def test_it_is_built_once_and_anew_after_training(self, model, picture, monkeypatch):
        built = []
        monkeypatch.setattr(images_in_python, "open_network", lambda *args: built.append(1) or open_network(*args))
        before = model.predict(picture).labels
        model.predict(picture)
        assert len(built) == 1
        with torch.no_grad():
            model.decoder.predictor.bias += torch.tensor([0.0, 0.0, 100.0, 0.0, 0.0])
        assert (model.predict(picture).labels == 2).all() and len(built) == 2 and not (before == 2).all()

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
