"""The compiled forward: equal to the network's own, in every build, and well behaved as a library in a process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from conftest import spread_gates
from routeseg import DynamicRoutingNetwork, Route, SkipEngine, bfloat16, load, stopwatch
from routeseg.config import NetworkConfig
from routeseg.data.decoding import read_image
from routeseg.engine import compiled, skip
from routeseg.engine.compiled import BUILDS, CompiledForward, find_library, is_compiled
from routeseg.engine.folding import FoldedForward
from routeseg.engine.skip import kernels_ms as measured_kernels  # conftest.py puts another in its place
from routeseg.model.decoder import Decoder
from routeseg.model.gate import SoftGate, SoftmaxGate
from routeseg.model.operations import SepConv
from routeseg.model.request import Request
from routeseg.space import DOWN, KEEP, UP

# Where there is a compiler there must be kernels: sources that do not compile leave the installation without.
pytestmark = pytest.mark.skipif(
    not is_compiled(torch.float32) and shutil.which("c++") is None, reason="no kernels: there is no C++ compiler"
)
needs_bfloat16 = pytest.mark.skipif(not is_compiled(torch.bfloat16), reason="this CPU has no AVX512_BF16")


def network(seed: int = 0, **changes) -> DynamicRoutingNetwork:
    """A network with gates of all kinds and BatchNorms that do something."""
    torch.manual_seed(seed)
    options = {"num_classes": 5, "depth": 5, "base_channels": 8, "stem_channels": 8} | changes
    model = spread_gates(DynamicRoutingNetwork(**options), seed).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def relative_error(found, expected) -> float:
    return float((found.logits - expected.logits).abs().max() / expected.logits.abs().max())


FREE = Request.of(network().config, 1)  # of the plain network: its gates decide
CHANGES = {
    "plain": {},
    "small gate": {"small_gate": True},
    "no gates": {"gate": "fixed"},
    "zeros arrive": {"zeros_arrive": True},
    "all operations": {"cell_operations": ["sep_conv_5x5", "identity", "sep_conv_3x3"]},
    "without identity": {"cell_operations": ["sep_conv_3x3"]},
    "identity alone": {"cell_operations": ["identity"]},
    "odd widths": {"base_channels": 6, "stem_channels": 5},
    "narrow": {"base_channels": 2, "stem_channels": 1, "depth": 3},
    "stem as narrow as an image": {"stem_channels": 3, "depth": 3},
    "wide": {"base_channels": 48, "stem_channels": 80, "num_classes": 21, "depth": 3},
    "two scales": {"num_scales": 2, "depth": 3},
    "one scale": {"num_scales": 1, "depth": 2},
}


@pytest.mark.parametrize("size", [(32, 32), (45, 130), (161, 33)])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_equals_the_dense_forward(changes, size):
    model = network(**changes)
    batch = images(2, *size)
    found, expected = SkipEngine(model, backend="kernels")(batch), model(batch)
    assert relative_error(found, expected) < 1e-5
    assert torch.allclose(found.gates, expected.gates, atol=1e-6)


@pytest.mark.parametrize("build", BUILDS)
@torch.no_grad()
def test_every_build_that_this_machine_runs(build, monkeypatch):
    level = find_library(torch.float32).routeseg_level()
    if BUILDS.index(build) > level:
        pytest.skip(f"this machine does not run the build {build}")
    library = compiled._load(build)
    if library is None and build == "amx":
        pytest.skip("this compiler knows no AMX")
    assert library is not None
    monkeypatch.setattr(compiled, "find_library", lambda dtype: library)
    for changes in (CHANGES["plain"], CHANGES["all operations"], CHANGES["odd widths"]):
        model = network(small_gate=True, **changes)
        batch = images(1, 75, 90)
        result = CompiledForward(model, torch.float32)(batch, Request.of(model.config, len(batch)))
        logits, gates = result.logits, result.gates
        expected = model(batch)
        assert float((logits - expected.logits).abs().max() / expected.logits.abs().max()) < 1e-5
        assert torch.allclose(gates, expected.gates, atol=1e-6)


@pytest.mark.parametrize("images_as", ["uint8", "uint8 permuted", "float64", "half", "channels_last"])
@torch.no_grad()
def test_images_in_any_form(images_as):
    model = network()
    batch = (images(2, 40, 70) * 255).to(torch.uint8)
    expected = model(batch)
    form = {
        "uint8": batch,
        "uint8 permuted": batch.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "float64": batch.double() / 255,
        "half": batch.half() / 255,
        "channels_last": (batch.float() / 255).contiguous(memory_format=torch.channels_last),
    }[images_as]
    assert relative_error(SkipEngine(model, backend="kernels")(form), expected) < (
        1e-3 if images_as == "half" else 1e-5
    )


SEEN = [1.0, 0.33, 0.5, 0.71, 1.4, 2.3]  # sizes at which images are looked at


@pytest.mark.parametrize("size", SEEN)
@pytest.mark.parametrize("own", [(93, 141), (40, 33)])
@torch.no_grad()
def test_images_are_resized_within_the_forward(own, size):
    """As PyTorch does it, to rounding: what is read, and the logits; however the image lies in memory."""
    model = network(gate="fixed")
    engine = SkipEngine(model, backend="kernels")
    for batch in (images(2, *own), (images(1, *own) * 255).to(torch.uint8)):
        found, expected = engine(batch, size=size), model(batch, size=size)
        assert found.seen == expected.seen and (found.seen is None) == (size == 1)
        assert relative_error(found, expected) < 1e-5
        side_by_side = batch.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        every_second = batch.repeat_interleave(2, dim=3)[..., ::2]
        for other in (side_by_side, every_second):
            assert torch.equal(engine(other, size=size).logits, found.logits)


@pytest.mark.parametrize("size", SEEN)
@pytest.mark.parametrize("changes", [{}, {"num_classes": 21}, {"num_classes": 2}], ids=["5", "21", "2"])
@torch.no_grad()
def test_labels_are_those_of_the_logits(changes, size):
    engine, batch = SkipEngine(network(**changes), backend="kernels"), images(2, 93, 141)
    found, expected = engine.labels(batch, size=size), engine(batch, size=size)
    assert found.labels.dtype == torch.uint8 and len(found.labels.unique()) > 1
    top = expected.logits.topk(2, dim=1).values
    differ = found.labels != expected.labels
    assert (top[:, 0] - top[:, 1])[differ].le(1e-5).all(), "only where two classes are equally likely"
    assert torch.equal(found.gates, expected.gates) and found.seen == expected.seen


@pytest.mark.parametrize("backend", ["kernels", "eager"])
def test_an_engine_draws_no_random_numbers(backend):
    """A training that validates goes on as one that does not."""
    model, state = network(gate="fixed", exits=[1, 2], place=32), torch.get_rng_state()
    SkipEngine(model, backend=backend)(images(1, 64, 64))
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_labels_on_pytorch_s_operations():
    engine, batch = SkipEngine(network(), backend="eager"), images(2, 45, 61)
    assert torch.equal(engine.labels(batch, size=0.7).labels, engine(batch, size=0.7).labels)


@pytest.mark.parametrize("backend", ["kernels", "eager"])
@pytest.mark.parametrize("size", [1.0, 0.7])
@torch.no_grad()
def test_weights_that_diverged_give_no_labels(backend, size):
    model = network(gate="fixed")
    model.head.predictor.bias[2] = torch.nan
    with pytest.raises(ValueError, match="diverged"):
        SkipEngine(model, backend=backend).labels(images(1, 45, 61), size=size)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("size", [0.5, 1.3])
def test_images_that_are_not_finite_are_refused_in_every_size(value, size):
    batch = images(1, 64, 96)
    batch[0, 1, 37, 51] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        SkipEngine(network(), backend="kernels").labels(batch, size=size)


def test_weights_of_what_is_closed_are_not_touched():
    """They are taken away, in a process of its own: whatever read them would end it."""
    code = """
