"""The trainer as a user meets it: learns, resumes exactly, stops on a bad loss, refuses bad keys."""

import copy
import csv
import math
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import routeseg
from conftest import spread_gates
from routeseg.cli import main
from routeseg.data.config import DataConfig, open_data
from routeseg.data.datamodule import SegmentationDataModule
from routeseg.data.subset import class_weights
from routeseg.evaluation import evaluate
from routeseg.labels import IGNORE
from routeseg.model import DynamicRoutingNetwork, Segmentation
from routeseg.model.compute import Compute
from routeseg.training import callbacks, segmentation
from routeseg.training.batch_norm import precise_batch_norm
from routeseg.training.fused import Fused
from routeseg.training.gate_budget import Budget
from routeseg.training.recipe import Recipe, lr_factor
from routeseg.training.run import RunOptions
from routeseg.training.segmentation import SegmentationTask, train
from routeseg.training.task import NonFiniteLoss, parameter_groups

DATA = dict(crop=(32, 64), image_size=(48, 64), train_images=8, val_images=2, batch_size=2, workers=0)
NETWORK = dict(depth=2, num_scales=3, base_channels=4, stem_channels=4)

pytestmark = pytest.mark.usefixtures("no_report")


def tiny_model(**changes):
    torch.manual_seed(1)
    return routeseg.DynamicRoutingNetwork(num_classes=10, **{**NETWORK, **changes})


def recipe(**changes):
    values = dict(
        iterations=6, lr=0.02, warmup_steps=2, precise_bn_batches=2, validate_every=3, save_every=2, log_every=1,
        precision="32-true", seed=3,
    )  # fmt: skip
    return Recipe(**{**values, **changes})


QUICK = dict(validate_every=1000, save_every=1000, precise_bn_batches=0)  # validates and saves at the end alone


def words(output, iterations, *extra):
    return [
        "train", "--output", str(output), "--accelerator", "cpu",
        *(f"--model.{k}={v}" for k, v in NETWORK.items()),
        *(f"--data.{k}={list(v) if isinstance(v, tuple) else v}" for k, v in DATA.items()),
        f"--recipe.iterations={iterations}", "--recipe.lr=0.02", "--recipe.warmup_steps=2", "--recipe.drop_path=0.3",
        "--recipe.precise_bn_batches=2", "--recipe.validate_every=7", "--recipe.save_every=2", "--recipe.seed=3",
        "--recipe.precision=32-true", "--gate_budget.weight=0.5", "--gate_budget.start=0.2", *extra,
    ]  # fmt: skip


def fit(output, plan, model=None, budget=None, resume=False, **data):
    """Trains a tiny network, and returns the result; `data` are changes of DATA."""
    options = RunOptions(output, resume, accelerator="cpu", progress=False)
    return train(model or tiny_model(), DataConfig(**DATA | data), plan, budget or Budget(), options)


def logged(output):
    """The rows of a run's log that a step wrote, run by run."""
    rows = []
    for path in sorted((output / "logs").glob("*/metrics.csv")):
        with open(path) as file:
            rows += [row for row in csv.DictReader(file) if row["loss"]]
    return rows


def same_networks(one, other):
    """Whether two runs ended with the same networks, bit for bit."""
    pairs = [[load_file(run / name / "model.safetensors") for run in (one, other)] for name in ("last", "best")]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


ITERATIONS, SAVED, CUT = 10, 4, 6  # steps of the whole run, and of the last checkpoint before it is cut

KILLED_WHILE_IT_SAVES = f"""
import os, signal, sys
from lightning import Trainer
from routeseg.cli import main

save = Trainer.save_checkpoint

def save_and_die(trainer, path):
    save(trainer, path)
    if trainer.global_step == {CUT}:
        os.kill(os.getpid(), signal.SIGKILL)

Trainer.save_checkpoint = save_and_die
main(sys.argv[1:])
"""


