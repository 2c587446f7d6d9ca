"""Known networks as routes; static networks; the common route of a dynamic one."""

import json

import numpy as np
import pytest
import torch

from conftest import spread_gates
from routeseg import (
    ARCHITECTURES,
    DynamicRoutingNetwork,
    Route,
    RoutingSpace,
    SkipEngine,
    common_route,
    load,
    model_cost,
)
from routeseg.architectures import architecture, walk
from routeseg.cli import main
from routeseg.evaluation.architecture_table import architecture_table
from routeseg.space import DOWN, KEEP, UP

SPACE = RoutingSpace(16)
OFF_BY = {"fcn-32s": 0.08}  # no path of this shape comes nearer (docs/results.md); the others within 5 %


def scales_of(route: Route) -> list[set[int]]:
    """The scales at which cells run, layer by layer."""
    return [{s for at, s in route.nodes if at == layer} for layer in range(route.space.depth + 1)]


class TestArchitectures:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_cost_and_parameters_are_those_of_table_1(self, name):
        row = architecture_table(SPACE, names=[name])[0]
        tolerance = OFF_BY.get(name, 0.05)
        assert row["gmacs"] == pytest.approx(row["paper_gmacs"], rel=tolerance)
        assert row["params_m"] == pytest.approx(row["paper_params_m"], rel=tolerance)
        assert row["static_gmacs"] < row["gmacs"] and row["static_params_m"] < row["params_m"]

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_counted_parameters_are_those_of_the_network(self, name):
        row = architecture_table(SPACE, names=[name])[0]
        with torch.device("meta"):
            model = DynamicRoutingNetwork(num_classes=19, gate="fixed", route=name)
        assert row["static_params_m"] * 1e6 == sum(p.numel() for p in model.parameters())

    @pytest.mark.parametrize("depth", [7, 8, 12, 16, 24, 33])
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_every_depth_has_a_whole_route_to_the_decoder(self, name, depth):
        route = architecture(name, RoutingSpace(depth))
        assert not route.dead_ends and all(scales_of(route))
        assert max(s for _, s in route.nodes) == 3

    def test_fcn_is_one_path_down_and_up(self):
        scales = scales_of(architecture("fcn-32s", SPACE))
        assert all(len(s) == 1 for s in scales)
        path = [min(s) for s in scales]
        assert path == sorted(path[:12]) + sorted(path[12:], reverse=True)

    def test_deeplab_ends_in_parallel_scales(self):
        scales = scales_of(architecture("deeplabv3", SPACE))
        assert [len(s) for s in scales[:14]] == [1] * 14 and scales[13] == {2} and scales[16] == {0, 1, 2, 3}

    def test_u_net_is_symmetric_and_crosses_over(self):
        """Two cells a scale on the way down and up; crossings at every scale, the finest one a free skip."""
        route = architecture("u-net", SPACE)
        scales = scales_of(route)
        assert scales == scales[::-1]
        assert [max(s) for s in scales[:7]] == [0, 0, 1, 1, 2, 2, 3]
        assert {(layer, 0) for layer in range(2, 15)} <= route.skips
        assert (1, 0, KEEP) in route and (8, 1, KEEP) in route and (8, 2, KEEP) in route

    def test_hrnet_keeps_every_branch_and_exchanges(self):
        route = architecture("hrnetv2", SPACE)
        scales = scales_of(route)
        assert all(a <= b for a, b in zip(scales, scales[1:], strict=False)) and scales[16] == {0, 1, 2, 3}
        assert {(15, s, d) for s, d in ((0, DOWN), (1, UP), (1, DOWN), (2, UP), (2, DOWN), (3, UP))} <= route.edges

    def test_auto_deeplab_is_one_path_that_turns_back(self):
        path = [min(s) for s in scales_of(architecture("auto-deeplab", SPACE))]
        assert [s for s, before in zip(path, [None, *path], strict=False) if s != before] == [0, 1, 2, 1, 2, 3, 2, 1]

    def test_what_cannot_be_drawn_is_refused(self):
        with pytest.raises(ValueError, match="no route 'unet': choose one of fcn-32s"):
            architecture("unet", SPACE)
        with pytest.raises(ValueError, match="drawn on 4 scales, this space has 3"):
            architecture("u-net", RoutingSpace(16, 3))
        with pytest.raises(ValueError, match="Auto-DeepLab: depth 5 is too small"):
            architecture("auto-deeplab", RoutingSpace(5))

    @pytest.mark.parametrize(
        ("turns", "message"),
        [
            ({4: 2}, "turn 4: 2 comes from scale 0"),
            ({4: 1, 6: 3}, "turn 6: 3 comes from scale 1"),
            ({4: -1}, "turn 4: -1 lies outside"),
            ({0: 1}, "turn 0: 1 lies outside: layers of a turn are 1 to 16"),
            ({17: 1}, "turn 17: 1 lies outside"),
        ],
    )
    def test_a_walk_that_cannot_be_walked_is_refused(self, turns, message):
        with pytest.raises(ValueError, match=message):
            walk(SPACE, turns)


