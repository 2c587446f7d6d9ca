"""The trainer as a user meets it: learns, resumes exactly, stops on a bad loss, refuses bad keys."""

import copy
import csv
import math
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import routeseg
from conftest import spread_gates
from routeseg.cli import main
from routeseg.cost.budget import Budget
from routeseg.data.datamodule import DataConfig, SegmentationDataModule
from routeseg.evaluation import evaluate
from routeseg.training import callbacks
from routeseg.training.batch_norm import precise_batch_norm
from routeseg.training.fitting import NonFiniteLoss, parameter_groups
from routeseg.training.recipe import Recipe, lr_factor
from routeseg.training.segmentation import train

DATA = dict(crop=(32, 64), image_size=(48, 64), train_images=12, val_images=3, batch_size=2, workers=0)
NETWORK = dict(depth=3, base_channels=4, stem_channels=4)


def tiny_model(**changes):
    torch.manual_seed(1)
    return routeseg.DynamicRoutingNetwork(num_classes=10, **{**NETWORK, **changes})


def recipe(**changes):
    values = dict(
        iterations=6, lr=0.02, warmup_steps=2, precise_bn_batches=2, validate_every=3, save_every=2, log_every=1, seed=3
    )
    return Recipe(**{**values, **changes})


def words(output, iterations, *extra):
    return [
        "train", "--output", str(output), "--accelerator", "cpu",
        *(f"--model.{k}={v}" for k, v in NETWORK.items()),
        *(f"--data.{k}={list(v) if isinstance(v, tuple) else v}" for k, v in DATA.items()),
        f"--recipe.iterations={iterations}", "--recipe.lr=0.02", "--recipe.warmup_steps=2", "--recipe.drop_path=0.3",
        "--recipe.precise_bn_batches=2", "--recipe.validate_every=7", "--recipe.save_every=2", "--recipe.seed=3",
        "--budget.weight=0.5", "--budget.start=0.2", *extra,
    ]  # fmt: skip


def command(arguments):
    return [sys.executable, "-m", "routeseg.cli", *arguments]


AVERAGED = ["--recipe.ema_decay=0.9", "--recipe.accumulate=2", "--data.batch_size=1"]


@pytest.mark.parametrize("options", [[], pytest.param(AVERAGED, marks=pytest.mark.slow)])
def test_killed_and_resumed_ends_with_the_same_weights(tmp_path, options, one_thread):
    """SIGKILL somewhere after the first checkpoint; the resumed run ends bit for bit like one never interrupted."""
    iterations = 40
    assert main(words(tmp_path / "whole", iterations, *options)) == 0
    process = subprocess.Popen(
        command(words(tmp_path / "cut", iterations, *options)),
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # other numbers of threads add up in another order
    )
    checkpoint = tmp_path / "cut" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = torch.load(checkpoint, weights_only=True)["global_step"]
    assert 0 < reached < iterations, "the run was not cut in the middle"
    assert main(words(tmp_path / "cut", iterations, *options, "--resume")) == 0
    for folder in ("last", "best"):
        whole = load_file(tmp_path / "whole" / folder / "model.safetensors")
        cut = load_file(tmp_path / "cut" / folder / "model.safetensors")
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[key], cut[key]) for key in whole), folder


def test_a_resumed_run_follows_the_recipe_that_it_is_given(tmp_path):
    """Learning rates, decay and momentum are those of the changed recipe, also where a finished run gets longer."""
    data, options = DataConfig(**DATA), dict(progress=False, accelerator="cpu")
    train(tiny_model(), data, recipe(iterations=4, save_every=4), Budget(), tmp_path, **options)
    plan = recipe(iterations=8, lr=0.005, momentum=0.5, weight_decay=1e-3, gate_lr_factor=2.0)
    result = train(tiny_model(), data, plan, Budget(), tmp_path, resume=True, **options)
    rates = {}
    for path in (tmp_path / "logs").glob("*/metrics.csv"):
        with open(path) as file:
            rates |= {int(row["step"]): float(row["lr"]) for row in csv.DictReader(file) if row["lr"]}
    before = recipe(iterations=4)
    assert rates == pytest.approx(
        {step: 0.02 * lr_factor(step, before) for step in range(4)}
        | {step: 0.005 * lr_factor(step, plan) for step in range(4, 8)}
    )
    groups = result.trainer.optimizers[0].param_groups
    expected = parameter_groups(tiny_model(), plan)
    assert {group["momentum"] for group in groups} == {0.5}
    assert [group["weight_decay"] for group in groups] == [group["weight_decay"] for group in expected]
    assert [group["initial_lr"] for group in groups] == [group["lr"] for group in expected]
    assert {group["lr"] for group in expected} == {0.005, 0.01}


