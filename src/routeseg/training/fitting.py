"""Training of any network by a recipe: optimiser, processes, the folder of the run, around Lightning's loop.

What a step computes is a task's: see segmentation.py and classification.py. One process, or several under torchrun or
`devices`: see processes.py, and docs/training.md for how it is started.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import lightning
import numpy as np
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from routeseg.files import check_writable
from routeseg.model.grid import RoutedNetwork
from routeseg.training.batch_norm import Mode, check_enough_values, choose_mode, norms_of
from routeseg.training.callbacks import RESUME_FILE, RUN_STATE, Progress, ValidateAndSave
from routeseg.training.processes import (
    LOST,
    TIMEOUT,
    ProcessLost,
    TrainingStopped,
    connection_lost,
    count_processes,
    ending_together,
)
from routeseg.training.recipe import Recipe, lr_factor


class NonFiniteLoss(TrainingStopped):
    """The loss or its gradient became nan or infinite."""


class RecipeTask(LightningModule):
    """A network that a recipe trains: SGD with the authors' groups and schedule, an average of the weights if asked.

    A task says what a step computes: its `training_step` brings the gradients of `recipe.accumulate` batches together
    (`seed_part`, `add_gradients`), checks the loss, and ends with `finish_step`.
    """

    def __init__(self, model: RoutedNetwork, recipe: Recipe, batch_norm: Mode = "own", first_step: int = 0) -> None:
        super().__init__()
        self.automatic_optimization = False  # a step has several batches
        self.model, self.recipe, self.batch_norm, self.first_step = model, recipe, batch_norm, first_step
        self.skipped_images = 0  # unreadable ones, of all processes, since these started
        self.average: AveragedModel | None = None
        if recipe.ema_decay:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
            self.average.requires_grad_(False)

    @property
    def network(self) -> RoutedNetwork:
        """What is validated and saved: the averaged network where there is one."""
        return self.model if self.average is None else cast(RoutedNetwork, self.average.module)

    def on_train_start(self) -> None:
        if self.global_step != self.first_step:
            raise ValueError(
                f"{RESUME_FILE} counts its steps in another way (written by an older version): start the run anew"
            )
        self._follow_recipe()

    def _follow_recipe(self) -> None:
        """A run that goes on keeps the momenta of its gradients; the numbers are the recipe's, which may differ."""
        schedule, factor = cast(Any, self.lr_schedulers()), lr_factor(self.first_step, self.recipe)
        groups = parameter_groups(self.model, self.recipe)
        for group, given in zip(self._optimizer.param_groups, groups, strict=True):
            group["initial_lr"], group["lr"] = given["lr"], given["lr"] * factor
            group["weight_decay"], group["momentum"] = given["weight_decay"], self.recipe.momentum
        schedule.base_lrs = [given["lr"] for given in groups]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.batch_norm == "frozen":
            for norm in norms_of(self.model):
                norm.eval()

    @property
    def drop_path(self) -> float:
        """p of the scheduled drop path at this step."""
        return self.recipe.drop_path * self.global_step / self.recipe.iterations

    def seed_part(self, rank: int, part: int) -> None:
        """To be called before each batch of a step: what it draws at random depends on these alone, so that a resumed
        run draws the same."""
        numbers = (self.recipe.seed, self.global_step, rank, part)
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))

    def check_loss(self, loss: Tensor) -> None:
        """Raises NonFiniteLoss; to be called with the same number in every process, so that all of them stop."""
        if not torch.isfinite(loss):
            raise NonFiniteLoss(self._diagnosis("the loss"))

    def add_gradients(self, loss: Tensor, is_last: bool) -> None:
        """Backward of one batch of a step. Until the last one a process keeps its gradients to itself."""
        strategy = self.trainer.strategy
        here: AbstractContextManager = nullcontext()
        if not is_last and isinstance(strategy, ParallelStrategy):
            here = strategy.block_backward_sync()
        with here:
            self.manual_backward(loss)

    def finish_step(self, logged: dict[str, Tensor], images: int, skipped: int) -> None:
        """Clips the gradients, logs, and moves the weights, their average and the schedule on.

        Raises NonFiniteLoss where the gradient is no number.
        """
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        if not torch.isfinite(norm):  # before the step: the weights stay good
            raise NonFiniteLoss(self._diagnosis("the gradient"))
        self.log_dict(logged, prog_bar=True, batch_size=images)
        self.log("lr", self._lr)
        self.skipped_images += skipped
        self.log("skipped_images", float(self.skipped_images), prog_bar=True)
        self._optimizer.step()
        cast(Any, self.lr_schedulers()).step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(
            parameter_groups(self.model, self.recipe), lr=self.recipe.lr, momentum=self.recipe.momentum
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, self.recipe))
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