class TestDeadEnds:
    space = RoutingSpace(4)

    def test_a_path_that_nothing_leads_to_is_a_dead_end(self):
        open_edges = [(0, 0, KEEP), (1, 0, KEEP)]
        route = Route(self.space, [*open_edges, (2, 1, KEEP), (3, 1, UP)])
        assert route.dead_ends == {(2, 1, KEEP), (3, 1, UP)}
        assert route.pruned() == Route(self.space, open_edges)
        with pytest.raises(ValueError, match=r"edge \(2, 1, 1\) \(keep\) is open, but no open path .*pruned"):
            route.check()

    def test_zeros_of_closed_paths_feed_nothing(self):
        """In the authors' networks (1, 1) is reached by the zeros of the closed path down; but no features arrive."""
        route = Route(RoutingSpace(4), [(0, 0, KEEP), (1, 1, KEEP)])
        assert route.space.reached(route.to_gates(), zeros_arrive=True)[1, 1] and (1, 1) not in route.reached
        assert route.dead_ends == {(1, 1, KEEP)}

    def test_free_skips_lead_on(self):
        """(1, 0) and (2, 0) have no open path and hand on what they get."""
        route = Route(self.space, [(0, 0, KEEP), (3, 0, KEEP)])
        assert not route.dead_ends and route.check() is route
        assert {(1, 0), (2, 0)} <= route.skips

    def test_a_node_that_only_sends_down_keeps_nothing(self):
        route = Route(self.space, [(0, 0, DOWN), (1, 0, KEEP), (1, 1, KEEP)])
        assert route.dead_ends == {(1, 0, KEEP)}

    def test_fed_is_what_a_walk_finds(self):
        """Against a plain search over all paths, on random routes of several images at once."""
        rng = np.random.default_rng(0)
        gates = (rng.random((40, *self.space.legal.shape)) < 0.3) * self.space.legal
        fed = self.space.reached(gates)
        step = {UP: -1, KEEP: 0, DOWN: 1}
        for one, found in zip(gates, fed, strict=True):
            front, seen = [(0, 0)], {(0, 0)}
            while front:
                layer, s = front.pop()
                ways = [d for d in (UP, KEEP, DOWN) if one[layer, s, d]] or [KEEP]
                for d in ways if layer < self.space.depth else []:
                    node = (layer + 1, s + step[d])
                    if node not in seen:
                        seen.add(node)
                        front.append(node)
            assert {tuple(n) for n in np.argwhere(found).tolist()} == seen


