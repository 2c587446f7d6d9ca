"""Offsets of classes: which class a pixel gets, once the weights are trained.

A loss in which rare classes count more says them too often; and also without, the most likely class of each pixel is
not the choice that makes the mIoU large (Nowozin 2014, "Optimal Decisions from Probabilistic Models: the
Intersection-over-Union Case"). So an offset is added to the logit of each class, with which the mIoU of training
images is highest. It becomes part of the predictor's bias: it costs nothing, and every engine and export has it.

Legend: K classes, N pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from routeseg.budgets.calibration import readable
from routeseg.collectives import gather
from routeseg.engine import SkipEngine
from routeseg.evaluation.scores import count_pairs
from routeseg.labels import IGNORE
from routeseg.model.grid import RoutedNetwork
from routeseg.model.head import Head

PIXELS = 2600  # that are looked at, of an image
STEPS = (-0.8, -0.4, -0.2, 0.2, 0.4, 0.8)  # by which an offset changes
ROUNDS, LARGEST = 3, 3.0  # over all classes; of an offset
LEAST_GAIN = 1e-4  # in mIoU, for which an offset changes


def biases_of(model: RoutedNetwork) -> list[Tensor]:
    """The `class_bias` [K] of each of a network's heads that have one: of each exit, the last one at the end."""
    heads = [*(() if model.exits is None else model.exits.decoders), model.head]
    return [bias for head in heads if (bias := cast(Head, head).class_bias()) is not None]


@torch.no_grad()
def fit_offsets(
    model: RoutedNetwork, batches: Iterable[dict[str, Any]], on_batch: Callable[[], None] = lambda: None
) -> list[Tensor]:
    """The offsets [K] of each of `biases_of`, fitted to images: batches of image [1,3,H,W] and labels [1,H,W].

    The network stays as it is. In a job of several processes each brings its share, and all get the same. Without an
    image that has labels there are none.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    engine = None if model.exits is not None else SkipEngine(model)

    def outputs(image: Tensor) -> Sequence[Tensor]:
        result = model.all_exits(image.to(device))[0] if engine is None else engine(image.to(device))
        return (*result.earlier, result.logits)

    found = offsets_of(outputs, batches, on_batch)
    model.train(was_training)
    return found


@torch.no_grad()
def offsets_of(
    outputs: Callable[[Tensor], Sequence[Tensor]],
    batches: Iterable[dict[str, Any]],
    on_batch: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """The offsets [K] of each of the outputs, logits [1,K,H,W], that a network has for an image [1,3,H,W]."""
    generator, seen = torch.Generator().manual_seed(0), []
    for batch in readable(batches, on_batch):
        labels = batch["labels"].flatten()
        known = torch.nonzero(labels != IGNORE).flatten()
        if not len(known):
            continue
        places = known[torch.randint(len(known), (PIXELS,), generator=generator)]
        sampled = [one[0].flatten(1)[:, places.to(one.device)].float().cpu() for one in outputs(batch["image"])]
        seen.append((sampled, labels[places]))
    seen = [one for share in gather(seen) for one in share]
    if not seen:
        return []
    labels = torch.cat([known for _, known in seen])
    return [best_offsets(torch.cat(logits, 1), labels) for logits in zip(*(logits for logits, _ in seen), strict=True)]


def best_offsets(logits: Tensor, labels: Tensor) -> Tensor:
    """Offsets [K], the mean of which is 0, with which logits [K,N] and labels [N] have the highest mIoU, as far as
    changing one after the other finds it. Only the classes of the labels have a say, and offsets of their own."""
    classes = len(logits)
    present = np.flatnonzero(np.bincount(labels.numpy(), minlength=classes))

    def miou(predicted: Tensor) -> float:
        pairs = count_pairs(labels, predicted, classes).double()
        iou = pairs.diag() / (pairs.sum(0) + pairs.sum(1) - pairs.diag())
        return float(iou[torch.from_numpy(present)].mean())

    offsets = torch.zeros(classes)
    best = miou(logits.max(0).indices)
    for _ in range(ROUNDS):
        before = best
        for k in present.tolist():
            others = logits + offsets[:, None]
            others[k] = -torch.inf
            highest, winner = others.max(0)
            for offset in [float(offsets[k]) + step for step in STEPS]:
                score = miou(torch.where(logits[k] + offset > highest, k, winner))
                if abs(offset) <= LARGEST and score > best + LEAST_GAIN:
                    best, offsets[k] = score, offset
        if best == before:
            break
    offsets[present] -= offsets[present].mean()
    return offsets


@contextmanager
def shifted(model: RoutedNetwork, offsets: Sequence[Tensor] | None) -> Iterator[None]:
    """In this block the decoders have these offsets, if there are any; behind it, their own biases again."""
    biases = biases_of(model) if offsets else []
    before = [bias.detach().clone() for bias in biases]
    shift(model, offsets)
    try:
        yield
    finally:
        with torch.no_grad():
            for bias, kept in zip(biases, before, strict=True):
                bias.copy_(kept)


@torch.no_grad()
def shift(model: RoutedNetwork, offsets: Sequence[Tensor] | None) -> None:
    """Adds offsets to the biases of the decoders, if there are any."""
    for bias, offset in zip(biases_of(model) if offsets else [], offsets or [], strict=True):
        bias += offset.to(bias)
