"""Pre-training of stem and grid as a classifier (the paper's: ImageNet), whose weights a segmenter starts from by name.

Legend: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import Trainer
from torch.nn import functional as F

from routeseg.collectives import rank_and_world, total
from routeseg.cost.macs import model_cost
from routeseg.data.classification import Batch, ClassificationConfig, ClassificationDataModule
from routeseg.model.classifier import DynamicRoutingClassifier
from routeseg.training.batch_norm import Mode
from routeseg.training.callbacks import ValidateAndSave
from routeseg.training.fitting import RecipeTask, Run
from routeseg.training.recipe import Recipe

TOP = 5  # a label among so many of the highest scores is a hit of top-5


@dataclass
class PretrainingRecipe(Recipe):
    """The `recipe` section of a configuration of `routeseg pretrain`: that of training, with other defaults (lr 0.2 for
    256 images, 120 epochs of ImageNet, BatchNorm's running statistics), and

    label_smoothing   this share of a label is spread over all classes
    """

    iterations: int = 600_600
    lr: float = 0.2
    precise_bn_batches: int = 0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"recipe.label_smoothing is {self.label_smoothing}: it must be at least 0 and below 1")


@dataclass(frozen=True)
class Accuracy:
    """Shares of the images whose label has the highest score, and one of the TOP highest."""

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


class ClassificationTask(RecipeTask):
    """Cross-entropy of the labels, in the steps of the recipe.

    With P processes and N images i in all batches of a step, the loss is sum_i CE_i / N. DDP takes the mean of the
    gradients over the processes, so that each contributes P sum_i CE_i / N of its own images.
    """

    def __init__(
        self,
        model: DynamicRoutingClassifier,
        recipe: PretrainingRecipe,
        crop: int,
        batch_norm: Mode = "own",
        first_step: int = 0,
    ) -> None:
        super().__init__(model, recipe, batch_norm, first_step)
        self.label_smoothing = recipe.label_smoothing
        self.cost = model_cost(model, (crop, crop))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """A step of the optimiser on `accumulate` batches, which come as one."""
        count, (rank, world) = self.recipe.accumulate, rank_and_world()
        images = len(batch["label"]) * world
        sums = torch.zeros(3, device=self.device)  # of the cross-entropies, the hits and the shares of the full cost
        cast(Any, self.optimizers()).zero_grad()
        parts = zip(batch["image"].chunk(count), batch["label"].chunk(count), strict=True)
        for part, (pictures, labels) in enumerate(parts):
            self.seed_part(rank, part)
            result = self.model(pictures.contiguous(memory_format=torch.channels_last), drop_path=self.drop_path)
            logits = result.logits.float()
            loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
            hits = (logits.argmax(dim=1) == labels).sum()
            cost = float(self.cost.of_gates(result.gates).sum() / self.cost.full)
            sums += torch.stack((loss.detach(), hits.float(), loss.new_tensor(cost)))
            self.add_gradients(world * loss / images, part == count - 1)
        sums = total(sums) / images
        self.check_loss(sums[0])
        logged = dict(zip(("loss", "top1", "real_cost"), sums, strict=True))
        self.finish_step(logged, len(batch["label"]), int(total(batch["skipped"])))


@torch.no_grad()
def evaluate_classifier(model: DynamicRoutingClassifier, batches: Iterable[Batch]) -> Accuracy:
    """Top-1 and top-5 over batches, summed over the processes of a job; the model is left in the mode that it had."""
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


class SaveClassifier(ValidateAndSave):
    """`ValidateAndSave` with the best network by top-1."""

    accuracy: Accuracy | None = None

    def score(self, trainer: Trainer, task: RecipeTask) -> tuple[float, dict[str, float], bool]:
        with trainer.precision_plugin.forward_context():
            model = cast(DynamicRoutingClassifier, task.network)
            self.accuracy = evaluate_classifier(model, self.data.val_dataloader())
        scores = {"val_top1": self.accuracy.top1, "val_top5": self.accuracy.top5}
        return self.accuracy.top1, scores, True


@dataclass
class PretrainingResult:
    """What `pretrain` returns: the last validation, the folder, and the seconds it took."""

    accuracy: Accuracy | None
    output: Path
    seconds: float
    trainer: Trainer = field(repr=False)


def pretrain(
    model: DynamicRoutingClassifier,
    data: ClassificationConfig,
    recipe: PretrainingRecipe,
    output: Path,
    resume: bool = False,
    progress: bool = True,
    devices: int | Literal["auto"] = "auto",
    accelerator: str = "auto",
) -> PretrainingResult:
    """Trains the classifier as `routeseg.training.train` does a segmenter, and writes the same things into `output`.

    With `resume` the run goes on from OUTPUT/last.ckpt. It ends, on one CPU process, with the very weights of a run
    that was never interrupted: from a tree always, from tar shards with as many loader workers as before.
    Raises as `train` does.
    """
    crop = (data.crop, data.crop)
    run = Run.begin(model, recipe, output, data.batch_size, crop, resume, devices, accelerator)
    step = run.before.step
    module = ClassificationDataModule(data, recipe.iterations, recipe.seed, step, recipe.accumulate)
    saver = SaveClassifier(output, recipe, module, run.images_per_step)
    task = ClassificationTask(model, recipe, data.crop, run.batch_norm, step)
    trainer, seconds = run.fit(task, module, saver, progress)
    return PretrainingResult(saver.accuracy, output, seconds, trainer)
