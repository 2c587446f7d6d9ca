"""The shipped configurations: short, typed, complete, and what their names say."""

import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml

from conftest import run
from routeseg import ARCHITECTURES, DynamicRoutingNetwork
from routeseg.cli.common import config_parser
from routeseg.space import RoutingSpace

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
BUDGETS = {"dynamic_a": (0.8, 0.1), "dynamic_b": (0.5, 0.1), "dynamic_c": (0.5, 0.2)}  # weight, target: the paper's
SETS = ("camvid", "cityscapes", "scenes", "voc")  # imagenet: test_pretraining.py; table1: test_table1.py
# What the documents name, as one `--config` after the other; docs/training.md lists them.
COMBINATIONS = [(f"{name}/base",) for name in SETS]
COMBINATIONS += [(f"{name}/base", budget) for name in ("camvid", "cityscapes", "scenes") for budget in BUDGETS]
COMBINATIONS += [("cityscapes/base", "cityscapes/long"), ("cityscapes/base", "cityscapes/imagenet")]
COMBINATIONS += [("cityscapes/base", "dynamic_a", "cityscapes/one_gpu")]
COMBINATIONS += [("camvid/small_cpu",), ("scenes/small_cpu",)]
REAL_DATA = [files for files in COMBINATIONS if files[0] in ("cityscapes/base", "voc/base")]
TINY = ["--model.depth=4", "--model.base_channels=4", "--model.stem_channels=4", "--data.crop=[64, 64]"]
TINY += ["--data.batch_size=2", "--data.workers=0", "--budget.start=0", "--recipe.iterations=2"]
TINY += ["--recipe.accumulate=1", "--recipe.precise_bn_batches=1", "--recipe.precision=32-true"]


@pytest.fixture(scope="module")
def parser():
    return config_parser("train")


@lru_cache  # several combinations have one network
def network_of(options):
    with torch.device("meta"):
        return DynamicRoutingNetwork(num_classes=11, **json.loads(options))


def with_configs(files):
    return [word for name in files for word in ("--config", str(CONFIGS / f"{name}.yaml"))]


@pytest.mark.parametrize("files", COMBINATIONS, ids="+".join)
def test_configuration(files, parser):
    """Short, typed, and what its names say."""
    args = parser.parse_args(with_configs(files))
    assert args.data.name == files[0].split("/")[0]
    assert network_of(json.dumps(vars(args.model))).gated
    for name, section in (("model", args.model), ("data", args.data), ("recipe", args.recipe), ("budget", args.budget)):
        given = [yaml.safe_load((CONFIGS / f"{file}.yaml").read_text()).get(name, {}) for file in files]
        for key, value in {key: value for part in given for key, value in part.items()}.items():
            found = section[key]
            assert (list(found) if isinstance(found, tuple) else found) == value, key


def test_every_file_belongs_to_a_combination():
    here = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.glob("**/*.yaml")}
    elsewhere = {name for name in here if name.startswith(("table1/", "imagenet/"))}
    assert here - elsewhere == {file for files in COMBINATIONS for file in files}
    assert all(len((CONFIGS / f"{name}.yaml").read_text().splitlines()) <= 35 for name in here)


@pytest.mark.parametrize("files", REAL_DATA, ids="+".join)
def test_two_steps_on_a_small_copy(files, layouts, tmp_path, capsys, one_thread):
    """The recipe, made small, trains and validates on a copy in the official layout."""
    root = layouts("cityscapes" if files[0].startswith("cityscapes") else "sbd")
    words = ["train", *with_configs(files), "--data.root", root, "--output", tmp_path, "--accelerator", "cpu", *TINY]
    code, out, err = run(words, capsys)
    assert code == 0, err
    config = json.loads((tmp_path / "last" / "config.json").read_text())
    assert config["small_gate"] == ("dynamic_a" in files or "dynamic_b" in files or "dynamic_c" in files)
    assert len(config["class_names"]) == (19 if files[0].startswith("cityscapes") else 21)


def test_a_static_network_on_top_of_a_base(layouts, tmp_path, capsys, one_thread):
    """The keys that docs/training.md and docs/architectures.md name: no gates, and the architecture's route."""
    words = ["train", *with_configs(["cityscapes/base"]), "--data.root", layouts("cityscapes"), "--output", tmp_path]
    words += ["--accelerator", "cpu", *TINY, "--model.depth=16", "--model.gate=fixed", "--model.route=u-net"]
    code, out, err = run(words, capsys)
    assert code == 0, err
    config = json.loads((tmp_path / "last" / "config.json").read_text())
    assert config["route"] == [list(edge) for edge in ARCHITECTURES["u-net"](RoutingSpace(16, 4)).named_edges]


@pytest.mark.parametrize("data", ["camvid", "cityscapes", "scenes"])
@pytest.mark.parametrize("name", [None, *BUDGETS])
def test_budgets_are_the_papers(data, name, parser):
    args = parser.parse_args(with_configs([f"{data}/base", *([name] if name else [])]))
    assert (args.budget.start, args.budget.ramp) == (0.4, 0.02)
    if name is None:
        assert args.budget.weight == 0 and not args.model.small_gate
    else:
        assert (args.budget.weight, args.budget.target) == BUDGETS[name] and args.model.small_gate


@pytest.mark.parametrize("files", REAL_DATA, ids="+".join)
def test_learning_rate_belongs_to_the_images_of_a_step(files, parser):
    """docs/training.md: 0.05 for 8 images from scratch, 0.02 from ImageNet weights."""
    args = parser.parse_args(with_configs(files))
    images = args.data.batch_size * args.recipe.accumulate
    at_8 = 0.02 if args.recipe.gate_lr_factor > 1 else 0.05
    assert args.recipe.lr == pytest.approx(at_8 * images / 8)


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