import torch
from conftest import spread_gates
from routeseg import DynamicRoutingNetwork, Route
from routeseg.engine.compiled import CompiledForward, _Conv
from routeseg.model.request import Request
from routeseg.space import DOWN, UP

torch.manual_seed(3)
model = spread_gates(DynamicRoutingNetwork(num_classes=5, depth=5, base_channels=8, stem_channels=8), 3).eval()
forward, images = CompiledForward(model, torch.float32), torch.rand(1, 3, 64, 96)
free = Request.of(model.config, 1)
result = forward(images, free)
logits, gates = result.logits, result.gates
space, network = model.space, forward._packed.network
reached, alpha = space.reached(gates[0].numpy()), gates[0].numpy()
taken = 0
for layer, scale in space.nodes:
    node = network.nodes[layer * space.num_scales + scale]
    closed = [node.transforms[d] for d in (UP, DOWN) if alpha[layer, scale, d] == 0]
    closed += [] if reached[layer, scale] else [node.squeeze]
    closed += [] if (alpha[layer, scale] > 0).any() else [node.cell[i] for i in range(2 * node.operations)]
    for conv in closed:
        taken += conv.weights is not None
        conv.weights = conv.bias = conv.taps = None
assert taken > 10
assert torch.equal(forward(images, free).logits, logits)
for layer, scale in space.nodes:  # a route that is given asks no gate
    network.nodes[layer * space.num_scales + scale].squeeze.weights = None
