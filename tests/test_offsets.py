"""Offsets of classes: they raise the mIoU of the images that they are fitted to, and leave the training as it is."""

import copy
import itertools

import pytest
import torch
from safetensors.torch import load_file

import routeseg
from routeseg import DynamicRoutingNetwork
from routeseg.cli import main
from routeseg.data.config import DataConfig, open_data
from routeseg.data.loaders import evaluation_loader
from routeseg.engine import SkipEngine
from routeseg.evaluation import evaluate
from routeseg.training.gate_budget import Budget
from routeseg.training.offsets import LARGEST, best_offsets, biases_of, fit_offsets, shift, shifted
from routeseg.training.recipe import Recipe
from routeseg.training.run import RunOptions
from routeseg.training.segmentation import train

SIZE = dict(crop=(32, 64), image_size=(48, 64), train_images=12, val_images=8, batch_size=2, workers=0)
DATA = DataConfig(**SIZE)
NETWORK = dict(num_classes=10, depth=2, num_scales=3, base_channels=4, stem_channels=4, gate="fixed", route="diagonal")


def network(**changes):
    torch.manual_seed(1)
    model = routeseg.DynamicRoutingNetwork(**NETWORK | changes).eval()
    for decoder in [model.decoder, *(model.exits.decoders if model.exits else ())]:
        torch.nn.init.normal_(decoder.predictor.weight, std=0.3)
        torch.nn.init.normal_(decoder.predictor.bias, std=0.5)  # some classes are said too often
    return model


def pictures():
    return list(evaluation_loader(open_data(DATA, "train")))


def miou(logits, labels):
    classes = len(logits)
    pairs = torch.bincount(labels * classes + logits.max(0).indices, minlength=classes**2).view(classes, classes)
    iou = pairs.diag() / (pairs.sum(0) + pairs.sum(1) - pairs.diag())
    return iou[torch.bincount(labels, minlength=classes) > 0].mean().item()


def noisy(classes=4, pixels=4000):
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.6, 0.3, 0.08, 0.02])
    labels = torch.multinomial(shares, pixels, replacement=True, generator=generator)
    return torch.randn(classes, pixels, generator=generator) + 2.5 * torch.eye(classes)[:, labels], labels


def test_what_is_said_too_often_is_said_less():
    logits, labels = noisy()
    logits[2:] += 1.5
    offsets = best_offsets(logits, labels)
    assert (offsets[2:] < offsets[:2].min()).all() and abs(offsets.mean()) < 1e-6
    assert miou(logits + offsets[:, None], labels) > miou(logits, labels) + 0.1


def test_no_other_offsets_near_are_better():
    logits, labels = noisy()
    offsets = best_offsets(logits, labels)
    best = miou(logits + offsets[:, None], labels)
    for changes in itertools.product((-0.2, 0, 0.2), repeat=4):
        assert miou(logits + (offsets + torch.tensor(changes))[:, None], labels) < best + 0.01


def test_a_class_that_no_label_has_keeps_its_logit():
    logits, labels = noisy()
    labels = labels.clamp(max=2)
    assert best_offsets(logits, labels)[3] == 0


def test_offsets_are_bounded():
    logits = torch.zeros(2, 100)
    logits[1] += 100.0
    assert best_offsets(logits, torch.zeros(100, dtype=torch.int64)).abs().max() <= LARGEST


@pytest.mark.parametrize("exits", [None, [0, 1]], ids=["one", "exits"])
def test_the_score_of_the_pictures_rises(exits):
    """With the network as it was beside it; each exit has offsets of its own."""
    model = network(exits=exits)
    before, kept = evaluate(model, pictures(), SkipEngine(model)).miou, copy.deepcopy(model.state_dict())
    offsets = fit_offsets(model, pictures())
    assert len(offsets) == (1 if exits is None else 3)
    assert exits is None or not torch.equal(offsets[0], offsets[-1])
    torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)
    with shifted(model, offsets):
        assert evaluate(model, pictures(), SkipEngine(model)).miou > before + 0.01
    torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)


def test_a_failure_leaves_the_biases():
    model = network()
    kept = biases_of(model)[0].detach().clone()
    with pytest.raises(KeyError), shifted(model, [torch.ones(10)]):
        assert not torch.equal(biases_of(model)[0], kept)
        raise KeyError
    assert torch.equal(biases_of(model)[0], kept)


def test_pictures_without_labels():
    model = network()
    blank = [{"image": one["image"], "labels": torch.full_like(one["labels"], 255), "skipped": 0} for one in pictures()]
    assert fit_offsets(model, [*blank, {"skipped": 1}]) == []
    with shifted(model, []):
        pass


def test_a_classifier_has_none():
    assert biases_of(DynamicRoutingNetwork(head="classifier", num_classes=3, depth=3, base_channels=4)) == []


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_training_is_the_same(tmp_path, ema_decay):
    """What learns does not see them; what is validated, saved and returned has them."""
    found = {}
    for offsets in (False, True):
        recipe = Recipe(
            iterations=6, lr=0.02, warmup_steps=2, precise_bn_batches=2, validate_every=3, save_every=2,
            precision="32-true", class_balance=0.5, ema_decay=ema_decay, class_offsets=offsets,
        )  # fmt: skip
        model = network(exits=[0, 1])
        train(model, DATA, recipe, Budget(0.0), RunOptions(tmp_path / str(offsets), accelerator="cpu", progress=False))
        state = torch.load(tmp_path / str(offsets) / "last.ckpt", weights_only=True)
        weights = {key: value for key, value in state["state_dict"].items() if "exits.gates" not in key}
        found[offsets] = weights, state["callbacks"]["run"]["offsets"], model.state_dict()
    (without, none, _), (learns, fitted, returned) = found[False], found[True]
    calibrated = ("exits.costs", "exits.prices", "exits.frequencies")
    assert none is None and len(fitted) == 3
    for key, value in without.items():
        assert key.endswith(calibrated) or torch.equal(learns[key], value), key
    saved = load_file(tmp_path / "True" / "last" / "model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in returned.items())
    source = "average.module." if ema_decay else "model."
    for key, offset in (("decoder.predictor.bias", fitted[-1]), ("exits.decoders.0.predictor.bias", fitted[0])):
        assert torch.equal(saved[key], learns[source + key] + offset) and offset.abs().max() > 0


def test_calibrate_writes_them(tmp_path, capsys):
    model = network()
    model.save(tmp_path / "net")
    words = [f"--data.{key}={list(value) if isinstance(value, tuple) else value}" for key, value in SIZE.items()]
    assert main(["calibrate", str(tmp_path / "net"), "--class_offsets", "true", *words]) == 0
    assert "road: " in capsys.readouterr().out
    expected = fit_offsets(model, pictures())
    shift(model, expected)
    assert torch.equal(biases_of(routeseg.load(tmp_path / "net"))[0], biases_of(model)[0])
