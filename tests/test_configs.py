"""The shipped configurations: short, typed, complete, and what their names say."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from routeseg import ARCHITECTURES, DynamicRoutingNetwork
from routeseg.cli.common import config_parser

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name != "table1")  # see test_table1.py


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_config(path):
    assert len(path.read_text().splitlines()) <= 35
    args = config_parser("train").parse_args(["--config", str(path)])
    assert args.data.name == path.parent.name
    with torch.device("meta"):
        model = DynamicRoutingNetwork(num_classes=11, **vars(args.model))
    assert model.gated
    given = yaml.safe_load(path.read_text())
    assert args.recipe.iterations == given["recipe"]["iterations"]


@pytest.mark.parametrize("data", ["camvid", "scenes"])
@pytest.mark.parametrize(
    ("name", "weight", "target", "small"),
    [("a", 0.8, 0.1, True), ("b", 0.5, 0.1, True), ("c", 0.5, 0.2, True), ("raw", 0.0, None, False)],
)
def test_budgets_are_the_papers(data, name, weight, target, small):
    args = config_parser("train").parse_args(["--config", str(ROOT / "configs" / data / f"dynamic_{name}.yaml")])
    assert args.budget.weight == weight and args.model.small_gate == small
    assert target is None or args.budget.target == target
    assert weight == 0 or (args.budget.start, args.budget.ramp) == (0.4, 0.02)


def test_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    for word in text.replace("`", " ").replace("(", " ").replace(")", " ").split():
        if word.startswith(("configs/", "results/", "docs/")) and "{" not in word and "*" not in word:
            assert (ROOT / word.rstrip(".,;:")).exists(), word


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