def parameter_groups(model: RoutedNetwork, recipe: Recipe) -> list[dict[str, Any]]:
    """Norm weights without decay, gates with their own learning rate, and the rest."""
    gates = {id(parameter) for parameter in model.gate_parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for module in model.modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        for parameter in module.parameters(recurse=False):
            groups.setdefault((is_norm, id(parameter) in gates), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_norm else recipe.weight_decay,
            "lr": recipe.lr * (recipe.gate_lr_factor if is_gate else 1.0),
        }
        for (is_norm, is_gate), parameters in sorted(groups.items())
    ]


@dataclass(frozen=True)
class Before:
    """What an interrupted run tells about itself."""

    step: int = 0
    images_per_step: int | None = None


@dataclass(frozen=True)
class Run:
    """A training that is about to start, or to go on: its folder, its processes, and where it goes on from."""

    model: RoutedNetwork
    recipe: Recipe
    output: Path
    resume: bool
    accelerator: str
    processes: int  # on this machine
    machines: int
    batch_norm: Mode
    images_per_step: int
    before: Before

    @classmethod
    def begin(
        cls,
        model: RoutedNetwork,
        recipe: Recipe,
        output: Path,
        batch_size: int,
        crop: tuple[int, int],
        resume: bool = False,
        devices: int | Literal["auto"] = "auto",
        accelerator: str = "auto",
    ) -> Run:
        """Checks what was asked for, makes the folder, seeds, and makes the network ready. Raises as `train` does."""
        on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        processes, machines = count_processes(devices, on_gpu)
        world = processes * machines
        batch_norm = choose_mode(recipe.batch_norm, on_gpu, world)
        if batch_norm != "frozen":
            check_enough_values(model, crop, batch_size * (world if batch_norm == "synced" else 1))
        before = _prepare_output(output, model, recipe, resume)
        lightning.seed_everything(recipe.seed, workers=True, verbose=False)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack memory_format
        if recipe.compile:
            compile_parts(model)
        return cls(
            model, recipe, output, resume, accelerator, processes, machines, batch_norm,
            batch_size * world * recipe.accumulate, before,
        )  # fmt: skip

    def fit(
        self, task: RecipeTask, data: LightningDataModule, saver: ValidateAndSave, progress: bool = True
    ) -> tuple[Trainer, float]:
        """Trains; afterwards the network is the one in OUTPUT/last. Returns the trainer, and the seconds it took."""
        recipe, output, several = self.recipe, self.output, self.processes * self.machines > 1
        try:
            trainer = Trainer(
                max_steps=recipe.iterations,
                max_epochs=-1,
                accelerator=self.accelerator,
                devices=self.processes,
                num_nodes=self.machines,
                strategy=_several_processes() if several else "auto",
                precision=recipe.precision,
                sync_batchnorm=self.batch_norm == "synced" and several,
                use_distributed_sampler=False,
                limit_val_batches=0,
                num_sanity_val_steps=0,
                log_every_n_steps=recipe.log_every,
                logger=[
                    CSVLogger(output, name="logs", flush_logs_every_n_steps=recipe.log_every),
                    TensorBoardLogger(output, name="tensorboard", version=""),
                ],
                callbacks=[saver, *([Progress()] if progress else [])],
                enable_progress_bar=progress,
                enable_checkpointing=False,
                enable_model_summary=False,
                default_root_dir=output,
            )
        except MisconfigurationException as error:
            raise ValueError(f"--accelerator {self.accelerator}: {error}") from error
        if trainer.is_global_zero:
            world, count = self.processes * self.machines, recipe.accumulate
            print(
                f"{self.images_per_step} images a step ({self.images_per_step // (world * count)} x {world} processes "
                f"x {count} accumulated), learning rate {recipe.lr:g}"
            )
        if self.before.images_per_step not in (None, self.images_per_step) and trainer.is_global_zero:
            print(
                f"note: this run took {self.before.images_per_step} images a step so far, and takes "
                f"{self.images_per_step} from here on. Its schedule counts steps, and --recipe.lr {recipe.lr:g} stays: "
                "scale it with the images of a step"
            )
        start = time.monotonic()
        with ending_together(lambda: getattr(trainer.strategy.launcher, "procs", ())) if several else nullcontext():
            try:
                checkpoint = output / RESUME_FILE if self.resume else None
                trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            except RuntimeError as error:
                if several and not isinstance(error, TrainingStopped) and connection_lost(error):
                    raise ProcessLost(LOST) from error
                raise
            except SystemExit as stop:
                if trainer.interrupted:  # Lightning takes Ctrl-C, and exits without a word
                    raise KeyboardInterrupt from stop
                raise
        self.model.load_state_dict(task.network.state_dict())
        return trainer, time.monotonic() - start


