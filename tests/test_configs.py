"""The presets that come along: short, typed, complete, and what their names say."""

import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml

from conftest import run
from routeseg import ARCHITECTURES, DynamicRoutingNetwork
from routeseg.cli import main
from routeseg.cli.common import config_parser
from routeseg.cli.parser import PRESETS
from routeseg.space import RoutingSpace

BUDGETS = {"dynamic_a": (0.8, 0.1), "dynamic_b": (0.5, 0.1), "dynamic_c": (0.5, 0.2)}  # weight, target: the paper's
SETS = ("camvid", "cityscapes", "scenes", "voc")  # imagenet: test_pretraining.py; table1, any_budget: test_table1.py
# What the documents name, as one `--config` after the other; docs/training.md lists them.
COMBINATIONS = [(f"{name}/base",) for name in SETS]
COMBINATIONS += [(f"{name}/base", budget) for name in ("camvid", "cityscapes", "scenes") for budget in BUDGETS]
COMBINATIONS += [("cityscapes/base", "cityscapes/long"), ("cityscapes/base", "cityscapes/imagenet")]
COMBINATIONS += [("cityscapes/base", "dynamic_a", "cityscapes/one_gpu")]
COMBINATIONS += [("camvid/small",), ("camvid/wide",), ("camvid/pretrained",), ("scenes/small",)]
COMBINATIONS += [(f"{name}/base", "any_budget/depth16") for name in ("camvid", "cityscapes", "scenes", "voc")]
REAL_DATA = [files for files in COMBINATIONS if files[0] in ("cityscapes/base", "voc/base")]
REAL_DATA = [files for files in REAL_DATA if "any_budget/depth16" not in files]  # its exits are not those of depth 4
TINY = ["--model.depth=4", "--model.base_channels=4", "--model.stem_channels=4", "--data.crop=[64, 64]"]
TINY += ["--data.batch_size=2", "--data.workers=0", "--gate_budget.start=0", "--recipe.iterations=2"]
TINY += ["--recipe.accumulate=1", "--recipe.precise_bn_batches=1", "--recipe.precision=32-true"]


pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(scope="module")
def parser():
    return config_parser("train")


@lru_cache  # several combinations have one network
def network_of(options):
    with torch.device("meta"):
        return DynamicRoutingNetwork(num_classes=11, **json.loads(options))


def with_configs(files):
    return [word for name in files for word in ("--config", name)]


@pytest.mark.parametrize("files", COMBINATIONS, ids="+".join)
def test_configuration(files, parser):
    """Short, typed, and what its names say."""
    args = parser.parse_args(with_configs(files))
    assert args.data.name == files[0].split("/")[0]
    config = network_of(json.dumps(vars(args.model))).config
    assert config.gated or (config.exits is not None and args.gate_budget.weight == 0)
    for name, section in (
        ("model", args.model),
        ("data", args.data),
        ("recipe", args.recipe),
        ("gate_budget", args.gate_budget),
    ):
        given = [yaml.safe_load((PRESETS / f"{file}.yaml").read_text()).get(name, {}) for file in files]
        for key, value in {key: value for part in given for key, value in part.items()}.items():
            found = section[key]
            assert (list(found) if isinstance(found, tuple) else found) == value, key


def test_every_file_belongs_to_a_combination():
    here = {path.relative_to(PRESETS).with_suffix("").as_posix() for path in PRESETS.glob("**/*.yaml")}
    elsewhere = {name for name in here if name == "small" or name.startswith("imagenet/")}  # test_train_command.py
    assert here - elsewhere == {file for files in COMBINATIONS for file in files}
    assert all(len((PRESETS / f"{name}.yaml").read_text().splitlines()) <= 35 for name in here)


@pytest.mark.parametrize("files", REAL_DATA, ids="+".join)
def test_two_steps_on_a_small_copy(files, layouts, tmp_path, capsys):
    """The recipe, made small, trains and validates on a copy in the official layout."""
    root = layouts("cityscapes" if files[0].startswith("cityscapes") else "sbd")
    words = ["train", *with_configs(files), "--data.root", root, "--output", tmp_path, "--accelerator", "cpu", *TINY]
    code, out, err = run(words, capsys)
    assert code == 0, err
    config = json.loads((tmp_path / "last" / "config.json").read_text())
    assert config["small_gate"] == ("dynamic_a" in files or "dynamic_b" in files or "dynamic_c" in files)
    assert len(config["class_names"]) == (19 if files[0].startswith("cityscapes") else 21)


