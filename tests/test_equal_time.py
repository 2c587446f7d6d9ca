"""Networks that one would take instead: they learn by the same recipe, and are scored beside ours."""

import json

import pytest
import torch
from torch.nn import functional as F

import baselines
import equal_time
import result_tables
from routeseg.cli import main as routeseg
from routeseg.data.config import DataConfig
from routeseg.training.recipe import Recipe

DATA = DataConfig(name="scenes", train_share=0.02, crop=[64, 96], batch_size=2, workers=0)
RECIPE = Recipe(iterations=3, warmup_steps=0, optimizer="adamw", lr=0.01, precise_bn_batches=2, class_offsets=True)


def test_fast_scnn_learns_by_the_recipe():
    before = baselines.Baseline("fast-scnn", 6)
    after = baselines.train("fast-scnn", DATA, RECIPE)
    assert not after.training
    image = torch.rand(1, 3, 50, 70)
    with torch.no_grad():
        logits = after(image)
    classes = logits.shape[1]
    assert logits.shape == (1, classes, 50, 70)
    assert all(torch.isfinite(tensor).all() for tensor in after.state_dict().values())
    assert not torch.equal(next(before.parameters()), next(after.parameters()))
    assert after.offsets.shape == (classes, 1, 1) and abs(float(after.offsets.sum())) < 1e-4
    shifted = logits - after.offsets
    after.offsets.zero_()
    with torch.no_grad():
        assert torch.allclose(after(image), shifted, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 2), (3, 7), (12, 15)])
def test_pooling_into_parts_is_adaptive_pooling(size):
    x = torch.randn(2, 32, *size)
    pool = baselines.PyramidPooling(32).eval()
    with torch.no_grad():
        parts = [part(F.adaptive_avg_pool2d(x, bins)) for bins, part in zip((1, 2, 3, 6), pool.parts, strict=True)]
        expected = pool.merge(torch.cat([x, *(baselines.resized(part, x) for part in parts)], 1))
        assert torch.allclose(pool(x), expected, atol=1e-5)


def test_their_macs_grow_with_the_padded_image():
    assert baselines.macs("fast-scnn", 6, 64, 64) == baselines.macs("fast-scnn", 6, 33, 64)
    assert baselines.macs("fast-scnn", 6, 128, 64) == pytest.approx(
        2 * baselines.macs("fast-scnn", 6, 64, 64), rel=0.05
    )


def test_onnx_runtime_gives_the_labels_of_folded_networks():
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    run = baselines.in_onnx_runtime("fast-scnn", 6, 64, 96, 1)
    torch.manual_seed(0)
    model = baselines.Baseline("fast-scnn", 6).eval()
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(image).argmax(1)
    (labels,) = run(image.numpy())
    assert (torch.from_numpy(labels) == expected).float().mean() > 0.99


@pytest.mark.slow
def test_all_are_scored_in_all_sizes(tmp_path):
    data = str(tmp_path / "data")
    assert routeseg(["make-data", "scenes", data, "--train=8", "--val=10", "--size=[64,96]"]) == 0
    experiment = tmp_path / "small.yaml"
    experiment.write_text(
        """
data: folder
sizes: [0.5, 1.0]
train: [--config, small, --data.name, folder, --data.crop, "[64,96]", --data.batch_size, 2, --recipe.precision, 32-true,
        --recipe.pretrained, "false", --recipe.precise_bn_batches, 2, --recipe.warmup_steps, 0, --model.sizes, "[1]"]
networks:
  any-budget: {recipe.iterations: 2}
  diagonal: {model.exits: null, model.place: null, model.sizes: null, seeds: [1], recipe.iterations: 2}
  fast: {baseline: fast-scnn, recipe.iterations: 3}
"""
    )
    output = tmp_path / "found.json"
    words = [str(experiment), "--data.root", data, "--seeds", "0,1", "--runs", str(tmp_path / "runs")]
    assert equal_time.main([*words, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert {name: len(runs) for name, runs in found["networks"].items()} == {"any-budget": 2, "diagonal": 1, "fast": 2}
    for runs in found["networks"].values():
        assert [one["size"] for one in runs[0]["sizes"]] == list(equal_time.SIZES)
        assert all(0 <= one["miou"] <= 1 and one["cost"] > 0 for one in runs[0]["sizes"])
    assert [row["asked"] for row in found["rows"]["any-budget"]] == list(equal_time.BUDGETS)
    ms = {f"budget {100 * asked:.0f}%": {"ms": 10 * asked} for asked in result_tables.ALTERNATIVES}
    table = result_tables.alternatives([found, {"sizes": {"360x480": ms | {"fast-scnn": {"ms": 7}}}}], "any-budget")
    assert "| fast |" in table and table.splitlines()[-1].endswith("| 7 |")
    without = result_tables.alternatives([found], "")
    assert "| fast |" in without and "ms" not in without and "`--budget" not in without
