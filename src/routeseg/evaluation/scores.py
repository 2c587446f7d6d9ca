"""Confusion matrix to IoU, boundary IoU beside it, and the real cost of each image.

Legend: K classes, H, W image size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routeseg.collectives import gather, total
from routeseg.cost.macs import CostTable, model_cost
from routeseg.errors import DIVERGED
from routeseg.evaluation.boundary import boundary_counts
from routeseg.evaluation.test_time import Averaged, Forward, MultiPass
from routeseg.labels import IGNORE, label_map
from routeseg.model import DynamicRoutingNetwork


@dataclass(frozen=True)
class Evaluation:
    """What came out over a data set.

    confusion   int64 [K,K], rows the truth, columns the prediction, pixels; all 0 if no image has labels
    cost_macs   float64 [images], real cost of each image; full_macs [images] the full network's at that image's size.
                For several passes over an image (scales, flip, windows) the sum over all, each at its own size
    gates       float32 [images,L+1,S,3], the mean over the passes of an image
    skipped     unreadable images that were passed over
    passes      int64 [images], how often the network ran on each image
    boundary    int64 [2,K], intersection and union of the boundary bands (boundary.py), pixels; None: not asked for
    names       of the images, in the order of `gates`
    precision   that the network ran in
    """

    class_names: tuple[str, ...]
    confusion: np.ndarray
    cost_macs: np.ndarray
    full_macs: np.ndarray
    gates: np.ndarray
    skipped: int = 0
    passes: np.ndarray | None = None
    boundary: np.ndarray | None = None
    names: tuple[str, ...] = ()
    precision: str = "float32"

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union of each class, pixels summed over the set; nan for a class that no label has: it is
        no part of any mean. Where it is predicted, the classes that are there lose."""
        hits = np.diag(self.confusion)
        return self._share(hits, self.confusion.sum(0) + self.confusion.sum(1) - hits)

    @property
    def boundary_iou(self) -> np.ndarray | None:
        """Boundary IoU of each class, pixels summed over the set as in `iou`; None if it was not asked for."""
        return None if self.boundary is None else self._share(*self.boundary)

    @property
    def has_labels(self) -> bool:
        """Whether any pixel of the set had a label, so that there are scores."""
        return bool(self.confusion.any())

    @property
    def miou(self) -> float:
        """Mean of `iou` over the classes that labels have."""
        return _mean(self.iou)

    @property
    def boundary_miou(self) -> float:
        """Mean of `boundary_iou` over the classes that labels have."""
        return math.nan if self.boundary_iou is None else _mean(self.boundary_iou)

    @property
    def pixel_accuracy(self) -> float:
        total = self.confusion.sum()
        return float(np.diag(self.confusion).sum() / total) if total else math.nan

    @property
    def majority_miou(self) -> float:
        """The `miou` of predicting the most frequent class everywhere, to compare with."""
        truth = self.confusion.sum(1)
        present = int((truth > 0).sum())
        return float(truth.max() / truth.sum() / present) if present else math.nan

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `routeseg evaluate`; shares and scores are 0..1, one that is not defined is null."""
        gmacs = self.cost_macs / 1e9
        full = self.full_macs / 1e9
        boundary: dict[str, Any] = {}
        if self.boundary_iou is not None:
            boundary["boundary_miou"] = finite_or_none(self.boundary_miou)
            boundary["boundary_iou"] = self._by_class(self.boundary_iou)
        return {
            "miou": finite_or_none(self.miou),
            "iou": self._by_class(self.iou),
            **boundary,
            "pixel_accuracy": finite_or_none(self.pixel_accuracy),
            "majority_class_miou": finite_or_none(self.majority_miou),
            "cost_gmacs": {
                "mean": float(gmacs.mean()),
                "min": float(gmacs.min()),
                "max": float(gmacs.max()),
                "full": float(full.mean()),
                "mean_share": float((gmacs / full).mean()),
                "min_share": float((gmacs / full).min()),
                "max_share": float((gmacs / full).max()),
            },
            "images": len(gmacs),
            "skipped": self.skipped,
            "passes_per_image": 1.0 if self.passes is None else float(self.passes.mean()),
            "precision": self.precision,
        }

    def _share(self, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        """part / whole of each class that labels have; nan for the others."""
        there = (self.confusion.sum(1) > 0) & (whole > 0)
        return np.divide(part, whole, out=np.full(len(whole), np.nan), where=there)

    def _by_class(self, values: np.ndarray) -> dict[str, float | None]:
        return {name: finite_or_none(value) for name, value in zip(self.class_names, values, strict=True)}


def _mean(values: np.ndarray) -> float:
    """The mean of those that are defined; nan if none is."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def finite_or_none(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if math.isfinite(value) else None


