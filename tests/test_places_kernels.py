"""Places on the kernels: equal to the network's own walk, whatever has left."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from conftest import uneven
from conftest import uneven_images as images
from routeseg import DynamicRoutingNetwork, SkipEngine
from routeseg.engine import compiled
from routeseg.engine.compiled import BUILDS, CompiledForward, find_library, is_compiled
from routeseg.model.prices import PriceTable

pytestmark = pytest.mark.skipif(
    not is_compiled(torch.float32) and shutil.which("c++") is None, reason="no kernels: there is no C++ compiler"
)
needs_bfloat16 = pytest.mark.skipif(not is_compiled(torch.bfloat16), reason="this CPU has no AVX512_BF16")
CHANGES = {
    "plain": {},
    "larger places": {"place": 64},
    "one place": {"place": 1024},
    "all operations": {"cell_operations": ["sep_conv_5x5", "identity", "sep_conv_3x3"]},
    "identity alone": {"cell_operations": ["identity"]},
    "odd widths": {"base_channels": 6, "stem_channels": 5},
    "every path": {"route": None, "depth": 4, "exits": [0, 1, 3]},
    "zeros arrive": {"zeros_arrive": True},
    "two scales": {"num_scales": 2, "depth": 3, "exits": [0, 1]},
    "five scales": {"num_scales": 5, "place": 64},
    "backbone": {"backbone": "efficientnet_lite0", "depth": 4, "exits": [0, 1, 2, 3]},
    "backbone, every path": {"backbone": "efficientnet_lite0", "route": None, "depth": 4, "exits": [0, 2]},
}


def network(seed: int = 0, **changes) -> DynamicRoutingNetwork:
    """Drawn weights whose exits are sure of some places and not of others, and BatchNorms that do something."""
    torch.manual_seed(seed)
    options = {
        **{"num_classes": 5, "depth": 5, "base_channels": 8, "stem_channels": 8, "gate": "fixed"},
        **{"route": "diagonal", "exits": [0, 2, 3], "place": 32},
    }
    model = uneven(DynamicRoutingNetwork(**{**options, **changes}).eval().requires_grad_(False))
    shares = torch.rand(model.exits.frequencies.shape)
    model.exits.frequencies.copy_(shares / shares.sum(1, keepdim=True))
    model.exits.prices.copy_(torch.linspace(0, 1, len(shares)))
    model.exits.costs.copy_(torch.linspace(0.2, 1, len(model.exits.layers)))
    return model


def price_between(model: DynamicRoutingNetwork, batch: torch.Tensor, share: float) -> float:
    """A price at which about this share of the places leaves at the first exit, halfway between two of them."""
    seen = model.exits.see(0, model.exit_features(batch)[0]).flatten().sort().values
    last = min(int(share * len(seen)), len(seen) - 2)
    return float(seen[last : last + 2].mean())


def assert_same(found, expected) -> None:
    assert torch.equal(found.exits, expected.exits) and torch.equal(found.gates, expected.gates)
    assert float((found.logits - expected.logits).abs().max() / expected.logits.abs().max()) < 1e-5


@pytest.mark.parametrize("size", [(64, 96), (200, 136), (33, 300)])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@torch.inference_mode()
def test_equals_the_walk_of_the_network(changes, size):
    model, batch = network(**changes), images(2, *size)
    engine = SkipEngine(model, backend="kernels")
    left = set()
    for share in (0.1, 0.5, 0.9):
        price = price_between(model, batch, share)
        found = engine(batch, price=price)
        assert_same(found, model(batch, price=price))
        left |= set(found.exits.unique().tolist())
    assert len(left) > 1


@pytest.mark.parametrize("changes", [CHANGES["plain"], CHANGES["backbone"]], ids=["plain", "backbone"])
@torch.inference_mode()
def test_each_image_keeps_its_budget(changes):
    model, batch = network(1, **changes), images(3, 135, 230)
    engine = SkipEngine(model, backend="kernels")
    for price in (0.2, 0.7, [0.9, 0.0, 0.4]):
        assert_same(engine(batch, price=price, per_image=True), model(batch, price=price, per_image=True))
    found = engine(batch, price=0.7, per_image=True)
    assert isinstance(model.exits.table, PriceTable) and len(found.exits.unique()) == len(model.exits.layers)


@pytest.mark.parametrize("changes", [CHANGES["plain"], CHANGES["backbone"]], ids=["plain", "backbone"])
@torch.inference_mode()
def test_places_leave_where_they_are_told(changes):
    """Drawn exits, also of all at once, and those that a price chose."""
    model, batch = network(1, **changes), images(2, 135, 230)
    engine, last = SkipEngine(model, backend="kernels"), len(model.exits.layers) - 1
    told = torch.randint(last + 1, (2, 5, 8))
    for exits in (told, told[0].numpy(), told.clamp(max=1), torch.full((5, 8), last), torch.zeros(5, 8, dtype=int)):
        found = engine(batch, exits=exits)
        assert_same(found, model(batch, exits=exits))
        assert torch.equal(found.exits, torch.as_tensor(exits).expand(2, 5, 8))
    chosen = engine(batch, price=price_between(model, batch, 0.5))
    assert torch.equal(engine(batch, exits=chosen.exits).logits, chosen.logits)


@torch.inference_mode()
def test_images_are_independent_and_have_prices_of_their_own():
    model, batch = network(), images(3, 96, 130)
    price, engine = price_between(model, batch, 0.5), SkipEngine(model, backend="kernels")
    prices = [price, 0.0, 1.05 * price]
    together = engine(batch, price=prices)
    assert_same(together, model(batch, price=prices))
    assert (together.exits[1] == 3).all()
    for number in range(3):
        alone = engine(batch[number : number + 1], price=prices[number])
        assert torch.equal(alone.logits[0], together.logits[number])


@torch.inference_mode()
def test_all_at_once_nobody_and_given_routes():
    model, batch = network(), images(2, 96, 130)
    engine = SkipEngine(model, backend="kernels")
    for price in (1e6, 1e-30):
        assert_same(engine(batch, price=price), model(batch, price=price))
    for asked in ({}, {"price": 0.0}, {"route": model.config.exit_routes[1]}, {"budget": 1.0}):
        found, expected = engine(batch, **asked), model(batch, **asked)
        assert found.exits is None and expected.exits is None
        assert torch.allclose(found.logits, expected.logits, atol=1e-4) and torch.equal(found.gates, expected.gates)


@pytest.mark.parametrize("changes", [CHANGES["plain"], CHANGES["backbone"]], ids=["plain", "backbone"])
@torch.inference_mode()
def test_results_do_not_depend_on_the_number_of_threads(changes):
    model, batch = network(**changes), images(1, 224, 320)
    engine, price = SkipEngine(model, backend="kernels"), price_between(model, batch, 0.5)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7, 3, 2):
            torch.set_num_threads(count)
            results.append(engine(batch, price=price))
    finally:
        torch.set_num_threads(threads)
    assert len(results[0].exits.unique()) > 1
    for result in results[1:]:
        assert torch.equal(result.logits, results[0].logits) and torch.equal(result.exits, results[0].exits)


@pytest.mark.parametrize("build", BUILDS)
@torch.inference_mode()
def test_every_build_that_this_machine_runs(build, monkeypatch):
    if BUILDS.index(build) > find_library(torch.float32).routeseg_level():
        pytest.skip(f"this machine does not run the build {build}")
    library = compiled._load(build)
    if library is None and build == "amx":
        pytest.skip("this compiler knows no AMX")
    monkeypatch.setattr(compiled, "find_library", lambda dtype: library)
    for changes in (CHANGES["all operations"], CHANGES["backbone"], CHANGES["odd widths"]):
        model, batch = network(**changes), images(1, 160, 224)
        price = price_between(model, batch, 0.5)
        assert_same(
            CompiledForward(model, torch.float32)(batch, model.request(1, price=price)), model(batch, price=price)
        )


@torch.inference_mode()
def test_what_has_left_is_the_same_whatever_the_later_weights_are():
    """It is not computed again: no later weight, not even NaN, reaches it or those that are left."""
    model, batch = network(), images(1, 160, 224)
    price = price_between(model, batch, 0.6)
    before = SkipEngine(model, backend="kernels")(batch, price=price)
    for name, node in model.nodes.items():
        if int(name.split("-")[0]) > 0:
            for values in node.parameters():
                values.fill_(float("nan"))
    after = SkipEngine(model, backend="kernels")(batch, price=price)
    gone = before.exits[0] == 0
    assert torch.equal(gone, after.exits[0] == 0) and gone.any() and not gone.all()
    for row, column in gone.nonzero().tolist():
        inner = (0, slice(None), slice(32 * row + 4, 32 * row + 28), slice(32 * column + 4, 32 * column + 28))
        assert torch.equal(before.logits[inner], after.logits[inner])


@pytest.mark.parametrize("num_scales", [2, 4])
@torch.inference_mode()
def test_whole_images_decide_by_their_entropy(num_scales):
    model, batch = network(place=None, choice="entropy", num_scales=num_scales), images(8, 72, 130)
    price = price_between(model, batch, 0.5)
    found, expected = SkipEngine(model, backend="kernels")(batch, price=price), model(batch, price=price)
    assert torch.equal(found.gates, expected.gates) and len(found.gates.flatten(1).sum(1).unique()) > 1
    assert torch.allclose(found.logits, expected.logits, atol=1e-4) and found.exits is None


@needs_bfloat16
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@torch.inference_mode()
def test_bfloat16_is_close(changes):
    """Where all leave at once; and as many leave at each exit as in float32 where each image has a budget, though other
    ones, since drawn weights are hardly surer of one place than of another."""
    model, batch = network(**changes), images(1, 200, 136)
    engine = SkipEngine(model, "bfloat16", "kernels")
    found, expected = engine(batch, price=1e6), model(batch, price=1e6)
    assert float((found.logits - expected.logits).abs().max() / expected.logits.abs().max()) < 0.05
    found, expected = (one(batch, price=0.5, per_image=True) for one in (engine, model))
    assert torch.equal(found.exits.flatten().bincount(), expected.exits.flatten().bincount())
    assert found.logits.isfinite().all()


class TestMistakes:
    @pytest.mark.parametrize(
        ("asked", "words"),
        [
            ({"exits": np.zeros((2, 2), int)}, "exits are of 2x2 places, images of this size have 3x4"),
            ({"exits": np.zeros((3, 3, 4), int)}, r"give integers \[hb,wb\] or \[B,hb,wb\], B = 1"),
            ({"exits": np.zeros((3, 4))}, "exits are float64"),
            ({"exits": np.full((3, 4), 4)}, "exits go from 4 to 4: they are numbers from 0 to 3"),
            ({"exits": np.full((3, 4), -1)}, "they are numbers from 0 to 3"),
            ({"exits": np.zeros((3, 4), int), "price": 0.3}, "give no route, budget or price with them"),
        ],
    )
    @pytest.mark.parametrize("backend", ["kernels", "eager"])
    def test_exits_that_are_none(self, asked, words, backend):
        with pytest.raises(ValueError, match=words):
            SkipEngine(network(), backend=backend)(images(1, 96, 128), **asked)

    def test_exits_without_places(self):
        with pytest.raises(ValueError, match="exits cannot be told to places"):
            network(place=None)(images(1, 96, 128), exits=np.zeros((3, 4), int))

    def test_a_place_that_is_no_whole_pixels(self):
        model, batch = network(), images(1, 64, 96)
        forward = CompiledForward(model, torch.float32)
        forward._packed.network.place = 40
        with pytest.raises(RuntimeError, match="a place is no whole pixels"):
            forward(batch, model.request(1, price=0.5))

    @torch.inference_mode()
    def test_values_that_are_not_finite(self):
        model, batch = network(), images(2, 64, 96)
        batch[1, 0, 3, 3] = np.nan
        with pytest.raises(ValueError, match="NaN or infinite"):
            SkipEngine(model, backend="kernels")(batch, price=0.5)