class TestStaticNetworks:
    def random_routes(self, space: RoutingSpace, count: int) -> list[Route]:
        rng = np.random.default_rng(1)
        drawn = ((rng.random(space.legal.shape) < rng.uniform(0.3, 0.9)) * space.legal for _ in range(10 * count))
        return [r for r in (Route.from_gates(space, gates).pruned() for gates in drawn) if len(r)][:count]

    def test_outputs_are_those_of_the_forced_route(self, tiny_network):
        images = torch.rand(2, 3, 70, 90)
        routes = self.random_routes(tiny_network.space, 12)
        assert len(routes) == 12
        for route in routes:
            expected = tiny_network(images, route)
            static = tiny_network.specialize(route)
            for forward in (static, SkipEngine(static)):
                result = forward(images)
                torch.testing.assert_close(result.logits, expected.logits, rtol=1e-5, atol=1e-5)
                assert torch.equal(result.gates, expected.gates)

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_has_no_gates_and_no_unused_parameters(self, name):
        model = DynamicRoutingNetwork(
            num_classes=4, depth=8, base_channels=4, stem_channels=4, gate="fixed", route=name
        )
        assert not model.config.gated and not model.gate_parameters()
        model(torch.rand(2, 3, 64, 64)).logits.square().sum().backward()
        assert [key for key, p in model.named_parameters() if p.grad is None] == []

    def test_is_saved_with_its_edges_and_loaded(self, tmp_path):
        model = DynamicRoutingNetwork(
            num_classes=4, depth=8, base_channels=4, stem_channels=4, gate="fixed", route="u-net"
        ).eval()
        loaded = load(model.save(tmp_path / "static"))
        assert loaded.route == model.route == architecture("u-net", RoutingSpace(8))
        assert len(json.loads((tmp_path / "static" / "config.json").read_text())["route"]) == len(model.route)
        images = torch.rand(1, 3, 64, 96)
        assert torch.equal(loaded(images).logits, model(images).logits)

    def test_is_exported_by_torch(self):
        model = DynamicRoutingNetwork(
            num_classes=4, depth=8, base_channels=4, stem_channels=4, gate="fixed", route="u-net"
        ).eval()
        images = torch.rand(1, 3, 64, 96)
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images).logits, model(images).logits)

    def test_may_be_specialized_further_but_not_widened(self, tiny_network):
        route = self.random_routes(tiny_network.space, 1)[0]
        static = tiny_network.specialize(route)
        less = Route(route.space, sorted(route.edges)[:-1]).pruned()
        images = torch.rand(1, 3, 64, 64)
        assert torch.equal(static.specialize(less)(images).logits, static(images, less).logits)
        for use in (lambda r: static(images, r), lambda r: SkipEngine(static)(images, r), static.specialize):
            with pytest.raises(ValueError, match="the network has no edge"):
                use(Route.all_open(route.space))

    def test_free_skips_of_single_images(self, tiny_network):
        """One image runs a node that has no keep edge, another drops it: the one does not change the other."""
        space = tiny_network.space
        route = Route(space, [(0, 0, DOWN), (1, 1, KEEP)])
        static = tiny_network.specialize(route)
        images, routes = torch.rand(2, 3, 64, 96), [route, Route(space)]
        expected = tiny_network(images, routes)
        for forward in (static, SkipEngine(static), SkipEngine(static, backend="eager")):
            result = forward(images, routes)
            torch.testing.assert_close(result.logits, expected.logits, rtol=1e-5, atol=1e-5)
            assert torch.equal(result.gates, expected.gates)

    def test_keeps_precision_and_counts_its_own_cost(self, tiny_network):
        route = self.random_routes(tiny_network.space, 1)[0]
        static = tiny_network.double().specialize(route)
        assert all(p.dtype == torch.float64 for p in static.parameters())
        cost = model_cost(static, (64, 96))
        assert (
            cost.full == cost.of_route(route) < model_cost(tiny_network, (64, 96)).of_route(Route.all_open(route.space))
        )

    def test_wrong_routes_are_refused(self, tiny_network):
        space = tiny_network.space
        with pytest.raises(ValueError, match="no open path leads from the stem"):
            tiny_network.specialize(Route(space, [(2, 2, KEEP)]))
        with pytest.raises(ValueError, match="drawn in RoutingSpace.depth=5"):
            tiny_network.specialize(Route.all_open(RoutingSpace(5)))
        with pytest.raises(ValueError, match="is no edge of"):
            DynamicRoutingNetwork(num_classes=4, depth=4, gate="fixed", route=[(9, 0, "keep")])
        with pytest.raises(ValueError, match="is no edge: give"):
            DynamicRoutingNetwork(num_classes=4, depth=4, gate="fixed", route=[(0, 0, "sideways")])
        with pytest.raises(ValueError, match="has no gates: set gate to fixed"):
            DynamicRoutingNetwork(num_classes=4, depth=8, route="u-net")
        with pytest.raises(ValueError, match="route has no edges"):
            DynamicRoutingNetwork(num_classes=4, depth=4, gate="fixed", route=[])


