"""`routeseg train` as somebody types it: a folder, minutes, epochs, and going on."""

import errno
import json
import os
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import loggers
from PIL import Image

import routeseg
from conftest import run
from routeseg.cli import training
from routeseg.cli.parser import PRESETS
from routeseg.data.config import layout_of
from routeseg.engine import SkipEngine
from routeseg.files import not_written
from routeseg.model import checkpoints
from routeseg.training.trackers import is_installed, make_loggers

TINY = [
    "--model.depth=4",
    "--model.base_channels=4",
    "--model.stem_channels=4",
    "--model.route=diagonal",
    "--model.exits=null",
    "--model.place=null",
    "--model.sizes=null",
    "--model.backbone=null",
    "--data.crop=[32, 64]",
    "--data.batch_size=2",
    "--recipe.precise_bn_batches=1",
    "--recipe.precision=32-true",
]


@pytest.mark.parametrize("name", ["camvid", "cityscapes", "voc", "ade20k", "folder"])
def test_the_layout_is_found(name, layouts):
    assert layout_of(layouts(name)) == name


@pytest.mark.usefixtures("no_report")
def test_a_folder_is_enough(layouts, tmp_path, capsys, monkeypatch):
    """It stands for a preset, the layout, and the bundled network; what is given beside it counts."""
    root = layouts("folder")
    words = ["train", root, *TINY, "--recipe.iterations=2", "--recipe.validate_every=2", "--output", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr("routeseg.cli.run.training.start_from", lambda model, init, *_: print(f"init {init}"))
        code, out, err = run(words, capsys)
    assert code == 0, err
    assert f"--config=small --data.name=folder --data.root={root}" in out and f"init {checkpoints.PRETRAINED}" in out
    assert (tmp_path / "run" / "best").is_dir()


@pytest.mark.usefixtures("no_report")
def test_a_run_remembers_itself(layouts, tmp_path, capsys):
    """--resume needs the folder of the run alone."""
    output = tmp_path / "run"
    words = ["train", "--config=small", "--data.name=folder", f"--data.root={layouts('folder')}", *TINY]
    assert run([*words, "--recipe.iterations=2", "--recipe.save_every=1", "--output", output], capsys)[0] == 0
    known = yaml.safe_load((output / "config.yaml").read_text())
    assert known["model"]["depth"] == 4 and known["recipe"]["iterations"] == 2 and known["data"]["crop"] == [32, 64]
    code, _, err = run(["train", "--resume", f"--output={output}", "--recipe.iterations=4"], capsys)
    assert code == 0, err
    assert torch.load(output / "last.ckpt", weights_only=True)["global_step"] == 4
    assert yaml.safe_load((output / "config.yaml").read_text())["recipe"]["iterations"] == 4
    for checkpoint in (output, output / "last"):  # the folder of the run stands for its best network
        code, out, err = run(["evaluate", checkpoint], capsys)
        assert code == 0 and "images                          │ 2" in out, err
    for words, split in (([], "val"), (["--data.val_split=train"], "train"), (["--split=train"], "train")):
        code, _, err = run(["evaluate", output, *words, "--json", tmp_path / "scores.json"], capsys)
        assert code == 0 and json.loads((tmp_path / "scores.json").read_text())["split"] == split, err
    image = next((layouts("folder") / "images" / "val").glob("*"))
    code, out, err = run(["predict", output, image, "--output", tmp_path / "predictions"], capsys)
    assert code == 0 and len(list((tmp_path / "predictions").iterdir())) == 4, err
    code, out, err = run(["export", output, tmp_path / "net.onnx"], capsys)
    assert code == 0 and (tmp_path / "net.onnx").is_file(), err
    code, _, err = run(["profile", output, "--size=64x64", "--repeats=1"], capsys)
    assert code == 0 and list((output / "best").glob("latency*.json")), err
    for option in ("--minutes=1", "--epochs=1"):
        code, _, err = run(["train", "--resume", f"--output={output}", option], capsys)
        assert code == 2 and "leave out --minutes and --epochs" in err


@pytest.mark.usefixtures("no_report")
def test_in_python(layouts, tmp_path, capsys):
    """The same as the command, to the bit; mistakes are ValueErrors."""
    keys = dict(word.removeprefix("--").split("=", 1) for word in TINY)
    sections = {name: {} for name in ("model", "data", "recipe", "gate_budget")}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        sections[section][name] = json.loads(value) if value[0] in "[0123456789" and "true" not in value else value
    data = {"name": "folder", "root": layouts("folder"), **sections.pop("data")}
    sections["recipe"] |= {"iterations": 2, "seed": 5}
    run_ = routeseg.train(data=data, config="small", output=tmp_path / "one", **sections)
    words = ["train", "--config=small", "--data.name=folder", f"--data.root={layouts('folder')}", *TINY]
    words += ["--recipe.iterations=2", "--recipe.seed=5", f"--output={tmp_path / 'other'}"]
    code, _, err = run(words, capsys)
    assert code == 0, err
    one, other = (routeseg.load(tmp_path / name / "best").state_dict() for name in ("one", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert run_.folder == tmp_path / "one" and 0 <= run_.evaluation.miou <= 1
    image = next((layouts("folder") / "images" / "val").glob("*"))
    assert run_.model(image).labels.ndim == 2
    for wrong, message in (
        ({}, "nothing to train on"),
        ({"config": "camvid/smal"}, "did you mean camvid/small?"),
        ({"folder": tmp_path / "none"}, "no folder"),
        ({"config": "small", "recipe": {"lerning_rate": 1}}, "no key 'recipe.lerning_rate'"),
        ({"config": "small", "model": {"depth": "deep"}}, "--model.depth is deep: it must be a whole number"),
        ({"config": "small", "minutes": 0}, "--minutes is 0"),
        ({"config": "small", "data": {"crop": 5}}, "--data.crop is 5: it must be two numbers, [HEIGHT, WIDTH]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            routeseg.train(**wrong)
    assert capsys.readouterr().err == ""


def test_in_python_a_folder_is_enough(layouts, tmp_path, monkeypatch):
    """As of the command; values are what Python has: a path, None, false, a size as a text."""
    asked: list[tuple] = []

    class Stop(Exception):
        pass

    def stop(args, began, chooses_crop, alone=False):
        asked.append((args, chooses_crop, alone))
        raise Stop

    monkeypatch.setattr(training, "_train", stop)
    root, sections = (
        layouts("folder"),
        {"model": {"exits": None, "place": None, "sizes": None}, "recipe": {"class_offsets": False}},
    )
    for options in ({}, {"data": {"crop": "64x96"}}, {"config": "camvid/small"}):
        with pytest.raises(Stop):
            routeseg.train(root, output=tmp_path / "run", **sections, **options)
    with pytest.raises(Stop):
        training.train_command(
            [
                str(root),
                "--model.exits=null",
                "--model.place=null",
                "--model.sizes=null",
                "--recipe.class_offsets=false",
                "--output=o",
            ]
        )
    (args, *how), (cut, *_), (preset, *_), (words, *_) = asked
    assert how == [True, True] and [one[1] for one in asked] == [True, False, False, True]
    assert args.init == words.init == str(checkpoints.PRETRAINED) and preset.init is None
    for section in ("data", "model", "recipe"):
        assert json.dumps(vars(args[section])) == json.dumps(vars(words[section]))  # lists or tuples
    assert args.model.exits is None and args.recipe.class_offsets is False and preset.data.name == "folder"
    assert list(cut.data.crop) == [64, 96] and args.output == str(tmp_path / "run")


TWO_STEPS = ["--recipe.iterations=2", "--recipe.validate_every=1", "--recipe.log_every=1"]


def test_a_report(layouts, tmp_path, capsys, monkeypatch):
    """Curves, classes, what is taken for what, the worst and the best image; each image is segmented once in a
    validation, and never again."""
    seen = []
    segment = SkipEngine.__call__
    monkeypatch.setattr(SkipEngine, "__call__", lambda self, images: seen.append(len(images)) or segment(self, images))
    output = tmp_path / "run"
    words = ["train", "--config=small", "--data.name=folder", f"--data.root={layouts('folder')}", *TINY, *TWO_STEPS]
    code, out, err = run([*words, "--recipe.class_offsets=false", "--output", output], capsys)
    assert code == 0 and f"{output}/report.html" in out, err
    assert sum(seen) == 2 * 2, "two images, two validations"
    page = (output / "report.html").read_text()
    for words in ("routeseg on folder", "mIoU on validation images", "The worst images", "The best images"):
        assert words in page
    for name in ("curves", "class_iou", "confusion", "worst", "best", "cost"):
        assert Image.open(output / "figures" / f"{name}.png").width > 300
    assert "http" not in page.replace("http-equiv", "") and page.count("data:image/png;base64") == 6


def test_a_report_that_cannot_be_drawn_is_one_line(layouts, tmp_path, capsys, monkeypatch):
    """Whatever goes wrong with it, the training went well."""
    words = ["train", "--config=small", "--data.name=folder", f"--data.root={layouts('folder')}", *TINY, *TWO_STEPS]

    def full(path, data):
        raise not_written(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def broken(*_, **__):
        raise RuntimeError("a mistake\nin two lines")

    for number, (place, wrong, message) in enumerate(
        (
            (
                "routeseg.figures.report.write_atomically",
                full,
                "no report: {output}/report.html: cannot write it, No space",
            ),
            ("routeseg.figures.charts.new_figure", broken, "no report: a mistake in two lines"),
            ("routeseg.evaluation.ranking.image_score", broken, "no worst and best images: a mistake in two lines"),
        )
    ):
        output = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr(place, wrong)
            code, out, err = run([*words, "--output", output], capsys)
        assert code == 0 and (output / "best").is_dir() and "minutes; networks in" in out, err
        (line,) = [line for line in err.splitlines() if line.startswith("routeseg: no ")]
        assert message.format(output=output) in line
        assert (output / "report.html").exists() == ("worst and best" in message)


class Tracker:
    """Stands for Lightning's logger of a package that need not be installed."""

    made: list["Tracker"] = []

    def __init__(self, *words, **how):
        self.how, self.parameters, self.steps = how, {}, {}
        Tracker.made.append(self)

    name, version, save_dir, root_dir, log_dir = "tracker", "0", None, None, None
    group_separator = "/"

    def log_hyperparams(self, parameters):
        self.parameters = parameters

    def log_metrics(self, metrics, step=None):
        self.steps.setdefault(step, set()).update(metrics)

    def log_graph(self, *_):
        pass

    save = finalize = after_save_checkpoint = log_graph


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("trackers", ["wandb", "mlflow,tensorboard", " wandb, mlflow"])
def test_trackers(layouts, tmp_path, capsys, monkeypatch, trackers):
    """They are told the configuration, each logged step and each validation; the CSV file is there as always."""
    names = [name.strip() for name in trackers.split(",")]
    monkeypatch.setattr(loggers, "WandbLogger", Tracker)
    monkeypatch.setattr(loggers, "MLFlowLogger", Tracker)
    monkeypatch.setattr("routeseg.training.trackers.is_installed", lambda name: True)
    monkeypatch.setattr(Tracker, "made", [])
    output = tmp_path / "run"
    words = ["train", "--config=small", "--data.name=folder", f"--data.root={layouts('folder')}", *TINY, *TWO_STEPS]
    code, _, err = run([*words, "--output", output, f"--logger={trackers}"], capsys)
    assert code == 0, err
    assert len(Tracker.made) == len(names) - ("tensorboard" in names)
    for tracker in Tracker.made:
        assert tracker.parameters["model"]["depth"] == 4
        assert "run" in (tracker.how.get("name"), tracker.how.get("run_name"))
        logged = set().union(*tracker.steps.values())
        assert {"loss", "lr", "val_miou", "val_cost"} <= logged and "val_miou" in tracker.steps[2]
    assert (output / "tensorboard").exists() == ("tensorboard" in names)
    assert (output / "logs" / "version_0" / "metrics.csv").exists()


def test_a_tracker_that_is_not_there(capsys, monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()  # a folder is no package
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path)])
        assert not is_installed("wandb")
    monkeypatch.setattr("routeseg.training.trackers.is_installed", lambda name: False)
    for command in (["train", "--config=scenes/small"], ["pretrain", "--config=imagenet/base"]):
        code, _, err = run([*command, "--logger=wandb"], capsys)
        assert code == 2 and err.count("\n") == 1 and "pip install wandb" in err
    with monkeypatch.context() as patch:  # installed, but without a server
        patch.setattr("routeseg.training.trackers.is_installed", lambda name: True)
        patch.setattr(loggers, "MLFlowLogger", lambda *_, **__: 1 / 0)
        with pytest.raises(ValueError, match="--logger mlflow cannot be used: division by zero"):
            make_loggers(["mlflow"], tmp_path, 10)
    code, _, err = run(["train", "--config=scenes/small", "--logger=neptune"], capsys)
    assert code == 2 and "choose from tensorboard, wandb, mlflow" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [
                "--data.batch_size=1",
                "--model.exits=null",
                "--model.place=null",
                "--model.sizes=null",
                "--data.crop=[32,32]",
            ],
            "leave a single value per channel",
        ),
        (["--gate_budget.weight=0.5"], "a network without gates cannot keep a budget"),
    ],
)
def test_what_is_refused_comes_before_the_pace(layouts, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr("routeseg.training.pace.choose_precision", lambda *_: 1 / 0)
    monkeypatch.setattr("routeseg.training.pace.step_seconds", lambda *_: 1 / 0)
    tiny = [word for word in TINY if not word.startswith(("--data", "--model.depth"))]
    words = [
        "train",
        layouts("folder"),
        *tiny,
        "--model.depth=6",
        "--model.exits=null",
        "--model.place=null",
        "--model.sizes=null",
        *words,
        "--init=null",
    ]
    code, _, err = run([*words, "--minutes=1", "--output", tmp_path / "run"], capsys)
    assert code == 2 and message in err and err.count("\n") == 1


def test_what_is_refused_comes_first(layouts, copied, tmp_path, capsys, monkeypatch):
    """Each is one line, before a network is made or the pace is measured."""

    def late(*_, **__):
        raise AssertionError("it came too late")

    held = tmp_path / "held"
    held.mkdir()
    (held / "last.ckpt").write_bytes(b"x")
    root = copied("folder")
    monkeypatch.setattr(training, "new_network", late)
    for words, message in (
        ([root, "--minutes=1", f"--output={held}"], f"{held} already holds a run"),
        ([root, "--resume", f"--output={tmp_path}/none"], "nothing to resume"),
    ):
        code, _, err = run(["train", *words], capsys)
        assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("tiny", "images with a side under 32 pixels"),
        ("misfit", "labels have another size than their image"),
        ("unknown", "label values without a class"),
        ("coloured", "colours without a class"),
        ("unreadable", "images cannot be read"),
        ("alone", "images without a label"),
    ],
)
def test_train_and_check_data_refuse_the_same(copied, tmp_path, capsys, monkeypatch, split, damage, message):
    """Whatever would end a training late, on any image of the two splits, ends it before its first step."""
    root = copied("folder")
    image, mask = (sorted((root / part / split).glob("*"))[-1] for part in ("images", "masks"))
    if damage in ("tiny", "misfit"):
        for path in (image, mask)[damage == "misfit" :]:
            Image.open(path).resize((24, 20), Image.Resampling.NEAREST).save(path)
    elif damage == "unknown":
        Image.fromarray(np.full((48, 96), 77, np.uint8)).save(mask)
    elif damage == "coloured":
        Image.fromarray(np.full((48, 96, 3), 77, np.uint8)).save(mask)
    elif damage == "unreadable":
        for path in (root / "images" / split).glob("*"):
            path.write_bytes(path.read_bytes()[:200])
    else:
        mask.unlink()
    code, out, _ = run(["check-data", root, "--output", tmp_path / "o"], capsys)
    assert code == 2 and message in " ".join(out.split())
    monkeypatch.setattr(training, "new_network", lambda *_, **__: 1 / 0)
    code, _, err = run(["train", root, *TINY, "--output", tmp_path / "run"], capsys)
    assert code == 2 and err.count("\n") == 1 and "check-data" in err
    assert f"{split}: " in err and message in err, err
    assert not (tmp_path / "run").exists()


