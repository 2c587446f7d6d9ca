"""A gate, a cell operation, a head and a backbone of one's own: each is one class in one place (docs/extending.md).

Each is trained, run by the skip engine, costed, saved and loaded, and exported, or refused with a reason.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import spread_gates
from routeseg import DynamicRoutingNetwork, Route, SkipEngine, load, model_cost
from routeseg.counting import ONCE, Macs, conv_norm_macs, each
from routeseg.engine.compiled import CompiledForward, is_compiled
from routeseg.engine.folding import FoldedForward
from routeseg.errors import NotExportable
from routeseg.export import build_onnx
from routeseg.model.backbone import Backbone, FrozenNormConv
from routeseg.model.gate import Gate
from routeseg.model.grid import RoutedNetwork
from routeseg.model.head import Head
from routeseg.model.operations import Operation
from routeseg.model.request import Request
from routeseg.registry import BACKBONES, GATES, OPERATIONS
from routeseg.space import DOWN

# docs/extending.md shows the classes between these marks. [gate]


class HardGate(Gate):
    """Open or closed: an activation is exactly 1 or 0, by a threshold that is learned."""

    def __init__(self, channels: int, num_directions: int, small: bool = False) -> None:
        super().__init__(channels, num_directions, small)
        self.threshold = nn.Parameter(torch.zeros(num_directions))

    def scores(self, features: Tensor) -> Tensor:
        return super().scores(features) - self.threshold

    @staticmethod
    def activate(scores: Tensor) -> Tensor:
        hard, soft = (scores > 0).float(), torch.sigmoid(scores.float())
        return hard + (soft - soft.detach())  # exactly 1 or 0, with the gradient of the sigmoid

    def onnx(self, graph, scores: str) -> str:
        return graph.as_float(graph.op("Greater", scores, graph.constant(0.0)))


# [operation]


class MaxPool3x3(Operation):
    """The largest value of the neighbourhood."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return self.pool(features)

    @classmethod
    def macs(cls, channels: int, stride: int) -> Macs:
        return each("pool", 9 * channels, stride)

    def onnx(self, graph, name: str, features: str) -> str:
        return graph.op("MaxPool", features, kernel_shape=[3, 3], pads=[1, 1, 1, 1])


# [head]


@dataclass(frozen=True)
class Heights:
    """What the network with this head returns: a value for each image [B], and the gates."""

    values: Tensor
    gates: Tensor


class MeanHead(Head):
    """One value for each image, from the means over the maps of all scales."""

    key = "mean"

    def __init__(self, config) -> None:
        super().__init__(config)
        self.value = nn.Linear(sum(config.channels(s) for s in range(config.num_scales)), 1)

    def forward(self, features) -> Tensor:
        return self.value(torch.cat([x.mean(dim=(2, 3)) for x in features], dim=1))[:, 0]

    def result(self, output: Tensor, gates: Tensor, size: tuple[int, int]) -> Heights:
        return Heights(output, gates)

    @classmethod
    def macs(cls, config) -> Macs:
        total = Macs()
        for scale in range(config.num_scales):
            channels = config.channels(scale)
            total += each("pool", channels, 4 * 2**scale) + each("conv", channels, 1, ONCE)
        return total


class HeightNetwork(RoutedNetwork):
    head_class = MeanHead


# [backbone]


class PlainBackbone(Backbone):
    """A convolution for each scale."""

    channels = (16, 24, 32, 48)
    pixel_mean = pixel_std = (0.5, 0.5, 0.5)
    file = "plain.pt"

    @classmethod
    def stage(cls, s: int) -> nn.Module:
        if s == 0:
            return nn.Sequential(FrozenNormConv(3, 8, 3, stride=2), FrozenNormConv(8, 16, 3, stride=2))
        return FrozenNormConv(cls.channels[s - 1], cls.channels[s], 3, stride=2)

    @classmethod
    def stage_macs(cls, s: int) -> Macs:
        if s == 0:
            return conv_norm_macs(3 * 9, 8, stride=2) + conv_norm_macs(8 * 9, 16, stride=4)
        return conv_norm_macs(cls.channels[s - 1] * 9, cls.channels[s], stride=4 * 2**s)

    @classmethod
    def weights(cls, stages: int) -> dict[str, Tensor]:
        return torch.load(cls.file, weights_only=True)


# [end]

SMALL = {"num_classes": 3, "depth": 4, "base_channels": 8, "stem_channels": 8}


@pytest.fixture(autouse=True)
def registered():
    GATES["hard"], OPERATIONS["max_pool_3x3"], BACKBONES["plain"] = HardGate, MaxPool3x3, PlainBackbone
    yield
    del GATES["hard"], OPERATIONS["max_pool_3x3"], BACKBONES["plain"]


def network(kind: str) -> RoutedNetwork:
    """One of the four, with gates that differ from image to image."""
    torch.manual_seed(1)
    if kind == "head":
        return spread_gates(HeightNetwork(**SMALL)).eval()
    changes = {
        "gate": {"gate": "hard"},
        "operation": {"cell_operations": ["max_pool_3x3", "identity"]},
        "backbone": {"backbone": "plain"},
    }[kind]
    return spread_gates(DynamicRoutingNetwork(**SMALL, **changes)).eval()


def output(result) -> Tensor:
    return result.values if isinstance(result, Heights) else result.logits


def images(batch: int = 4) -> Tensor:
    return torch.rand(batch, 3, 64, 96, generator=torch.Generator().manual_seed(0))


KINDS = pytest.mark.parametrize("kind", ["gate", "operation", "head", "backbone"])
NAMES = {"gate": "gate", "operation": "cell", "head": "mean", "backbone": "stem.stages"}  # of their tensors


