"""The precision of a training is the machine's choice. No test measures: the clock and the machine are made up."""

import itertools
import logging
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from routeseg import bfloat16, stopwatch
from routeseg.bfloat16 import product_ratio as measured_ratio  # conftest.py puts another in its place
from routeseg.data.config import DataConfig
from routeseg.data.datamodule import SegmentationDataModule
from routeseg.training import trial
from routeseg.training.gate_budget import Budget
from routeseg.training.segmentation import SegmentationTask
from routeseg.training.trial import PrecisionChoice, choose_precision, step_seconds
from test_training import DATA, fit, logged, recipe, same_networks, steps_of, tiny_model

FLOAT32, BFLOAT16 = "32-true", "bf16-mixed"
FASTER = PrecisionChoice(BFLOAT16, "it is faster")
AUTO = dict(precision="auto", iterations=6, precise_bn_batches=1, validate_every=6)


class Machine:
    """A clock that only goes on while something is computed."""

    def __init__(self, monkeypatch):
        self.now, self.patch = 0.0, monkeypatch
        monkeypatch.setattr(stopwatch, "clock", lambda: self.now)

    def products(self, seconds):
        """seconds(size, dtype) of a product; returns the (size, dtype) of those that ran."""
        ran = []

        def mm(a, b):
            ran.append((len(a), a.dtype))
            self.now += seconds(*ran[-1])

        self.patch.setattr(torch, "mm", mm)
        return ran

    def steps(self, ratio, float32_s, bfloat16_s):
        """Products take `ratio` times as long in bfloat16, and steps so many seconds; returns the steps that ran."""
        ran = []

        def step(task, batch, optimizer, precision):
            ran.append(precision)
            self.now += float32_s if precision == FLOAT32 else bfloat16_s

        self.patch.setattr(bfloat16, "product_ratio", lambda: ratio)
        self.patch.setattr(trial, "_step", step)
        return ran


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def task_and_batch(**changes):
    plan = recipe(**changes)
    task = SegmentationTask(tiny_model(), plan, Budget(0.5, 0.2, start=0.0, ramp=0.0), DATA["crop"])
    module = SegmentationDataModule(DataConfig(**DATA), 1, plan.seed, 0, plan.accumulate)
    return task, next(iter(module.train_dataloader()))


class TestProducts:
    def test_a_machine_that_emulates_is_known_by_a_small_product(self, machine):
        ran = machine.products(lambda size, dtype: 1e-3 if dtype == torch.float32 else 0.45)
        assert measured_ratio.__wrapped__() == pytest.approx(450)
        assert {size for size, _ in ran} == {bfloat16.SMALL}

    def test_any_other_is_measured_with_a_large_one(self, machine):
        machine.products(lambda size, dtype: size**3 * (2e-11 if dtype == torch.float32 else 1e-11) + 1e-3)
        assert measured_ratio.__wrapped__() == pytest.approx(0.5, abs=0.05)

    def test_turns(self, machine):
        """The first round, in which libraries warm up, does not count."""
        ran = []

        def work(name):
            ran.append(name)
            machine.now += 10.0 if len(ran) <= 2 else {"a": 1.0, "b": 2.0}[name]

        assert stopwatch.take_turns([lambda: work("a"), lambda: work("b")], 2) == [[1.0, 1.0], [2.0, 2.0]]
        assert ran == ["a", "b"] * 3