class TestCommonRoute:
    space = RoutingSpace(4)

    def gates(self) -> np.ndarray:
        """Four images: (0,0) keep open in all, down in two; (1,1) keep open in the two that go down, (2,1) in one."""
        gates = np.zeros((4, *self.space.legal.shape), dtype=np.float32)
        gates[:, 0, 0, KEEP] = 0.9
        gates[:2, 0, 0, DOWN] = 0.01  # open, however little
        gates[:2, 1, 1, KEEP] = 0.5
        gates[:1, 2, 1, UP] = 0.5
        return gates

    @pytest.mark.parametrize(
        ("threshold", "edges"),
        [
            (1.0, [(0, 0, KEEP)]),
            (0.5, [(0, 0, KEEP), (0, 0, DOWN), (1, 1, KEEP)]),
            (0.25, [(0, 0, KEEP), (0, 0, DOWN), (1, 1, KEEP), (2, 1, UP)]),
        ],
    )
    def test_keeps_what_is_open_often(self, threshold, edges):
        assert common_route(self.gates(), threshold) == Route(self.space, edges)

    def test_is_pruned(self):
        gates = self.gates()
        gates[:, 3, 3, KEEP] = 1.0
        assert common_route(gates, 1.0) == Route(self.space, [(0, 0, KEEP)])

    def test_of_a_network_can_be_trained_as_a_static_one(self, tiny_network):
        gates = spread_gates(tiny_network, seed=3)(torch.rand(6, 3, 64, 64)).gates.detach().numpy()
        static = tiny_network.specialize(common_route(gates, 0.5))
        assert 0 < len(static.route) < len(tiny_network.route)

    def test_what_makes_no_route_is_refused(self):
        gates = self.gates()
        gates[0, 0, 0] = 0
        with pytest.raises(ValueError, match="a threshold of 1 closes everything.*Choose a lower one"):
            common_route(gates, 1.0)
        with pytest.raises(ValueError, match="threshold is 0"):
            common_route(gates, 0.0)
        with pytest.raises(ValueError, match="at least one image"):
            common_route(gates[:0], 0.5)


class TestSoftmaxGate:
    def test_one_path_leaves_every_node(self):
        model = DynamicRoutingNetwork(num_classes=4, depth=4, base_channels=8, stem_channels=8, gate="softmax").eval()
        with torch.no_grad():
            for node in model.nodes.values():
                node.gate.score.weight.normal_(std=2.0)
        images = torch.rand(3, 3, 64, 96)
        result = model(images)
        is_open = (result.gates > 0).numpy()
        fed = model.space.reached(is_open)
        assert (is_open.sum(-1)[fed] == 1).all()
        skipping = SkipEngine(model)(images)
        torch.testing.assert_close(skipping.logits, result.logits, rtol=1e-4, atol=1e-5)

    def test_learns(self):
        model = DynamicRoutingNetwork(num_classes=4, depth=4, base_channels=8, stem_channels=8, gate="softmax").train()
        model(torch.rand(2, 3, 64, 64)).logits.square().sum().backward()
        assert model.node(0, 0).gate.score.weight.grad.abs().sum() > 0


