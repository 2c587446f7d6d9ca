"""What a command imports, and when: a mistake is told before PyTorch is imported, which takes seconds."""

import json
import subprocess
import sys

import pytest

from conftest import environment_with, scenes_checkpoint
from pictures import noise, save
from routeseg.cli import COMMANDS

HEAVY = "torch lightning torchmetrics scipy sympy pandas matplotlib.figure huggingface_hub onnx onnxruntime ray".split()
NETWORKS = "torch._dynamo torch._inductor lightning torchmetrics scipy sympy pandas matplotlib onnx ray".split()
CODE = """
import contextlib, io, json, sys
from routeseg.cli import main
commands, watched = json.loads(sys.argv[1])
results = []
for words in commands:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    results.append([code, err.getvalue(), [name for name in watched if name in sys.modules]])
print(json.dumps(results))
"""
NO_ROOT = ["--data.name=folder", "--data.root=nowhere"]
CONFIGURED = ("train", "pretrain", "evaluate", "routes", "profile", "check-data", "demo")
# The words of a command, and of its message.
MISTAKES = {
    **{f"{name}, configuration": ([name, "--config", "nowhere.yaml"], "nowhere.yaml") for name in CONFIGURED},
    "train, data": (["train", *NO_ROOT], "no file nowhere/classes.yaml"),
    "train, initial weights": (["train", "--config=scenes/small", "--init", "nowhere"], "no checkpoint folder nowhere"),
    "train, route": (
        ["train", "--config=scenes/base", "--model.gate=fixed", "--model.route=nowhere.json"],
        "nowhere.json",
    ),
    "pretrain, data": (["pretrain", "--data.root=nowhere"], "no folder nowhere"),
    "demo, data": (["demo", *NO_ROOT], "no file nowhere/classes.yaml"),
    "evaluate, data": (["evaluate", "NET", *NO_ROOT], "no file nowhere/classes.yaml"),
    "evaluate, checkpoint": (["evaluate", "nowhere"], "no checkpoint folder nowhere"),
    "routes, data": (["routes", "NET", *NO_ROOT], "no file nowhere/classes.yaml"),
    "routes, checkpoint": (["routes", "nowhere"], "no checkpoint folder nowhere"),
    "profile, checkpoint": (["profile", "nowhere"], "no checkpoint folder nowhere"),
    "export, checkpoint": (["export", "nowhere", "net.onnx"], "no checkpoint folder nowhere"),
    "predict, images": (["predict", "nowhere"], "no file or folder nowhere"),
    "predict, images of a checkpoint": (["predict", "NET", "nowhere"], "no file or folder nowhere"),
    "predict, weights": (["predict", "HALF", "IMAGES"], "model.safetensors is missing"),
    "check-data, data": (["check-data", *NO_ROOT], "no file nowhere/classes.yaml"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A checkpoint, one without its weights, and images."""
    root = tmp_path_factory.mktemp("startup")
    checkpoint = scenes_checkpoint(root / "net")
    (root / "half").mkdir()
    (root / "half" / "config.json").write_bytes((root / "net" / "config.json").read_bytes())
    for number in range(2):
        save(root / "images" / f"{number}.png", noise(40, 70, number))
    return {"NET": checkpoint, "HALF": str(root / "half"), "IMAGES": str(root / "images")}


def run_all(commands, watched, folder):
    """Exit code and message of each, and which of the watched modules were there behind it: all in one process."""
    call = [sys.executable, "-c", CODE, json.dumps([commands, watched])]
    done = subprocess.run(call, cwd=folder, env=environment_with(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_mistake_is_told_before_anything_heavy_is_imported(folders, tmp_path):
    commands = [[folders.get(word, word) for word in words] for words, _ in MISTAKES.values()]
    results = run_all(commands, HEAVY, tmp_path)
    for (name, (_, message)), (code, err, _) in zip(MISTAKES.items(), results, strict=True):
        assert code == 2 and message in err, name
    assert {name: found for name, (*_, found) in zip(MISTAKES, results, strict=True) if found} == {}


def test_help_imports_nothing_heavy(tmp_path):
    results = run_all([[name, "--help"] for name in COMMANDS], HEAVY, tmp_path)
    assert {name: found for name, found in zip(COMMANDS, results, strict=True) if found != [0, "", []]} == {}


def test_what_needs_no_network_imports_nothing_heavy(layouts, tmp_path):
    """The contact sheet is drawn by Pillow."""
    check = ["check-data", "--data.name=folder", f"--data.root={layouts('folder')}", "--json=found.json"]
    results = run_all(
        [["make-data", "scenes", "made", "--train=1", "--val=1", "--size=[32,64]"], check], HEAVY, tmp_path
    )
    assert results == [[0, "", []]] * 2
    assert (tmp_path / "runs" / "check" / "contact_sheet.png").is_file() and (tmp_path / "found.json").is_file()


def test_what_runs_a_network_imports_no_training_and_no_compiler(folders, tmp_path):
    """Nor what draws, if there is nothing to draw."""
    predict = ["predict", folders["NET"], folders["IMAGES"], "--pictures=false"]
    evaluate = ["evaluate", folders["NET"], "--data.image_size=[48,64]", "--data.val_images=2", "--data.workers=0"]
    results = run_all([predict, evaluate], NETWORKS, tmp_path)
    assert results == [[0, "", []]] * 2
