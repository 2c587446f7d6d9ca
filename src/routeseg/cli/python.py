"""What the commands do, as functions: `routeseg.train`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routeseg.cli.common import config_parser
from routeseg.cli.training import RUNS, train_by

if TYPE_CHECKING:
    from routeseg.evaluation import Evaluation
    from routeseg.prediction.segmenter import Segmenter


@dataclass(frozen=True)
class Trained:
    """What a training left.

    folder      of the run: best/ and last/ (networks, for `routeseg.load`), last.ckpt, logs, config.yaml
    model       the best network, in eval mode: `model("photo.jpg")` segments an image
    evaluation  of the last network on the validation images; None if no step was left to do
    """

    folder: Path
    model: Segmenter
    evaluation: Evaluation | None


def train(
    folder: str | Path | None = None,
    *,
    config: str | Path | Sequence[str | Path] = (),
    minutes: float | None = None,
    epochs: float | None = None,
    output: str | Path = RUNS,
    init: str | Path | None = None,
    resume: bool = False,
    data: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    gate_budget: Mapping[str, Any] | None = None,
) -> Trained:
    """What `routeseg train` does (docs/training.md), by the same code.

        run = routeseg.train("my", minutes=20, output="runs/my")
        run.model("photo.jpg").overlay()

    folder   of your images: what else is needed is chosen
    config   a preset such as "camvid/small", or a YAML file; or several, one on top of the other
    minutes  how long this machine may take; or `epochs`: how often each image is seen; else recipe["iterations"]
    output   folder of the run
    init     a checkpoint folder to start from; with a folder of images else the bundled network
    resume   go on with the run in `output`
    data, model, recipe, gate_budget   keys of these sections of the configuration (`routeseg train --help-all`), such
             as data={"name": "camvid", "root": "camvid", "batch_size": 4}

    Raises ValueError, with the remedy, for what makes no training; NonFiniteLoss if the loss is no number.
    """
    from routeseg.prediction.segmenter import load
    from routeseg.training.callbacks import BEST_FOLDER

    words = [] if folder is None else [str(folder)]
    for one in [config] if isinstance(config, str | Path) else config:
        words += ["--config", str(one)]
    sections = {"data": data, "model": model, "recipe": recipe, "gate_budget": gate_budget}
    for section, keys in sections.items():
        words += [f"--{section}.{key}={_as_word(value)}" for key, value in (keys or {}).items()]
    for option, value in (("minutes", minutes), ("epochs", epochs), ("output", output), ("init", init)):
        words += [f"--{option}={value}"] if value is not None else []
    parser = config_parser("train")
    parser.in_python = True
    result, place = train_by([*words, *(["--resume"] if resume else [])], parser)
    return Trained(place, load(place / BEST_FOLDER), result.found)


def _as_word(value: Any) -> str:
    """A value as the command line takes it."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)