def test_killed_and_resumed_ends_with_the_same_weights(tmp_path):
    """SIGKILL when the third checkpoint is written but not yet in its place; the resumed run ends bit for bit like one
    that was never interrupted."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(words(whole, ITERATIONS)) == 0
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_IT_SAVES, *words(cut, ITERATIONS)],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # other numbers of threads add up in another order
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL
    assert torch.load(cut / "last.ckpt", weights_only=True)["global_step"] == SAVED
    assert main(words(cut, ITERATIONS, "--resume")) == 0
    assert same_networks(whole, cut) and not list(cut.glob(".last*"))


def test_a_network_in_evaluation_mode_learns_in_training_mode(tmp_path):
    """Such as `routeseg.load` gives it."""
    fit(tmp_path / "one", recipe())
    fit(tmp_path / "other", recipe(), tiny_model().eval())
    assert same_networks(tmp_path / "one", tmp_path / "other")


def test_cut_and_resumed_ends_with_the_same_weights(tmp_path, monkeypatch):
    """The same in one process, where the run ends by an exception in the middle of a step; with steps of two batches,
    averaged weights, and only every third step logged."""
    plan = recipe(iterations=ITERATIONS, accumulate=2, ema_decay=0.9, drop_path=0.3, log_every=3, validate_every=5)
    options = dict(budget=Budget(0.5, 0.2, start=0.2), batch_size=1)
    fit(tmp_path / "whole", plan, **options)

    def cut(task):
        if task.global_step == SAVED + 1:
            raise KeyError("cut")

    with monkeypatch.context() as patch:
        steps_of(patch, cut)
        with pytest.raises(KeyError, match="cut"):
            fit(tmp_path / "cut", plan, **options)
    assert torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["global_step"] == SAVED
    fit(tmp_path / "cut", plan, resume=True, **options)
    assert same_networks(tmp_path / "whole", tmp_path / "cut")
    whole, resumed = ({row["step"]: row for row in logged(tmp_path / name)} for name in ("whole", "cut"))
    steps = range(plan.log_every - 1, ITERATIONS, plan.log_every)
    assert list(whole) == [str(step) for step in steps]
    assert all(row["real_cost"] and row["skipped_images"] for row in whole.values())
    kept = {step: row for step, row in whole.items() if int(step) >= SAVED}
    assert {step: row for step, row in resumed.items() if int(step) >= SAVED} == kept


def test_a_resumed_run_follows_the_recipe_that_it_is_given(tmp_path, monkeypatch):
    """Learning rates, decay and momentum are those of the changed recipe, also where a finished run gets longer."""
    fit(tmp_path, recipe(iterations=4, **QUICK))
    changed = dict(lr=0.005, momentum=0.5, weight_decay=1e-3, gate_lr_factor=2.0)
    plan, tasks = recipe(iterations=8, **changed, **QUICK), []
    steps_of(monkeypatch, tasks.append)
    fit(tmp_path, plan, resume=True)
    rates = {int(row["step"]): float(row["lr"]) for row in logged(tmp_path)}
    before = recipe(iterations=4)
    assert rates == pytest.approx(
        {step: 0.02 * lr_factor(step, before) for step in range(4)}
        | {step: 0.005 * lr_factor(step, plan) for step in range(4, 8)}
    )
    groups = tasks[-1].optimizers().param_groups
    expected = parameter_groups(tiny_model(), plan)
    assert {group["momentum"] for group in groups} == {0.5}
    assert [group["weight_decay"] for group in groups] == [group["weight_decay"] for group in expected]
    assert [group["initial_lr"] for group in groups] == [group["lr"] for group in expected]
    assert {group["lr"] for group in expected} == {0.005, 0.01}


def test_resumed_with_another_network(tmp_path, capsys):
    assert main(words(tmp_path / "run", 2)) == 0
    assert "2 images a step (2 x 1 processes x 1 accumulated), learning rate 0.02" in capsys.readouterr().out
    for change, name in (("base_channels=8", "base_channels is 4 there and 8"), ("depth=3", "depth is 2 there and 3")):
        assert main(words(tmp_path / "run", 4, "--resume", f"--model.{change}")) == 2
        err = capsys.readouterr().err
        assert re.search(f"has another network: .*{name}.* here.*configuration", err) and "Traceback" not in err, err


def test_a_single_class_is_refused(tmp_path):
    model = routeseg.DynamicRoutingNetwork(num_classes=1, **NETWORK)
    with pytest.raises(ValueError, match="one class only"):
        fit(tmp_path / "run", recipe(), model)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="one class only"):
        evaluate(model, [])


def test_too_little_memory(tmp_path, capsys, monkeypatch):
    def too_much(self, *args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(routeseg.DynamicRoutingNetwork, "forward", too_much)
    assert main(words(tmp_path / "run", 2)) == 2
    err = capsys.readouterr().err
    assert "--data.batch_size" in err and "--recipe.accumulate" in err and "Traceback" not in err


@pytest.fixture
def default_signals():
    """The handlers of a program that a user starts; a shell's background jobs ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path, capsys, monkeypatch, default_signals, number):
    """A signal in the third step: this step is saved, one line says how to go on, and the run ends as if nothing had
    been."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(words(whole, ITERATIONS)) == 0
    with monkeypatch.context() as patch:
        steps_of(patch, lambda task: signal.raise_signal(number) if task.global_step == 3 else None)
        assert main(words(cut, ITERATIONS)) == 128 + number
    said = f"saved at step 3 of {ITERATIONS} in {cut}: `routeseg train --output {cut} --resume` goes on\n"
    assert capsys.readouterr().err.endswith(f"routeseg: interrupted: {said}")
    assert torch.load(cut / "last.ckpt", weights_only=True)["global_step"] == 3
    assert main(["train", "--output", str(cut), "--accelerator", "cpu", "--resume"]) == 0
    assert same_networks(whole, cut)


def test_a_second_signal_ends_at_once(tmp_path, capsys, monkeypatch, default_signals):
    def twice(task):
        if task.global_step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    steps_of(monkeypatch, twice)
    assert main(words(tmp_path, ITERATIONS)) == 130
    assert capsys.readouterr().err.endswith("routeseg: interrupted\n")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


TOLD_ALL_OF_THE_GROUP = """
import os, subprocess, sys
from routeseg.cli import main
from routeseg.training.task import RecipeTask

