"""The benchmark of inference: its routes, its plain forward, and what it writes."""

import json
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import inference
import inference_methods as methods
import inference_processes as processes
import inference_tables as tables
from conftest import spread_gates
from pictures import noise, save
from routeseg import DynamicRoutingNetwork, Route, SkipEngine
from routeseg.cost.macs import model_cost
from routeseg.space import RoutingSpace

pytest.importorskip("onnx", reason="the extra routeseg[onnx]")
pytest.importorskip("onnxruntime", reason="the extra routeseg[onnx]")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("space", [RoutingSpace(), RoutingSpace(5, 3), RoutingSpace(3, 1)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_drawn_routes(space, share):
    """So many nodes run, each with all of its edges, and all of them are fed."""
    drawn = [methods.draw_route(space, share, seed) for seed in range(6)]
    for route in drawn:
        assert len(route.check().nodes) == round(share * len(space.nodes))
        assert all((*node, d) in route for node in route.nodes for d in space.directions(*node))
    assert drawn[0] == methods.draw_route(space, share, 0)
    assert len(set(drawn)) == 1 if share in (0, 1) else len(set(drawn)) > 1


@pytest.mark.parametrize("zeros_arrive", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (37, 50)])
def test_plain_forward_is_the_dense_one(size, zeros_arrive):
    """But for its memory format, and that it computes what is closed."""
    model = DynamicRoutingNetwork(
        num_classes=5, depth=4, base_channels=8, stem_channels=8, zeros_arrive=zeros_arrive, small_gate=True
    )
    model, images = spread_gates(model).eval(), torch.rand(2, 3, *size)
    computed = []
    for node in model.nodes.values():
        node.gate.score.bias.data.fill_(1.0)
        for part in (node.cell, *node.transforms.values()):
            part.register_forward_hook(lambda *_: computed.append(1))
    with torch.inference_mode():
        plain = methods.plain_forward(model, images)
        everything = len(model.space.nodes) + len(model.space.edges)
        assert len(computed) == everything
        expected = model(images)
    assert len(computed) < 2 * everything and 0.1 < float((expected.gates > 0).sum()) / (2 * len(model.space.edges)) < 1
    torch.testing.assert_close(plain.gates, expected.gates, atol=1e-5, rtol=0)
    torch.testing.assert_close(plain.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_gates_that_open_a_route():
    model = methods.random_network(depth=4, channels=8, classes=5, seed=0)
    route, size = methods.draw_route(model.space, 0.5, 0), (64, 96)
    images = methods.random_images(1, size, 0)
    gates = SkipEngine(methods.gated_to(model, route))(images).gates
    assert Route.from_gates(model.space, gates[0]) == route
    assert (SkipEngine(model)(images).gates[0].numpy() > 0).sum() == len(model.space.edges)  # as it is drawn: all open
    facts, table = methods.cost_facts(model, size, route, gated=True), model_cost(model, size)
    assert facts["gmacs"] * 1e9 == pytest.approx(float(table.of_gates(gates)[0]))
    assert 0 < facts["product_gmacs"] < facts["gmacs"]
    shares = [methods.cost_facts(model, size, r)["open_share"] for r in (Route(model.space), route, model.route)]
    assert shares[0] == 0 and 0 < shares[1] < 1 and shares[2] == 1


def test_methods_take_turns():
    """Every method once a round, in an order that changes; the time is that of the call."""
    calls = []

    def method(name, seconds):
        return methods.Method(name, lambda: (calls.append(name), time.sleep(seconds)), {"gmacs": seconds})

    found = methods.alternate([method("a", 0.004), method("b", 0.0), method("c", 0.0)], seconds=0.0)
    rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert len(rounds) == 1 + methods.MIN_ROUNDS and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert found["a"]["min_ms"] >= 4 > found["b"]["min_ms"] and found["a"]["rounds"] == methods.MIN_ROUNDS
    assert found["a"]["min_ms"] <= found["a"]["median_ms"] and found["a"]["gmacs"] == 0.004


def test_the_bound_of_skipping():
    rows = {"all open": (30.0, 1.0), "0 %": (10.0, 0.0), "half": (20.0, 0.5), "slow": (24.0, 0.5)}
    times = {
        f"float32, {name}": {"median_ms": ms, "min_ms": ms / 2, "open_share": f, "gmacs": 1 + f}
        for name, (ms, f) in rows.items()
    }
    found = inference.against_bound(times, "float32", list(rows))
    assert found["routes"]["half"]["ratio"] == pytest.approx(1) and found["worst_ratio"] == pytest.approx(1.2)
    assert found["worst_min_ratio"] == pytest.approx(1.2) and 0.9 < found["correlation"] < 1


@pytest.fixture(scope="module")
def facts(tmp_path_factory, one_thread):
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_measured_where_it_is_not_emulated(monkeypatch, fast):
    """Emulated, one product of its size would take a minute."""
    known = ["float32", "bfloat16"] if fast else ["float32"]
    ran: list[str] = []

    def alternate(some, *_):
        ran.extend(method.name for method in some)
        return {}

    monkeypatch.setattr(methods.SkipEngine, "__init__", engine_of(known))
    monkeypatch.setattr(inference, "alternate", alternate)
    monkeypatch.setattr(methods, "PRODUCT_SIZE", 8)
    args = SimpleNamespace(device="cpu", seconds=0.0, seed=0, threads=1)
    inference.latency_of(methods.random_network(3, 4, 5, 0), (32, 64), 2, args)
    for kind in ("product {}", "engine {}, static", *(["static, OpenVINO {}"] * bool(find_spec("openvino")))):
        assert kind.format("float32") in ran and (kind.format("bfloat16") in ran) == fast


def engine_of(known):
    """What makes a SkipEngine of a machine that computes in these precisions."""
    made = SkipEngine.__init__

    def init(self, model, precision="float32", backend="auto"):
        made(self, model, "float32", backend)
        self.precision = precision if precision in known else "float32"

    return init


def test_mistakes(capsys, tmp_path):
    """Told before anything is measured."""
    for words, expected in (
        (["--camvid", str(tmp_path / "nowhere")], "nowhere"),
        (["--size", "big"], "invalid read_size value"),
    ):
        with pytest.raises(SystemExit) as stop:
            inference.main(words)
        assert stop.value.code == 2 and expected in capsys.readouterr().err


def test_without_camvid():
    args = type("Args", (), {"camvid": None})
    for found in (inference.real(args), inference.trained_equality(args)):
        assert "--camvid" in found["note"]
    assert "real" not in tables.tables({"real": {"note": inference.NO_CAMVID}})
