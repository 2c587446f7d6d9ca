"""The network's contract: shapes, per-image routing, padding, forced routes; engines against the dense forward."""

import copy
import json
import random
import re

import pytest
import torch

import routeseg
from conftest import spread_gates, with_exits
from routeseg import DynamicRoutingNetwork, Route, RoutingSpace, SkipEngine
from routeseg.architectures import architecture
from routeseg.model import checkpoints
from routeseg.space import DIRECTIONS, DOWN

ENGINES = {
    "dense": DynamicRoutingNetwork.eval,
    "skip": SkipEngine,
    "skip eager": lambda m: SkipEngine(m, backend="eager"),
}


def random_route(space: RoutingSpace, seed: int, share: float = 0.5) -> Route:
    return Route(space, random.Random(seed).sample(space.edges, round(share * len(space.edges))))


def images(batch=2, height=64, width=96, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def close(ours, expected, tolerance=1e-5):
    return (ours - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96), (37, 200)])
@pytest.mark.parametrize("engine", ENGINES)
def test_shapes_and_gates(tiny_network, size, engine):
    space = tiny_network.space
    with torch.no_grad():
        result = ENGINES[engine](tiny_network)(images(2, *size))
    assert result.logits.shape == (2, 5, *size)
    assert result.labels.shape == (2, *size)
    assert result.gates.shape == (2, space.depth + 1, space.num_scales, 3)
    gates = result.gates.numpy()
    assert (gates >= 0).all() and (gates < 1).all()
    assert (gates[:, ~space.legal] == 0).all()
    assert (gates[~space.reached(gates)] == 0).all()
    assert (gates > 0).any() and (gates[:, space.legal] == 0).any(), "the network should have open and closed paths"


@pytest.mark.parametrize("engine", ENGINES)
def test_batch_gives_what_single_images_give(tiny_network, engine):
    """Routing and padding are per image: also images that route differently do not disturb each other."""
    forward = ENGINES[engine](tiny_network)
    batch = torch.cat([images(3, 50, 70), torch.zeros(1, 3, 50, 70), torch.ones(1, 3, 50, 70)])
    with torch.no_grad():
        together = forward(batch)
        routes = {Route.from_gates(tiny_network.space, g.numpy()) for g in together.gates}
        assert len(routes) > 1, "the images should differ in their routes"
        for i in range(len(batch)):
            alone = forward(batch[i : i + 1])
            assert close(alone.logits, together.logits[i : i + 1])
            assert torch.allclose(alone.gates, together.gates[i : i + 1], atol=1e-6)


def test_image_types(tiny_network):
    """uint8 and 0..1 are the same image."""
    bytes_ = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(tiny_network(bytes_).logits, tiny_network(bytes_ / 255.0).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.rand(3, 64, 64), "expected"),
        (torch.rand(1, 1, 64, 64), "expected"),
        (torch.rand(0, 3, 64, 64), "B at least 1"),
        (torch.rand(1, 3, 31, 64), "smallest size"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), "uint8"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_bad_images(tiny_network, engine, bad, message):
    with pytest.raises(ValueError, match=message):
        ENGINES[engine](tiny_network)(bad)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_forced_route(tiny_network, engine, share):
    """Exactly the given edges are open, except where nothing arrives; with "own", by the gates' activations."""
    space, forward = tiny_network.space, ENGINES[engine](tiny_network)
    route = random_route(space, 1, share)
    expected = torch.from_numpy(route.to_gates())
    expected = expected * torch.from_numpy(space.reached(expected.numpy()))[..., None]
    with torch.no_grad():
        one = forward(images(), route=route)
        own = forward(images(), route=route, activation="own")
    assert torch.equal(one.gates, expected.expand_as(one.gates))
    assert (own.gates[:, route.to_gates() == 0] == 0).all() and (own.gates < 1).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_own_route_with_own_activations_is_the_free_forward(tiny_network, engine):
    forward = ENGINES[engine](tiny_network)
    with torch.no_grad():
        free = forward(images(3))
        routes = [Route.from_gates(tiny_network.space, gates.numpy()) for gates in free.gates]
        forced = forward(images(3), route=routes, activation="own")
    assert close(forced.logits, free.logits) and torch.allclose(forced.gates, free.gates, atol=1e-6)