finish = RecipeTask._finish

def tell_all(task, *args):
    finish(task, *args)
    if task.global_step == 3:
        subprocess.run(["kill", "-s", sys.argv[1], "--", f"-{os.getpgid(0)}"])

RecipeTask._finish = tell_all
sys.exit(main(sys.argv[2:]))
"""


def test_a_signal_to_the_loaders_too(tmp_path):
    """As a batch system sends it: loader processes leave it to the one that trains."""
    command = [sys.executable, "-c", TOLD_ALL_OF_THE_GROUP, str(int(signal.SIGTERM))]
    done = subprocess.run(
        [*command, *words(tmp_path, ITERATIONS, "--data.workers=2")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        timeout=300,
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert "saved at step 3" in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr


def test_a_leftover_loader_does_not_hold_up_the_end():
    """As after an error whose traceback is kept: Python ends the loader process, and waits for it."""
    script = """
import sys
from torch.utils.data import DataLoader
from routeseg.data.loaders import loader_process
sys.kept = iter(DataLoader(range(100), num_workers=1, worker_init_fn=loader_process))
next(sys.kept)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=300).returncode == 0


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_two_trainings_of_one_folder(tmp_path, capsys, monkeypatch, resume):
    """The second is refused, and the first goes on."""
    if resume:
        assert main(words(tmp_path, 2)) == 0
    second = []
    steps_of(monkeypatch, lambda task: second or second.append(main(words(tmp_path, ITERATIONS, *resume))))
    assert main(words(tmp_path, 4, *resume)) == 0
    assert second == [2] and f"another training writes into {tmp_path}" in capsys.readouterr().err
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_leftovers_of_a_kill_are_removed_at_the_next_start(tmp_path):
    mine = [tmp_path / ".mine.tmp", tmp_path / "best" / "notes.txt"]
    left = [tmp_path / "best" / ".saving-abc_12", tmp_path / ".123-0a1b2c3d.tmp", tmp_path / ".last.ckpt.tmp"]
    left[0].mkdir(parents=True)
    for path in [left[0] / "model.safetensors", *left[1:], *mine]:
        path.write_bytes(b"x")
    assert main(words(tmp_path, 2)) == 0
    assert all(path.exists() for path in mine) and not any(path.exists() for path in left)