class TestChoice:
    def test_slow_products_decide_without_a_step(self, machine):
        ran = machine.steps(430.4, 1.0, 0.1)
        choice = choose_precision(*task_and_batch())
        assert choice.precision == FLOAT32 and not choice.step_s and not ran
        assert re.fullmatch(r"precision: 32-true \(on this CPU a product .* 430 times as long .*\)", str(choice))

    @pytest.mark.parametrize(
        ("float32_s", "bfloat16_s", "said"),
        [
            (0.52, 0.31, "precision: bf16-mixed (a step takes 0.31 s, in float32 0.52 s)"),
            (0.31, 0.52, "precision: 32-true (a step takes 0.31 s, in bfloat16 0.52 s)"),
            (0.52, 0.51, "precision: 32-true (a step takes 0.52 s, in bfloat16 0.51 s)"),
        ],
    )
    def test_else_steps_decide(self, machine, float32_s, bfloat16_s, said):
        ran = machine.steps(0.3, float32_s, bfloat16_s)
        choice = choose_precision(*task_and_batch())
        assert str(choice) == said and ran == [FLOAT32, BFLOAT16] * (1 + stopwatch.ROUNDS)
        assert choice.step_s == pytest.approx([bfloat16_s if choice.precision == BFLOAT16 else float32_s] * 3)

    @pytest.mark.parametrize(
        ("float32_s", "bfloat16_s", "tried"),
        [
            (10.0, 90.0, [FLOAT32, BFLOAT16]),  # as long as the patience: one step each
            (1.0, 3.5, [FLOAT32, BFLOAT16, FLOAT32, FLOAT32]),  # slower beyond what warming up may take
            (0.1, 0.5, [FLOAT32, BFLOAT16] * 2 + [FLOAT32] * 2),  # slower once both are warm
            (0.5, 0.1, [FLOAT32, BFLOAT16] * 2 + [BFLOAT16] * 2),
            (3.0, 2.0, [FLOAT32, BFLOAT16] * 2),  # nobody is clearly slower, but they take long
        ],
    )
    def test_a_trial_ends_once_it_is_clear_or_long(self, machine, float32_s, bfloat16_s, tried):
        ran = machine.steps(0.3, float32_s, bfloat16_s)
        choice = choose_precision(*task_and_batch())
        faster = FLOAT32 if float32_s < bfloat16_s else BFLOAT16
        assert choice.precision == faster and ran == tried
        assert choice.step_s and np.allclose(choice.step_s, min(float32_s, bfloat16_s))

    def test_processes_of_a_job_make_the_same_steps(self, machine, monkeypatch):
        """The clock of the first one says when it is enough, also if their own tell something else."""
        first = iter([[1.0, 9.0], [1.0]])
        monkeypatch.setattr(trial, "gather", lambda own: [next(first), own])
        ran = machine.steps(0.3, 0.5, 0.5)
        step_seconds(*task_and_batch(), (FLOAT32, BFLOAT16))
        assert ran == [FLOAT32, BFLOAT16]

    @pytest.mark.parametrize(("supported", "expected"), [(True, BFLOAT16), (False, FLOAT32)])
    def test_a_gpu_is_not_measured(self, monkeypatch, supported, expected):
        monkeypatch.setattr(bfloat16, "on_gpu", lambda device: supported)
        assert choose_precision(SimpleNamespace(device=torch.device("cuda")), {}).precision == expected

    def test_a_gpu_that_emulates_does_not_compute_in_it(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        for computes in (True, False):
            monkeypatch.setattr(
                torch.cuda, "is_bf16_supported", lambda including_emulation, it=computes: it or including_emulation
            )
            assert bfloat16.on_gpu(torch.device("cuda")) == computes
        assert not bfloat16.on_gpu(torch.device("mps"))


def test_tried_steps_are_those_of_the_training_and_leave_nothing_behind(monkeypatch):
    """Autocast as the training has it, the gradients of all batches of a step, on a copy of the network."""
    ticks = itertools.count()
    monkeypatch.setattr(stopwatch, "clock", lambda: 0.001 * next(ticks))  # all steps take equally long
    task, batch = task_and_batch(accumulate=2, drop_path=0.3)
    seen = []
    task.model.stem.register_forward_pre_hook(
        lambda stem, inputs: seen.append((torch.is_autocast_enabled("cpu"), len(inputs[0]), stem is task.model.stem))
    )
    network, before = task.model, {key: value.clone() for key, value in task.model.state_dict().items()}
    state = torch.get_rng_state()
    seconds = step_seconds(task, batch, (FLOAT32, BFLOAT16))
    assert [len(some) for some in seconds] == [stopwatch.ROUNDS] * 2 and min(map(min, seconds)) > 0
    once = [(False, 2, True)] * 2 + [(True, 2, True)] * 2
    assert seen == once * (1 + stopwatch.ROUNDS)
    assert task.model is network and task.precision == FLOAT32 and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_frozen_norms_are_frozen_in_tried_steps():
    task, batch = task_and_batch()
    task.batch_norm = "frozen"
    modes = []
    task.model.stem[0][1].register_forward_hook(lambda norm, *_: modes.append(norm.training))
    step_seconds(task, batch, [FLOAT32])
    assert set(modes) == {False} and task.model.stem[0][1].training


class TestRuns:
    def test_the_choice_is_said_once_and_the_run_goes_on_in_it(self, tmp_path, monkeypatch, capsys):
        """Cut and resumed where another precision is the faster one, it ends bit for bit like a run that was not."""
        chosen = [
            PrecisionChoice(BFLOAT16, "it is faster"),
            PrecisionChoice(BFLOAT16, "it is faster"),
            PrecisionChoice(FLOAT32, "by now"),
        ]
        monkeypatch.setattr(trial, "choose_precision", lambda task, batch: chosen.pop(0))
        assert fit(tmp_path / "whole", recipe(**AUTO)).precision == BFLOAT16
        assert capsys.readouterr().out.count("precision: bf16-mixed (it is faster)\n") == 1

        def cut(task):
            if task.global_step == 5:
                raise KeyError("cut")

        with monkeypatch.context() as patch:
            steps_of(patch, cut)
            with pytest.raises(KeyError, match="cut"):
                fit(tmp_path / "cut", recipe(**AUTO))
        capsys.readouterr()
        result = fit(tmp_path / "cut", recipe(**AUTO), resume=True)
        assert result.precision == BFLOAT16 and result.steps == 6 and len(chosen) == 1
        assert capsys.readouterr().out.count("precision: bf16-mixed (as the run began)\n") == 1
        assert same_networks(tmp_path / "whole", tmp_path / "cut")
        finished = fit(tmp_path / "cut", recipe(**AUTO), resume=True)
        assert finished.found is None and finished.precision == BFLOAT16, "that of the steps, also if none is left"

    def test_the_steps_run_in_it(self, tmp_path, monkeypatch):
        seen = []
        for name, precision in (("a", FLOAT32), ("b", BFLOAT16)):
            model = tiny_model()
            model.stem.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
            monkeypatch.setattr(
                trial, "choose_precision", lambda *_, precision=precision: PrecisionChoice(precision, "")
            )
            fit(tmp_path / name, recipe(**AUTO), model)
        # Six steps, and one batch for the statistics of BatchNorm.
        assert seen == [False] * 7 + [True] * 7

    def test_a_checkpoint_without_a_precision_decides_anew(self, tmp_path, monkeypatch):
        monkeypatch.setattr(trial, "choose_precision", lambda *_: PrecisionChoice(BFLOAT16, ""))
        fit(tmp_path, recipe(**AUTO | {"iterations": 4}))
        path = tmp_path / "last.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["callbacks"]["precision"]
        torch.save(checkpoint, path)
        monkeypatch.setattr(trial, "choose_precision", lambda *_: PrecisionChoice(FLOAT32, ""))
        assert fit(tmp_path, recipe(**AUTO), resume=True).precision == FLOAT32

    def test_a_given_precision_is_taken_also_where_a_run_goes_on(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(trial, "choose_precision", lambda *_: pytest.fail("nothing is to be tried"))
        for iterations, precision in ((2, BFLOAT16), (4, FLOAT32)):
            plan = recipe(**AUTO | {"iterations": iterations, "precision": precision})
            assert fit(tmp_path, plan, resume=iterations > 2).precision == precision
        assert "precision:" not in capsys.readouterr().out

    @pytest.mark.parametrize("ratio", [0.5, 430.4])
    def test_a_given_bfloat16_that_is_emulated_is_warned_of(self, tmp_path, monkeypatch, caplog, ratio):
        monkeypatch.setattr(bfloat16, "product_ratio", lambda: ratio)
        with caplog.at_level(logging.WARNING, "routeseg"):
            fit(tmp_path, recipe(**AUTO | {"precision": BFLOAT16}))
        found = [record.message for record in caplog.records]
        assert len(found) == (ratio > 1)
        assert all(re.search(r"bf16-mixed is slow here: .* 430 times .*--recipe.precision 32-true", m) for m in found)

    def test_losses_are_near_in_both(self, tmp_path):
        losses = {}
        for precision in (FLOAT32, BFLOAT16):
            fit(tmp_path / precision, recipe(precision=precision))
            losses[precision] = [float(row["loss"]) for row in logged(tmp_path / precision)]
        assert losses[BFLOAT16] == pytest.approx(losses[FLOAT32], rel=5e-2) and losses[BFLOAT16] != losses[FLOAT32]
