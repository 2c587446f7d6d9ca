"""A run that goes on where another one ended."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pictures import noise, save
from predicting import labels_of, run, sharpen
from routeseg import load
from routeseg.budgets.asked import Asked
from routeseg.cost.latency import LatencyTable
from routeseg.description import fingerprint
from routeseg.prediction.files import OUTPUTS, predict_files
from routeseg.prediction.torch_runner import TorchNetwork


@pytest.fixture
def network(tiny_network):
    return sharpen(tiny_network)


class TestResume:
    @pytest.fixture
    def paths(self, tmp_path):
        return [save(tmp_path / "in" / f"{name}.png", noise(32, 64, seed)) for seed, name in enumerate("abcd")]

    def test_an_interrupted_run_goes_on_where_it_stopped(self, network, paths, tmp_path):
        class Interrupt(Exception):
            pass

        calls = []

        def stop():
            calls.append(1)
            if len(calls) == 2:
                raise Interrupt

        with pytest.raises(Interrupt):
            run(network, paths, tmp_path / "out", on_image=stop)
        before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
        assert len(before) == 2 * len(OUTPUTS)
        calls.clear()
        seen = []

        def forward(images):
            seen.append(images)
            return network(images)

        summary = predict_files(
            TorchNetwork(forward, network), paths, tmp_path / "out", resume=True, on_image=lambda: calls.append(1)
        )
        assert len(seen) == 2 and len(calls) == 4 and summary.resumed == 2
        assert [p.name for p in summary.predictions] == list("abcd")
        assert "4 (2 of them from an earlier run)" in summary.table()
        after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
        assert len(after) == 4 * len(OUTPUTS) and all(after[name] == time for name, time in before.items())
        whole = run(network, paths, tmp_path / "whole")
        assert whole.predictions == summary.predictions
        for path in (tmp_path / "whole").iterdir():
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()

    def test_results_that_are_not_whole_are_made_anew(self, network, paths, tmp_path):
        run(network, paths, tmp_path / "out")
        (tmp_path / "out" / "a_route.json").write_text('{"depth": 4')
        (tmp_path / "out" / "b_route.json").write_text("[]")
        (tmp_path / "out" / "c_route.json").unlink()
        summary = run(network, paths, tmp_path / "out", resume=True)
        assert summary.resumed == 1 and len(summary.predictions) == 4
        assert all("network" in json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json"))

    def test_the_json_is_gone_while_its_image_is_worked_on(self, network, paths, tmp_path, monkeypatch):
        """Else a run that dies in between leaves new labels beside an old JSON."""
        run(network, paths[:1], tmp_path / "out")
        write, begun = Path.write_bytes, []

        def fill(path, data):
            begun.append(path)
            if len(begun) == 2:  # the overlay, behind the labels
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", fill)
            with pytest.raises(ValueError, match="No space left.*--resume"):
                run(network, paths[:1], tmp_path / "out")
        assert not (tmp_path / "out" / "a_route.json").exists()
        assert run(network, paths[:1], tmp_path / "out", resume=True).resumed == 0

    def test_results_of_another_network_are_refused_and_kept(self, network, paths, tmp_path):
        run(network, paths, tmp_path / "out")
        before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
        with torch.no_grad():
            network.decoder.predictor.bias.add_(1e-6)
        with pytest.raises(ValueError, match="a_route.json is the result of another network.*--resume"):
            run(network, paths, tmp_path / "out", resume=True)
        assert before == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def test_results_of_another_question_are_refused_and_kept(self, network, paths, tmp_path):
        """Budget, its unit, its table, and precision: all that decides a result is in its JSON."""

        class Runner(TorchNetwork):
            def __init__(self, budget, precision="float32"):
                super().__init__(network, network)
                self.budget, self.precision = budget, precision

        predict_files(Runner("30%"), paths, tmp_path / "out")
        known = json.loads((tmp_path / "out" / "a_route.json").read_text())
        assert (known["budget"], known["precision"]) == ("30%", "float32") and len(known["image_content"]) == 16
        before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
        for budget, precision, message in (
            ("100%", "float32", "at budget 30%, and 100% is asked"),
            (None, "float32", "at budget 30%, and none is asked"),
            ("30%", "bfloat16", "at precision float32, and bfloat16 is asked"),
        ):
            with pytest.raises(ValueError, match=f"a_route.json is the result {message}: choose another --output"):
                predict_files(Runner(budget, precision), paths, tmp_path / "out", resume=True)
        assert before == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
        assert predict_files(Runner("30%"), paths, tmp_path / "out", resume=True).resumed == 4

    def test_an_image_that_was_replaced_is_segmented_anew(self, network, paths, tmp_path):
        """The same name, size and time."""
        run(network, paths, tmp_path / "out")
        stat = paths[1].stat()
        save(paths[1], noise(32, 64, 99))
        os.utime(paths[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert run(network, paths, tmp_path / "out", resume=True).resumed == 3
        assert run(network, paths, tmp_path / "out", resume=True).resumed == 4
        fresh = run(network, paths, tmp_path / "fresh")
        assert (labels_of(tmp_path / "out", "b") == labels_of(tmp_path / "fresh", "b")).all() and fresh.resumed == 0

    def test_a_budget_in_words(self):
        table = LatencyTable((32, 64), "cpu", "float32", {}, np.ones((2, 3)))
        slower = replace(table, stretches_ms=np.full((2, 3), 2.0))
        for one, other, same in (
            (Asked.parse("30%"), Asked.parse("0.3"), True),
            (Asked.parse("30%"), Asked.parse("30.01%"), False),
            (Asked.parse("0.5GMACs"), Asked.parse("500 MMACs"), True),
            (Asked.parse("0.5GMACs"), Asked.parse("0.5"), False),
            (Asked.parse("25ms", table, "a"), Asked.parse("25ms", table, "b"), True),
            (Asked.parse("25ms", table, "a"), Asked.parse("25ms", slower, "a"), False),
        ):
            assert (str(one) == str(other)) == same
        assert str(Asked.parse("0.3")) == "30%" and str(Asked.parse("0.5GMACs")) == "0.5GMACs"

    def test_the_result_of_another_image_does_not_count(self, network, paths, tmp_path):
        """Another list of images may give a name to another image."""
        run(network, paths[:1], tmp_path / "out")
        other = save(tmp_path / "other" / "a.png", noise(40, 64))
        summary = run(network, [other], tmp_path / "out", resume=True)
        assert summary.resumed == 0 and labels_of(tmp_path / "out", "a").shape == (40, 64)

    def test_pictures_that_were_left_out_are_made_when_they_are_wanted(self, network, paths, tmp_path):
        run(network, paths, tmp_path / "out", pictures=False)
        assert len(list((tmp_path / "out").iterdir())) == 2 * len(paths)
        assert run(network, paths, tmp_path / "out", pictures=False, resume=True).resumed == 4
        assert run(network, paths, tmp_path / "out", resume=True).resumed == 0
        assert len(list((tmp_path / "out").iterdir())) == len(OUTPUTS) * len(paths)
        assert run(network, paths, tmp_path / "out", pictures=False, resume=True).resumed == 4

    def test_a_fingerprint_is_of_weights_and_configuration(self, tiny_network, tmp_path):
        own = fingerprint(tiny_network)
        assert own == fingerprint(load(tiny_network.save(tmp_path / "saved"))) and len(own) == 16
        renamed = load(tmp_path / "saved")
        config = json.loads((tmp_path / "saved" / "config.json").read_text())
        (tmp_path / "saved" / "config.json").write_text(json.dumps(config | {"class_names": list("abcde")}))
        assert fingerprint(load(tmp_path / "saved")) != own == fingerprint(renamed)
        with torch.no_grad():
            renamed.decoder.predictor.bias[0] += 1e-6
        assert fingerprint(renamed) != own
