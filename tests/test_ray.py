"""Prediction in several processes: the same files as `predict_files`, whatever dies on the way.

Each run starts workers. Those that need no PyTorch start in a third of the time, so most tests run an ONNX file, or a
runner of their own.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

import routeseg
from conftest import run as run_command
from conftest import scenes_checkpoint
from routeseg import SkipEngine
from routeseg.prediction.files import OUTPUTS, ROUTE, Target, predict_files
from routeseg.prediction.onnx_runner import OnnxNetwork
from routeseg.prediction.sources import open_folder
from routeseg.prediction.torch_runner import TorchNetwork, open_network

ray = pytest.importorskip("ray", reason="the extra routeseg[ray]")
pytest.importorskip("ray.data")
pytest.importorskip("onnx", reason="the extra routeseg[onnx]")
pytest.importorskip("onnxruntime", reason="the extra routeseg[onnx]")
from routeseg.export import export  # noqa: E402
from routeseg.export.int8 import export_int8  # noqa: E402
from routeseg.prediction import ray as prediction_ray  # noqa: E402
from routeseg.prediction.ray import MAX_ATTEMPTS, predict_with_ray  # noqa: E402

WORKERS = 2
PROCESS_TITLE = b"ray::MapWorker"
KILLER_WIDTH = 96  # an image of this width kills the process that segments it

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
]


@pytest.fixture(scope="module")
def local_ray():
    """One Ray for all tests that take it: starting it takes seconds."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=WORKERS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return scenes_checkpoint(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def onnx_file(checkpoint, tmp_path_factory) -> Path:
    """The network with its gates."""
    return export(routeseg.load(checkpoint), tmp_path_factory.mktemp("file") / "gates.onnx")


@pytest.fixture
def onnx(onnx_file):
    """What opens the ONNX file in a worker, which need not see it, and its network."""
    content = onnx_file.read_bytes()
    return partial(OnnxNetwork, "elsewhere.onnx", content=content), OnnxNetwork(onnx_file, threads=1).network


class GreyNetwork:
    """A runner that finds the first class everywhere and opens nothing; `act(image)` comes first."""

    def __init__(self, network, act, threads):
        self.network, self.act, self.precision = network, act, "float32"

    def __call__(self, image):
        self.act(image)
        space = self.network.config.space
        return np.zeros(image.shape[:2], dtype=np.uint8), np.zeros((space.depth + 1, space.num_scales, 3))


def grey(network, act):
    """Opens a GreyNetwork in a worker, which cannot import this file: what it needs travels by value."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return partial(GreyNetwork, network, act)


def make_images(folder: Path, count: int, width: int = 64) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:02d}.png" for number in range(count)]
    for seed, path in enumerate(paths):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def worker_processes() -> list[int]:
    """The processes of our pool, by their titles."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "cmdline").read_bytes().startswith(PROCESS_TITLE):
                found.append(int(folder.name))
        except OSError:
            pass  # it ended
    return found


def test_the_command_starts_ray_is_quiet_and_ends_it(checkpoint, tmp_path):
    """With an int8 file, whose results are those of the plain command."""
    paths = make_images(tmp_path / "in", 4)
    export_int8(routeseg.load(checkpoint), tmp_path / "int8.onnx", paths)
    paths[1].write_text("no image")
    words = ["predict", "int8.onnx", "in", "--output", "out", "--workers", "1", "--pictures", "false"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "routeseg.cli", *words]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and not result.stderr, result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert [line[0] for line in lines] == ["images", "real", "real", "real", "time", "results", "skipped", "cannot"]
    assert lines[0] == ["images", "3"] and lines[6] == ["skipped", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        predict_files(OnnxNetwork("int8.onnx"), sorted(Path("in").iterdir()), "plain", pictures=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain") and len(contents(tmp_path / "out")) == 6


class TestMistakes:
    def test_without_the_extra(self, tmp_path, monkeypatch, capsys):
        path = make_images(tmp_path / "in", 1)[0]
        monkeypatch.setitem(sys.modules, "ray", None)
        code, _, err = run_command(["predict", path, "--workers", "2", "--output", tmp_path / "out"], capsys)
        assert code == 2 and '[ray]"' in err and not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--workers", "0"], "--workers is 0"),
            (["--workers", "2", "--device", "tpu"], "--device is tpu"),
            (["--workers", "2", "--device", "cuda:1"], "--device is cuda:1"),
            (["--workers", "2", "--precision", "float8"], "float8"),
            (["--ray_address", "nonsense"], "--ray_address is 'nonsense': give auto, or HOST:PORT"),
            (["--ray_address", "127.0.0.1:9", "--workers", "2"], "cannot reach a Ray cluster at 127.0.0.1:9"),
            (["--workers", "2", "--output", "memory://out"], "only one process can see memory://out/"),
        ],
    )
    def test_wrong_options(self, checkpoint, tmp_path, capsys, words, message):
        path = make_images(tmp_path / "in", 1)[0]
        code, _, err = run_command(["predict", checkpoint, path, "--output", tmp_path / "out", *words], capsys)
        assert code == 2 and message in err and err.count("\n") == 1
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    def test_images_that_other_processes_cannot_see(self, onnx, tmp_path):
        fsspec.filesystem("memory").pipe_file("/in/a.png", b"")
        with pytest.raises(ValueError, match="only one process can see memory://in/a.png"):
            predict_with_ray(*onnx, ["memory://in/a.png"], tmp_path / "out")


