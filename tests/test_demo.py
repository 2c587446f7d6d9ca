"""How the demo fits a training into the time that it is given. No test measures: the pace is made up."""

import re
from dataclasses import replace

import pytest

from routeseg import DynamicRoutingNetwork, bfloat16, demo, stopwatch
from routeseg.data.config import DataConfig
from routeseg.data.scenes import PRESETS
from routeseg.demo import FEWEST_ITERATIONS, Plan, fit_to_time
from routeseg.training import clock as clocks
from routeseg.training import pace as pacing
from routeseg.training import trial
from routeseg.training.clock import Clock
from routeseg.training.gate_budget import Budget
from routeseg.training.pace import Pace
from routeseg.training.recipe import Recipe
from routeseg.training.trial import PrecisionChoice

CHOICE = PrecisionChoice("bf16-mixed", "it is faster")
DATA = DataConfig(image_size=(64, 128), crop=(64, 96), train_images=8, batch_size=2, workers=0)
MINUTES = 10.0
SECONDS = 60 * MINUTES - demo.FIGURES_S


def network(**changes) -> DynamicRoutingNetwork:
    return DynamicRoutingNetwork(**{"num_classes": 10, "depth": 6, "base_channels": 24, "stem_channels": 24} | changes)


@pytest.fixture(autouse=True)
def _no_time_goes_by(monkeypatch):
    monkeypatch.setattr(stopwatch, "clock", lambda: 0.0)
    monkeypatch.setattr(clocks, "now", lambda: 0.0)


def fit(model, seconds_of, capsys, **changes) -> tuple[Plan, str]:
    """The plan and what was said, if a step takes seconds_of(channels, depth, height of a crop)."""

    def measure(model, data, recipe, budget):
        step_s = seconds_of(model.config.base_channels, model.config.depth, data.crop[0])
        return Pace(CHOICE, step_s * 0.9999, 0.0, 0.0, 4)

    plan = fit_to_time(model, DATA, Recipe(warmup_steps=50, **changes), Budget(), Clock(60 * MINUTES), measure)
    return plan, capsys.readouterr().out


def test_as_many_iterations_as_fit(capsys):
    model = network()
    plan, said = fit(model, lambda *_: SECONDS / 400, capsys)
    assert plan.model is model and plan.data == DATA and not said
    assert plan.recipe == Recipe(iterations=400, validate_every=100, warmup_steps=40, precision="bf16-mixed"), (
        "the precision that was measured, and nothing else is changed"
    )
    lines = str(plan).splitlines()
    assert re.fullmatch(r"network: depth 6, 24 channels, [\d.]+ GMACs for 64x96 pixels", lines[0])
    assert lines[1:] == [
        "training: about 400 iterations of 2 images, 800 in all, as fast as it is now: "
        f"{SECONDS / 60:.1f} of 10 minutes",
        "precision: bf16-mixed (it is faster)",
    ]


@pytest.mark.parametrize(
    ("slow", "expected"),  # where a step takes too long; channels, depth and height of what is taken
    [
        (lambda channels, depth, height: channels > 16, (16, 6, 64)),
        (lambda channels, depth, height: depth > 5, (16, 5, 64)),
        (lambda channels, depth, height: channels > 8, (8, 5, 64)),
        (lambda channels, depth, height: height > 32, (8, 5, 32)),
        (lambda channels, depth, height: True, (8, 5, 32)),
    ],
)
def test_a_smaller_network_if_these_are_too_few(capsys, slow, expected):
    plan, said = fit(network(), lambda *size: SECONDS / (100 if slow(*size) else FEWEST_ITERATIONS), capsys)
    config = plan.model.config
    assert (config.base_channels, config.depth, plan.data.crop[0]) == expected
    assert config == replace(network().config, base_channels=expected[0], stem_channels=expected[0], depth=expected[1])
    rungs = [(24, 6, 64), (16, 6, 64), (16, 5, 64), (8, 5, 64), (8, 5, 32)]
    enough = plan.recipe.iterations >= FEWEST_ITERATIONS
    reasons = said.splitlines()
    assert len(reasons) == rungs.index(expected) + (not enough)
    assert all(line.startswith("only 100 iterations fit into 10 minutes here") for line in reasons)
    assert ("give more --minutes" in reasons[-1]) == (not enough)
    assert plan.data.image_size == ((32, 64) if expected[2] == 32 else (64, 128))


