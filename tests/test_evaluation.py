"""Evaluation: several passes over an image, boundary IoU, official outputs and the official Cityscapes script."""

import base64
import json
import shutil
import sys
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from conftest import run, spread_gates
from routeseg import DynamicRoutingNetwork, SkipEngine, load
from routeseg.app.explorer import Explorer
from routeseg.cost.macs import model_cost
from routeseg.data import scenes
from routeseg.data.config import DataConfig, open_data
from routeseg.data.loaders import evaluation_loader
from routeseg.engine import skip
from routeseg.engine.compiled import is_compiled
from routeseg.evaluation import evaluate, machine_facts
from routeseg.evaluation.boundary import boundary_counts
from routeseg.evaluation.ranking import Ranking
from routeseg.evaluation.submission import Submission
from routeseg.evaluation.test_time import MultiPass
from routeseg.labels import IGNORE
from routeseg.model import Segmentation

GATES = torch.zeros(1, 5, 4, 3)


def picture(height, width, seed=0):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def pixel_by_pixel(images):
    """A linear function of each pixel alone."""
    return Segmentation(torch.einsum("kc,bchw->bkhw", torch.linspace(-3, 4, 15).view(5, 3), images), GATES)


def left_to_right(images):
    """A function that no mirroring leaves as it is: its second class looks at the pixel to the left."""
    return Segmentation(torch.cat((images[:, :1], images[:, 1:2].roll(1, dims=-1) * 2), dim=1), GATES)


class Watched:
    """A forward that notes the images that it was given."""

    def __init__(self, forward=pixel_by_pixel):
        self.forward, self.seen = forward, []

    def __call__(self, images):
        self.seen += list(images)
        result = self.forward(images)
        return Segmentation(result.logits, result.gates.expand(len(images), *result.gates.shape[1:]))


# --- several passes ---


@pytest.mark.parametrize("options", [{}, {"scales": [1.0]}, {"window": (50, 70)}, {"window": (64, 4096)}])
def test_one_whole_pass_is_the_forward_itself(tiny_network, options):
    image = (picture(50, 70) * 255).to(torch.uint8)
    for forward in (tiny_network, SkipEngine(tiny_network)):
        plain, result = forward(image), MultiPass(forward, **options)(image)
        assert torch.equal(result.scores, plain.logits)
        assert torch.equal(result.labels, plain.labels)
        assert torch.equal(result.gates, plain.gates[0]) and result.count == 1


def test_mirroring_does_nothing_to_a_symmetric_function():
    def blur(images):
        logits = F.avg_pool2d(F.pad(images * 5, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
        return Segmentation(logits, GATES)

    image = picture(40, 57)
    result = MultiPass(blur, flip=True)(image)
    expected = blur(image).logits.softmax(1)
    torch.testing.assert_close(result.scores, expected, atol=1e-6, rtol=0)
    assert result.count == 2
    mirrored = left_to_right(image.flip(-1)).logits.softmax(1).flip(-1)
    both = (left_to_right(image).logits.softmax(1) + mirrored) / 2
    found = MultiPass(left_to_right, flip=True)(image).scores
    torch.testing.assert_close(found, both, atol=1e-6, rtol=0)
    assert (found - left_to_right(image).logits.softmax(1)).abs().max() > 0.01


@pytest.mark.parametrize("size", [(64, 64), (100, 140), (33, 300), (97, 40)])
@pytest.mark.parametrize("overlap", [0.0, 0.33, 0.75])
def test_windows_of_a_function_of_single_pixels_give_the_whole(size, overlap):
    image = picture(*size)
    expected = pixel_by_pixel(image)
    result = MultiPass(pixel_by_pixel, window=(48, 64), overlap=overlap)(image)
    torch.testing.assert_close(result.scores, expected.logits.softmax(1), atol=1e-6, rtol=0)
    assert torch.equal(result.labels, expected.labels)


@pytest.mark.parametrize("size", [(48, 64), (49, 65), (150, 150), (32, 200), (200, 33)])
@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.5, 0.9])
def test_windows_cover_every_pixel_and_overlap_as_asked(size, overlap):
    height, width = size
    places = torch.arange(height * width, dtype=torch.float64).view(1, 1, height, width).expand(1, 3, -1, -1)
    forward = Watched(lambda images: Segmentation(torch.zeros(images.shape), GATES))
    MultiPass(forward, window=(48, 64), overlap=overlap)(places)
    h, w = min(48, height), min(64, width)
    assert all(view.shape[1:] == (h, w) for view in forward.seen)
    seen = torch.cat([view[0].flatten() for view in forward.seen])
    assert torch.equal(seen.unique(), places[0, 0].flatten())
    corners = [divmod(int(view[0, 0, 0]), width) for view in forward.seen]
    for starts, side, window in (
        (sorted({top for top, _ in corners}), height, h),
        (sorted({left for _, left in corners}), width, w),
    ):
        assert starts[0] == 0 and starts[-1] == side - window
        assert all(window - (b - a) >= overlap * window - 1e-9 for a, b in zip(starts, starts[1:], strict=False))
    assert len(corners) == len(set(corners))


