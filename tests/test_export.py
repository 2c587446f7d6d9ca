"""Exported files: outputs of the dense forward, one clear message for each mistake."""

from __future__ import annotations

import collections
import json
import pickle
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import routeseg
from conftest import run, scenes_checkpoint, spread_gates, with_exits
from routeseg import DynamicRoutingNetwork, Route
from routeseg.config import NetworkConfig
from routeseg.cost.macs import model_cost
from routeseg.description import NetworkDescription, describe
from routeseg.errors import NotExportable
from routeseg.model.choice import LossChoice
from routeseg.model.decoder import Decoder

onnx = pytest.importorskip("onnx", reason="the extra routeseg[onnx]")
ort = pytest.importorskip("onnxruntime", reason="the extra routeseg[onnx]")
from routeseg.export import build_onnx, export  # noqa: E402
from routeseg.export.metadata import COST_SIZE, cost_macs, metadata  # noqa: E402

ROOT = Path(__file__).parents[1]
SIZES = [(32, 64), (96, 160), (150, 33)]  # the coarsest maps: 1x2, 3x5, 5x2
TOLERANCE = 1e-4  # of the largest logit
ALWAYS = 1e3  # the bias of gates that are open whatever they see
OPERATIONS = ("sep_conv_3x3", "sep_conv_5x5", "identity")


def network(bias: float | None = 0.0, depth: int = 4, seed: int = 0, **options) -> DynamicRoutingNetwork:
    """Spread gates, moved by this bias; None: some paths are always open, the others always closed."""
    torch.manual_seed(seed)
    options = {"num_classes": 5, "base_channels": 8, "stem_channels": 8} | options
    model = spread_gates(DynamicRoutingNetwork(depth=depth, **options), seed).eval()
    torch.nn.init.normal_(model.decoder.predictor.bias)
    for node in model.nodes.values():
        if node.gate is not None:
            if bias is None:
                node.gate.score.weight.data.zero_()
                node.gate.score.bias.data.copy_(torch.randint(0, 2, node.gate.score.bias.shape) * 3.0 - 1.5)
            else:
                node.gate.score.bias.data.fill_(bias)
    return model