forward(images, Request.of(model.config, 1, Route.from_gates(space, gates[0])))
"""
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_what_zeros_alone_reach_is_computed_once():
    """Later forwards of the same size read no weights there; another image, size or route has its own results."""
    model = network(seed=6, depth=6, zeros_arrive=True)
    forward, batch = CompiledForward(model, torch.float32), images(2, 64, 96)
    free, whole = Request.of(model.config, 2), Request.of(model.config, 2, model.route)
    first = forward(batch, free)
    gates = first.gates.numpy()
    reached = [[model.space.reached(one, zeros_arrive=zeros) for one in gates] for zeros in (True, False)]
    zeros = np.any(reached[0], axis=0) & ~np.any(reached[1], axis=0)
    assert zeros.sum() > 9
    poison = torch.full((1 << 14,), float("nan"))
    for layer, scale in np.argwhere(zeros):
        node = forward._packed.network.nodes[layer * model.space.num_scales + scale]
        node.squeeze.weights = node.squeeze.bias = poison.data_ptr()
        for number in range(2 * node.operations):
            node.cell[number].weights = node.cell[number].bias = poison.data_ptr()
    again = forward(batch, free)
    assert torch.equal(again.logits, first.logits) and torch.equal(again.gates, first.gates)
    for other, asked in ((images(2, 96, 64), free), (batch, whole)):  # another size; more than zeros reach them
        found, right = (one(other, asked) for one in (forward, CompiledForward(model, torch.float32)))
        assert not (torch.equal(found.logits, right.logits) and torch.equal(found.gates, right.gates))


@torch.no_grad()
def test_what_is_remembered_of_zeros_is_right():
    """An engine that has seen other images, sizes and routes gives what a new one does."""
    model = network(seed=3, zeros_arrive=True)
    engine = SkipEngine(model, backend="kernels")
    some = Route(model.space, [(0, 0, DOWN), (1, 1, KEEP), (2, 1, UP), (3, 0, KEEP)])
    for route, activation in ((None, "one"), (some, "one"), (model.route, "own"), (some, "own")) * 2:
        for seed, size in enumerate([(64, 96), (96, 64), (64, 96)]):
            batch = images(1, *size, seed=seed)
            found = engine(batch, route, activation=activation)
            fresh = SkipEngine(model, backend="kernels")(batch, route, activation=activation)
            assert torch.equal(found.logits, fresh.logits) and torch.equal(found.gates, fresh.gates)
            assert relative_error(found, model(batch, route, activation=activation)) < 1e-5


class OtherOperation(SepConv):
    """An operation that computes something else than what it is derived from."""

    kernel_size = 7


class OtherGate(SoftGate):
    pass


class OtherDecoder(Decoder):
    pass


def change_operation(model):
    model.node(2, 1).cell["sep_conv_3x3"] = OtherOperation(16)


def change_layer(model):
    model.node(2, 1).transforms["down"][1] = torch.nn.GELU()


def change_gate(model):
    model.node(2, 1).gate = OtherGate(16, 3)


def change_one_gate(model):
    model.node(2, 1).gate = SoftmaxGate(16, 3)


def change_decoder(model):
    model.decoder = OtherDecoder(model.config)


class TestSupports:
    @pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
    def test_every_network_of_ours(self, changes):
        assert CompiledForward.supports(network(**changes), torch.float32) is None

    @pytest.mark.parametrize(
        "change, reason",
        [
            (change_operation, "no kernel for the cell operation OtherOperation (nodes.2-1.cell.sep_conv_3x3)"),
            (change_layer, "no kernel for the layer GELU (nodes.2-1.transforms.down.1)"),
            (change_gate, "no kernel for the gate OtherGate (nodes.2-1.gate)"),
            (change_one_gate, "no kernel for the gate SoftmaxGate (nodes.2-1.gate)"),
            (change_decoder, "no kernel for the head OtherDecoder"),
            (torch.nn.Module.double, "take float32 networks, not float64"),
            (lambda model: model.to("meta"), "run on CPUs, the network is on meta"),
        ],
    )
    def test_what_they_do_not_know_is_refused_with_its_name(self, change, reason):
        model = network()
        change(model)
        assert reason in CompiledForward.supports(model, torch.float32)
        with pytest.raises(ValueError, match=re.escape(reason)):
            CompiledForward(model, torch.float32)

    @pytest.mark.parametrize("limit", ["channels", "scales"])
    def test_what_they_cannot_hold_is_refused(self, limit, monkeypatch):
        library = find_library(torch.float32)
        monkeypatch.setattr(library, f"routeseg_most_{limit}", lambda: 2)
        assert f"hold 2 {limit}, " in CompiledForward.supports(network(), torch.float32)

    def test_there_are_no_kernels(self, monkeypatch):
        monkeypatch.setattr(compiled, "find_library", lambda dtype: None)
        assert "need a C++ compiler" in CompiledForward.supports(network(), torch.float32)

    def test_a_classifier(self):
        model = DynamicRoutingNetwork(head="classifier", num_classes=5, depth=3, base_channels=8, stem_channels=8)
        assert "no kernel for the head ClassifierHead" in CompiledForward.supports(model, torch.float32)


class TestBoundsOfTheKernels:
    """Whatever the structures say, a kernel refuses rather than touch memory of others."""

    @staticmethod
    def damage(forward: CompiledForward, name: str) -> None:
        network, scales = forward._packed.network, forward.space.num_scales
        node = network.nodes[2 * scales + 1]  # layer 2, scale 1
        changes = {
            "kernel": lambda: setattr(node.cell[0], "kernel", 7),
            "even kernel": lambda: setattr(node.cell[0], "kernel", 4),
            "no kernel": lambda: setattr(node.cell[0], "kernel", 0),
            "stride": lambda: setattr(node.cell[0], "stride", 3),
            "no stride": lambda: setattr(node.cell[0], "stride", 0),
            "large stride": lambda: [setattr(conv, "stride", 2) for conv in (node.cell[0], node.cell[1])],
            "padding": lambda: setattr(node.cell[0], "padding", 2),
            "negative padding": lambda: setattr(node.cell[0], "padding", -1),
            "inputs": lambda: setattr(node.cell[0], "inputs", 2 * node.cell[0].inputs),
            "outputs": lambda: setattr(node.cell[1], "outputs", 2 * node.cell[1].outputs),
            "parts of vectors": lambda: setattr(node.cell[1], "outputs", 3),
            "weights": lambda: setattr(node.cell[0], "weights", None),
            "taps": lambda: setattr(node.cell[0], "taps", None),
            "wide": lambda: setattr(node.cell[0], "wide", 1),
            "transform": lambda: setattr(node.transforms[UP], "outputs", node.cell[0].outputs),
            "direction": lambda: setattr(network.nodes[0], "directions", (1, 1, 1)),
            "features": lambda: setattr(node, "features", 1000),
            "no features": lambda: setattr(node, "features", 0),
            "operations": lambda: setattr(node, "operations", -1),
            "cell": lambda: setattr(node, "cell", None),
            "no depth": lambda: setattr(network, "depth", 0),
            "no scales": lambda: setattr(network, "scales", 0),
            "many scales": lambda: setattr(network, "scales", 100),
            "no classes": lambda: setattr(network, "classes", 0),
            "classes": lambda: setattr(network, "classes", 1000),
            "stem": lambda: setattr(network.stem[2], "stride", 1),
            "merges": lambda: setattr(network.exit[0].merges[1], "inputs", 8 * network.exit[0].merges[1].inputs),
            "exits": lambda: setattr(network, "exits", 0),
            "last exit": lambda: setattr(network.exit[0], "layer", 1),
        }
        changes[name]()

    NAMES = (
        "kernel,even kernel,no kernel,stride,no stride,large stride,padding,negative padding,inputs,outputs,"
        "parts of vectors,weights,taps,wide,transform,direction,features,no features,operations,cell,no depth,"
        "no scales,many scales,no classes,classes,stem,merges,exits,last exit"
    ).split(",")

    @pytest.mark.parametrize("name", NAMES)
    def test_a_network_of_other_shapes(self, name):
        model = network(base_channels=16, zeros_arrive=True)
        for node in model.nodes.values():
            node.gate.score.weight.data.zero_()
            node.gate.score.bias.data.fill_(1.0)  # every path is open
        forward, batch = CompiledForward(model, torch.float32), images(1, 64, 96)
        forward(batch, FREE)
        if name == "classes":
            forward.config = NetworkConfig(num_classes=1000)  # room for as many logits
        self.damage(forward, name)
        with pytest.raises(RuntimeError, match="the compiled kernels failed in a forward of 64x96 pixels: [a-z]"):
            forward(batch, FREE)

    def test_another_engine_goes_on(self):
        model, batch = network(), images(1, 64, 96)
        broken, whole = (CompiledForward(model, torch.float32) for _ in range(2))
        expected = whole(batch, FREE).logits
        self.damage(broken, "kernel")
        with pytest.raises(RuntimeError, match="a convolution's kernel is none of 1, 3 and 5"):
            broken(batch, FREE)
        assert torch.equal(whole(batch, FREE).logits, expected)

    def test_an_image_without_padding(self, monkeypatch):
        forward = CompiledForward(network(), torch.float32)
        monkeypatch.setattr(compiled, "padded_size", lambda space, height, width: (height, width))
        with pytest.raises(RuntimeError, match="the image's sides are not padded to the stride"):
            forward(images(1, 60, 96), FREE)
        monkeypatch.setattr(compiled, "padded_size", lambda space, height, width: (height - 32, width))
        with pytest.raises(RuntimeError, match="an image does not fit into its map"):
            forward(images(1, 64, 96), FREE)


class TestBfloat16:
    @needs_bfloat16
    @pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
    @torch.no_grad()
    def test_is_close(self, changes):
        model = network(**changes)
        batch = images(2, 75, 130)
        found, expected = SkipEngine(model, "bfloat16", backend="kernels")(batch), model(batch)
        assert found.logits.dtype == found.gates.dtype == torch.float32
        flipped = (found.gates > 0) != (expected.gates > 0)
        assert not flipped.any() or torch.maximum(found.gates, expected.gates)[flipped].max() < 0.05
        routes = [Route.from_gates(model.space, gates) for gates in found.gates]
        assert relative_error(found, model(batch, routes, activation="own")) < 0.05

    @needs_bfloat16
    @torch.no_grad()
    def test_agrees_with_float32_on_real_images(self, camvid_root):
        model = load()
        engine = SkipEngine(model, "bfloat16")
        paths = sorted((camvid_root / "val").iterdir())[::20]
        pictures = [torch.from_numpy(read_image(path).transpose(2, 0, 1).copy())[None] for path in paths]
        same = [float((engine(x).labels == model(x).labels).float().mean()) for x in pictures]
        assert np.mean(same) > 0.995

    def test_falls_back_and_says_so_once_where_the_cpu_has_none(self, monkeypatch, caplog):
        found = find_library(torch.float32)
        monkeypatch.setattr(compiled, "find_library", lambda dtype: found if dtype == torch.float32 else None)
        monkeypatch.setattr(bfloat16, "product_ratio", lambda: 430.4)
        skip._say_once.cache_clear()
        model = network()
        engines = [SkipEngine(model, "bfloat16") for _ in range(2)]
        assert [engine.precision for engine in engines] == ["float32"] * 2
        (record,) = caplog.records
        assert re.fullmatch(
            r"no fast bfloat16 here \(on this CPU a product .* 430 times .*\): running in float32", record.message
        )

    def test_pytorch_computes_it_where_the_cpu_is_fast_and_the_kernels_lack_it(self, monkeypatch):
        found = find_library(torch.float32)
        monkeypatch.setattr(compiled, "find_library", lambda dtype: found if dtype == torch.float32 else None)
        monkeypatch.setattr(bfloat16, "product_ratio", lambda: 0.4)
        model = network()
        engine, batch = SkipEngine(model, "bfloat16"), images(1, 64, 96)
        assert engine.precision == "bfloat16" and isinstance(engine.forward, FoldedForward)
        assert relative_error(engine(batch, model.route), SkipEngine(model)(batch, model.route)) < 0.05

    def test_auto_takes_the_faster_one(self, monkeypatch):
        model = network()
        assert SkipEngine(model, "auto").precision == "float32", "conftest.py: both are as fast"
        monkeypatch.setattr(CompiledForward, "supports", staticmethod(lambda model, dtype: None))
        for times, expected, reason in (
            ((3.0, 2.0), "bfloat16", "a small network takes 2 ms, in float32 3 ms"),
            ((3.0, 2.9), "float32", "a small network takes 3 ms, in bfloat16 2.9 ms"),
        ):
            monkeypatch.setattr(skip, "kernels_ms", lambda times=times: times)
            assert skip._faster(model, "auto") == (expected, reason)
            assert skip._faster(model, "eager")[0] == "float32"

    def test_auto_is_float32_without_kernels_and_keeps_other_weights(self, monkeypatch):
        monkeypatch.setattr(compiled, "find_library", lambda dtype: None)
        monkeypatch.setattr(skip, "kernels_ms", lambda: (3.0, 1.0))
        engine = SkipEngine(network(), "auto")
        assert (engine.precision, engine.precision_reason) == ("float32", "without kernels for bfloat16")
        assert SkipEngine(network().double(), "auto").precision == "float64"
        assert SkipEngine(network()).precision_reason is None

    @needs_bfloat16
    def test_what_auto_measures(self, monkeypatch):
        """The kernels in both precisions, in turns; random numbers go on as if nothing had been drawn."""
        ran, forward = [], CompiledForward.__call__
        monkeypatch.setattr(stopwatch, "clock", lambda: 0.001 * len(ran) ** 2)

        def note(self, *args, **options):
            ran.append(self._packed.dtype)
            return forward(self, *args, **options)

        monkeypatch.setattr(CompiledForward, "__call__", note)
        state = torch.get_rng_state()
        # Call n takes 2 n + 1 ms, and each has two that do not count.
        assert measured_kernels.__wrapped__() == pytest.approx((5.0, 7.0))
        assert ran == [torch.float32, torch.bfloat16] * (1 + skip.PROBE_ROUNDS)
        assert torch.equal(state, torch.get_rng_state())

    def test_an_unknown_precision_is_named(self):
        with pytest.raises(ValueError, match="precision 'int4': choose one of auto, float32, bfloat16, float16"):
            SkipEngine(network(), "int4")


class TestAsALibrary:
    @torch.no_grad()
    @pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
    def test_results_do_not_depend_on_the_number_of_threads(self, precision):
        model = network(depth=6, base_channels=8 if precision == "float32" else 32)  # tiles want whole depths
        engine, batch = SkipEngine(model, precision, backend="kernels"), images(1, 160, 224)
        threads = torch.get_num_threads()
        try:
            results = []
            for count in (1, *((7, 2, 7, 3) * 10), 7):  # also fewer, and more again
                torch.set_num_threads(count)
                results.append(engine(batch))
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            assert torch.equal(result.logits, results[0].logits) and torch.equal(result.gates, results[0].gates)

    @torch.no_grad()
    def test_memory_is_used_again_and_results_are_their_own(self):
        engine = SkipEngine(network(), backend="kernels")
        sizes = [(64, 64), (96, 32), (64, 64), (64, 96), (32, 32), (128, 64), (64, 160)]  # more than it keeps memory of
        first = [engine(images(1, *size)).logits for size in sizes]
        copies = [logits.clone() for logits in first]
        for _ in range(2):
            again = [engine(images(1, *size)).logits for size in sizes]
            assert all(map(torch.equal, first, copies)) and all(map(torch.equal, again, copies))

    @torch.no_grad()
    @pytest.mark.parametrize("zeros_arrive", [False, True])
    def test_threads_share_an_engine(self, zeros_arrive):
        """Images of different sizes, some with the same number of pixels; behind closed paths zeros arrive."""
        model = network(zeros_arrive=zeros_arrive)
        engine = SkipEngine(model, backend="kernels")
        route = Route(model.space, [edge for edge in model.space.edges if edge[1] != 1 or edge[2] != 1])
        asked = [(images(1, *size, seed), how) for seed, size in enumerate([(64, 64), (32, 128), (128, 32), (96, 64)])
                 for how in ({}, {"route": route})]  # fmt: skip
        expected = [engine(batch, **how).logits for batch, how in asked]

        def work(number: int) -> None:
            for turn in range(60):
                batch, how = asked[place := (number + turn) % len(asked)]
                assert torch.equal(engine(batch, **how).logits, expected[place])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))  # raises what a thread raised

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
    @pytest.mark.parametrize("shared", [False, True], ids=["threads of its own", "PyTorch's threads"])
    def test_a_forked_child_runs_too(self, shared):
        code = f"""
