"""Two processes train as one with the same images in a step; a process that dies ends the job; runs go on elsewhere."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryFile

import pytest
import torch
from safetensors.torch import load_file

import routeseg
from conftest import environment_with, run
from routeseg.data.config import DataConfig, open_data
from routeseg.data.loaders import evaluation_loader
from routeseg.engine import SkipEngine
from routeseg.evaluation import evaluate
from routeseg.training import run as training_run
from routeseg.training.batch_norm import choose_mode
from routeseg.training.processes import count_processes
from routeseg.training.recipe import Recipe
from two_processes import (
    CUT,
    DATA,
    GLOBAL_BATCH,
    PICTURES,
    STEPS,
    evaluation,
    fit,
    network,
    statistics,
    synced_gradients,
)

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
WORDS = [
    "--accelerator=cpu", "--model.depth=3", "--model.base_channels=4", "--model.stem_channels=4", "--data.workers=0",
    "--data.crop=[32,64]", "--data.image_size=[48,64]", "--data.train_images=12", "--data.val_images=3",
    "--data.batch_size=2", "--recipe.lr=0.02", "--recipe.save_every=2", "--recipe.validate_every=1000",
    "--recipe.precise_bn_batches=2", "--recipe.log_every=1", "--recipe.precision=32-true",
]  # fmt: skip
KILLED_STEPS = 120
ENDS_WITHIN = 45  # seconds after a process died; torchrun itself gives the others 30
STOPPED = r"routeseg: stopped: another process .* died.*--resume"


def losses(folder):
    """step -> the logged loss and its parts."""
    found = {}
    for path in sorted(folder.glob("logs/*/metrics.csv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if row["loss"]:
                    keys = ("loss", "cross_entropy", "budget_loss", "expected_cost", "real_cost")
                    found[int(row["step"])] = [float(row[key]) for key in keys]
    return found


def weights(folder):
    return load_file(folder / "last" / "model.safetensors")


class Job:
    """A training in two processes, one of which is killed in the middle of it."""

    def __init__(self, command, output, script):
        """`output` is the folder of the training, `script` a word of the command line of those processes alone."""
        with TemporaryFile("w+") as err:
            job = subprocess.Popen(command, stderr=err, stdout=subprocess.DEVNULL, env=environment_with(HERE))
            try:
                deadline = time.monotonic() + 180
                while not (output / "last.ckpt").exists() and job.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.02)
                self.ended_early = job.poll() is not None
                if not self.ended_early:
                    os.kill(children(job.pid, script)[-1], signal.SIGKILL)
                self.code = job.wait(timeout=ENDS_WITHIN)
            finally:
                job.kill()
                job.wait()
            err.seek(0)
            self.err = err.read()


def children(pid, script):
    """Processes that this one started and that have this word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                if script.encode() in path.with_name("cmdline").read_bytes():
                    found.append(int(path.parent.name))
        except OSError:
            pass
    return sorted(found)