def test_few_images_train(tmp_path, capsys):
    """As many as check-data calls ready: exits are calibrated with them, and one line says so."""
    data = tmp_path / "data"
    assert run(["make-data", "scenes", data, "--train=3", "--val=2", "--size=[48,64]"], capsys)[0] == 0
    code, out, _ = run(["check-data", data, "--output", tmp_path / "o"], capsys)
    assert code == 0 and "ready" in out
    words = [word for word in TINY if "exits" not in word and "depth" not in word and "crop" not in word]
    words += ["--model.depth=4", "--model.exits=[1,2]", "--recipe.iterations=2", "--init=null"]
    code, out, err = run(["train", data, *words, "--output", tmp_path / "run"], capsys)
    assert code == 0, err
    assert [line for line in err.splitlines() if "too few" in line] == [
        "routeseg: 3 training images are too few to tell well which image may leave early, and what a budget costs: "
        "they serve for both. `routeseg calibrate` does better with 8 or more"
    ]
    assert routeseg.load(tmp_path / "run" / "best").exits.calibrated
    image = next((data / "images" / "val").glob("*"))
    words = ["predict", tmp_path / "run", image, "--budget=95%", "--output", tmp_path / "p"]
    assert run(words, capsys)[0] == 0


def test_weights_are_saved_whatever_a_validation_meets(layouts, tmp_path, capsys, monkeypatch):
    """An error behind the last step: the line before it says where they are."""
    output = tmp_path / "run"
    trained = []

    def fail(network, *_, **__):
        trained.append({name: value.clone() for name, value in network.state_dict().items()})
        raise ValueError("a mistake of the validation")

    monkeypatch.setattr("routeseg.training.segmentation.evaluate", fail)
    words = ["train", layouts("folder"), *TINY, "--init=null", "--recipe.iterations=2", "--recipe.precise_bn_batches=0"]
    code, _, err = run([*words, "--recipe.class_offsets=false", "--recipe.ema_decay=0", "--output", output], capsys)
    assert code == 2
    first, last = err.strip().splitlines()[-2:]
    assert first == f"routeseg: the weights of step 2 are saved in {output}/last" and last.endswith("of the validation")
    saved = routeseg.load(output / "last").state_dict()
    assert all(torch.equal(saved[name], value.contiguous()) for name, value in trained[0].items())