class TestOptionsOfTheCommand:
    """What the command has the workers open, and where: a pickle of it stands for a worker."""

    @pytest.fixture
    def asked(self, monkeypatch, tmp_path, capsys):
        """asked(network, *words) -> the runner that a worker of the command gets, and the other arguments."""
        seen = {}

        def remember(open_runner, network, images, output, **options):
            seen.update(options, runner=ray.cloudpickle.loads(ray.cloudpickle.dumps(open_runner))(threads=1))
            assert seen["runner"].network == network
            return predict_files(seen["runner"], images, output, pictures=False)

        def ask(network, *words):
            path = make_images(tmp_path / "in", 1)[0]
            monkeypatch.setattr("routeseg.cli.prediction.predict_with_ray", remember)
            code, _, err = run_command(["predict", network, path, "--output", tmp_path / "out", *words], capsys)
            assert code == 0, err
            return seen

        return ask

    def test_a_checkpoint_keeps_its_engine_and_precision(self, checkpoint, asked):
        forward = asked(checkpoint, "--workers", "2")["runner"].forward
        assert isinstance(forward, SkipEngine) and forward.precision == "float32"
        assert forward.precision_reason is None, "the command decides for all workers"

    def test_an_onnx_file_travels_by_its_content(self, onnx_file, asked):
        content = onnx_file.read_bytes()
        found = asked(onnx_file, "--workers", "3")
        assert (found["workers"], found["address"], found["device"]) == (3, None, "cpu")
        assert found["runner"].kind == "dense" and found["runner"].file == onnx_file
        assert OnnxNetwork("gone.onnx", content=content).network == found["runner"].network

    def test_a_cluster_tells_how_many_workers(self, onnx_file, asked):
        found = asked(onnx_file, "--ray_address", "auto")
        assert (found["workers"], found["address"]) == (None, "auto")


