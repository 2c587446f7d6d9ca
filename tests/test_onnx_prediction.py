"""`routeseg predict FILE.onnx`: the files of the checkpoint, without torch; what is wrong with a file is said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import routeseg
from conftest import run as run_command
from conftest import scenes_checkpoint, with_exits
from pictures import noise, save
from routeseg.budgets.asked import Asked
from routeseg.cost.macs import exit_costs
from routeseg.data.scenes import draw_scene
from routeseg.description import FORMAT, describe
from routeseg.errors import BudgetNotKept
from routeseg.prediction.files import OUTPUTS, asked_of, predict_files
from routeseg.prediction.torch_runner import TorchNetwork, open_network

onnx = pytest.importorskip("onnx", reason="the extra routeseg[onnx]")
pytest.importorskip("onnxruntime", reason="the extra routeseg[onnx]")
from routeseg.export import export  # noqa: E402
from routeseg.prediction.onnx_runner import OnnxNetwork, most_likely  # noqa: E402

KINDS = ["static", "dense", "exits"]
SIZES = [(64, 96), (33, 47), (20, 100), (1, 1), (97, 130)]
BUDGET_SIZE = (40, 70)  # of images that a budget is asked for
CLONE = Path(__file__).parents[1]
LEAN = re.search(r"lean/bin/pip install (onnxruntime .*)", (CLONE / "docs" / "prediction.md").read_text())[1].split()
REQUIRED = tomllib.loads((CLONE / "pyproject.toml").read_text())["project"]["dependencies"]
NAMES = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}  # of which jsonargparse needs the last one
LEFT_OUT = {re.split(r"[^\w-]", one)[0] for one in REQUIRED} - {*LEAN, "pyyaml"} | {"torchmetrics", "onnx"}
LEFT_OUT = {NAMES.get(one, one.replace("-", "_")) for one in LEFT_OUT}
# One process in which torch and all else that docs/prediction.md leaves out cannot be imported runs all commands:
# [words, ...] -> [[code, out, err], ...].
NO_TORCH = f"""
import contextlib, io, json, sys
LEFT_OUT = {sorted(LEFT_OUT)}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in LEFT_OUT:
            raise ModuleNotFoundError("No module named " + repr(name), name=top)
sys.meta_path.insert(0, Refuse())
try:
    import torch
except ModuleNotFoundError:
    from routeseg.cli import main
results = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words)
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A gated network of the scenes' classes, which win in different places."""
    folder = tmp_path_factory.mktemp("network")
    model = routeseg.load(scenes_checkpoint(folder))
    with torch.no_grad():
        model.decoder.predictor.weight.mul_(30)
    return model.save(folder)


@pytest.fixture(scope="module")
def static_model(checkpoint) -> routeseg.DynamicRoutingNetwork:
    model = routeseg.load(checkpoint)
    return model.specialize(routeseg.Route.all_open(model.space)).eval()


@pytest.fixture(scope="module")
def exits_folder(tmp_path_factory) -> Path:
    """The checkpoint of a network with exits."""
    return with_exits(BUDGET_SIZE).save(tmp_path_factory.mktemp("exits"))


@pytest.fixture(scope="module")
def files(checkpoint, exits_folder, static_model, tmp_path_factory) -> dict[str, Path]:
    """The exported file of each kind; of the one with exits also that with labels."""
    folder, exits = tmp_path_factory.mktemp("files"), routeseg.load(exits_folder)
    return {
        "static": export(static_model, folder / "static.onnx"),
        "dense": export(routeseg.load(checkpoint), folder / "dense.onnx"),
        "exits": export(exits, folder / "exits.onnx"),
        "labels": export(exits, folder / "labels.onnx", labels=True),
    }


@pytest.fixture
def models(checkpoint, exits_folder, static_model):
    return {"static": static_model, "dense": routeseg.load(checkpoint), "exits": routeseg.load(exits_folder)}


