"""int8 files: near the float32 ones, quantised where they should be, and told apart from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import routeseg
from conftest import run as run_command
from conftest import scenes_checkpoint, spread_gates, with_exits
from pictures import noise, save
from routeseg import DynamicRoutingNetwork, Route
from routeseg.data.scenes import draw_scene

onnx = pytest.importorskip("onnx", reason="the extra routeseg[onnx]")
pytest.importorskip("onnxruntime", reason="the extra routeseg[onnx]")
from routeseg.export import build_onnx  # noqa: E402
from routeseg.export.int8 import CALIBRATION_IMAGES, chosen, export_int8  # noqa: E402
from routeseg.prediction.onnx_runner import OnnxNetwork  # noqa: E402


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("scenes")
    return [save(folder / f"{number}.png", draw_scene(0, number, (64, 128))[0]) for number in range(6)]


def gated(**options) -> DynamicRoutingNetwork:
    torch.manual_seed(0)
    return spread_gates(
        DynamicRoutingNetwork(num_classes=5, depth=4, base_channels=8, stem_channels=8, **options)
    ).eval()


MODELS = {
    "static": lambda: (model := gated()).specialize(Route.all_open(model.space)).eval(),
    "gated": gated,
    "small gate, zeros arrive": lambda: gated(small_gate=True, zeros_arrive=True),
    "exits": lambda: with_exits((64, 128)),
}


@pytest.mark.parametrize("name", MODELS)
def test_near_the_float32_network(name, images, tmp_path):
    model = MODELS[name]()
    steps: list[int] = []
    file = export_int8(model, tmp_path / "net.onnx", images[:4], lambda: steps.append(1))
    network = OnnxNetwork(file)
    assert (
        network.precision == "int8"
        and network.kind == ("exits" if model.exits else "dense" if model.config.gated else "static")
        and len(steps) == 4
    )
    for number in (4, 5, 0):  # the first two are new to it
        image = draw_scene(0, number, (64, 128))[0].transpose(2, 0, 1)[None]
        logits, gates = network.run(image)
        with torch.no_grad():
            expected = model(torch.from_numpy(image))
        error = np.abs(logits - expected.logits.numpy()).mean() / float(expected.logits.std())
        assert 0 < error < 0.1, "0 would mean that nothing was quantised"
        assert np.abs(gates - expected.gates.numpy()).max() < 0.1
        assert ((gates > 0) == (expected.gates > 0).numpy()).mean() > 0.95


def test_what_is_quantised(images, tmp_path):
    """Every convolution but the two at the ends, its weights channel by channel, its input by one uint8 scale."""
    model = gated()
    graph = onnx.load(export_int8(model, tmp_path / "net.onnx", images[:2])).graph
    makers = {output: node for node in graph.node for output in node.output}
    weights = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    plain = [node for node in convolutions if makers.get(node.input[1]) is None]
    assert len(plain) == 2 and makers[plain[0].input[0]].op_type == "Pad" and "predictor" in plain[1].input[1]
    assert len(convolutions) == sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    for node in convolutions:
        if node not in plain:
            weight, features = makers[node.input[1]], makers[node.input[0]]
            assert weight.op_type == features.op_type == "DequantizeLinear"
            assert weights[weight.input[0]].dtype == np.int8
            assert weights[weight.input[1]].shape == weights[weight.input[0]].shape[:1], "a scale for each channel"
            assert weights[features.input[2]].dtype == np.uint8 and weights[features.input[1]].size == 1
    gates = [node for node in graph.node if node.op_type in ("Gemm", "Tanh", "Clip", "GlobalAveragePool", "Greater")]
    assert gates and not any("Quantize" in name for node in gates for name in node.input[1:])
    resizes = [node for node in graph.node if node.op_type == "Resize"]
    quantised = [makers[node.input[0]].op_type == "DequantizeLinear" for node in resizes]
    assert all(quantised[:-1]) and not quantised[-1], "the last one makes the logits"


def graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """A graph, and those of its branches."""
    inner = [side.g for node in graph.node for side in node.attribute if side.g.node]
    return [graph, *(one for branch in inner for one in graphs(branch))]


def test_what_is_quantised_in_branches(images, tmp_path):
    """The same as outside, and each branch has what its convolutions read as integers; what decides stays float32."""
    model, plain, quantised = with_exits((64, 128)), [], 0
    for graph in graphs(onnx.load(export_int8(model, tmp_path / "net.onnx", images[:2], labels=True)).graph):
        makers = {output: node for node in graph.node for output in node.output}
        weights = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
        for node in graph.node:
            if node.op_type == "Conv" and node.input[1] in weights:
                plain.append(node.input[1].partition("merge")[0])
            elif node.op_type == "Conv":
                weight, features = makers[node.input[1]], makers[node.input[0]]
                assert weight.op_type == features.op_type == "DequantizeLinear", "in the branch itself"
                assert {*weight.input, *features.input[1:]} <= weights.keys()
                assert weights[weight.input[0]].dtype == np.int8
                quantised += 1
    modules = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    predictors = [name for name in modules if "predictor" in name]
    nothing = 2  # scales that nothing arrives at, behind layer 0
    assert quantised == len(modules) - 1 - len(predictors) - nothing
    assert sum("predictor" in name for name in plain) == len(predictors) and sum("stem" in name for name in plain) == 1
    assert sum(name.startswith("exits.gates.") for name in plain) == 3 * 4 - nothing, "a glance has one at each scale"


@pytest.mark.parametrize("name", MODELS)
def test_no_sum_of_two_products_saturates(name, images, tmp_path):
    """Processors without VNNI add two products, of uint8 features by int8 weights, in 16 bits (`vpmaddubsw`)."""
    weights = []
    for graph in graphs(onnx.load(export_int8(MODELS[name](), tmp_path / "net.onnx", images[:2])).graph):
        makers = {output: node for node in graph.node for output in node.output}
        values = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
        sources = [makers.get(node.input[1]) for node in graph.node if node.op_type == "Conv"]
        weights += [values[source.input[0]].astype(int) for source in sources if source is not None]
    assert weights
    for weight in weights:
        largest = np.abs(weight).reshape(len(weight), -1).max(1)  # of each channel
        assert 2 * 255 * largest.max() <= np.iinfo(np.int16).max
        assert largest.min() >= 63, "each channel uses the whole range"


def test_it_is_smaller_and_another_network(images, tmp_path):
    model = gated()
    float_model = build_onnx(model)
    (tmp_path / "float.onnx").write_bytes(float_model.SerializeToString())
    files = [export_int8(model, tmp_path / f"{k}.onnx", images[k : k + 3]) for k in (0, 0, 3)]
    prints = [OnnxNetwork(file).network.fingerprint for file in (*files, tmp_path / "float.onnx")]
    assert prints[0] == prints[1] and len(set(prints)) == 3 and all(len(one) == 16 for one in prints)
    assert sum(value.ByteSize() for value in onnx.load(files[0]).graph.initializer) < 0.7 * sum(
        value.ByteSize() for value in float_model.graph.initializer
    )


def test_the_images_that_calibrate_are_spread_evenly():
    assert chosen(list("abc")) == list("abc")
    many = [str(number) for number in range(10 * CALIBRATION_IMAGES + 3)]
    numbers = [int(name) for name in chosen(many)]
    assert len(numbers) == CALIBRATION_IMAGES and set(np.diff(numbers)) <= {10, 11} and numbers[-1] > 0.9 * len(many)


def test_small_images_will_do(tmp_path):
    file = export_int8(MODELS["static"](), tmp_path / "net.onnx", [save(tmp_path / "a.png", noise(20, 50))])
    assert OnnxNetwork(file)(noise(40, 50))[0].shape == (40, 50)


def test_nothing_to_calibrate_with(tmp_path):
    with pytest.raises(ValueError, match="no image to calibrate with"):
        export_int8(
            DynamicRoutingNetwork(num_classes=3, depth=3, base_channels=4, stem_channels=4), tmp_path / "net.onnx", []
        )


def test_images_too_large_to_calibrate_with_are_named(images, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory")

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", fail)
    model = DynamicRoutingNetwork(num_classes=3, depth=3, base_channels=4, stem_channels=4).eval()
    with pytest.raises(ValueError, match="calibration failed .*Failed to allocate memory.: give smaller images"):
        export_int8(model, tmp_path / "net.onnx", images)
    assert not (tmp_path / "net.onnx").exists()


class TestCommand:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        return scenes_checkpoint(tmp_path / "net")

    def test_export_and_predict(self, checkpoint, images, tmp_path, capsys):
        file, folder = tmp_path / "net.onnx", images[0].parent
        code, out, err = run_command(["export", checkpoint, file, "--int8", folder], capsys)
        assert code == 0 and not err
        assert "calibrated with 6 images" in out and "all paths computed" in out
        code, out, err = run_command(["predict", file, images[0], "--output", tmp_path / "out"], capsys)
        assert code == 0 and len(list((tmp_path / "out").iterdir())) == 4
        route = tmp_path / "route.json"
        route.write_text(Route.all_open(routeseg.load(checkpoint).space).to_json())
        code, out, err = run_command(["export", checkpoint, file, "--route", route, "--int8", folder], capsys)
        assert code == 0 and "static network" in out and OnnxNetwork(file).kind == "static"

    def test_mistakes(self, checkpoint, images, tmp_path, capsys):
        static = routeseg.load(checkpoint).specialize(Route.all_open(routeseg.load(checkpoint).space))
        static.save(tmp_path / "static")
        (tmp_path / "bad.png").write_text("no image")
        for words, message in (
            ([tmp_path / "static", "--int8", tmp_path / "nothing"], "no file or folder"),
            ([tmp_path / "static", "--int8", tmp_path / "bad.png"], "bad.png"),
        ):
            code, _, err = run_command(["export", words[0], tmp_path / "net.onnx", *words[1:]], capsys)
            assert code == 2 and message in err, message
            assert not (tmp_path / "net.onnx").exists()