@pytest.mark.parametrize(("size", "crop"), [((40, 200), [32, 192]), ((48, 96), [32, 96]), ((400, 500), [288, 384])])
def test_crops_are_those_of_the_images(tmp_path, capsys, size, crop):
    """`train FOLDER` and `check-data FOLDER` take the same: no larger than most of the images."""
    data = tmp_path / "data"
    assert run(["make-data", "scenes", data, "--train=4", "--val=1", f"--size={list(size)}"], capsys)[0] == 0
    facts = tmp_path / "facts.json"
    code, out, _ = run(["check-data", data, "--output", tmp_path / "o", "--json", facts], capsys)
    assert code == 0 and json.loads(facts.read_text())["data"]["crop"] == crop
    assert "are smaller than the crop of" not in out
    if crop == [32, 192]:
        words = [word for word in TINY if "crop" not in word]
        words = ["train", data, *words, "--init=null", "--recipe.iterations=1", "--output", tmp_path / "run"]
        code, out, err = run(words, capsys)
        assert code == 0 and "crops of 32x192, for most images fill no 288x384 (height x width)" in out, err
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["crop"] == crop


class TestResumedClasses:
    """A run goes on with the classes that it had, and compares what they are."""

    @pytest.fixture
    def resumed(self, copied, tmp_path, capsys):
        """Trains a step, lets a test change the folder, and goes on."""
        root, output = copied("folder"), tmp_path / "run"

        def resume(change):
            words = ["train", "--config=small", "--data.name=folder", f"--data.root={root}", *TINY]
            words += ["--recipe.save_every=1", f"--output={output}"]
            assert run([*words, "--recipe.iterations=1"], capsys)[0] == 0
            before = (output / "config.yaml").read_bytes()
            change(root)
            code, _, err = run([*words, "--recipe.iterations=2", "--resume"], capsys)
            assert code == 0 or (output / "config.yaml").read_bytes() == before
            return code, err

        return resume

    def edited(self, change):
        def edit(root):
            path = root / "classes.yaml"
            data = yaml.safe_load(path.read_text())
            change(data)
            path.write_text(yaml.safe_dump(data))

        return edit

    def test_the_same_go_on(self, resumed):
        code, err = resumed(self.edited(lambda data: data.update(mapping={200: data["names"][0]})))
        assert code == 0, err

    def test_names_in_another_order(self, resumed):
        code, err = resumed(self.edited(lambda data: data["names"].reverse()))
        assert code == 2 and "has other classes: class 0 is sky there and pedestrian here (and 9 more)" in err
        assert err.count("\n") == 1

    def test_values_that_mean_others(self, resumed):
        """The names are the same, the channels would be exchanged."""
        code, err = resumed(self.edited(lambda data: data.update(mapping={0: data["names"][1], 1: data["names"][0]})))
        assert code == 2 and "has other classes: 0 means sky there and building here (and 1 more)" in err