def training(output):
    return ["train", "--output", str(output), *WORDS, f"--recipe.iterations={KILLED_STEPS}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the runs of one process."""
    folder = tmp_path_factory.mktemp("runs")
    fit(folder / "one", GLOBAL_BATCH)
    fit(folder / "one_no_budget", GLOBAL_BATCH, budget=0.0)
    return folder


@pytest.fixture(scope="module")
def job(runs):
    """One call of torchrun: the runs of two processes, each one's findings in RANK.json, then one that is killed."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("finds the processes in /proc")
    script = HERE / "two_processes.py"
    return Job([*TORCHRUN, script, runs, *training(runs / "killed")], runs / "killed", f"/{script.name}")


@pytest.fixture(scope="module")
def folder(runs, job):
    """The folder of the runs of one process, of two, and of one after the other."""
    folder = runs
    assert not job.ended_early, job.err[-4000:]
    (folder / "resumed_two_one").mkdir()
    shutil.copy(folder / "two" / "cut.ckpt", folder / "resumed_two_one" / "last.ckpt")
    fit(folder / "resumed_two_one", GLOBAL_BATCH, resume=True)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("ours", "whole", "first"),
    [
        ("two", "one", 0),
        ("resumed_one_two", "one", CUT),
        ("resumed_two_one", "one", CUT),
        ("two_accumulated", "one_no_budget", 0),  # one image in a batch, two batches in a step, two processes
    ],
)
def test_losses_and_weights_are_those_of_one_process(folder, ours, whole, first):
    """Sums in another order: float32 rounds at 6e-8, and a few steps of learning rate 0.05 amplify that."""
    expected, got = losses(folder / whole), losses(folder / ours)
    if "accumulated" in ours:  # the budget keeps to the mean of each batch of a step, see SegmentationTask
        expected, got = ({k: [v[0], v[1], v[3], v[4]] for k, v in rows.items()} for rows in (expected, got))
    assert list(expected) == list(range(STEPS)) and list(got) == list(range(first, STEPS))
    assert expected[STEPS - 1][0] != pytest.approx(expected[0][0], rel=0.01), "nothing was learned"
    for step, values in got.items():
        assert values == pytest.approx(expected[step], rel=2e-5, abs=1e-7), step
    one, two = weights(folder / whole), weights(folder / ours)
    start = network().state_dict()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    moved = max(float((one[name] - start[name]).abs().max()) for name in one if one[name].is_floating_point())
    assert moved > 0.01


def test_the_final_score_is_that_of_one_process(folder, found):
    def score(name):
        model = routeseg.load(folder / name / "last")
        pictures = open_data(DataConfig(**DATA), "val", 3)
        return evaluate(model, evaluation_loader(pictures), SkipEngine(model)).miou

    assert found[0]["miou"] == found[1]["miou"]
    assert found[0]["miou"]["whole"] == score("one") == score("two") == score("resumed_two_one")
    assert found[0]["miou"]["resumed"] == score("one") > 0


def test_evaluation_over_two_processes_to_the_last_digit(folder, found):
    """The same checkpoint: five images, three for one process and two for the other; also their order."""
    expected = evaluation(routeseg.load(folder / "one" / "last"))
    assert len(set(expected["cost_macs"])) > 2 and expected["passes"] == [2] * PICTURES
    assert expected == found[0]["evaluation"] == found[1]["evaluation"]


def test_every_image_once_in_an_epoch(found):
    keys = [tuple(key) for facts in found for key in facts["read"]]
    assert len(keys) == len(set(keys)) == STEPS * GLOBAL_BATCH and len(found[0]["read"]) == len(found[1]["read"])
    assert sorted(position for position, _ in keys) == list(range(STEPS * GLOBAL_BATCH))
    images = DATA["train_images"]
    for epoch in range(STEPS * GLOBAL_BATCH // images):
        assert sorted(index for position, index in keys if position // images == epoch) == list(range(images))


def test_own_statistics_are_averaged_before_they_are_saved(folder):
    """Each process has its own batches' BatchNorm; the networks, also the averaged one, end up the same in all."""
    states = [torch.load(folder / f"{rank}.pt")["own"] for rank in range(2)]
    different = [name for name, value in states[1].items() if not torch.equal(states[0][name], value)]
    assert all("num_batches_tracked" in name for name in different)  # how many reached a node, which nothing reads
    saved = weights(folder / "two_own")
    assert all(torch.equal(saved[name], value) for name, value in states[0].items())
    raw = torch.load(folder / "two_own" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in saved.items():
        if "running" in name:  # of the last step's weights, which the average of the weights shares
            assert torch.equal(raw[f"model.{name}"], value)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(saved["stem.0.1.running_mean"], network().state_dict()["stem.0.1.running_mean"])


def test_accumulated_gradients_of_nodes_that_only_some_batches_reach(found):
    """The case above has steps whose first batches run a node, in some process, that its last batches do not."""
    assert found[0]["only_first"] > 0 and found[1]["only_first"] > 0


def test_synced_batch_norm_is_that_of_one_process(folder):
    """Also where a process's own images close a path that the other's open: both run it, and nobody waits forever."""
    ran, expected = synced_gradients(slice(0, 4))
    alone = [set(synced_gradients(slice(0, 2))[0]), set(synced_gradients(slice(2, 4))[0])]
    assert alone[0] != alone[1], "the images do not tell the two cases apart"
    for rank in range(2):
        got = torch.load(folder / f"{rank}.pt")
        assert got["ran"] == ran
        assert got["gradients"].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got["gradients"][name], value, rtol=1e-5, atol=1e-7)


def test_precise_batch_norm_is_the_mean_over_all_processes(folder):
    """Each process brings two of the four batches; a node that no image of one of them reaches has the other's."""
    expected = statistics([0, 1, 2, 3])
    halves = statistics([0, 2]), statistics([1, 3])
    for rank in range(2):
        got = torch.load(folder / f"{rank}.pt")["statistics"]
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(half[name], expected[name], rtol=1e-2) for half in halves for name in expected)


