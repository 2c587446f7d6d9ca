"""The contracts of gates, cell operations, heads, backbones and choices, of ours and of those of one's own, each of
which is one class in one place (docs/extending.md)."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import routeseg
from parts import SIZE, SMALL, ChoiceContract, GateContract, OperationContract, PartContract, images
from routeseg import DynamicRoutingNetwork, Route, model_cost
from routeseg.counting import Macs, conv_norm_macs, each
from routeseg.errors import NotExportable
from routeseg.export import build_onnx
from routeseg.model.backbone import Backbone, FrozenNormConv
from routeseg.model.checkpoints import load_segmenter
from routeseg.model.choice import EntropyChoice, LossChoice
from routeseg.model.gate import Gate, SoftGate, SoftmaxGate
from routeseg.model.head import Head
from routeseg.model.layers import upsample
from routeseg.model.operations import Identity, Operation, SepConv3x3, SepConv5x5
from routeseg.registry import BACKBONES, GATES, HEADS, OPERATIONS
from routeseg.space import DOWN, STEM_STRIDE

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
class Depth:
    """What the network with this head returns: the distance of every pixel [B,H,W] in metres, and the gates."""

    metres: Tensor
    gates: Tensor


class DepthHead(Head):
    """A map of each scale by a 1x1 convolution, added up from the coarsest to the finest; then to the images' size."""

    key = "depth"

    def __init__(self, config) -> None:
        super().__init__(config)
        self.read = nn.ModuleList(nn.Conv2d(config.channels(s), 1, 1) for s in range(config.num_scales))

    def forward(self, features) -> Tensor:
        total = self.read[-1](features[-1])
        for read, x in reversed(list(zip(self.read[:-1], features[:-1], strict=True))):
            total = read(x) + upsample(total)
        return upsample(total, STEM_STRIDE)[:, 0]

    def result(self, output: Tensor, gates: Tensor, size: tuple[int, int]) -> Depth:
        return Depth(output[..., : size[0], : size[1]], gates)

    @classmethod
    def macs(cls, config) -> Macs:
        total = each("resize", 1, 1)
        for scale in range(config.num_scales):
            total += each("conv", config.channels(scale), STEM_STRIDE * 2**scale)
            if scale:
                total += each("resize", 1, STEM_STRIDE * 2 ** (scale - 1))
        return total


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


@pytest.fixture(scope="module", autouse=True)
def registered():
    GATES["hard"], OPERATIONS["max_pool_3x3"], BACKBONES["plain"] = HardGate, MaxPool3x3, PlainBackbone
    HEADS["depth"] = DepthHead
    yield
    del GATES["hard"], OPERATIONS["max_pool_3x3"], BACKBONES["plain"], HEADS["depth"]


class TestSoftGate(GateContract):
    GATE, CHANGES = SoftGate, {"gate": "soft"}


class TestSoftmaxGate(GateContract):
    GATE, CHANGES, KERNELS = SoftmaxGate, {"gate": "softmax"}, False


class TestHardGate(GateContract):
    GATE, CHANGES, KERNELS = HardGate, {"gate": "hard"}, False

    def test_it_is_exact(self, model):
        """1 stays 1, so that a route alone says what the network computes."""
        with torch.no_grad():
            result = model(images(1))
            assert set(result.gates.unique().tolist()) == {0.0, 1.0}
            route = Route.from_gates(model.space, result.gates[0].numpy())
            assert torch.equal(model(images(1), route).logits, result.logits)
            assert torch.allclose(model.specialize(route.pruned())(images(1)).logits, result.logits, atol=1e-6)

    def test_without_an_export(self, model, monkeypatch):
        monkeypatch.delattr(HardGate, "onnx")
        with pytest.raises(NotExportable, match="the gate HardGate has no export: give it a method `onnx`"):
            build_onnx(model)


class TestSepConv3x3(OperationContract):
    OPERATION, CHANGES = SepConv3x3, {"cell_operations": ["sep_conv_3x3"]}


