"""The benchmark of small batches: what it runs, going on where it was interrupted, and what it calls diverged."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from routeseg.cli.common import config_parser

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("small_batch", ROOT / "benchmarks" / "small_batch.py")
small_batch = sys.modules["small_batch"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small_batch)

NAMES = "scaled-2,bare-2 x64"


def words(tmp_path, *more):
    return [
        "--variants", NAMES, "--seeds", "1", "--pictures", "8", "--size", "32", "32", "--depth", "3", "--channels", "4",
        "--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "small.json"), *more,
    ]  # fmt: skip


def test_runs_once_and_reports(tmp_path, capsys, monkeypatch):
    """A variant that diverges is a result, not a failure; finished runs are not done again."""

    def start(name, seed, folder, command):
        found = small_batch.main([*command, "--one", name, str(seed)])
        started.append(name)
        return type("Done", (), {"poll": lambda self: found, "returncode": found, "kill": None, "wait": None})()

    started = []
    monkeypatch.setattr(small_batch, "start", start)
    monkeypatch.setattr(small_batch, "NORM_PICTURES", 8)
    monkeypatch.setattr(
        small_batch, "variants", lambda: {"scaled-2": small_batch.Variant(2, 0.0125), "bare-2 x64": BAD}
    )
    assert small_batch.main(words(tmp_path)) == 0
    assert started == NAMES.split(",")
    facts = json.loads((tmp_path / "small.json").read_text())
    good, bad = facts["rows"]
    assert {"machine", "date", "versions", "settings", "command"} <= set(facts) and not facts["missing"]
    assert not good["runs"][0]["diverged"] and 0 < good["runs"][0]["final_loss"] < facts["guess_loss"] + 0.5
    assert good["runs"][0]["steps"] == 4 and 0 <= good["runs"][0]["miou"] <= 1
    assert bad["runs"][0]["diverged"] and "nan or infinite at step" in bad["runs"][0]["stopped"]
    assert "| bare-2 x64 | 2 | 1e+30 | 4 | 1 of 1 | - | " in capsys.readouterr().out
    assert small_batch.main(words(tmp_path)) == 0 and len(started) == 2
    assert json.loads((tmp_path / "small.json").read_text())["rows"] == facts["rows"]
    assert small_batch.main(words(tmp_path, "--pictures", "10")) == 2
    assert "other settings" in capsys.readouterr().err


BAD = small_batch.Variant(2, 1e30, safe=False)


def test_the_variants_are_what_they_say(capsys, tmp_path):
    known = small_batch.variants()
    assert known["scaled-2"].lr == 0.0125 and known["scaled-1"].lr == 0.00625 and known["bare-1"].lr == 0.05
    assert known["accumulated-2"].pictures == known["reference"].pictures == 8
    args = type("Args", (), {"pictures": 1200, "size": (96, 128), "depth": 16, "channels": 16})
    steps = {name: small_batch.settings_of(v, 0, args)["recipe"]["iterations"] for name, v in known.items()}
    assert all(steps[name] * variant.pictures == 1200 for name, variant in known.items())
    bare, scaled = (small_batch.settings_of(known[name], 0, args)["recipe"] for name in ("bare-2", "scaled-2"))
    assert (bare["clip_norm"], bare["warmup_steps"]) == (math.inf, 0)
    assert (scaled["clip_norm"], scaled["warmup_steps"]) == (5.0, 60)
    assert small_batch.main(words(tmp_path, "--variants", "none")) == 2
    assert "choose from reference" in capsys.readouterr().err


def test_the_shipped_recipe_for_one_gpu():
    """The rule of docs/training.md: 0.05 for 8 images in a step."""
    files = ["cityscapes/base", "dynamic_a", "cityscapes/one_gpu"]
    args = config_parser("train").parse_args([word for file in files for word in ("--config", str(file))])
    recipe, images = args.recipe, args.data.batch_size * args.recipe.accumulate
    assert recipe.lr == pytest.approx(0.05 * images / 8) and args.data.batch_size <= 3
    assert recipe.iterations * images == 190_000 * 8 and recipe.warmup_steps > 1000
