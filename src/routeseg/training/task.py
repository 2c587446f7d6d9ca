"""What a training step is: the batches of a step, their loss and gradients, the optimiser, what is logged.

A task says what the loss of a batch is, and what a validation measures: segmentation.py and classification.py.

Legend: B images, L depth, S scales.
    gates [B, L+1, S, 3]   activation of every edge, direction 0 up, 1 keep, 2 down
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from routeseg.collectives import rank_and_world, total
from routeseg.cost.macs import CostTable
from routeseg.model.grid import RoutedNetwork
from routeseg.training.batch_norm import Mode, norms_of
from routeseg.training.clock import Clock
from routeseg.training.fused import Fused
from routeseg.training.processes import TrainingStopped
from routeseg.training.recipe import FLOAT32, Precision, TrainingRecipe, lr_factor

ADAM_BETA = 0.999  # of the squares

Found = TypeVar("Found")  # what a validation measures: Evaluation, Accuracy


class NonFiniteLoss(TrainingStopped):
    """The loss or its gradient became nan or infinite."""


class Part(NamedTuple):
    """What one batch of a step gives.

    loss     its gradients, added up over the parts of a step and averaged over the processes, are those of the step's
             loss
    numbers  what is logged: this batch's share of each number of the step, scalars on the device. The shares add up
             over parts and processes; "loss" is one of them
    gates    [B, L+1, S, 3], without a gradient
    exits    where places left, if they did so (`Segmentation.exits`)
    """

    loss: Tensor
    numbers: dict[str, Tensor]
    gates: Tensor
    exits: Tensor | None = None


@dataclass(frozen=True)
class Validation(Generic[Found]):
    """What a validation tells.

    found      all that was measured
    score      the best network is the one with the highest
    logged     what is logged, by name
    candidate  whether this network may be the best one; if none ever may, the highest score counts
    """

    found: Found
    score: float
    logged: dict[str, float]
    candidate: bool = True


class RecipeTask(LightningModule, ABC, Generic[Found]):
    """A network that a recipe trains: an optimiser with the authors' groups and schedule, and an average of the weights
    if `ema_decay` asks for one.

    This class owns the loop over the `accumulate` batches of a step; a task supplies the loss of one of them.

    cost       the network's, at the size of the training crops
    precision  32-true or bf16-mixed; trial.py replaces it where the recipe leaves it to the machine
    clock      of a training that is given a time; None: it is given the recipe's iterations
    numbers    what the last steps found, by name; real_cost and skipped_images are those of the last step that was
               logged
    """

    labels_key: str  # of a batch; its images are "image", how many of them could not be read is "skipped"

    def __init__(self, model: RoutedNetwork, recipe: TrainingRecipe, cost: CostTable, batch_norm: Mode = "own") -> None:
        super().__init__()
        self.automatic_optimization = False  # a step has several batches
        model.train()  # one that was loaded is in evaluation mode, and Lightning leaves it there
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack memory_format
        if model.compute is None:
            model.compute = Fused()
        self.model, self.recipe, self.cost, self.batch_norm = model, recipe, cost, batch_norm
        self.precision: Precision = FLOAT32 if recipe.precision == "auto" else recipe.precision
        self.skipped = torch.zeros((), dtype=torch.int64)  # unreadable images of all processes, since they started
        self.numbers: dict[str, float] = {}
        self.clock: Clock | None = None
        self.average: AveragedModel | None = None
        if recipe.ema_decay:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
            self.average.requires_grad_(False)

    @abstractmethod
    def count(self, labels: Tensor) -> Tensor:
        """How many labels the loss is a mean over; a scalar on the device."""

    @abstractmethod
    def loss(self, result: Any, labels: Tensor, labels_in_step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and numbers of `Part`, from what the network gave for the images of one batch.

        `labels_in_step` is `count` over all batches of the step, of all processes.
        """

    @abstractmethod
    def validate(self, batches: Iterable[Any]) -> Validation[Found]:
        """Runs `network` over the validation data; in a job each process brings its share, and all get the result."""

    @property
    def network(self) -> RoutedNetwork:
        """What is validated and saved: the averaged network if there is one."""
        return self.model if self.average is None else cast(RoutedNetwork, self.average.module)

    @property
    def position(self) -> float:
        """How far the schedule is, 0 to `recipe.iterations`: the step, or with a clock the same share of the time."""
        return self.global_step if self.clock is None else self.clock.share * self.recipe.iterations

    @property
    def drop_path(self) -> float:
        """p of the scheduled drop path at this step."""
        return self.recipe.drop_path * self.position / self.recipe.iterations

    def on_train_start(self) -> None:
        """A run that goes on keeps the momenta of its gradients; the numbers are the recipe's, which may differ."""
        schedule, factor = cast(Any, self.lr_schedulers()), lr_factor(self.position, self.recipe)
        groups = parameter_groups(self.model, self.recipe)
        for group, given in zip(self._optimizer.param_groups, groups, strict=True):
            group["initial_lr"], group["lr"] = given["lr"], given["lr"] * factor
            group["weight_decay"] = given["weight_decay"]
            group |= momentum_of(self.recipe)
        schedule.base_lrs = [given["lr"] for given in groups]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if not self.norms_learn:
            for norm in norms_of(self.model):
                norm.eval()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """A step of the optimiser on `accumulate` batches, which come as one: image [accumulate*B,3,H,W]."""
        labels_in_step, skipped = total(torch.stack((self.count(batch[self.labels_key]), batch["skipped"].sum())))
        self._optimizer.zero_grad()
        parts = self.parts(batch, labels_in_step, self._add_gradients)
        self.skipped = self.skipped + skipped
        numbers = {name: torch.stack([found.numbers[name] for found in parts]).sum() for name in parts[0].numbers}
        is_logged = (self.global_step + 1) % self.recipe.log_every == 0  # as Lightning decides
        if is_logged:
            costs = np.concatenate([self.cost.of_result(found.gates, found.exits) for found in parts])
            real = costs.mean() / self.cost.full
            numbers["real_cost"] = torch.tensor(real / rank_and_world()[1], dtype=torch.float32, device=self.device)
        self._finish(numbers, is_logged)

    def parts(
        self, batch: dict[str, Tensor], labels_in_step: Tensor, backward: Callable[[Tensor, bool], None]
    ) -> list[Part]:
        """The losses of the batches of a step. Each is given to `backward`, with whether it is the last one."""
        count, (rank, _) = self.recipe.accumulate, rank_and_world()
        batches = zip(batch["image"].chunk(count), batch[self.labels_key].chunk(count), strict=True)
        found = []
        with self.autocast():
            for number, (images, labels) in enumerate(batches):
                self._seed(rank, number)
                found.append(self.part(images, labels, labels_in_step))
                backward(found[-1].loss, number == count - 1)
        return found

    def autocast(self) -> AbstractContextManager:
        """In this block operations run in `precision`."""
        if self.precision == FLOAT32:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def part(self, images: Tensor, labels: Tensor, labels_in_step: Tensor) -> Part:
        """The loss of one batch of a step: images [B,3,H,W] and their labels."""
        images_last = images.contiguous(memory_format=torch.channels_last)
        result = self.model(images_last, drop_path=self.drop_path, coarse=True, **self.asked(len(images)))
        loss, numbers = self.loss(result, labels, labels_in_step)
        detached = {name: value.detach() for name, value in numbers.items()}
        return Part(loss, detached, result.gates.detach(), getattr(result, "exits", None))

    def asked(self, images: int) -> dict[str, Any]:
        """What the forward of a batch of a step is asked besides."""
        return {}

    @property
    def places_leave(self) -> bool:
        """Whether places of the images leave at this step (model/places.py)."""
        return False

    @property
    def norms_learn(self) -> bool:
        """Whether BatchNorm takes the statistics of the batches at this step: these must not mix places that have left
        with those that run."""
        return self.batch_norm != "frozen" and not self.places_leave

    def _seed(self, rank: int, part: int) -> None:
        """What a batch of a step draws at random depends on these alone, so that a resumed run draws the same."""
        numbers = (self.recipe.seed, self.global_step, rank, part)
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))

    def _add_gradients(self, loss: Tensor, is_last: bool) -> None:
        """Backward of one batch of a step. A process keeps its gradients to itself until the last one."""
        strategy = self.trainer.strategy
        here: AbstractContextManager = nullcontext()
        if not is_last and isinstance(strategy, ParallelStrategy):
            here = strategy.block_backward_sync()
        with here:
            self.manual_backward(loss)

    def _finish(self, numbers: dict[str, Tensor], is_logged: bool) -> None:
        """Clips the gradients, moves the weights, their average and the schedule on, and logs.

        Raises NonFiniteLoss, in all processes, if the loss or the gradient is nan or infinite.
        """
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        sums = total(torch.stack(list(numbers.values())))
        *values, norm_value = torch.cat((sums, norm[None])).tolist()  # the one time that a step waits for the device
        found = dict(zip(numbers, values, strict=True))
        for what, value in (("the loss", found["loss"]), ("the gradient", norm_value)):
            if not math.isfinite(value):  # before the step: the weights stay good
                raise NonFiniteLoss(self._diagnosis(what))
        if is_logged:
            found["skipped_images"] = float(self.skipped)
            self.log_dict(found | {"lr": self._lr})
        self.numbers.update(found)
        self._optimizer.step()
        if self.clock is not None:
            self.clock.tick()
        cast(Any, self.lr_schedulers()).step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        at = (lambda step: step) if self.clock is None else (lambda step: self.position)
        optimizer, schedule = optimizer_of(self.model, self.recipe, at)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def _optimizer(self) -> Any:
        return self.optimizers()

    @property
    def _lr(self) -> float:
        return self._optimizer.param_groups[0]["lr"]

    def _diagnosis(self, what: str) -> str:
        return (
            f"{what} became nan or infinite at step {self.global_step}, learning rate {self._lr:.3g}. "
            "The last checkpoint, if one was written, is kept. "
            f"Try a lower --recipe.lr (now {self.recipe.lr:g}; it should shrink with the batch size), a longer "
            "--recipe.warmup_steps, or --recipe.precision 32-true, and go on from that checkpoint with --resume"
        )