def test_writes_logs_and_networks(tmp_path):
    model = tiny_model()
    result = fit(tmp_path, recipe(), model, Budget(0.5, 0.2, start=0.5))
    assert 0 <= result.found.miou <= 1 and result.steps == 6 and result.is_global_zero
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 1
    steps = logged(tmp_path)
    assert len(steps) == 6
    for row in steps:  # Eq. 10; the budget starts after half of the steps, and ramps up from 0
        weight = 0.5 * (int(row["step"]) > 3)
        assert float(row["loss"]) == pytest.approx(
            float(row["cross_entropy"]) + weight * float(row["budget_loss"]), rel=1e-5
        )
    with open(next((tmp_path / "logs").glob("*/metrics.csv"))) as file:
        assert sum(bool(row["val_miou"]) for row in csv.DictReader(file)) == 2
    loaded = routeseg.load(tmp_path / "last")
    assert torch.equal(loaded.decoder.predictor.weight, model.decoder.predictor.weight)


def test_learns(tmp_path):
    """A few steps on a few images bring the loss well below that of a uniform guess."""
    fit(tmp_path, recipe(iterations=40, lr=0.1, **QUICK), tiny_model(base_channels=8))
    losses = [float(row["loss"]) for row in logged(tmp_path)]
    assert losses[0] == pytest.approx(math.log(10), abs=0.3)
    assert sum(losses[-10:]) / 10 < 1.7


def test_budget_lowers_the_cost(tmp_path):
    costs = {}
    for weight in (0.0, 20.0):
        folder = tmp_path / str(weight)
        fit(folder, recipe(iterations=15, lr=0.1, **QUICK), budget=Budget(weight, 0.1, start=0.0, ramp=0.0))
        costs[weight] = float(logged(folder)[-1]["expected_cost"])
    assert costs[20.0] < 0.75 * costs[0.0]


@pytest.mark.parametrize(("weight", "best_step"), [(0.5, 6), (0.0, 4)])
def test_the_best_network_keeps_the_budget(tmp_path, monkeypatch, weight, best_step):
    """Scores before the budget is at full weight do not count once there are others; without a budget all count."""
    kept = {}
    scores = {2: 0.2, 4: 0.9, 6: 0.5}

    def scored(model, *args, **how):
        step = 2 * len(kept) + 2
        kept[step] = copy.deepcopy(model.state_dict())
        return SimpleNamespace(miou=scores[step], cost_macs=np.ones(1), full_macs=np.ones(1))

    monkeypatch.setattr(segmentation, "evaluate", scored)
    fit(tmp_path, recipe(**QUICK | {"validate_every": 2}), budget=Budget(weight, start=0.8))
    best = load_file(tmp_path / "best" / "model.safetensors")
    assert all(torch.equal(best[key], value) for key, value in kept[best_step].items())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    with pytest.raises(NonFiniteLoss, match=r"step \d+, learning rate .*--recipe\.lr"):
        fit(tmp_path / "run", recipe(iterations=50, lr=1e30, warmup_steps=0, save_every=1))
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert state["global_step"] >= 1
    code = main([*words(tmp_path / "cli", 50), "--recipe.lr=1e30", "--recipe.warmup_steps=0"])
    assert code == 1 and "learning rate" in capsys.readouterr().err


def test_a_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").write_bytes(b"something")
    assert main(words(tmp_path / "run", 5)) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(words(tmp_path / "run", 5, "--resume")) == 2
    assert "damaged" in capsys.readouterr().err
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == b"something"
    assert main(words(tmp_path / "new", 5, "--resume")) == 2
    assert "nothing to resume" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="needs a path below a file")