def _several_processes() -> DDPStrategy:
    return DDPStrategy(
        find_unused_parameters=True,  # a dropped cell has no gradient
        broadcast_buffers=False,  # BatchNorm's statistics: see batch_norm.py
        timeout=TIMEOUT,
    )


def compile_parts(model: RoutedNetwork) -> None:
    """torch.compile for every cell, gate and transform; the routing between them stays plain Python."""
    parts: list[nn.Module] = [part for name, part in model.named_children() if name not in ("normalize", "nodes")]
    for layer, scale in model.route.nodes:
        node = model.node(layer, scale)
        parts += [node.cell, *node.transforms.values(), *([node.gate] if node.gate is not None else [])]
    for part in parts:
        part.compile()


def _prepare_output(output: Path, model: RoutedNetwork, recipe: Recipe, resume: bool) -> Before:
    """Makes the folder; returns where the run goes on from."""
    path = output / RESUME_FILE
    check_writable(output)
    if not resume:
        if path.exists():
            raise ValueError(f"{output} already holds a run: go on with it with --resume, or choose another --output")
        return Before()
    if not path.exists():
        raise ValueError(f"nothing to resume: {path} does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        step = int(checkpoint["global_step"])
        averaged = any(name.startswith("average.") for name in checkpoint["state_dict"])
        shapes = {name: list(value.shape) for name, value in checkpoint["state_dict"].items()}
        saved = checkpoint["callbacks"][RUN_STATE].get("images_per_step")
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(f"{path} is damaged or no checkpoint of a run: {error}") from error
    if averaged != bool(recipe.ema_decay):
        had = "an average of its weights" if averaged else "no average of its weights"
        raise ValueError(f"the run in {output} keeps {had}: resume it with the --recipe.ema_decay that it had")
    there = {name.removeprefix("model."): shape for name, shape in shapes.items() if name.startswith("model.")}
    here = {name: list(value.shape) for name, value in model.state_dict().items()}
    for name in [*here, *there]:
        if there.get(name) != here.get(name):
            raise ValueError(
                f"the run in {output} has another network: {name} is {there.get(name, 'missing')} there, and "
                f"{here.get(name, 'missing')} here. Resume it with the configuration that it had (model and data)"
            )
    return Before(step, saved)
