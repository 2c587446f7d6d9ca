"""The commands as a user types them: outputs, exit codes, one clear message for each mistake."""

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import routeseg
from conftest import run, scenes_checkpoint
from pictures import noise, save
from routeseg import DynamicRoutingNetwork, Route, cli
from routeseg.cli.prediction import _network_first
from routeseg.data.scenes import CLASSES
from routeseg.description import fingerprint
from routeseg.errors import how_to_install
from routeseg.files import bundled_networks
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


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_a_reader_that_has_seen_enough(words):
    """`routeseg --help | head -1`: the command ends without a word."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run([sys.executable, "-m", "routeseg.cli", *words], stdout=pipe, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


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
        (["evaluate", checkpoint, *SCENES, "--convention=mine"], "authors"),
        (["evaluate", checkpoint, "--data.nmae=camvid"], "data.name"),
    ):
        code, _, err = run(words, capsys)
        assert code == 2 and expected in err, (words, err)
    moved = scenes_checkpoint(tmp_path / "moved")
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    names = config["class_names"]
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config | {"class_names": names[1::-1] + names[2:]}))
    code, _, err = run(["evaluate", moved, *SCENES], capsys)
    assert code == 2 and f"classes in another order: class 0 is {names[1]} there, and {names[0]} in the data set" in err
    (tmp_path / "file").write_text("")
    code, _, err = run(["evaluate", checkpoint, *SCENES, "--json", tmp_path / "file" / "x.json"], capsys)
    assert code == 2 and "cannot write" in err


# A list of a list of ... of words, by aliases: 10 ** 11 words in a few lines.
BOMB = "a: &a [x]\n" + "".join(
    f"{one}: &{one} [{', '.join([f'*{before}'] * 10)}]\n" for before, one in pairwise("abcdefghijk")
)


class TestSections:
    """A command takes the sections that it uses, and passes over the others of a file that was made for training."""

    @pytest.fixture
    def commands(self, tmp_path, checkpoint):
        return {
            "evaluate": ["evaluate", checkpoint, "--json", tmp_path / "evaluate.json"],
            "routes": ["routes", checkpoint, "--permutations=20", "--output", tmp_path / "routes"],
            "check-data": ["check-data", "--output", tmp_path / "check"],
            "profile": ["profile", checkpoint, "--size=32x32", "--repeats=1", "--output", tmp_path],
        }

    @pytest.mark.parametrize("command", ["evaluate", "routes", "check-data", "profile"])
    def test_other_keys_on_the_command_line_are_refused(self, commands, capsys, command):
        other = "--data.name=scenes" if command == "profile" else "--model.depth=3"
        for word in ("--recipe.lr=0.1", "--gate_budget.weight=0.5", "--recipe.seed=3", other):
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
            (BOMB + "data: {name: *k}", "FILE is no YAML that can be used: it has more than 20000 values"),
            (BOMB + "data: {? *k : 1}", "FILE is no YAML that can be used: it has more than 20000 values"),
            ("data: &a {name: *a}", "FILE is no YAML that can be used: it has more than 20000 values"),
            ("data: " + "[" * 5000, "FILE is no YAML that can be used: its lists are nested too deeply"),
            ("data: {name: *nowhere}", "FILE is no YAML that can be used: found undefined alias"),
            ("data: !!python/object/apply:os.getcwd []", "FILE is no YAML that can be used"),
            ("data: {name: !!python/object/apply:os.getcwd []}", "FILE"),
            ("? [data]\n: 1", "FILE"),
            ("data: {? [a]\n: 1}", "FILE"),
            ("data: {workers: 1e400}", "data.workers"),
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


class TestTheFirstWord:
    """Of `predict`: a network, an image, or one line; never an image by the bundled network in place of another one."""

    @pytest.fixture
    def made_by(self, checkpoint, tmp_path, capsys):
        """The fingerprint of the network that segmented an image."""
        image = save(tmp_path / "photo.jpg", noise(32, 64))

        def predict(word):
            code, _, err = run(["predict", word, image, "--pictures=false", "--output", tmp_path / "out"], capsys)
            assert code == 0, err
            return json.loads((tmp_path / "out" / "photo_route.json").read_text())["network"]

        return predict

    def test_weights_and_runs_are_networks(self, checkpoint, tmp_path, made_by):
        net = tmp_path / "net"
        mine = fingerprint(routeseg.load(net))
        assert made_by(net / "model.safetensors") == made_by(net / "config.json") == made_by(net) == mine
        runs = tmp_path / "runs"
        shutil.copytree(net, runs / "last")
        (runs / "last.ckpt").write_bytes(b"")
        assert made_by(runs) == made_by(runs / "last.ckpt") == mine, "it has no best network yet"
        best = fingerprint(routeseg.load(scenes_checkpoint(runs / "best", small_gate=True)))
        assert made_by(runs) == best != mine and made_by(runs / "last.ckpt") == mine

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("net.pth", "no checkpoint folder"),
            ("other.ckpt", "no checkpoint folder"),
            ("gone.pt", "no checkpoint folder"),
            ("half", "half is no checkpoint: config.json is missing"),
            ("cut", "cut is no checkpoint: model.safetensors is missing"),
            ("begun", "begun is no checkpoint"),
            ("notes.txt", "notes.txt is no network and no image: name a folder with model.safetensors"),
            ("net.pdparams", "net.pdparams is no network and no image"),
            ("s3://bucket/model.safetensors", "no checkpoint folder"),
        ],
    )
    def test_what_is_no_network_is_one_line(self, checkpoint, tmp_path, capsys, monkeypatch, word, message):
        monkeypatch.chdir(tmp_path)
        for name in ("net.pth", "other.ckpt", "notes.txt", "net.pdparams", "half/model.safetensors", "cut/config.json"):
            os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
            (tmp_path / name).write_bytes(b"weights")
        (tmp_path / "begun" / "logs").mkdir(parents=True)
        (tmp_path / "begun" / "config.yaml").write_text("")
        for path in ("photo.jpg", "begun/progress.png"):
            save(tmp_path / path, noise(32, 64))
        code, out, err = run(["predict", word, "photo.jpg"], capsys)
        assert code == 2 and message in err and err.count("\n") == 1 and "bundled" not in out
        assert not (tmp_path / "predictions").exists()

    def test_a_second_network_is_refused(self, checkpoint, tmp_path, capsys):
        image = save(tmp_path / "photo.jpg", noise(32, 64))
        for word in (checkpoint, f"{checkpoint}/model.safetensors", "x.ckpt"):
            code, _, err = run(["predict", image, word, "--output", tmp_path / "out"], capsys)
            assert code == 2 and "is a network: name one, before the images" in err

    def test_an_image_of_any_suffix_is_one(self, checkpoint, tmp_path):
        save(tmp_path / "a.png", noise(32, 64)).rename(tmp_path / "photo.dat")
        assert _network_first([str(tmp_path / "photo.dat")]) == (None, [str(tmp_path / "photo.dat")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "x.png", "--outp", "p2"], "no option --outp: did you mean output?"),
        (["predict", "x.png", "--bud=50%"], "no option --bud: did you mean budget?"),
        (["predict", "x.png", "-output", "p2"], "no option -output: did you mean output?"),
        (["train", "--config=small", "--recipe.iteration=10"], "did you mean recipe.iterations?"),
        (["train", "--config=small", "--data.roo", "x"], "did you mean data.root?"),
        (["demo", "--min=1"], "no option --min: did you mean minutes?"),
        (["export", "x", "--ro"], "no option --ro: did you mean rout"),
        (["app", "--por=1"], "no option --por: did you mean port?"),
    ],
)
def test_an_option_is_named_in_full(words, message, capsys):
    code, _, err = run(words, capsys)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["predict", "evaluate", "routes"])
def test_help_shows_a_percentage_as_it_is_typed(command, capsys):
    code, out, _ = run([command, "--help"], capsys)
    assert code == 0 and "%%" not in out and "40%" in out


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
            (["--engine", "dense"], "there is no engine any more: leave it out"),
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
    assert code == 0 and "the bundled network for streets (camvid)" in out
    labels = Image.open(tmp_path / "out" / "street_labels.png")
    assert labels.size == (480, 360) and labels.mode == "P"


class TestBundledNetworks:
    def test_each_is_found_by_its_name(self):
        networks = bundled_networks()
        assert PRETRAINED in networks.values()
        for name, folder in networks.items():
            assert fingerprint(routeseg.load(name)) == fingerprint(routeseg.load(folder))
            assert (folder / "README.md").read_text().count("License: Apache-2.0") == 1, "its card"

    @pytest.mark.parametrize("words", [["--model", "camvid"], ["camvid"]])
    def test_predict(self, tmp_path, capsys, words, monkeypatch):
        monkeypatch.chdir(tmp_path)
        save(tmp_path / "a.png", noise(64, 96))
        first = words if words[0] == "camvid" else []
        code, out, err = run(["predict", *first, "a.png", *(words if not first else []), "--output", "out"], capsys)
        assert code == 0, err
        assert json.loads((tmp_path / "out" / "a_route.json").read_text())["network"] == fingerprint(routeseg.load())

    def test_what_is_here_goes_first(self, tmp_path, monkeypatch, checkpoint):
        monkeypatch.chdir(tmp_path)
        shutil.copytree(checkpoint, tmp_path / "camvid")
        assert fingerprint(routeseg.load("camvid")) == fingerprint(routeseg.load(checkpoint))

    def test_mistakes(self, tmp_path, capsys, checkpoint):
        image = save(tmp_path / "a.png", noise(64, 96))
        with pytest.raises(ValueError, match="no checkpoint folder kitchens: .* bundled network .*camvid"):
            routeseg.load("kitchens")
        code, _, err = run(["predict", image, "--model", "kitchens"], capsys)
        assert code == 2 and "--model kitchens is no network" in err and err.count("\n") == 1
        code, _, err = run(["predict", checkpoint, image, "--model", "camvid"], capsys)
        assert code == 2 and "name one" in err


@pytest.mark.usefixtures("no_report")
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
    code, out, _ = run(["demo", *network, *data, *recipe, "--gate_budget.weight=0.5", "--output", tmp_path], capsys)
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


def test_files_of_earlier_runs_call_the_gates_budget_budget(tmp_path):
    """The word now means what --budget asks; a run that began before is resumed by its own file."""
    from routeseg.cli.common import config_parser

    (tmp_path / "old.yaml").write_text("recipe: {iterations: 7}\nbudget: {weight: 0.5, target: 0.3}\n")
    args = config_parser("train").parse_args(["--config", str(tmp_path / "old.yaml")])
    assert (args.gate_budget.weight, args.gate_budget.target, args.recipe.iterations) == (0.5, 0.3, 7)
