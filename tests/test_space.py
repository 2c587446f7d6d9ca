"""The grid of nodes and edges, and routes in it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from routeseg.space import DOWN, KEEP, UP, Route, RoutingSpace


def gates_of(space: RoutingSpace, *edges: tuple[int, int, int], strength: float = 0.5) -> np.ndarray:
    gates = np.zeros(space.legal.shape, dtype=np.float32)
    for edge in edges:
        gates[edge] = strength
    return gates


def reached_nodes(space: RoutingSpace, *edges: tuple[int, int, int], zeros: bool = True) -> set[tuple[int, int]]:
    return {tuple(node) for node in np.argwhere(space.reached(gates_of(space, *edges), zeros)).tolist()}


class TestRoutingSpace:
    @pytest.mark.parametrize(("depth", "nodes"), [(3, 10), (16, 62), (33, 130)])
    def test_number_of_nodes(self, depth, nodes):
        space = RoutingSpace(depth)
        assert len(space.nodes) == len(set(space.nodes)) == nodes

    @pytest.mark.parametrize(("depth", "scales"), [(3, 4), (16, 4), (5, 3), (1, 2), (4, 1)])
    def test_edges_are_those_of_the_paper(self, depth, scales):
        """Up from all but the finest scale, down from all but the coarsest, keep alone in the last layer."""
        space = RoutingSpace(depth, scales)
        inner = [(layer, s) for layer, s in space.nodes if layer < depth]
        count = {d: sum(edge[2] == d for edge in space.edges) for d in (UP, KEEP, DOWN)}
        assert count[UP] == sum(s > 0 for _, s in inner)
        assert count[DOWN] == sum(s < scales - 1 for _, s in inner)
        assert count[KEEP] == len(space.nodes)

    def test_every_edge_ends_in_a_node_and_all_but_the_first_node_have_one(self):
        space = RoutingSpace(6)
        step = {UP: -1, KEEP: 0, DOWN: 1}
        ends = {(layer + 1, s + step[d]) for layer, s, d in space.edges if layer < space.depth}
        assert ends == set(space.nodes) - {(0, 0)}

    def test_the_mask_marks_the_edges_and_cannot_be_written(self):
        space = RoutingSpace(5)
        assert space.legal.shape == (6, 4, 3)
        assert {tuple(edge) for edge in np.argwhere(space.legal).tolist()} == set(space.edges)
        with pytest.raises(ValueError):
            space.legal[0, 0, UP] = True

    def test_directions_at_the_borders(self):
        space = RoutingSpace(5)
        assert space.directions(0, 0) == (KEEP, DOWN)
        assert space.directions(3, 1) == (UP, KEEP, DOWN)
        assert space.directions(4, 3) == (UP, KEEP)
        assert space.directions(5, 2) == (KEEP,)
        assert space.directions(1, 2) == () and space.directions(6, 0) == () and space.directions(-1, 0) == ()

    @pytest.mark.parametrize(("scales", "stride"), [(1, 4), (3, 16), (4, 32)])
    def test_stride(self, scales, stride):
        assert RoutingSpace(8, scales).stride == stride

    @pytest.mark.parametrize(
        ("depth", "scales", "message"),
        [
            (2, 4, "depth 2 is too small for 4 scales"),
            (0, 1, "depth is 0"),
            (5, 0, "num_scales is 0"),
            (4.0, 4, "depth is 4.0"),
            (True, 1, "depth is True"),
            ("16", 4, "depth is '16'"),
        ],
    )
    def test_what_makes_no_network_is_named(self, depth, scales, message):
        with pytest.raises(ValueError, match=message):
            RoutingSpace(depth, scales)


class TestReached:
    space = RoutingSpace(4)

    def test_all_closed_reaches_scale_0_of_every_layer_along_the_free_skip(self):
        assert reached_nodes(self.space) == {(layer, 0) for layer in range(5)}

    def test_all_open_reaches_every_node(self):
        assert self.space.reached(self.space.legal).sum() == len(self.space.nodes)

    def test_zeros_of_a_closed_path_arrive_where_the_node_has_an_open_one(self):
        """Only down is open at (0,0), so keep sends zeros, and they reach (1,0)."""
        assert {(1, 0), (1, 1)} <= reached_nodes(self.space, (0, 0, DOWN))
        assert (1, 1) in reached_nodes(self.space, (0, 0, KEEP))

    def test_a_node_without_an_open_path_passes_on_along_keep_alone(self):
        found = reached_nodes(self.space, (0, 0, DOWN))
        assert found == {(0, 0)} | {(layer, s) for layer in (1, 2, 3, 4) for s in (0, 1)}

    def test_a_node_that_nothing_reaches_sends_nothing(self):
        closed = reached_nodes(self.space)
        assert reached_nodes(self.space, (3, 3, UP), (2, 2, KEEP), (1, 1, DOWN)) == closed

    def test_an_open_path_that_leads_nowhere_legal_adds_no_node(self):
        gates = np.ones(self.space.legal.shape)  # also outside the mask
        reached = self.space.reached(gates, True)
        assert {tuple(n) for n in np.argwhere(reached).tolist()} == set(self.space.nodes)

    def test_images_of_a_batch_are_apart(self):
        one, other = gates_of(self.space), gates_of(self.space, (0, 0, DOWN), (1, 1, DOWN))
        both = self.space.reached(np.stack([one, other]), True)
        assert both.shape == (2, 5, 4)
        assert np.array_equal(both[0], self.space.reached(one, True))
        assert np.array_equal(both[1], self.space.reached(other, True))
        assert both[1].sum() > both[0].sum()

    def test_zeros_arrive_nowhere_unless_the_network_says_so(self):
        found = reached_nodes(self.space, (0, 0, DOWN), zeros=False)
        assert found == {(0, 0)} | {(layer, 1) for layer in (1, 2, 3, 4)}
        assert found < reached_nodes(self.space, (0, 0, DOWN))


class TestRoute:
    space = RoutingSpace(4)

    def test_gates_there_and_back(self):
        edges = [(0, 0, DOWN), (1, 1, KEEP), (2, 1, UP), (4, 3, KEEP)]
        route = Route(self.space, edges)
        assert {tuple(edge) for edge in np.argwhere(route.to_gates()).tolist()} == set(edges)
        assert route.to_gates().dtype == np.float32 and route.to_gates().max() == 1
        assert Route.from_gates(self.space, route.to_gates()) == route
        assert Route(self.space) == Route.from_gates(self.space, np.zeros(self.space.legal.shape))

    def test_from_gates_takes_what_is_above_the_threshold(self):
        gates = gates_of(self.space, (0, 0, KEEP), strength=0.5)
        gates[1, 0, KEEP] = 0.2
        assert list(Route.from_gates(self.space, gates)) == [(0, 0, KEEP), (1, 0, KEEP)]
        assert list(Route.from_gates(self.space, gates, threshold=0.2)) == [(0, 0, KEEP)]
        assert len(Route.from_gates(self.space, gates, threshold=0.5)) == 0

    def test_from_gates_wants_one_image(self):
        with pytest.raises(ValueError, match="one image's"):
            Route.from_gates(self.space, np.zeros((2, 5, 4, 3)))

    def test_from_gates_refuses_an_illegal_open_edge(self):
        with pytest.raises(ValueError, match=r"node \(0, 0\) only has keep, down"):
            Route.from_gates(self.space, gates_of(self.space, (0, 0, UP)))

    def test_all_open(self):
        route = Route.all_open(self.space)
        assert np.array_equal(route.to_gates() > 0, self.space.legal)
        assert route.reached == set(self.space.nodes) and not route.skips

    def test_skips_are_the_reached_nodes_without_an_open_edge(self):
        route = Route(self.space, [(0, 0, DOWN), (1, 1, KEEP), (3, 3, UP)])
        assert route.skips == {(2, 1), (3, 1), (4, 1)}
        assert route.reached == route.skips | {(0, 0), (1, 1)}

    def test_json_there_and_back(self):
        route = Route(self.space, [(0, 0, DOWN), (1, 1, UP)])
        for one in (Route(self.space), Route.all_open(self.space), route):
            again = Route.from_json(one.to_json())
            assert again == one and again.space == one.space
        data = json.loads(route.to_json())
        assert data == {"depth": 4, "num_scales": 4, "open": [[0, 0, "down"], [1, 1, "up"]]}

    def test_json_may_hold_more(self):
        route = Route(self.space, [(0, 0, DOWN)])
        assert Route.from_json(json.dumps(json.loads(route.to_json()) | {"cost_gmacs": 1.5})) == route

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "null",
            "{}",
            '{"depth": 4, "num_scales": 4}',
            '{"depth": 2, "num_scales": 4, "open": []}',
            '{"depth": 4, "num_scales": 4, "open": [[0, 0, "left"]]}',
            '{"depth": 4, "num_scales": 4, "open": [[0, 0]]}',
            '{"depth": 4, "num_scales": 4, "open": 3}',
            '{"depth": 4, "num_scales": 4, "open": [["a", 0, "up"]]}',
            '{"depth": 4, "num_scales": 4, "open": [[0, null, "keep"]]}',
            '{"depth": 4, "num_scales": 4, "open": [[Infinity, 0, "keep"]]}',
            '{"depth": 4, "num_scales": 4, "open": [[1.5, 0, "keep"]]}',
        ],
    )
    def test_what_is_no_route_is_a_value_error(self, text):
        with pytest.raises(ValueError):
            Route.from_json(text)

    def test_json_with_an_edge_that_the_space_lacks_names_it(self):
        with pytest.raises(ValueError, match=r"edge \(0, 0, 0\) \(up\)"):
            Route.from_json('{"depth": 4, "num_scales": 4, "open": [[0, 0, "up"]]}')

    def test_equality_and_hash(self):
        edges = [(0, 0, DOWN), (0, 0, KEEP)]
        route = Route(self.space, edges)
        same = Route(RoutingSpace(4), np.array(edges[::-1] + edges))
        assert route == same and hash(route) == hash(same) and len({route, same}) == 1
        assert route != Route(self.space, edges[:1])
        assert route != Route(RoutingSpace(5), edges), "the space belongs to the route"

    def test_a_route_and_a_space_cannot_be_changed(self):
        route = Route(self.space, [(0, 0, KEEP)])
        for thing, name in ((route, "edges"), (route, "space"), (self.space, "depth")):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(thing, name, None)
        route.to_gates()[:] = 1
        assert len(Route.from_gates(self.space, route.to_gates())) == 1

    def test_as_a_collection(self):
        route = Route(self.space, [(1, 1, UP), (0, 0, DOWN)])
        assert len(route) == 2 and list(route) == [(0, 0, DOWN), (1, 1, UP)]
        assert (1, 1, UP) in route and (1, 1, KEEP) not in route

    @pytest.mark.parametrize(
        ("edge", "message"),
        [
            ((0, 0, UP), r"edge \(0, 0, 0\) \(up\).*node \(0, 0\) only has keep, down"),
            ((4, 0, DOWN), r"edge \(4, 0, 2\) \(down\).*only has keep"),
            ((3, 3, DOWN), r"only has up, keep"),
            ((9, 0, KEEP), r"edge \(9, 0, 1\).*layers run from 0 to 4.*another depth"),
            ((-1, 0, KEEP), r"layers run from 0 to 4"),
            ((1, 2, KEEP), r"layer 1 has scales 0 to 1"),
            ((1, 1, 3), r"direction 0 up, 1 keep, 2 down"),
            ((1, 1), r"an edge is \(layer, scale, direction\)"),
        ],
    )
    def test_an_edge_that_is_none_is_named(self, edge, message):
        with pytest.raises(ValueError, match=message):
            Route(self.space, [(0, 0, KEEP), edge])