@pytest.mark.parametrize("activation", ["one", "own"])
@pytest.mark.parametrize("changes", [{}, {"small_gate": True}, {"gate": "fixed"}, {"num_scales": 3, "depth": 2}])
@pytest.mark.parametrize("size", [(64, 96), (45, 130)])
def test_skip_engine_equals_dense(changes, size, activation):
    model = spread_gates(
        DynamicRoutingNetwork(**{"num_classes": 5, "depth": 5, "base_channels": 8, "stem_channels": 8} | changes)
    )
    model.eval()
    batch = images(3, *size)
    some = [random_route(model.space, seed, share) for seed, share in enumerate((0.2, 0.5, 0.9))]
    engines = [ENGINES[name](model) for name in ("skip", "skip eager")]
    for route in (None, Route(model.space), Route.all_open(model.space), some):
        with torch.no_grad():
            dense = model(batch, route, activation=activation)
        for engine in engines:
            skip = engine(batch, route, activation=activation)
            assert close(skip.logits, dense.logits)
            assert torch.allclose(skip.gates, dense.gates, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_skip_engine_is_as_exact_as_dense_when_deep(seed):
    """Sixteen layers of random gates amplify rounding, in the dense forward too. In float64 both agree; in
    float32 the engine is no further from that than the dense forward is."""
    model = spread_gates(DynamicRoutingNetwork(num_classes=7, base_channels=8, stem_channels=8), seed).eval()
    exact = copy.deepcopy(model).double()
    batch = images(2, 96, 128, seed)
    with torch.no_grad():
        truth = exact(batch.double())
        assert close(SkipEngine(exact)(batch.double()).logits, truth.logits, 1e-12)
        scale = truth.logits.abs().max()
        dense = (model(batch).logits - truth.logits).abs().max() / scale
        skip = (SkipEngine(model)(batch).logits - truth.logits).abs().max() / scale
    assert skip <= max(3 * dense, 1e-5)


def count_images(model) -> list[tuple[str, int]]:
    """What every cell and transform of a network computes from now on: (place, images)."""
    ran: list[tuple[str, int]] = []
    for place, node in ((n, model.node(*n)) for n in model.space.nodes):
        parts = {place: node.cell}
        parts |= {(*place, DIRECTIONS.index(name)): transform[0] for name, transform in node.transforms.items()}
        if node.gate is not None:
            parts[(*place, "gate")] = node.gate.squeeze[0]
        for key, part in parts.items():
            part.register_forward_hook(lambda m, args, out, key=key: ran.append((key, len(args[0]))))
    return ran


def test_skip_engine_does_not_compute_what_is_closed(tiny_network):
    """It runs the cells of the open nodes, for the images that open them, and no other; likewise the transforms."""
    engine, space = SkipEngine(tiny_network, backend="eager"), tiny_network.space
    routes = [random_route(space, 1, 0.4), random_route(space, 2, 0.4)]
    ran = count_images(engine.forward.model)
    gates = engine(images(2), route=routes).gates.numpy() > 0
    expected = [(node, int(gates[:, *node].any(-1).sum())) for node in space.nodes]
    expected += [(edge, int(gates[:, *edge].sum())) for edge in space.edges]
    assert sorted(ran, key=str) == sorted([(key, count) for key, count in expected if count], key=str)


@pytest.mark.parametrize("gate", ["soft", "softmax"])
@pytest.mark.parametrize("given", [False, True], ids=["gates", "routes"])
def test_training_computes_a_part_for_the_images_that_run_it(gate, given):
    """And so BatchNorm normalises over these, a gate's over those that reach it: as in prediction no other image, which
    would be zeros or not its own features, has a share in them."""
    model = spread_gates(DynamicRoutingNetwork(num_classes=5, depth=6, base_channels=8, stem_channels=8, gate=gate))
    routes = [architecture(name, model.space) for name in ["u-net"] * 4 + ["fcn-32s"] * 4] if given else None
    batch, ran = images(8) * torch.linspace(0.2, 1, 8)[:, None, None, None], count_images(model)
    gates = model.train()(batch, routes).gates.detach().numpy()
    reached = model.space.reached(gates)
    expected = [(node, int((gates[:, *node] > 0).any(-1).sum())) for node in model.space.nodes]
    expected += [(edge, int((gates[:, *edge] > 0).sum())) for edge in model.space.edges]
    if not given:
        expected += [((*node, "gate"), int(reached[:, *node].sum())) for node in model.space.nodes]
    assert sorted(ran, key=str) == sorted([(key, count) for key, count in expected if count], key=str)
    assert len({count for _, count in ran}) > 1, "the images should differ in their routes"


def test_one_image_that_reaches_a_pixel():
    """A single value has no variance: the running statistics normalise it."""
    model = DynamicRoutingNetwork(num_classes=5, depth=6, base_channels=8, stem_channels=8, gate="fixed").train()
    fcn = architecture("fcn-32s", model.space)
    routes = [fcn, Route.from_named_edges(model.space, [(0, 0, "keep")])]
    norm = model.node(*next(node for node in fcn.nodes if node[1] == 3)).cell["sep_conv_3x3"][0][2]
    model(images(2, 32, 32), routes).logits.sum().backward()
    assert norm.num_batches_tracked == 0 and torch.isfinite(norm.weight.grad).all()


def test_dropped_cells_pass_the_input_on(tiny_network):
    """With every path closed the stem's output reaches the decoder as it is (Eq. 5)."""
    batch = images(1)
    with torch.no_grad():
        result = tiny_network(batch, route=Route(tiny_network.space))
        stem = tiny_network.stem(tiny_network.normalize(batch))
        empty = [stem.new_zeros(1, 8 * 2**s, 16 // 2**s, 24 // 2**s) for s in range(1, 4)]
        assert close(result.logits, tiny_network.decoder([stem, *empty]))
    assert result.gates.abs().sum() == 0


def test_routes_that_do_not_fit(tiny_network):
    with pytest.raises(ValueError, match="depth=7"):
        tiny_network(images(), route=Route.all_open(RoutingSpace(7)))
    with pytest.raises(ValueError, match="1 routes for 2 images"):
        tiny_network(images(), route=[Route.all_open(tiny_network.space)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 2}, "depth 2 is too small"),
        ({"depth": 0}, "depth"),
        ({"base_channels": 7}, "even"),
        ({"base_channels": 0}, "base_channels"),
        ({"num_classes": 0}, "num_classes"),
        ({"cell_operations": ["conv"]}, "sep_conv_3x3"),
        ({"gate": "hard"}, "gate"),
        ({"class_names": ["a"]}, "class_names has 1 entries for 5"),
        ({"palette": [[0, 0, 0]]}, "palette"),
    ],
)
def test_arguments_that_make_no_network(arguments, message):
    with pytest.raises(ValueError, match=message):
        DynamicRoutingNetwork(**{"num_classes": 5, "depth": 4, "base_channels": 8} | arguments)


def test_every_parameter_learns():
    model = spread_gates(DynamicRoutingNetwork(num_classes=3, depth=4, base_channels=8, stem_channels=8)).train()
    for node in model.nodes.values():
        torch.nn.init.constant_(node.gate.score.bias, 1.0)
        node.gate.score.weight.data.mul_(0.01)
    result = model(images())
    (result.logits.square().mean() + result.gates.sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_gates_start_open():
    """tanh(1.5) = 0.905 (Sec. 3.2)."""
    model = DynamicRoutingNetwork(num_classes=3, depth=3, base_channels=8).eval()
    with torch.no_grad():
        gates = model(images()).gates.numpy()
    assert abs(gates[:, model.space.legal].mean() - 0.905) < 0.02


def test_save_and_load(tmp_path, tiny_network):
    folder = tiny_network.save(tmp_path / "net")
    assert {p.name for p in folder.iterdir()} >= {"model.safetensors", "config.json"}
    loaded = routeseg.load(folder)
    again = DynamicRoutingNetwork.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = tiny_network(images()).logits
        assert torch.equal(loaded(images()).logits, expected) and torch.equal(again(images()).logits, expected)
    half = tiny_network.half().save(tmp_path / "half")
    with torch.no_grad():
        assert close(routeseg.load(half)(images()).logits, expected, 0.05)
    assert routeseg.load(half).decoder.predictor.weight.dtype == torch.float32


def test_networks_are_averaged(tmp_path):
    calibrated = with_exits((64, 96))
    folders = [calibrated.save(tmp_path / "a")]
    other = routeseg.load(folders[0])
    with torch.no_grad():
        for name, tensor in other.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(1.0 if name.startswith("exits.") else 0.5)
    folders.append(other.save(tmp_path / "b"))
    mean = checkpoints.average([*folders, folders[0]])
    decided = {tensor.data_ptr() for tensor in mean.exits.calibration()}
    for name, tensor in mean.state_dict().items():
        before, changed = calibrated.state_dict()[name], other.state_dict()[name]
        expected = before if tensor.data_ptr() in decided else before + (changed - before) / 3
        assert torch.allclose(tensor.double(), expected.double(), atol=1e-5), name
    assert torch.equal(mean.exits.frequencies, calibrated.exits.frequencies) and mean.exits.calibrated
    alone = checkpoints.average(folders[:1]).state_dict()
    assert all(torch.equal(alone[name], tensor) for name, tensor in calibrated.state_dict().items())


def test_other_networks_are_not_averaged(tmp_path, tiny_network):
    folder = tiny_network.save(tmp_path / "net")
    other = DynamicRoutingNetwork(num_classes=5, depth=5, base_channels=8, stem_channels=8).save(tmp_path / "deeper")
    with pytest.raises(ValueError, match=f"{other} is another network than {folder}"):
        checkpoints.average([folder, other])
    with pytest.raises(ValueError, match="nothing to average"):
        checkpoints.average([])


@pytest.mark.parametrize("damage", ["no folder", "no weights", "truncated", "other config", "no json", "unknown key"])
def test_damaged_checkpoints(tmp_path, tiny_network, damage):
    folder = tiny_network.save(tmp_path / "net")
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "no folder":
        folder = tmp_path / "nowhere"
    elif damage == "no weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "other config":
        config.write_text(config.read_text().replace('"depth": 4', '"depth": 5'))
    elif damage == "no json":
        config.write_text("{")
    elif damage == "unknown key":
        config.write_text('{"deph": 4}')
    with pytest.raises(ValueError) as error:
        routeseg.load(folder)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": []},
        {"data_offsets": [0]},
        {"data_offsets": [0, 4, 8]},
        {"data_offsets": [8, 4]},
        {"data_offsets": [-4, 4]},
        {"data_offsets": {}},
        {"data_offsets": "04"},
        {"data_offsets": [None, None]},
        {"data_offsets": [0, 10**400]},
        {"data_offsets": [0, 1e400]},
        {"shape": 5},
        {"shape": [1e400]},
        {"shape": [[]]},
        {"shape": [10**400]},
        {"dtype": []},
        {"dtype": None},
        [],
        None,
        7,
        "words",
    ],
)
def test_junk_in_the_header_of_weights(tmp_path, tiny_network, entry):
    path = tiny_network.save(tmp_path / "net") / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name] = header[name] | entry if isinstance(entry, dict) else entry
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        routeseg.load(path.parent)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        '"depth": 1e400',
        '"depth": ' + "1" * 400,
        '"depth": []',
        '"depth": {}',
        '"base_channels": NaN',
        '"exits": [1e400]',
    ]
    + [
        '"palette": [[1e400, 0, 0]]',
        '"class_names": 5',
        '"pixel_mean": "abc"',
        '"depth": ' + "[" * 5000,
        '"route": [[]]',
    ],
)
def test_junk_in_a_config(tmp_path, tiny_network, change):
    path = tiny_network.save(tmp_path / "net") / "config.json"
    path.write_text(f"{{{change}, {path.read_text().lstrip()[1:]}" if change.startswith('"exits') else f"{{{change}}}")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as error:
        routeseg.load(path.parent)
    assert "\n" not in str(error.value)


