"""What parts run on a route, counted by hand and by the kernels' clocks; predictions; the command and its mistakes."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import routeseg
from conftest import run, scenes_checkpoint, spread_gates
from routeseg import DynamicRoutingNetwork, Route, RoutingSpace
from routeseg.config import NetworkConfig
from routeseg.cost.latency import PARTS, LatencyTable, by_part, network_shape, node_counts, route_counts
from routeseg.cost.macs import model_cost
from routeseg.engine import SkipEngine
from routeseg.engine.compiled import STEPS, is_compiled
from routeseg.engine.profiling import profile
from routeseg.model.request import Request

needs_kernels = pytest.mark.skipif(not is_compiled(torch.float32), reason="no compiled kernels here")
SIZE = (64, 96)


def invented(model: DynamicRoutingNetwork) -> LatencyTable:
    """A table whose times are powers of two, so that a sum tells its parts."""
    scales = model.space.num_scales
    times = 2.0 ** np.arange(scales * len(PARTS)).reshape(scales, len(PARTS))
    return LatencyTable(SIZE, "cpu", "float32", network_shape(model.config), {"stem": 0.25, "decoder": 0.5}, times)


def test_counts_by_hand():
    """(0,0) drops its cell; (1,0) keeps and sends down; (2,0) keeps, (2,1) sends up; (3,0) sums both."""
    route = Route(RoutingSpace(3, 2), [(1, 0, 1), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
    shape = network_shape(NetworkConfig(depth=3, num_scales=2))
    forced, gated = (route_counts(shape, route, gates) for gates in (False, True))
    expected = np.zeros((4, 2, len(PARTS)))
    expected[1, 0] = (0, 1, 0, 1, 0, 0, 0, 0)
    expected[2, 0] = (0, 1, 0, 0, 0, 0, 0, 0)  # a single map of weight 1 needs no sum
    expected[2, 1] = (0, 1, 1, 0, 0, 0, 0, 0)
    expected[3, 0] = (0, 0, 0, 0, 1, 1, 1, 0)
    assert (forced == expected).all()
    expected[[0, 1, 2, 2, 3], [0, 0, 0, 1, 0], 0] = 1  # every node that is reached asks its gate
    expected[2, :, 4:6] = 1  # an activation is below 1: the map is multiplied
    assert (gated == expected).all()


def test_counts_with_a_backbone():
    """A stage runs with the path down the diagonal, and what it sends arrives beside it; not with other paths down."""
    route = Route(RoutingSpace(3, 2), [(0, 0, 1), (0, 0, 2), (1, 0, 1), (1, 0, 2), (1, 1, 1), (2, 1, 0)])
    shapes = [
        network_shape(NetworkConfig(depth=3, num_scales=2, backbone=name)) for name in (None, "efficientnet_lite0")
    ]
    without, with_backbone = (route_counts(shape, route, False) for shape in shapes)
    expected = without.copy()
    expected[0, 0, PARTS.index("stage")] = 1
    expected[1, 1, [PARTS.index("sum"), PARTS.index("arrival")]] = 1, 2
    assert (with_backbone == expected).all()


@needs_kernels
@pytest.mark.parametrize("zeros_arrive", [False, True])
def test_counts_are_what_the_kernels_run(zeros_arrive):
    model = spread_gates(
        DynamicRoutingNetwork(num_classes=5, depth=6, base_channels=16, stem_channels=8, zeros_arrive=zeros_arrive)
    ).eval()
    engine = SkipEngine(model)
    for seed in range(5):
        images = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
        seconds = np.zeros(7 * 4 * len(STEPS) + 2)
        gates = engine.forward(images, Request.of(model.config, 1), seconds).gates
        counts = node_counts(network_shape(model.config), gates[0].numpy(), True)
        ran = seconds[:-2].reshape(7, 4, len(STEPS)) > 0
        assert 0 < counts[..., 0].sum() < 7 * 4
        assert (ran[..., 1:5] == (counts[..., :4] > 0)).all()  # gate, cell, up, down
        assert not ran[..., 5].any()  # no backbone


def test_latency_is_the_sum_of_what_runs(tiny_network):
    table = invented(tiny_network)
    nothing, whole = Route(table.space), Route.all_open(table.space)
    assert table.of_route(nothing) == 0.75
    reached = (tiny_network.space.depth + 1) * table.part_ms[0, 0]  # the stem's features pass, and gates of scale 0 ask
    assert table.of_route(nothing, gates=True) == 0.75 + reached
    counts = route_counts(table.network, whole, True).sum(0)
    assert counts[:, 1].tolist() == [5, 4, 3, 2] and counts[:, 2].tolist() == [0, 3, 2, 1]
    assert table.of_route(whole, gates=True) == 0.75 + (counts * table.part_ms).sum()
    half = Route(table.space, table.space.edges[::2]).pruned()
    gates = 0.5 * np.stack([route.to_gates() for route in (nothing, half, whole)])
    times = table.of_gates(torch.from_numpy(gates))
    assert times.tolist() == [table.of_route(route, gates=True) for route in (nothing, half, whole)]
    assert times[0] < times[1] < times[2] and table.of_gates(gates[1]) == times[1]
    with pytest.raises(ValueError, match="latency table is for"):
        table.of_route(Route(RoutingSpace(5)))
    with pytest.raises(ValueError, match="gates have shape"):
        table.of_gates(np.zeros((1, 6, 4, 3)))


def test_parts_add_up_to_cost_and_latency(tiny_network):
    table, cost = invented(tiny_network), model_cost(tiny_network, SIZE)
    *rows, total = by_part(table, cost)
    assert total["gmacs"] == pytest.approx(cost.full / 1e9)
    assert total["ms"] == pytest.approx(table.of_route(Route.all_open(table.space), gates=True))
    assert total["ms"] == pytest.approx(sum(row["ms"] for row in rows))


@pytest.mark.parametrize("backend", [pytest.param("kernels", marks=needs_kernels), "eager"])
def test_profile(backend):
    """What is timed, and that the network stays as it is."""
    model = DynamicRoutingNetwork(num_classes=5, depth=6, base_channels=8, stem_channels=8).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    steps: list[None] = []
    table = profile(model, SIZE, routes=3, repeats=1, backend=backend, step=lambda: steps.append(None))
    assert len(steps) == 40 + 3 + 2
    assert table.facts["how"] == ("clocked" if backend == "kernels" else "fitted")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    rows = table.facts["test"]["routes"]
    assert len(rows) == 3 and all(row["predicted_ms"] > 0 and row["measured_ms"] > 0 for row in rows)
    if backend == "kernels":
        assert (
            (table.part_ms[:, :2] > 0).all() and (table.part_ms[1:, 2] > 0).all() and (table.part_ms[:-1, 3] > 0).all()
        )


def test_profile_of_a_static_network():
    model = DynamicRoutingNetwork(
        num_classes=5, depth=6, base_channels=8, stem_channels=8, gate="fixed", route="fcn-32s"
    ).eval()
    table = profile(model, SIZE, routes=3, repeats=1)
    assert table.network["route"] == [list(edge) for edge in model.route.named_edges]
    assert not any(row["gates"] for row in table.facts["test"]["routes"])
    assert table.of_route(model.route, gates=True) == table.of_route(model.route) > table.of_route(Route(table.space))


def test_file(tmp_path, tiny_network):
    table, file = invented(tiny_network), tmp_path / "table.json"
    table.write(file)
    read = LatencyTable.read(file)
    assert read.as_dict() == table.as_dict() and read.fingerprint == table.fingerprint
    read.check(tiny_network.config, file)
    wider = DynamicRoutingNetwork(num_classes=5, depth=4, base_channels=16, stem_channels=8)
    with pytest.raises(ValueError, match="another network: base_channels is 8 there, 16 here"):
        read.check(wider.config, file)
    data = json.loads(file.read_text())
    for damage in (
        {"fixed_ms": {"stem": -1}},
        {"fixed_ms": None},
        {"size": [64]},
        {"scales_ms": data["scales_ms"][:2]},
        {"fingerprint": "0" * 16},
        {"format": 7},
        {"network": {}},
    ):
        file.write_text(json.dumps(data | damage))
        with pytest.raises(ValueError, match=re.escape(str(file))):
            LatencyTable.read(file)
    for text in ("{", "[]", "\xff", json.dumps({key: value for key, value in data.items() if key != "scales_ms"})):
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match="routeseg profile"):
            LatencyTable.read(file)


def test_command(tmp_path, capsys):
    checkpoint = scenes_checkpoint(tmp_path / "net")
    route = tmp_path / "route.json"
    route.write_text(Route(RoutingSpace(3), [(0, 0, 1), (1, 0, 2)]).to_json())
    words = ["profile", checkpoint, "--size=64x96", "--routes=4", "--repeats=2"]
    code, out, err = run([*words, f"--json={tmp_path / 'result.json'}"], capsys)
    assert code == 0, err
    file = tmp_path / "net" / "latency_cpu_64x96_float32.json"
    assert "cells" in out and "ms per GMAC" in out and "4 random routes" in out
    stored = json.loads(file.read_text())
    assert stored["machine"]["threads"] == 1 and stored["command"][:2] == ["profile", checkpoint]
    assert len(stored["test"]["routes"]) == 4 and LatencyTable.read(file).name == file.stem
    assert json.loads((tmp_path / "result.json").read_text()) == stored
    table = LatencyTable.read(file)
    code, out, _ = run(["latency", file], capsys)
    whole_ms = table.of_route(Route.all_open(table.space), gates=True)
    assert code == 0 and f"everything open, with gates: {whole_ms:.2f} ms predicted\n" in out
    found = tmp_path / "found.json"
    words = ["latency", file, f"--route={route}", f"--json={found}"]
    code, predicted, _ = run(words, capsys)
    times = [table.of_route(Route.from_json(route.read_text()), gates) for gates in (False, True)]
    assert code == 0 and "measured" not in predicted
    for kind, ms in zip(("without gates", "with gates"), times, strict=True):
        assert f"{route}, {kind}: {ms:.2f} ms predicted\n" in predicted
    code, out, _ = run([*words, f"--measure={checkpoint}", "--repeats=2"], capsys)
    assert code == 0 and out.count(" ms predicted, ") == 2 and out.count(" measured\n") == 2
    rows = json.loads(found.read_text())["route_ms"]
    assert [row["predicted_ms"] for row in rows] == times and all(row["measured_ms"] > 0 for row in rows)


def test_latency_of_a_static_network(tmp_path, capsys):
    """Everything that it has open is its own route, and it has no gates."""
    model = DynamicRoutingNetwork(
        num_classes=5, depth=6, base_channels=8, stem_channels=8, gate="fixed", route="fcn-32s"
    )
    table = invented(model)
    table.write(tmp_path / "table.json")
    code, out, _ = run(["latency", tmp_path / "table.json"], capsys)
    assert code == 0 and out == f"everything open, without gates: {table.of_route(model.route):.2f} ms predicted\n"
    code, _, err = run(["latency", tmp_path / "table.json", "--route=hrnet-v2"], capsys)
    assert code == 2 and "hrnet-v2" in err and err.count("\n") == 1


def test_command_without_checkpoint(tmp_path, capsys):
    words = ["profile", "--model.depth=3", "--model.base_channels=8", "--model.stem_channels=8", "--size=64x64"]
    code, _, err = run([*words, "--routes=1", "--repeats=1", f"--output={tmp_path / 'made'}"], capsys)
    assert code == 0, err
    table = LatencyTable.read(tmp_path / "made" / "latency_cpu_64x64_float32.json")
    assert table.network["depth"] == 3 and table.network["num_classes"] == 19


def test_command_mistakes(tmp_path, tiny_network, capsys):
    checkpoint = scenes_checkpoint(tmp_path / "net")
    other, damaged, in_the_way = tmp_path / "other.json", tmp_path / "damaged.json", tmp_path / "file"
    invented(tiny_network).write(other)
    table, own = invented(routeseg.load(checkpoint)), tmp_path / "own.json"
    table.write(own)
    table.facts["machine"] = {"threads": 64}
    table.write(tmp_path / "threads.json")
    replace(table, device="cuda:7").write(tmp_path / "cuda.json")
    (tmp_path / "deeper.json").write_text(Route(RoutingSpace(5)).to_json())
    damaged.write_text(other.read_text()[:100])
    in_the_way.touch()
    route = tmp_path / "route.json"
    route.write_text(Route(RoutingSpace(3)).to_json())
    for words, expected in (
        (["--size=64"], "HEIGHTxWIDTH"),
        (["--size=16x64"], "at least 32"),
        (["--precision=float8"], "choose one of auto, float32"),
        (["--device=abacus"], "--device abacus"),
        (["--routes=0"], "--routes is 0"),
        (["--repeats=0"], "--repeats is 0"),
        ([f"--output={in_the_way / 'x'}"], "--output"),
        (["--model.depth=3"], "--model.depth describes a network without a checkpoint"),
        (["--num_classes=3"], "--num_classes describes a network without a checkpoint"),
        (["--data.name=camvid"], "does not take --data.name: leave it out"),
        (["--recipe.seed=3"], "does not take --recipe.seed: give --seed instead"),
    ):
        code, _, err = run(["profile", checkpoint, "--size=64x96", "--repeats=1", "--routes=1", *words], capsys)
        assert code == 2 and expected in err and err.count("\n") == 1, (words, err)
    assert not list((tmp_path / "net").glob("latency*"))
    measure = [f"--route={route}", f"--measure={checkpoint}"]
    for words, expected in (
        ([own, "--route=v-net"], "no such file, and no route of this name"),
        ([own, f"--route={tmp_path / 'deeper.json'}"], "deeper.json: the route is drawn in"),
        ([own, "--repeats=3"], "--repeats only applies to --measure"),
        ([own, *measure, "--repeats=0"], "--repeats is 0"),
        ([own, f"--measure={tmp_path / 'nothing'}"], "no checkpoint folder"),
        ([own, f"--json={in_the_way / 'x.json'}"], "--json"),
        ([tmp_path / "threads.json", *measure], "measured with 64 threads"),
        ([tmp_path / "cuda.json", *measure], "measured on cuda:7"),
        ([other, f"--measure={checkpoint}"], "another network: num_classes is 5 there, 10 here"),
        ([damaged, f"--route={route}"], "damaged"),
        ([tmp_path / "nothing.json"], "no latency table"),
    ):
        code, _, err = run(["latency", *words], capsys)
        assert code == 2 and expected in err and err.count("\n") == 1, (words, err)
