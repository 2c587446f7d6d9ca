"""What happens beside the steps of a training: validation and its line, checkpoints, the progress bar."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar
from torch import Tensor

from routeseg.budgets.calibration import calibrate
from routeseg.data.classification_loaders import ClassificationDataModule
from routeseg.data.datamodule import SegmentationDataModule
from routeseg.data.subset import OFFSET_IMAGES
from routeseg.files import RESUME_FILE, not_written
from routeseg.model.grid import RoutedNetwork
from routeseg.training import clock as clocks
from routeseg.training.batch_norm import average_statistics, precise_batch_norm
from routeseg.training.clock import Clock
from routeseg.training.offsets import fit_offsets, shifted
from routeseg.training.recipe import Recipe, TrainingRecipe
from routeseg.training.task import RecipeTask, Validation

log = logging.getLogger("routeseg")
BEST_FOLDER, LAST_FOLDER = "best", "last"
RUN_STATE = "run"  # where a checkpoint keeps what ValidateAndSave knows
SHOWN = (  # in the progress bar: a number of the task, its name there, its factor
    ("loss", "loss", 1),
    ("budget_loss", "budget", 1),
    ("expected_cost", "exp%", 100),
    ("real_cost", "real%", 100),
    ("val_miou", "mIoU%", 100),
    ("val_top1", "top1%", 100),
    ("skipped_images", "skipped", 1),
)
VALIDATED = {  # in the line of a validation: what it logged, and how it says so
    "val_miou": "mIoU {:.1f} %",
    "val_top1": "top-1 {:.1f} %",
    "val_top5": "top-5 {:.1f} %",
    "val_cost": "cost {:.1f} % of full",
}


class ValidateAndSave(Callback):
    """Every `validate_every` steps: precise BatchNorm, offsets of classes, calibration of exits, validation, the best
    network. Every `save_every`: the run.

    The best network is the one with the highest score among the candidates (see `Validation`). With `ema_decay` the
    averaged network is validated and saved. Offsets are in what is validated and saved, not in what learns. With
    `tells` each validation is a line on the console.

    Writes OUTPUT/last.ckpt (to resume from), OUTPUT/best and OUTPUT/last (networks, with `routeseg.load`).
    """

    def __init__(
        self,
        output: Path,
        recipe: TrainingRecipe,
        data: SegmentationDataModule | ClassificationDataModule,
        first_step: int,
        images_per_step: int,
        tells: bool = True,
        clock: Clock | None = None,
        seconds_before: float = 0.0,
        meaning: dict[str, Any] | None = None,
    ) -> None:
        self.output, self.recipe, self.data, self.tells = output, recipe, data, tells
        self.first_step, self.images_per_step = first_step, images_per_step
        self.clock, self.seconds_before, self.meaning = clock, seconds_before, meaning
        self.best_score, self.best_is_candidate, self.best_step = -1.0, False, 0
        self.started = clocks.now()
        self.latest: Validation | None = None
        self.offsets: list[Tensor] | None = None
        self.statistics_stay: bool = False  # those of BatchNorm, since places leave
        self.saved_step = first_step

    @property
    def state_key(self) -> str:
        return RUN_STATE

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_score": self.best_score,
            "best_settled": self.best_is_candidate,
            "best_step": self.best_step,
            "images_per_step": self.images_per_step,
            "offsets": self.offsets,
            "statistics_stay": self.statistics_stay,
            "seconds": self.seconds,
            "clock": None if self.clock is None else self.clock.state_dict(),
            "meaning": self.meaning,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_score, self.best_is_candidate = state["best_score"], state["best_settled"]
        self.best_step = state.get("best_step", 0)  # older runs did not keep it
        self.offsets, self.statistics_stay = state.get("offsets"), state.get("statistics_stay", False)

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between its parts."""
        return self.seconds_before + clocks.now() - self.started

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step != self.first_step:
            raise ValueError(
                f"{self.output / RESUME_FILE} counts its steps in another way (an older version wrote it): start the "
                "run anew"
            )
        if self.first_step == 0:  # a network whose places leave from the first step on keeps those that it came with
            self.statistics_stay = cast(RecipeTask, module).places_leave
        self.started = clocks.now()
        if self.clock is not None:
            self.clock.begin()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        task, step = cast(RecipeTask, module), trainer.global_step
        if task.places_leave and not self.statistics_stay:
            self._set_statistics(task, task.model, step)
            self.statistics_stay = True
        if self.clock is None:
            validates = step % self.recipe.validate_every == 0 or step == self.recipe.iterations
        else:
            validates, trainer.should_stop = self.clock.validates, trainer.should_stop or self.clock.over
        if validates or step % self.recipe.save_every == 0:
            self._write(trainer, task, validates)

    def _write(self, trainer: Trainer, task: RecipeTask, validates: bool) -> None:
        if task.batch_norm == "own":  # the running statistics differ between processes: their mean is saved
            for network in dict.fromkeys((task.model, task.network)):  # in every process in this order
                average_statistics(network)
        if validates:
            self._save_network(trainer, task)  # first: whatever a validation meets, the weights are there
            try:
                self._validate(trainer, task)
            except Exception:
                if trainer.is_global_zero:
                    log.warning(
                        "the weights of step %d are saved in %s", trainer.global_step, self.output / LAST_FOLDER
                    )
                raise
            if self.clock is not None:
                self.clock.validated()
        self._save(trainer, task)
        self.saved_step = trainer.global_step

    def save_now(self, trainer: Trainer, task: RecipeTask) -> None:
        """Writes the run as it is at this step, unless that is done."""
        if self.saved_step != trainer.global_step:
            self._write(trainer, task, validates=False)

    def _validate(self, trainer: Trainer, task: RecipeTask) -> None:
        network, step = task.network, trainer.global_step
        if task.norms_learn:
            self._set_statistics(task, network, step)
        if isinstance(self.recipe, Recipe) and self.recipe.class_offsets:
            images = cast(SegmentationDataModule, self.data).calibration_dataloader("train", OFFSET_IMAGES)
            self.offsets = fit_offsets(network, images)
        with shifted(network, self.offsets):
            self._validate_as_saved(trainer, task)

    def _set_statistics(self, task: RecipeTask, network: RoutedNetwork, step: int) -> None:
        if self.recipe.precise_bn_batches and task.batch_norm != "frozen":
            with task.autocast():
                precise_batch_norm(network, self.data.norm_dataloader(step, self.recipe.precise_bn_batches))

    def _validate_as_saved(self, trainer: Trainer, task: RecipeTask) -> None:
        network, step = task.network, trainer.global_step
        if network.exits is not None:
            data = cast(SegmentationDataModule, self.data)
            images = data.calibration_dataloader("train"), data.calibration_dataloader("val")
            calibrate(network, *images, least=1)  # few are better than none: `train` says so
            assert task.model.exits is not None
            for own, found in zip(task.model.exits.calibration(), network.exits.calibration(), strict=True):
                own.copy_(found)  # an average of the weights takes over the buffers of the network at each step
        self.latest = validation = task.validate(self.data.val_dataloader())
        for logger in trainer.loggers:
            logger.log_metrics(validation.logged, step)
        task.numbers.update(validation.logged)
        if validation.score > self.best_score or validation.candidate > self.best_is_candidate:
            self.best_score, self.best_is_candidate = validation.score, validation.candidate
            self.best_step = step
            if trainer.is_global_zero:
                network.save(self.output / BEST_FOLDER)
        if self.tells and trainer.is_global_zero:
            print(self._line(step, validation, task.numbers["loss"]), flush=True)

    def _line(self, step: int, validation: Validation, loss: float) -> str:
        """A validation in words: its numbers, the best one so far, and how long the rest of the run takes if it goes on
        like this."""
        found = validation.logged
        scores = [words.format(100 * found[key]) for key, words in VALIDATED.items() if key in found]
        best = "the best" if self.best_step == step else f"best {100 * self.best_score:.1f} % at step {self.best_step}"
        of = f"{self.recipe.iterations}" if self.clock is None else f"about {self.clock.steps(step)}"
        over = step == self.recipe.iterations if self.clock is None else self.clock.over
        line = f"step {step}{'' if over and self.clock else f' of {of}'}: {', '.join(scores)}, loss {loss:.3f}; {best}"
        if over:
            return line
        pace = (clocks.now() - self.started) / (step - self.first_step)  # seconds
        left = pace * (self.recipe.iterations - step) if self.clock is None else self.clock.total_s - self.clock.spent_s
        return f"{line}; {max(0.0, left) / 60:.1f} minutes left"

    def _save_network(self, trainer: Trainer, task: RecipeTask) -> None:
        if trainer.is_global_zero:
            with shifted(task.network, self.offsets):
                task.network.save(self.output / LAST_FOLDER)

    def _save(self, trainer: Trainer, task: RecipeTask) -> None:
        scratch, target = self.output / f".{RESUME_FILE}.tmp", self.output / RESUME_FILE
        try:
            trainer.save_checkpoint(scratch)
            self._save_network(trainer, task)
            if trainer.is_global_zero:
                os.replace(scratch, target)  # last: once it is there, so are the networks of its step
        except OSError as error:
            raise not_written(target, error) from error
        finally:
            if trainer.is_global_zero:
                scratch.unlink(missing_ok=True)


class StopAtSignal(Callback):
    """Ctrl-C or SIGTERM ends a run of one process after the step that it is at, which is saved; a second one at once.

    signal  the number of the one that came
    """

    def __init__(self, saver: ValidateAndSave) -> None:
        self.saver = saver
        self.signal: int | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):  # Lightning puts back what was there before
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        if self.signal is not None:
            self.saver.save_now(trainer, cast(RecipeTask, module))
            trainer.should_stop = True


class Progress(RichProgressBar):
    """One line: step, rate, and the numbers of the task that `SHOWN` lists."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the steps of the whole run, also of one that goes on."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)
        clock = cast(RecipeTask, pl_module).clock
        if clock is not None and self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, total=clock.steps(trainer.global_step))

    def _get_train_description(self, current_epoch: int) -> str:
        return "train"  # a run is one long epoch

    def get_metrics(self, trainer: Trainer, task: LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        values = cast(RecipeTask, task).numbers
        shown: dict[str, int | str | float | dict[str, float]] = {}
        for key, name, factor in SHOWN:
            if key in values and (values[key] or key != "skipped_images"):
                shown[name] = f"{factor * values[key]:.{0 if factor == 100 else 3}f}"
        return shown
