"""A run: its folder, its processes, where it starts or goes on from; around Lightning's loop.

What a step computes: task.py. One process, or several under torchrun or `devices`: processes.py, and docs/training.md
for how they are started.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal

import lightning
import torch
import yaml
from filelock import BaseFileLock, FileLock, Timeout
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from routeseg.data.classification_loaders import ClassificationDataModule
from routeseg.data.datamodule import SegmentationDataModule
from routeseg.evaluation.ranking import Ranking
from routeseg.files import (
    RESUME_FILE,
    RUN_CONFIG_FILE,
    check_run_folder,
    check_writable,
    remove_leftovers,
    write_atomically,
)
from routeseg.model.checkpoints import read_config
from routeseg.model.grid import RoutedNetwork
from routeseg.training.batch_norm import Mode, check_enough_values, choose_mode
from routeseg.training.callbacks import LAST_FOLDER, RUN_STATE, Progress, StopAtSignal, ValidateAndSave
from routeseg.training.clock import Clock
from routeseg.training.initialization import FREE_FIELDS, differences_of
from routeseg.training.offsets import shift
from routeseg.training.processes import (
    LOST,
    TIMEOUT,
    Interrupted,
    ProcessLost,
    TrainingStopped,
    connection_lost,
    count_processes,
    ending_together,
)
from routeseg.training.recipe import Precision, TrainingRecipe
from routeseg.training.task import Found, RecipeTask
from routeseg.training.trackers import check_trackers, make_loggers
from routeseg.training.trial import SettlePrecision

LOCK_FILE = ".lock"  # in the folder of a run
ENDLESS = 1 << 31  # steps


@dataclass(frozen=True)
class RunOptions:
    """Where a run writes, and what it runs on.

    output       folder of the run
    resume       go on from OUTPUT/last.ckpt
    devices      processes on this machine, each with one GPU; auto: all GPUs, or those that torchrun started
    accelerator  cpu, gpu or auto
    progress     show how it goes: a progress bar, a line for each validation, OUTPUT/progress.png
    configuration   the sections that `routeseg train` was given: a run keeps them in OUTPUT/config.yaml
    trackers     who keeps the numbers of the run beside its CSV file: tensorboard, wandb, mlflow (trackers.py)
    clock        of the time that the run is given; None: it is given the recipe's iterations. A run that is resumed
                 goes on with the time that it had left
    """

    output: Path
    resume: bool = False
    devices: int | Literal["auto"] = "auto"
    accelerator: str = "auto"
    progress: bool = True
    configuration: Mapping[str, Any] | None = None
    trackers: tuple[str, ...] = ("tensorboard",)
    clock: Clock | None = None

    @property
    def on_gpu(self) -> bool:
        return self.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


@dataclass(frozen=True)
class RunResult(Generic[Found]):
    """What a run returns.

    found           what the last validation measured; None if no step was left to do
    steps           of the optimiser, since the run began
    seconds         since the run began, without the time between its parts
    precision       32-true or bf16-mixed, as the steps ran
    is_global_zero  whether this process is the one that writes files and prints
    ranking         the worst and best images of the last validation; None if it had no images to look at
    """

    found: Found | None
    steps: int
    seconds: float
    precision: Precision
    is_global_zero: bool
    ranking: Ranking | None = None


@dataclass(frozen=True)
class Run:
    """A training that is about to start, or to go on: its options, its processes, and where it goes on from.

    processes            on this machine
    before               what the run kept when it was interrupted (`ValidateAndSave.state_dict`); empty if it starts
    meaning              what the label values of the data mean (`meaning_of`); None: they are not values in files
    clock                of the time that it is given, if it is not given iterations
    lock                 of the folder: the first process holds it until the run ends
    """

    model: RoutedNetwork
    recipe: TrainingRecipe
    options: RunOptions
    processes: int
    machines: int
    batch_norm: Mode
    images_per_step: int
    first_step: int
    before: Mapping[str, Any]
    meaning: dict[str, int] | None
    clock: Clock | None
    lock: BaseFileLock

    @classmethod
    def begin(
        cls,
        model: RoutedNetwork,
        recipe: TrainingRecipe,
        options: RunOptions,
        batch_size: int,
        crop: tuple[int, int],
        meaning: dict[str, int] | None = None,
    ) -> Run:
        """Checks what was asked for, makes the folder, and seeds. Raises as `train` does."""
        check_trackers(options.trackers)
        processes, machines = count_processes(options.devices, options.on_gpu)
        world = processes * machines
        batch_norm = choose_mode(recipe.batch_norm, options.on_gpu, world)
        if batch_norm != "frozen":
            check_enough_values(model, crop, batch_size * (world if batch_norm == "synced" else 1))
        check_writable(options.output)
        lock, is_first = FileLock(options.output / LOCK_FILE, timeout=0), getattr(rank_zero_only, "rank", 0) == 0
        if is_first:
            _take(lock, options.output)
        first_step, before = _where_it_goes_on(model, recipe, options)
        _check_classes(model, meaning, before, options)
        clock = options.clock
        if clock is None and before.get("clock") is not None:
            clock = Clock.of(before["clock"])
            clock = None if clock.over else clock  # it goes on by iterations, if there are more of them
        if is_first:
            _remember(options, recipe.iterations)
        lightning.seed_everything(recipe.seed, workers=True, verbose=False)
        images = batch_size * world * recipe.accumulate
        return cls(
            model, recipe, options, processes, machines, batch_norm, images, first_step, before, meaning, clock, lock
        )

    @property
    def iterations(self) -> int:
        """How many steps the data must last for."""
        return self.recipe.iterations if self.clock is None else ENDLESS

    @property
    def world(self) -> int:
        """Processes on all machines."""
        return self.processes * self.machines

    @property
    def synced(self) -> bool:
        """Whether BatchNorm has the statistics of the batches of several processes."""
        return self.batch_norm == "synced" and self.world > 1

    def fit(self, task: RecipeTask[Found], data: SegmentationDataModule | ClassificationDataModule) -> RunResult[Found]:
        """Trains; afterwards the network is the one in OUTPUT/last."""
        options, checkpoint = self.options, self.options.output / RESUME_FILE
        task.clock = self.clock
        saver = ValidateAndSave(
            options.output,
            self.recipe,
            data,
            self.first_step,
            self.images_per_step,
            options.progress,
            self.clock,
            self.before.get("seconds", 0.0),
            self.meaning,
        )
        stopper = StopAtSignal(saver)
        trainer = self._trainer([saver, *([stopper] if self.world == 1 else [])])
        if trainer.is_global_zero:
            self._say_images()
        together = ending_together(lambda: getattr(trainer.strategy.launcher, "procs", ()))
        with together if self.world > 1 else nullcontext():
            try:
                trainer.fit(task, datamodule=data, ckpt_path=checkpoint if options.resume else None, weights_only=True)
            except RuntimeError as error:
                if self.world > 1 and not isinstance(error, TrainingStopped) and connection_lost(error):
                    raise ProcessLost(LOST) from error
                raise
            except SystemExit as stop:
                if trainer.interrupted:  # Lightning takes Ctrl-C, and exits without a word
                    raise KeyboardInterrupt from stop
                raise
            finally:
                self.lock.release()
        over = trainer.global_step >= self.recipe.iterations if self.clock is None else self.clock.over
        if stopper.signal is not None and not over:
            raise Interrupted(self._goes_on(trainer.global_step), stopper.signal)
        if self.clock is not None and trainer.is_global_zero:
            _remember(options, trainer.global_step)
        self.model.load_state_dict(task.network.state_dict())
        shift(self.model, saver.offsets)
        found = saver.latest.found if saver.latest is not None else None
        return RunResult(found, trainer.global_step, saver.seconds, task.precision, trainer.is_global_zero)

    def _goes_on(self, step: int) -> str:
        """What to say of a run that a signal ended at this step."""
        output, remembers = self.options.output, self.options.configuration is not None
        command = f"`routeseg train --output {output} --resume`" if remembers else "the same command with --resume"
        of = self.recipe.iterations if self.clock is None else f"about {self.clock.steps(step)}"
        return f"saved at step {step} of {of} in {output}: {command} goes on"

    def _trainer(self, callbacks: list[Callback]) -> Trainer:
        recipe, options = self.recipe, self.options
        try:
            return Trainer(
                max_steps=recipe.iterations if self.clock is None else -1,
                max_epochs=-1,
                accelerator=options.accelerator,
                devices=self.processes,
                num_nodes=self.machines,
                strategy=_several_processes() if self.world > 1 else "auto",
                sync_batchnorm=self.synced,
                use_distributed_sampler=False,
                limit_val_batches=0,
                num_sanity_val_steps=0,
                log_every_n_steps=recipe.log_every,
                callbacks=[SettlePrecision(), *callbacks, *([Progress()] if options.progress else [])],
                logger=make_loggers(options.trackers, options.output, recipe.log_every, options.configuration),
                enable_progress_bar=options.progress,
                enable_checkpointing=False,
                enable_model_summary=False,
                default_root_dir=options.output,
            )
        except MisconfigurationException as error:
            raise ValueError(f"--accelerator {options.accelerator}: {error}") from error

    def _say_images(self) -> None:
        """Prints how many images a step has, which the learning rate must fit."""
        recipe, images, before = self.recipe, self.images_per_step, self.before.get("images_per_step")
        print(
            f"{images} images a step ({images // (self.world * recipe.accumulate)} x {self.world} processes "
            f"x {recipe.accumulate} accumulated), learning rate {recipe.lr:g}"
        )
        if before not in (None, images):
            print(
                f"note: this run took {before} images a step so far, and takes {images} from here on. "
                f"Its schedule counts steps, and --recipe.lr {recipe.lr:g} stays: scale it with the images of a step"
            )


def _several_processes() -> DDPStrategy:
    return DDPStrategy(
        find_unused_parameters=True,  # a dropped cell has no gradient
        broadcast_buffers=False,  # BatchNorm's statistics: see batch_norm.py
        timeout=TIMEOUT,
    )


def _take(lock: BaseFileLock, output: Path) -> None:
    """Takes the folder of a run, and removes what a run that was killed left there. Raises ValueError if another one
    has it."""
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another training writes into {output}: wait for its end, or choose another --output"
        ) from error
    except (OSError, NotImplementedError):  # a file system without locks
        return
    remove_leftovers(output)


def _remember(options: RunOptions, iterations: int) -> None:
    """Writes what the run was given into its folder, with so many iterations."""
    if options.configuration is None:
        return
    plain = json.loads(json.dumps(options.configuration))  # lists in place of tuples
    plain["recipe"]["iterations"] = iterations
    write_atomically(options.output / RUN_CONFIG_FILE, yaml.safe_dump(plain, sort_keys=False).encode())


def _check_classes(
    model: RoutedNetwork, meaning: Mapping[str, int] | None, before: Mapping[str, Any], options: RunOptions
) -> None:
    """Raises ValueError if a run goes on with other classes: of another name, or painted with another value."""
    output, names = options.output, model.config.class_names
    known = read_config(output / LAST_FOLDER).class_names if options.resume and (output / LAST_FOLDER).is_dir() else ()
    said = [
        f"class {k} is {one} there and {other} here"
        for k, (one, other) in enumerate(zip(known, names, strict=False))
        if one != other
    ]
    painted = before.get("meaning") or {}
    said += [
        f"{value} means {names[painted[value]]} there and {names[k]} here"
        for value, k in (meaning or {}).items()
        if painted.get(value, k) != k
    ]
    if said:
        more = f" (and {len(said) - 1} more)" if len(said) > 1 else ""
        raise ValueError(
            f"the run in {output} has other classes: {said[0]}{more}. Resume it with the classes that it had, or start "
            "another one with another --output"
        )


def _where_it_goes_on(
    model: RoutedNetwork, recipe: TrainingRecipe, options: RunOptions
) -> tuple[int, Mapping[str, Any]]:
    """The step that the run goes on from, and what `ValidateAndSave` kept of it."""
    output, path = options.output, options.output / RESUME_FILE
    check_run_folder(output, options.resume)
    if not options.resume:
        return 0, {}
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        step = int(checkpoint["global_step"])
        averaged = any(name.startswith("average.") for name in checkpoint["state_dict"])
        shapes = {name: list(value.shape) for name, value in checkpoint["state_dict"].items()}
        saved = checkpoint["callbacks"][RUN_STATE]
        optimizer = "adamw" if "betas" in checkpoint["optimizer_states"][0]["param_groups"][0] else "sgd"
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(f"{path} is damaged or no checkpoint of a run: {error}") from error
    if averaged != bool(recipe.ema_decay):
        had = "an average of its weights" if averaged else "no average of its weights"
        raise ValueError(f"the run in {output} keeps {had}: resume it with the --recipe.ema_decay that it had")
    if optimizer != recipe.optimizer:
        raise ValueError(f"the run in {output} has another optimizer: resume it with --recipe.optimizer {optimizer}")
    there = {name.removeprefix("model."): shape for name, shape in shapes.items() if name.startswith("model.")}
    here = {name: list(value.shape) for name, value in model.state_dict().items()}
    for name in [*here, *there]:
        if there.get(name) != here.get(name):
            known = read_config(output / LAST_FOLDER) if (output / LAST_FOLDER).is_dir() else model.config
            others = differences_of(known, model.config, FREE_FIELDS - {"num_classes"})
            others = others or [(name, there.get(name, "missing"), here.get(name, "missing"))]
            said = ", ".join(f"{what} is {a} there and {b} here" for what, a, b in others)
            raise ValueError(
                f"the run in {output} has another network: {said}. Resume it with the configuration that it had (model "
                "and data)"
            )
    return step, saved
