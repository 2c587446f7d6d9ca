"""The shipped configurations: short, typed, complete, and what their names say."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from conftest import run
from routeseg import ARCHITECTURES, DynamicRoutingNetwork
from routeseg.cli.common import config_parser
from routeseg.space import RoutingSpace

ROOT = Path(__file__).parents[1]
# See test_table1.py and test_pretraining.py for the others.
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name not in ("table1", "imagenet"))
REAL_DATA = [p for p in CONFIGS if p.parent.name in ("cityscapes", "voc")]
STATIC = ROOT / "configs" / "cityscapes" / "static.yaml"
TINY = ["--model.base_channels=4", "--model.stem_channels=4", "--data.crop=[64, 64]", "--data.batch_size=2"]
TINY += ["--data.workers=0", "--recipe.iterations=2", "--recipe.precise_bn_batches=1", "--recipe.precision=32-true"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_config(path):
    assert len(path.read_text().splitlines()) <= 35
    args = config_parser("train").parse_args(["--config", str(path)])
    assert args.data.name == path.parent.name
    with torch.device("meta"):
        model = DynamicRoutingNetwork(num_classes=11, **vars(args.model))
    assert model.config.gated == (path.stem != "static")
    given = yaml.safe_load(path.read_text())
    assert args.recipe.iterations == given["recipe"]["iterations"]


@pytest.mark.parametrize(
    ("path", "route"),
    [
        pytest.param(
            path,
            route,
            id="-".join(filter(None, (path.parent.name, path.stem, route))),
            marks=[pytest.mark.slow] if "33" in path.stem else [],
        )
        for path in REAL_DATA
        for route in (ARCHITECTURES if path == STATIC else [None])
    ],
)
def test_two_steps_on_a_small_copy(path, route, layouts, tmp_path, capsys, one_thread):
    """The recipe, made small in width and crop, trains and validates on a copy in the official layout."""
    root = layouts("cityscapes" if path.parent.name == "cityscapes" else "sbd")
    words = ["--config", path, "--data.root", root, "--output", tmp_path, "--accelerator", "cpu", *TINY]
    words += [] if route is None else ["--model.route", route]
    code, out, err = run(["train", *words], capsys)
    assert code == 0, err
    config = json.loads((tmp_path / "last" / "config.json").read_text())
    assert config["depth"] == (33 if "33" in path.stem else 16)
    if route is not None:
        edges = ARCHITECTURES[route](RoutingSpace(16, 4)).named_edges
        assert config["route"] == [list(edge) for edge in edges]
    assert len(config["class_names"]) == (19 if path.parent.name == "cityscapes" else 21)


@pytest.mark.parametrize("data", ["camvid", "cityscapes", "scenes"])
@pytest.mark.parametrize(
    ("name", "weight", "target", "small"),
    [("a", 0.8, 0.1, True), ("b", 0.5, 0.1, True), ("c", 0.5, 0.2, True), ("raw", 0.0, None, False)],
)
def test_budgets_are_the_papers(data, name, weight, target, small):
    args = config_parser("train").parse_args(["--config", str(ROOT / "configs" / data / f"dynamic_{name}.yaml")])
    assert args.budget.weight == weight and args.model.small_gate == small
    assert target is None or args.budget.target == target
    assert weight == 0 or (args.budget.start, args.budget.ramp) == (0.4, 0.02)


@pytest.mark.parametrize("path", REAL_DATA, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_learning_rate_belongs_to_the_images_of_a_step(path):
    """docs/training.md: 0.05 for 8 images from scratch, 0.02 from ImageNet weights."""
    config = yaml.safe_load(path.read_text())
    images = config["data"]["batch_size"] * config["recipe"].get("accumulate", 1)
    at_8 = 0.02 if "gate_lr_factor" in config["recipe"] else 0.05
    assert config["recipe"]["lr"] == pytest.approx(at_8 * images / 8)


def test_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    for word in text.replace("`", " ").replace("(", " ").replace(")", " ").split():
        if word.startswith(("configs/", "results/", "docs/")) and "{" not in word and "*" not in word:
            assert (ROOT / word.rstrip(".,;:")).exists(), word
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / name).exists() or any(
            list((ROOT / part).glob(f"**/{name}")) for part in ("src", "benchmarks")
        ), name


def test_readme_quotes_the_result_files():
    """The score and the costs in a row of the results table are those of the file that the row names."""
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if "`results/" in line and line[0] == "|"]
    assert len(rows) >= 2
    for row in rows:
        facts = json.loads((ROOT / re.search(r"`(results/[^`]+\.json)`", row)[1]).read_text())
        cost = facts["cost_gmacs"]
        assert f"| {100 * facts['miou']:.1f} | {100 * facts['majority_class_miou']:.1f} |" in row
        assert f"| {cost['mean']:.3f} / {cost['min']:.3f} / {cost['max']:.3f} | {cost['full']:.3f} |" in row
        assert {"machine", "date", "versions"} <= set(facts)


def test_architecture_document_quotes_the_fit():
    text = (ROOT / "docs" / "architectures.md").read_text()
    fit = json.loads((ROOT / "results" / "architectures_fit.json").read_text())
    assert {"machine", "date", "versions"} <= set(fit)
    for name, found in fit["architectures"].items():
        ours, static = found["with_gates"]["ours"], found["static"]["ours"]
        row = [
            ARCHITECTURES[name].name,
            f"{found['paper_gmacs']:.1f} | {ours['gmacs']:.2f} | {100 * ours['gmacs_off']:+.1f} %",
            f"{found['paper_params_m']:.1f} | {ours['params_m']:.2f} | {100 * ours['params_off']:+.1f} %",
            f"{found['with_gates']['within_5_percent']} of {found['patterns']}",
            f"{static['gmacs']:.2f} | {static['params_m']:.2f}",
        ]
        assert f"| {' | '.join(row)} |" in text


@pytest.mark.parametrize("name", ["scenes_cpu", "camvid_cpu"])
def test_readme_has_the_comparison_as_it_was_written(name):
    """Every row of results/table1_NAME.md stands in the README, and the file is what the JSON gives."""
    rows = (ROOT / "results" / f"table1_{name}.md").read_text().splitlines()
    readme = (ROOT / "README.md").read_text().splitlines()
    assert all(row in readme for row in rows if row.startswith("|"))
    facts = json.loads((ROOT / "results" / f"table1_{name}.json").read_text())
    assert {"machine", "date", "versions"} <= set(facts) and not facts["missing"]


def test_documents_quote_latency_and_int8():
    """docs/cost.md has what `routeseg profile` found, docs/prediction.md what benchmarks/int8.py did."""
    text = (ROOT / "docs" / "cost.md").read_text()
    for name in ("latency", "latency_bfloat16"):
        facts = json.loads((ROOT / "results" / f"{name}_cpu.json").read_text())
        assert {"machine", "date", "versions"} <= set(facts)
        whole, test = facts["all_open"][0], facts["test"]
        rates = {(r["part"], r["scale"]): r["ms"] / r["gmacs"] for r in facts["all_open_by_part"] if r["gmacs"]}
        some = [rates[part] for part in (("stem", None), ("cells", 0), ("cells", 3), ("decoder", None))]
        row = [f"{whole['predicted_ms']:.0f} | {whole['measured_ms']:.0f}"]
        row += [f"{100 * test[key]:.1f} %" for key in ("median_error", "worst_error")]
        row += [" / ".join(f"{rate:.1f}" for rate in some)]
        assert f"| {facts['precision']} | {' | '.join(row)} |" in text, row
    text = (ROOT / "docs" / "prediction.md").read_text()
    facts = json.loads((ROOT / "results" / "int8_camvid_cpu.json").read_text())
    for row in facts["camvid"]:
        accuracy = f"{100 * row['miou']:.2f} % | {100 * row['same_labels']:.1f} %"
        assert f"| {row['file']} | {row['mb']:.1f} | {accuracy} | {row['median_ms']:.1f} |" in text, row
    for row in facts["full_size"]["results"]:
        assert f"{row['file']} | {row['mb']:.1f} |  |  | {row['median_ms']:.0f} |" in text, row


def test_documents_quote_the_measurements():
    """The tables of docs/{data,prediction,training}.md are what the benchmarks wrote."""
    facts = {
        n: json.loads((ROOT / "results" / f"{n}_cpu.json").read_text()) for n in ("data", "prediction", "small_batch")
    }
    assert all({"machine", "date", "versions"} <= set(found) for found in facts.values())
    text = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("data", "prediction", "training")}
    rates = {(row["workers"], row["cache"]): row["images_per_s"] for row in facts["data"]["loaders"]}
    for workers in (0, 1, 2):
        assert f"| {workers} | {rates[workers, False]:.1f} | {rates[workers, True]:.1f} |" in text["data"]
    results = {(row["workers"], row["pictures"]): row["images_per_s"] for row in facts["prediction"]["results"]}
    for pictures in (True, False):
        assert " | ".join(f"{results[workers, pictures]:.1f}" for workers in (None, 1, 2)) in text["prediction"]
    rows = {row["name"]: row for row in facts["small_batch"]["rows"]}
    assert not any(run["diverged"] for row in rows.values() for run in row["runs"])
    for suffix in ("", " x16", " x64"):
        cells = [rows[f"{kind}-2{suffix}"] for kind in ("scaled", "unscaled", "bare")]
        for cell in cells:
            assert f"{cell['runs'][0]['final_loss']:.2f} ({cell['lr']:g})" in text["training"]