@pytest.mark.usefixtures("no_report")
def test_epochs(layouts, tmp_path, capsys):
    """Four images, two a step, three times: six iterations."""
    words = ["train", layouts("folder"), "--config=small", *TINY, "--epochs=3", f"--output={tmp_path}/run"]
    assert run(words, capsys)[0] == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["recipe"]["iterations"] == 6


def test_mistakes(layouts, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([], "nothing to train on"),
        (["--resume", f"--output={tmp_path}/run"], "nothing to resume"),
        ([tmp_path / "none"], "no folder"),
        ([tmp_path / "empty"], "the expected tree is"),
        (["--config=small", "--recipe.epochs=3"], "did you mean epochs?"),
        (["--config=small", "--recipe.dice=0"], "there is no recipe.dice any more: leave it out"),
        (["--config=small", "--minutes=0"], "--minutes is 0"),
        (["--config=small", "--epochs=-1"], "--epochs is -1"),
        (["--config=small", "--minutes=1", "--epochs=1"], "leave one of them out"),
    ):
        code, _, err = run(["train", *words], capsys)
        assert code == 2 and message in err, (words, err)


def test_the_preset_is_the_network_that_comes_along():
    """Its weights would not fit another one."""
    shipped = json.loads((checkpoints.PRETRAINED / "config.json").read_text())
    preset = yaml.safe_load((PRESETS / "small.yaml").read_text())["model"]
    for key in ("depth", "base_channels", "gate", "backbone"):
        assert preset[key] == shipped.get(key), key
