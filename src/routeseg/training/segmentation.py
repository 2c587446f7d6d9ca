"""Training of the segmenter: its loss, and what a step computes (the authors' recipe).

How a network is trained, in one process or several, is in fitting.py.

Legend: B images, K classes, H, W crop size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import Trainer
from torch import Tensor
from torch.nn import functional as F

from routeseg.collectives import rank_and_world, total
from routeseg.cost.budget import Budget, budget_loss
from routeseg.cost.macs import model_cost
from routeseg.data.datamodule import DataConfig, SegmentationDataModule, pair
from routeseg.evaluation import Evaluation
from routeseg.evaluation.scores import check_class_count
from routeseg.labels import IGNORE
from routeseg.model import DynamicRoutingNetwork
from routeseg.training.batch_norm import Mode
from routeseg.training.callbacks import ValidateAndSave
from routeseg.training.fitting import RecipeTask, Run
from routeseg.training.recipe import Recipe


class SegmentationTask(RecipeTask):
    """Cross-entropy plus budget (Eq. 10), SGD with the authors' groups and schedule, the weights' average if asked.

    With P processes, A batches of each in a step (`accumulate`), N labelled pixels i in all of these batches, and
    M_a the mean of the expected costs of the images in the batches a of all processes,

        cross-entropy = sum_i CE_i / N
        budget        = 1/A sum_a (M_a / full - mu)^2            Eq. 9
        loss          = cross-entropy + lambda_2 budget          Eq. 10

    which for A = 1 is the loss of one process that has all the images. The gradients of a process's A batches add up,
    and DDP takes their mean over the processes p, so that batch a of p contributes

        P sum_{i in a,p} CE_i / N + lambda_2 / A (M_a / full - mu)^2

    where M_a has its value from all processes and its gradient through the images of p: since M_a = 1/P sum_p M_ap,
    the mean over p of the gradients of M_ap is that of M_a. For A > 1 the budget keeps to each of the A means M_a,
    not to their mean: it exceeds the loss of one large batch by lambda_2 times the variance of the M_a / full.
    """

    def __init__(
        self,
        model: DynamicRoutingNetwork,
        recipe: Recipe,
        budget: Budget,
        crop: tuple[int, int],
        batch_norm: Mode = "own",
        first_step: int = 0,
    ) -> None:
        super().__init__(model, recipe, batch_norm, first_step)
        self.budget = budget
        self.cost = model_cost(model, crop)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """A step of the optimiser on `accumulate` batches, which come as one: image [A*B,3,H,W], labels [A*B,H,W]."""
        count, (rank, world) = self.recipe.accumulate, rank_and_world()
        weight = self.budget.weight_at(self.global_step / self.recipe.iterations)
        labelled, skipped = total(torch.stack(((batch["labels"] != IGNORE).sum(), batch["skipped"].sum())))
        labelled, zero = labelled.clamp(min=1), torch.zeros((), device=self.device)
        logged = dict.fromkeys(("loss", "cross_entropy", "budget_loss", "expected_cost", "real_cost"), zero)
        cast(Any, self.optimizers()).zero_grad()
        parts = zip(batch["image"].chunk(count), batch["labels"].chunk(count), strict=True)
        for part, (images, labels) in enumerate(parts):
            self.seed_part(rank, part)
            result = self.model(images.contiguous(memory_format=torch.channels_last), drop_path=self.drop_path)
            cross_entropy = cross_entropy_sum(result.logits.float(), labels)
            expected = self.cost.expected(result.gates).mean()
            real = expected.new_tensor(self.cost.of_gates(result.gates).mean() / self.cost.full)
            sums = total(torch.stack((cross_entropy.detach(), expected.detach() / world, real / world)))
            # M_a: the value of all processes, the gradient of our own images.
            budget = budget_loss(expected + (sums[1] - expected.detach()), self.cost.budgeted, self.budget.target)
            found = {
                "loss": sums[0] / labelled + weight / count * budget.detach(),
                "cross_entropy": sums[0] / labelled,
                "budget_loss": budget.detach() / count,
                "expected_cost": sums[1] / self.cost.budgeted / count,
                "real_cost": sums[2] / count,
            }
            self.check_loss(found["loss"])
            self.add_gradients(world * cross_entropy / labelled + weight / count * budget, part == count - 1)
            logged = {key: logged[key] + value for key, value in found.items()}
        self.finish_step(logged, len(batch["image"]), int(skipped))


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [B,K,H,W] and labels [B,H,W], over the pixels that have a label (0 where none has)."""
    return cross_entropy_sum(logits, labels) / (labels != IGNORE).sum().clamp(min=1)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the pixels' cross-entropies, see `segmentation_loss`."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


@dataclass
class TrainingResult:
    """What `train` returns: the last validation, the folder, and the seconds it took."""

    evaluation: Evaluation | None
    output: Path
    seconds: float
    trainer: Trainer = field(repr=False)


def train(
    model: DynamicRoutingNetwork,
    data: DataConfig,
    recipe: Recipe,
    budget: Budget,
    output: Path,
    resume: bool = False,
    progress: bool = True,
    devices: int | Literal["auto"] = "auto",
    accelerator: str = "auto",
) -> TrainingResult:
    """Trains the network and writes checkpoints and logs into `output`; afterwards `model` is the network in
    OUTPUT/last.

    With `resume` the run goes on from OUTPUT/last.ckpt and ends, on one CPU process, with the very weights of a run
    that was never interrupted. `devices` are processes on this machine; started by torchrun, we are one of its.

    Raises ValueError for a folder that already holds a run (unless resuming), or another network's, or cannot be
    written, for a single class, for a budget without gates, and for processes or a kind of BatchNorm that the machine
    does not have; NonFiniteLoss; ProcessLost.
    """
    if budget.weight and not model.config.gated:
        raise ValueError(
            "a network without gates cannot keep a budget: set --budget.weight 0, or --model.gate soft to give it gates"
        )
    check_class_count(model.config.num_classes)
    run = Run.begin(model, recipe, output, data.batch_size, pair(data.crop), resume, devices, accelerator)
    step = run.before.step
    module = SegmentationDataModule(data, recipe.iterations, recipe.seed, step, recipe.accumulate)
    saver = ValidateAndSave(output, recipe, module, run.images_per_step)
    task = SegmentationTask(model, recipe, budget, pair(data.crop), run.batch_norm, step)
    trainer, seconds = run.fit(task, module, saver, progress)
    return TrainingResult(saver.latest, output, seconds, trainer)
