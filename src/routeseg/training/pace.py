"""How fast a training runs on a machine, so that it can be asked for minutes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from functools import partial

import torch

from routeseg import bfloat16
from routeseg.cost.budget import Budget
from routeseg.data.config import DataConfig, pair
from routeseg.data.datamodule import SegmentationDataModule
from routeseg.model import DynamicRoutingNetwork
from routeseg.training.recipe import Recipe
from routeseg.training.segmentation import SegmentationTask, freeze_stages
from routeseg.training.trial import Choice, choose_precision, step_seconds

CURVE = 20  # rows that the log of a training has at least
LOADS = 3  # of the images of a step, that are timed


@dataclass(frozen=True)
class Pace:
    """How fast a training runs on this machine.

    choice        its precision, and why it is that one
    step_s        seconds of a step of the optimiser
    first_load_s  seconds to load a step's images that were not loaded before
    load_s        seconds to load those that were
    epoch         steps until each image was loaded once
    """

    choice: Choice
    step_s: float
    first_load_s: float
    load_s: float
    epoch: float

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
    """Tries the first steps of a training, on a copy of the network."""
    pictures = data.batch_size * recipe.accumulate
    module = SegmentationDataModule(replace(data, workers=0), 1 + LOADS, recipe.seed, 0, recipe.accumulate)
    loads = [bfloat16.take_turns([partial(next, iter(module.train_dataloader()))], LOADS)[0] for _ in range(2)]
    first_load_s, load_s = (statistics.median(some) if data.workers == 0 else 0.0 for some in loads)
    task = SegmentationTask(model, recipe, budget, pair(data.crop)).to("cuda" if torch.cuda.is_available() else "cpu")
    freeze_stages(model.backbone, recipe, recipe.iterations)  # as in most of the steps
    batch = task.transfer_batch_to_device(next(iter(module.train_dataloader())), task.device, 0)
    if recipe.precision == "auto":
        choice = choose_precision(task, batch)
    else:
        choice = Choice(recipe.precision, "as the recipe says")
    (step_s,) = [choice.step_s] if choice.step_s else step_seconds(task, batch, [choice.precision])
    return Pace(choice, statistics.median(step_s), first_load_s, load_s, len(module.train_data) / pictures)


def logged_every(recipe: Recipe, iterations: int) -> int:
    """A short run is logged more often than the recipe says: its loss is a curve, too."""
    return min(recipe.log_every, max(1, iterations // CURVE))


def fitted(recipe: Recipe, pace: Pace, seconds: float, validations: int) -> Recipe:
    """The recipe with as many iterations as fit into so many seconds, so many validations, a warm-up that is no more
    than a tenth of them, and enough rows of the log for a curve."""
    every = max(5, int(pace.iterations(seconds) / validations))
    return replace(
        recipe,
        iterations=every * validations,
        validate_every=every,
        log_every=logged_every(recipe, every * validations),
        warmup_steps=min(recipe.warmup_steps, every * validations // 10),
        precision=pace.choice.precision,
    )
