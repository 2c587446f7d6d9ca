"""Who keeps the numbers of a run: TensorBoard, Weights & Biases, MLflow, beside the CSV file in OUTPUT/logs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

TRACKERS = ("tensorboard", "wandb", "mlflow")  # each is also the name of its package
PROJECT = "routeseg"  # of the runs, unless the environment names another one


def read_trackers(text: str) -> tuple[str, ...]:
    """The trackers of --logger, separated by commas, each once. Raises ValueError as `check_trackers` does."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    check_trackers(names)
    return names


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is no tracker, and for one that is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"--logger {name}: choose from {', '.join(TRACKERS)}, several with commas between them")
        if not is_installed(name):
            raise ValueError(f"--logger {name} needs the package {name}, which is not installed: pip install {name}")


def is_installed(package: str) -> bool:
    """Not fooled by a folder of this name, as wandb makes one where it runs."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def make_loggers(
    names: Sequence[str], output: Path, log_every: int, configuration: Mapping[str, Any] | None = None
) -> list[Logger]:
    """Lightning's loggers: the CSV file first, then the trackers. A run has the name of its folder there; Weights &
    Biases and MLflow are told its configuration, too.

    log_every  steps until the CSV file is written again
    Raises ValueError as `check_trackers` does, and if a tracker cannot be reached.
    """
    from lightning.pytorch import loggers

    check_trackers(names)
    found: list[Logger] = [loggers.CSVLogger(output, name="logs", flush_logs_every_n_steps=log_every)]
    run = output.resolve().name
    for name in names:
        if name == "tensorboard":
            found.append(loggers.TensorBoardLogger(output, name="tensorboard", version=""))
            continue
        try:
            if name == "wandb":
                project = os.environ.get("WANDB_PROJECT", PROJECT)
                tracker: Logger = loggers.WandbLogger(name=run, save_dir=output, project=project)
            else:
                experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
                place = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{output.resolve()}/mlflow.db")
                tracker = loggers.MLFlowLogger(experiment, run_name=run, tracking_uri=place)
            if configuration is not None:
                tracker.log_hyperparams(dict(configuration))
        except Exception as error:  # no server, no account, no access: each fails in its own way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"--logger {name} cannot be used: {reason}") from error
        found.append(tracker)
    return found