class TestSepConv5x5(OperationContract):
    OPERATION, CHANGES = SepConv5x5, {"cell_operations": ["sep_conv_5x5", "identity"]}


class TestIdentity(OperationContract):
    OPERATION, CHANGES = Identity, {"cell_operations": ["identity"]}


class TestMaxPool3x3(OperationContract):
    OPERATION, CHANGES, KERNELS = MaxPool3x3, {"cell_operations": ["max_pool_3x3", "identity"]}, False

    def test_its_cost_by_hand(self, model):
        assert model_cost(model, SIZE).cell[2, 1] == 9 * 16 * (64 // 8) * (96 // 8)

    def test_without_an_export(self, model, monkeypatch):
        monkeypatch.delattr(MaxPool3x3, "onnx")
        with pytest.raises(NotExportable, match="the cell operation MaxPool3x3 has no export"):
            build_onnx(model)


class TestDecoder(PartContract):
    TENSORS = "decoder"


class TestDepthHead(PartContract):
    CHANGES, TENSORS, KERNELS, REFUSED = {"head": "depth"}, "depth", False, "the head DepthHead has no"

    def output(self, result):
        return result.metres

    def test_its_cost_by_hand(self, model):
        cost, plain = model_cost(model, SIZE, "conv"), model_cost(DynamicRoutingNetwork(**SMALL), SIZE, "conv")
        assert cost.head == sum(8 * 2**s * (64 // (4 * 2**s)) * (96 // (4 * 2**s)) for s in range(4))
        assert np.array_equal(cost.cell, plain.cell)

    def test_it_is_loaded_by_its_name(self, model, tmp_path):
        loaded = routeseg.load(model.save(tmp_path / "net"))
        with torch.no_grad():
            assert torch.equal(loaded(images()).metres, model(images()).metres)
        assert "`depth`" in (tmp_path / "net" / "README.md").read_text()
        with pytest.raises(ValueError, match="the head depth segments nothing: call the network with a tensor"):
            loaded.predict(images()[0])
        with pytest.raises(ValueError, match="its head is depth: start a segmenter from it"):
            load_segmenter(tmp_path / "net")


class TestPlainBackbone(PartContract):
    CHANGES, TENSORS, KERNELS = {"backbone": "plain"}, "stem.stages", False
    REFUSED = "the backbone PlainBackbone has no export"

    def exported(self, model):
        return [model.specialize(model.route)]

    def test_its_cost_by_hand(self, model):
        cost, plain = model_cost(model, SIZE), model_cost(DynamicRoutingNetwork(**SMALL), SIZE)
        difference = (cost.edge - plain.edge)[1, 1, DOWN]
        pixels = (64 // 16) * (96 // 16)
        assert difference == pixels * 32 * (24 * 9 + 3) + pixels * 32 * (32 + 3)  # and its projection; norm 2, ReLU 1

    def test_it_brings_its_weights(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr(PlainBackbone, "file", tmp_path / "plain.pt")
        torch.save(model.backbone.stages.state_dict(), PlainBackbone.file)
        other = DynamicRoutingNetwork(**SMALL, backbone="plain")
        other.load_pretrained()
        assert torch.equal(other.backbone(images()), model.backbone(images()))
        assert other.config.pixel_mean == PlainBackbone.pixel_mean


class TestLossChoice(ChoiceContract):
    CHOICE, CHANGES = LossChoice, {"choice": "loss"}


class TestEntropyChoice(ChoiceContract):
    CHOICE, CHANGES = EntropyChoice, {"choice": "entropy"}


class TestEntropyChoiceOfPlaces(ChoiceContract):
    CHOICE, CHANGES = EntropyChoice, {"choice": "entropy", "place": 32}


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
    with pytest.raises(ValueError, match="head is 'height': choose one of decoder, classifier, depth"):
        DynamicRoutingNetwork(**SMALL, head="height")