def test_everything_at_once_by_a_plain_loop():
    """Scales, windows inside each scale, and flips, computed again without the code under test."""
    image = (picture(80, 110) * 255).to(torch.uint8)
    sums = torch.zeros(1, 2, 80, 110)
    for factor in (0.5, 1.0, 1.5):
        size = (round(80 * factor), round(110 * factor))
        scaled = F.interpolate(image.float() / 255, size, mode="bilinear", align_corners=False)
        scaled = image if factor == 1 else scaled
        h, w = min(48, size[0]), min(48, size[1])
        tops, lefts = ([*range(0, side - part, 24), side - part] for side, part in zip(size, (h, w), strict=True))
        total, count = torch.zeros(1, 2, *size), torch.zeros(1, 1, *size)
        for top, left in product(tops, lefts):
            crop = scaled[..., top : top + h, left : left + w]
            straight = left_to_right(crop).logits.float().softmax(1)
            mirrored = left_to_right(crop.flip(-1)).logits.float().softmax(1).flip(-1)
            total[..., top : top + h, left : left + w] += straight + mirrored
            count[..., top : top + h, left : left + w] += 2
        sums += F.interpolate(total / count, (80, 110), mode="bilinear", align_corners=False)
    found = MultiPass(left_to_right, [0.5, 1.0, 1.5], flip=True, window=(48, 48), overlap=0.5)(image)
    torch.testing.assert_close(found.scores, sums / 3, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.scores.sum(1), torch.ones(1, 80, 110), atol=1e-5, rtol=0)


def test_views_in_batches_give_what_they_give_alone(tiny_network):
    image = picture(70, 90)
    options = {"scales": [0.75, 1.25], "flip": True, "window": (48, 64)}
    engine = SkipEngine(tiny_network)
    alone = MultiPass(engine, **options)(image)
    for batch in (3, 100):
        watched = Watched(engine)
        together = MultiPass(watched, **options, batch=batch)(image)
        torch.testing.assert_close(together.scores, alone.scores, atol=1e-6, rtol=0)
        assert together.count == alone.count == len(watched.seen)
        for one, expected in zip(together.passes, alone.passes, strict=True):
            assert one.size == expected.size
            torch.testing.assert_close(one.gates, expected.gates, atol=1e-6, rtol=0)


def test_the_cost_of_several_passes_is_their_sum(tiny_network):
    image = picture(70, 90)
    options = {"scales": [0.75, 1.0], "flip": True, "window": (48, 64), "overlap": 0.5}
    watched = Watched(tiny_network)
    example = {"image": image, "labels": torch.zeros(1, 70, 90, dtype=torch.int64), "name": "a", "skipped": 0}
    result = evaluate(tiny_network, [example], MultiPass(watched, **options))
    real = full = 0.0
    gates = []
    for view in watched.seen:
        table = model_cost(tiny_network, tuple(view.shape[1:]))
        with torch.no_grad():
            gates.append(tiny_network(view[None]).gates)
        real += float(table.of_gates(gates[-1])[0])
        full += table.full
    assert len(watched.seen) == result.passes[0] > 10
    assert len({tuple(view.shape) for view in watched.seen}) == 1  # 52x68 and 70x90 hold windows of 48x64
    assert result.cost_macs == pytest.approx([real]) and result.full_macs == pytest.approx([full])
    assert 0 < real < full
    np.testing.assert_allclose(result.gates[0], torch.cat(gates).mean(0).numpy(), atol=1e-6)
    scaled = evaluate(tiny_network, [example], MultiPass(tiny_network, [0.5, 1.0]))
    assert scaled.full_macs[0] == sum(model_cost(tiny_network, size).full for size in ((35, 45), (70, 90)))
    rounded = MultiPass(tiny_network, [0.55, 1.0])(image).passes  # 38.5 x 49.5
    assert [one.size for one in rounded] == [(38, 50), (70, 90)]
    plain = evaluate(tiny_network, [example])
    assert plain.cost_macs[0] == model_cost(tiny_network, (70, 90)).of_gates(tiny_network(image).gates)[0]