def test_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(words(tmp_path / "file" / "run", 5)) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (["--model.detph=4"], "model.depth"),
        (["--modle.depth=4"], "model.depth"),
        (["--recipe.learning_rate=1"], "recipe."),
        (["--model.depth=deep"], "model.depth"),
        (["--model.depth=1"], "depth 1 is too small"),
        (["--model.base_channels=7"], "even"),
        (["--model.cell_operations=[conv]"], "sep_conv_3x3"),
        (["--data.name=camvid"], "--data.root"),
        (["--data.crop=[16,16]"], "data.crop"),
        (["--gate_budget.target=3"], "target"),
        (["--recipe.iterations=0"], "recipe.iterations"),
        (["--recipe.momentum=1"], "recipe.momentum is 1"),
        (["--recipe.weight_decay=-1"], "recipe.weight_decay is -1"),
        (["--recipe.warmup_steps=-1"], "recipe.warmup_steps is -1"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_keys_and_values(tmp_path, capsys, wrong, expected):
    try:
        code = main([*words(tmp_path / "run", 5), *wrong])
    except SystemExit as stop:
        code = stop.code
    message = capsys.readouterr().err
    assert code == 2 and expected in message and "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_unknown_key_in_a_file(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("recipe: {itterations: 5}\n")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(config)])
    assert stop.value.code == 2 and "recipe.iterations" in capsys.readouterr().err


def test_parameter_groups():
    """Norm weights do not decay, gates have their own learning rate, every parameter is in one group."""
    model = tiny_model()
    groups = parameter_groups(model, recipe(gate_lr_factor=2.5, lr=0.02, weight_decay=1e-4))
    chosen = {id(p): group for group in groups for p in group["params"]}
    assert len(chosen) == len(list(model.parameters())) == sum(len(g["params"]) for g in groups)
    gates = {id(p) for p in model.gate_parameters()}
    for parameter in model.parameters():
        assert chosen[id(parameter)]["lr"] == pytest.approx(0.05 if id(parameter) in gates else 0.02)
    norm, conv = model.stem[0][1], model.stem[0][0]
    assert chosen[id(norm.weight)]["weight_decay"] == chosen[id(norm.bias)]["weight_decay"] == 0
    assert chosen[id(conv.weight)]["weight_decay"] == 1e-4


def test_schedule():
    plan = Recipe(iterations=1000, warmup_steps=100, warmup_factor=0.001, poly_power=0.9)
    assert lr_factor(0, plan) == pytest.approx(0.001)
    assert lr_factor(50, plan) == pytest.approx((0.001 * 0.5 + 0.5) * 0.95**0.9)
    assert lr_factor(500, plan) == pytest.approx(0.5**0.9)
    assert lr_factor(1000, plan) == 0


def test_precise_batch_norm_is_the_mean_over_the_batches():
    model = tiny_model()
    batches = [{"image": torch.rand(2, 3, 32, 64)} for _ in range(3)]
    precise_batch_norm(model, batches)
    conv, norm = model.stem[0][0], model.stem[0][1]
    with torch.no_grad():
        maps = [conv(model.normalize(batch["image"])) for batch in batches]
    assert torch.allclose(norm.running_mean, torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0), atol=1e-5)
    assert torch.allclose(norm.running_var, torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0), rtol=1e-4)
    assert norm.momentum == 0.1 and model.training


def test_precise_batch_norm_weighs_batches_by_the_images_that_run_a_node():
    model, seen = spread_gates(tiny_model()), {}
    grains = [torch.rand(images, 3, 64 // images, 128 // images) for images in (8, 2)]
    for name, norm in model.named_modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0]))
    precise_batch_norm(model, [{"image": torch.nn.functional.interpolate(grain, (64, 128))} for grain in grains])
    compared = 0
    for name, maps in seen.items():
        counts = torch.tensor([float(len(map)) for map in maps])
        means = torch.stack([map.mean((0, 2, 3)) for map in maps])
        expected = (means * counts[:, None]).sum(0) / counts.sum()
        torch.testing.assert_close(model.get_submodule(name).running_mean, expected, rtol=1e-4, atol=1e-5, msg=name)
        compared += len(set(counts.tolist())) > 1
    assert compared, "the batches should differ in how many images a norm sees"


def test_batches_of_precise_batch_norm_do_not_depend_on_the_workers():
    batches = [
        [batch["image"] for batch in SegmentationDataModule(data, 5, seed=3).norm_dataloader(5, 3)]
        for data in (DataConfig(**DATA), DataConfig(**{**DATA, "workers": 2}))
    ]
    assert len(batches[0]) == 3 and all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_scheduled_drop_path():
    """p * layer / depth * progress, per image, on the convolutions alone; the first layer is never dropped."""
    model = spread_gates(tiny_model(gate="fixed")).train()
    cell = model.node(2, 0).cell
    x = torch.randn(4000, 4, 1, 1)
    operation = model.node(2, 0).cell["sep_conv_3x3"].eval()
    kept = cell(x, drop_path=0.25) - x
    dropped = (kept == 0).flatten(1).all(1)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.allclose(kept[~dropped], (operation(x) / 0.75)[~dropped], atol=1e-5)


