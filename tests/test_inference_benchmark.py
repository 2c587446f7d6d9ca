"""The benchmark of inference: what it writes."""

import json
from pathlib import Path

import pytest

import inference
import inference_methods as methods
import inference_processes as processes
import inference_tables as tables
from pictures import noise, save
from routeseg.space import RoutingSpace

pytest.importorskip("onnx", reason="the extra routeseg[onnx]")
pytest.importorskip("onnxruntime", reason="the extra routeseg[onnx]")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What a whole run writes, of a tiny network."""
    folder = tmp_path_factory.mktemp("inference")
    camvid = tiny_camvid(folder / "camvid")
    words = "--size 32x64 --depth 3 --channels 4 --classes 5 --batches 1 2 --threads 1 --seconds 0 --images 2".split()
    words += ["--memory-size", "256x512", "--camvid", str(camvid), "--output", str(folder / "a.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "PRODUCT_SIZE", 64)
        patch.setattr(methods, "PAUSE_S", 0.0)
        patch.setattr(processes, "STARTS", 1)
        patch.setattr(processes, "precisions", lambda device: ["float32"])  # a process for each
        patch.setitem(inference.DRAWS, "skipping", 2)
        inference.main(words)
    return json.loads((folder / "a.json").read_text())


def tiny_camvid(root: Path) -> Path:
    """Noise and labels, as CamVid lies on a disk."""
    for split in ("train", "val"):
        for number in range(3):
            save(root / split / f"{number}.png", noise(48, 64, number))
            save(root / f"{split}annot" / f"{number}.png", noise(48, 64, number)[..., 0] % 12)
    return root


def test_a_whole_run(facts):
    assert {"machine", "date", "versions", "network", "threads", "seed"} <= set(facts)
    assert facts["versions"].keys() >= {"onnxruntime"} and facts["network"] == {"depth": 3, "channels": 4, "classes": 5}
    assert set(inference.SECTIONS) <= set(facts)
    one, two = facts["latency"]["32x64"]["1"], facts["latency"]["32x64"]["2"]
    engines = [f"engine {precision}, gates half open" for precision in methods.precisions("cpu")]
    for name in ("plain", "eager, all open", "engine float32, 50 % (2)", *engines):
        assert one[name]["median_ms"] >= one[name]["min_ms"] > 0 and one[name]["bound_ms"] > 0, name
    assert one["static, ONNX Runtime"]["load_s"] > 0
    assert two["static, ONNX Runtime"]["bound_ms"] == pytest.approx(
        2 * one["static, ONNX Runtime"]["product_gmacs"] * two["product float32"]["min_ms"] / (64**3 / 1e9)
    )
    assert one["plain"]["gmacs"] > one["engine float32, all open"]["gmacs"] > one["engine float32, 25 % (1)"]["gmacs"]
    assert len(facts["skipping"]["32x64"]["float32"]["routes"]) == 2 + 2 * len(inference.SHARES)
    batch = facts["batches"]["32x64"]["2"]["float32"]
    assert batch["ratio"] == pytest.approx(batch["median_ms"] / batch["sum_median_ms"])
    worst = facts["equality"]["worst"]
    assert worst["eager float32"] < 1e-4 and worst["engine float32"] < 1e-4
    assert worst.get("engine bfloat16", 0.0) < 0.2
    assert 0 < facts["equality"]["random"]["engine float32"]["gates"]["open"] < len(RoutingSpace(3, 4).edges)
    trained = facts["equality"]["trained"]
    assert trained["dense"]["same_labels"] == 1.0 == trained["dense"]["same_route"] and trained["dense"]["images"] == 3
    assert trained["engine float32"]["same_labels"] > 0.999 and trained["engine float32"]["gates_max"] < 1e-3
    assert len(facts["real"]["methods"]["plain"]["images"]) == 2
    assert facts["memory"]["methods"]["plain"]["peak_mib"] > 0
    assert all(0.1 < row["min_s"] <= row["median_s"] for row in facts["startup"].values())


def test_tables(facts):
    made = tables.tables(facts)
    sized = {
        "latency 32x64, batch 1",
        "latency 32x64, batch 2",
        "export 32x64",
        "summary 32x64",
        "skipping 32x64",
        "batches 32x64",
    }
    assert set(made) == sized | {"equality, random", "equality, trained", "real", "memory", "startup"}
    for table in made.values():
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
