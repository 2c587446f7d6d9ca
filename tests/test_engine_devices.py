"""The engine for GPUs, without one: what crosses between host and device, recordings of known routes, precisions.

The device of these tests is `meta`, which computes nothing: a dispatch mode sees each transfer, and answers for it.
"""

import logging

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import run, scenes_checkpoint, spread_gates
from pictures import noise, save
from routeseg import DynamicRoutingNetwork, Route, SkipEngine, build_engine
from routeseg.engine import skip
from routeseg.engine.eager import EagerForward
from routeseg.engine.graphs import KEPT, Recordings
from routeseg.model.request import Request
from test_model import close, images, random_route

pytestmark = pytest.mark.usefixtures("one_thread")


class Transfers(TorchDispatchMode):
    """Notes what crosses between host and device; of what the host asks for it gets normal values of its shape."""

    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)
        self.up, self.down, self.other = [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # in inference mode what is made of other operations comes as a whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = [x.is_meta for x in given]
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if copies and on_device == [True] and kwargs.get("device") == torch.device("cpu"):
            self.down.append(given[0].numel())
            return torch.from_numpy(self.generator.standard_normal(given[0].shape, dtype=np.float32))
        if copies and on_device == [False] and kwargs.get("device") == torch.device("meta"):
            self.up.append(given[0].numel())
        elif any(on_device) and not all(on_device):
            self.other.append(str(func))
        elif any(on_device) and any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "unique")):
            self.other.append(str(func))
            return 0
        return func(*args, **kwargs)


def network(**changes):
    options = {"num_classes": 5, "depth": 6, "base_channels": 8, "stem_channels": 8}
    return spread_gates(DynamicRoutingNetwork(**options | changes)).eval()


def transfers_of(model, batch, route=None, activation="one"):
    """The transfers of one forward on a device, and its gates (on the host), as it decided them."""
    engine = SkipEngine(model.to("meta"))
    assert engine.forward.together
    decided, run_it = [], engine.forward._forward
    engine.forward._forward = lambda *args, **keys: decided.append(run_it(*args, **keys)) or decided[-1]
    pictures = torch.empty(batch, 3, 64, 96, dtype=torch.uint8, device="meta")
    with Transfers() as seen:
        result = engine(pictures, route, activation)
    assert result.logits.shape == (batch, 5, 64, 96) and result.gates.is_meta
    return seen, decided[-1][1]


@pytest.mark.parametrize("changes", [{}, {"small_gate": True}, {"gate": "softmax"}, {"zeros_arrive": True}])
def test_one_image_crosses_once_per_layer(changes):
    """Scores come to the host once per layer; nothing goes to the device but the gates of the result, at the end."""
    model = network(**changes)
    seen, gates = transfers_of(model, 1)
    assert not seen.other
    assert len(seen.down) == model.space.depth + 1 and seen.up == [gates.size]
    reached = model.space.reached(gates[0], model.config.zeros_arrive)
    directions = [[len(model.space.directions(layer, s)) * reached[layer, s] for s in range(4)] for layer in range(7)]
    assert seen.down == np.sum(directions, axis=1).tolist(), "no more than the scores of the nodes that are reached"
    assert (gates > 0).any() and (gates[:, model.space.legal] == 0).any()


@pytest.mark.parametrize("activation", ["one", "own"])
def test_images_that_differ_cross_at_most_once_per_layer_and_direction(activation):
    model = network()
    layers = model.space.depth + 1
    seen, gates = transfers_of(model, 4)
    assert len({image.tobytes() for image in gates}) == 4
    assert not seen.other and len(seen.down) == layers and 1 < len(seen.up) <= layers + 1
    routes = [random_route(model.space, seed) for seed in range(4)]
    seen, gates = transfers_of(model, 4, routes, activation)
    assert not seen.other and len(seen.down) == (layers if activation == "own" else 0) and len(seen.up) <= layers + 1


