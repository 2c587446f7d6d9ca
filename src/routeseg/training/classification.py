"""Pre-training of stem and grid as a classifier (on ImageNet in the paper). A segmenter starts from its weights.

Legend: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from routeseg.collectives import rank_and_world, total
from routeseg.cost.macs import model_cost
from routeseg.data.classification import ClassificationConfig
from routeseg.data.classification_loaders import Batch, ClassificationDataModule
from routeseg.model.classifier import Classification
from routeseg.model.grid import RoutedNetwork
from routeseg.training.batch_norm import Mode
from routeseg.training.recipe import PretrainingRecipe
from routeseg.training.run import Run, RunOptions, RunResult
from routeseg.training.task import RecipeTask, Validation

TOP = 5  # a hit of top-5: the label is among the five highest scores


@dataclass(frozen=True)
class Accuracy:
    """Shares of the images whose label has the highest score, and one of the TOP highest scores."""

    top1: float
    top5: float
    images: int
    skipped: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        skipped = f" ({self.skipped} unreadable)" if self.skipped else ""
        return f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%} of {self.images} validation images{skipped}"


class ClassificationTask(RecipeTask[Accuracy]):
    """Cross-entropy of the labels.

    With P processes and N images i in all batches of a step, the loss is sum_i CE_i / N. DDP takes the mean of the
    gradients over the processes, so that each contributes P sum_i CE_i / N of its images.
    """

    labels_key = "label"

    def __init__(self, model: RoutedNetwork, recipe: PretrainingRecipe, crop: int, batch_norm: Mode = "own") -> None:
        super().__init__(model, recipe, model_cost(model, (crop, crop)), batch_norm)
        self.label_smoothing = recipe.label_smoothing

    def count(self, labels: Tensor) -> Tensor:
        """The images."""
        return labels.new_tensor(len(labels))

    def loss(self, result: Classification, labels: Tensor, labels_in_step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = result.logits.float()
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing) / labels_in_step
        hits = (logits.argmax(dim=1) == labels).sum() / labels_in_step
        return rank_and_world()[1] * loss, {"loss": loss, "top1": hits}

    def validate(self, batches: Iterable[Batch]) -> Validation[Accuracy]:
        """The score is top-1."""
        with self.autocast():
            found = evaluate_classifier(self.network, batches)
        return Validation(found, found.top1, {"val_top1": found.top1, "val_top5": found.top5})


@torch.no_grad()
def evaluate_classifier(model: RoutedNetwork, batches: Iterable[Batch]) -> Accuracy:
    """Top-1 and top-5 over batches, summed over the processes of a job; the model keeps its mode (train or eval).

    Raises ValueError if no image can be read.
    """
    device, was_training = next(model.parameters()).device, model.training
    counts = torch.zeros(4, dtype=torch.int64, device=device)  # top-1 hits, top-5 hits, images, skipped
    model.eval()
    for batch in batches:
        counts[3] += int(batch["skipped"])
        labels = batch["label"].to(device)
        if not len(labels):
            continue
        scores = model(batch["image"].to(device)).logits
        hits = scores.topk(min(TOP, scores.shape[1]), dim=1).indices == labels[:, None]
        counts += torch.stack(
            (hits[:, 0].sum(), hits.any(dim=1).sum(), labels.new_tensor(len(labels)), counts.new_zeros(()))
        )
    model.train(was_training)
    top1, top5, images, skipped = total(counts).tolist()
    if not images:
        raise ValueError(f"no validation image can be read ({skipped} were skipped): check the data set's files")
    return Accuracy(top1 / images, top5 / images, images, skipped)


def pretrain(
    model: RoutedNetwork, data: ClassificationConfig, recipe: PretrainingRecipe, options: RunOptions
) -> RunResult[Accuracy]:
    """Trains the classifier as `routeseg.training.train` does a segmenter, and writes the same things into
    `options.output`.

    With `options.resume` the run goes on from OUTPUT/last.ckpt. It ends, on one CPU process, with the very weights of a
    run that was never interrupted.
    Raises as `train` does.
    """
    run = Run.begin(model, recipe, options, data.batch_size, (data.crop, data.crop))
    module = ClassificationDataModule(data, run.iterations, recipe.seed, run.first_step, recipe.accumulate)
    return run.fit(ClassificationTask(model, recipe, data.crop, run.batch_norm), module)