@KINDS
def test_it_learns(kind):
    model = network(kind).train()
    parts = [p for n, p in model.named_parameters() if NAMES[kind] in n]
    if kind == "operation":  # it has none of its own
        parts = list(model.parameters())
    before = [p.clone() for p in parts]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        result = model(images())
        (output(result).square().mean() + model_cost(model, (64, 96)).expected(result.gates).mean() / 1e9).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(one, other) for one, other in zip(before, parts, strict=True))


@KINDS
def test_the_engine_falls_back_and_says_why(kind, caplog):
    """The kernels do not know it: PyTorch's operations run it, with the dense forward's result."""
    model = network(kind)
    engine = SkipEngine(model)
    assert not isinstance(engine.forward, CompiledForward)
    with torch.no_grad():
        expected = model(images())
    found = SkipEngine(model, backend="eager")(images())
    assert torch.allclose(output(found), output(expected), rtol=1e-4, atol=1e-5)
    assert torch.allclose(found.gates, expected.gates, atol=1e-6)
    found = FoldedForward(model, torch.bfloat16)(images(), Request.of(model.config, len(images())))
    assert output(found).dtype == found.gates.dtype == torch.float32
    assert (output(found) - output(expected)).abs().max() < 0.1 * output(expected).abs().max()
    if is_compiled(torch.float32):
        with pytest.raises(ValueError, match=f"there is no kernel for the {'head MeanHead' if kind == 'head' else ''}"):
            SkipEngine(model, backend="kernels")


def test_the_gate_is_exact():
    """1 stays 1, so that a route alone says what the network computes."""
    model = network("gate")
    with torch.no_grad():
        result = model(images(1))
        assert set(result.gates.unique().tolist()) == {0.0, 1.0}
        route = Route.from_gates(model.space, result.gates[0].numpy())
        assert torch.equal(model(images(1), route).logits, result.logits)
        assert torch.allclose(model.specialize(route.pruned())(images(1)).logits, result.logits, atol=1e-6)


@KINDS
def test_it_has_a_cost(kind):
    model = network(kind)
    cost, plain = model_cost(model, (64, 96)), model_cost(DynamicRoutingNetwork(**SMALL), (64, 96))
    assert 0 < cost.full < 2 * plain.full
    if kind == "operation":
        assert cost.cell[2, 1] == 9 * 16 * (64 // 8) * (96 // 8)
    if kind == "head":
        pooled = sum(8 * 2**s * (64 // (4 * 2**s)) * (96 // (4 * 2**s)) for s in range(4))
        assert cost.head == pooled + 8 + 16 + 32 + 64
        assert np.array_equal(cost.cell, plain.cell)
    if kind == "backbone":
        difference = (cost.edge - plain.edge)[1, 1, DOWN]
        pixels = (64 // 16) * (96 // 16)
        assert difference == pixels * 32 * (24 * 9 + 3) + pixels * 32 * (32 + 3)  # and its projection; norm 2, ReLU 1


@KINDS
def test_it_is_saved_and_loaded(kind, tmp_path):
    model = network(kind)
    folder = model.save(tmp_path / "net")
    loaded = HeightNetwork.from_pretrained(folder).eval() if kind == "head" else load(folder)
    with torch.no_grad():
        assert torch.equal(output(loaded(images())), output(model(images())))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", ["gate", "operation"])
def test_it_is_exported(kind, gated):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = network(kind)
    if not gated:
        model = model.specialize(Route.all_open(model.space))
    session = onnxruntime.InferenceSession(build_onnx(model).SerializeToString())
    for image in images(3):
        logits, gates = session.run(["logits", "gates"], {"images": image[None].numpy()})
        with torch.no_grad():
            expected = model(image[None])
        assert np.allclose(logits, expected.logits.numpy(), rtol=1e-3, atol=1e-5)
        assert np.allclose(gates, expected.gates.numpy(), atol=1e-5)


def test_what_has_no_export_is_refused_with_a_reason(monkeypatch):
    pytest.importorskip("onnx")
    with pytest.raises(NotExportable, match="the head MeanHead has no"):
        build_onnx(network("head"))
    monkeypatch.delattr(HardGate, "onnx")
    monkeypatch.delattr(MaxPool3x3, "onnx")
    with pytest.raises(NotExportable, match="the gate HardGate has no export: give it a method `onnx`"):
        build_onnx(network("gate"))
    with pytest.raises(NotExportable, match="the cell operation MaxPool3x3 has no export"):
        build_onnx(network("operation"))


def test_a_backbone_brings_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(PlainBackbone, "file", tmp_path / "plain.pt")
    source, model = network("backbone"), DynamicRoutingNetwork(**SMALL, backbone="plain")
    torch.save(source.backbone.stages.state_dict(), PlainBackbone.file)
    model.load_pretrained()
    assert torch.equal(model.backbone(images()), source.backbone(images()))
    assert model.config.pixel_mean == PlainBackbone.pixel_mean
    with pytest.raises(NotExportable, match="the backbone PlainBackbone has no export"):
        build_onnx(model.specialize(model.route))


def test_the_document_shows_these_classes():
    document = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    blocks = re.findall(r"# (?:[^\n]* )?\[\w+\]\n\n\n(.*?)(?=\n\n\n# )", Path(__file__).read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        assert block in document, f"copy it into docs/extending.md:\n{block}"


def test_names_that_are_not_registered_are_refused():
    del GATES["hard"]
    with pytest.raises(ValueError, match="gate is 'hard': choose one of soft, softmax, fixed"):
        DynamicRoutingNetwork(**SMALL, gate="hard")
    GATES["hard"] = HardGate