@pytest.mark.parametrize("batch", [1, 3])
def test_a_known_route_asks_the_device_nothing(batch):
    model = network()
    route = random_route(model.space, 1)
    static = model.specialize(route.pruned())
    for net, given, activation in ((model, route, "one"), (static, None, "one"), (static, None, "own")):
        seen, gates = transfers_of(net, batch, given, activation)
        assert not seen.other and not seen.down and seen.up == [gates.size]
        expected = route.to_gates() * route.space.reached(route.to_gates())[..., None]
        assert (gates == expected).all()


@pytest.mark.parametrize("changes", [{}, {"small_gate": True}, {"gate": "softmax"}, {"zeros_arrive": True}])
@pytest.mark.parametrize("backend", ["eager", "batched"])
def test_the_operations_for_gpus_give_what_dense_gives(changes, backend):
    model = network(**changes)
    engine = SkipEngine(model, backend=backend)
    batch = torch.cat([images(3, 50, 70), torch.zeros(1, 3, 50, 70), torch.ones(1, 3, 50, 70)])
    some = [random_route(model.space, seed, share) for seed, share in enumerate((0.1, 0.3, 0.5, 0.7, 0.9))]
    for route in (None, Route(model.space), Route.all_open(model.space), some):
        for activation in ("one", "own"):
            with torch.no_grad():
                expected = model(batch, route, activation)
            found = engine(batch, route, activation)
            assert close(found.logits, expected.logits) and torch.allclose(found.gates, expected.gates, atol=1e-6)
            assert found.logits.dtype == found.gates.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.006)])
def test_half_precision_is_near_to_float32(dtype, bound):
    """Maps in half precision and channels_last; scores, activations and logits in float32, not rounded."""
    model = network()
    half, batch = EagerForward(model, dtype, together=True), images(3)
    assert half.model.stem[0][0].weight.dtype == dtype
    assert {node.gate.score.weight.dtype for node in half.model.nodes.values()} == {torch.float32}
    layouts = []
    for node in half.model.nodes.values():
        node.cell.register_forward_hook(lambda m, x, out: layouts.append((out.dtype, out.stride()[1] == 1)))
    with torch.inference_mode():
        free = half(batch, Request.of(model.config, 3))
        free_logits, gates = free.logits, free.gates
        routes = [random_route(model.space, seed) for seed in range(3)]
        logits = half(batch, Request.of(model.config, 3, routes)).logits
        exact = model(batch, routes)
        for image in range(3):  # by its own choices
            route = Route.from_gates(model.space, gates[image].numpy())
            chosen = model(batch[image : image + 1], route, "own")
            opened = chosen.gates > 0
            assert (chosen.gates[0] - gates[image])[opened[0]].abs().max() < 4 * bound
    assert set(layouts) == {(dtype, True)}
    assert logits.dtype == gates.dtype == free_logits.dtype == torch.float32
    assert close(logits, exact.logits, bound) and not close(logits, exact.logits, 1e-6)
    assert (gates.bfloat16() != gates).any() and (logits.to(dtype) != logits).any()


class FxRecorder:
    """Records the operations that a forward calls, in place of kernels that it launches; replays these alone."""

    def __init__(self):
        self.recorded = []

    def record(self, forward, images):
        kept = []

        def logits(x):
            result, gates = forward(x)
            kept.append(gates)
            return result

        self.recorded.append(tuple(images.shape))
        replay = make_fx(logits)(images)
        return lambda x: (replay(x), kept[-1])


def recording_engine(model):
    engine = SkipEngine(model, backend="batched")
    assert engine.forward.recordings is None, "on a CPU nothing is recorded"
    engine.forward.recordings, recorder = Recordings(recorder := FxRecorder()), recorder
    return engine, recorder