def test_the_first_process_chooses_the_precision_of_all(found):
    assert [facts["precision"] for facts in found] == ["bf16-mixed"] * 2


def check_killed(job, output):
    """The job ended soon and says why; what it wrote is whole."""
    assert not job.ended_early, job.err
    assert job.code not in (0, 2) and re.search(STOPPED, job.err), job.err
    ours = f'File "{Path(routeseg.__file__).parent}'  # also where the clone's folder, and so .venv's, has our name
    assert not [line for line in job.err.splitlines() if line.strip().startswith(ours)]
    step = torch.load(output / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < KILLED_STEPS, "the run was not cut in the middle"
    assert not list(output.glob(".last*"))


def test_a_process_that_dies_ends_the_job_of_torchrun(runs, job):
    check_killed(job, runs / "killed")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_of_devices(tmp_path, capsys):
    """And one process goes on from what is there."""
    output = tmp_path / "run"
    words = training(output)
    job = Job([sys.executable, "-m", "routeseg.cli", *words, "--devices", "2"], output, "routeseg.cli")
    check_killed(job, output)
    code, out, err = run([*words, "--resume"], capsys)
    assert code == 0 and "note: this run took 4 images a step so far, and takes 2 from here" in out, err
    assert max(losses(output)) == KILLED_STEPS - 1
    assert not list(output.glob(".last*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "0"], "--devices is 0"),
        (["--devices", "two"], "devices"),
        (["--recipe.batch_norm", "synced"], "SyncBatchNorm refuses modules on CPUs.*own .*frozen"),
        (["--recipe.batch_norm", "some"], "batch_norm"),
        (["--recipe.accumulate", "0"], "recipe.accumulate is 0"),
        (["--recipe.ema_decay", "1"], "recipe.ema_decay is 1"),
        (["--recipe.clip_norm", "0"], "recipe.clip_norm is 0"),
        (["--accelerator", "abacus"], "abacus"),
        (["--data.batch_size", "1", "--data.crop", "[32,32]"], "batch_size 1 .* single value .*frozen"),
        (
            ["--data.batch_size", "1", "--data.crop", "[128,128]", "--model.small_gate", "true"],
            "with small gates",
        ),
    ],
)
def test_wrong_requests(tmp_path, capsys, words, message):
    code, _, err = run(["train", "--output", tmp_path / "run", *WORDS, *words], capsys)
    assert code == 2 and re.search(message, err.replace("\n", " ")), err
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_processes_of_torchrun(monkeypatch):
    """Two machines of four processes each; --devices may only repeat it."""
    assert count_processes("auto", on_gpu=False) == (1, 1) and count_processes(3, on_gpu=False) == (3, 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert count_processes("auto", on_gpu=False) == count_processes(4, on_gpu=False) == (4, 2)
    with pytest.raises(ValueError, match="leave --devices out"):
        count_processes(2, on_gpu=False)
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="same --nproc_per_node"):
        count_processes("auto", on_gpu=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="this machine shows 2 GPUs"):
        count_processes("auto", on_gpu=True)


def test_values_of_synced_batch_norm_come_from_all_processes(tmp_path, monkeypatch):
    """One image of 32x32 a process is too little for its own statistics, and enough together with another's."""
    monkeypatch.setattr(training_run, "count_processes", lambda *_: (2, 1))
    for mode in ("own", "synced"):
        monkeypatch.setattr(training_run, "choose_mode", lambda *_, mode=mode: mode)
        refused = pytest.raises(ValueError, match="single value") if mode == "own" else nullcontext()
        with refused:
            job = training_run.Run.begin(network(), Recipe(), training_run.RunOptions(tmp_path), 1, (32, 32))
    assert job.synced and job.images_per_step == 2


def test_which_batch_norm():
    assert choose_mode("auto", on_gpu=True, processes=8) == "synced"
    assert choose_mode("auto", on_gpu=True, processes=1) == choose_mode("auto", on_gpu=False, processes=2) == "own"
    assert choose_mode("frozen", on_gpu=False, processes=1) == "frozen"
    assert choose_mode("synced", on_gpu=True, processes=2) == "synced"
