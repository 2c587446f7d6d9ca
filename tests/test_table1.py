"""The runner of Table 1: one recipe for all, interrupted and resumed, and what it writes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import table1
from routeseg import DynamicRoutingNetwork
from routeseg.training.callbacks import ValidateAndSave

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted([*(ROOT / "configs/table1").glob("*.yaml"), *(ROOT / "configs/any_budget").glob("*_cpu.yaml")])
LINE = [[layer, 0, "keep"] for layer in range(5)]
TINY = {
    "model": {"depth": 4, "base_channels": 8, "stem_channels": 8},
    "data": {
        "image_size": [32, 64],
        "train_images": 4,
        "val_images": 2,
        "crop": [32, 32],
        "batch_size": 2,
        "workers": 0,
    },
    "recipe": {"iterations": 3, "warmup_steps": 0, "precise_bn_batches": 1, "validate_every": 3, "save_every": 1}
    | {"precision": "32-true"},
    "gate_budget": {"weight": 0.0, "start": 0.0},
    "networks": {
        "line": {"model": {"gate": "fixed", "route": LINE}},
        "dynamic-a": {"model": {"small_gate": True}, "gate_budget": {"weight": 0.8}},
        "common-a": {"common": {"of": "dynamic-a", "threshold": 0.5}},
    },
}


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY, sort_keys=False))
    return path


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=f"{p.parent.name}/{p.stem}", marks=[pytest.mark.slow] if p.stem.endswith("gpu") else [])
        for p in EXPERIMENTS
    ],
)
def test_experiment_files(path):
    assert len(path.read_text().splitlines()) <= 35
    networks = table1.read_experiment(path)
    assert next(network.kind for name, network in networks.items() if name.startswith("u-net")) == "static"
    assert "u-net" not in networks or networks["u-net"].label == "U-Net"
    if path.parent.name == "any_budget":
        assert [name for name, network in networks.items() if network.kind == "exits"] == ["any-budget"]
        return
    assert networks["dynamic-a"].budget.weight == 0.8 and networks["dynamic-raw"].budget.weight == 0
    for network in networks.values():
        assert network.data.name == path.stem.split("_")[0]
        assert network.recipe == networks["u-net"].recipe and network.data == networks["u-net"].data
        with torch.device("meta"):
            model = DynamicRoutingNetwork(num_classes=11, **vars(network.args.model))
        assert model.config.gated == (network.kind in ("dynamic", "softmax"))


@pytest.mark.slow
def test_table(experiment, tmp_path, capsys, monkeypatch):
    folder, output = tmp_path / "runs", tmp_path / "results" / "tiny.json"
    command = ["--config", str(experiment), "--seeds", "0,1", "--folder", str(folder), "--output", str(output)]
    command += ["--accelerator", "cpu"]
    runs = {
        run.name: run for run in table1.plan(table1.read_experiment(experiment), list(TINY["networks"]), [0, 1], folder)
    }
    assert list(runs)[:3] == ["line seed 0", "dynamic-a seed 0", "common-a seed 0"]
    found = {name: table1.perform(runs[name], "cpu") for name in list(runs)[:3] + ["dynamic-a seed 1"]}

    with monkeypatch.context() as patch:  # killed before its last step is saved
        patch.setattr(ValidateAndSave, "_validate", lambda *_: (_ for _ in ()).throw(KeyError("killed")))
        with pytest.raises(KeyError):
            table1.perform(runs["line seed 1"], "cpu")
    bad = runs["common-a seed 1"].folder / "last.ckpt"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"no checkpoint")
    assert table1.main([*command, "--jobs", "2"]) == 1
    out = capsys.readouterr().out
    assert "4 runs are finished, 2 to do" in out and "line seed 1: mIoU" in out
    assert "common-a seed 1 FAILED" in out and "is damaged" in out
    assert json.loads(output.read_text())["missing"] == ["common-a seed 1"]
    assert runs["line seed 1"].result["resumed"] and runs["line seed 1"].result["iterations"] == 3

    bad.unlink()
    table1.perform(runs["common-a seed 1"], "cpu")
    (runs["line seed 0"].folder / "result.json").unlink()  # killed between the last checkpoint and the result
    shutil.rmtree(runs["line seed 0"].folder / "last")
    again = table1.perform(runs["line seed 0"], "cpu")
    assert (again["miou"], again["iou"]) == (found["line seed 0"]["miou"], found["line seed 0"]["iou"])
    assert table1.main(command) == 0

    facts = json.loads(output.read_text())
    assert not facts["missing"] and facts["seeds"] == [0, 1] and {"machine", "date", "versions"} <= set(facts)
    rows = {row["name"]: row for row in facts["rows"]}
    assert list(rows) == ["common-a", "dynamic-a", "line"]  # the paper's first, in its order
    assert [rows[name]["kind"] for name in ("line", "dynamic-a", "common-a")] == ["static", "dynamic", "common"]
    dynamic = rows["dynamic-a"]
    scores = [found["dynamic-a seed 0"]["miou"], found["dynamic-a seed 1"]["miou"]]
    assert dynamic["miou"] == scores and dynamic["miou_mean"] == pytest.approx(sum(scores) / 2)
    assert dynamic["miou_std"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    assert 0 < dynamic["expected_share"] <= 1 and rows["line"]["expected_share"] is None
    assert rows["line"]["gmacs"]["mean"] < rows["common-a"]["gmacs"]["mean"] <= dynamic["gmacs"]["full"]
    assert rows["line"]["params_m"] < rows["common-a"]["params_m"] < dynamic["params_m"]
    assert dynamic["paper"] == {"miou": 0.728, "gmacs": {"mean": 44.9, "max": 48.2, "min": 43.5}, "params_m": 17.8}
    text = output.with_suffix(".md").read_text()
    assert f"| Dynamic-A | 2 | {100 * dynamic['miou_mean']:.1f} ± {100 * dynamic['miou_std']:.1f} | " in text
    assert "| 72.8 | 44.9 / 48.2 / 43.5 | 17.8 |" in text and "Missing" not in text
    assert output.with_suffix(".png").stat().st_size > 10_000

    assert table1.main([*command, "--networks", "line", "--seeds", "1"]) == 0
    assert json.loads(output.read_text())["rows"] == facts["rows"], "the other runs are finished too"

    capsys.readouterr()
    assert table1.main([*command, "--recipe.lr", "0.01"]) == 2
    error = capsys.readouterr().err
    assert "line seed 0" in error and "recipe.lr was 0.05, is 0.01" in error and "--folder" in error
