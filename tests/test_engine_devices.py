"""The engine on PyTorch's operations, which GPUs run: precisions, other devices, and what it says about them."""

import pytest
import torch

from conftest import run, scenes_checkpoint, spread_gates
from pictures import noise, save
from routeseg import DynamicRoutingNetwork, Route, SkipEngine
from routeseg.engine import skip
from routeseg.engine.folding import FoldedForward
from routeseg.model.request import Request
from test_model import close, images, random_route


def network(**changes):
    options = {"num_classes": 5, "depth": 6, "base_channels": 8, "stem_channels": 8}
    return spread_gates(DynamicRoutingNetwork(**options | changes)).eval()


@pytest.mark.parametrize("changes", [{}, {"small_gate": True}, {"gate": "softmax"}, {"zeros_arrive": True}])
def test_the_operations_for_gpus_give_what_dense_gives(changes):
    model = network(**changes)
    engine = SkipEngine(model, backend="eager")
    batch = torch.cat([images(3, 50, 70), torch.zeros(1, 3, 50, 70), torch.ones(1, 3, 50, 70)])
    some = [random_route(model.space, seed, share) for seed, share in enumerate((0.1, 0.3, 0.5, 0.7, 0.9))]
    for route in (None, Route(model.space), Route.all_open(model.space), some):
        for activation in ("one", "own"):
            with torch.no_grad():
                expected = model(batch, route, activation=activation)
            found = engine(batch, route, activation=activation)
            assert close(found.logits, expected.logits) and torch.allclose(found.gates, expected.gates, atol=1e-6)
            assert found.logits.dtype == found.gates.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.006)])
def test_half_precision_is_near_to_float32(dtype, bound):
    """Maps in half precision and channels_last; scores, activations and logits in float32, not rounded."""
    model = network()
    half, batch = FoldedForward(model, dtype), images(3)
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
            chosen = model(batch[image : image + 1], route, activation="own")
            opened = chosen.gates > 0
            assert (chosen.gates[0] - gates[image])[opened[0]].abs().max() < 4 * bound
    assert set(layouts) == {(dtype, True)}
    assert logits.dtype == gates.dtype == free_logits.dtype == torch.float32
    assert close(logits, exact.logits, bound) and not close(logits, exact.logits, 1e-6)
    assert (gates.bfloat16() != gates).any() and (logits.to(dtype) != logits).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "model",
    [network(backbone="efficientnet_lite0"), network(head="classifier")],
    ids=["backbone", "classifier"],
)
def test_every_kind_of_network_runs_in_half_precision(model, dtype):
    half, batch, layouts = FoldedForward(model.eval(), dtype), images(3), []
    for node in half.model.nodes.values():
        node.cell.register_forward_hook(lambda m, x, out: layouts.append((out.dtype, out.stride()[1] == 1)))
    with torch.inference_mode():
        expected, found = model(batch, model.route), half(batch, Request.of(model.config, 3, model.route))
    assert set(layouts) == {(dtype, True)} and found.logits.dtype == torch.float32
    assert close(found.logits, expected.logits, 0.1) and not close(found.logits, expected.logits, 1e-6)


def test_a_precision_that_the_device_lacks(tiny_network, caplog):
    skip._say_once.cache_clear()
    assert SkipEngine(tiny_network, "float16").precision == "float32"
    assert [record.message for record in caplog.records] == ["no fast float16 on this CPU: running in float32"]
    with pytest.raises(ValueError, match="choose one of auto, float32, bfloat16, float16"):
        SkipEngine(tiny_network, "int8")


@pytest.fixture
def command_words(tmp_path):
    """Words of each command that takes a device, with a network and images to run on."""
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
class TestOnCuda:
    """The same on a GPU."""

    @pytest.mark.parametrize("precision, tolerance", [("float32", 1e-4), ("bfloat16", 0.1), ("float16", 0.02)])
    @torch.no_grad()
    def test_equals_the_dense_forward(self, precision, tolerance):
        model = network().cuda()
        engine, batch = SkipEngine(model, precision), images(3, 75, 90).cuda()
        found = engine(batch)
        routes = [Route.from_gates(model.space, gates) for gates in found.gates.cpu()]
        assert close(found.logits, model(batch, routes, activation="own").logits, tolerance)

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
