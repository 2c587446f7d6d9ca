"""Files in; label maps, overlays and routes out."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pictures import ORIENTATION_TAG, ROTATED_RIGHT, noise, save
from predicting import labels_of, run, sharpen
from routeseg import DynamicRoutingNetwork, SkipEngine
from routeseg.cost.macs import model_cost
from routeseg.data.decoding import read_image
from routeseg.data.label_files import read_label_file
from routeseg.data.transforms import PADDING_RGB
from routeseg.description import describe
from routeseg.prediction import files
from routeseg.prediction.files import OUTPUTS, Skip, predict_files
from routeseg.prediction.torch_runner import TorchNetwork
from routeseg.space import DIRECTIONS, Route


@pytest.fixture
def network(tiny_network):
    return sharpen(tiny_network)


class TestPredictFiles:
    def test_every_file_is_there_and_right(self, network, tmp_path):
        image = noise(64, 96)
        path = save(tmp_path / "in" / "street.png", image)
        summary = run(network, [path], tmp_path / "out")
        assert {p.name for p in (tmp_path / "out").iterdir()} == {f"street{end}" for end in OUTPUTS}

        with torch.no_grad():
            result = network(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])
        with Image.open(tmp_path / "out" / "street_labels.png") as picture:
            assert picture.mode == "P"
            colours = np.array(picture.getpalette(), dtype=int).reshape(-1, 3)
            ids = np.asarray(picture)
        assert np.array_equal(ids, result.labels[0].numpy())
        assert len(np.unique(ids)) > 1, "the check above compared something"
        assert np.array_equal(colours[: network.config.num_classes], network.config.palette)
        mask = read_label_file(tmp_path / "out" / "street_labels.png")
        assert np.array_equal(mask, ids), "a label map can serve as a mask to train on"

        overlay = read_image(tmp_path / "out" / "street_overlay.png")
        assert overlay.shape[0] > 64 * 5 and overlay.shape[1] == 96 * 5, "enlarged, with a legend below"
        assert read_image(tmp_path / "out" / "street_route.png").shape[1] > 200

        prediction = summary.predictions[0]
        assert prediction.image == path and prediction.name == "street" and prediction.size == (64, 96)
        text = (tmp_path / "out" / "street_route.json").read_text()
        assert Route.from_json(text) == Route.from_gates(network.config.space, result.gates[0].numpy())
        cost = model_cost(network, (64, 96))
        assert prediction.cost_macs == pytest.approx(float(cost.of_gates(result.gates)[0]))
        assert prediction.full_macs == pytest.approx(cost.full)
        assert 0 < prediction.share < 1

    def test_route_json_is_a_route_and_more(self, network, tmp_path):
        path = save(tmp_path / "a.png", noise(64, 96))
        prediction = run(network, [path], tmp_path / "out").predictions[0]
        text = (tmp_path / "out" / "a_route.json").read_text()
        assert len(Route.from_json(text)) > 0
        data = json.loads(text)
        assert (data["depth"], data["num_scales"]) == (4, 4)
        assert data["image"] == str(path) and data["image_size"] == [64, 96]
        assert data["cost_gmacs"] == pytest.approx(prediction.cost_macs / 1e9)
        assert data["share_of_full"] == pytest.approx(data["cost_gmacs"] / data["full_gmacs"])
        with torch.no_grad():
            gates = network(torch.from_numpy(noise(64, 96).transpose(2, 0, 1).copy())[None]).gates[0]
        assert len(data["activations"]) == len(data["open"])
        for (layer, scale, name), activation in zip(data["open"], data["activations"], strict=True):
            assert activation == pytest.approx(float(gates[layer, scale, DIRECTIONS.index(name)]), abs=1e-6)
            assert activation > 0

    def test_the_skip_engine_gives_the_same_files(self, network, tmp_path):
        path = save(tmp_path / "a.png", noise(64, 96))
        run(network, [path], tmp_path / "dense")
        predict_files(TorchNetwork(SkipEngine(network), network), [path], tmp_path / "skip")
        same = labels_of(tmp_path / "dense", "a") == labels_of(tmp_path / "skip", "a")
        assert same.mean() > 0.999, "rounding may move a pixel that lies between two classes"
        texts = [(tmp_path / kind / "a_route.json").read_text() for kind in ("dense", "skip")]
        assert Route.from_json(texts[0]) == Route.from_json(texts[1])

    @pytest.mark.parametrize("size", [(33, 47), (32, 32), (20, 100), (100, 7), (1, 1)])
    def test_odd_and_small_sizes(self, network, tmp_path, size):
        image = noise(*size)
        path = save(tmp_path / "a.png", image)
        prediction = run(network, [path], tmp_path / "out").predictions[0]
        labels = labels_of(tmp_path / "out", "a")
        assert labels.shape == prediction.size == size
        assert json.loads((tmp_path / "out" / "a_route.json").read_text())["image_size"] == list(size)
        if min(size) >= 32:
            with torch.no_grad():
                expected = network(torch.from_numpy(image.transpose(2, 0, 1).copy())[None]).labels[0]
            assert np.array_equal(labels, expected.numpy())
        computed = [max(32, -(-side // 32) * 32) for side in size]
        assert prediction.full_macs == pytest.approx(model_cost(network, tuple(computed)).full)

    def test_a_small_image_is_padded_grey_to_the_right_and_below(self, network, tmp_path):
        small = noise(20, 40)
        seen = []

        def forward(images):
            seen.append(images)
            return network(images)

        predict_files(TorchNetwork(forward, network), [save(tmp_path / "a.png", small)], tmp_path / "out")
        padded = np.full((32, 40, 3), PADDING_RGB, dtype=np.uint8)
        padded[:20] = small
        assert seen[0].dtype == torch.uint8
        assert np.array_equal(seen[0][0].permute(1, 2, 0), padded)
        assert np.array_equal(labels_of(tmp_path / "out", "a"), network(seen[0]).labels[0, :20])

    def test_the_cost_is_that_of_the_size_that_is_computed(self, tmp_path):
        """With three scales 16 pixels would do for the space, but the network takes no less than 32."""
        model = DynamicRoutingNetwork(num_classes=5, depth=3, num_scales=3, base_channels=8, stem_channels=8).eval()
        prediction = run(model, [save(tmp_path / "a.png", noise(10, 12))], tmp_path / "out").predictions[0]
        assert prediction.full_macs == pytest.approx(model_cost(model, (32, 32)).full)

    @pytest.mark.parametrize("size", [(100, 150), (64, 300), (65, 64), (40, 200)])
    def test_a_large_image_is_segmented_in_windows(self, network, size, monkeypatch):
        """Each pixel once, from a window that has it well inside; cost and route over all windows."""
        monkeypatch.setattr(files, "PASS_BYTES", 64 * 64 * (150 + 5 * 5))
        monkeypatch.setattr(files, "WINDOW", 64)
        seen, known = [], describe(network)

        class Copies:
            """Its classes are the red of the pixels, but for the outermost ones of a window."""

            network, precision = known, "float32"

            def __call__(self, view):
                seen.append(view.shape[:2])
                gates = np.zeros(self.network.config.space.legal.shape, np.float32)
                gates[0, 0] = len(seen)
                labels = view[..., 0].copy()
                for edge in (np.s_[:2], np.s_[-2:], np.s_[:, :2], np.s_[:, -2:]):
                    labels[edge] = 255
                return files.Ran(labels, gates)

        image = np.random.default_rng(0).integers(0, 200, (*size, 3), dtype=np.uint8)
        found = files.segment(Copies(), image, Path("large.png"), "large")
        inner = np.s_[2 : size[0] - 2, 2 : size[1] - 2]
        assert (found.labels[inner] == image[..., 0][inner]).all() and found.labels.shape == size
        assert found.windows == len(seen) > 1 and all(max(one) <= 64 for one in seen)
        assert found.gates[0, 0, 0] == np.mean(range(1, len(seen) + 1))
        assert found.prediction.full_macs == pytest.approx(len(seen) * model_cost(network, seen[0]).full)

    def test_exif_orientation_gives_an_upright_label_map(self, network, tmp_path):
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = ROTATED_RIGHT
        image = noise(48, 80)
        paths = [tmp_path / "turned.png", tmp_path / "upright.png"]
        save(paths[0], image, exif=exif)
        save(paths[1], np.rot90(image, -1))
        summary = run(network, paths, tmp_path / "out")
        assert summary.predictions[0].size == (80, 48)
        assert np.array_equal(labels_of(tmp_path / "out", "turned"), labels_of(tmp_path / "out", "upright"))
        overlay = read_image(tmp_path / "out" / "turned_overlay.png")
        assert overlay.shape[0] > 80 * 6 - 1 and overlay.shape[0] >= overlay.shape[1]

    @pytest.mark.parametrize("kind", ["grey", "rgba", "16-bit", "palette"])
    def test_every_kind_of_pixel(self, network, tmp_path, kind):
        image = noise(40, 64)
        grey = image[..., 0]
        pixels = {
            "grey": grey,
            "rgba": np.dstack([image, grey]),
            "16-bit": (grey.astype(np.uint16) * 257),
            "palette": np.asarray(Image.fromarray(image).quantize(16).convert("RGB")),
        }[kind]
        picture = Image.fromarray(pixels)
        (picture.quantize(16) if kind == "palette" else picture).save(tmp_path / "a.png")
        rgb = {"rgba": image, "palette": pixels}.get(kind, np.dstack([grey] * 3))
        save(tmp_path / "rgb.png", rgb)
        summary = run(network, [tmp_path / "a.png", tmp_path / "rgb.png"], tmp_path / "out")
        assert not summary.skipped
        assert np.array_equal(labels_of(tmp_path / "out", "a"), labels_of(tmp_path / "out", "rgb"))

    def test_an_unreadable_file_is_skipped_and_reported(self, network, tmp_path):
        paths = [save(tmp_path / f"{name}.png", noise(32, 64, seed)) for seed, name in enumerate("abc")]
        paths[1].write_bytes(paths[1].read_bytes()[:500])
        calls = []
        summary = run(network, paths, tmp_path / "out", on_image=lambda: calls.append(1))
        assert [p.name for p in summary.predictions] == ["a", "c"]
        assert [skip.image for skip in summary.skipped] == [paths[1]] and "b.png" in summary.skipped[0].reason
        assert len(calls) == 3
        assert not list((tmp_path / "out").glob("*b_*"))
        lines = summary.table().splitlines()
        assert any(line.split() == ["images", "2"] for line in lines)
        assert any(line.split() == ["skipped", "1"] for line in lines)
        assert "cannot read" in lines[-1] and "b.png" in lines[-1]

    def test_nothing_but_unreadable_files(self, network, tmp_path):
        (tmp_path / "a.png").write_text("no image")
        summary = run(network, [tmp_path / "a.png"], tmp_path / "out")
        assert not summary.predictions and len(summary.skipped) == 1
        assert "cost" not in summary.table() and not list((tmp_path / "out").iterdir())

    def test_the_table_says_what_the_images_cost(self, network, tmp_path):
        paths = [save(tmp_path / "a.png", noise(32, 64)), save(tmp_path / "b.png", noise(64, 64, 1))]
        summary = run(network, paths, tmp_path / "out")
        costs = [p.cost_macs / 1e9 for p in summary.predictions]
        text = summary.table()
        for name, value in (("mean", np.mean(costs)), ("min", min(costs)), ("max", max(costs))):
            (line,) = [line for line in text.splitlines() if line.startswith(f"real cost, {name}")]
            assert f" {value:.4g} GMACs (" in line and "% of the full network" in line
        assert str(tmp_path / "out") in text and "skipped" not in text and summary.seconds > 0

    def test_images_of_one_name_do_not_overwrite_each_other(self, network, tmp_path):
        paths = [tmp_path / name for name in ("a/x.png", "b/x.jpg", "b/x.png", "y.png")]
        for seed, path in enumerate(paths):
            save(path, noise(32 + 8 * seed, 64, seed))
        summary = run(network, paths, tmp_path / "out")
        names = [p.name for p in summary.predictions]
        assert len(set(names)) == 4 and names[3] == "y"
        assert len(list((tmp_path / "out").iterdir())) == 4 * len(OUTPUTS)
        for path, name in zip(paths, names, strict=True):
            data = json.loads((tmp_path / "out" / f"{name}_route.json").read_text())
            assert data["image"] == str(path)
            assert labels_of(tmp_path / "out", name).shape == read_image(path).shape[:2]

    def test_the_longest_name_that_a_disk_takes(self, network, tmp_path):
        path = save(tmp_path / f"{'x' * (255 - max(map(len, OUTPUTS)))}.jpg", noise(32, 64))
        assert not run(network, [path], tmp_path / "out").skipped
        assert len(list((tmp_path / "out").iterdir())) == len(OUTPUTS)

    def test_running_again_replaces_the_results(self, network, tmp_path):
        path = save(tmp_path / "a.png", noise(32, 64))
        run(network, [path], tmp_path / "out")
        save(path, noise(40, 64))
        run(network, [path], tmp_path / "out")
        assert labels_of(tmp_path / "out", "a").shape == (40, 64)
        assert len(list((tmp_path / "out").iterdir())) == len(OUTPUTS)

    @pytest.mark.parametrize("kind", ["a file", "below a file", "read only"])
    def test_an_output_that_cannot_be_written_is_refused_before_any_work(self, network, tmp_path, kind):
        path = save(tmp_path / "a.png", noise(32, 64))
        output = {"a file": path, "below a file": path / "out", "read only": tmp_path / "locked"}[kind]
        if kind == "read only":
            output.mkdir(mode=0o555)
            if os.access(output, os.W_OK):
                pytest.skip("this user may write into read-only folders")
        before = path.read_bytes()
        forwards = []
        with pytest.raises(ValueError, match=f"cannot write into {output}.*--output"):
            predict_files(TorchNetwork(forwards.append, network), [path], output)
        assert not forwards and path.read_bytes() == before

    def test_an_image_is_never_overwritten_by_a_result(self, network, tmp_path):
        paths = [save(tmp_path / "x.png", noise(32, 64)), save(tmp_path / "x_labels.png", noise(32, 64))]
        before = paths[1].read_bytes()
        with pytest.raises(ValueError, match="x_labels.png is itself an input.*--output"):
            run(network, paths, tmp_path)
        assert paths[1].read_bytes() == before and len(list(tmp_path.iterdir())) == 2
        assert len(run(network, paths[:1], tmp_path).predictions) == 1, "the same folder will do"

    def test_a_disk_that_fills_up_leaves_no_half_file(self, network, tmp_path, monkeypatch):
        paths = [save(tmp_path / f"{name}.png", noise(32, 64)) for name in "ab"]
        write, begun = Path.write_bytes, []

        def fill(path, data):
            begun.append(path)
            if len(begun) != len(OUTPUTS) + 2:  # the labels of b are written, its overlay is not
                return write(path, data)
            write(path, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", fill)
        with pytest.raises(ValueError, match="cannot write into .*: No space left on device"):
            run(network, paths, tmp_path / "out")
        names = {p.name for p in (tmp_path / "out").iterdir()}
        assert {f"a{end}" for end in OUTPUTS} <= names
        assert {name for name in names if name.startswith("b_")} == {"b_labels.png"}
        assert not any(name.endswith(".tmp") for name in names)

    def test_the_network_stays_in_its_mode_and_is_run_in_eval_mode(self, network, tmp_path):
        path = save(tmp_path / "a.png", noise(64, 64))
        run(network, [path], tmp_path / "eval")
        network.train()
        statistics = {key: value.clone() for key, value in network.state_dict().items()}
        run(network, [path], tmp_path / "train")
        assert network.training
        assert all(torch.equal(value, statistics[key]) for key, value in network.state_dict().items())
        assert np.array_equal(labels_of(tmp_path / "eval", "a"), labels_of(tmp_path / "train", "a"))

    @pytest.mark.parametrize("pictures", [True, False])
    @pytest.mark.parametrize("part", ["stem", "gate", "decoder"])
    def test_a_network_that_diverged_is_named_and_nothing_is_written(self, network, tmp_path, part, pictures):
        path = save(tmp_path / "a.png", noise(64, 64))
        broken = {
            "stem": network.stem[0][0],
            "gate": network.node(0, 0).gate.score,
            "decoder": network.decoder.predictor,
        }
        with torch.no_grad():
            broken[part].weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaN"):
            run(network, [path], tmp_path / "out", pictures=pictures)
        assert not list((tmp_path / "out").iterdir())


class TestSkips:
    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
            MemoryError(),
            cv2.error("OpenCV(4) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 9 bytes"),
        ],
    )
    def test_an_image_too_large_for_the_memory_is_skipped(self, network, tmp_path, error):
        def forward(images):
            if images.shape[-1] > 64:
                raise error
            return network(images)

        paths = [save(tmp_path / "a.png", noise(32, 96)), save(tmp_path / "b.png", noise(32, 64))]
        summary = predict_files(TorchNetwork(forward, network), paths, tmp_path / "out")
        assert summary.skipped == (Skip(paths[0], "a", f"{paths[0]} is too large for the memory"),)
        assert [p.name for p in summary.predictions] == ["b"]

    def test_many_skips_are_counted_and_the_first_are_named(self, network, tmp_path):
        paths = [tmp_path / f"{number:02d}.png" for number in range(30)]
        for path in paths:
            path.write_text("no image")
        table = run(network, paths, tmp_path / "out").table()
        assert "19.png" in table and "20.png" not in table and table.endswith("and 10 more")