def session(model: onnx.ModelProto, profile: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def compare(run_file, model: DynamicRoutingNetwork, sizes=SIZES, batch: int = 1) -> list[torch.Tensor]:
    """The file gives the dense forward's logits and gates; the gates of each size."""
    seen = []
    for number, size in enumerate(sizes):
        torch.manual_seed(number)
        images = torch.rand(batch, 3, *size)
        logits, gates = run_file(images.numpy())
        with torch.no_grad():
            expected = model(images)
        assert logits.shape == tuple(expected.logits.shape) and gates.shape == tuple(expected.gates.shape)
        assert np.abs(logits - expected.logits.numpy()).max() <= TOLERANCE * float(expected.logits.abs().max())
        np.testing.assert_allclose(gates, expected.gates.numpy(), atol=TOLERANCE)
        assert ((gates > 0) == (expected.gates > 0).numpy()).all()
        seen.append(expected.gates)
    return seen


def with_ort(file: onnx.ModelProto):
    made = session(file)
    return lambda images: made.run(["logits", "gates"], {"images": images})


ROUTES = {
    "all open": Route.all_open,
    "u-net": routeseg.ARCHITECTURES["u-net"],
    "coarse alone": lambda space: Route(space, [(0, 0, 2), (1, 1, 2), (2, 2, 2)]),
    "stem alone": lambda space: Route(space, [(4, 0, 1)]),
}


@pytest.mark.parametrize("name", ROUTES)
def test_static(name):
    whole = network(depth=6 if name == "u-net" else 4, cell_operations=OPERATIONS, zeros_arrive=True)
    model = whole.specialize(ROUTES[name](whole.space))
    file = build_onnx(model)
    onnx.checker.check_model(file, full_check=True)
    compare(with_ort(file), model, batch=2)
    compare(with_ort(file), model, SIZES[:1])


def test_static_without_a_route():
    model = network(gate="fixed", num_scales=3)
    compare(with_ort(build_onnx(model)), model)


VARIANTS = {
    "plain": {},
    "operations": {"cell_operations": OPERATIONS},
    "no identity": {"cell_operations": ["sep_conv_5x5"]},
    "zeros arrive": {"zeros_arrive": True},
    "small gate": {"small_gate": True},
    "small gate, zeros arrive": {"small_gate": True, "zeros_arrive": True},
    "softmax": {"gate": "softmax"},
    "softmax, zeros arrive": {"gate": "softmax", "zeros_arrive": True, "small_gate": True},
    "one scale": {"num_scales": 1, "depth": 3},
    "two scales": {"num_scales": 2, "depth": 3, "small_gate": True, "zeros_arrive": True},
}


@pytest.mark.parametrize("bias", [ALWAYS, 0.0, -1.0, None, -ALWAYS])
@pytest.mark.parametrize("name", VARIANTS)
def test_with_gates(name, bias):
    model = network(bias, **VARIANTS[name])
    file = build_onnx(model)
    onnx.checker.check_model(file)
    for gates in compare(with_ort(file), model):
        if abs(bias or 0.0) == ALWAYS and not name.startswith("softmax"):
            assert ((gates[0] > 0).numpy() == (model.space.legal if bias == ALWAYS else False)).all()


def test_routes_of_different_seeds_and_what_they_reach():
    """Among them nodes that only zeros reach, and run on them; nodes that drop their cell; scales without a map."""
    kinds = collections.Counter()
    for seed in range(4):
        for zeros_arrive in (False, True):
            model = network(None, seed=seed, zeros_arrive=zeros_arrive)
            (gates,) = compare(with_ort(build_onnx(model)), model, [(64, 96)])
            is_open = gates[0].numpy() > 0
            runs = is_open.any(-1)
            reached = model.space.reached(gates[0].numpy(), zeros_arrive)
            kinds["on zeros"] += (runs & ~model.space.reached(gates[0].numpy())).sum()
            kinds["dropped"] += (reached & ~runs).sum()
            kinds["no map at the end"] += (~reached[-1]).sum()
    assert all(kinds[kind] > 0 for kind in ("on zeros", "dropped", "no map at the end")), kinds


NETWORKS = {
    "diagonal": {},
    "u-net": {"route": "u-net", "exits": [1, 3, 5], "depth": 8},
    "all edges, three scales": {"route": None, "num_scales": 3, "depth": 3, "exits": [0, 1]},
    "coarse alone": {
        "route": [(0, 0, "down"), (1, 1, "down"), (2, 2, "down"), (3, 3, "keep")],
        "depth": 3,
        "exits": [1],
    },
    "entropy": {"choice": "entropy"},
    "entropy, two scales": {"choice": "entropy", "num_scales": 2, "depth": 3, "route": None, "exits": [0]},
    "backbone": {"backbone": "efficientnet_lite0", "depth": 4, "exits": [0, 1, 2]},
}
PRICES = (-100.0, 0.0, 0.05, 0.1, 0.3, 0.6, 0.8, 1.0, 1.2, 1.4, 2.0, 100.0)
ANY_SIZES = [(33, 47), (64, 96), (150, 33), (97, 130)]


def exits_of(gates: np.ndarray) -> list[int]:
    """How many layers have an open path."""
    return gates.any((2, 3)).sum(1).tolist()


@pytest.mark.parametrize("name", NETWORKS)
def test_exits(name):
    """Images leave where the network has them leave, whatever the price, and have its logits."""
    model = with_exits((64, 96), **NETWORKS[name])
    file, left = build_onnx(model), set()
    onnx.checker.check_model(file, full_check=True)
    made = session(file)
    for number, size in enumerate(ANY_SIZES):
        torch.manual_seed(number)
        for price in PRICES:
            images = torch.rand(1, 3, *size) * torch.rand(1, 3, 1, 1)
            logits, gates = made.run(None, {"images": images.numpy(), "price": np.array(price, np.float32)})
            with torch.no_grad():
                expected = model(images, price=price)
            assert np.array_equal(gates, expected.gates.numpy())
            assert logits.shape == expected.logits.shape
            assert np.abs(logits - expected.logits.numpy()).max() <= TOLERANCE * float(expected.logits.abs().max())
            left |= {*exits_of(gates)}
    assert len(left) >= min(3, len(model.config.exits)), "images leave at several exits"


def graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """A graph, and those of its branches."""
    sides = [side for node in graph.node for side in node.attribute if side.g.node]
    inner = [side.g for side in sorted(sides, key=lambda side: side.name, reverse=True)]  # "then_branch" first
    return [graph, *(one for branch in inner for one in graphs(branch))]


def test_what_lies_behind_an_exit_is_in_a_branch():
    """As deep as the exits before it; each cell once, a decoder beside its exit."""
    model = with_exits((64, 96))
    found = graphs(build_onnx(model).graph)
    assert len(found) == 2 * len(model.exits.decoders) + 1
    assert [sum(node.op_type == "If" for node in graph.node) for graph in found] == [1, 0, 1, 0, 1, 0, 0]
    where = [{value.name for value in graph.initializer if "weight" in value.name} for graph in found]
    layers = [{int(name.split(".")[1][0]) for name in names if name.startswith("nodes.")} for names in where]
    assert layers == [{0}, set(), {1, 2}, set(), {3, 4}, set(), {5, 6}]
    assert [any("predictor" in name for name in names) for names in where] == [
        False,
        True,
        False,
        True,
        False,
        True,
        True,
    ]
    assert [any(name.startswith("stem") for name in names) for names in where] == [True] + [False] * 6


def test_a_price_that_is_none_runs_all():
    model = with_exits((64, 96))
    made, image = session(build_onnx(model)), np.random.default_rng(0).random((1, 3, 64, 96), np.float32)
    logits, gates = made.run(None, {"images": image, "price": np.array(np.nan, np.float32)})
    whole, all_open = made.run(None, {"images": image, "price": np.array(-100, np.float32)})
    assert np.array_equal(logits, whole) and np.array_equal(gates, all_open) and exits_of(gates) == [7]


@pytest.mark.parametrize("kind", ["static", "dense", "exits"])
@pytest.mark.parametrize("size", [(1, 1), (20, 100), (33, 47)])
def test_images_of_any_size(kind, size):
    """Right and below lies the mean pixel, as if a user had padded with it."""
    model = with_exits((64, 96)) if kind == "exits" else network()
    model = model.specialize(model.route).eval() if kind == "static" else model
    made, mean = session(build_onnx(model)), np.array(model.config.pixel_mean, np.float32)
    image = np.random.default_rng(0).random((1, 3, *size), np.float32)
    padded = np.tile(mean.reshape(1, 3, 1, 1), (1, 1, 64, 128))
    padded = padded[..., : 32 * -(-size[0] // 32), : 32 * -(-size[1] // 32)]
    padded[..., : size[0], : size[1]] = image
    price = {"price": np.zeros((), np.float32)} if kind == "exits" else {}
    logits, gates = made.run(None, {"images": image, **price})
    with torch.no_grad():
        expected = model(torch.from_numpy(padded))
    assert logits.shape == (1, 5, *size) and np.allclose(gates, expected.gates.numpy(), atol=TOLERANCE)
    assert np.allclose(logits, expected.logits[..., : size[0], : size[1]].numpy(), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "classes"), [("static", 5), ("dense", 5), ("exits", 5), ("exits", 300), ("static", 1)]
)
def test_labels(kind, classes):
    """The class with the first of the largest logits, and its softmax."""
    model = with_exits((64, 96), num_classes=classes) if kind == "exits" else network(num_classes=classes)
    model = model.specialize(model.route).eval() if kind == "static" else model
    made, batch = session(build_onnx(model, labels=True)), 2 if kind == "static" else 1
    assert [value.name for value in made.get_outputs()] == ["labels", "confidence", "gates"]
    images = np.random.default_rng(1).random((batch, 3, 50, 70), np.float32)
    price = {"price": np.array(0.6, np.float32)} if kind == "exits" else {}
    labels, confidence, gates = made.run(None, {"images": images, **price})
    logits, others = session(build_onnx(model)).run(None, {"images": images, **price})
    assert labels.dtype == (np.uint16 if classes > 256 else np.uint8) and confidence.dtype == np.float32
    assert (
        labels.shape == (batch, 50, 70) and np.array_equal(labels, logits.argmax(1)) and np.array_equal(gates, others)
    )
    assert np.allclose(confidence, torch.from_numpy(logits).softmax(1).amax(1).numpy(), atol=1e-5)
    assert kind != "exits" or len(np.unique(labels)) > 1


def test_what_no_file_holds(monkeypatch):
    model = with_exits((64, 96))
    monkeypatch.delattr(LossChoice, "onnx")
    with pytest.raises(NotExportable, match="the choice LossChoice has no export: give it a method `onnx`"):
        build_onnx(model)
    monkeypatch.delattr(Decoder, "onnx_glance")
    with pytest.raises(NotExportable, match="the head Decoder has no export of its glance"):
        build_onnx(with_exits((64, 96), choice="entropy"))
    model.exits.frequencies.zero_()
    with pytest.raises(ValueError, match="was not calibrated.*`routeseg calibrate`, or name an exit .*--route exit-0"):
        build_onnx(model)


# In a process of its own: OpenVINO's threads would stay, and end that of the tests that come later.
WITH_OPENVINO = """
import pickle, sys
import openvino

networks = {}
while sys.stdin.buffer.peek(1):
    file, inputs = pickle.load(sys.stdin.buffer)
    if file not in networks:
        networks[file] = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = networks[file](inputs)
    pickle.dump((result["logits"], result["gates"]), sys.stdout.buffer)
    sys.stdout.flush()
"""


@pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_openvino(tmp_path):
    gated = network(None, zeros_arrive=True)
    small = network(-1.0, small_gate=True, gate="softmax", num_scales=3)
    static = gated.specialize(Route.all_open(gated.space))
    exits, left, pipe = with_exits((64, 96)), set(), subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", WITH_OPENVINO], stdin=pipe, stdout=pipe) as process:
        for name, model in (("static", static), ("zeros", gated), ("small", small), ("exits", exits)):
            file = export(model, tmp_path / f"{name}.onnx")

            def with_openvino(images, file=file, **price):
                pickle.dump((str(file), {"images": images, **price}), process.stdin)
                process.stdin.flush()
                return pickle.load(process.stdout)

            if name != "exits":
                compare(with_openvino, model)
                continue
            for number, price in enumerate(PRICES):
                torch.manual_seed(number)
                image = torch.rand(1, 3, 50, 70)
                logits, gates = with_openvino(image.numpy(), price=np.array(price, np.float32))
                with torch.no_grad():
                    expected = model(image, price=price)
                assert np.array_equal(gates, expected.gates.numpy())
                assert np.abs(logits - expected.logits.numpy()).max() <= TOLERANCE * float(expected.logits.abs().max())
                left |= {*exits_of(gates)}
    assert len(left) >= 3


def test_metadata():
    gated = network(zeros_arrive=True, small_gate=True, class_names=list("abcde"))
    static = gated.specialize(Route(gated.space, [(0, 0, 1)]))
    for model, kind in ((gated, "dense"), (static, "static")):
        file = build_onnx(model)
        (entry,) = file.metadata_props
        data = json.loads(entry.value)
        assert entry.key == "routeseg" and data == json.loads(json.dumps(metadata(model, kind)))
        assert data["kind"] == kind and data["precision"] == "float32" and data["format"] == 3
        assert NetworkConfig.from_dict(data["config"]) == model.config and data["config"]["class_names"] == list(
            "abcde"
        )
        assert NetworkDescription.from_metadata(data).fingerprint == describe(model).fingerprint
        assert file.ir_version <= 10 and [(o.domain, o.version) for o in file.opset_import] == [("", 18)]
    assert metadata(gated, "dense")["config"]["route"] is None
    assert metadata(static, "static")["config"]["route"] == ((0, 0, "keep"),)


def test_cost_in_the_metadata_is_the_cost_table():
    model = network(None, zeros_arrive=True)
    with torch.no_grad():
        gates = model(torch.rand(1, 3, 32, 32)).gates[0].numpy()
    cost, total = cost_macs(model), 0.0
    for (layer, scale), reached in np.ndenumerate(model.space.reached(gates, model.config.zeros_arrive)):
        if reached:
            node, is_open = cost["nodes"][f"{layer}-{scale}"], gates[layer, scale] > 0
            total += node["gate"] + node["cell"] * is_open.any()
            total += sum(node[name] * flag for name, flag in zip(("up", "keep", "down"), is_open, strict=True))
    assert cost["fixed"] + total == pytest.approx(float(model_cost(model, COST_SIZE).of_gates(gates)))


@pytest.mark.parametrize("kind", ["static", "exits"])
def test_the_document_runs_a_file(kind, tmp_path, monkeypatch):
    """And its price halves the cost, as the table in the metadata says."""
    model = with_exits((64, 96))
    export(model if kind == "exits" else model.specialize(model.route), tmp_path / "net.onnx")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(block, found)
    assert found["labels"].shape == (360, 480)
    assert kind == "static" or float(found["feed"]["price"]) == pytest.approx(model.prices.look_up(0.5).price)


def test_weights_stand_once():
    model = network(base_channels=32, depth=6)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert weights < len(build_onnx(model).SerializeToString()) < 1.35 * weights + 1e6


def test_the_network_is_left_as_it_is():
    model = network().double().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    build_onnx(model)
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_command(tmp_path, capsys):
    checkpoint = scenes_checkpoint(tmp_path / "net")
    model = routeseg.load(checkpoint)
    code, out, _ = run(["export", checkpoint, tmp_path / "new" / "a.onnx"], capsys)
    assert (
        code == 0
        and "a network with gates, all paths computed" in out
        and "GMACs at 1024x2048" in out
        and "routeseg predict" in out
    )
    compare(with_ort(onnx.load(tmp_path / "new" / "a.onnx")), model, [(64, 64)])
    route = Route(model.space, [(0, 0, 1), (0, 0, 2)])
    (tmp_path / "route.json").write_text(route.to_json())
    code, out, _ = run(["export", checkpoint, tmp_path / "b.onnx", "--route", tmp_path / "route.json"], capsys)
    assert code == 0 and "a static network of 2 edges" in out and " MB" in out
    compare(with_ort(onnx.load(tmp_path / "b.onnx")), model.specialize(route), [(64, 64)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.onnx", "net", "new", "route.json"]


def test_command_mistakes(tmp_path, capsys, monkeypatch):
    checkpoint = scenes_checkpoint(tmp_path / "net")
    model = routeseg.load(checkpoint)
    static = model.specialize(Route(model.space, [(0, 0, 1)])).save(tmp_path / "static")
    (tmp_path / "other.json").write_text(Route.all_open(routeseg.RoutingSpace(7)).to_json())
    (tmp_path / "dead.json").write_text(Route(model.space, [(3, 3, 1)]).to_json())
    (tmp_path / "whole.json").write_text(Route.all_open(model.space).to_json())
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.onnx").mkdir()
    out = tmp_path / "out.onnx"
    for words, expected in (
        (
            [checkpoint, out, "--routed"],
            "without it a file with exits takes a price",
        ),
        ([static, out, "--route", tmp_path / "whole.json"], "whole.json: the network has no "),
        ([checkpoint, tmp_path / "out.pb"], ".onnx"),
        ([checkpoint, tmp_path / "folder.onnx"], "is a folder"),
        ([checkpoint, "s3://bucket/net.onnx"], "written to a disk"),
        ([checkpoint, tmp_path / "file" / "x.onnx"], "cannot write"),
        ([tmp_path / "nothing", out], "no checkpoint folder"),
        ([checkpoint, out, "--route", "resnet"], "u-net"),
        ([checkpoint, out, "--route", tmp_path / "other.json"], "depth=7"),
        ([checkpoint, out, "--route", tmp_path / "dead.json"], "that no path leads to"),
        ([checkpoint, out, "--route", tmp_path / "broken.json"], "not a route"),
    ):
        code, _, err = run(["export", *words], capsys)
        assert code == 2 and expected in err and not out.exists(), (words, err)
    monkeypatch.setitem(sys.modules, "onnx", None)
    code, _, err = run(["export", checkpoint, out], capsys)
    assert code == 2 and '[onnx]"' in err and not out.exists()