def test_settings_that_make_no_sense():
    image = picture(64, 64)
    for options, expected in (
        ({"scales": []}, "above 0"),
        ({"scales": [1.0, -0.5]}, "above 0"),
        ({"scales": [float("nan")]}, "above 0"),
        ({"scales": [1e9]}, "up to 16"),
        ({"scales": [0.5, 0.5]}, "once"),
        ({"scales": [0.3]}, "64x64 19x19"),
        ({"window": (31, 64)}, "31x64"),
        ({"overlap": 1.0}, "below 1"),
        ({"overlap": -0.1}, "below 1"),
        ({"batch": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=expected):
            MultiPass(pixel_by_pixel, **options)(image)
    with pytest.raises(ValueError, match="one image"):
        MultiPass(pixel_by_pixel)(torch.rand(2, 3, 64, 64))


# --- boundary IoU ---


def slow_boundary_counts(truth, prediction, classes, width):
    """Boundary IoU's counts from its definition, pixel by pixel and class by class."""
    height, wide = truth.shape
    distance = max(1, round(width * (height**2 + wide**2) ** 0.5))
    found = np.zeros((2, classes), dtype=int)
    for k in range(classes):
        bands = []
        for labels in (truth, prediction):
            mask = (labels == k) & (truth != IGNORE)
            band = set()
            for y, x in zip(*np.nonzero(mask), strict=True):
                around = product(range(y - distance, y + distance + 1), range(x - distance, x + distance + 1))
                if not all(0 <= v < height and 0 <= u < wide and mask[v, u] for v, u in around):
                    band.add((y, x))
            bands.append(band)
        found[:, k] = len(bands[0] & bands[1]), len(bands[0] | bands[1])
    return found


def blobs(rng, size, classes):
    """A label map of a few large patches."""
    coarse = rng.integers(0, classes, (4, 5)).astype(np.uint8)
    return np.array(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.NEAREST))


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_boundary_counts_by_the_definition(width, seed):
    rng = np.random.default_rng(seed)
    truth, prediction = (blobs(rng, (26, 37), 4) for _ in range(2))
    prediction = np.where(rng.random(truth.shape) < 0.8, truth, prediction)
    truth[3:9, 10:20] = IGNORE
    truth[:, 36] = IGNORE
    expected = slow_boundary_counts(truth, prediction, 6, width)  # classes 4 and 5 never occur
    found = boundary_counts(truth.astype(np.int64), prediction, 6, width)
    assert (found == expected).all() and found[1, :4].all() and not found[:, 4:].any()


def test_boundary_iou_sees_contours_and_nothing_else():
    """A square of 60 pixels, predicted one pixel too large, at a distance of 2."""
    truth = np.zeros((100, 100), dtype=np.uint8)
    truth[20:80, 20:80] = 1
    prediction = np.zeros_like(truth)
    prediction[19:81, 19:81] = 1
    intersection, union = boundary_counts(truth, prediction, 2, 2 / np.hypot(100, 100))
    ring = 60**2 - 56**2, 62**2 - 58**2
    both = 60**2 - 58**2
    assert intersection[1] == both and union[1] == sum(ring) - both
    perfect = boundary_counts(truth, truth, 2, 0.02)
    assert (perfect[0] == perfect[1]).all() and (perfect > 0).all()
    hidden = np.where(np.abs(truth.astype(int) - prediction), IGNORE, truth)  # the one wrong ring is not judged
    right = boundary_counts(hidden, prediction, 2, 0.02)
    assert (right[0] == right[1]).all() and (right > 0).all()
    nothing = boundary_counts(np.full((40, 40), IGNORE), np.zeros((40, 40)), 2, 0.02)
    assert not nothing.any()


def test_evaluation_sums_boundaries_over_the_set(tiny_network):
    rng = np.random.default_rng(0)
    examples = []
    for index, size in enumerate(((40, 60), (64, 50))):
        labels = torch.from_numpy(blobs(rng, size, 4).astype(np.int64))[None]
        examples.append({"image": picture(*size, seed=index), "labels": labels, "name": str(index), "skipped": 0})
    predicted = {}
    result = evaluate(tiny_network, examples, boundary_width=0.05, on_prediction=predicted.__setitem__)
    counts = np.zeros((2, 5), dtype=int)
    for example in examples:
        labels = predicted[example["name"]]
        assert labels.dtype == np.uint8 and (labels == tiny_network(example["image"]).labels[0].numpy()).all()
        counts += slow_boundary_counts(example["labels"][0].numpy(), labels, 5, 0.05)
    assert (result.boundary == counts).all()
    expected = [i / u if u else np.nan for i, u in counts.T]
    np.testing.assert_array_equal(result.boundary_iou, expected)
    assert result.boundary_miou == pytest.approx(np.nanmean(expected))
    words = result.as_dict()
    assert words["boundary_miou"] == result.boundary_miou and len(words["boundary_iou"]) == 5
    assert "boundary_miou" not in evaluate(tiny_network, examples).as_dict()


def test_a_class_that_labels_lack_is_no_part_of_any_mean(tiny_network):
    """Nor is it if the network predicts it; the baseline is over the same classes."""
    labels = torch.zeros(1, 32, 40, dtype=torch.int64)
    labels[:, 16:] = 1
    example = {"image": picture(32, 40), "labels": labels, "name": "a", "skipped": 0}
    found = labels.clone()
    found[:, :, 20:] = 3  # no label has it; half of each class is lost to it

    def forward(images):
        return Segmentation(F.one_hot(found, 5).permute(0, 3, 1, 2).float(), tiny_network(images).gates)

    result = evaluate(tiny_network, [example], forward, boundary_width=0.05)
    np.testing.assert_array_equal(result.iou, [0.5, 0.5, np.nan, np.nan, np.nan])
    assert result.miou == 0.5 and result.majority_miou == 0.25
    assert result.as_dict()["iou"]["class 3"] is None
    np.testing.assert_array_equal(np.isnan(result.boundary_iou), np.isnan(result.iou))
    found[:] = 0
    assert evaluate(tiny_network, [example], forward).miou == result.majority_miou


# --- the command, and official outputs ---


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """networks(classes) -> a saved network of that many classes, with spread gates."""

    def checkpoint(classes, **options):
        torch.manual_seed(0)
        model = DynamicRoutingNetwork(num_classes=classes, depth=3, base_channels=8, stem_channels=8, **options)
        return spread_gates(model).save(tmp_path_factory.mktemp("networks") / str(classes))

    return checkpoint


SCENES = ["--data.image_size=[48,64]", "--data.val_images=2", "--data.workers=0"]


def test_command_with_scales_flip_and_windows(tmp_path, networks, capsys):
    file = tmp_path / "a.json"
    words = ["evaluate", networks(10), *SCENES, "--json", file]
    several = ["--scales", "[1,1.5]", "--flip=true", "--window=48x48", "--overlap=0.5", "--window_batch=4"]
    code, out, _ = run([*words, *several], capsys)
    assert code == 0 and "boundary mIoU" in out and "passes over an image" in out
    result = json.loads(file.read_text())
    assert result["passes_per_image"] == 2 * (1 * 2 + 2 * 3)  # flips x (windows at 48x64 and at 72x96)
    assert result["scales"] == [1.0, 1.5] and result["flip"] is True and result["window"] == "48x48"
    assert set(result["boundary_iou"]) == set(result["iou"])
    code, out, _ = run([*words, "--boundary_width=0"], capsys)
    plain = json.loads(file.read_text())
    assert code == 0 and "boundary mIoU" not in out and "boundary_miou" not in plain and "passes over" not in out
    assert plain["cost_gmacs"]["full"] < result["cost_gmacs"]["full"]


def test_the_worst_pictures(tmp_path, networks, capsys):
    """The lowest mean IoU over the classes of the labels comes first, the best are others, and an image is drawn."""
    pictures = open_data(DataConfig(image_size=(48, 64), val_images=4), "val")
    ranking, generator = Ranking(pictures, worst=2, best=3), np.random.default_rng(0)
    scores = {}
    for index in range(4):
        labels = pictures.read(index)[1]
        prediction = np.where(generator.random(labels.shape) < 0.2 * index, 0, labels).astype(np.uint8)
        classes = np.unique(labels)
        overlaps = [
            ((labels == k) & (prediction == k)).sum() / ((labels == k) | (prediction == k)).sum() for k in classes
        ]
        scores[pictures.name(index)] = np.mean(overlaps)
        ranking(pictures.name(index), prediction)
    ranking.gather()  # of one process: nothing changes
    names = sorted(scores, key=scores.get)
    assert [one.name for one in ranking.worst] == names[:2] and [one.name for one in ranking.best] == names[:1:-1]
    assert [one.score for one in ranking.worst] == pytest.approx(sorted(scores.values())[:2])
    image, labels = ranking.read(ranking.best[0])
    assert image.shape == (*labels.shape, 3) and labels.shape == ranking.best[0].prediction.shape
    path = tmp_path / "worst.png"
    code, out, _ = run(["evaluate", networks(10), *SCENES, "--worst", path], capsys)
    assert code == 0 and str(path) in out and Image.open(path).width > 1000


def test_command_mistakes(tmp_path, networks, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    checkpoint = networks(10)
    for words, expected in (
        (["--scales=[0]"], "above 0"),
        (["--scales=[0.1]"], "leave the scale out"),
        (["--scales=big"], "scales"),
        (["--window=31x64"], "--window is '31x64'"),
        (["--window=768"], "HEIGHTxWIDTH"),
        (["--overlap=1"], "below 1"),
        (["--window_batch=0"], "at least 1"),
        (["--boundary_width=-0.1"], "--boundary_width is -0.1"),
        (["--device=foo"], "--device foo"),
        (["--device=meta"], "--device meta"),
        (["--submission", tmp_path / "s"], "cityscapes and voc"),
        (["--worst=worst.jpg"], "--worst is worst.jpg"),
    ):
        code, _, err = run(["evaluate", checkpoint, *SCENES, *words], capsys)
        assert code == 2 and expected in err, (words, err)
    assert not (tmp_path / "s").exists()

    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")

    monkeypatch.setattr(MultiPass, "__call__", too_large)
    code, _, err = run(["evaluate", checkpoint, *SCENES], capsys)
    assert code == 2 and "--window 768x768" in err


def test_no_clock_decides_on_a_result(tmp_path, networks, capsys, monkeypatch):
    """All compute in float32, say so, and measure nothing; unless they are asked for something else."""
    checkpoint = networks(len(scenes.CLASSES), gate="fixed", route="diagonal", exits=[1, 2])
    photo, file = tmp_path / "a.png", tmp_path / "a.json"
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(photo)
    monkeypatch.setattr(skip, "_faster", lambda *_: pytest.fail("the machine is asked what is faster"))
    results = []
    for words in (
        ["evaluate", checkpoint, *SCENES, "--json", file],
        ["routes", checkpoint, *SCENES, "--output", tmp_path / "routes"],
        ["profile", checkpoint, "--size=64x64", "--repeats=1", "--json", file],
        ["predict", checkpoint, photo, "--output", tmp_path / "out"],
    ):
        code, out, err = run(words, capsys)
        assert code == 0, err
        written = (
            file
            if "--json" in words
            else tmp_path / ("routes/routes.json" if "routes" in words else "out/a_route.json")
        )
        results.append(json.loads(written.read_text())["precision"])
    model = load(checkpoint)
    results += [model.predict(photo).precision, model(photo).precision, SkipEngine(model).precision]
    explorer = Explorer(model, "x")
    picture = explorer.open({"file": base64.b64encode(photo.read_bytes()).decode()})["picture"]
    results.append(explorer.look({"picture": picture})["precision"])
    assert results == ["float32"] * 8 and explorer.about()["precisions"][0] == "float32"
    code, out, _ = run(["evaluate", checkpoint, *SCENES, "--precision=bfloat16", "--json", file], capsys)
    asked = json.loads(file.read_text())["precision"]
    assert code == 0 and asked == ("bfloat16" if is_compiled(torch.bfloat16) else "float32") and asked in out


OFFICIAL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def cityscapes(layouts):
    return ["--data.name=cityscapes", f"--data.root={layouts('cityscapes')}", "--data.workers=0"]


def test_cityscapes_submission(tmp_path, layouts, networks, capsys):
    """Every image of the test split, original ids, and no score where there are no labels."""
    checkpoint, folder, file = networks(19), tmp_path / "sub", tmp_path / "a.json"
    words = ["evaluate", checkpoint, *cityscapes(layouts), "--split=test", "--submission", folder, "--json", file]
    code, out, _ = run(words, capsys)
    assert code == 0 and "no labels in this split" in out and "mIoU" not in out and "GMACs" in out
    result = json.loads(file.read_text())
    assert result["miou"] is None and result["boundary_miou"] is None and result["pixel_accuracy"] is None
    pictures = open_data(DataConfig(name="cityscapes", root=str(layouts("cityscapes"))), "test")
    assert len(pictures) > 0
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(f"{pictures.name(i)}_pred.png" for i in range(len(pictures)))
    model = DynamicRoutingNetwork.from_pretrained(checkpoint)
    image, _ = pictures.read(0)
    labels = SkipEngine(model)(torch.from_numpy(image.transpose(2, 0, 1).copy())[None]).labels[0]
    with Image.open(folder / f"{pictures.name(0)}_pred.png") as stored:
        assert stored.mode == "L" and (np.asarray(stored) == np.array(OFFICIAL_IDS)[labels]).all()

    (folder / "stranger.png").write_bytes(b"mine")
    (folder / f"{pictures.name(0)}_pred.png").write_bytes(b"old")
    code, _, err = run(words, capsys)
    assert code == 0 and "other PNGs lie there, 1 of them" in err and "stranger.png" in err
    assert (folder / "stranger.png").read_bytes() == b"mine"
    assert Image.open(folder / f"{pictures.name(0)}_pred.png").size == (96, 48)

    (tmp_path / "blocked").write_text("")
    code, _, err = run([*words[:-3], tmp_path / "blocked"], capsys)
    assert code == 2 and "cannot write into" in err and "--submission" in err


def test_a_submission_that_lacks_a_picture_fails(tmp_path, layouts, networks, capsys):
    root = tmp_path / "copy"
    shutil.copytree(layouts("cityscapes"), root)
    broken = sorted((root / "leftImg8bit" / "val").rglob("*.png"))[0]
    broken.write_bytes(broken.read_bytes()[:100])
    words = ["--data.name=cityscapes", f"--data.root={root}", "--data.workers=0", "--submission", tmp_path / "sub"]
    code, out, err = run(["evaluate", networks(19), *words], capsys)
    assert code == 2 and "predictions written: 1," in out and "not complete" in err


def test_voc_submission(tmp_path, layouts, networks, capsys):
    words = ["evaluate", networks(21), "--data.name=voc", f"--data.root={layouts('voc')}", "--data.workers=0"]
    code, out, _ = run([*words, "--split=test", "--submission", tmp_path], capsys)
    assert code == 0 and "no labels in this split" in out
    pictures = open_data(DataConfig(name="voc", root=str(layouts("voc"))), "test")
    folder = tmp_path / "results" / "VOC2012" / "Segmentation" / "comp6_test_cls"
    assert {path.stem for path in folder.iterdir()} == {pictures.name(i) for i in range(len(pictures))}
    with Image.open(folder / f"{pictures.name(0)}.png") as stored:
        assert stored.mode == "P" and stored.size == (96, 48) and np.asarray(stored).max() <= 20
        colours = np.asarray(stored.convert("RGB")).reshape(-1, 3)
        used = np.unique(np.asarray(stored))
    # the colours that VOC's own label files have, of these classes: bits of the index dealt to red, green, blue
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 7: (128, 128, 128), 15: (192, 128, 128), 20: (0, 64, 128)}
    Submission(tmp_path, "voc", "val").write("x", np.array([list(known)]))
    shown = Image.open(folder.with_name("comp6_val_cls") / "x.png").convert("RGB")
    assert [tuple(colour) for colour in np.asarray(shown)[0].tolist()] == list(known.values())
    assert len(np.unique(colours, axis=0)) == len(used)
    code, out, _ = run([*words, "--submission", tmp_path], capsys)
    assert code == 0 and "mIoU" in out and len(list(folder.with_name("comp6_val_cls").iterdir())) == 3


def official_scores(root, results, monkeypatch):
    """What the benchmark's own script says, from the JSON that it writes."""
    script = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    monkeypatch.setenv("CITYSCAPES_RESULTS", str(results))
    # The script (2.3.0) calls np.in1d, which numpy 2.4 no longer has.
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    file = results.parent / "official" / "result.json"
    for key, value in (
        ("exportFile", str(file)),
        ("groundTruthSearch", str(root / "gtFine" / "val" / "*" / "*_gtFine_labelIds.png")),
        ("predictionPath", None),
        ("predictionWalk", None),
        ("quiet", True),
    ):
        monkeypatch.setattr(script.args, key, value)
    monkeypatch.setattr(sys, "argv", ["evalPixelLevelSemanticLabeling"])
    script.main()
    return json.loads(file.read_text())


def check_agreement(official, ours):
    """The same float, class by class. One that no label has is nan or, if it is predicted, 0 there, and none here."""
    assert len(ours["iou"]) == 19
    theirs = official["classScores"]
    for name, iou in ours["iou"].items():
        assert iou == theirs[name] or (iou is None and not theirs[name] > 0), name
    there = [theirs[name] for name, iou in ours["iou"].items() if iou is not None]
    assert len(there) > 5 and ours["miou"] == pytest.approx(np.mean(there), abs=1e-14)


def test_agreement_with_the_official_cityscapes_script(tmp_path, layouts, networks, capsys, monkeypatch):
    file = tmp_path / "ours.json"
    pictures = open_data(DataConfig(name="cityscapes", root=str(layouts("cityscapes"))), "val")
    checkpoint = networks(19, class_names=pictures.classes.names)
    words = ["evaluate", checkpoint, *cityscapes(layouts), "--submission", tmp_path / "sub", "--json", file]
    assert run(words, capsys)[0] == 0
    check_agreement(official_scores(layouts("cityscapes"), tmp_path / "sub", monkeypatch), json.loads(file.read_text()))


def test_agreement_with_the_official_script_for_good_predictions(tmp_path, layouts, monkeypatch):
    """The same for predictions that are right at most pixels, of all classes."""
    root = layouts("cityscapes")
    pictures = open_data(DataConfig(name="cityscapes", root=str(root)), "val")
    model = DynamicRoutingNetwork(
        num_classes=19, depth=3, base_channels=4, stem_channels=4, class_names=pictures.classes.names
    )
    rng = np.random.default_rng(0)
    remaining = [pictures.read(index)[1] for index in range(len(pictures))]

    def nearly_right(image):
        truth = remaining.pop(0)
        noise = rng.integers(0, 19, truth.shape)
        guess = np.where((rng.random(truth.shape) < 0.3) | (truth == IGNORE), noise, truth)
        return Segmentation(
            F.one_hot(torch.from_numpy(guess.astype(np.int64)), 19).permute(2, 0, 1)[None], GATES[:, :4]
        )

    submission = Submission(tmp_path / "sub", "cityscapes", "val")
    ours = evaluate(model, evaluation_loader(pictures), nearly_right, on_prediction=submission.write).as_dict()
    assert 0.2 < ours["miou"] < 0.9
    check_agreement(official_scores(root, tmp_path / "sub", monkeypatch), ours)


def test_results_name_the_instructions_of_the_machine(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr("routeseg.evaluation.machine.CPUINFO", cpuinfo)
    assert machine_facts()["machine"]["isa"] == [], "not Linux"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A: B\nflags\t\t: fpu avx512_vnni avx2\n\nprocessor\t: 1\n")
    assert machine_facts()["machine"] | {"cpu": "A: B", "isa": ["avx2", "avx512_vnni"]} == machine_facts()["machine"]
    cpuinfo.write_text("processor\t: 0\nFeatures\t: asimd\n")
    found = machine_facts()["machine"]
    assert found["isa"] == [] and found["cpu"]