def test_resumed_with_another_network(tmp_path, capsys):
    assert main(words(tmp_path / "run", 2)) == 0
    assert "2 images a step (2 x 1 processes x 1 accumulated), learning rate 0.02" in capsys.readouterr().out
    for change, name in (("base_channels=8", "stem.2.1.weight is"), ("depth=4", "nodes.3-0.*is missing there")):
        assert main(words(tmp_path / "run", 4, "--resume", f"--model.{change}")) == 2
        err = capsys.readouterr().err
        assert re.search(f"has another network: .*{name}.* here.*configuration", err) and "Traceback" not in err, err


def test_a_single_class_is_refused(tmp_path):
    model = routeseg.DynamicRoutingNetwork(num_classes=1, **NETWORK)
    with pytest.raises(ValueError, match="one class only"):
        train(model, DataConfig(**DATA), recipe(), Budget(), tmp_path / "run", progress=False, accelerator="cpu")
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


def test_interrupted(tmp_path):
    process = subprocess.Popen(
        command(words(tmp_path / "run", 100_000)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith("routeseg: interrupted\n"), err


def test_writes_logs_and_networks(tmp_path):
    model = tiny_model()
    result = train(
        model, DataConfig(**DATA), recipe(), Budget(0.5, 0.2, start=0.5), tmp_path, progress=False, accelerator="cpu"
    )
    assert result.evaluation is not None and 0 <= result.evaluation.miou <= 1
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 1
    with open(next((tmp_path / "logs").glob("*/metrics.csv"))) as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if row["loss"]]
    assert len(steps) == 6
    for row in steps:  # Eq. 10; the budget starts after half of the steps, and ramps up from 0
        weight = 0.5 * (int(row["step"]) > 3)
        assert float(row["loss"]) == pytest.approx(
            float(row["cross_entropy"]) + weight * float(row["budget_loss"]), rel=1e-5
        )
    assert sum(bool(row["val_miou"]) for row in rows) == 2
    loaded = routeseg.load(tmp_path / "last")
    assert torch.equal(loaded.decoder.predictor.weight, model.decoder.predictor.weight)


def test_learns(tmp_path):
    """A few steps on a few pictures bring the loss well below that of a uniform guess."""
    train(
        tiny_model(base_channels=8), DataConfig(**DATA), recipe(iterations=60, lr=0.1, validate_every=60), Budget(),
        tmp_path, progress=False, accelerator="cpu",
    )  # fmt: skip
    with open(next((tmp_path / "logs").glob("*/metrics.csv"))) as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert losses[0] == pytest.approx(math.log(10), abs=0.3)
    assert sum(losses[-10:]) / 10 < 1.7


def test_budget_lowers_the_cost(tmp_path):
    costs = {}
    for weight in (0.0, 20.0):
        folder = tmp_path / str(weight)
        train(
            tiny_model(), DataConfig(**DATA), recipe(iterations=40, lr=0.1), Budget(weight, 0.1, start=0.0, ramp=0.0),
            folder, progress=False, accelerator="cpu",
        )  # fmt: skip
        with open(next((folder / "logs").glob("*/metrics.csv"))) as file:
            costs[weight] = [float(r["expected_cost"]) for r in csv.DictReader(file) if r["expected_cost"]][-1]
    assert costs[20.0] < 0.75 * costs[0.0]


@pytest.mark.parametrize(("weight", "best_step"), [(0.5, 6), (0.0, 4)])
def test_the_best_network_keeps_the_budget(tmp_path, monkeypatch, weight, best_step):
    """Scores before the budget is at full weight do not count once there are others; without a budget all count."""
    kept = {}
    scores = {2: 0.2, 4: 0.9, 6: 0.5}

    def scored(model, *args):
        step = 2 * len(kept) + 2
        kept[step] = copy.deepcopy(model.state_dict())
        return SimpleNamespace(miou=scores[step], cost_macs=np.ones(1), full_macs=np.ones(1))

    monkeypatch.setattr(callbacks, "evaluate", scored)
    train(
        tiny_model(), DataConfig(**DATA), recipe(iterations=6, validate_every=2), Budget(weight, start=0.8),
        tmp_path, progress=False, accelerator="cpu",
    )  # fmt: skip
    best = load_file(tmp_path / "best" / "model.safetensors")
    assert all(torch.equal(best[key], value) for key, value in kept[best_step].items())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    with pytest.raises(NonFiniteLoss, match=r"step \d+, learning rate .*--recipe\.lr"):
        train(
            tiny_model(), DataConfig(**DATA), recipe(iterations=50, lr=1e30, warmup_steps=0, save_every=1),
            Budget(), tmp_path / "run", progress=False, accelerator="cpu",
        )  # fmt: skip
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
        (["--model.depth=2"], "depth 2 is too small"),
        (["--model.base_channels=7"], "even"),
        (["--model.cell_operations=[conv]"], "sep_conv_3x3"),
        (["--data.name=camvid"], "--data.root"),
        (["--data.crop=[16,16]"], "data.crop"),
        (["--budget.target=3"], "target"),
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


def test_batches_of_precise_batch_norm_do_not_depend_on_the_workers():
    batches = [
        [batch["image"] for batch in SegmentationDataModule(data, 5, seed=3).norm_dataloader(5, 3)]
        for data in (DataConfig(**DATA), DataConfig(**{**DATA, "workers": 2}))
    ]
    assert len(batches[0]) == 3 and all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_scheduled_drop_path():
    """p * layer / depth * progress, per image, on the convolutions alone; the first layer is never dropped."""
    model = spread_gates(tiny_model(gate="fixed")).train()
    cell = model.node(3, 0).cell
    x = torch.randn(4000, 4, 1, 1)
    operation = model.node(3, 0).cell["sep_conv_3x3"].eval()
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
    model, plan = tiny_model(), recipe(iterations=5, ema_decay=0.75, validate_every=5)
    train(model, DataConfig(**DATA), plan, Budget(), tmp_path, progress=False, accelerator="cpu")
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
        data = DataConfig(**{**DATA, "batch_size": size, "crop": (64, 96), "train_images": 5})  # padding has no label
        plan = recipe(accumulate=count, batch_norm="frozen", validate_every=6, lr=0.05)
        train(model, data, plan, Budget(), tmp_path / name, progress=False, accelerator="cpu")
        with open(next((tmp_path / name / "logs").glob("*/metrics.csv"))) as file:
            rows = [row for row in csv.DictReader(file) if row["loss"]]
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
    model = spread_gates(tiny_model()).train()
    data, plan = DataConfig(**DATA), recipe(iterations=1, accumulate=2, batch_norm="frozen", warmup_steps=0)
    batch = next(iter(SegmentationDataModule(data, 1, plan.seed, 0, 2).train_dataloader()))
    cost = routeseg.model_cost(model, DATA["crop"])
    with torch.no_grad():
        shares = cost.expected(model.eval()(batch["image"]).gates) / cost.budgeted
    means = shares.reshape(2, 2).mean(1)
    assert abs(means[0] - means[1]) > 1e-3
    train(model.train(), data, plan, Budget(0.5, 0.2, start=0.0, ramp=0.0), tmp_path, progress=False, accelerator="cpu")
    with open(next((tmp_path / "logs").glob("*/metrics.csv"))) as file:
        row = next(row for row in csv.DictReader(file) if row["loss"])
    assert float(row["budget_loss"]) == pytest.approx(float(((means - 0.2) ** 2).mean()), rel=1e-4)
    assert float(row["expected_cost"]) == pytest.approx(float(shares.mean()), rel=1e-5)
    assert float(row["loss"]) == pytest.approx(float(row["cross_entropy"]) + 0.5 * float(row["budget_loss"]), rel=1e-6)


def test_every_batch_draws_its_own_drop_path(tmp_path):
    model, seeds = tiny_model(), []
    model.register_forward_pre_hook(
        lambda _, args, options: seeds.append(torch.initial_seed()) if options.get("drop_path") else None,
        with_kwargs=True,
    )
    plan = recipe(iterations=4, accumulate=3, drop_path=0.3, precise_bn_batches=0, validate_every=4)
    train(model, DataConfig(**DATA), plan, Budget(), tmp_path, progress=False, accelerator="cpu")
    assert len(seeds) == len(set(seeds)) == 3 * 3  # the first step drops nothing


@pytest.mark.slow
def test_compiled_and_bf16(tmp_path):
    """torch.compile and bf16 both train; compiled parts give the loss that plain ones give."""
    losses = {}
    for name, changes in (("plain", {}), ("compiled", {"compile": True}), ("bf16", {"precision": "bf16-mixed"})):
        train(
            tiny_model(),
            DataConfig(**DATA),
            recipe(**changes),
            Budget(),
            tmp_path / name,
            progress=False,
            accelerator="cpu",
        )
        with open(next((tmp_path / name / "logs").glob("*/metrics.csv"))) as file:
            losses[name] = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=5e-2)
