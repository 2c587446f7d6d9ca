"""A training that is given minutes: it ends in time and has decayed, on a machine that is only simulated. No test reads
the wall."""

import math
from dataclasses import replace

import pytest
import torch
import yaml

import routeseg
from conftest import run
from routeseg.data.config import DataConfig
from routeseg.data.datamodule import SegmentationDataModule
from routeseg.evaluation import evaluate
from routeseg.training import clock as clocks
from routeseg.training import segmentation
from routeseg.training.clock import Clock
from routeseg.training.gate_budget import Budget
from routeseg.training.pace import Pace, fitted
from routeseg.training.recipe import Recipe, lr_factor
from routeseg.training.run import RunOptions
from routeseg.training.segmentation import train
from routeseg.training.task import RecipeTask
from routeseg.training.trial import PrecisionChoice

pytestmark = pytest.mark.usefixtures("one_thread")
CHOICE = PrecisionChoice("32-true", "so it is")


@pytest.fixture
def time(monkeypatch):
    """A clock that stands still until a test moves it on: time[0] is what it shows, in seconds."""
    shown = [1000.0]
    monkeypatch.setattr(clocks, "now", lambda: shown[0])
    return shown


def drive(time, clock, step_of, validation_of):
    """Lets a training run: the shares at which steps began, and at which validations came. The time of a step and of a
    validation are those of the machine then."""
    clock.begin()
    shares, validated = [], []
    while True:
        shares.append(clock.share)
        time[0] += step_of(len(shares))
        clock.tick()
        if clock.validates:
            validated.append(clock.share)
            over = clock.over
            time[0] += validation_of(len(shares))
            clock.validated()
            if over:
                return shares, validated


