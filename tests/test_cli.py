"""The commands as a user types them: outputs, exit codes, one clear message for each mistake."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import routeseg
from conftest import run, scenes_checkpoint
from pictures import noise, save
from routeseg import DynamicRoutingNetwork, Route, cli
from routeseg.data.scenes import CLASSES
from routeseg.errors import how_to_install
from routeseg.model.checkpoints import PRETRAINED

SCENES = ["--data.image_size=[48,64]", "--data.val_images=3", "--data.workers=0"]


@pytest.fixture
def checkpoint(tmp_path):
    return scenes_checkpoint(tmp_path / "net")


def test_help_and_version(capsys):
    code, out, _ = run(["--help"], capsys)
    assert code == 0 and all(command in out for command in ("train", "evaluate", "predict", "import-checkpoint"))
    code, out, _ = run(["--version"], capsys)
    assert code == 0 and routeseg.__version__ in out
    assert run([], capsys)[0] == 2
    code, _, err = run(["trian"], capsys)
    assert code == 2 and "did you mean train?" in err


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, 'pip install "routeseg[onnx]"'),
        ({"url": "file:///some/where", "dir_info": {"editable": True}}, 'pip install -e "/some/where[onnx]"'),
        ({"url": "file:///some/where", "dir_info": {}}, 'pip install "/some/where[onnx]"'),
        ({"url": "file:///w/routeseg.whl", "archive_info": {}}, 'pip install "routeseg[onnx]"'),
    ],
)
def test_the_way_to_an_extra_is_that_of_the_installation(origin, command, monkeypatch):
    def installed(name):
        return SimpleNamespace(read_text=lambda file: origin and json.dumps(origin))

    monkeypatch.setattr("importlib.metadata.distribution", installed)
    assert how_to_install("onnx") == command


def test_evaluate(tmp_path, checkpoint, capsys):
    file = tmp_path / "result.json"
    code, out, _ = run(["evaluate", checkpoint, *SCENES, "--json", file], capsys)
    assert code == 0 and "mIoU" in out and "pedestrian" in out
    assert "precision: " not in out and "float32" in out, "nothing was chosen"
    result = json.loads(file.read_text())
    assert result["precision"] == "float32"
    assert set(result) >= {"miou", "iou", "pixel_accuracy", "cost_gmacs", "images"}
    assert set(result["iou"]) == set(CLASSES) and result["images"] == 3
    cost = result["cost_gmacs"]
    assert cost["min"] <= cost["mean"] <= cost["max"] <= cost["full"]
    present = [v for v in result["iou"].values() if v is not None]
    assert result["miou"] == pytest.approx(np.mean(present))
    dense = tmp_path / "dense.json"
    assert run(["evaluate", checkpoint, *SCENES, "--json", dense, "--engine=dense"], capsys)[0] == 0
    assert json.loads(dense.read_text())["miou"] == pytest.approx(result["miou"], abs=1e-3)
    assert json.loads(dense.read_text())["precision"] == "float32"


def test_evaluate_counts_by_hand(tmp_path, checkpoint):
    """The confusion matrix of `evaluate` is the one that a loop over pixels gives."""
    from routeseg.data.config import DataConfig, open_data
    from routeseg.data.loaders import evaluation_loader
    from routeseg.evaluation import evaluate

    model = routeseg.load(checkpoint)
    pictures = open_data(DataConfig(image_size=(48, 64), val_images=3), "val")
    result = evaluate(model, evaluation_loader(pictures))
    expected = np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64)
    for index in range(3):
        image, labels = pictures.read(index)
        with torch.no_grad():
            found = model(torch.from_numpy(image.transpose(2, 0, 1).copy())[None]).labels[0].numpy()
        np.add.at(expected, (labels.ravel(), found.ravel()), 1)
    assert (result.confusion == expected).all()
    iou = [expected[k, k] / (expected[k].sum() + expected[:, k].sum() - expected[k, k]) for k in range(len(CLASSES))]
    assert result.miou == pytest.approx(np.nanmean(iou))
    assert result.pixel_accuracy == pytest.approx(np.trace(expected) / expected.sum())


def test_evaluate_mistakes(tmp_path, checkpoint, capsys):
    other = DynamicRoutingNetwork(num_classes=4, depth=3, base_channels=8, stem_channels=8).save(tmp_path / "other")
    for words, expected in (
        (["evaluate", other, *SCENES], "4 classes"),
        (["evaluate", tmp_path / "nothing", *SCENES], "no checkpoint folder"),
        (["evaluate", checkpoint, "--data.name=camvid", f"--data.root={tmp_path}"], "the expected tree is"),
        (["evaluate", checkpoint, "--data.name=folder", f"--data.root={tmp_path}"], "classes.yaml"),
        (["evaluate", checkpoint, *SCENES, "--engine=fast"], "skip or dense"),
        (["evaluate", checkpoint, *SCENES, "--convention=mine"], "authors"),
        (["evaluate", checkpoint, "--data.nmae=camvid"], "data.name"),
    ):
        code, _, err = run(words, capsys)
        assert code == 2 and expected in err, (words, err)
    (tmp_path / "file").write_text("")
    code, _, err = run(["evaluate", checkpoint, *SCENES, "--json", tmp_path / "file" / "x.json"], capsys)
    assert code == 2 and "cannot write" in err


class TestSections:
    """A command takes the sections that it uses, and passes over the others of a file that was made for training."""

    @pytest.fixture
    def commands(self, tmp_path, checkpoint):
        return {
            "evaluate": ["evaluate", checkpoint, "--json", tmp_path / "evaluate.json"],
            "routes": ["routes", checkpoint, "--permutations=20", "--output", tmp_path / "routes"],
            "check-data": ["check-data", "--output", tmp_path / "check"],
            "profile": ["profile", checkpoint, "--size=32x32", "--routes=1", "--repeats=1", "--output", tmp_path],
        }

    @pytest.mark.parametrize("command", ["evaluate", "routes", "check-data", "profile"])
    def test_other_keys_on_the_command_line_are_refused(self, commands, capsys, command):
        other = "--data.name=scenes" if command == "profile" else "--model.depth=3"
        for word in ("--recipe.lr=0.1", "--budget.weight=0.5", "--recipe.seed=3", other):
            code, _, err = run([*commands[command], word], capsys)
            name, remedy = word.partition("=")[0], "give --seed instead" if "seed" in word else "leave it out"
            assert code == 2 and err == f"routeseg: error: `routeseg {command}` does not take {name}: {remedy}\n"

    @pytest.mark.parametrize("command", ["evaluate", "routes", "check-data", "profile"])
    def test_a_file_for_training_is_taken(self, commands, tmp_path, capsys, command):
        file = tmp_path / "training.yaml"
        file.write_text(
            "model: {depth: 5, base_channels: 4}\n"
            "data: {image_size: [48, 64], val_images: 3, train_images: 2, workers: 0}\n"
            "recipe: {iterations: 7, lr: 1e-3, seed: 3}\nbudget: {weight: 0.5}\n"
        )
        code, _, err = run([*commands[command], "--config", file], capsys)
        assert code == 0, err

    def test_the_seed_of_its_recipe_counts(self, commands, tmp_path, capsys):
        def score(*words):
            assert run([*commands["evaluate"], *SCENES, *words], capsys)[0] == 0
            return json.loads((tmp_path / "evaluate.json").read_text())["iou"]

        first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
        first.write_text("recipe:\n  seed: 3\n")
        second.write_text("recipe:\n  lr: 1e-3\n")
        assert score("--config", first) == score("--seed=3") == score("--data.seed=3") != score()
        assert score("--config", first, "--config", second) == score("--seed=3"), "the second file has no seed"
        assert score("--config", first, "--data.seed=4") == score("--seed=4")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("modle: {depth: 3}", "no key 'modle.depth' in the configuration: did you mean model.depth?"),
            ("recipie: {lr: 3}", "no key 'recipie.lr' in the configuration: did you mean recipe.lr?"),
            ("data: {nmae: camvid}", "no key 'data.nmae' in the configuration: did you mean data.name?"),
            ("recipe: {seed: x}", "seed"),
            ("recipe: 3", "section 'recipe' of FILE is no mapping"),
            ("data: [", "FILE is no YAML"),
            (None, "FILE"),
        ],
    )
    def test_mistakes_in_a_file_are_named(self, commands, tmp_path, capsys, text, message):
        file = tmp_path / "training.yaml"
        if text is not None:
            file.write_text(text + "\n")
        code, _, err = run([*commands["evaluate"], "--config", file], capsys)
        assert code == 2 and message.replace("FILE", str(file)) in err and err.count("\n") == 1


def test_predict(tmp_path, checkpoint, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("a.png", (70, 50)), ("b.jpg", (64, 64))):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    code, out, _ = run(["predict", checkpoint, folder, "--output", tmp_path / "out", "--precision=auto"], capsys)
    assert code == 0 and "GMACs" in out and out.count("precision: float32 (") == 1
    assert json.loads((tmp_path / "out" / "a_route.json").read_text())["precision"] == "float32"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{n}_{kind}" for n in "ab" for kind in ("labels.png", "overlay.png", "route.png", "route.json")}
    route = Route.from_json((tmp_path / "out" / "a_route.json").read_text())
    assert route.space == routeseg.load(checkpoint).space
    (folder / "c.png").write_bytes(b"no image")
    code, out, _ = run(["predict", checkpoint, folder, "--output", tmp_path / "out2"], capsys)
    assert code == 2 and "c.png" in out and (tmp_path / "out2" / "b_labels.png").exists()


def test_predict_mistakes(tmp_path, checkpoint, capsys):
    for words, expected in (
        (["predict", checkpoint], "name the images"),
        (["predict", checkpoint, tmp_path / "nothing.jpg"], "nothing.jpg"),
        (["predict"], "inputs"),
    ):
        code, _, err = run(words, capsys)
        assert code == 2 and expected in err, (words, err)


class TestPredictOptions:
    def test_resume_and_lists(self, checkpoint, tmp_path, capsys):
        for seed, name in enumerate("ab"):
            save(tmp_path / "in" / f"{name}.png", noise(32, 64, seed))
        (tmp_path / "list.txt").write_text(f"{tmp_path}/in/*.png\n")
        words = ["predict", checkpoint, f"@{tmp_path}/list.txt", "--output", tmp_path / "out", "--pictures", "false"]
        code, out, err = run(words, capsys)
        assert code == 0 and not err and len(list((tmp_path / "out").iterdir())) == 4
        (tmp_path / "out" / "a_route.json").unlink()
        code, out, err = run([*words, "--resume"], capsys)
        assert code == 0 and "2 (1 of them from an earlier run)" in out
        other = scenes_checkpoint(tmp_path / "other", small_gate=True)
        code, out, err = run(["predict", other, *words[2:], "--resume"], capsys)
        assert code == 2 and "another network" in err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--engine", "fast"], "engine 'fast': choose"),
            (["--engine", "ray"], "engine 'ray': choose"),
            (["--output", "nonsense://x"], "cannot open nonsense://x"),
            (["--device", "cuda:99"], "--device cuda:99"),
        ],
    )
    def test_wrong_options(self, checkpoint, tmp_path, capsys, words, message):
        path = save(tmp_path / "a.png", noise(32, 64))
        code, _, err = run(["predict", checkpoint, path, "--output", tmp_path / "out", *words], capsys)
        assert code == 2 and message in err
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(not PRETRAINED.is_dir(), reason="this copy comes without the small network")
def test_predict_with_the_network_that_comes_along(tmp_path, capsys):
    Image.fromarray(np.full((360, 480, 3), 120, dtype=np.uint8)).save(tmp_path / "street.png")
    code, out, _ = run(["predict", tmp_path / "street.png", "--output", tmp_path / "out"], capsys)
    assert code == 0 and "CamVid" in out
    labels = Image.open(tmp_path / "out" / "street_labels.png")
    assert labels.size == (480, 360) and labels.mode == "P"


def test_make_data_and_train_on_it(tmp_path, capsys):
    data = tmp_path / "data"
    words = ["make-data", "scenes", data, "--train=4", "--val=2", "--size=[48,64]"]
    assert run(words, capsys)[0] == 0
    assert len(list((data / "images" / "train").iterdir())) == len(list((data / "masks" / "train").iterdir())) == 4
    code, _, err = run(words, capsys)
    assert code == 2 and "already holds" in err
    network = ["--model.depth=3", "--model.base_channels=4", "--model.stem_channels=4"]
    short = ["--recipe.iterations=2", "--recipe.precise_bn_batches=1", "--data.crop=[32,32]", "--data.workers=0"]
    folder = ["--data.name=folder", f"--data.root={data}", "--data.batch_size=2", "--accelerator=cpu"]
    assert run(["train", *network, *short, *folder, "--output", tmp_path / "run"], capsys)[0] == 0
    assert routeseg.load(tmp_path / "run" / "best").config.class_names == CLASSES
    assert run(["make-data", "cities", data], capsys)[0] == 2
    assert run(["make-data", "scenes", tmp_path / "x", "--preset=huge"], capsys)[0] == 2


def test_import_checkpoint(tmp_path, capsys):
    from conftest import GOLDEN

    code, out, _ = run(["import-checkpoint", GOLDEN / "tiny_open.weights.safetensors", tmp_path / "net"], capsys)
    assert code == 0 and "depth=5" in out and "0.083 M parameters" in out
    assert routeseg.load(tmp_path / "net").config.base_channels == 8
    code, _, err = run(["import-checkpoint", tmp_path / "none.pth", tmp_path / "x"], capsys)
    assert code == 2 and "none.pth" in err and not (tmp_path / "x").exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs a name that cannot be a folder")
def test_import_into_a_folder_that_cannot_be_written(capsys):
    from conftest import GOLDEN

    code, _, err = run(["import-checkpoint", GOLDEN / "tiny_open.weights.safetensors", "/proc/net-out"], capsys)
    assert code == 2 and "cannot write" in err


def test_demo(tmp_path, capsys):
    """The whole chain at the smallest size; the report stands alone."""
    network = ["--model.depth=3", "--model.base_channels=4", "--model.stem_channels=4"]
    data = [*SCENES, "--data.crop=[32,64]", "--data.train_images=6", "--data.batch_size=2"]
    recipe = [
        "--recipe.iterations=4",
        "--recipe.validate_every=2",
        "--recipe.precise_bn_batches=1",
        "--recipe.log_every=1",
    ]
    code, out, _ = run(["demo", *network, *data, *recipe, "--budget.weight=0.5", "--output", tmp_path], capsys)
    assert code == 0 and "mIoU" in out
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64" in page and "http" not in page.replace("http-equiv", "")
    facts = json.loads((tmp_path / "result.json").read_text())
    assert set(facts) >= {"miou", "majority_class_miou", "cost_by_preset", "machine", "date", "versions"}
    assert set(facts["cost_by_preset"]) == {"large", "small", "mixed"}
    for name in ("routes", "curves", "class_iou", "cost"):
        assert Image.open(tmp_path / f"{name}.png").width > 300


@pytest.mark.parametrize(
    "load, before, after",
    [(0.1, None, None), (2.0, None, "PASSIVE"), (2.0, "ACTIVE", "ACTIVE")],
    ids=["idle", "busy", "told"],
)
def test_threads_sleep_beside_other_work(monkeypatch, load, before, after):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if before:
        monkeypatch.setenv("OMP_WAIT_POLICY", before)
    cli._let_threads_sleep()
    assert os.environ.get("OMP_WAIT_POLICY") == after