def steps_of(monkeypatch, note):
    """Calls note(task) after each step of the optimiser, before anything is validated."""
    after = callbacks.ValidateAndSave.on_train_batch_end

    def noted(self, trainer, task, *args):
        note(task)
        after(self, trainer, task, *args)

    monkeypatch.setattr(callbacks.ValidateAndSave, "on_train_batch_end", noted)


def test_average_of_the_weights(tmp_path, monkeypatch):
    """What is saved is w1 at first, then 0.75 of itself and 0.25 of the new weights, with its own BatchNorm."""
    seen = []
    steps_of(monkeypatch, lambda task: seen.append(copy.deepcopy(task.model.state_dict())))
    model, plan = tiny_model(), recipe(iterations=5, ema_decay=0.75, validate_every=5, save_every=5)
    fit(tmp_path, plan, model)
    average = seen[0]
    for state in seen[1:]:
        average = {key: 0.75 * average[key] + 0.25 * value for key, value in state.items()}
    saved = load_file(tmp_path / "last" / "model.safetensors")
    parameters = dict(model.named_parameters())
    for key in parameters:
        torch.testing.assert_close(saved[key], average[key], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(saved["decoder.predictor.weight"], seen[-1]["decoder.predictor.weight"], atol=1e-4)
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items()), "the network returned"
    data = SegmentationDataModule(DataConfig(**DATA), 5, plan.seed)
    precise_batch_norm(model, data.norm_dataloader(5, plan.precise_bn_batches))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(saved[key], value, rtol=1e-5, atol=1e-6)
    best = load_file(tmp_path / "best" / "model.safetensors")
    assert all(torch.equal(best[key], value) for key, value in saved.items())


def test_an_average_cannot_start_in_the_middle(tmp_path, capsys):
    assert main(words(tmp_path / "run", 2)) == 0
    capsys.readouterr()
    assert main(words(tmp_path / "run", 4, "--resume", "--recipe.ema_decay=0.9")) == 2
    assert "no average of its weights" in capsys.readouterr().err


def test_accumulated_batches_are_one(tmp_path):
    """Two batches of 2 give the step of one batch of 4, BatchNorm being frozen; also with images without labels."""
    found = {}
    for name, size, count in (("one", 4, 1), ("two", 2, 2)):
        model = spread_gates(tiny_model()).train()
        plan = recipe(accumulate=count, batch_norm="frozen", lr=0.05, **QUICK)
        fit(tmp_path / name, plan, model, batch_size=size, crop=(64, 96), train_images=5)  # padding has no label
        rows = logged(tmp_path / name)
        assert [int(row["step"]) for row in rows] == list(range(6))
        found[name] = model.state_dict(), [float(row["loss"]) for row in rows]
    assert found["two"][1] == pytest.approx(found["one"][1], rel=1e-5)
    start = spread_gates(tiny_model()).state_dict()
    for key, value in found["one"][0].items():
        torch.testing.assert_close(found["two"][0][key], value, rtol=1e-4, atol=1e-5)
        if "running" in key:
            assert torch.equal(value, start[key])
    weight = "stem.0.1.weight"
    assert not torch.allclose(found["one"][0][weight], start[weight], atol=1e-4), "frozen norms still learn their scale"


def test_the_budget_of_accumulated_batches(tmp_path):
    """Each batch's mean cost is held against the target: the mean of the squares, as SegmentationTask says."""
    model = spread_gates(tiny_model(depth=3, num_scales=4)).train()
    data, plan = DataConfig(**DATA), recipe(iterations=1, accumulate=2, batch_norm="frozen", warmup_steps=0, **QUICK)
    batch = next(iter(SegmentationDataModule(data, 1, plan.seed, 0, 2).train_dataloader()))
    cost = routeseg.model_cost(model, DATA["crop"])
    with torch.no_grad():
        gates = model.eval()(batch["image"]).gates
    shares = cost.expected(gates) / cost.budgeted
    means = shares.reshape(2, 2).mean(1)
    assert abs(means[0] - means[1]) > 1e-3
    fit(tmp_path, plan, model.train(), Budget(0.5, 0.2, start=0.0, ramp=0.0))
    (row,) = logged(tmp_path)
    assert float(row["budget_loss"]) == pytest.approx(float(((means - 0.2) ** 2).mean()), rel=1e-4)
    assert float(row["expected_cost"]) == pytest.approx(float(shares.mean()), rel=1e-5)
    assert float(row["real_cost"]) == pytest.approx(float(cost.of_gates(gates).mean() / cost.full), rel=1e-6)
    assert float(row["loss"]) == pytest.approx(float(row["cross_entropy"]) + 0.5 * float(row["budget_loss"]), rel=1e-6)