@pytest.mark.parametrize(
    ("slower", "steps"),
    [
        (lambda n: 1.0, 480),  # as it was measured
        (lambda n: 3.0, 160),  # another program has come
        (lambda n: 1.0 if n < 150 else 4.0, 230),
        (lambda n: 4.0 if n < 50 else 1.0, 330),
        (lambda n: 1.0 + 2 * (n // 20 % 2), 240),
        (lambda n: 30.0 if n == 1 else 1.0, 450),  # the first step prepares much
    ],
)
@pytest.mark.parametrize("validation_s", [5.0, 40.0])
def test_it_ends_in_time_and_has_decayed(time, slower, steps, validation_s):
    start, recipe = time[0], Recipe()
    clock = Clock(600.0)
    time[0] += 20.0  # until the pace is known
    recipe = fitted(recipe, Pace(CHOICE, 1.0, 0.0, 0.0, 4, validation_s), clock, 4, rest_s=10.0)
    shares, validated = drive(time, clock, slower, lambda n: validation_s * slower(n))
    used = time[0] - start + 10.0 * slower(len(shares))
    assert 0.85 * 600 < used < 1.03 * 600
    assert all(one < other for one, other in zip(shares, shares[1:], strict=False))
    rates = [lr_factor(share * recipe.iterations, recipe) for share in shares]
    assert rates[-1] < 0.1 * max(rates) and max(rates) > 0.8
    assert len(shares) > 0.4 * steps
    assert 1 <= len(validated) <= 4 and validated[-1] > 0.9


def test_a_slow_beginning_does_not_end_it(time):
    """Steps beside other work made the end look longer than all of the time that was left."""
    start = time[0]
    clock = Clock(600.0)
    fitted(Recipe(), Pace(CHOICE, 1.0, 0.0, 0.0, 4, 120.0), clock, 4, rest_s=10.0)
    shares, _ = drive(time, clock, lambda n: 4.0 if n < 40 else 1.0, lambda n: 120.0)
    assert 0.85 * 600 < time[0] - start < 1.03 * 600 and len(shares) > 200


def test_validations_that_do_not_fit_are_left_out(time):
    """One that takes longer than it was measured to: the next ones are left out, but for the last."""
    clock = Clock(300.0)
    fitted(Recipe(), Pace(CHOICE, 1.0, 0.0, 0.0, 4, 2.0), clock, 4)
    start = time[0]
    shares, validated = drive(time, clock, lambda n: 1.0, lambda n: 60.0)
    assert len(validated) == 2 and time[0] - start == pytest.approx(300, abs=2)


def test_a_validation_that_takes_long_looks_at_fewer_pictures(time):
    """At most a fifth of the time goes to one; of BatchNorm's batches there are fewer, too."""
    clock = Clock(300.0)
    recipe = fitted(Recipe(), Pace(CHOICE, 1.0, 0.0, 0.0, 4, 600.0), clock, 4)
    assert clock.looks == pytest.approx(0.1) and recipe.precise_bn_batches == 20
    start = time[0]
    shares, validated = drive(time, clock, lambda n: 1.0, lambda n: 600.0 * clock.looks)
    assert len(shares) == pytest.approx(180, abs=2) and len(validated) == 2 and time[0] - start <= 301
    module = SegmentationDataModule(replace(DATA, train_images=400, val_images=200), 1)
    module.look_at(0.1)
    assert len(module.val_dataloader()) == 20 and len(module.calibration_dataloader("val")) == 20
    assert len(module.calibration_dataloader("train")) == 30
    module.look_at(0.001)
    assert len(module.val_dataloader()) == len(module.calibration_dataloader("train")) == 8, "some in any case"


def test_no_time_at_all_is_one_step(time):
    clock = Clock(3.0)
    fitted(Recipe(), Pace(CHOICE, 4.0, 0.0, 0.0, 4, 20.0), clock, 4)
    shares, validated = drive(time, clock, lambda n: 4.0, lambda n: 20.0)
    assert len(shares) == len(validated) == 1 and clock.over and clock.share == 1


def test_time_between_the_parts_of_a_run_does_not_count(time):
    whole = Clock(100.0)
    fitted(Recipe(), Pace(CHOICE, 1.0, 0.0, 0.0, 4, 5.0), whole, 2)
    whole.begin()
    for _ in range(30):
        time[0] += 1.0
        whole.tick()
    state = whole.state_dict()
    time[0] += 5000.0
    part = Clock.of(state)
    assert part.share == whole.share > 0.2 and part.spent_s == 30
    shares, _ = drive(time, part, lambda n: 1.0, lambda n: 5.0)
    assert 30 + len(shares) == pytest.approx(90, abs=2) and part.spent_s == pytest.approx(100, abs=2)


DATA = DataConfig(crop=(32, 64), image_size=(48, 64), train_images=8, val_images=2, batch_size=2, workers=0)
RECIPE = Recipe(lr=0.02, precise_bn_batches=1, save_every=2, log_every=1, precision="32-true", seed=3)


def model():
    torch.manual_seed(1)
    return routeseg.DynamicRoutingNetwork(num_classes=10, depth=2, num_scales=3, base_channels=4, stem_channels=4)


@pytest.fixture
def slow(monkeypatch, time):
    """slow[0] seconds for a step, slow[1] for a validation; told are the learning rates, and steps of validations."""
    seconds, rates, validated = [1.0, 2.0], [], []
    finish = RecipeTask._finish

    def step(task, *args):
        rates.append(task._lr)
        time[0] += seconds[0]
        finish(task, *args)

    def look(network, *args, **how):
        time[0] += seconds[1]
        validated.append(len(rates))
        return evaluate(network, *args, **how)

    monkeypatch.setattr(RecipeTask, "_finish", step)
    monkeypatch.setattr(segmentation, "evaluate", look)
    return seconds, rates, validated


def fit(output, clock=None, recipe=RECIPE, resume=False):
    return train(
        model(), DATA, recipe, Budget(), RunOptions(output, resume, accelerator="cpu", progress=False, clock=clock)
    )


def planned(total_s):
    clock = Clock(total_s)
    return clock, fitted(RECIPE, Pace(CHOICE, 1.0, 0.0, 0.0, 4, 2.0), clock, 2)


def test_a_training_follows_the_clock(tmp_path, time, slow):
    """Twice as slow as it was measured: it ends in time, after half of the steps, with a learning rate near 0."""
    seconds, rates, validated = slow
    seconds[:] = [2.0, 4.0]
    start = time[0]
    clock, recipe = planned(60.0)
    found = fit(tmp_path / "run", clock, recipe)
    assert recipe.iterations == 56 and found.steps == len(rates) == pytest.approx(26, abs=2)
    assert time[0] - start <= 60 and rates[-1] < 0.1 * max(rates) and max(rates) > 0.018
    assert len(validated) == 2 and validated[-1] == found.steps and found.found is not None
    assert (tmp_path / "run" / "best").is_dir() and found.ranking is not None
    again = fit(tmp_path / "run", recipe=recipe.__class__(**vars(recipe) | {"iterations": found.steps}), resume=True)
    assert again.steps == found.steps == len(rates), "nothing is left to do"


def test_killed_and_resumed_within_the_minutes(tmp_path, time, slow, monkeypatch):
    """The rest of the time, not all of it again; the learning rate goes on where it was."""
    seconds, rates, validated = slow
    clock, recipe = planned(40.0)
    with monkeypatch.context() as patch:

        def cut(task):
            if task.global_step == 15:
                raise KeyError("cut")

        start = RecipeTask.on_train_batch_start
        patch.setattr(RecipeTask, "on_train_batch_start", lambda task, *args: (cut(task), start(task, *args)))
        patch.setattr(segmentation.SegmentationTask, "on_train_batch_start", RecipeTask.on_train_batch_start)
        with pytest.raises(KeyError, match="cut"):
            fit(tmp_path, clock, recipe)
    assert len(rates) == 15
    time[0] += 10_000
    start = time[0]
    found = fit(tmp_path, recipe=recipe, resume=True)
    assert found.steps == pytest.approx(36, abs=2) and time[0] - start == pytest.approx(26, abs=2)
    assert rates[15] == pytest.approx(rates[14], rel=0.1) and rates[-1] < 0.1 * max(rates)
    assert found.seconds == pytest.approx(40, abs=2)


def test_the_command(layouts, tmp_path, capsys, time, slow, monkeypatch):
    """Minutes count from the start of the command; config.yaml has the steps that there were."""
    seconds, rates, _ = slow
    tiny = ["--model.depth=3", "--model.base_channels=4", "--model.stem_channels=4", "--model.backbone=null"]
    tiny += [
        "--model.exits=null",
        "--model.place=null",
        "--model.sizes=null",
        "--data.crop=[32,64]",
        "--data.batch_size=2",
        "--recipe.precise_bn_batches=1",
    ]

    def measure(*_):
        time[0] += 10.0
        return Pace(CHOICE, 2.0, 0.0, 0.0, 2, 2.0)

    monkeypatch.setattr("routeseg.training.pace.measure_pace", measure)
    words = ["train", layouts("folder"), "--config=small", *tiny, "--minutes=1", f"--output={tmp_path}/run"]
    start = time[0]
    code, out, err = run(words, capsys)
    assert code == 0, err
    assert "iterations fit into 1 minutes here" in out and 40 < time[0] - start <= 60
    recipe = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["recipe"]
    assert recipe["iterations"] == len(rates) > 25 and f"step {len(rates)}: mIoU" in out
    assert f"{len(rates)} iterations of 2 images" in (tmp_path / "run" / "report.html").read_text()
    code, out, err = run(["train", "--resume", f"--output={tmp_path}/run"], capsys)
    assert code == 0 and len(rates) == recipe["iterations"], err
    more = len(rates) + 3
    code, out, err = run(["train", "--resume", f"--output={tmp_path}/run", f"--recipe.iterations={more}"], capsys)
    assert code == 0 and len(rates) == more, err
    assert math.isclose(rates[-1], 0.001 * lr_factor(more - 1, Recipe(**recipe | {"iterations": more})))