@pytest.mark.usefixtures("local_ray")
class TestPredictWithRay:
    @pytest.mark.slow
    def test_from_urls_and_files_to_a_url_it_gives_the_files_of_the_plain_run(self, checkpoint, tmp_path, web_server):
        """Corrupt images among them."""
        network = routeseg.load(checkpoint)
        paths = make_images(tmp_path / "in", 8)
        paths[2].write_bytes(paths[2].read_bytes()[:100])
        paths[5].write_text("no image")
        (tmp_path / "ray").mkdir()
        source, target = web_server(tmp_path / "in"), web_server(tmp_path / "ray")
        images = [*paths[:6], *(f"{source}/{path.name}" for path in paths[6:]), tmp_path / "gone.png"]
        expected_runner = TorchNetwork(SkipEngine(network), network)
        expected = predict_files(expected_runner, images, tmp_path / "plain")
        calls = []
        got = predict_with_ray(
            partial(open_network, network),
            expected_runner.network,
            images,
            target,
            WORKERS,
            on_image=lambda: calls.append(1),
        )
        assert len(calls) == len(images) and got.output == target
        assert got.predictions == expected.predictions and len(got.predictions) == 6
        assert got.skipped == expected.skipped and len(got.skipped) == 3
        assert contents(tmp_path / "ray") == contents(tmp_path / "plain")
        assert len(contents(tmp_path / "ray")) == 6 * len(OUTPUTS)

    def test_a_worker_that_is_killed_is_replaced_and_nothing_is_missing(self, onnx, tmp_path):
        paths = make_images(tmp_path / "in", 24)
        killed = []

        def kill_one():
            if not killed:
                killed.append(worker_processes()[0])
                os.kill(killed[0], signal.SIGKILL)
                left = [path for path in paths if not (tmp_path / "ray" / f"{path.stem}{ROUTE}").exists()]
                assert left, "images remain"

        summary = predict_with_ray(*onnx, paths, tmp_path / "ray", 1, on_image=kill_one, pictures=False)
        assert killed and len(summary.predictions) == len(paths) and not summary.skipped
        predict_files(onnx[0](threads=1), paths, tmp_path / "plain", pictures=False)
        whole = {name: data for name, data in contents(tmp_path / "ray").items() if not name.endswith(".tmp")}
        assert whole == contents(tmp_path / "plain")

    @pytest.mark.slow
    def test_an_image_that_kills_its_workers_is_skipped(self, onnx, tmp_path):
        paths = make_images(tmp_path / "in", 4)
        killer = make_images(tmp_path / "killer", 1, KILLER_WIDTH)[0]

        def die_at_killer(image):
            if image.shape[1] == KILLER_WIDTH:
                os.kill(os.getpid(), signal.SIGKILL)

        images = [*paths[:2], killer, *paths[2:]]
        opener = grey(onnx[1], die_at_killer)
        summary = predict_with_ray(opener, onnx[1], images, tmp_path / "ray", WORKERS, pictures=False)
        assert [p.image for p in summary.predictions] == paths
        assert [skip.image for skip in summary.skipped] == [killer]
        assert f"{MAX_ATTEMPTS} processes died" in summary.skipped[0].reason

    def test_resume_computes_only_what_is_missing(self, onnx, tmp_path):
        paths = make_images(tmp_path / "in", 24)

        def interrupt():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            predict_with_ray(*onnx, paths, tmp_path / "ray", 1, on_image=interrupt, pictures=False)
        deadline = time.monotonic() + 30
        while worker_processes() and time.monotonic() < deadline:
            time.sleep(0.1)  # it may be at work on its last image
        before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ray").iterdir()}
        done = {name for name in before if name.endswith(ROUTE)}
        assert 0 < len(done) < len(paths)
        summary = predict_with_ray(*onnx, paths, tmp_path / "ray", 1, resume=True, pictures=False)
        assert summary.resumed == len(done) and [p.image for p in summary.predictions] == paths
        after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ray").iterdir()}
        assert {name for name in after if name.endswith(ROUTE) and before.get(name) == after[name]} == done
        again = predict_with_ray(*onnx, paths, tmp_path / "ray", 1, resume=True, pictures=False)
        assert again.resumed == len(paths) and again.predictions == summary.predictions

    def test_an_error_in_a_worker_names_the_image_and_the_cause(self, onnx, tmp_path):
        path = make_images(tmp_path / "in", 1)[0]

        def fail(image):
            raise TypeError("a mistake of the network")

        with pytest.raises(ValueError, match=f"^{path}: TypeError: a mistake of the network$"):
            predict_with_ray(grey(onnx[1], fail), onnx[1], [path], tmp_path / "ray", 1, pictures=False)

    def test_a_network_that_a_worker_cannot_open_is_told_at_its_first_image(self, onnx, tmp_path):
        opener = partial(OnnxNetwork, "cut.onnx", content=b"cut off")
        target = Target(open_folder(tmp_path / "ray"), False, onnx[1].fingerprint)
        worker = prediction_ray._Worker(ray.put(ray.cloudpickle.dumps(opener)), target, 1, None)
        row = worker({"number": 0, "image": b"a.png", "location": b"/a.png", "name": "a"})
        assert row["kind"] == prediction_ray.FAILED and "cut.onnx is no ONNX file" in row["reason"]

    def test_an_output_that_cannot_be_written_stops_all_with_one_message(self, onnx, tmp_path):
        paths = make_images(tmp_path / "in", 3)
        (tmp_path / "ray" / "01_labels.png").mkdir(parents=True)
        with pytest.raises(ValueError, match="^cannot write into [^ ]*ray: Is a directory.*--output"):
            predict_with_ray(*onnx, paths, tmp_path / "ray", 1, pictures=False)
        assert not list((tmp_path / "ray").glob("01*.json"))
