"""Steps of a training, tried on a copy of its network: how long they take, and in which precision they are faster."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from routeseg import bfloat16, stopwatch
from routeseg.collectives import gather, total
from routeseg.training.recipe import BFLOAT16, FLOAT32, Precision
from routeseg.training.task import RecipeTask, parameter_groups

PATIENCE_S = 6.0  # of a trial: a tenth of the shortest training that --minutes asks for


@dataclass(frozen=True)
class PrecisionChoice:
    """The precision of a training, why it is that one, and the seconds of each step that was tried in it."""

    precision: Precision
    reason: str
    step_s: Sequence[float] = ()

    def __str__(self) -> str:
        return f"precision: {self.precision} ({self.reason})"


def choose_precision(task: RecipeTask, batch: dict[str, Tensor]) -> PrecisionChoice:
    """The precision in which this machine is faster at the steps of a task; `batch` has the images of a step.

    The processes of a job call it together: they try the same steps, and the clock of the first one decides.
    """
    if task.device.type != "cpu":
        if gather(bfloat16.on_gpu(task.device))[0]:
            return PrecisionChoice(BFLOAT16, "this GPU computes in bfloat16")
        return PrecisionChoice(FLOAT32, "this GPU does not compute in bfloat16")
    ratio, words = gather((bfloat16.product_ratio(), bfloat16.product_words()))[0]
    if ratio >= 1:
        return PrecisionChoice(FLOAT32, words)
    float32_s, bfloat16_s = gather(step_seconds(task, batch, (FLOAT32, BFLOAT16)))[0]
    in_float32, in_bfloat16 = min(float32_s), min(bfloat16_s)
    if bfloat16.pays(in_float32, in_bfloat16):
        return PrecisionChoice(BFLOAT16, f"a step takes {in_bfloat16:.3g} s, in float32 {in_float32:.3g} s", bfloat16_s)
    return PrecisionChoice(FLOAT32, f"a step takes {in_float32:.3g} s, in bfloat16 {in_bfloat16:.3g} s", float32_s)


def step_seconds(task: RecipeTask, batch: dict[str, Tensor], precisions: Sequence[Precision]) -> list[list[float]]:
    """The seconds of some steps with this batch, in each precision: loss, gradients, their clipping, the optimiser.
    They are few if steps are long, and if one precision is clearly slower it is tried no more.

    Afterwards the task, its network and the random numbers to come are as they were.
    """
    network, precision = task.model, task.precision
    task.model = copy.deepcopy(network)
    groups = [group | {"lr": 0.0} for group in parameter_groups(task.model, task.recipe)]
    optimizer = torch.optim.SGD(groups, momentum=task.recipe.momentum)
    try:
        with torch.random.fork_rng(devices=[]):
            task.on_train_batch_start(batch, 0)
            steps = [partial(_step, task, batch, optimizer, one) for one in precisions]
            # All processes of a job make the same steps, by the clock of the first one.
            return stopwatch.take_turns(steps, patience_s=PATIENCE_S, agreed=lambda seconds: gather(seconds)[0])
    finally:
        task.model, task.precision = network, precision


def _step(task: RecipeTask, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, precision: Precision) -> None:
    task.precision = precision
    optimizer.zero_grad()
    task.parts(batch, total(task.count(batch[task.labels_key])), lambda loss, _: loss.backward())
    nn.utils.clip_grad_norm_(task.model.parameters(), task.recipe.clip_norm).item()  # waits for a GPU, as a step does
    optimizer.step()


class SettlePrecision(Callback):
    """Before the first step of a run: its precision. A checkpoint keeps it, so that the run goes on in the same."""

    state_key = "precision"

    def __init__(self) -> None:
        self.kept: Precision | None = None  # by the checkpoint
        self.settled: Precision | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"precision": self.settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = state["precision"]

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Also for a run that has no step left to do."""
        task = cast(RecipeTask, module)
        if task.recipe.precision == "auto" and self.kept is not None:
            task.precision = self.kept

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.settled is not None:
            return
        task = cast(RecipeTask, module)
        if task.recipe.precision == "auto":
            choice = PrecisionChoice(self.kept, "as the run began") if self.kept else choose_precision(task, batch)
            task.precision = choice.precision
            if trainer.is_global_zero:
                print(choice)
        self.settled = task.precision
        on_cpu = task.device.type == "cpu" and trainer.is_global_zero
        if self.settled == BFLOAT16 and on_cpu and bfloat16.product_ratio() > 1:
            logging.getLogger("routeseg").warning(
                "bf16-mixed is slow here: %s. --recipe.precision 32-true is faster", bfloat16.product_words()
            )
