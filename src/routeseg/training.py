"""Training: loss, optimiser groups and schedules (the authors' recipe), around Lightning's loop.

Legend: B images, K classes, H, W crop size.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from routeseg.cost import Budget, budget_loss, model_cost
from routeseg.data.datamodule import DataConfig, SegmentationDataModule, pair
from routeseg.data.transforms import IGNORE
from routeseg.engine import SkipEngine
from routeseg.evaluation import Evaluation, evaluate
from routeseg.files import check_writable
from routeseg.model import DynamicRoutingNetwork
from routeseg.model.layers import running_statistics

RESUME_FILE = "last.ckpt"
BEST_FOLDER, LAST_FOLDER = "best", "last"
SHOWN = (  # in the progress bar: what is logged, its name there, its factor
    ("loss", "loss", 1),
    ("budget_loss", "budget", 1),
    ("expected_cost", "exp%", 100),
    ("real_cost", "real%", 100),
    ("val_miou", "mIoU%", 100),
    ("skipped_images", "skipped", 1),
)


@dataclass
class Recipe:
    """The `recipe` section of a configuration; the defaults are the authors' for Cityscapes from scratch.

    lr, momentum, weight_decay   SGD; norm weights do not decay
    gate_lr_factor               the gates' learning rate, as a multiple (2.5 from ImageNet weights)
    poly_power, warmup_steps, warmup_factor   lr * (1 - step / iterations)^power after a linear warm-up
    clip_norm                    of all gradients together
    drop_path                    p of the scheduled drop path at the last layer and the last step
    precise_bn_batches           BatchNorm statistics are estimated anew from so many batches before an evaluation
    validate_every, save_every   in iterations
    precision                    "32-true" or "bf16-mixed"
    compile                      torch.compile the parts of the network
    """

    iterations: int = 190_000
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    gate_lr_factor: float = 1.0
    poly_power: float = 0.9
    warmup_steps: int = 1000
    warmup_factor: float = 0.001
    clip_norm: float = 5.0
    drop_path: float = 0.0
    precise_bn_batches: int = 200
    validate_every: int = 5000
    save_every: int = 1000
    log_every: int = 20
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("iterations", "validate_every", "save_every", "log_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"recipe.{key} is {getattr(self, key)}: it must be at least 1")
        if not self.lr > 0:
            raise ValueError(f"recipe.lr is {self.lr}: it must be positive")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"recipe.drop_path is {self.drop_path}: it must be at least 0 and below 1")


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became nan or infinite."""


class SegmentationTask(LightningModule):
    """Cross-entropy plus budget (Eq. 10), SGD with the authors' groups and schedule."""

    def __init__(self, model: DynamicRoutingNetwork, recipe: Recipe, budget: Budget, crop: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.recipe, self.budget = model, recipe, budget
        self.cost = model_cost(model, crop)
        self.skipped_images = 0  # unreadable ones, since this process started

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Whatever a step draws at random depends on (seed, step) alone, so that a resumed run draws the same.
        torch.manual_seed((self.recipe.seed << 32) + (self.global_step << 8) + self.global_rank)
        self.model.drop_path = self.recipe.drop_path * self.global_step / self.recipe.iterations

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        result = self.model(images)
        cross_entropy = segmentation_loss(result.logits.float(), batch["labels"])
        expected = self.cost.expected(result.gates)
        budget = budget_loss(expected, self.cost.budgeted, self.budget.target)
        weight = self.budget.weight_at(self.global_step / self.recipe.iterations)
        loss = cross_entropy + weight * budget  # Eq. 10
        if not torch.isfinite(loss):
            raise NonFiniteLoss(self._diagnosis("the loss"))
        self.log_dict(
            {
                "loss": loss.detach(),
                "cross_entropy": cross_entropy.detach(),
                "budget_loss": budget.detach(),
                "expected_cost": expected.detach().mean() / self.cost.budgeted,
                "real_cost": self.cost.of_gates(result.gates).mean() / self.cost.full,
            },
            prog_bar=True,
            batch_size=len(images),
        )
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.skipped_images += int(batch["skipped"].sum())
        self.log("skipped_images", float(self.skipped_images), prog_bar=self.skipped_images > 0)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(
            parameter_groups(self.model, self.recipe), lr=self.recipe.lr, momentum=self.recipe.momentum
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, self.recipe))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        if not torch.isfinite(norm):  # before the step: the weights stay good
            raise NonFiniteLoss(self._diagnosis("the gradient"))

    def _diagnosis(self, what: str) -> str:
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        return (
            f"{what} became nan or infinite at step {self.global_step}, learning rate {lr:.3g}. "
            "The last checkpoint is kept. "
            f"Try a lower --recipe.lr (now {self.recipe.lr:g}; it should shrink with the batch size), a longer "
            "--recipe.warmup_steps, or --recipe.precision 32-true, and --resume from the last checkpoint"
        )


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [B,K,H,W] and labels [B,H,W], over the pixels that have a label (0 where none has)."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / (labels != IGNORE).sum().clamp(min=1)


