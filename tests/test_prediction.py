"""Files in; label maps, overlays and routes out."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import run as run_command
from conftest import scenes_checkpoint
from pictures import ORIENTATION_TAG, ROTATED_RIGHT, noise, save
from routeseg import DynamicRoutingNetwork, SkipEngine, load
from routeseg.cost.macs import model_cost
from routeseg.data.pairs import read_image, read_label_file
from routeseg.data.transforms import PADDING_RGB
from routeseg.description import fingerprint
from routeseg.prediction.files import LABELS, OUTPUTS, OVERLAY, Skip, predict_files
from routeseg.prediction.sources import find_inputs, output_names
from routeseg.prediction.torch_runner import TorchNetwork
from routeseg.space import DIRECTIONS, Route

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def network(tiny_network):
    """Classes that win in different places, so that a label map is no single colour."""
    with torch.no_grad():
        tiny_network.decoder.predictor.weight.mul_(30)
    return tiny_network


def run(network, paths, output, **options):
    return predict_files(TorchNetwork(network, network), paths, output, **options)


def labels_of(output: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(output / f"{name}_labels.png"))


class TestFindInputs:
    @pytest.fixture(autouse=True)
    def _files(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        images = ["b.png", "a.JPG", "c.webp", "f.jp2", "sub/d.tiff", "sub/deep/e.bmp"]
        for name in (*images, "notes.txt", ".hidden.png"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (tmp_path / "empty").mkdir()
        (tmp_path / "folder.png").mkdir()

    def found(self, *inputs: str) -> list[str]:
        return [path.as_posix() for path in find_inputs(inputs)]

    def test_files_keep_their_order(self):
        assert self.found("c.webp", "a.JPG") == ["c.webp", "a.JPG"]

    def test_a_named_file_may_have_any_suffix(self):
        assert self.found("notes.txt") == ["notes.txt"]

    def test_a_folder_gives_its_images_sorted_and_not_its_subfolders(self):
        assert self.found(".") == ["a.JPG", "b.png", "c.webp"]
        assert self.found("sub/") == ["sub/d.tiff"]

    def test_globs(self):
        assert self.found("*") == ["a.JPG", "b.png", "c.webp"]
        assert self.found("**/*.bmp") == ["sub/deep/e.bmp"]
        assert self.found("sub/**") == ["sub/d.tiff", "sub/deep/e.bmp"]
        assert self.found("[bc].*") == ["b.png", "c.webp"]

    def test_a_glob_that_names_a_suffix_may_name_any(self):
        assert self.found("*.jp2") == ["f.jp2"]

    def test_a_file_whose_name_looks_like_a_glob(self, tmp_path):
        (tmp_path / "x[1].png").touch()
        assert self.found("x[1].png") == ["x[1].png"]

    def test_each_file_once_at_its_first_place(self, tmp_path):
        assert self.found("b.png", ".", "./b.png", str(tmp_path / "a.JPG")) == ["b.png", "a.JPG", "c.webp"]

    def test_a_home_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert find_inputs(["~/b.png"]) == [tmp_path / "b.png"]

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ("missing.png", "no file or folder missing.png"),
            ("empty", "the folder empty holds no images"),
            ("*.gif", r"\*\.gif matches 0 files"),
            ("notes*", r"notes\* matches 1 files, and no image"),
            ("", "an input is empty"),
        ],
    )
    def test_an_input_that_gives_nothing_is_named(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            find_inputs(["b.png", wrong])

    def test_no_input_at_all(self):
        with pytest.raises(ValueError, match="no images given"):
            find_inputs([])


class TestOutputNames:
    @pytest.mark.parametrize(
        ("paths", "names"),
        [
            (["a/x.png", "y.jpg"], ["x", "y"]),
            (["x.png", "x.jpg", "y.png"], ["x.png", "x.jpg", "y"]),
            (["a/x.png", "b/x.png", "b/x.jpg"], ["x.png", "x.png-2", "x.jpg"]),
            (["x.png", "X.png"], ["x.png", "X.png-2"]),
            (["x.png", "x.jpg", "x.png.tif"], ["x.png", "x.jpg", "x.png-2"]),
            (["x.png-2.tif", "a/x.png", "b/x.png"], ["x.png-2", "x.png", "x.png-3"]),
        ],
    )
    def test_no_two_are_the_same(self, paths, names):
        assert output_names(map(Path, paths)) == names


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


class TestUrls:
    """Inputs and outputs in stores that are no disk: memory, and a web server."""

    @pytest.fixture
    def store(self):
        """A bucket of its own in memory."""
        files = fsspec.filesystem("memory")
        files.rm("/bucket", recursive=True) if files.exists("/bucket") else None
        for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png", "sub/c.png", "d.jp2"):
            files.pipe_file(f"/bucket/{name}", b"")
        return files

    def test_files_folders_and_globs(self, store):
        assert find_inputs(["memory://bucket/b.png"]) == ["memory://bucket/b.png"]
        assert find_inputs(["memory://bucket/notes.txt"]) == ["memory://bucket/notes.txt"]
        assert find_inputs(["memory://bucket"]) == ["memory://bucket/a.JPG", "memory://bucket/b.png"]
        assert find_inputs(["memory://bucket/"]) == find_inputs(["memory://bucket"])
        assert find_inputs(["memory://bucket/*"]) == find_inputs(["memory://bucket"])
        assert find_inputs(["memory://bucket/*.jp2"]) == ["memory://bucket/d.jp2"]
        assert find_inputs(["memory://bucket/**"])[-1] == "memory://bucket/sub/c.png"

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ("memory://nowhere/", "nothing at memory://nowhere/"),
            ("memory://bucket/*.gif", r"\*\.gif matches 0 files"),
            ("memory://bucket/notes*", r"notes\* matches 1 files, and no image"),
            ("nonsense://x/*.png", "cannot open nonsense://x/.*nonsense"),
            ("s3://bucket/*.png", "cannot open s3://bucket/.*s3fs"),
        ],
    )
    def test_one_that_gives_nothing_is_named(self, store, monkeypatch, wrong, message):
        monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
        with pytest.raises(ValueError, match=message):
            find_inputs([wrong])

    def test_a_file_url_is_a_path(self, tmp_path):
        path = save(tmp_path / "a.png", noise(8, 8))
        assert find_inputs([f"file://{path}", str(path), f"file://{tmp_path}/*.png"]) == [path]

    def test_names_come_from_the_last_part(self):
        urls = ["https://x.org/a/street%201.png?size=2&b=c/d", "s3://bucket/b/x.png", "memory://c/x.png", Path("y.png")]
        assert output_names(urls) == ["street 1", "x.png", "x.png-2", "y"]

    def test_from_memory_to_memory_and_resumed(self, network, store, tmp_path):
        images = [noise(32, 64, seed) for seed in range(2)]
        for image, name in zip(images, "ab", strict=True):
            store.pipe_file(f"/bucket/in/{name}.png", save(tmp_path / f"{name}.png", image).read_bytes())
        urls = find_inputs(["memory://bucket/in/*.png"])
        summary = run(network, urls, "memory://bucket/out")
        assert [p.name for p in summary.predictions] == ["a", "b"] and summary.output == "memory://bucket/out"
        run(network, [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out")
        names = sorted(Path(name).name for name in store.ls("/bucket/out", detail=False))
        assert names == sorted(f"{name}{end}" for name in "ab" for end in OUTPUTS)
        for name in names:
            remote, local = store.cat_file(f"/bucket/out/{name}"), (tmp_path / "out" / name).read_bytes()
            if name.endswith(".json"):
                assert json.loads(remote) | {"image": ""} == json.loads(local) | {"image": ""}
            else:
                assert remote == local
        store.rm_file("/bucket/out/b_route.json")
        before = store.modified("/bucket/out/a_labels.png")
        again = run(network, urls, "memory://bucket/out", resume=True)
        assert again.resumed == 1 and again.predictions == summary.predictions
        assert store.modified("/bucket/out/a_labels.png") == before
        assert store.exists("/bucket/out/b_route.json")

    def test_names_with_the_signs_of_a_glob_are_resumed(self, network, store, tmp_path):
        paths = [save(tmp_path / f"{name}.png", noise(32, 64, k)) for k, name in enumerate(("a[1]", "a1", "b*", "[c"))]
        run(network, paths[:3], "memory://bucket/out", pictures=False)
        again = run(network, paths, "memory://bucket/out", resume=True, pictures=False)
        assert again.resumed == 3 and [p.image for p in again.predictions] == paths

    def test_an_image_is_never_overwritten_by_a_result(self, network, store):
        urls = ["memory://bucket/x.png", "memory://bucket/x_labels.png"]
        with pytest.raises(ValueError, match="x_labels.png is itself an input"):
            run(network, urls, "memory://bucket")

    def test_a_store_that_takes_nothing_is_named(self, network, tmp_path, monkeypatch, store):
        def refuse(self, path, data, **_):
            raise PermissionError("AccessDenied: you may not put objects here")

        monkeypatch.setattr(type(store), "pipe_file", refuse)
        path = save(tmp_path / "a.png", noise(32, 64))
        with pytest.raises(ValueError, match="cannot write into memory://bucket/out: AccessDenied.*--output"):
            run(network, [path], "memory://bucket/out")

    def test_a_store_with_folders(self, network, tmp_path):
        """`dir::` is a store of its own, in which a folder must be made."""
        path = save(tmp_path / "a.png", noise(32, 64))
        (tmp_path / "root").mkdir()
        run(network, [path], f"dir://out::file://{tmp_path}/root")
        assert {p.name for p in (tmp_path / "root" / "out").iterdir()} == {f"a{end}" for end in OUTPUTS}

    def test_a_web_server(self, network, tmp_path, web_server):
        save(tmp_path / "in" / "a.png", noise(32, 64))
        save(tmp_path / "in" / "b.png", noise(32, 64, 1))
        (tmp_path / "in" / "c.png").write_bytes(b"no image")
        address = web_server(tmp_path / "in")
        urls = find_inputs([f"{address}/*.png"])
        assert urls == [f"{address}/{name}.png" for name in "abc"] == find_inputs([f"{address}/"])
        summary = run(network, [*urls, f"{address}/gone.png"], tmp_path / "out")
        assert [p.image for p in summary.predictions] == urls[:2]
        assert [skip.image for skip in summary.skipped] == [urls[2], f"{address}/gone.png"]
        assert "no image" in summary.skipped[0].reason and "0x" not in summary.skipped[0].reason
        run(network, [tmp_path / "in" / "a.png"], tmp_path / "local")
        for end in (LABELS, OVERLAY):
            assert (tmp_path / "out" / f"a{end}").read_bytes() == (tmp_path / "local" / f"a{end}").read_bytes()

    def test_a_web_server_that_is_gone(self, network, tmp_path):
        summary = run(network, ["http://127.0.0.1:9/a.png"], tmp_path / "out")
        assert "cannot read http://127.0.0.1:9/a.png" in summary.skipped[0].reason
        with pytest.raises(ValueError, match="cannot list http://127.0.0.1:9/"):
            find_inputs(["http://127.0.0.1:9/*.png"])


class TestLists:
    def test_a_list_holds_what_the_command_line_may(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("a.png", "in/b.png", "in/c.png"):
            save(tmp_path / name, noise(8, 8))
        Path("list.txt").write_text("# comment\n\n  in/c.png \r\nin\nhttps://x.org/y.png\n")
        expected = [Path("in/c.png"), Path("in/b.png"), "https://x.org/y.png"]
        assert find_inputs(["a.png", "@list.txt", "in/b.png"]) == [Path("a.png"), *expected]
        Path("list.txt").write_text("in\n", encoding="utf-8-sig")
        assert find_inputs(["@list.txt"]) == expected[1::-1]
        fsspec.filesystem("memory").pipe_file("/bucket/list.txt", b"a.png")
        assert find_inputs(["@memory://bucket/list.txt"]) == [Path("a.png")]

    def test_a_name_that_is_not_utf8(self, network, tmp_path):
        name = os.fsdecode(b"caf\xe9.png")
        try:
            save(tmp_path / name, noise(32, 64))
        except OSError:
            pytest.skip("this disk takes UTF-8 names only")
        (tmp_path / "list.txt").write_bytes(os.fsencode(tmp_path) + b"/caf\xe9.png\n")
        paths = find_inputs([f"@{tmp_path}/list.txt"])
        assert paths == [tmp_path / name]
        summary = run(network, paths, tmp_path / "out")
        assert {p.name for p in (tmp_path / "out").iterdir()} == {f"caf\ufffd{end}" for end in OUTPUTS}
        data = json.loads((tmp_path / "out" / "caf\ufffd_route.json").read_text())
        assert data["image"] == str(paths[0]) and summary.predictions[0].image == paths[0]
        assert run(network, paths, tmp_path / "out", resume=True).resumed == 1

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a.png\nmissing.png\n", r"list\.txt, line 2: no file or folder missing.png"),
            ("# nothing\n", "names no images"),
            ("@other.txt\n", "line 1: a list cannot name a list"),
        ],
    )
    def test_what_is_wrong_is_said_with_its_line(self, tmp_path, monkeypatch, text, message):
        monkeypatch.chdir(tmp_path)
        save(tmp_path / "a.png", noise(8, 8))
        Path("list.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            find_inputs(["@list.txt"])

    def test_no_list(self, tmp_path):
        with pytest.raises(ValueError, match="cannot read the list .*list.txt: No such file"):
            find_inputs([f"@{tmp_path}/list.txt"])


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


class TestCommand:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        return scenes_checkpoint(tmp_path / "net")

    def test_resume_and_lists(self, checkpoint, tmp_path, capsys):
        for seed, name in enumerate("ab"):
            save(tmp_path / "in" / f"{name}.png", noise(32, 64, seed))
        (tmp_path / "list.txt").write_text(f"{tmp_path}/in/*.png\n")
        words = ["predict", checkpoint, f"@{tmp_path}/list.txt", "--output", tmp_path / "out", "--pictures", "false"]
        code, out, err = run_command(words, capsys)
        assert code == 0 and not err and len(list((tmp_path / "out").iterdir())) == 4
        (tmp_path / "out" / "a_route.json").unlink()
        code, out, err = run_command([*words, "--resume"], capsys)
        assert code == 0 and "2 (1 of them from an earlier run)" in out
        other = scenes_checkpoint(tmp_path / "other", small_gate=True)
        code, out, err = run_command(["predict", other, *words[2:], "--resume"], capsys)
        assert code == 2 and "another network" in err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--engine", "fast"], "engine 'fast': choose"),
            (["--engine", "ray"], "engine 'ray': choose"),
            (["--output", "nonsense://x"], "cannot open nonsense://x"),
            (["--device", "cuda:99"], "--device cuda:99"),
        ],
    )
    def test_wrong_options(self, checkpoint, tmp_path, capsys, words, message):
        path = save(tmp_path / "a.png", noise(32, 64))
        code, _, err = run_command(["predict", checkpoint, path, "--output", tmp_path / "out", *words], capsys)
        assert code == 2 and message in err
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