def test_recorded_routes_give_the_results_of_unrecorded_ones():
    """For other images, another dtype, another route and another size than those that were recorded."""
    model = network()
    engine, recorder = recording_engine(model)
    plain = SkipEngine(model, backend="batched")
    routes = [random_route(model.space, seed) for seed in (1, 2)]
    cases = [(2, 64, 96, routes[0]), (2, 64, 96, routes[1]), (1, 50, 70, routes[0])]
    for turn in range(4):
        for batch, height, width, route in cases:
            pictures = images(batch, height, width, seed=turn)
            found, expected = engine(pictures, route), plain(pictures, route)
            assert close(found.logits, expected.logits) and torch.equal(found.gates, expected.gates)
    assert recorder.recorded == [(2, 3, 64, 96)] * 2 + [(1, 3, 50, 70)]
    as_bytes = (images(2) * 255).byte()
    for _ in range(2):
        assert close(engine(as_bytes, routes[0]).logits, plain(as_bytes, routes[0]).logits)
    assert len(recorder.recorded) == 4
    static, recorder = recording_engine(model.specialize(routes[0].pruned()))
    for seed in range(3):
        assert close(static(images(seed=seed)).logits, plain(images(seed=seed), routes[0]).logits)
    assert len(recorder.recorded) == 1


def test_what_the_gates_decide_is_never_recorded():
    model = network()
    engine, recorder = recording_engine(model)
    some = [random_route(model.space, seed) for seed in range(2)]
    for _ in range(3):
        engine(images())
        engine(images(), some[0], "own")
        engine(images(), some)  # two routes: the places of the images would have to be brought to the device
    assert not recorder.recorded


class CountingRecorder:
    def __init__(self):
        self.count = 0

    def record(self, forward, images):
        self.count += 1
        return forward


def test_few_recordings_are_kept_those_last_used():
    recordings = Recordings(recorder := CountingRecorder())
    images, forward = torch.zeros(1), lambda x: (x, None)

    def use(*keys):
        before = recorder.count
        for key in keys:
            recordings(key, forward, images)
        return recorder.count - before

    assert use(*range(100, 200)) == 0, "a size that comes once is not recorded"
    first = list(range(KEPT))
    assert use(*first, *first) == KEPT and use(*first) == 0
    assert use(0, "new", "new") == 1 and set(recordings.kept) == {0, *first[2:], "new"}
    assert use(0, *first[2:], "new") == 0


def test_many_sizes_in_turn_do_not_record_forever():
    recordings = Recordings(recorder := CountingRecorder())
    for _ in range(64):
        for key in range(KEPT + 2):
            recordings(key, lambda x: (x, None), torch.zeros(1))
            assert len(recordings.kept) <= KEPT
    assert recorder.count <= 6 * (KEPT + 2)


def test_a_failed_recording_is_said_once_and_changes_nothing(caplog):
    class Failing:
        def record(self, forward, images):
            raise RuntimeError("operation not permitted when stream is capturing\nand so on")

    model = network()
    engine = SkipEngine(model, backend="batched")
    expected = [engine(images(1), route).logits for route in (Route.all_open(model.space), Route(model.space))]
    engine.forward.recordings = Recordings(Failing())
    with caplog.at_level(logging.WARNING, "routeseg"):
        for _ in range(3):
            for route, logits in zip((Route.all_open(model.space), Route(model.space)), expected, strict=True):
                assert torch.equal(engine(images(1), route).logits, logits)
    assert [record.message for record in caplog.records] == [
        "running without CUDA graphs, recording one failed: operation not permitted when stream is capturing"
    ]


def test_build_engine_takes_a_precision(tiny_network, caplog):
    skip._say_once.cache_clear()
    engine = build_engine(tiny_network, "skip", "float16")
    assert engine.precision == "float32"
    assert [record.message for record in caplog.records] == ["no fast float16 on this CPU: running in float32"]
    with pytest.raises(ValueError, match="choose one of auto, float32, bfloat16, float16"):
        build_engine(tiny_network, "skip", "int8")
    with pytest.raises(ValueError, match="precision float16 only applies to engine skip"):
        build_engine(tiny_network, "dense", "float16")


