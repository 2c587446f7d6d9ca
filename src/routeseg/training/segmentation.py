"""Training of the segmenter: its loss (the authors' recipe), and its validation.

What a step does with the loss: task.py. How a network is trained, in one process or several: run.py.

Legend: B images, K classes, H, W crop size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from routeseg.collectives import rank_and_world, total
from routeseg.cost.macs import model_cost
from routeseg.data.config import DataConfig, pair
from routeseg.data.datamodule import SegmentationDataModule
from routeseg.data.pairs import PairedFiles, SegmentationData
from routeseg.data.subset import LEAST_IMAGES, Subset, class_weights
from routeseg.engine import SkipEngine
from routeseg.evaluation import Evaluation, evaluate
from routeseg.evaluation.scores import check_class_count
from routeseg.labels import IGNORE
from routeseg.model import DynamicRoutingNetwork, Segmentation
from routeseg.model.backbone import Backbone
from routeseg.model.compute import PLAIN
from routeseg.model.places import enlarge
from routeseg.training.batch_norm import Mode
from routeseg.training.gate_budget import Budget, budget_loss
from routeseg.training.recipe import Recipe
from routeseg.training.run import Run, RunOptions, RunResult
from routeseg.training.task import RecipeTask, Validation
from routeseg.training.watch import PROGRESS_FILE, WATCH_STATE, Watch

log = logging.getLogger("routeseg")
PRICES = (0.01, 0.3)  # at which places leave in training, as shares of the entropy of all classes alike
WHOLE = 0.25  # of the images, whose places all stay


class SegmentationTask(RecipeTask[Evaluation]):
    """Cross-entropy plus budget (Eq. 10); of a network with exits, the sum of all exits' cross-entropies (whose mean is
    logged as cross_entropy). `class_weights` [K] weigh the pixels by their classes; None: all count 1.

    With P processes, A batches of each in a step (`accumulate`), N labelled pixels i in all of these batches (the sum
    of their weights), and M_a the mean of the expected costs of the images in the batches a of all processes,

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

    labels_key = "labels"
    recipe: Recipe
    of_label: Tensor | None  # the weight of each label value
    watch: Watch | None = None  # looks at the images of the validations

    def __init__(
        self,
        model: DynamicRoutingNetwork,
        recipe: Recipe,
        budget: Budget,
        crop: tuple[int, int],
        batch_norm: Mode = "own",
        class_weights: np.ndarray | None = None,
    ) -> None:
        super().__init__(model, recipe, model_cost(model, crop), batch_norm)
        self.budget = budget
        of_label = None
        if class_weights is not None:
            of_label = torch.zeros(IGNORE + 1)
            of_label[: len(class_weights)] = torch.from_numpy(class_weights)
        self.register_buffer("of_label", of_label, persistent=False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        freeze_stages(self.model.backbone, self.recipe, self.position)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.watch is not None:
            checkpoint[WATCH_STATE] = self.watch.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.watch is not None and WATCH_STATE in checkpoint:  # older runs did not keep it
            self.watch.load_state_dict(checkpoint[WATCH_STATE])

    @property
    def places_leave(self) -> bool:
        start = self.recipe.places_from
        return self.model.config.place is not None and start < 1 and self.position >= start * self.recipe.iterations

    def asked(self, images: int) -> dict[str, Any]:
        """A price for each image once places leave, of any size; for some of them none, so that all of their places run
        all layers."""
        if not self.places_leave:
            return {}
        lowest, highest = (math.log(share * math.log(self.model.config.num_classes)) for share in PRICES)
        prices = torch.exp(lowest + (highest - lowest) * torch.rand(images))
        return {"price": torch.where(torch.rand(images) < WHOLE, 0.0, prices).numpy()}

    def count(self, labels: Tensor) -> Tensor:
        """The labelled pixels, or the sum of their weights."""
        weights = self.weights(labels)
        return (labels != IGNORE).sum() if weights is None else weights.sum()

    def weights(self, labels: Tensor) -> Tensor | None:
        """What each pixel of labels [B,H,W] counts in the loss; None: all that have a label count 1."""
        return None if self.of_label is None else self.of_label[labels]

    def loss(self, result: Segmentation, labels: Tensor, labels_in_step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        count, (_, world) = self.recipe.accumulate, rank_and_world()
        weight = self.budget.weight_at(self.position / self.recipe.iterations)
        compute, weights = self.model.compute or PLAIN, self.weights(labels)
        outputs = (*result.earlier, result.logits)
        counts = [weights] * len(outputs)
        if result.exits is not None:  # an exit is about the places that come to it
            assert self.model.config.place is not None
            at = enlarge(result.exits, self.model.config.place, labels.shape[-2:])
            ones = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights
            counts = [ones * (at >= exit) for exit in range(len(outputs))]
        sums = [
            compute.cross_entropy_sum(logits.float(), labels, some)
            for logits, some in zip(outputs, counts, strict=True)
        ]
        cross_entropy = torch.stack(sums).sum() / labels_in_step.clamp(min=1)
        expected = self.cost.expected(result.gates).mean()
        mean = total(expected.detach()) / world
        # M_a: the value of all processes, the gradient of this one's images.
        budget = budget_loss(expected + (mean - expected.detach()), self.cost.budgeted, self.budget.target) / count
        total_loss = world * cross_entropy + weight * budget
        numbers = {
            "cross_entropy": cross_entropy / len(sums),
            "budget_loss": budget / world,
            "expected_cost": expected / self.cost.budgeted / count / world,
        }
        return total_loss, {"loss": total_loss / world, **numbers}

    def validate(self, batches: Iterable[dict[str, Any]]) -> Validation[Evaluation]:
        """The score is the mIoU. A network is a candidate once the budget has its full weight: one that does not yet
        keep the budget must not win."""
        network = cast(DynamicRoutingNetwork, self.network)
        is_last = self.clock is not None and self.clock.over
        if self.watch is not None and is_last:
            self.watch.last_step = self.global_step
        on_prediction = None if self.watch is None else self.watch.begin(self.global_step)
        found = evaluate(network, batches, SkipEngine(network), on_prediction=on_prediction)
        if self.watch is not None:
            self.watch.end(self.global_step, found)
        logged = {"val_miou": found.miou, "val_cost": float((found.cost_macs / found.full_macs).mean())}
        full_weight = (self.budget.start + self.budget.ramp) * self.recipe.iterations
        candidate = is_last or self.position >= full_weight or not self.budget.weight
        return Validation(found, found.miou, logged, candidate)


def freeze_stages(backbone: Backbone | None, recipe: Recipe, step: float) -> None:
    """Lets those stages of a backbone, if there is one, learn that do so at this step."""
    learns = step >= recipe.backbone_frozen * recipe.iterations
    for number, stage in enumerate([] if backbone is None else backbone.stages):
        stage.requires_grad_(learns and number >= recipe.backbone_frozen_stages)


def meaning_of(data: SegmentationData) -> dict[str, int] | None:
    """Label value, or colour, -> class, as the label files of a data set have them; None if it has no files."""
    while isinstance(data, Subset):
        data = data.data
    if not isinstance(data, PairedFiles):
        return None
    known, colours = data.label_map, data.label_map.colours
    values = ({} if known.strict else {k: k for k in range(known.classes)}) | dict(known.values)
    named = {str(value): k for value, k in values.items()} | {
        "#{:02x}{:02x}{:02x}".format(*c): colours[c] for c in colours
    }
    return {value: k for value, k in named.items() if k != IGNORE}


def _say_few(training: int, validation: int) -> None:
    """Says once if there are too few images for a calibration that can be relied upon."""
    if training < LEAST_IMAGES:
        log.warning(
            "%d training images are too few to tell well which image may leave early, and what a budget costs: they "
            "serve for both. `routeseg calibrate` does better with %d or more",
            training,
            LEAST_IMAGES,
        )
    elif validation < LEAST_IMAGES:
        log.warning(
            "%d validation images are too few to set budgets with: the training images serve, on which the network is "
            "overconfident, so that new ones cost more than is asked",
            validation,
        )


def check_task(model: DynamicRoutingNetwork, budget: Budget) -> None:
    """Raises ValueError for a budget that the network cannot be trained for, and for a single class."""
    if budget.weight and model.exits is not None:
        raise ValueError("a network with exits is asked for its budget afterwards: set --gate_budget.weight 0")
    if budget.weight and not model.config.gated:
        raise ValueError(
            "a network without gates cannot keep a budget: set --gate_budget.weight 0, or --model.gate soft to give it "
            "gates"
        )
    check_class_count(model.config.num_classes)


def train(
    model: DynamicRoutingNetwork, data: DataConfig, recipe: Recipe, budget: Budget, options: RunOptions
) -> RunResult[Evaluation]:
    """Trains the network and writes checkpoints and logs into `options.output`; afterwards `model` is the network in
    OUTPUT/last.

    With `options.resume` the run goes on from OUTPUT/last.ckpt and ends, on one CPU process, with the very weights of a
    run that was never interrupted.

    Raises ValueError for a folder that already holds a run (unless resuming), or another network's, or cannot be
    written, for a single class, for a budget without gates, and for processes or a kind of BatchNorm that the machine
    does not have, and for a tracker that is not installed; NonFiniteLoss; ProcessLost.
    """
    check_task(model, budget)
    module = SegmentationDataModule(data, recipe.iterations, recipe.seed, 0, recipe.accumulate)
    meaning = meaning_of(module.train_data)
    run = Run.begin(model, recipe, options, data.batch_size, pair(data.crop), meaning)
    module.iterations, module.first_step = run.iterations, run.first_step
    if model.exits is not None:
        _say_few(len(module.train_data), len(module.val_data))
    if run.clock is not None and run.clock.looks < 1:
        count = len(module.val_data)
        module.look_at(run.clock.looks)
        log.warning("a validation looks at %d of %d images, so that it ends in time", len(module.val_data), count)
    weights = class_weights(module.train_data, recipe.class_balance) if recipe.class_balance else None
    task = SegmentationTask(model, recipe, budget, pair(data.crop), run.batch_norm, weights)
    progress = options.output / PROGRESS_FILE if options.progress else None
    task.watch = Watch(module.val_data, recipe.iterations, model.config, progress)
    result = run.fit(task, module)
    return replace(result, ranking=task.watch.ranking)
