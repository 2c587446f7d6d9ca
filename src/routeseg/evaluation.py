"""Confusion matrix to IoU, and the real cost of each image.

Legend: K classes, H, W image size.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from routeseg.cost import CostTable, model_cost
from routeseg.data.transforms import IGNORE
from routeseg.model import DynamicRoutingNetwork, Segmentation

Forward = Callable[[Tensor], Segmentation]
PACKAGES = ("routeseg", "torch", "lightning")  # whose versions a result file names


@dataclass(frozen=True)
class Evaluation:
    """What came out over a data set.

    confusion   int64 [K,K], rows the truth, columns the prediction, pixels
    cost_macs   float64 [images], real cost of each image; full_macs [images] the full network's at that image's size
    gates       float32 [images,L+1,S,3]
    skipped     unreadable pictures that were passed over
    """

    class_names: tuple[str, ...]
    confusion: np.ndarray
    cost_macs: np.ndarray
    full_macs: np.ndarray
    gates: np.ndarray
    skipped: int = 0

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union of each class, pixels summed over the set; nan where a class never occurs."""
        hits = np.diag(self.confusion).astype(float)
        union = self.confusion.sum(0) + self.confusion.sum(1) - hits
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(union > 0, hits / union, np.nan)

    @property
    def miou(self) -> float:
        """Mean of `iou` over the classes that occur."""
        return float(np.nanmean(self.iou)) if self.confusion.any() else math.nan

    @property
    def pixel_accuracy(self) -> float:
        total = self.confusion.sum()
        return float(np.diag(self.confusion).sum() / total) if total else math.nan

    @property
    def majority_miou(self) -> float:
        """The score of predicting the most frequent class everywhere, to compare with."""
        truth = self.confusion.sum(1)
        present = int((truth > 0).sum())
        return float(truth.max() / truth.sum() / present) if present else math.nan

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `routeseg evaluate`; shares and scores are 0..1, an IoU that is not defined is null."""
        gmacs = self.cost_macs / 1e9
        full = self.full_macs / 1e9
        return {
            "miou": self.miou,
            "iou": {n: None if math.isnan(v) else float(v) for n, v in zip(self.class_names, self.iou, strict=True)},
            "pixel_accuracy": self.pixel_accuracy,
            "majority_class_miou": self.majority_miou,
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
        }


@torch.no_grad()
def evaluate(
    model: DynamicRoutingNetwork,
    pictures: Iterable[dict[str, Any]],
    forward: Forward | None = None,
    convention: str = "authors",
    on_picture: Callable[[], None] | None = None,
) -> Evaluation:
    """Runs the network over pictures (as `evaluation_loader` gives them) at their own size.

    forward     what computes the segmentation, the model itself or an engine built from it
    on_picture  called after each picture (for a progress bar)

    In a distributed job every process gives its share, and all return the result over all shares.
    Raises ValueError where there is no picture, or a label is outside the network's classes.
    """
    device = next(model.parameters()).device
    counter = MulticlassConfusionMatrix(model.num_classes, ignore_index=IGNORE).to(device)
    tables: dict[tuple[int, int], CostTable] = {}
    costs, fulls, gates, skipped = [], [], [], 0
    was_training = model.training
    model.eval()
    for picture in pictures:
        if picture["skipped"]:
            skipped += 1
        else:
            labels = picture["labels"].to(device)
            _check_labels(labels, model.num_classes, picture["name"])
            result = (forward or model)(picture["image"].to(device))
            counter.update(result.labels, labels)
            size = (labels.shape[-2], labels.shape[-1])
            table = tables.setdefault(size, model_cost(model, size, convention))
            costs.append(float(table.of_gates(result.gates)[0]))
            fulls.append(table.full)
            gates.append(result.gates[0].float().cpu().numpy())
        if on_picture is not None:
            on_picture()
    model.train(was_training)
    shares = _gather(((costs, fulls, gates), skipped))
    costs, fulls, gates = ([x for lists, _ in shares for x in lists[part]] for part in range(3))
    if not costs:
        raise ValueError("the data set has no readable picture to evaluate on")
    return Evaluation(
        class_names=model.class_names,
        confusion=counter.compute().cpu().numpy(),
        cost_macs=np.array(costs),
        full_macs=np.array(fulls),
        gates=np.stack(gates),
        skipped=sum(count for _, count in shares),
    )


def _check_labels(labels: Tensor, num_classes: int, name: str) -> None:
    known = labels[labels != IGNORE]
    if known.numel() and int(known.max()) >= num_classes:
        raise ValueError(
            f"the label of {name} has class {int(known.max())}, the network has 0 to {num_classes - 1}. "
            "Was the checkpoint trained on another data set?"
        )


def _gather(share: tuple[tuple[list, list, list], int]) -> list[tuple[tuple[list, list, list], int]]:
    """Every process's share; outside a distributed job, only ours."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [share]
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, share)
    return shares


def machine_facts() -> dict[str, Any]:
    """Machine, date and versions, for a result file."""
    model_name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model_name = names[0] if names else model_name
    return {
        "machine": {
            "cpu": model_name,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
