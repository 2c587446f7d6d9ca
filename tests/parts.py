"""What every part of a network keeps to, ours and those of docs/extending.md: the tests of a part inherit the contract
of its kind, and say which part it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import spread_gates
from routeseg import DynamicRoutingNetwork, Route, SkipEngine, model_cost
from routeseg.engine.compiled import CompiledForward, is_compiled
from routeseg.engine.folding import FoldedForward
from routeseg.errors import NotExportable
from routeseg.export import build_onnx
from routeseg.model.grid import RoutedNetwork
from routeseg.model.request import Request

SMALL = {"num_classes": 3, "depth": 4, "base_channels": 8, "stem_channels": 8}
SIZE = (64, 96)


def images(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *SIZE, generator=torch.Generator().manual_seed(0))


class PartContract:
    """A part in a small network: it learns, costs, is saved and loaded, and runs in every engine; it is exported, or
    refused with a reason.

    CHANGES   of the network's arguments
    TENSORS   in the names of what learns with it
    KERNELS   the compiled kernels know it
    REFUSED   why it is not exported; None: it is
    """

    CHANGES: ClassVar[dict[str, Any]] = {}
    TENSORS: ClassVar[str]
    KERNELS: ClassVar[bool] = True
    REFUSED: ClassVar[str | None] = None

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls) -> RoutedNetwork:
        """With gates that differ from image to image; only to be read."""
        torch.manual_seed(1)
        return spread_gates(DynamicRoutingNetwork(**SMALL | cls.CHANGES)).eval()

    def output(self, result) -> Tensor:
        return result.logits

    def exported(self, model) -> Sequence[RoutedNetwork]:
        """What is exported of it."""
        return model, model.specialize(Route.all_open(model.space))

    def test_it_learns(self, model):
        model = copy.deepcopy(model).train()
        parts = [p for name, p in model.named_parameters() if self.TENSORS in name]
        before = [p.clone() for p in parts]
        result = model(images())
        cost = model_cost(model, SIZE).expected(result.gates).mean() / 1e9
        (self.output(result).square().mean() + cost).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert all(p.isfinite().all() for p in model.parameters())
        assert any(not torch.equal(one, other) for one, other in zip(before, parts, strict=True))

    @torch.no_grad()
    def test_engines_give_what_the_network_gives(self, model):
        expected = model(images())
        for backend in ("auto", "eager"):
            engine = SkipEngine(model, backend=backend)
            if is_compiled(torch.float32):
                assert isinstance(engine.forward, CompiledForward) == (self.KERNELS and backend == "auto")
            found = engine(images())
            assert torch.allclose(self.output(found), self.output(expected), rtol=1e-4, atol=1e-5)
            assert torch.allclose(found.gates, expected.gates, atol=1e-6)
        half = FoldedForward(model, torch.bfloat16)(images(), Request.of(model.config, len(images())))
        assert self.output(half).dtype == half.gates.dtype == torch.float32
        assert (self.output(half) - self.output(expected)).abs().max() < 0.1 * self.output(expected).abs().max()
        if not self.KERNELS and is_compiled(torch.float32):
            with pytest.raises(ValueError, match="there is no kernel for the "):
                SkipEngine(model, backend="kernels")

    def test_it_has_a_cost(self, model):
        cost, plain = model_cost(model, SIZE), model_cost(DynamicRoutingNetwork(**SMALL), SIZE)
        assert 0 < cost.full < 2 * plain.full

    def test_it_is_saved_and_loaded(self, model, tmp_path):
        loaded = DynamicRoutingNetwork.from_pretrained(model.save(tmp_path / "net")).eval()
        with torch.no_grad():
            assert torch.equal(self.output(loaded(images())), self.output(model(images())))

    def test_it_is_exported_or_refused(self, model):
        onnxruntime = pytest.importorskip("onnxruntime")
        for one in self.exported(model):
            if self.REFUSED is not None:
                with pytest.raises(NotExportable, match=self.REFUSED):
                    build_onnx(one)
                continue
            session = onnxruntime.InferenceSession(build_onnx(one).SerializeToString())
            for image in images():
                logits, gates = session.run(["logits", "gates"], {"images": image[None].numpy()})
                with torch.no_grad():
                    expected = one(image[None])
                torch.testing.assert_close(torch.from_numpy(logits), expected.logits, rtol=1e-3, atol=1e-5)
                torch.testing.assert_close(torch.from_numpy(gates), expected.gates, rtol=0, atol=1e-5)


class GateContract(PartContract):
    """GATE is the class."""

    GATE: ClassVar[type]
    TENSORS = "gate"

    def test_activations_are_independent_and_a_score_of_minus_infinity_closes(self):
        scores = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
        found = self.GATE.activate(scores)
        assert ((found >= 0) & (found <= 1)).all() and (found > 0).any() and found.dtype == torch.float32
        assert torch.equal(self.GATE.activate(scores[2:3])[0], found[2]), "rows are independent"
        closed = torch.cat([scores, torch.full((5, 1), -torch.inf)], dim=1)
        assert (
            torch.allclose(self.GATE.activate(closed)[:, :3], found) and (self.GATE.activate(closed)[:, 3] == 0).all()
        )


class OperationContract(PartContract):
    """OPERATION is the class."""

    OPERATION: ClassVar[type]
    TENSORS = ""  # not all have tensors of their own

    def test_it_keeps_the_shape(self):
        operation = self.OPERATION(8).eval()
        for size in ((1, 1), (5, 8)):
            assert operation(torch.rand(2, 8, *size)).shape == (2, 8, *size)


class ChoiceContract:
    """CHOICE is the class, CHANGES those of the network's arguments: a dearer price lets no fewer leave, and whoever is
    asked alone decides as among others."""

    CHANGES: ClassVar[dict[str, Any]] = {}
    CHOICE: ClassVar[type]

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls) -> DynamicRoutingNetwork:
        torch.manual_seed(3)
        grid = {"depth": 4, "gate": "fixed", "route": "diagonal", "exits": [0, 2]}
        model = spread_gates(DynamicRoutingNetwork(**SMALL | grid | cls.CHANGES)).eval()
        for decoder in model.exits.decoders:
            decoder.predictor.weight.data.normal_()  # images differ in what is found
        return model

    def seen(self, model, batch: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [model.exits.see(exit, maps) for exit, maps in enumerate(model.exit_features(batch))]

    def test_whatever_is_seen_does_not_depend_on_others(self, model):
        assert isinstance(model.exits.gates, self.CHOICE)
        together, alone = self.seen(model, images()), self.seen(model, images()[1:2])
        assert len(together) == len(model.config.exits) - 1
        for one, all_of_them in zip(alone, together, strict=True):
            assert one.dtype == torch.float32 and torch.allclose(one[0], all_of_them[1], atol=1e-5)

    def test_the_dearer_the_more_leave(self, model):
        costs = torch.tensor([0.3, 0.6, 1.0])
        who = (4,) if model.config.place is None else (4, 1, 1)  # of all places of an image
        for exit, seen in enumerate(self.seen(model, images(4))):
            left = [
                model.exits.gates.leaves(exit, seen, torch.full(who, price), costs)
                for price in (-1e9, *np.linspace(0, 1, 5), 1e9)
            ]
            assert not left[0].any() and left[-1].all()
            assert all(one.dtype == torch.bool and (one <= other).all() for one, other in pairwise(left))

    def test_it_is_saved_and_loaded(self, model, tmp_path):
        loaded = DynamicRoutingNetwork.from_pretrained(model.save(tmp_path / "net")).eval()
        for one, other in zip(self.seen(model, images()), self.seen(loaded, images()), strict=True):
            assert torch.equal(one, other)