def optimizer_of(
    model: RoutedNetwork, recipe: TrainingRecipe, position: Callable[[int], float] = lambda step: step
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """The optimiser of a recipe, and the schedule of its learning rates, which is at this position after so many
    steps."""
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.SGD
    groups = [group | momentum_of(recipe) for group in parameter_groups(model, recipe)]
    optimizer = kind(groups, lr=recipe.lr)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(position(step), recipe))


def momentum_of(recipe: TrainingRecipe) -> dict[str, Any]:
    """The recipe's momentum, as a group of its optimiser has it."""
    return {"betas": (recipe.momentum, ADAM_BETA)} if recipe.optimizer == "adamw" else {"momentum": recipe.momentum}


def parameter_groups(model: RoutedNetwork, recipe: TrainingRecipe) -> list[dict[str, Any]]:
    """The parameters by kind: norm weights do not decay, and gates and the stages of a backbone have learning rates of
    their own."""
    backbone: Iterable[nn.Parameter] = () if model.backbone is None else model.backbone.stages.parameters()
    kinds = {id(parameter): 1 for parameter in model.gate_parameters()} | {id(parameter): 2 for parameter in backbone}
    factors = (1.0, recipe.gate_lr_factor, getattr(recipe, "backbone_lr_factor", 1.0))
    groups: dict[tuple[bool, int], list[nn.Parameter]] = {}
    for module in model.modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        for parameter in module.parameters(recurse=False):
            groups.setdefault((is_norm, kinds.get(id(parameter), 0)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if is_norm else recipe.weight_decay, "lr": recipe.lr * factors[kind]}
        for (is_norm, kind), parameters in sorted(groups.items())
    ]