def test_the_time_of_measuring_is_no_time_of_training(monkeypatch, capsys):
    times = iter((0.0,))
    monkeypatch.setattr(clocks, "now", lambda: next(times, SECONDS / 4))
    plan, _ = fit(network(), lambda *_: SECONDS / 800, capsys)
    assert plan.recipe.iterations == 600


def test_the_report_looks_at_fewer_pictures_if_they_take_long():
    """At most a fifth of the time goes to them, as far as they were measured."""
    pace = Pace(CHOICE, 1.0, 0.0, 0.0, 4, image_s=0.01)
    assert Plan(network(), DATA, Recipe(), 10.0, pace).looks(100) == (demo.IMAGES_PER_PRESET, 100)
    slow = replace(pace, image_s=1.0)
    plan = Plan(network(), DATA, Recipe(), 1.0, slow)
    of_preset, of_val = plan.looks(100)
    assert of_preset * len(PRESETS) + of_val * len(demo.BUDGETS) <= 0.2 * 60 and of_preset > 0 and of_val > 0
    assert plan.report_s(100) <= 0.2 * 60 + demo.SHOWN + demo.FIGURES_S
    assert Plan(network(), DATA, Recipe()).looks(100) == (demo.IMAGES_PER_PRESET, 100)


def test_what_is_small_already_is_left_as_it_is(capsys):
    """A static network keeps its depth, which its route goes through."""
    model = network(depth=8, base_channels=8, stem_channels=8, gate="fixed", route="u-net")
    plan, said = fit(model, lambda *_: SECONDS / 100, capsys)
    assert plan.model is model and plan.data.crop == (32, 48) and plan.recipe.iterations == 100
    assert len(said.splitlines()) == 2


def test_a_pace():
    """Images that are new take longer to load; the epoch ends within a step."""
    pace = Pace(CHOICE, step_s=2.0, first_load_s=1.0, load_s=0.5, epoch=10.5)
    assert pace.iterations(15.0) == 5 and pace.seconds(5) == 15.0
    assert pace.seconds(20) == pytest.approx(10.5 * 3.0 + 9.5 * 2.5)
    assert all(pace.iterations(pace.seconds(n) + 1e-6) == n for n in (1, 10, 11, 100))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_measured(monkeypatch, workers):
    """Images are loaded twice, for they may be drawn the first time; processes that load cost the steps nothing."""
    loaded = []

    def turns(works, rounds):
        for _ in range(1 + rounds):
            loaded.append(works[0]()["image"].shape)
        return [[float(len(loaded))] * rounds]

    monkeypatch.setattr(stopwatch, "take_turns", turns)
    monkeypatch.setattr(pacing, "choose_precision", lambda task, batch: replace(CHOICE, step_s=[7.0, 8.0, 70.0]))
    monkeypatch.setattr(pacing, "step_seconds", lambda task, batch, precisions: [[5.0]])
    data, calls = replace(DATA, workers=workers), 1 + pacing.LOADS
    pace = pacing.measure_pace(network(), data, Recipe(accumulate=2), Budget())
    assert (pace.first_load_s, pace.load_s) == ((0.0, 0.0) if workers else (calls, 2 * calls))
    assert set(loaded) == {(4, 3, 64, 96)} and (pace.step_s, pace.epoch) == (8.0, 2)
    pace = pacing.measure_pace(network(), data, Recipe(precision="32-true"), Budget())
    assert (pace.choice, pace.step_s) == (PrecisionChoice("32-true", "as the recipe says"), 5.0)


def test_one_measurement_gives_the_precision_and_the_time(monkeypatch):
    steps = []
    monkeypatch.setattr(bfloat16, "product_ratio", lambda: 0.5)
    monkeypatch.setattr(trial, "_step", lambda task, batch, optimizer, precision: steps.append(precision))
    monkeypatch.setattr(stopwatch, "clock", lambda: sum(0.25 if p == "bf16-mixed" else 0.375 for p in steps))
    pace = pacing.measure_pace(network(), DATA, Recipe(), Budget())
    assert (pace.choice.precision, pace.step_s) == ("bf16-mixed", 0.25)
    assert len(steps) == 2 * (1 + stopwatch.ROUNDS)