@pytest.fixture
def command_words(tmp_path):
    """Words of each command that takes a device, with a network and pictures to run on."""
    checkpoint = scenes_checkpoint(tmp_path / "net")
    save(tmp_path / "a.png", noise(32, 64))
    save(tmp_path / "b.png", noise(32, 64, 1))
    data = ["--data.name", "scenes", "--data.image_size", "[64,96]", "--data.val_images", "2"]
    return {
        "predict": [checkpoint, tmp_path / "a.png", tmp_path / "b.png", "--output", tmp_path / "out"],
        "evaluate": [checkpoint, *data],
        "routes": [checkpoint, *data, "--output", tmp_path / "routes"],
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["predict", "evaluate", "routes"])
def test_a_missing_gpu_is_named(command_words, capsys, command):
    code, _, err = run([command, *command_words[command], "--device", "cuda"], capsys)
    assert code == 2 and "--device cuda cannot be used here" in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_precision_that_lacks_is_said_once(command_words, capsys, command):
    skip._say_once.cache_clear()
    code, _, err = run([command, *command_words[command], "--precision", "float16"], capsys)
    assert code == 0 and err == "routeseg: no fast float16 on this CPU: running in float32\n"
    code, _, err = run([command, *command_words[command], "--precision", "half"], capsys)
    assert code == 2 and "precision 'half': choose one of auto, float32, bfloat16, float16" in err


@pytest.mark.parametrize("words", [[], ["--workers", "2"]])
def test_precision_only_applies_to_the_skip_engine(command_words, capsys, words):
    options = ["--precision", "bfloat16", "--engine", "dense", *words]
    code, _, err = run(["predict", *command_words["predict"], *options], capsys)
    assert code == 2 and "engine skip" in err and err.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
class TestOnCuda:
    """What the tests above can only imitate."""

    @pytest.mark.parametrize("precision, tolerance", [("float32", 1e-4), ("bfloat16", 0.1), ("float16", 0.02)])
    @torch.no_grad()
    def test_equals_the_dense_forward(self, precision, tolerance):
        model = network().cuda()
        engine, batch = SkipEngine(model, precision), images(3, 75, 90).cuda()
        found = engine(batch)
        routes = [Route.from_gates(model.space, gates) for gates in found.gates.cpu()]
        assert close(found.logits, model(batch, routes, "own").logits, tolerance)

    @torch.no_grad()
    def test_a_graph_is_replayed_for_new_images(self):
        model = network().cuda()
        engine, route = SkipEngine(model), random_route(model.space, 1).pruned()
        for seed in range(5):
            batch = images(2, 64, 96, seed).cuda()
            assert close(engine(batch, route).logits, model(batch, route).logits, 1e-4)
        recordings = engine.forward.recordings
        assert recordings.recorder is not None and len(recordings.kept) == 1

    @torch.no_grad()
    def test_streams_do_not_disturb_each_other(self):
        model = network().cuda()
        engine, route = SkipEngine(model), Route.all_open(model.space)
        batches = [images(1, 256, 256, seed).cuda() for seed in range(2)]
        expected = [engine(batch, route).logits for batch in batches * 2][2:]
        streams, found = [torch.cuda.Stream() for _ in batches], []
        torch.cuda.synchronize()
        for _ in range(10):
            for stream, batch in zip(streams, batches, strict=True):
                with torch.cuda.stream(stream):
                    found.append(engine(batch, route).logits)
        torch.cuda.synchronize()
        assert all(torch.equal(one, expected[number % 2]) for number, one in enumerate(found))

    @torch.no_grad()
    def test_memory_does_not_grow_with_routes(self):
        model = network().cuda()
        engine, batch = SkipEngine(model), images(1, 256, 256).cuda()
        reserved = []
        for seed in range(8 * KEPT):
            for _ in range(2):
                engine(batch, random_route(model.space, seed).pruned())
            reserved.append(torch.cuda.memory_reserved())
        assert len(engine.forward.recordings.kept) == KEPT
        assert reserved[-1] <= 1.5 * reserved[2 * KEPT]