import os, sys, torch
from routeseg import DynamicRoutingNetwork, SkipEngine
from routeseg.training import fused
torch.set_num_threads(2)
if {shared}:  # as a training does
    fused._library()
engine = SkipEngine(DynamicRoutingNetwork(num_classes=5, depth=3, base_channels=8), backend="kernels")
x = torch.rand(1, 3, 64, 64)
expected = engine(x).logits
child = os.fork()
same = torch.equal(engine(x).logits, expected)
if child == 0:
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not same)
"""
        assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0

    @pytest.mark.parametrize("backend", ["kernels", "eager"])
    def test_an_engine_keeps_its_weights_whatever_becomes_of_the_network(self, backend):
        model = network()
        engine, batch = SkipEngine(model, backend=backend), images(1, 64, 64)
        before = engine(batch).logits
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        model.to("meta")
        del model
        assert torch.equal(engine(batch).logits, before)

    def test_what_pytorch_defaults_to_does_not_matter(self):
        model, batch = network(), images(1, 64, 64)
        expected = SkipEngine(model, backend="kernels")(batch)
        try:
            torch.set_default_dtype(torch.float64)
            with torch.device("meta"):
                found = SkipEngine(model, backend="kernels")(batch)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.gates, expected.gates)

    def test_two_engines_at_once_with_threads_of_their_own(self):
        models, batch = [network(seed) for seed in (1, 2)], images(1, 160, 224)
        engines = [SkipEngine(model, backend="kernels") for model in models]
        expected = [engine(batch).logits for engine in engines]

        def work(number: int) -> None:
            torch.set_num_threads(2 + number)
            for _ in range(20):
                assert torch.equal(engines[number](batch).logits, expected[number])

        before = torch.get_num_threads()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, range(2)))
        torch.set_num_threads(before)

    def test_each_of_two_callers_has_helpers(self):
        """Each piece of work waits until two threads are inside it: without a helper it would never end."""
        code = """
