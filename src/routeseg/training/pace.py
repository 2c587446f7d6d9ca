"""How fast a training runs on a machine, so that it can be asked for minutes."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from dataclasses import dataclass, replace
from functools import partial

import torch

from routeseg import stopwatch
from routeseg.budgets.calibration import readable
from routeseg.data.config import DataConfig, pair
from routeseg.data.datamodule import SegmentationDataModule
from routeseg.data.subset import OFFSET_IMAGES
from routeseg.model import DynamicRoutingNetwork
from routeseg.training.batch_norm import check_enough_values
from routeseg.training.clock import Clock
from routeseg.training.gate_budget import Budget
from routeseg.training.recipe import Recipe
from routeseg.training.segmentation import SegmentationTask, check_task, freeze_stages
from routeseg.training.trial import PrecisionChoice, choose_precision, step_seconds

CURVE = 20  # rows that the log of a training has at least
LOADS = 3  # of the images of a step, that are timed
VALIDATION_SHARE = 0.2  # of the time: one that takes longer looks at fewer images
FORWARD = 0.4  # of a step: about what its forward takes


@dataclass(frozen=True)
class Pace:
    """How fast a training runs on this machine.

    choice        its precision, and why it is that one
    step_s        seconds of a step of the optimiser
    first_load_s  seconds to load a step's images that were not loaded before
    load_s        seconds to load those that were
    epoch         steps until each image was loaded once
    validation_s  seconds of a validation with all that belongs to it (`ValidateAndSave`), from one image of it
    image_s       seconds of an image in it
    """

    choice: PrecisionChoice
    step_s: float
    first_load_s: float
    load_s: float
    epoch: float
    validation_s: float = 0.0
    image_s: float = 0.0

    def seconds(self, iterations: int) -> float:
        first = min(iterations, self.epoch)
        return first * (self.step_s + self.first_load_s) + (iterations - first) * (self.step_s + self.load_s)

    def iterations(self, seconds: float) -> int:
        """How many fit into so many seconds."""
        left = seconds - self.epoch * (self.step_s + self.first_load_s)
        if left < 0:
            return int(seconds / (self.step_s + self.first_load_s))
        return int(self.epoch + left / (self.step_s + self.load_s))


def measure_pace(model: DynamicRoutingNetwork, data: DataConfig, recipe: Recipe, budget: Budget) -> Pace:
    """Tries the first steps of a training, on a copy of the network. Raises ValueError, as the training would."""
    check_task(model, budget)
    if recipe.batch_norm != "frozen":
        check_enough_values(model, pair(data.crop), data.batch_size)
    images = data.batch_size * recipe.accumulate
    module = SegmentationDataModule(replace(data, workers=0), 1 + LOADS, recipe.seed, 0, recipe.accumulate)
    loads = [stopwatch.take_turns([partial(next, iter(module.train_dataloader()))], LOADS)[0] for _ in range(2)]
    first_load_s, load_s = (statistics.median(some) if data.workers == 0 else 0.0 for some in loads)
    task = SegmentationTask(model, recipe, budget, pair(data.crop)).to("cuda" if torch.cuda.is_available() else "cpu")
    freeze_stages(model.backbone, recipe, recipe.iterations)  # as in most of the steps
    batch = task.transfer_batch_to_device(next(iter(module.train_dataloader())), task.device, 0)
    if recipe.precision == "auto":
        choice = choose_precision(task, batch)
    else:
        choice = PrecisionChoice(recipe.precision, "as the recipe says")
    (step_s,) = [choice.step_s] if choice.step_s else step_seconds(task, batch, [choice.precision])
    seconds, image_s = statistics.median(step_s), _image_seconds(task, module)
    looks, norms = _images_of_validation(model, module, recipe), recipe.precise_bn_batches
    validation_s = looks * image_s + norms * (seconds / recipe.accumulate * FORWARD + load_s)
    epoch = len(module.train_data) / images
    return Pace(choice, seconds, first_load_s, load_s, epoch, validation_s, image_s)


def logged_every(recipe: Recipe, iterations: int) -> int:
    """A short run is logged more often than the recipe says: its loss is a curve, too."""
    return min(recipe.log_every, max(1, iterations // CURVE))


def _images_of_validation(model: DynamicRoutingNetwork, module: SegmentationDataModule, recipe: Recipe) -> int:
    """How many images a validation looks at: to score, to calibrate exits, to fit offsets of classes."""
    looks = len(module.val_data)
    if model.exits is not None:
        looks += sum(len(module.calibration_dataloader(part)) for part in ("train", "val"))
    return looks + (min(len(module.train_data), OFFSET_IMAGES) if recipe.class_offsets else 0)


@torch.no_grad()
def _image_seconds(task: SegmentationTask, module: SegmentationDataModule) -> float:
    """The seconds in which a validation image is loaded, and runs through all layers. One comes first, to warm up."""
    model = copy.deepcopy(task.model).eval()
    forward = model if model.exits is None else model.all_exits
    seconds = 0.0
    for batch in itertools.islice(readable(module.val_dataloader(), lambda: None), 1):
        for _ in range(2):
            start = stopwatch.clock()
            module.val_data.read(0)
            result = forward(batch["image"].to(task.device))
            float((result[0] if isinstance(result, tuple) else result).logits.sum())  # waits for a GPU
            seconds = stopwatch.clock() - start
    return seconds


def fitted(recipe: Recipe, pace: Pace, clock: Clock, validations: int, rest_s: float = 0.0) -> Recipe:
    """The recipe for the time that a clock has left: with as many iterations as fit in at this pace beside at most so
    many validations, a warm-up that is no more than a tenth of them, and enough rows of the log for a curve. The clock
    then says how far the schedule is.

    rest_s  what comes behind the last validation
    """
    fit_s = VALIDATION_SHARE * (clock.total_s - clock.spent_s)
    clock.looks = min(1.0, max(0.0, fit_s) / pace.validation_s) if pace.validation_s else 1.0
    clock.plan(pace.seconds(1), clock.looks * pace.validation_s, rest_s, validations)
    count = max(1, pace.iterations(max(0.0, clock.left_s(clock.spent_s))))
    return replace(
        recipe,
        iterations=count,
        validate_every=max(1, count // clock.validations),
        warmup_steps=min(recipe.warmup_steps, count // 10),
        log_every=logged_every(recipe, count),
        precise_bn_batches=min(recipe.precise_bn_batches, math.ceil(clock.looks * recipe.precise_bn_batches)),
        precision=pace.choice.precision,
    )
