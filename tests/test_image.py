"""Images in Python: whatever holds one, and what comes back."""

import base64
import io
import json
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import routeseg
from conftest import spread_gates
from routeseg import DynamicRoutingNetwork, Segmentation, Segmenter, SkipEngine, figures
from routeseg.app.explorer import Explorer
from routeseg.cli import main
from routeseg.cost.macs import exit_costs
from routeseg.data.decoding import read_image
from routeseg.data.label_files import LabelMap
from routeseg.data.pairs import Pair, PairedFiles
from routeseg.evaluation import evaluate
from routeseg.figures.labels import legend_entries
from routeseg.labels import Classes
from routeseg.model.request import Request
from routeseg.prediction import segmenter
from routeseg.prediction.clips import open_clip
from routeseg.prediction.onnx_runner import most_likely
from routeseg.training.initialization import initialize


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


@pytest.fixture
def model() -> Segmenter:
    torch.manual_seed(0)
    return spread_gates(Segmenter(num_classes=5, depth=3, base_channels=8, stem_channels=8)).eval()


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

    def test_it_is_a_network(self, model, picture):
        """Also a static one that is made of it; a network that is none says where files are taken."""
        assert isinstance(routeseg.load(), Segmenter) and isinstance(model, DynamicRoutingNetwork)
        assert model.specialize(model.route)(picture).labels.shape == (50, 70)
        plain = DynamicRoutingNetwork(num_classes=5, depth=3, base_channels=8, stem_channels=8)
        for image in ("photo.jpg", picture):
            with pytest.raises(ValueError, match=r"no tensor \[B,3,H,W\]: a `Segmenter` .`routeseg.load` gives one"):
                plain(image)

    def test_a_tensor_of_one_image_is_for_predict(self, model, picture):
        for forward in (model, SkipEngine(model)):
            with pytest.raises(ValueError, match=r"\[3, 50, 70\].*`.predict\(image\)` takes \[3,H,W\]"):
                forward(tensor(picture))
        assert np.array_equal(model([tensor(picture)])[0].labels, model.predict(tensor(picture)).labels)

    @pytest.mark.parametrize(
        "image",
        [np.zeros((0, 0, 3), np.uint8), np.zeros((0, 70, 3)), np.zeros((50, 0, 3), np.uint8), torch.zeros(3, 0, 70)]
        + [
            np.zeros((2, 50, 0, 3), np.uint8),
            torch.zeros(2, 3, 0, 0),
            Image.new("RGB", (0, 0)),
            Image.new("RGB", (0, 9)),
        ],
    )
    def test_an_image_without_pixels(self, model, image):
        with pytest.raises(ValueError, match="an image of .*0.* has no pixels"):
            model.predict(image)

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
            own, other = path.read_bytes(), (tmp_path / "command" / path.name).read_bytes()
            if path.suffix == ".json":  # the command knows the file's content, by which it resumes
                own, other = ({**json.loads(one), "image_content": None} for one in (own, other))
            assert own == other, path
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


@pytest.mark.parametrize(
    ("classes", "dtype", "mode"),
    [(255, np.uint8, "P"), (256, np.uint8, "P"), (300, np.uint16, "I;16")],
)
class TestManyClasses:
    """Each pixel gets its class, whatever its number: the left half the last one, the right half 255 or 254."""

    @pytest.fixture
    def made(self, classes, picture, monkeypatch):
        model = Segmenter(num_classes=classes, depth=3, base_channels=8, stem_channels=8).eval()
        expected = np.full((50, 70), classes - 1)
        expected[:, 40:] = min(255, classes - 2)
        forward = model.answer

        def answer(images, request):
            found = forward(images, request)
            height, width = images.shape[-2:]
            labels = torch.from_numpy(np.pad(expected, ((0, 0), (0, 999)))[:height, :width].copy())
            return Segmentation(
                torch.nn.functional.one_hot(labels, classes).permute(2, 0, 1)[None].float(), found.gates
            )

        request = Request.of(model.config, 1)
        monkeypatch.setattr(SkipEngine, "__call__", lambda self, images, **how: answer(images, request))
        monkeypatch.setattr(SkipEngine, "labels", lambda self, images, **how: answer(images, request).labelled())
        return model, expected

    def test_in_python_and_files(self, made, picture, tmp_path, dtype, mode):
        model, expected = made
        found = model.predict(picture)
        assert found.labels.dtype == dtype and np.array_equal(found.labels, expected)
        names = [f"class {expected[0, 0]}", f"class {expected[0, -1]}"]
        assert list(found.shares) == names
        found.save(tmp_path)
        with Image.open(tmp_path / "image_labels.png") as stored:
            assert stored.mode == mode and np.array_equal(np.asarray(stored), expected)
        colours = np.array(model.config.palette)
        assert np.array_equal(figures.colorize(found.labels, colours), colours[expected])
        assert [name for name, _, _ in legend_entries(found.labels, found.class_names, colours)] == names
        assert np.asarray(found.overlay(alpha=1.0, legend=False))[25, 5].tolist() == colours[expected[25, 5]].tolist()

    def test_in_the_explorer(self, made, picture, tmp_path, dtype, mode):
        model, expected = made
        Image.fromarray(picture).save(tmp_path / "a.png")
        explorer = Explorer(model, "x")
        question = {"file": base64.b64encode((tmp_path / "a.png").read_bytes()).decode()}
        view = explorer.look({"picture": explorer.open(question)["picture"]})
        sent = np.frombuffer(zlib.decompress(base64.b64decode(view["labels"])), dtype)
        assert np.array_equal(sent.reshape(50, 70), expected)

    def test_in_onnx(self, dtype, mode, classes):
        logits = np.zeros((classes, 2, 2), np.float32)
        logits[classes - 1] = 1
        labels, _ = most_likely(logits)
        assert labels.dtype == dtype and (labels == classes - 1).all()

    def test_labels_of_data_sets_hold_255(self, made, classes, dtype, mode):
        model, expected = made
        labels = torch.from_numpy(np.minimum(expected, 254))[None]
        example = {"image": torch.zeros(1, 3, 50, 70), "labels": labels, "name": "a", "skipped": 0}
        if classes == 255:
            assert evaluate(model, [example], SkipEngine(model)).pixel_accuracy > 0.5
        else:
            with pytest.raises(ValueError, match=f"{classes} classes: labels hold at most 255"):
                evaluate(model, [example], SkipEngine(model))