import threading, torch
from routeseg.engine.compiled import find_library
library, ends = find_library(torch.float32), []
call = lambda: ends.extend(library.routeseg_meet(2, 0) for _ in range(200))
threads = [threading.Thread(target=call) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert ends == [0] * 800
"""
        assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0

    @pytest.mark.parametrize(
        "throwing, error, text",
        [
            (1, MemoryError, "not enough memory for a test"),
            (2, RuntimeError, "the compiled kernels failed in a test: a helper failed"),
        ],
    )
    def test_what_a_helper_throws_reaches_the_caller(self, throwing, error, text):
        library = find_library(torch.float32)
        status = library.routeseg_meet(2, throwing)
        with pytest.raises(error, match=text):
            compiled.raise_failure(library, status, "a test")
        assert library.routeseg_meet(2, 0) == compiled.DONE

    @pytest.mark.parametrize("structure", ["Conv", "Image", "Map", "Summand", "Node", "Network", "Request"])
    def test_fields_that_lie_elsewhere_are_noticed(self, structure):
        """Also if the structures are equally large: two neighbours of one size have changed places."""
        library, own = find_library(torch.float32), getattr(compiled, f"_{structure}")
        assert compiled.first_difference(library.routeseg_layout(), compiled.STRUCTURES) is None
        fields = list(own._fields_)
        sizes = [compiled.ctypes.sizeof(field[1]) for field in fields]
        place = next(i for i in range(len(fields) - 1) if sizes[i] == sizes[i + 1])
        fields[place], fields[place + 1] = fields[place + 1], fields[place]
        other = type(f"_{structure}", (compiled.Structure,), {"_fields_": fields})
        structures = [other if one is own else one for one in compiled.STRUCTURES]
        assert compiled.first_difference(library.routeseg_layout(), structures).startswith(f"{structure}.")

    def test_a_folder_of_kernels_that_has_none(self, tmp_path, monkeypatch):
        monkeypatch.setenv(compiled.FOLDER, str(tmp_path))
        with pytest.raises(ValueError, match=f"ROUTESEG_KERNELS is {tmp_path}, but that has no kernels"):
            compiled._load.__wrapped__("generic")

    @pytest.mark.parametrize("damage", ["not a library", "of other sources"])
    def test_a_library_that_cannot_be_used(self, tmp_path, monkeypatch, caplog, damage):
        """The next best is taken; the engine runs on PyTorch's operations where there is none."""
        suffix = compiled.EXTENSION_SUFFIXES[0]
        (tmp_path / f"_forward_generic{suffix}").write_bytes(b"none")
        if damage == "of other sources":
            other = type("_Conv", (compiled.Structure,), {"_fields_": []})
            monkeypatch.setattr(compiled, "STRUCTURES", (other, *compiled.STRUCTURES[1:]))
        else:
            monkeypatch.setenv(compiled.FOLDER, str(tmp_path))
        for cached in (compiled._load, compiled.find_library):
            cached.cache_clear()
        try:
            assert not is_compiled(torch.float32)
            assert "install routeseg again" in caplog.text
        finally:
            monkeypatch.undo()
            for cached in (compiled._load, compiled.find_library):
                cached.cache_clear()


class TestBadInput:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("backend", ["kernels", "eager"])
    def test_values_that_are_not_finite(self, backend, value):
        batch = images(2, 64, 64)
        batch[1, 2, 63, 63] = value
        with pytest.raises(ValueError, match="the images contain NaN or infinite values"):
            SkipEngine(network(), backend=backend)(batch)

    @pytest.mark.parametrize("backend", ["kernels", "eager"])
    def test_shapes_and_routes(self, backend):
        engine = SkipEngine(network(), backend=backend)
        with pytest.raises(ValueError, match=r"images have shape \[0, 3, 64, 64\]: expected .* B at least 1"):
            engine(images(0, 64, 64))
        with pytest.raises(ValueError, match="the smallest size is 32x32"):
            engine(images(1, 16, 64))
        with pytest.raises(ValueError, match="the route is drawn in .*depth=7"):
            engine(images(1, 64, 64), Route.all_open(network(depth=7).space))
        with pytest.raises(ValueError, match="2 routes for 1 images"):
            engine(images(1, 64, 64), [Route(network().space)] * 2)

    @pytest.mark.parametrize("backend", ["kernels", "eager"])
    def test_images_on_another_device(self, backend):
        with pytest.raises(ValueError, match="the images are on meta, the engine is on cpu: move them there"):
            SkipEngine(network(), backend=backend)(images(1, 64, 64).to("meta"))

    def test_compiled_where_it_cannot_be(self, monkeypatch):
        with pytest.raises(ValueError, match="take float32 networks, not float64"):
            SkipEngine(network().double(), backend="kernels")
        with pytest.raises(ValueError, match="backend 'fast': choose one of auto, kernels, eager"):
            SkipEngine(network(), backend="fast")
        monkeypatch.setattr(compiled, "find_library", lambda dtype: None)
        with pytest.raises(ValueError, match="need a C\\+\\+ compiler when routeseg is installed"):
            SkipEngine(network(), backend="kernels")

    def test_without_kernels_the_engine_runs_on_pytorch(self, monkeypatch):
        monkeypatch.setattr(compiled, "find_library", lambda dtype: None)
        model, batch = network(), images(1, 64, 64)
        engine = SkipEngine(model)
        assert not isinstance(engine.forward, CompiledForward)
        with torch.no_grad():
            assert relative_error(engine(batch), model(batch)) < 1e-5
