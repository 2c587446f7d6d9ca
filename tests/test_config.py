"""Configs, routes or weights that are wrong end in one ValueError, before anything is allocated."""

import json
import os
import struct
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import run, spread_gates
from routeseg import DynamicRoutingNetwork, NetworkConfig, Route, RoutingSpace, load
from routeseg.config import MAX_CHANNELS, MAX_CLASSES
from routeseg.registry import GATES, Registry
from routeseg.space import MAX_DEPTH, MAX_SCALES

SMALL = {"num_classes": 3, "depth": 3, "base_channels": 4, "stem_channels": 4}
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return spread_gates(DynamicRoutingNetwork(**SMALL)).save(tmp_path_factory.mktemp("config") / "net")


def copy_with(checkpoint, folder, config=None, weights=None):
    """The checkpoint's files, one of them replaced: `config` as text, `weights` as tensors."""
    folder.mkdir(exist_ok=True)
    text = (checkpoint / "config.json").read_text() if config is None else config
    (folder / "config.json").write_text(text)
    save_file(load_file(checkpoint / "model.safetensors") if weights is None else weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *((name, value, f"{name} is .*: it must be a whole number from 1 to") for name, value in [
            ("depth", 10**6), ("depth", 10**9), ("depth", 0), ("depth", 2.0), ("depth", True), ("depth", "3"),
            ("num_scales", 30), ("num_scales", None), ("num_classes", 10**9), ("num_classes", 0),
            ("stem_channels", 10**9),
        ]),
        ("base_channels", 10**9, f"it must be a whole number from 2 to {MAX_CHANNELS}"),
        ("base_channels", 5, "it must be even"),
        ("depth", 2, "depth 2 is too small for 4 scales"),
        *((name, value, f"{name} is .*: it must be true or false")
          for name in ("small_gate", "zeros_arrive") for value in (None, [], "x", 1)),
        *(("pixel_mean", value, "it must be three numbers up to") for value in ([0, 0], [0] * 4, [0, 0, "x"],
          [0, 0, float("nan")], [0, float("inf"), 0], [10**400, 0, 0]  , [True, 0, 0])),
        *(("pixel_std", value, "must be") for value in ([1, 1, 0], [1, -1, 1], [float("inf"), 1, 1], [1e-300, 1, 1])),
        *(("palette", value, "a colour is three whole numbers from 0 to 255")
          for value in ([[300, 0, 0]] * 3, [[-1, 0, 0]] * 3, [[0.5, 0, 0]] * 3, [[0, 0]] * 3, [[True, 0, 0]] * 3)),
        ("palette", [[0, 0, 0, 0]] * 3, "a colour is three"),
        ("palette", [[0, 0, 0]], "palette has 1 entries for 3 classes"),
        ("palette", "abc", "must be a list"), ("pixel_mean", "abc", "must be a list"), ("pixel_std", {"r": 1}, "list"),
        ("class_names", "abc", "class_names is 'abc': it must be a list"),
        ("class_names", ["a", "b", 3], r"class_names\[2\] is 3: it must be a text"),
        ("class_names", ["a", "b"], "class_names has 2 entries for 3 classes"),
        ("class_names", ["a", "b", "c" * 10_000], "at most 256 characters"),
        ("cell_operations", [], "choose at least one of sep_conv_3x3"),
        ("cell_operations", "sep_conv_3x3", "must be a list"),
        ("cell_operations", ["identity"] * 2, "names an operation twice"),
        ("cell_operations", ["sep_conv_7x7"], "choose at least one of sep_conv_3x3"),
        ("cell_operations", [["identity"]], "choose at least one of"),
        ("gate", "hard", "gate is 'hard': choose one of soft, softmax, fixed"),
        ("gate", None, "gate is None"),
        ("route", [[0, 0, "keep"]], "a network of a fixed route has no gates"),
        ("colour", 1, "there is no field 'colour'"),
        ("num_clases", 3, "did you mean num_classes"),
    ],
)  # fmt: skip
def test_a_field_that_makes_no_network_is_named(field, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        NetworkConfig.from_dict(SMALL | {field: value})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("route", [[], "v-net", {"a": 1}, [[0, 0]], [[0, 0, "left"]], [[3, 3, "keep"]], [1] * 10_000])
def test_a_route_that_is_none(route):
    with pytest.raises(ValueError):
        NetworkConfig.from_dict(SMALL | {"gate": "fixed", "route": route})


def test_what_is_made_is_whole():
    config = NetworkConfig.from_dict(json.loads(json.dumps(SMALL | {"class_names": ["a", "b", "c"]})))
    assert config == NetworkConfig.from_dict(json.loads(json.dumps(config.as_dict()))) and hash(config)
    assert config.class_names == ("a", "b", "c") and len(config.palette) == 3
    assert config.space == RoutingSpace(3) and config.whole_route == Route.all_open(config.space) and config.gated
    with pytest.raises(FrozenInstanceError):
        config.depth = 5
    static = replace(NetworkConfig(depth=8), gate="fixed", route="u-net", zeros_arrive=True)
    assert static.route[0] == (0, 0, "keep") and not static.zeros_arrive and not static.gated
    with pytest.raises(ValueError, match="not both"):
        DynamicRoutingNetwork(config, depth=4)


@pytest.mark.parametrize(
    "text",
    [
        DEEP, "{" + '"a":{' * 50_000, "", "nonsense", "null", "3", "[]", '"x"', "\xff",
        *(json.dumps({"depth": depth, "num_scales": scales, "open": []})
          for depth, scales in [(10**9, 4), (30, 30), (10**100, 4), (-1, 4), (3.5, 4), (None, 4), ("3", 4), (3, [])]),
        *(json.dumps({"depth": 3, "num_scales": 4, "open": edges})
          for edges in [5, None, "x", [[]], [["a", "b", "c"]], [[10**30, 0, "up"]], [[0, 0, ["up"]]], [{}]]),
        json.dumps({"depth": 3}),
    ],
)  # fmt: skip
def test_texts_that_are_no_route(text):
    with pytest.raises(ValueError, match="not a route"):
        Route.from_json(text)


def test_limits_are_beyond_real_networks_and_at_hand():
    assert MAX_DEPTH > 33 and MAX_SCALES > 4 and MAX_CLASSES > 21_841
    largest = NetworkConfig(num_classes=MAX_CLASSES, depth=MAX_DEPTH, num_scales=MAX_SCALES, base_channels=MAX_CHANNELS)
    assert len(largest.space.nodes) < 1000


class TestCheckpoint:
    def test_loads_and_runs(self, checkpoint):
        assert load(checkpoint)(torch.rand(1, 3, 32, 32)).logits.isfinite().all()
        assert json.loads((checkpoint / "config.json").read_text()) == json.loads(
            json.dumps(load(checkpoint).config.as_dict())
        )
        assert DynamicRoutingNetwork.from_pretrained(checkpoint).config == load(checkpoint).config

    def test_a_file_of_before_loads(self, checkpoint, tmp_path):
        """It has null for what is as it is by default, and lacks what came later."""
        old = SMALL | {
            "class_names": None,
            "palette": None,
            "route": None,
            "cell_operations": ["sep_conv_3x3", "identity"],
        }
        assert load(copy_with(checkpoint, tmp_path / "old", json.dumps(old))).config == load(checkpoint).config

    @pytest.mark.parametrize("text", [DEEP, "{", "[]", "3", '{"depth": 1e9}', '{"depth": 1000000}', "\x00"])
    def test_a_config_that_is_none(self, checkpoint, tmp_path, capsys, text):
        folder = copy_with(checkpoint, tmp_path / "net", text)
        with pytest.raises(ValueError, match="config.json describes no network"):
            load(folder)
        code, _, err = run(["predict", folder, tmp_path / "x.png"], capsys)
        assert code == 2 and len(err.splitlines()) == 1

    def test_a_network_too_large_for_its_weights_is_not_built(self, checkpoint, tmp_path):
        """It would take hundreds of gigabytes."""
        large = SMALL | {"depth": MAX_DEPTH, "base_channels": MAX_CHANNELS}
        with pytest.raises(ValueError, match="does not fit the network that its config describes: it lacks the node"):
            load(copy_with(checkpoint, tmp_path / "net", json.dumps(large)))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w.pop("decoder.predictor.bias"), "it lacks decoder.predictor.bias"),
            (lambda w: w.update(extra=torch.zeros(1)), "the network has no extra"),
            (lambda w: w.update({"decoder.predictor.bias": torch.zeros(4)}), r"has shape \[4\] there, \[3\]"),
            (lambda w: w.update({"decoder.predictor.bias": torch.zeros(3, dtype=torch.int64)}), "stored as I64"),
            (lambda w: w.update({"stem.0.1.num_batches_tracked": torch.tensor(1.0)}), "stored as F32"),
        ],
    )
    def test_weights_that_do_not_fit(self, checkpoint, tmp_path, change, message):
        weights = load_file(checkpoint / "model.safetensors")
        change(weights)
        with pytest.raises(ValueError, match=message):
            load(copy_with(checkpoint, tmp_path / "net", weights=weights))

    def test_a_sparse_file_of_100_gb(self, checkpoint, tmp_path):
        folder, size = copy_with(checkpoint, tmp_path / "net"), 100 * 10**9
        header = json.dumps({"stem.0.0.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
        with open(folder / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header.encode())
            os.ftruncate(file.fileno(), 8 + len(header) + size)
        with pytest.raises(ValueError, match="it lacks the node"):
            load(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*NetworkConfig().as_dict(), "zzz"])
LIKELY = {  # values that are nearly right, so that not every example ends at the first check
    "depth": st.integers(-1, 200),
    "num_scales": st.integers(0, 8),
    "num_classes": st.integers(0, 6),
    "gate": st.sampled_from(["soft", "softmax", "fixed", ""]),
    "small_gate": st.booleans(),
    "zeros_arrive": st.booleans(),
    "pixel_mean": st.lists(st.floats(), min_size=2, max_size=4),
    "pixel_std": st.lists(st.floats(), min_size=3, max_size=3),
    "palette": st.lists(st.lists(st.integers(-1, 256), min_size=3, max_size=3), min_size=3, max_size=3),
    "class_names": st.lists(st.text(), min_size=3, max_size=3),
}


@settings(max_examples=75, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_the_json_load_gives_a_network_that_runs_or_raises_valueerror(checkpoint, tmp_path, data):
    names = data.draw(st.lists(FIELDS, max_size=3))
    config = SMALL | {name: data.draw(LIKELY.get(name, JSON) | JSON) for name in names}
    folder = copy_with(checkpoint, tmp_path / "net", json.dumps(data.draw(st.just(config) | JSON)))
    try:
        model = load(folder)
    except ValueError:
        return
    with torch.no_grad():
        result = model(torch.rand(1, 3, 32, 32))
    assert result.logits.shape == (1, 3, 32, 32) and result.logits.isfinite().all()


@settings(max_examples=200, deadline=None)
@given(JSON, st.integers(0, 200), st.integers(0, 8), st.lists(st.tuples(st.integers(-1, 9), st.integers(-1, 4), st.text(max_size=4) | st.sampled_from(["up", "keep", "down"])), max_size=4))  # fmt: skip  # noqa: E501
def test_whatever_the_json_a_route_is_read_or_refused(anything, depth, scales, edges):
    for value in (anything, {"depth": depth, "num_scales": scales, "open": edges}):
        try:
            route = Route.from_json(json.dumps(value))
        except ValueError:
            continue
        assert Route.from_json(route.to_json()) == route


def test_a_registry_takes_a_name_once():
    registry = Registry("gate", {"soft": "routeseg.model.gate:SoftGate"})
    assert registry["soft"] is GATES["soft"] and "hard" not in registry and list(registry) == ["soft"]
    with pytest.raises(ValueError, match="there is a gate 'soft' already"):
        registry["soft"] = object
