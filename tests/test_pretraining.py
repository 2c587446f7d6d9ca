"""Pre-training as a classifier, and starting a segmenter from its weights by name."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import routeseg
from conftest import run, spread_gates
from routeseg import DynamicRoutingNetwork
from routeseg.cli.parser import PRESETS
from routeseg.cost.macs import model_cost
from routeseg.data.classification import ClassificationConfig
from routeseg.data.classification_loaders import ClassificationDataModule
from routeseg.model import checkpoints
from routeseg.model.request import Request
from routeseg.training.classification import ClassificationTask, evaluate_classifier, pretrain
from routeseg.training.initialization import initialize
from routeseg.training.recipe import PretrainingRecipe
from routeseg.training.run import RunOptions
from test_classification_data import write_tree

ROOT = Path(__file__).parents[1]
NETWORK = dict(depth=3, base_channels=8, stem_channels=8)
FEWER_NODES = dict(depth=2, num_scales=3)
SMALL = dict(crop=32, resize=36, batch_size=6, workers=0)
SEGMENTER_DATA = dict(image_size=(32, 64), crop=(32, 64), train_images=4, val_images=2, batch_size=2, workers=0)

pytestmark = pytest.mark.usefixtures("no_report")


def classifier(num_classes: int = 3, **changes) -> DynamicRoutingNetwork:
    torch.manual_seed(1)
    return DynamicRoutingNetwork(head="classifier", num_classes=num_classes, **{**NETWORK, **changes})


def recipe(**changes) -> PretrainingRecipe:
    values = dict(iterations=12, lr=0.1, warmup_steps=2, validate_every=6, save_every=4, log_every=1, seed=3)
    return PretrainingRecipe(**{**values, "precision": "32-true", **changes})


def fit(output, data, model=None, resume=False, **changes):
    """The network after `pretrain`, and its rows in the log."""
    model = model or classifier(**FEWER_NODES)
    options = RunOptions(output, resume, accelerator="cpu", progress=False)
    result = pretrain(model, data, recipe(**changes), options)
    with open(sorted((output / "logs").glob("*/metrics.csv"))[-1]) as file:
        return result, load_file(output / "last" / "model.safetensors"), list(csv.DictReader(file))


def equal(some, other):
    return some.keys() == other.keys() and all(torch.equal(some[key], other[key]) for key in some)


def section(name, values):
    return [f"--{name}.{key}={list(value) if isinstance(value, tuple) else value}" for key, value in values.items()]


def words(root, output, *extra):
    quick = dict(iterations=4, warmup_steps=2, validate_every=4, log_every=1, precision="32-true")
    return [
        "pretrain", f"--data.root={root}", f"--output={output}", "--accelerator=cpu",
        *section("model", NETWORK), *section("data", SMALL), *section("recipe", quick), *extra,
    ]  # fmt: skip


def train_words(output, *extra):
    return [
        "train", f"--output={output}", "--accelerator=cpu", *section("model", NETWORK),
        *section("data", SEGMENTER_DATA), "--recipe.iterations=2", "--recipe.precise_bn_batches=1",
        "--recipe.precision=32-true", *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"), train=12, val=4)


@pytest.fixture(scope="module")
def pretrained(tree, tmp_path_factory):
    """The folder of a classifier that the command has trained, with what it printed."""
    output = tmp_path_factory.mktemp("pretrained") / "run"
    assert routeseg.cli.main(words(tree, output, "--recipe.iterations=12")) == 0
    return output


class TestClassifier:
    @pytest.mark.parametrize("size", [(32, 32), (64, 96), (71, 33), (224, 224)])
    @pytest.mark.parametrize("options", [{}, {"gate": "fixed"}, {"small_gate": True}, {"num_scales": 3}])
    def test_cost_is_what_is_computed(self, size, options):
        """At odd sizes too: the convolutions that torch counts are those of the cost table."""
        model = classifier(10, **options).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            result = model(torch.rand(2, 3, *size))
        assert result.logits.shape == (2, 10)
        assert counter.get_total_flops() / 2 == model_cost(model, size, "conv").of_gates(result.gates).sum()

    def test_reaches_stride_32_before_the_mean(self):
        model, shapes = classifier().eval(), []
        for merge in model.head.merge:
            merge.register_forward_hook(lambda module, inputs, out: shapes.append(tuple(out.shape)))
        with torch.no_grad():
            model(torch.rand(1, 3, 64, 128))
        assert shapes == [(1, 16, 8, 16), (1, 32, 4, 8), (1, 64, 2, 4), (1, 64, 2, 4)]

    def test_every_scale_is_heard(self):
        """The head adds up what leaves each scale."""
        model = classifier().eval()
        features = [torch.rand(1, 8 * 2**s, 8 // 2**s, 8 // 2**s) for s in range(4)]
        with torch.no_grad():
            before = model.head(features)
            for s in range(4):
                changed = [x + 1 if i == s else x for i, x in enumerate(features)]
                assert not torch.allclose(before, model.head(changed))

    def test_an_image_does_not_depend_on_the_others(self):
        model = spread_gates(classifier(gate="soft")).eval()
        images = torch.rand(3, 3, 48, 64)
        with torch.no_grad():
            together = model(images)
            for i in range(3):
                alone = model(images[i : i + 1])
                assert torch.allclose(alone.logits[0], together.logits[i], atol=1e-5)
                assert torch.allclose(alone.gates[0], together.gates[i], atol=1e-6)

    def test_saved_and_read(self, tmp_path):
        model = classifier(class_names=("apple", "leaf", "sea")).eval()
        model.save(tmp_path)
        again = DynamicRoutingNetwork.from_pretrained(str(tmp_path)).eval()
        assert again.config.class_names == model.config.class_names
        images = torch.rand(1, 3, 32, 32)
        assert torch.equal(again(images).logits, model(images).logits)

    def test_is_no_segmenter(self, tmp_path):
        classifier().save(tmp_path)
        with pytest.raises(ValueError, match="its head is classifier.*--init"):
            checkpoints.load_segmenter(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        for _ in range(2):
            model, images = routeseg.load(tmp_path), torch.rand(1, 3, 32, 32)
            assert model(images).logits.shape == (1, 3)
            with pytest.raises(ValueError, match="the head classifier segments nothing"):
                model("photo.jpg")
            config.pop("head", None)  # one of an earlier version
            (tmp_path / "config.json").write_text(json.dumps(config))


class TestPretraining:
    def test_learns(self, tmp_path, tree):
        """Colours of blotches, in some seconds: far above the third of a guess; the best network is kept."""
        data = ClassificationConfig(root=str(tree), **{**SMALL, "batch_size": 12})
        result, last, rows = fit(
            tmp_path, data, iterations=60, lr=0.05, validate_every=15, save_every=30, precise_bn_batches=4
        )
        losses = [float(row["loss"]) for row in rows if row["loss"]]
        assert len(losses) == 60 and losses[0] == pytest.approx(1.1, abs=0.4) and sum(losses[-8:]) / 8 < 0.6
        assert result.found.top1 >= 0.75 and result.found.top5 == 1.0 and result.found.images == 12
        validated = [float(row["val_top1"]) for row in rows if row["val_top1"]]
        assert len(validated) == 4 and validated[-1] == pytest.approx(result.found.top1)
        best = DynamicRoutingNetwork.from_pretrained(str(tmp_path / "best"))
        found = evaluate_classifier(best, ClassificationDataModule(data, 1).val_dataloader())
        assert found.top1 == pytest.approx(max(validated))

    @pytest.mark.parametrize(
        "changes",
        [{}, {"ema_decay": 0.9, "accumulate": 2, "drop_path": 0.3}],
    )
    def test_interrupted_and_resumed_ends_with_the_same_weights(self, tmp_path, tree, monkeypatch, changes):
        """Cut in the second validation, behind the last checkpoint; bit for bit the run that was not."""
        data = ClassificationConfig(root=str(tree), **SMALL)
        changes = dict(iterations=8, validate_every=4, save_every=3) | changes
        _, whole, rows = fit(tmp_path / "whole", data, **changes)
        real, calls = ClassificationTask.validate, []

        def cut(self, *args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyError("cut")
            return real(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(ClassificationTask, "validate", cut)
            with pytest.raises(KeyError, match="cut"):
                fit(tmp_path / "cut", data, **changes)
        reached = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["global_step"]
        assert reached == 6
        _, resumed, rest = fit(tmp_path / "cut", data, resume=True, **changes)
        assert equal(whole, resumed)
        assert [row["loss"] for row in rest if row["loss"]] == [row["loss"] for row in rows if row["loss"]][6:]

    def test_the_loss_is_the_labels_cross_entropy(self, tmp_path, tree):
        data = ClassificationConfig(root=str(tree), **SMALL)
        _, _, rows = fit(tmp_path, data, iterations=1, label_smoothing=0.1)
        (batch,) = ClassificationDataModule(data, 1, seed=3).train_dataloader()
        model = classifier(**FEWER_NODES).train()
        logits = model(batch["image"]).logits
        target = F.one_hot(batch["label"], 3) * 0.9 + 0.1 / 3
        expected = -(target * logits.log_softmax(1)).sum(1).mean()
        (first,) = (row for row in rows if row["loss"])
        assert float(first["loss"]) == pytest.approx(expected.item(), rel=1e-4)
        assert float(first["top1"]) == pytest.approx(float((logits.argmax(1) == batch["label"]).float().mean()))

    def test_accumulated_batches_are_one(self, tmp_path, tree):
        """Two batches of 3 a step are one of 6, where BatchNorm does not tell them apart."""
        losses = {}
        for size, count in ((6, 1), (3, 2)):
            data = ClassificationConfig(root=str(tree), **{**SMALL, "batch_size": size})
            model = spread_gates(classifier(**FEWER_NODES))
            changes = dict(accumulate=count, batch_norm="frozen", lr=0.02, iterations=6, save_every=100)
            _, _, rows = fit(tmp_path / str(size), data, model, **changes)
            losses[size] = [float(row["loss"]) for row in rows if row["loss"]]
        assert losses[3] == pytest.approx(losses[6], rel=1e-4)

    def test_evaluation_by_hand(self, tree):
        model = spread_gates(classifier(7)).train()
        loader = ClassificationDataModule(ClassificationConfig(root=str(tree), **SMALL), 1).val_dataloader()
        found = evaluate_classifier(model, loader)
        assert model.training
        top1 = top5 = 0
        for batch in loader:
            for image, label in zip(batch["image"], batch["label"].tolist(), strict=True):
                with torch.no_grad():
                    order = model.eval()(image[None]).logits[0].argsort(descending=True).tolist()
                top1, top5 = top1 + (order[0] == label), top5 + (label in order[:5])
        assert (found.top1, found.top5, found.images, found.skipped) == (top1 / 12, top5 / 12, 12, 0)

    def test_unreadable_images_are_counted_when_they_come(self, tmp_path, caplog):
        root = write_tree(tmp_path / "tree", train=8)
        spoiled = root / "train" / "leaf" / "leaf_3.JPEG", root / "val" / "sea" / "sea_1.jpg"
        for path in spoiled:
            path.write_bytes(path.read_bytes()[:100])
        data = ClassificationConfig(root=str(root), **SMALL)
        result, _, rows = fit(tmp_path / "run", data, iterations=8, validate_every=4)
        counts = [float(row["skipped_images"]) for row in rows if row["skipped_images"]]
        assert counts == sorted(counts) and counts[-1] == 2 and counts[0] == 0  # once in each of two epochs
        assert (result.found.images, result.found.skipped) == (5, 1)
        said = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
        assert sum("leaf_3.JPEG" in text for text in said) == 1 and any("sea_1.jpg" in text for text in said)
        for path in (root / "val").glob("*/*"):
            path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"no validation image can be read \(6 were skipped\)"):
            evaluate_classifier(classifier(), ClassificationDataModule(data, 1).val_dataloader())


class TestCommand:
    def test_pretrain(self, pretrained, tree):
        written = {path.name for path in pretrained.iterdir() if not path.name.startswith(".")}
        assert written == {"best", "last", "last.ckpt", "logs", "tensorboard"}
        model = DynamicRoutingNetwork.from_pretrained(str(pretrained / "last"))
        assert model.config.class_names == ("apple", "leaf", "sea") and model.config.base_channels == 8

    def test_says_what_came_out(self, tmp_path, tree, capsys):
        code, out, _ = run(words(tree, tmp_path / "run"), capsys)
        assert code == 0 and "3 classes: top-1 " in out and "of 12 validation images" in out and "--init" in out
        code, _, err = run(words(tree, tmp_path / "run"), capsys)
        assert code == 2 and "already holds a run" in err
        assert run(words(tree, tmp_path / "run", "--recipe.iterations=5", "--resume"), capsys)[0] == 0
        assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 5

    def test_mistakes(self, tmp_path, tree, capsys):
        for extra, expected in (
            ([f"--data.root={tmp_path}"], "ROOT/train/n01440764/NAME.JPEG"),
            (["--data.train_split=training"], "training; the expected tree"),
            (["--recipe.label_smoothing=1"], "recipe.label_smoothing"),
            (["--data.bach_size=1"], "did you mean data.batch_size"),
            (["--model.base_channels=7"], "even"),
            (["--recipe.batch_norm=synced"], "SyncBatchNorm"),
            (["--data.batch_size=1"], "a single value per channel"),
        ):
            code, _, err = run(words(tree, tmp_path / "run", *extra), capsys)
            assert code == 2 and expected in err, (extra, err)
            assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("depth", [16, pytest.param(33, marks=pytest.mark.slow)])
    def test_configurations(self, tmp_path, tree, capsys, depth):
        """The paper's numbers, and names that a segmenter knows; two steps on the small tree, narrow."""
        config = PRESETS / "imagenet" / "base.yaml"
        given = yaml.safe_load(config.read_text())
        given["model"]["depth"] = depth
        assert len(config.read_text().splitlines()) <= 35
        assert given["recipe"]["iterations"] == 120 * -(-1_281_167 // 256) and given["recipe"]["lr"] == 0.2
        with torch.device("meta"):
            full = DynamicRoutingNetwork(head="classifier", num_classes=1000, **given["model"]).state_dict()
            segmenter = DynamicRoutingNetwork(**given["model"]).state_dict()
        names = {name: value.shape for name, value in full.items() if not name.startswith("head.")}
        assert names == {name: value.shape for name, value in segmenter.items() if not name.startswith("decoder.")}
        assert full["head.predictor.weight"].shape == (1000, 512) and f"nodes.{depth}-3.gate.score.bias" in names
        small = ["--model.depth=3", "--model.base_channels=8", *section("data", SMALL)]
        short = ["--recipe.iterations=2", "--recipe.precision=32-true", "--accelerator=cpu"]
        words = ["pretrain", "--config", config, "--data.root", tree, "--output", tmp_path / "run", *small, *short]
        code, out, err = run(words, capsys)
        assert code == 0 and "3 classes: top-1" in out, err


class TestInitialize:
    def test_the_segmenter_computes_the_same_up_to_its_decoder(self, pretrained):
        source = DynamicRoutingNetwork.from_pretrained(str(pretrained / "last")).eval()
        model = DynamicRoutingNetwork(num_classes=5, **NETWORK).eval()
        decoder = {name: value.clone() for name, value in model.decoder.state_dict().items()}
        report = initialize(model, pretrained / "last")
        images = model.normalize(torch.rand(2, 3, 64, 96))
        with torch.no_grad():
            assert torch.equal(model.stem(images), source.stem(images))
            ours, theirs = (
                network.walk(network.stem(images), Request.of(network.config, len(images)))
                for network in (model, source)
            )
        assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))
        assert torch.equal(ours[1], theirs[1])
        assert all(torch.equal(value, model.decoder.state_dict()[name]) for name, value in decoder.items())
        assert set(report.used) == {n for n in model.state_dict() if n.startswith(("stem.", "nodes."))}
        assert set(report.missing) == {f"decoder.{name}" for name in decoder}
        assert set(report.not_in_network) == {f"head.{name}" for name in source.head.state_dict()}
        assert not report.other_shape and not report.differences

    def test_other_classes_and_no_gates(self, tmp_path):
        """From a segmenter of other classes, into one without gates: the report tells both."""
        source = spread_gates(DynamicRoutingNetwork(num_classes=4, **NETWORK))
        source.save(tmp_path)
        model = DynamicRoutingNetwork(num_classes=5, gate="fixed", **NETWORK)
        report = initialize(model, tmp_path)
        assert [name for name, *_ in report.other_shape] == ["decoder.predictor.weight", "decoder.predictor.bias"]
        assert report.other_shape[1] == ("decoder.predictor.bias", [4], [5])
        assert report.not_in_network and all(".gate." in name for name in report.not_in_network)
        assert report.differences == [("gate", "soft", "fixed")] and not report.missing
        text = str(report)
        total = len(model.state_dict())
        assert f"{total - 2} of the network's {total} tensors" in text
        assert f"{len(report.not_in_network)} not used, the network has no such tensor: nodes.*.gate (" in text
        assert "([4] there, [5] here)" in text and "gate is soft there, fixed here" in text
        assert report.values == sum(model.state_dict()[name].numel() for name in report.used)
        json.dumps(report.as_dict())

    def test_a_deeper_network_takes_the_layers_that_are_there(self, tmp_path):
        DynamicRoutingNetwork(num_classes=5, **NETWORK).save(tmp_path)
        model = DynamicRoutingNetwork(num_classes=5, **{**NETWORK, "depth": 4})
        report = initialize(model, tmp_path)
        assert any(name.startswith("nodes.4-") for name in report.missing)
        assert all(name.startswith("nodes.3-") for name, *_ in report.other_shape)  # gates of one direction there
        assert ("depth", 3, 4) in report.differences

    def test_the_input_normalisation_comes_along(self, tmp_path):
        DynamicRoutingNetwork(num_classes=5, pixel_mean=(0.1, 0.2, 0.3), pixel_std=(1, 1, 2), **NETWORK).save(
            tmp_path / "a"
        )
        model = DynamicRoutingNetwork(num_classes=5, **NETWORK).eval()
        initialize(model, tmp_path / "a")
        images = torch.rand(1, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(model(images).logits, routeseg.load(tmp_path / "a")(images).logits)
        model.save(tmp_path / "b")
        assert routeseg.load(tmp_path / "b").normalize.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])

    @pytest.mark.parametrize(
        ("change", "expected"),
        [({"base_channels": 16}, "base_channels is 8 there and 16 here. Set --model.base_channels 8"),
         ({"depth": 9}, "depth is 3 there and 9 here"),
         ({"stem_channels": 4, "cell_operations": ["sep_conv_5x5"]}, "cell_operations is")],
    )  # fmt: skip
    def test_a_network_of_another_kind_is_refused(self, pretrained, change, expected):
        model = DynamicRoutingNetwork(num_classes=5, **{**NETWORK, **change})
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match="does not fit the network: .*The likely reason: ") as error:
            initialize(model, pretrained / "last")
        assert expected in str(error.value)
        assert equal(before, model.state_dict())

    def test_what_is_no_checkpoint(self, tmp_path, pretrained):
        model = DynamicRoutingNetwork(num_classes=5, **NETWORK)
        save_file({"fc.weight": torch.ones(3)}, tmp_path / "model.safetensors")
        for config, expected in ((None, "config.json is missing"), ("[]", "holds no object"), ("{", "describes no"),
                                 ("{}", "0 of the .* The likely reason: depth is 16 there")):  # fmt: skip
            if config is not None:
                (tmp_path / "config.json").write_text(config)
            with pytest.raises(ValueError, match=expected):
                initialize(model, tmp_path)
        assert initialize(model, pretrained).used == initialize(model, pretrained / "best").used, "a run: its best"
        (tmp_path / "model.safetensors").write_bytes(b"cut")
        with pytest.raises(ValueError, match="cannot read .*model.safetensors"):
            initialize(model, tmp_path)

    def test_train_init(self, tmp_path, pretrained, capsys):
        output = tmp_path / "run"
        code, out, err = run(train_words(output, f"--init={pretrained}/last", "--recipe.lr=1e-9"), capsys)
        assert code == 0, err
        assert "initialised from" in out and "decoder.merge (" in out
        report = json.loads((output / "init.json").read_text())
        source = load_file(pretrained / "last" / "model.safetensors")
        ours = load_file(output / "last" / "model.safetensors")
        weights = [name for name in report["used"] if name.endswith("weight")]
        assert len(weights) > 50
        assert all(torch.allclose(ours[name], source[name], atol=1e-6) for name in weights)

    def test_train_init_and_resume(self, tmp_path, pretrained, capsys):
        """A resumed run goes on with its own weights, and with the input normalisation that it began with."""
        source = tmp_path / "source"
        DynamicRoutingNetwork(num_classes=5, pixel_mean=(0.1, 0.2, 0.3), **NETWORK).save(source)
        output = tmp_path / "run"
        assert run(train_words(output, f"--init={source}"), capsys)[0] == 0
        report = (output / "init.json").read_text()
        code, out, _ = run(train_words(output, "--init=nowhere", "--resume", "--recipe.iterations=3"), capsys)
        assert code == 0 and "--init nowhere is not used: --resume goes on" in out
        assert json.loads((output / "last" / "config.json").read_text())["pixel_mean"] == [0.1, 0.2, 0.3]
        code, _, err = run(train_words(output, f"--init={pretrained}/last"), capsys)
        assert code == 2 and "already holds a run" in err and (output / "init.json").read_text() == report

    def test_train_init_mistakes(self, tmp_path, pretrained, capsys):
        for extra, expected in (
            (["--init=nowhere"], "no checkpoint folder nowhere"),
            ([f"--init={pretrained}/last", "--model.base_channels=4"], "base_channels is 8 there and 4 here"),
        ):
            code, _, err = run(train_words(tmp_path / "run", *extra), capsys)
            assert code == 2 and expected in err, err
            assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes(tmp_path, tree):
    """Losses and final scores of two processes are those of one at the same global batch."""
    extra = ["--recipe.batch_norm=frozen", "--recipe.lr=0.02"]
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    found = {}
    for name, start, size in (("two", launch, 3), ("one", [], 6)):
        command = [*start, "routeseg.cli", *words(tree, tmp_path / name, *extra, f"--data.batch_size={size}")]
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        with open(next((tmp_path / name / "logs").glob("*/metrics.csv"))) as file:
            rows = list(csv.DictReader(file))
        found[name] = [float(row["loss"]) for row in rows if row["loss"]]
        assert done.stdout.count("of 12 validation images") == 1
    assert len(found["two"]) == len(found["one"]) == 4
    assert found["two"] == pytest.approx(found["one"], rel=1e-4)