def test_every_batch_draws_another_drop_path(tmp_path, monkeypatch):
    """The seed differs for every batch of every step; p grows from 0 with the steps, and BatchNorm's estimate has 0."""
    model, seeds, dropped = tiny_model(), [], []

    def note_forward(*_):
        seeds.append(torch.initial_seed())
        dropped.append([])

    for way in (Compute, Fused):

        def note_cell(self, node, features, drop_path, running, cell=way.cell):
            dropped[-1].append(drop_path)
            return cell(self, node, features, drop_path, running)

        monkeypatch.setattr(way, "cell", note_cell)
    model.register_forward_pre_hook(note_forward)
    fit(tmp_path, recipe(iterations=4, accumulate=3, drop_path=0.3, **QUICK | {"precise_bn_batches": 1}), model)
    assert len(set(seeds[:12])) == 12
    assert [max(values) for values in dropped[:12:3]] == pytest.approx([0.3 * step / 4 for step in range(4)])
    assert len(dropped) == 13 and max(dropped[12]) == 0


def test_adamw(tmp_path, capsys):
    """It learns with another optimiser, and a run keeps the one that it began with."""
    adamw = ("--recipe.optimizer=adamw", "--recipe.lr=0.002", "--recipe.weight_decay=0.02")
    assert main(words(tmp_path / "run", 2, *adamw)) == 0
    assert main(words(tmp_path / "run", 4, *adamw, "--resume")) == 0
    groups = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert all(group["betas"] == (0.9, 0.999) for group in groups)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.02}
    capsys.readouterr()
    assert main(words(tmp_path / "run", 6, "--resume", "--recipe.optimizer=sgd")) == 2
    assert "--recipe.optimizer adamw" in capsys.readouterr().err


class TestClassBalance:
    def test_rare_classes_gain(self):
        """Weights are 1 in the mean over the pixels, and go with a power of a class's share."""
        data = open_data(DataConfig(**DATA), "train")
        counts = sum(np.bincount(data.read(i)[1].ravel(), minlength=256) for i in range(len(data)))[: len(data.classes)]
        share = counts / counts.sum()
        seen = share > 1e-4
        for balance in (0.5, 1.0):
            weights = class_weights(data, balance)
            assert (weights * share).sum() == pytest.approx(1, rel=1e-3)
            factor = (weights * share**balance)[seen]
            assert factor == pytest.approx(factor[0], rel=1e-3)
        assert class_weights(data, 0.0) == pytest.approx(1.0)

    def test_the_loss_is_the_weighted_mean(self):
        model = DynamicRoutingNetwork(num_classes=10, depth=3, base_channels=8, stem_channels=8, gate="fixed")
        weights = np.linspace(0.5, 2, 10).astype(np.float32)
        task = SegmentationTask(model, Recipe(), Budget(), (64, 64), class_weights=weights)
        logits, labels = torch.randn(2, 10, 8, 8), torch.randint(0, 10, (2, 8, 8))
        labels[0, 0] = IGNORE
        result = Segmentation(logits, torch.zeros(2, 4, 4, 3))
        _, numbers = task.loss(result, labels, task.count(labels))
        expected = torch.nn.functional.cross_entropy(logits, labels, torch.from_numpy(weights), ignore_index=IGNORE)
        assert numbers["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)

    def test_a_run_uses_it(self, tmp_path):
        assert main(words(tmp_path / "run", 2, "--recipe.class_balance=0.5")) == 0

    def test_mistake(self):
        with pytest.raises(ValueError, match="class_balance"):
            Recipe(class_balance=2.0)