def test_a_static_network_on_top_of_a_base(layouts, tmp_path, capsys):
    """The keys that docs/training.md and docs/results.md name: no gates, and the architecture's route."""
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
    assert (args.gate_budget.start, args.gate_budget.ramp) == (0.4, 0.02)
    if name is None:
        assert args.gate_budget.weight == 0 and not args.model.small_gate
    else:
        assert (args.gate_budget.weight, args.gate_budget.target) == BUDGETS[name] and args.model.small_gate


@pytest.mark.parametrize("files", REAL_DATA, ids="+".join)
def test_learning_rate_belongs_to_the_images_of_a_step(files, parser):
    """docs/training.md: 0.05 for 8 images from scratch, 0.02 from ImageNet weights."""
    args = parser.parse_args(with_configs(files))
    images = args.data.batch_size * args.recipe.accumulate
    at_8 = 0.02 if args.recipe.gate_lr_factor > 1 else 0.05
    assert args.recipe.lr == pytest.approx(at_8 * images / 8)


def test_a_preset_by_its_name(parser, tmp_path, capsys):
    """From any folder; a file of the same name comes first, and a mistake is told with the nearest name."""
    assert parser.parse_args(["--config", "camvid/small"]).data.crop == (240, 320)
    (tmp_path / "own.yaml").write_text("data: {crop: [64, 96]}")
    assert parser.parse_args(["--config", str(tmp_path / "own.yaml")]).data.crop == (64, 96)
    for name, message in (("camvid/smal", "did you mean camvid/small?"), ("xyz", "choose from any_budget/depth16")):
        with pytest.raises(SystemExit):
            parser.parse_args(["--config", name])
        assert message in capsys.readouterr().err


def test_a_preset_on_top_of_a_base(parser):
    """camvid/dynamic_a is dynamic_a on top of camvid/base."""
    both, one = (
        parser.parse_args(with_configs(files)) for files in (("camvid/base", "dynamic_a"), ("camvid/dynamic_a",))
    )
    for name in ("model", "data", "recipe", "gate_budget"):
        assert one[name] == both[name], name


@pytest.mark.parametrize(
    "words, message",
    [
        (["--recipe.iterations", "ten"], "--recipe.iterations is ten: it must be a whole number"),
        (["--data.flip", "maybe"], "--data.flip is maybe: it must be true or false"),
        (["--data.scales", "x"], "--data.scales is x: it must be a list"),
        (["--data.crop", "64"], "--data.crop is 64: it must be two numbers"),
        (["--recipe.precision", "3"], "--recipe.precision is 3: it must be one of 32-true, bf16-mixed, auto"),
        (["--max_steps", "3"], "did you mean recipe.iterations?"),
        (["--config", ".gitignore"], "--config .gitignore has no sections"),
    ],
)
def test_wrong_values(words, message, parser, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--data.crop", "64x96"], ["--data.crop=64x96"], ["--data.crop=[64,96]"]])
def test_sizes_in_both_forms(words, parser):
    assert parser.parse_args(words).data.crop == (64, 96)


@pytest.mark.parametrize("command, most", [("train", 16), ("evaluate", 16)])
def test_help_for_people(command, most, capsys):
    """Few lines, and every option in them exists; all keys with --help-all, each of the configuration explained."""
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main([command, word])
    short, everything = capsys.readouterr().out.split("--help-all\n", 1)
    assert len(short.splitlines()) <= most and max(map(len, short.splitlines())) <= 120
    for option in re.findall(r"^ +(--[\w.]+)", short, re.MULTILINE):
        assert option in everything
    assert "of the training images, evenly spread" in " ".join(everything.split())


def test_files_of_earlier_runs_may_have_keys_that_are_gone(tmp_path, capsys):
    """If they ask for nothing; otherwise the key is named."""
    parser, file = config_parser("train"), tmp_path / "config.yaml"
    file.write_text("recipe: {dice: 0.0, hard_pixels: 1.0, teacher: null, teacher_weight: 1.0, lr: 0.3}\n")
    assert parser.parse_args(["--config", str(file)]).recipe.lr == 0.3
    file.write_text("recipe: {dice: 0.5, lr: 0.3}\n")
    with pytest.raises(SystemExit):
        parser.parse_args(["--config", str(file)])
    assert "there is no recipe.dice any more: leave it out" in capsys.readouterr().err