def test_saving_where_one_cannot(tmp_path, tiny_network):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Choose another folder"):
        tiny_network.save(tmp_path / "file" / "net")


@pytest.mark.parametrize("engine", ["skip", "skip eager"])
def test_zeros_that_arrive_in_all_engines(engine):
    """As in the authors' networks: nodes behind closed paths run on zeros, in the dense and in the skip forward."""
    torch.manual_seed(1)
    options = {"num_classes": 5, "depth": 4, "base_channels": 8, "stem_channels": 8}
    model = spread_gates(DynamicRoutingNetwork(**options, zeros_arrive=True)).eval()
    plain = DynamicRoutingNetwork(**options).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected, found = model(images(6)), ENGINES[engine](model)(images(6))
        without = plain(images(6))
    assert close(found.logits, expected.logits) and torch.allclose(found.gates, expected.gates, atol=1e-6)
    more = (expected.gates > 0) & ~torch.from_numpy(model.space.reached(expected.gates.numpy()))[..., None]
    assert more.any() and (without.gates[more] == 0).all()


@pytest.mark.parametrize("zeros_arrive", [False, True])
def test_gradients_where_only_closed_paths_lead(zeros_arrive):
    """BatchNorm over zeros divides by almost nothing. A chain of nodes that run on them drowns all other gradients, so
    by default they do not run."""
    torch.manual_seed(0)
    model = DynamicRoutingNetwork(
        num_classes=5, depth=16, base_channels=4, stem_channels=4, small_gate=True, zeros_arrive=zeros_arrive
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.bias.normal_(std=0.2)
        for layer in range(16):
            node = model.node(layer, 0)
            node.gate.score.bias[node.directions.index(DOWN)] = -5.0
    result = model.train()(images(4))
    result.logits.square().mean().backward()
    largest = {True: 0.0, False: 0.0}  # at the finest scale, and elsewhere
    for key, parameter in model.named_parameters():
        if key.startswith("nodes.") and parameter.grad is not None:
            finest = key.split(".")[1].endswith("-0")
            largest[finest] = max(largest[finest], float(parameter.grad.abs().max()))
    assert largest[True] > 0
    assert largest[False] > 10 * largest[True] if zeros_arrive else largest[False] == 0