class TestCommand:
    def test_writes_table_and_picture(self, tmp_path, capsys):
        out, picture = tmp_path / "new" / "all.json", tmp_path / "all.svg"
        assert main(["architectures", "--size", "256x512", "--json", str(out), "--figure", str(picture)]) == 0
        rows = json.loads(out.read_text())
        assert [row["name"] for row in rows][:5] == [known.name for known in ARCHITECTURES.values()]
        keys = {"name", "nodes", "edges", "params_m", "gmacs", "paper_params_m", "paper_gmacs"}
        assert all(keys <= set(row) for row in rows)
        assert rows[2]["paper_gmacs"] == 53.9 and rows[2]["gmacs"] < 4
        assert picture.read_text().count("layer") >= 6
        shown = capsys.readouterr().out
        assert "Auto-DeepLab" in shown and "256x512" in shown

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--size", "1024"], "--size is '1024': give HEIGHTxWIDTH"),
            (["--size", "16x16"], "both at least 32"),
            (["--depth", "5"], "FCN-32s: depth 5 is too small: its 6 turns"),
            (["--depth", "2"], "depth 2 is too small for 4 scales"),
            (["--convention", "flops"], "cost convention 'flops': choose one of"),
            (["--figure", "all.jpg"], "all.jpg: an image is written as .png or .svg"),
            (["--json", "/proc/none/all.json"], "cannot write into /proc/none"),
        ],
    )
    def test_mistakes_are_named(self, words, message, capsys):
        assert main(["architectures", *words]) == 2
        assert message in capsys.readouterr().err

    def train(self, tmp_path, *words: str) -> int:
        tiny = [
            "--model.base_channels",
            "4",
            "--model.stem_channels",
            "4",
            "--data.image_size",
            "[32, 64]",
        ]
        tiny += ["--data.crop", "[32, 32]", "--data.batch_size", "2", "--data.train_images", "4", "--data.workers", "0"]
        tiny += ["--data.val_images", "2", "--recipe.iterations", "2", "--recipe.precise_bn_batches", "1"]
        return main(["train", *tiny, "--output", str(tmp_path / "run"), *words])

    def test_a_route_file_trains_a_static_network(self, tmp_path):
        """From `common_route` to a network of one's own."""
        route = Route(RoutingSpace(4), [(0, 0, KEEP), (1, 0, DOWN), (2, 1, KEEP), (4, 1, KEEP)])
        (tmp_path / "common.json").write_text(route.to_json())
        words = ["--model.depth", "4", "--model.gate", "fixed", "--model.route", str(tmp_path / "common.json")]
        assert self.train(tmp_path, *words) == 0
        assert load(tmp_path / "run" / "last").route == route

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--model.depth", "8", "--model.route", "u-net"], "has no gates: set gate to fixed"),
            (["--model.depth", "8", "--model.gate", "fixed", "--model.route", "unet"], "no route 'unet'"),
            (["--model.depth", "5", "--model.gate", "fixed", "--model.route", "ROUTE"], "the depths must match"),
            (
                ["--model.depth", "4", "--model.gate", "fixed", "--model.route", "ROUTE"],
                "that no path leads to, the first is",
            ),
            (["--model.depth", "4", "--model.gate", "fixed", "--model.route", "none.json"], "none.json: no such file"),
            (["--model.depth", "4", "--model.gate", "fixed", "--gate_budget.weight", "0.5"], "cannot keep a budget"),
        ],
    )
    def test_wrong_routes_are_named(self, words, message, tmp_path, capsys):
        path = tmp_path / "route.json"
        path.write_text(Route(RoutingSpace(4), [(2, 2, KEEP)]).to_json())
        assert self.train(tmp_path, *(str(path) if word == "ROUTE" else word for word in words)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
