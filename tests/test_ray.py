"""Prediction in several processes: the same files as `predict_files`, whatever dies on the way."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import run as run_command
from conftest import scenes_checkpoint, spread_gates
from routeseg import DynamicRoutingNetwork, SkipEngine
from routeseg.prediction.files import OUTPUTS, ROUTE, predict_files
from routeseg.prediction.torch_runner import TorchNetwork

ray = pytest.importorskip("ray", reason="the extra routeseg[ray]")
pytest.importorskip("ray.data")
from routeseg.prediction.ray import MAX_ATTEMPTS, predict_with_ray  # noqa: E402

WORKERS = 2
PROCESS_TITLE = b"ray::MapWorker"
KILLER_WIDTH = 96  # an image of this width kills the process that segments it

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
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


@pytest.fixture
def network():
    torch.manual_seed(0)
    return spread_gates(DynamicRoutingNetwork(num_classes=5, depth=4, base_channels=8, stem_channels=8)).eval()


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


def test_the_command_starts_ray_is_quiet_and_ends_it(tmp_path):
    checkpoint = scenes_checkpoint(tmp_path / "net")
    paths = make_images(tmp_path / "in", 4)
    paths[1].write_text("no image")
    words = ["predict", checkpoint, "in", "--output", "out", "--engine", "ray", "--workers", "1", "--pictures", "false"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "routeseg.cli", *words]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and not result.stderr, result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert [line[0] for line in lines] == ["images", "real", "real", "real", "time", "results", "skipped", "cannot"]
    assert lines[0] == ["images", "3"] and lines[6] == ["skipped", "1"]
    images = {json.loads(path.read_text())["image"] for path in (tmp_path / "out").glob("*.json")}
    assert images == {"in/00.png", "in/02.png", "in/03.png"}


class TestMistakes:
    def test_without_the_extra(self, tmp_path, monkeypatch, capsys):
        path = make_images(tmp_path / "in", 1)[0]
        monkeypatch.setitem(sys.modules, "ray", None)
        code, _, err = run_command(["predict", path, "--engine", "ray", "--output", tmp_path / "out"], capsys)
        assert code == 2 and "routeseg[ray]" in err and not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--workers", "0"], "--workers is 0"),
            (["--device", "tpu"], "--device is tpu"),
            (["--device", "cuda:1"], "--device is cuda:1"),
            (["--ray_address", "nonsense"], "--ray_address is 'nonsense': give auto, or HOST:PORT"),
            (["--ray_address", "127.0.0.1:9"], "cannot reach a Ray cluster at 127.0.0.1:9"),
            (["--output", "memory://out"], "memory://out/ is seen by one process alone"),
        ],
    )
    def test_wrong_options(self, tmp_path, capsys, words, message):
        checkpoint = scenes_checkpoint(tmp_path / "net")
        path = make_images(tmp_path / "in", 1)[0]
        words = ["predict", checkpoint, path, "--engine", "ray", "--output", tmp_path / "out", *words]
        code, _, err = run_command(words, capsys)
        assert code == 2 and message in err
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    def test_images_that_other_processes_cannot_see(self, network, tmp_path):
        fsspec.filesystem("memory").pipe_file("/in/a.png", b"")
        with pytest.raises(ValueError, match="memory://in/a.png is seen by one process alone"):
            predict_with_ray(network, ["memory://in/a.png"], tmp_path / "out")


@pytest.mark.usefixtures("local_ray")
class TestPredictWithRay:
    def test_from_urls_and_files_to_a_url_it_gives_the_files_of_the_plain_engine(self, network, tmp_path, web_server):
        """Corrupt images among them."""
        paths = make_images(tmp_path / "in", 8)
        paths[2].write_bytes(paths[2].read_bytes()[:100])
        paths[5].write_text("no image")
        (tmp_path / "ray").mkdir()
        source, target = web_server(tmp_path / "in"), web_server(tmp_path / "ray")
        images = [*paths[:6], *(f"{source}/{path.name}" for path in paths[6:]), tmp_path / "gone.png"]
        expected = predict_files(TorchNetwork(SkipEngine(network), network), images, tmp_path / "plain")
        calls = []
        got = predict_with_ray(network, images, target, WORKERS, on_image=lambda: calls.append(1))
        assert len(calls) == len(images) and got.output == target
        assert got.predictions == expected.predictions and len(got.predictions) == 6
        assert got.skipped == expected.skipped and len(got.skipped) == 3
        assert contents(tmp_path / "ray") == contents(tmp_path / "plain")
        assert len(contents(tmp_path / "ray")) == 6 * len(OUTPUTS)

    def test_a_worker_that_is_killed_is_replaced_and_nothing_is_missing(self, network, tmp_path):
        paths = make_images(tmp_path / "in", 24)
        killed = []

        def kill_one():
            if not killed:
                killed.append(worker_processes()[0])
                os.kill(killed[0], signal.SIGKILL)
                left = [path for path in paths if not (tmp_path / "ray" / f"{path.stem}{ROUTE}").exists()]
                assert left, "images remain"

        summary = predict_with_ray(network, paths, tmp_path / "ray", 1, on_image=kill_one, pictures=False)
        assert killed and len(summary.predictions) == len(paths) and not summary.skipped
        predict_files(TorchNetwork(SkipEngine(network), network), paths, tmp_path / "plain", pictures=False)
        whole = {name: data for name, data in contents(tmp_path / "ray").items() if not name.endswith(".tmp")}
        assert whole == contents(tmp_path / "plain")

    @pytest.mark.slow
    def test_an_image_that_kills_its_workers_is_skipped(self, network, tmp_path):
        paths = make_images(tmp_path / "in", 4)
        killer = make_images(tmp_path / "killer", 1, KILLER_WIDTH)[0]

        def die_at_killer(module, inputs):
            if inputs[0].shape[-1] == KILLER_WIDTH:
                os.kill(os.getpid(), signal.SIGKILL)

        network.stem.register_forward_pre_hook(die_at_killer)
        images = [*paths[:2], killer, *paths[2:]]
        summary = predict_with_ray(network, images, tmp_path / "ray", WORKERS, pictures=False)
        assert [p.image for p in summary.predictions] == paths
        assert [skip.image for skip in summary.skipped] == [killer]
        assert f"{MAX_ATTEMPTS} processes died" in summary.skipped[0].reason

    def test_resume_computes_only_what_is_missing(self, network, tmp_path):
        paths = make_images(tmp_path / "in", 24)

        def interrupt():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            predict_with_ray(network, paths, tmp_path / "ray", 1, on_image=interrupt, pictures=False)
        deadline = time.monotonic() + 30
        while worker_processes() and time.monotonic() < deadline:
            time.sleep(0.1)  # it may be at work on its last image
        before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ray").iterdir()}
        done = {name for name in before if name.endswith(ROUTE)}
        assert 0 < len(done) < len(paths)
        summary = predict_with_ray(network, paths, tmp_path / "ray", 1, resume=True, pictures=False)
        assert summary.resumed == len(done) and [p.image for p in summary.predictions] == paths
        after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ray").iterdir()}
        assert {name for name in after if name.endswith(ROUTE) and before.get(name) == after[name]} == done
        again = predict_with_ray(network, paths, tmp_path / "ray", 1, resume=True, pictures=False)
        assert again.resumed == len(paths) and again.predictions == summary.predictions

    def test_an_error_in_a_worker_names_the_image_and_the_cause(self, network, tmp_path):
        path = make_images(tmp_path / "in", 1)[0]

        def fail(module, inputs):
            raise TypeError("a mistake of the network")

        network.double().stem.register_forward_pre_hook(fail)  # float64 runs on PyTorch's operations
        with pytest.raises(ValueError, match=f"^{path}: TypeError: a mistake of the network$"):
            predict_with_ray(network, [path], tmp_path / "ray", 1, pictures=False)

    def test_an_output_that_cannot_be_written_stops_all_with_one_message(self, network, tmp_path):
        paths = make_images(tmp_path / "in", 3)
        (tmp_path / "ray" / "01_labels.png").mkdir(parents=True)
        with pytest.raises(ValueError, match="^cannot write into [^ ]*ray: Is a directory.*--output"):
            predict_with_ray(network, paths, tmp_path / "ray", 1, pictures=False)
        assert not list((tmp_path / "ray").glob("01*.json"))