@pytest.fixture
def images(tmp_path) -> list[Path]:
    return [save(tmp_path / "in" / f"{number}.png", noise(*size, number)) for number, size in enumerate(SIZES)]


def labels_of(folder: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(folder / f"{name}_labels.png"))


def assert_near(one, other):
    """The same JSON, numbers within 1e-4 of each other."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_near(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_near(a, b)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-4, rel=1e-4)
    else:
        assert one == other


def without_torch(commands) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each of the commands, in a process in which torch cannot be imported."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", NO_TORCH, words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


def edited(file: Path, target: Path, change) -> Path:
    """A copy of an exported file, changed by `change(model, what it says of itself)`."""
    model = onnx.load(file)
    words = json.loads(model.metadata_props[0].value)
    change(model, words)
    if model.metadata_props:
        model.metadata_props[0].value = json.dumps(words)
    onnx.save(model, target)
    return target


def rename_input(model, _):
    """`images` becomes `pixels`."""
    model.graph.input[0].name = "pixels"
    for node in model.graph.node:
        node.input[:] = ["pixels" if name == "images" else name for name in node.input]


def drop(*names):
    return lambda model, words: [words.pop(name) for name in names]


class TestSameFiles:
    @pytest.mark.parametrize("kind", KINDS)
    def test_they_are_those_of_the_checkpoint(self, files, models, images, tmp_path, kind):
        model = models[kind]
        expected = predict_files(TorchNetwork(model, model), images, tmp_path / "torch")
        found = predict_files(OnnxNetwork(files[kind]), images, tmp_path / "onnx")
        names = {path.name for path in (tmp_path / "onnx").iterdir()}
        assert names == {path.name for path in (tmp_path / "torch").iterdir()} and len(names) == 4 * len(images)
        assert found.predictions == expected.predictions, "sizes and costs, too"
        seen = set()
        for number, size in enumerate(SIZES):
            one, other = (labels_of(tmp_path / where, str(number)) for where in ("onnx", "torch"))
            assert one.shape == size and (one == other).mean() > 0.999, "but for near-ties"
            seen |= set(np.unique(other).tolist())
            texts = [(tmp_path / where / f"{number}_route.json").read_text() for where in ("onnx", "torch")]
            assert_near(*map(json.loads, texts))
        assert len(seen) > 1, "the labels compared are no single class"

    def test_the_description_is_that_of_the_network(self, files, models):
        for kind, model in models.items():
            network = OnnxNetwork(files[kind])
            assert network.kind == kind and network.precision == "float32"
            assert network.network == describe(model)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_batch_is_its_images(self, files, models, kind):
        network, model = OnnxNetwork(files[kind]), models[kind]
        batch = np.stack([noise(40, 70, seed).transpose(2, 0, 1) for seed in range(3)])
        logits, gates = network.run(batch)
        with torch.no_grad():
            expected = model(torch.from_numpy(batch))
        assert logits.shape == (3, model.config.num_classes, 40, 70) and gates.shape == expected.gates.shape
        limit = 1e-4 * float(expected.logits.abs().max())
        assert np.abs(logits - expected.logits.numpy()).max() < limit
        assert np.abs(gates - expected.gates.numpy()).max() < 1e-4
        again, _ = network.run(batch.astype(np.float64) / 255)
        assert np.abs(again - logits).max() < limit

    def test_the_results_of_the_checkpoint_are_resumed(self, files, models, images, tmp_path):
        """It is the same network, says its fingerprint."""
        predict_files(TorchNetwork(models["static"], models["static"]), images[:2], tmp_path / "out")
        summary = predict_files(OnnxNetwork(files["static"]), images, tmp_path / "out", resume=True)
        assert summary.resumed == 2 and len(summary.predictions) == len(images)
        with pytest.raises(ValueError, match="another network"):
            predict_files(OnnxNetwork(files["dense"]), images, tmp_path / "out", resume=True)

    @pytest.mark.parametrize("classes", [1, 2, 7])
    def test_most_likely_is_the_argmax(self, classes):
        logits = np.random.default_rng(0).integers(0, 4, (classes, 30, 40)).astype(np.float32)  # with many ties
        labels, best = most_likely(logits)
        assert labels.dtype == np.uint8 and np.array_equal(labels, logits.argmax(0))
        assert np.array_equal(best, logits.max(0))
        logits[classes // 2, 3, 5] = np.nan
        assert np.flatnonzero(np.isnan(most_likely(logits)[1])).tolist() == [3 * 40 + 5]


@pytest.fixture
def pictures() -> list[np.ndarray]:
    """Images that leave at different exits."""
    scenes = [draw_scene(0, number, BUDGET_SIZE)[0] for number in range(3)]
    return [one for number, scene in enumerate(scenes) for one in (scene, noise(*BUDGET_SIZE, number))]


class TestBudget:
    @pytest.mark.parametrize("kind", ["exits", "labels"])
    @pytest.mark.parametrize("budget", [None, "48%", 0.6, "75%", "100%", "GMACs"])
    def test_it_is_kept_as_the_checkpoint_keeps_it(self, files, exits_folder, pictures, kind, budget):
        model = routeseg.load(exits_folder)
        if budget == "GMACs":
            budget = f"{0.6 * exit_costs(model, BUDGET_SIZE)[-1] / 1e9}GMACs"
        asked = None if budget is None else Asked.parse(budget)
        network, checkpoint = OnnxNetwork(files[kind], budget=budget), open_network(model, budget=asked)
        assert asked_of(network) == asked_of(checkpoint) and network.network == checkpoint.network
        assert budget is None or network.budget.endswith("GMACs" if "GMACs" in str(budget) else "%")
        for picture in pictures:
            found, expected = network(picture), checkpoint(picture)
            assert np.array_equal(found.gates, expected.gates)
            assert found.labels.dtype == np.uint8 and (found.labels == expected.labels).mean() > 0.999
            assert (found.confidence is None) == (kind == "exits")

    def test_images_of_a_batch_decide_by_themselves(self, files, exits_folder, pictures):
        network, model = OnnxNetwork(files["exits"], budget=0.6), routeseg.load(exits_folder)
        batch = np.stack([picture.transpose(2, 0, 1) for picture in pictures])
        logits, gates = network.run(batch)
        with torch.no_grad():
            expected = model(torch.from_numpy(batch), budget=0.6)
        assert len(np.unique(gates.any((2, 3)).sum(1))) > 1
        assert np.array_equal(gates, expected.gates.numpy())
        assert np.abs(logits - expected.logits.numpy()).max() < 1e-4 * float(expected.logits.abs().max())
        for price, layers in ((-100.0, 7), (100.0, 1)):
            assert network.run(batch[:1], price=price)[1].any((2, 3)).sum() == layers
        labels, confidence, others = OnnxNetwork(files["labels"], budget=0.6).run(batch)
        assert np.array_equal(labels, logits.argmax(1)) and np.array_equal(others, gates)
        assert np.allclose(confidence, torch.from_numpy(logits).softmax(1).amax(1).numpy(), atol=1e-5)

    def test_the_command(self, files, exits_folder, pictures, tmp_path, capsys):
        images = [save(tmp_path / "in" / f"{number}.png", one) for number, one in enumerate(pictures[:4])]
        written = {}
        for network in (exits_folder, files["exits"], files["labels"]):
            output = tmp_path / f"out {network.name}"
            code, out, err = run_command(["predict", network, *images, "--budget=60%", "--output", output], capsys)
            assert code == 0 and not err and "an image costs one of" in out
            written[network.name] = [json.loads((output / f"{number}_route.json").read_text()) for number in range(4)]
        one, *others = written.values()
        assert len({text["cost_gmacs"] for text in one}) > 1 and one[0]["budget"] == "60%"
        for other in others:
            assert_near(one, other)
        words = ["predict", files["exits"], *images, "--resume", "--output", output]
        code, out, _ = run_command([*words, "--budget=60%"], capsys)
        assert code == 0 and "(4 of them from an earlier run)" in out, "it is the same network, precision and budget"
        code, _, err = run_command([*words, "--budget=100%"], capsys)
        assert code == 2 and "budget" in err

    @pytest.mark.parametrize(
        ("kind", "words", "message"),
        [
            ("exits", ["--budget=1%"], "a budget of 0.01 cannot be kept: the cheapest route costs"),
            ("exits", ["--budget=nan%"], "give a share"),
            ("exits", ["--budget=25ms"], "takes shares such as 40%, or GMACs"),
            ("exits", ["--latency=t.json"], "only applies to --budget in ms"),
            ("static", ["--budget=50%"], "static.onnx takes no budget, it has one cost"),
            ("dense", ["--budget=50%"], "dense.onnx takes no budget, it has one cost"),
        ],
    )
    def test_mistakes(self, files, images, tmp_path, capsys, kind, words, message):
        words = ["predict", files[kind], images[0], "--output", tmp_path / "out", *words]
        code, _, err = run_command(words, capsys)
        assert code == 2 and message in err and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()

    def test_what_cannot_be_kept_at_a_size_is_skipped(self, files, models, images, tmp_path, capsys):
        macs = float(exit_costs(models["exits"], (64, 96))[0])
        words = ["predict", files["exits"], images[0], images[4], "--output", tmp_path, f"--budget={macs / 1e6}MMACs"]
        code, out, _ = run_command(words, capsys)
        assert code == 2 and "images           1" in out and "MMACs cannot be kept" in out

    def test_mistakes_in_python(self, files, pictures):
        batch = pictures[0].transpose(2, 0, 1)[None]
        with pytest.raises(ValueError, match="a price of nan is none: give a finite number"):
            OnnxNetwork(files["exits"]).run(batch, price=np.nan)
        with pytest.raises(ValueError, match=r"static.onnx takes no price"):
            OnnxNetwork(files["static"]).run(batch, price=0.5)
        with pytest.raises(ValueError, match="no budget in milliseconds"):
            OnnxNetwork(files["exits"], budget=Asked(25.0, "ms"))
        with pytest.raises(ValueError, match="a number is a share"):
            OnnxNetwork(files["exits"], budget=40)
        with pytest.raises(BudgetNotKept):
            OnnxNetwork(files["exits"], budget="0.000001GMACs")(pictures[0])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (drop("exits"), "it has no exits"),
            (lambda model, words: words["exits"].update(prices="x"), "its table of prices is damaged"),
            (lambda model, words: words["exits"].update(costs=[0.5]), "its table of prices is damaged"),
            (
                lambda model, words: words["exits"].update(prices=[0.0]),
                "its table of prices is damaged",
            ),
            (lambda model, words: words.update(kind="static"), r"takes \['images', 'price'\] .* not \['images'\]"),
        ],
    )
    def test_damaged_metadata(self, files, tmp_path, change, message):
        with pytest.raises(ValueError, match=message):
            OnnxNetwork(edited(files["exits"], tmp_path / "net.onnx", change))

    def test_labels_of_a_network_that_diverged(self, exits_folder, pictures, tmp_path):
        model = routeseg.load(exits_folder)
        with torch.no_grad():
            for head in (*model.exits.decoders, model.decoder):
                head.predictor.bias[2] = float("nan")
        network = OnnxNetwork(export(model, tmp_path / "net.onnx", labels=True))
        with pytest.raises(ValueError, match="NaN"):
            network(pictures[0])


class TestNoTorch:
    def test_predict_runs_to_its_end_and_what_needs_torch_says_so(self, files, checkpoint, images, tmp_path):
        images[0].write_text("no image")
        segment = {kind: ["predict", files[kind], tmp_path / "in", "--output", tmp_path / kind] for kind in files}
        segment["exits"].append("--budget=60%")
        predict = (["predict", checkpoint, tmp_path / "in"], ["predict", tmp_path / "in"])
        refused = (*predict, ["evaluate", checkpoint], ["download", "camvid", tmp_path / "data"])
        results = without_torch([*segment.values(), *([*words, "--resume"] for words in segment.values()), *refused])
        first, again, others = results[:4], results[4:8], results[8:]
        for kind, (code, out, err) in zip(segment, first, strict=True):
            assert code == 2 and not err, "2 for the image that was skipped"
            assert f"images           {len(images) - 1}" in out and "0.png" in out
            assert len(list((tmp_path / kind).iterdir())) == len(OUTPUTS) * (len(images) - 1)
        assert all(f"({len(images) - 1} of them from an earlier run)" in out for _, out, _ in again)
        for code, _, err in others:
            assert code == 2 and "not installed" in err and "predict FILE.onnx" in err

    def test_an_import_brings_none_in_and_the_public_names_are_all_there(self):
        """Not even if torch is installed: it takes seconds."""
        code = (
            "import sys, routeseg, routeseg.cli, routeseg.prediction.onnx_runner, routeseg.prediction.files\n"
            "import routeseg.prediction.ray\n"
            "routeseg.RoutingSpace, routeseg.model_cost, routeseg.OnnxNetwork, routeseg.common_route\n"
            "heavy = ('torch', 'lightning', 'torchmetrics', 'onnx', 'onnxruntime', 'ray')\n"
            "print([name for name in heavy if name in sys.modules])\n"
            "assert set(routeseg.__all__) <= set(dir(routeseg))\n"
            "from routeseg import *\n"
            "assert load is routeseg.prediction.segmenter.load and RoutingSpace is routeseg.space.RoutingSpace\n"
            "print(sorted(name for name in routeseg.__all__ if name not in globals()))\n"
            "routeseg.nonsense"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.split() == ["[]", "[]"]
        assert done.stderr.splitlines()[-1] == "AttributeError: No routeseg attribute nonsense"


class TestWrongFiles:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda model, words: model.metadata_props.clear(), "is an ONNX file, but `routeseg export` did not write"),
            (
                lambda model, words: words.update(format=FORMAT + 1, version="9.0"),
                f"has format {FORMAT + 1}, and routeseg 9.0 wrote it",
            ),
            (drop("format"), "its metadata is damaged"),
            (drop("fingerprint"), "it has no fingerprint"),
            (lambda model, words: words["config"].update(depth="4"), "depth is '4'"),
            (lambda model, words: words["config"].update(depth=None), "depth is None"),
            (lambda model, words: words["config"].update(palette=[[0, 0, 0]]), "palette has 1 entries"),
            (lambda model, words: words["macs"].update(cell=[]), "costs of its parts are damaged"),
            (lambda model, words: words["macs"]["cell"][0][0].__setitem__(1, -1), "costs of a part are damaged"),
            (lambda model, words: words["config"].update(route=[[9, 0, "keep"]]), "layers run from 0 to 3"),
            (lambda model, words: words["config"].update(depth=5, route=None), "gates is .* does not fit the network"),
            (rename_input, r"takes \['pixels'\] and gives \['logits', 'gates'\]"),
        ],
    )
    def test_each_is_named(self, files, images, tmp_path, capsys, change, message):
        file = edited(files["static"], tmp_path / "net.onnx", change)
        with pytest.raises(ValueError, match=message):
            OnnxNetwork(file)
        code, _, err = run_command(["predict", file, images[0], "--output", tmp_path / "out"], capsys)
        assert code == 2 and str(file) in err and len(err.splitlines()) == 1
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("content", [b"", b"hello", None], ids=["empty", "text", "cut off"])
    def test_damaged_files(self, files, images, tmp_path, capsys, content):
        file = tmp_path / "net.onnx"
        file.write_bytes(files["static"].read_bytes()[:50_000] if content is None else content)
        code, _, err = run_command(["predict", file, images[0], "--output", tmp_path / "out"], capsys)
        assert code == 2 and len(err.splitlines()) == 1
        assert f"{file} is no ONNX file, or a damaged one" in err or "did not write it" in err

    def test_metadata_that_is_no_json(self, files, tmp_path):
        model = onnx.load(files["static"])
        model.metadata_props[0].value = "{"
        onnx.save(model, tmp_path / "net.onnx")
        with pytest.raises(ValueError, match="its metadata is damaged"):
            OnnxNetwork(tmp_path / "net.onnx")

    def test_no_file_no_images_no_runtime(self, files, images, tmp_path, capsys, monkeypatch):
        code, _, err = run_command(["predict", tmp_path / "no.onnx", images[0]], capsys)
        assert code == 2 and f"no file {tmp_path / 'no.onnx'}" in err
        code, _, err = run_command(["predict", files["static"]], capsys)
        assert code == 2 and "name the images" in err
        code, _, err = run_command(["predict", images[0], files["static"]], capsys)
        assert code == 2 and "static.onnx is a network: name one, before the images" in err
        monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
        code, _, err = run_command(["predict", files["static"], images[0]], capsys)
        assert code == 2 and '[onnx]"' in err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--device", "cuda"], "--device only applies to checkpoints"),
            (["--precision", "bfloat16"], "--precision only applies to checkpoints"),
        ],
    )
    def test_options_of_checkpoints(self, files, images, tmp_path, capsys, words, message):
        words = ["predict", files["static"], images[0], "--output", tmp_path / "out", *words]
        code, _, err = run_command(words, capsys)
        assert code == 2 and message in err and not (tmp_path / "out").exists()
        assert run_command([*words[:5], "--device", "cpu"], capsys)[0] == 0


class TestRunning:
    @pytest.mark.parametrize("pictures", [True, False])
    def test_a_network_that_diverged_is_named(self, static_model, images, tmp_path, pictures):
        model = routeseg.load(static_model.save(tmp_path / "net"))
        with torch.no_grad():
            model.decoder.predictor.bias[2] = float("nan")
        network = OnnxNetwork(export(model, tmp_path / "net.onnx"))
        with pytest.raises(ValueError, match="NaN"):
            predict_files(network, images, tmp_path / "out", pictures=pictures)
        assert not list((tmp_path / "out").iterdir())

    def test_wrong_images(self, files):
        network = OnnxNetwork(files["static"])
        for shape in ((3, 64, 64), (1, 4, 64, 64), (0, 3, 64, 64), (1, 3, 31, 64)):
            with pytest.raises(ValueError, match=r"expected \[B,3,H,W\]"):
                network.run(np.zeros(shape, dtype=np.uint8))
        with pytest.raises(ValueError, match="dtype int64: give uint8"):
            network.run(np.zeros((1, 3, 64, 64), dtype=np.int64))
        with pytest.raises(ValueError, match="NaN or infinite"):
            network.run(np.full((1, 3, 64, 64), np.nan, dtype=np.float32))

    @pytest.mark.parametrize(
        ("words", "skipped"),
        [("bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 9", True), ("broken kernel", False)],
    )
    def test_an_image_too_large_for_the_memory_is_skipped(self, files, images, tmp_path, words, skipped):
        network = OnnxNetwork(files["static"])

        class Session:
            def run(self, *_):
                raise Exception(words)  # ONNX Runtime's errors have no other class in common

        network.session = Session()
        if skipped:
            summary = predict_files(network, images[:1], tmp_path / "out")
            assert [skip.reason for skip in summary.skipped] == [f"{images[0]} is too large for the memory"]
        else:
            with pytest.raises(ValueError, match="static.onnx cannot be run on images of 64x96: broken kernel"):
                predict_files(network, images[:1], tmp_path / "out")

    def test_threads(self, files, monkeypatch):
        def threads(**options):
            return OnnxNetwork(files["static"], **options).session.get_session_options().intra_op_num_threads

        assert threads(threads=3) == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert threads() == len(os.sched_getaffinity(0))