class TestFiles:
    def test_the_name_of_an_image_gets_the_overlay(self, model, picture, tmp_path):
        found = model.predict(picture)
        for name in ("x.png", "deep/x.PNG", "x.jpg", "x.webp"):
            assert found.save(str(tmp_path / name)) == [tmp_path / name]
            assert Image.open(tmp_path / name).size == found.overlay().size
        assert np.array_equal(Image.open(tmp_path / "x.png"), found.overlay())

    def test_other_names_are_folders(self, model, picture, tmp_path):
        (tmp_path / "there.png").mkdir()
        for name in ("plain", "v1.2", "there.png"):
            paths = model.predict(picture).save(tmp_path / name)
            assert len(paths) == 4 and {path.parent for path in paths} == {tmp_path / name}

    def test_what_cannot_be_written(self, model, picture, tmp_path):
        (tmp_path / "file").touch()
        for name in ("file/x.png", "x.mpg"):
            with pytest.raises(ValueError, match="file|x.mpg"):
                model.predict(picture).save(tmp_path / name)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_a_run_stands_for_its_best_network(self, model, picture, tmp_path):
        model.save(tmp_path / "my" / "best")
        expected = model.predict(picture).labels
        for folder in (tmp_path / "my", str(tmp_path / "my"), tmp_path / "my" / "best"):
            assert np.array_equal(routeseg.load(folder)(picture).labels, expected)
        assert initialize(model, tmp_path / "my").used
        DynamicRoutingNetwork(num_classes=3, depth=3, base_channels=8).save(tmp_path / "my")  # it is one itself
        assert routeseg.load(tmp_path / "my").config.num_classes == 3


@pytest.mark.slow
def test_type_checkers_see_what_comes_back(tmp_path):
    """None of these is Any: each has an attribute too many."""
    mypy = pytest.importorskip("mypy.api")
    calls = {
        "SegmentedImage": ["model('a.jpg')", "model(Path('a.jpg'), budget='40%')", "model(Image.new('L', (9, 9)))"]
        + ["model(np.zeros((9, 9, 3)), budget=np.float32(0.4))", "model.predict('a.jpg')"]
        + ["model.predict(torch.zeros(3, 9, 9), precision='bfloat16')", "model(['a', 'b'])[0]"]
        + ["model.predict(('a', Path('b')))[0]", "routeseg.train('my').model('a.jpg')"],
        "Segmentation": [
            "model(torch.zeros(1, 3, 64, 64), budget=0.4)",
            "routeseg.SkipEngine(model, 'bfloat16')(batch)",
        ],
    }
    lines = ["from pathlib import Path", "import numpy as np, torch, routeseg", "from PIL import Image"]
    lines += ["model, batch = routeseg.load(), torch.zeros(1, 3, 64, 64)"]
    lines += [f"{call}.nonsense" for some in calls.values() for call in some]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    out, err, _ = mypy.run(["--strict", "--config-file=", str(tmp_path / "user.py")])
    for kind, some in calls.items():
        assert out.count(f'"{kind}" has no attribute "nonsense"') == len(some), out + err
    assert out.count("error:") == sum(map(len, calls.values())), out


class TestTheEngine:
    def test_it_is_built_once(self, model, picture, monkeypatch):
        built = []
        monkeypatch.setattr(segmenter, "SkipEngine", lambda *args: built.append(1) or SkipEngine(*args))
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
        segmenter._runners.clear()  # they also build it

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
        model = Segmenter(
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
        assert model.predict(picture).levels == pytest.approx(
            exit_costs(model, (64, 96)) / exit_costs(model, (64, 96))[-1]
        )
        for budget in (0.3, "30%", np.float32(0.3), torch.tensor(0.3)):
            cheap = model.predict(picture, budget=budget)
            assert cheap.cost_gmacs < model.predict(picture, budget=np.int64(1)).cost_gmacs
            assert cheap.cost_gmacs / cheap.full_gmacs == pytest.approx(cheap.levels[0])
            assert f"(it can be {100 * cheap.levels[0]:.3g}, " in repr(cheap)
        with pytest.raises(ValueError, match='budget is 40: .*the text "40%"'):
            model.predict(picture, budget=40)
        with pytest.raises(ValueError, match="cannot be kept"):
            model.predict(picture, budget=0.1)
        with pytest.raises(ValueError, match="no gates|exits|budget"):
            Segmenter(num_classes=5, depth=3, base_channels=8).predict(picture, budget=0.5)


def test_the_network_that_comes_along(picture):
    """The first lines of the README."""
    result = routeseg.load()(picture)
    assert set(result.shares) <= set(routeseg.load().config.class_names)