def check_class_count(classes: int) -> None:
    """Raises ValueError if there is nothing to tell apart, or more than labels can hold."""
    if classes > IGNORE:
        raise ValueError(f"{classes} classes: labels hold at most {IGNORE}, for {IGNORE} means that a pixel has none")
    if classes < 2:
        raise ValueError("one class only: name the rest of the image as a class, too")


@torch.no_grad()
def evaluate(
    model: DynamicRoutingNetwork,
    images: Iterable[dict[str, Any]],
    forward: Forward | MultiPass | None = None,
    convention: str = "authors",
    on_image: Callable[[], None] | None = None,
    boundary_width: float = 0.0,
    on_prediction: Callable[[str, np.ndarray], None] | None = None,
) -> Evaluation:
    """Runs the network over images (as `evaluation_loader` gives them) at their own size.

    forward         what computes the segmentation: the model itself, an engine built from it, or several passes of one
    on_image        called after each image (for a progress bar)
    boundary_width  of boundary IoU, as a share of an image's diagonal; 0 leaves it out
    on_prediction   called with each image's name and its predicted classes, uint8 [H,W]

    In a distributed job every process gives its share (`evaluation_loader` with its rank). All return the result over
    all shares, the same as that of a single process.
    Raises ValueError if there is no image, a single class, a label outside the network's classes, or an output
    that is not finite.
    """
    check_class_count(model.config.num_classes)
    device = next(model.parameters()).device
    segment = forward if isinstance(forward, MultiPass) else MultiPass(forward or model)
    confusion = torch.zeros(model.config.num_classes, model.config.num_classes, dtype=torch.int64, device=device)
    table = cache(lambda size: model_cost(model, size, convention))
    boundary = np.zeros((2, model.config.num_classes), dtype=np.int64)
    # For each image: its name, real cost, full cost, passes, gates; None if it was skipped.
    per_image: list[tuple[str, float, float, int, np.ndarray] | None] = []
    skipped = 0
    was_training = model.training
    model.eval()
    for image in images:
        if image["skipped"]:
            skipped += 1
            per_image.append(None)
        else:
            labels = image["labels"].to(device)
            _check_labels(labels, model.config.num_classes, image["name"])
            result = segment(image["image"].to(device))
            if not result.scores.isfinite().all():
                raise ValueError(f"{image['name']}: {DIVERGED}")
            found = result.labels
            confusion += count_pairs(labels, found, model.config.num_classes)
            costs = _costs(result, table)
            per_image.append((image["name"], *costs, result.count, result.gates.float().cpu().numpy()))
            if boundary_width or on_prediction is not None:
                prediction = label_map(found[0].cpu().numpy(), model.config.num_classes)
            if boundary_width:
                truth = image["labels"][0].numpy()
                boundary += boundary_counts(truth, prediction, model.config.num_classes, boundary_width)
            if on_prediction is not None:
                on_prediction(image["name"], prediction)
        if on_image is not None:
            on_image()
    model.train(was_training)
    shares = gather((per_image, boundary, skipped))
    turns = zip_longest(*(share for share, _, _ in shares))  # the processes take turns: so the order is that of the set
    readable = [image for turn in turns for image in turn if image is not None]
    if not readable:
        raise ValueError("the data set has no readable image to evaluate on")
    names, reals, fulls, counts, gates = zip(*readable, strict=True)
    return Evaluation(
        class_names=tuple(model.config.class_names),
        confusion=total(confusion).cpu().numpy(),
        cost_macs=np.array(reals),
        full_macs=np.array(fulls),
        gates=np.stack(gates),
        skipped=sum(count for _, _, count in shares),
        passes=np.array(counts),
        boundary=np.sum([counts for _, counts, _ in shares], axis=0) if boundary_width else None,
        names=names,
        precision=getattr(segment.forward, "precision", str(next(model.parameters()).dtype).removeprefix("torch.")),
    )


def count_pairs(truth: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """The confusion matrix of labels and predicted classes, int64 of one shape: int64 [K,K], without ignored pixels."""
    known = truth != IGNORE
    pairs = truth[known] * num_classes + prediction[known]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def _costs(result: Averaged, table: Callable[[tuple[int, int]], CostTable]) -> tuple[float, float]:
    """Real cost and full cost of all passes over an image, each at its own size, MACs."""
    real = sum(one.cost_macs(table) for one in result.passes)
    return real, sum(table(one.size).full * len(one.gates) for one in result.passes)


def _check_labels(labels: Tensor, num_classes: int, name: str) -> None:
    known = labels[labels != IGNORE]
    if known.numel() and int(known.max()) >= num_classes:
        raise ValueError(
            f"the label of {name} has class {int(known.max())}, the network has 0 to {num_classes - 1}. "
            "Was the checkpoint trained on another data set?"
        )
