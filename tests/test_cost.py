"""What routes cost: against the paper's table, against a counter of real convolutions, and by hand."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import authors_report
from routeseg.config import NetworkConfig
from routeseg.cost.macs import CostTable, model_cost
from routeseg.counting import CONVENTIONS
from routeseg.engine import SkipEngine
from routeseg.model import DynamicRoutingNetwork
from routeseg.space import DOWN, KEEP, UP, Route, RoutingSpace
from routeseg.training.gate_budget import Budget, budget_loss

CITYSCAPES = (1024, 2048)
SPACE = RoutingSpace(16)
MEGA, GIGA = 1e6, 1e9
ROUNDING = 0.0501  # the table has one decimal

# MMACs at 1024x2048, depth 16, 64 channels, and parameters: cell, gate, keep, up, down of a node, by scale.
TABLE_MMACS = (
    (1266.7, 285.2, 8.4, None, 289.4),
    (1170.2, 276.8, 4.2, 278.9, 278.9),
    (1122.0, 272.6, 2.1, 273.7, 273.7),
    (1097.9, 270.5, 1.0, 271.1, None),
)
TABLE_PARAMETERS = (
    (9_600, 2_178, 0, None, 8_448),
    (35_584, 8_515, 0, 8_320, 33_280),
    (136_704, 33_411, 0, 33_024, 132_096),
    (535_552, 132_098, 0, 131_584, None),
)
INNER_LAYER = 7  # one with all scales, not the last


def tiny(seed: int = 0, **options) -> DynamicRoutingNetwork:
    torch.manual_seed(seed)
    options = {"num_classes": 5, "depth": 4, "base_channels": 8, "stem_channels": 12, **options}
    return DynamicRoutingNetwork(**options).eval()


def with_random_gates(model: DynamicRoutingNetwork, seed: int = 0) -> DynamicRoutingNetwork:
    """The same network with about half of its gates closed."""
    generator = torch.Generator().manual_seed(seed)
    for node in model.nodes.values():
        node.gate.score.bias.data = torch.randn(node.gate.score.bias.shape, generator=generator)
    return model


def meta_network(**options) -> DynamicRoutingNetwork:
    with torch.device("meta"):
        return DynamicRoutingNetwork(**options)


def cost_table(space: RoutingSpace, size: tuple[int, int], convention: str = "authors", **fields) -> CostTable:
    return model_cost(NetworkConfig(depth=space.depth, num_scales=space.num_scales, **fields), size, convention)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def counted_macs(forward, images: torch.Tensor, **options) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(images, **options)
    return counter.get_total_flops() / 2  # it counts multiplication and addition apart


class TestPaper:
    @pytest.mark.parametrize("scale", range(4))
    def test_every_part_of_a_node(self, scale):
        cost = cost_table(SPACE, CITYSCAPES)
        cell, gate, keep, up, down = TABLE_MMACS[scale]
        assert cost.cell[INNER_LAYER, scale] / MEGA == pytest.approx(cell, abs=ROUNDING)
        assert cost.gate[INNER_LAYER, scale] / MEGA == pytest.approx(gate, abs=ROUNDING)
        for direction, macs in ((UP, up), (KEEP, keep), (DOWN, down)):
            assert cost.edge[INNER_LAYER, scale, direction] / MEGA == pytest.approx(macs or 0, abs=ROUNDING)

    def test_stem_and_decoder(self):
        cost = cost_table(SPACE, CITYSCAPES)
        assert cost.stem / MEGA == pytest.approx(4194.3, abs=ROUNDING)
        assert cost.head / MEGA == pytest.approx(1406.4, abs=ROUNDING)

    def test_only_nodes_and_legal_edges_cost_anything(self):
        cost = cost_table(SPACE, CITYSCAPES)
        assert np.array_equal(cost.edge > 0, SPACE.legal)
        for part in (cost.cell, cost.gate):
            assert {tuple(node) for node in np.argwhere(part > 0).tolist()} == set(SPACE.nodes)

    @pytest.mark.parametrize(
        ("depth", "small_gate", "gmacs"),
        [(16, False, 119.65), (16, True, 103.57), (33, False, 246.19), (33, True, 212.49)],
    )
    def test_full_network(self, depth, small_gate, gmacs):
        cost = cost_table(RoutingSpace(depth), CITYSCAPES, small_gate=small_gate)
        assert cost.full / GIGA == pytest.approx(gmacs, abs=0.00501)

    def test_gates_of_depth_16(self):
        assert cost_table(SPACE, CITYSCAPES).gate.sum() / GIGA == pytest.approx(17.15, abs=0.00501)

    def test_as_the_authors_report_it(self):
        cost = cost_table(SPACE, CITYSCAPES)
        report = authors_report(cost)
        assert report.full / GIGA == pytest.approx(118.09, abs=0.00501)
        left_out = cost.cell[0, 0] + cost.gate[0, 0] + cost.edge[-1].sum()
        assert cost.full - report.full == pytest.approx(left_out)
        assert cost.cell[0, 0] > 0, "the table itself stays whole"

    @pytest.mark.parametrize("scale", range(4))
    def test_parameters_of_a_node(self, scale):
        node = meta_network(depth=5).node(3, scale)
        found = [parameters(node.cell), parameters(node.gate)]
        for name in ("keep", "up", "down"):
            found.append(parameters(node.transforms[name]) if name in node.transforms else None)
        assert tuple(found) == TABLE_PARAMETERS[scale]

    @pytest.mark.parametrize(
        ("depth", "gate", "millions"), [(16, "soft", 17.785), (16, "fixed", 15.262), (33, "soft", 38.872)]
    )
    def test_parameters_of_the_network(self, depth, gate, millions):
        count = parameters(meta_network(depth=depth, gate=gate))
        assert count / MEGA == pytest.approx(millions, abs=0.000501)


class TestCountedConvolutions:
    """The `conv` convention is what torch's own counter sees, exactly: convolutions and the gates' scores."""

    @pytest.mark.parametrize("size", [(64, 96), (65, 97), (32, 33)])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"gate": "fixed"},
            {"small_gate": True},
            {"num_scales": 3, "cell_operations": ("sep_conv_5x5", "identity", "sep_conv_3x3")},
            {"depth": 2, "num_scales": 1},
        ],
        ids=["soft", "fixed", "small", "three scales", "one scale"],
    )
    def test_dense_forward_with_every_path_open(self, size, options):
        model = tiny(**options)
        route = Route.all_open(model.space)
        counted = counted_macs(model, torch.rand(1, 3, *size), route=route, activation="own")
        assert counted == model_cost(model, size, "conv").full

    def test_a_batch_costs_as_much_an_image(self):
        model = tiny(gate="fixed")
        assert counted_macs(model, torch.rand(3, 3, 64, 64)) == 3 * model_cost(model, (64, 64), "conv").full

    @pytest.mark.parametrize("seed", range(4))
    def test_skip_engine_computes_what_its_gates_cost(self, seed):
        model = with_random_gates(tiny(seed), seed)
        images = torch.rand(1, 3, 64, 96)
        cost = model_cost(model, (64, 96), "conv")
        real = float(cost.of_gates(model(images).gates)[0])
        assert real < cost.full
        assert counted_macs(SkipEngine(model, backend="eager"), images) == real

    def test_a_given_route_costs_its_open_paths_and_no_gate(self):
        model = tiny()
        route = Route(model.space, [(0, 0, DOWN), (1, 1, KEEP), (1, 1, DOWN), (2, 2, UP), (4, 1, KEEP)])
        counted = counted_macs(SkipEngine(model, backend="eager"), torch.rand(1, 3, 64, 64), route=route)
        assert counted == model_cost(model, (64, 64), "conv").of_route(route)


class TestRealCost:
    cost = cost_table(RoutingSpace(4), (64, 96), num_classes=5, base_channels=8, stem_channels=8)
    space = cost.space

    def test_all_closed_is_stem_decoder_and_the_gates_along_the_finest_scale(self):
        closed = np.zeros(self.space.legal.shape)
        expected = self.cost.stem + self.cost.head + self.cost.gate[:, 0].sum()
        assert float(self.cost.of_gates(closed)) == pytest.approx(expected)
        assert self.cost.of_route(Route(self.space)) == pytest.approx(self.cost.stem + self.cost.head)

    def test_all_open_is_the_full_cost(self):
        gates = 0.3 * self.space.legal
        assert float(self.cost.of_gates(gates)) == pytest.approx(self.cost.full)
        route = Route.all_open(self.space)
        assert self.cost.of_route(route, count_gates=True) == pytest.approx(self.cost.full)

    @pytest.mark.parametrize("zeros_arrive", [False, True])
    def test_by_hand(self, zeros_arrive):
        """(0,0) opens down, (1,1) keep and up; from layer 2 on free skips. (1,0) and (2,2) may get zeros."""
        gates = np.zeros(self.space.legal.shape)
        gates[0, 0, DOWN], gates[1, 1, KEEP], gates[1, 1, UP] = 0.9, 0.1, 1e-6
        c = replace(self.cost, zeros_arrive=zeros_arrive)
        expected = c.stem + c.head + c.cell[0, 0] + c.cell[1, 1]
        expected += c.edge[0, 0, DOWN] + c.edge[1, 1, KEEP] + c.edge[1, 1, UP]
        reached = [(0, 0), (1, 1), *((layer, s) for layer in (2, 3, 4) for s in (0, 1))]
        if zeros_arrive:
            reached += [(1, 0), *((layer, 2) for layer in (2, 3, 4))]
        expected += sum(c.gate[node] for node in reached)
        assert float(c.of_gates(gates)) == pytest.approx(expected)

    def test_images_of_a_batch_as_tensor_or_array(self):
        one, other = np.zeros(self.space.legal.shape), self.space.legal.astype(float)
        both = np.stack([one, other])
        costs = self.cost.of_gates(torch.from_numpy(both).requires_grad_())
        assert costs.shape == (2,) and costs.dtype == np.float64
        assert np.array_equal(costs, self.cost.of_gates(both))
        assert costs.tolist() == [float(self.cost.of_gates(one)), float(self.cost.of_gates(other))]

    def test_without_gates_none_are_paid(self):
        model = tiny(gate="fixed")
        assert model_cost(model, (64, 64)).gate.sum() == 0
        gated = model_cost(tiny(), (64, 64))
        assert model_cost(model, (64, 64)).full == pytest.approx(gated.full - gated.gate.sum())

    def test_an_edge_that_nothing_reaches_is_free(self):
        """The network computes nothing at a node that nothing reaches, also where a route opens its paths."""
        model = tiny()
        route = Route(model.space, [(0, 0, KEEP), (3, 3, UP)])
        cost = model_cost(model, (64, 64))
        with torch.no_grad():
            gates = model(torch.rand(1, 3, 64, 64), route=route).gates
        assert cost.of_route(route, count_gates=True) == pytest.approx(float(cost.of_gates(gates)[0]))

    def test_sizes_are_padded_to_the_stride(self):
        sizes = [cost_table(self.space, size).full for size in ((64, 96), (33, 65), (64, 97))]
        assert sizes[0] == sizes[1] < sizes[2]

    def test_a_small_gate_costs_about_a_sixteenth(self):
        small, large = (cost_table(SPACE, CITYSCAPES, small_gate=small) for small in (True, False))
        assert small.gate.sum() == pytest.approx(large.gate.sum() / 16, rel=1e-3)
        assert np.array_equal(small.cell, large.cell) and np.array_equal(small.edge, large.edge)


class TestConventions:
    @pytest.mark.parametrize("size", [(1024, 2048), (64, 96), (512, 512), (768, 512)])
    @pytest.mark.parametrize("small_gate", [False, True])
    def test_full_counts_more_than_the_authors_and_they_more_than_the_convolutions(self, size, small_gate):
        names = ("full", "authors", "conv")
        full, authors, conv = (cost_table(SPACE, size, small_gate=small_gate, convention=n) for n in names)
        assert full.full > authors.full > conv.full

    def test_full_adds_bilinear_resizing_and_the_products_with_the_gates(self):
        full, authors = (cost_table(SPACE, CITYSCAPES, convention=name) for name in ("full", "authors"))
        more = (full.edge - authors.edge)[INNER_LAYER]
        scale = 1
        elements = (CITYSCAPES[0] // 8) * (CITYSCAPES[1] // 8) * 128
        assert more[scale, KEEP] == elements
        assert more[scale, UP] == (4 + 1) * 2 * elements, "four times the pixels, half the channels"
        assert more[scale, DOWN] == elements / 2
        assert np.array_equal(full.cell, authors.cell)

    def test_every_convention_is_by_name_and_another_is_refused(self):
        for name in CONVENTIONS:
            assert cost_table(SPACE, (64, 64), convention=name).full > 0
        with pytest.raises(ValueError, match="'flops'.*authors"):
            cost_table(SPACE, (64, 64), convention="flops")


class TestExpectedCost:
    cost = cost_table(RoutingSpace(4), (64, 96), num_classes=5, base_channels=8, stem_channels=8)

    def gates(self) -> torch.Tensor:
        rng = np.random.default_rng(0)
        legal = self.cost.space.legal
        values = np.where(rng.random((2, *legal.shape)) < 0.6, rng.random((2, *legal.shape)), 0) * legal
        return torch.from_numpy(values)

    def test_by_hand(self):
        """Eq. 7, node by node."""
        gates = self.gates()
        for image, got in zip(gates.tolist(), self.cost.expected(gates).tolist(), strict=True):
            total = 0.0
            for layer, s in self.cost.space.nodes:
                alphas = image[layer][s]
                total += max(alphas) * self.cost.cell[layer, s]
                total += sum(a * c for a, c in zip(alphas, self.cost.edge[layer, s], strict=True))
            assert got == pytest.approx(total)

    def test_gradient_by_hand(self):
        gates = self.gates().requires_grad_()
        self.cost.expected(gates).sum().backward()
        values = gates.detach().numpy()
        for layer, s in self.cost.space.nodes:
            for image in range(2):
                alphas = values[image, layer, s]
                expected = self.cost.edge[layer, s].copy()
                if alphas.max() > 0:  # at 0 all activations share the maximum
                    expected[alphas.argmax()] += self.cost.cell[layer, s]
                    assert np.allclose(gates.grad[image, layer, s].numpy(), expected)

    def test_all_open_at_1_is_the_budgeted_cost(self):
        gates = torch.from_numpy(self.cost.space.legal[None].astype(np.float32))
        assert float(self.cost.expected(gates)[0]) == pytest.approx(self.cost.budgeted, rel=1e-6)
        fixed = self.cost.stem + self.cost.head + self.cost.gate.sum()
        assert self.cost.budgeted == pytest.approx(self.cost.full - fixed)

    def test_it_reaches_the_gates_of_a_network(self):
        model = tiny().train()
        gates = model(torch.rand(2, 3, 64, 64)).gates
        cost = model_cost(model, (64, 64))
        budget_loss(cost.expected(gates), cost.budgeted, 0.1).backward()
        gradients = [p.grad for p in model.gate_parameters()]
        assert all(g is not None and torch.isfinite(g).all() for g in gradients)
        biases = [model.node(*node).gate.score.bias.grad for node in model.space.nodes]
        assert all((g > 0).all() for g in biases), "above the target, every gate is pushed to close"


class TestBudget:
    def test_loss_is_the_squared_distance_of_the_mean(self):
        expected = torch.tensor([10.0, 50.0], requires_grad=True)
        loss = budget_loss(expected, 100.0, 0.1)  # Eq. 9
        assert loss.item() == pytest.approx((0.3 - 0.1) ** 2)
        loss.backward()
        assert expected.grad.tolist() == pytest.approx([2 * 0.2 / 200] * 2)
        assert float(budget_loss(torch.tensor([20.0]), 100.0, 0.2)) == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize(
        ("progress", "weight"),
        [(0.0, 0.0), (0.399, 0.0), (0.4, 0.0), (0.405, 0.2), (0.41, 0.4), (0.42, 0.8), (1.0, 0.8)],
    )
    def test_weight_ramps_up_after_the_start(self, progress, weight):
        assert Budget(weight=0.8).weight_at(progress) == pytest.approx(weight)

    def test_without_a_ramp_it_steps_and_without_weight_it_is_nothing(self):
        step = Budget(weight=0.5, start=0.25, ramp=0.0)
        assert step.weight_at(0.2499) == 0 and step.weight_at(0.25) == 0.5
        assert Budget(weight=0.3, start=0.0, ramp=0.0).weight_at(0.0) == 0.3
        assert {Budget().weight_at(p) for p in (0.0, 0.5, 1.0)} == {0.0}

    @pytest.mark.parametrize(
        ("key", "value"),
        [("weight", -0.1), ("target", 1.5), ("target", -1), ("target", math.nan), ("start", 2), ("ramp", -1)],
    )
    def test_what_is_no_budget_is_named(self, key, value):
        with pytest.raises(ValueError, match=f"budget {key} is"):
            Budget(**{key: value})

    def test_a_budget_cannot_be_changed(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            Budget().weight = 1.0