def parameter_groups(model: DynamicRoutingNetwork, recipe: Recipe) -> list[dict[str, Any]]:
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


def lr_factor(step: int, recipe: Recipe) -> float:
    """Poly decay with a linear warm-up from `warmup_factor`."""
    poly = (1.0 - min(step, recipe.iterations) / recipe.iterations) ** recipe.poly_power
    if step >= recipe.warmup_steps:
        return poly
    share = step / recipe.warmup_steps
    return poly * (recipe.warmup_factor * (1 - share) + share)


@torch.no_grad()
def precise_batch_norm(model: DynamicRoutingNetwork, batches: Iterable[dict[str, Tensor]]) -> None:
    """Sets BatchNorm's statistics to their mean over these batches, instead of a running mean over training."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    device, was_training, drop_path = next(model.parameters()).device, model.training, model.drop_path
    momenta = [norm.momentum for norm in norms]
    before = [(mean.clone(), variance.clone()) for mean, variance in map(running_statistics, norms)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
    model.drop_path = 0.0
    model.train()
    for batch in batches:
        model(batch["image"].to(device))
    for norm, momentum, kept in zip(norms, momenta, before, strict=True):
        norm.momentum = momentum
        if not norm.num_batches_tracked:  # a node that no picture reached keeps what it had
            for statistic, value in zip(running_statistics(norm), kept, strict=True):
                statistic.copy_(value)
    model.train(was_training)
    model.drop_path = drop_path


class ValidateAndSave(Callback):
    """Every `validate_every` steps: precise BatchNorm, validation, the best network. Every `save_every`: the run.

    The best is the one of the highest mIoU since the budget is at its full weight.

    Writes OUTPUT/last.ckpt (to resume from), OUTPUT/best and OUTPUT/last (networks, with `routeseg.load`).
    """

    def __init__(self, output: Path, recipe: Recipe, data: SegmentationDataModule) -> None:
        self.output, self.recipe, self.data = output, recipe, data
        self.best_miou, self.best_settled = -1.0, False
        self.latest: Evaluation | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best_miou": self.best_miou, "best_settled": self.best_settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_miou, self.best_settled = state["best_miou"], state["best_settled"]

    def on_train_batch_end(self, trainer: Trainer, task: LightningModule, *args: Any) -> None:
        assert isinstance(task, SegmentationTask)
        step = trainer.global_step
        if step % self.recipe.validate_every == 0 or step == self.recipe.iterations:
            self._validate(trainer, task)
            self._save(trainer, task)
        elif step % self.recipe.save_every == 0:
            self._save(trainer, task)

    def _validate(self, trainer: Trainer, task: SegmentationTask) -> None:
        data, model, step = self.data, task.model, trainer.global_step
        if self.recipe.precise_bn_batches:
            with trainer.precision_plugin.forward_context():
                precise_batch_norm(model, data.norm_dataloader(step, self.recipe.precise_bn_batches))
        result = evaluate(model, data.val_dataloader(), SkipEngine(model))
        self.latest = result
        scores = {"val_miou": result.miou, "val_cost": float((result.cost_macs / result.full_macs).mean())}
        for logger in trainer.loggers:
            logger.log_metrics(scores, step)
        task.log_dict(scores, prog_bar=True, logger=False)
        # A network that does not yet keep the budget is no candidate once there are others.
        settled = step >= (task.budget.start + task.budget.ramp) * self.recipe.iterations or not task.budget.weight
        if trainer.is_global_zero and (result.miou > self.best_miou or settled > self.best_settled):
            self.best_miou, self.best_settled = result.miou, settled
            model.save(self.output / BEST_FOLDER)

    def _save(self, trainer: Trainer, task: SegmentationTask) -> None:
        scratch, target = self.output / f".{RESUME_FILE}.tmp", self.output / RESUME_FILE
        trainer.save_checkpoint(scratch)
        if trainer.is_global_zero:
            os.replace(scratch, target)
            task.model.save(self.output / LAST_FOLDER)


class Progress(RichProgressBar):
    """One line: step, rate, loss, budget loss, expected and real cost in percent, and the last validation mIoU."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "train"  # a run is one long epoch

    def get_metrics(self, trainer: Trainer, task: LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        values = {key: float(value) for key, value in trainer.progress_bar_metrics.items()}
        shown: dict[str, int | str | float | dict[str, float]] = {}
        for key, name, factor in SHOWN:
            if key in values:
                shown[name] = f"{factor * values[key]:.{0 if factor == 100 else 3}f}"
        return shown


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
    devices: int | str = "auto",
    accelerator: str = "auto",
) -> TrainingResult:
    """Trains the network and writes checkpoints and logs into `output`.

    With `resume` the run goes on from OUTPUT/last.ckpt and ends, on one CPU process, with the very weights of a run
    that was never interrupted. Raises ValueError for a folder that already holds a run (unless resuming), or cannot
    be written, for a budget without gates, and NonFiniteLoss.
    """
    if budget.weight and not model.gated:
        raise ValueError(
            "a network without gates cannot keep a budget: set --budget.weight 0, or --model.gate soft to give it gates"
        )
    first_step = _prepare_output(output, resume)
    lightning.seed_everything(recipe.seed, workers=True, verbose=False)
    module = SegmentationDataModule(data, recipe.iterations, recipe.seed, first_step)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack memory_format
    if recipe.compile:
        compile_parts(model)
    saver = ValidateAndSave(output, recipe, module)
    several = (torch.cuda.device_count() if devices == "auto" else int(devices)) > 1
    trainer = Trainer(
        max_steps=recipe.iterations,
        max_epochs=-1,
        accelerator=accelerator,
        devices=devices,
        strategy="ddp_find_unused_parameters_true" if several else "auto",  # a dropped cell has no gradient
        precision=recipe.precision,
        sync_batchnorm=torch.cuda.is_available(),
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
    task = SegmentationTask(model, recipe, budget, pair(data.crop))
    start = time.monotonic()
    trainer.fit(task, datamodule=module, ckpt_path=output / RESUME_FILE if resume else None, weights_only=True)
    return TrainingResult(saver.latest, output, time.monotonic() - start, trainer)


def compile_parts(model: DynamicRoutingNetwork) -> None:
    """torch.compile for every cell, gate and transform; the routing between them stays plain Python."""
    parts: list[nn.Module] = [model.stem, model.decoder]
    for layer, scale in model.route.nodes:
        node = model.node(layer, scale)
        parts += [node.cell, *node.transforms.values(), *([node.gate] if node.gate is not None else [])]
    for part in parts:
        part.compile()


def _prepare_output(output: Path, resume: bool) -> int:
    """Makes the folder; returns the step to go on from."""
    checkpoint = output / RESUME_FILE
    check_writable(output)
    if not resume:
        if checkpoint.exists():
            raise ValueError(f"{output} already holds a run: go on with it with --resume, or choose another --output")
        return 0
    if not checkpoint.exists():
        raise ValueError(f"nothing to resume: {checkpoint} does not exist")
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(f"{checkpoint} is damaged or no checkpoint of a run: {error}") from error
