"""Milliseconds of each exit: the arithmetic, the file, what is run for a table, the command and its mistakes. No test
says how long anything takes."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import run, scenes_checkpoint
from routeseg import DynamicRoutingNetwork, LatencyTable, SkipEngine
from routeseg.budgets.asked import Asked
from routeseg.budgets.budgeted import Budgeted
from routeseg.cost.latency import mean_ms, network_shape, stretches_at
from routeseg.engine import profiling
from routeseg.engine.profiling import profile

SIZE = (64, 96)
TIMES = np.array([[0.0, 4.0, 4.0], [2.0, 2.0, 3.5], [1.0, 5.0, 6.0], [0.0, 8.0, 8.0]])  # fixed, running, whole
EXITS = {"gate": "fixed", "route": "diagonal", "exits": [0, 2, 4]}
NETWORKS = {
    "gates": {},
    "static": {"gate": "fixed", "route": "fcn-32s"},
    "exits": EXITS,
    "entropy": EXITS | {"choice": "entropy"},
    "places": EXITS | {"place": 32},
}


def network(**options) -> DynamicRoutingNetwork:
    torch.manual_seed(0)
    small = {"num_classes": 5, "depth": 6, "base_channels": 8, "stem_channels": 8}
    return DynamicRoutingNetwork(**small, **options).eval()


def table_of(model: DynamicRoutingNetwork) -> LatencyTable:
    times = TIMES if model.config.exits else TIMES[:1]
    return LatencyTable(SIZE, "cpu", "float32", network_shape(model.config), times, {"repeats": 3})


class TestArithmetic:
    def test_whole_images(self):
        """The mean over images that leave at one exit each."""
        ends = np.cumsum(TIMES[:, 2])
        assert np.allclose(mean_ms(TIMES, np.eye(4)), ends)
        assert mean_ms(TIMES, np.array([[0.5, 0.0, 0.25, 0.25]])) == pytest.approx([ends @ [0.5, 0, 0.25, 0.25]])

    def test_places(self):
        """The fixed part is paid as soon as one place goes on, but not if all do; less than half a place is none."""
        frequencies = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.75, 0.25], [0, 0, 0, 1]])
        expected = [4, 4 + 2 + 1, 4 + 3.5 + 6 + 2, 4 + 4 + 6 + 8]  # at last nearly all of them
        assert mean_ms(TIMES, frequencies, places=8).tolist() == expected
        assert mean_ms(TIMES, np.array([[0.95, 0.05, 0, 0]]), places=8).tolist() == [4]

    def test_a_stretch_from_two_points(self):
        """Noise does not turn time back, and no part of a sum is negative or more than the sum."""
        whole = np.array([4.0, 8.0, 7.0, 20.0])
        parts = np.array([[7.0, 9.0, 14.0], [5.5, 7.0, 14.0]])
        found = profiling._stretches(whole, parts, [0.5, 0.25])
        assert found.tolist() == [[0, 4, 4], [0, 6, 4], [0, 4, 0], [6, 0, 12]]
        whole_only = [[0, 4, 4], [0, 4, 4], [0, 0, 0], [0, 12, 12]]
        assert profiling._stretches(whole).tolist() == whole_only
        assert profiling._stretches(whole[:2], parts[:, :1], [1.0, 0.0]).tolist() == whole_only[:2]  # of a single place


def test_a_budget_in_milliseconds_of_places():
    """An image takes by the table what was asked: of its places as many go on as that pays for."""
    model = network(**NETWORKS["places"])
    model.exits.prices = torch.linspace(0, 1, 5)
    model.exits.frequencies = torch.tensor(
        [[0, 0, 0, 1], [0, 0, 0.5, 0.5], [0, 0.5, 0.5, 0], [0.5, 0.5, 0, 0], [1.0, 0, 0, 0]]
    )
    table = table_of(model)
    image = torch.rand(1, 3, *SIZE)
    spent = []
    asked = [4, 4 + 2 + 1, 4 + 3.5 + 1 + 2.5, 4 + 3.5 + 6 + 4, 21.5]
    for ms in asked:
        engine = Budgeted(SkipEngine(model), model, Asked.parse(f"{ms}ms", table))
        left = engine(image).exits
        if left is None:  # all of it
            spent.append(table.exits_ms[-1])
            continue
        exits = np.bincount(left.flatten().numpy(), minlength=4)[None] / 6
        spent.append(float(mean_ms(stretches_at([table], model.config, SIZE, "t"), exits, 6)[0]))
    assert spent == asked


class TestProfile:
    @pytest.mark.parametrize("kind", NETWORKS)
    def test_it_is_measured_by_running(self, kind):
        """Times go up from exit to exit, and the network stays as it is."""
        model, steps = network(**NETWORKS[kind]), []
        before = {key: value.clone() for key, value in model.state_dict().items()}
        table = profile(model, SIZE, repeats=2, step=lambda: steps.append(1))
        assert len(steps) == 3 and table.size == SIZE and table.precision == "float32"
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        count = 1 if model.config.exits is None else len(model.config.exits)
        assert table.stretches_ms.shape == (count, 3) and (table.stretches_ms >= 0).all()
        assert table.exits_ms[0] > 0 and (np.diff(table.exits_ms) >= 0).all()
        assert ("own_gates" in table.facts) == (kind == "gates")
        assert kind == "places" or (table.stretches_ms[:, 0] == 0).all(), "whole images"

    def test_of_places_each_exit_is_reached_by_all_by_half_and_by_an_eighth(self, monkeypatch):
        """With as many decisions as there are exits on the way."""
        ran = []

        class Engine(SkipEngine):
            def labels(self, images, **how):
                found = super().labels(images, **how)
                ran.append(np.bincount(found.exits.flatten(), minlength=4).tolist())
                return found

        monkeypatch.setattr(profiling, "SkipEngine", Engine)
        profile(network(**NETWORKS["places"]), SIZE, repeats=1)
        whole = (6 * np.eye(4, dtype=int)).tolist()
        halves = [[3, 3, 0, 0], [0, 3, 3, 0], [0, 0, 3, 3]]
        eighths = [[5, 1, 0, 0], [0, 5, 1, 0], [0, 0, 5, 1]]  # of six places: one
        assert ran == 2 * (whole + halves + eighths)

    @pytest.mark.parametrize("kind", ["exits", "entropy"])
    def test_decisions_are_measured_with_an_image_that_stays(self, kind, monkeypatch):
        last = []

        class Engine(SkipEngine):
            def labels(self, images, **how):
                found = super().labels(images, **how)
                if "price" in how:
                    last.append(found.gates[0, -1].any().item())
                return found

        monkeypatch.setattr(profiling, "SkipEngine", Engine)
        profile(network(**NETWORKS[kind]), SIZE, repeats=1)
        assert last == [True, True]


@pytest.mark.parametrize("kind", NETWORKS)
def test_file(kind, tmp_path):
    model, file = network(**NETWORKS[kind]), tmp_path / "table.json"
    table = table_of(model)
    table.write(file)
    read = LatencyTable.read(file)
    assert read.as_dict() == table.as_dict() and read.fingerprint == table.fingerprint
    read.check(model.config, file)
    wider = replace(model.config, base_channels=16)
    with pytest.raises(ValueError, match="another network: base_channels is 8 there, 16 here"):
        read.check(wider, file)
    data = json.loads(file.read_text())
    for damage in (
        {"stretches_ms": [{"fixed": -1, "running": 1, "whole": 1}] * len(table.stretches_ms)},
        {"stretches_ms": [{"fixed": 1}] * len(table.stretches_ms)},
        {"stretches_ms": data["stretches_ms"][1:]},
        {"stretches_ms": None},
        {"size": [64]},
        {"look": "half"},
        {"fingerprint": "0" * 16},
        {"format": 1, "scales_ms": [{"gate": 1.0}]},
        {"network": {}},
    ):
        file.write_text(json.dumps(data | damage))
        with pytest.raises(ValueError, match=f"{re.escape(str(file))} .*: run `routeseg profile` again"):
            LatencyTable.read(file)
    for text in ("{", "[]", "\xff", json.dumps({key: value for key, value in data.items() if key != "stretches_ms"})):
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match="routeseg profile"):
            LatencyTable.read(file)
    with pytest.raises(ValueError, match="no latency table .*nothing.json"):
        LatencyTable.read(tmp_path / "nothing.json")


def test_command(tmp_path, capsys):
    checkpoint = str(network(**EXITS).save(tmp_path / "net"))
    words = ["profile", checkpoint, "--size=64x96", "--repeats=2", f"--json={tmp_path / 'result.json'}"]
    code, out, err = run(words, capsys)
    assert code == 0, err
    file = tmp_path / "net" / "latency_cpu_64x96_float32.json"
    stored, table = json.loads(file.read_text()), LatencyTable.read(file)
    assert stored["machine"]["threads"] == 1 and stored["command"][:2] == ["profile", checkpoint]
    assert table.name == file.stem and json.loads((tmp_path / "result.json").read_text()) == stored
    for name, ms in zip(("exit-0", "exit-2", "exit-4", "exit-6"), table.exits_ms, strict=True):
        assert re.search(rf"{name} .* {ms:.2f} ", out), out


@pytest.mark.parametrize(
    ("options", "shown"), [([], "its own gates"), (["gate=fixed", "exits=[1]", "place=32"], "half of the places")]
)
def test_command_without_checkpoint(tmp_path, capsys, options, shown):
    words = [f"--model.{one}" for one in ("depth=3", "base_channels=8", "stem_channels=8", *options)]
    code, out, err = run(["profile", *words, "--size=64x64", "--repeats=1", f"--output={tmp_path / 'made'}"], capsys)
    assert code == 0 and shown in " ".join(out.split()), err
    table = LatencyTable.read(tmp_path / "made" / "latency_cpu_64x64_float32.json")
    assert table.network["depth"] == 3 and table.network["num_classes"] == 19


def test_command_mistakes(tmp_path, capsys):
    checkpoint, in_the_way = scenes_checkpoint(tmp_path / "net"), tmp_path / "file"
    in_the_way.touch()
    for words, expected in (
        (["--size=64"], "HEIGHTxWIDTH"),
        (["--size=16x64"], "at least 32"),
        (["--precision=float8"], "choose one of auto, float32"),
        (["--device=abacus"], "--device abacus"),
        (["--repeats=0"], "--repeats is 0"),
        ([f"--output={in_the_way / 'x'}"], "--output"),
        (["--model.depth=3"], "--model.depth describes a network without a checkpoint"),
        (["--num_classes=3"], "--num_classes describes a network without a checkpoint"),
        (["--data.name=camvid"], "does not take --data.name: leave it out"),
        (["--recipe.seed=3"], "does not take --recipe.seed: give --seed instead"),
    ):
        code, _, err = run(["profile", checkpoint, "--size=64x96", "--repeats=1", *words], capsys)
        assert code == 2 and expected in err and err.count("\n") == 1, (words, err)
    assert not list((tmp_path / "net").glob("latency*"))
