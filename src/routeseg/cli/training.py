"""The commands that train: train (in Python, too), calibrate, pretrain, demo."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import Namespace

from routeseg.cli.common import (
    NETWORK_SKIP,
    add_config_argument,
    check_classes,
    config_parser,
    fit_crop,
    leaves_crop,
    network_options,
    new_network,
    of_folder,
    of_run,
    options_of,
    parts_of,
    read_data,
    refuse_errors,
    with_words,
)
from routeseg.cli.logs import quiet_libraries
from routeseg.cli.options import enough_memory
from routeseg.cli.parser import Parser
from routeseg.config import NetworkConfig
from routeseg.data.classification import ClassificationConfig, open_trees
from routeseg.data.config import open_data
from routeseg.data.subset import CALIBRATION_IMAGES, evenly_spread
from routeseg.errors import only_warned_of
from routeseg.files import RUN_CONFIG_FILE, best_of_run, check_run_folder, check_writable
from routeseg.model import checkpoints
from routeseg.training.clock import Clock
from routeseg.training.recipe import PretrainingRecipe
from routeseg.training.trackers import read_trackers

if TYPE_CHECKING:
    from routeseg.data.config import DataConfig
    from routeseg.evaluation import Evaluation
    from routeseg.prediction.segmenter import Segmenter
    from routeseg.training.recipe import Recipe
    from routeseg.training.run import RunOptions, RunResult

RUNS = "runs/train"  # unless --output names another folder
FIRST = {  # what `train --help` shows
    "FOLDER": "your images: images/{train,val}, masks/{train,val}; or a data set in its own layout",
    "config PRESET": "or what to train: a preset such as camvid/small, or a YAML file; may be given again",
    "minutes M": "how long this machine may take",
    "epochs N": "or how often each image is seen",
    "output RUN": f"folder of the run: networks, logs, configuration [{RUNS}]",
    "resume": "go on with the run in --output",
    "init CHECKPOINT": "a trained network to start from [with FOLDER: the bundled one]",
    "data.root FOLDER": "where the data set of a preset lies",
    "data.crop HxW": "size of a training crop; smaller crops need less memory",
    "data.batch_size N": "crops in a step",
    "recipe.lr LR": "learning rate; it belongs to the number of crops in a step",
}
VALIDATIONS = 4  # of a run of --minutes, at most
REPORT_S = 5.0  # that its report takes

SMALLER_STEPS = (
    "lower --data.batch_size and raise --recipe.accumulate by the same factor, or take a smaller --data.crop"
)


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

    began, files = Clock(), [config] if isinstance(config, str | Path) else list(config)
    options = {"output": output, "init": init, "minutes": minutes, "epochs": epochs, "resume": resume or None}
    values: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    for section, keys in {"data": data, "model": model, "recipe": recipe, "gate_budget": gate_budget}.items():
        values |= {f"{section}.{key}": value for key, value in (keys or {}).items()}
    given = {*values, *(["config"] if files else [])}
    start = _start(None if folder is None else str(folder), given, Path(output))
    files = [*([start.pop("config")] if "config" in start else []), *files]
    args = _train_parser().parse_values(files, start | values)
    result = _train(args, began, folder is not None and leaves_crop(given), alone=True)
    return Trained(Path(output), load(Path(output) / BEST_FOLDER), result.found)


def train_command(words: Sequence[str]) -> int:
    """`routeseg train FOLDER ...` is short for a preset, the layout of the folder, and the bundled weights."""
    began, given = Clock(), options_of(words)
    folder = words[0] if words and not words[0].startswith("-") else None
    words = with_words(_start(folder, given, _output_of(words)), words if folder is None else words[1:])
    if folder is not None:
        print(f"routeseg train {shlex.join(words)}")
    args = _train_parser().parse_args(words)
    result, output = _train(args, began, folder is not None and leaves_crop(given)), Path(args.output)
    if not result.is_global_zero:
        return 0

    from routeseg.cli.tables import print_evaluation
    from routeseg.training.report import REPORT_FILE

    if result.found is not None:
        print_evaluation(result.found)
    report = f", {output / REPORT_FILE}" if (output / REPORT_FILE).is_file() else ""
    print(f"{result.seconds / 60:.1f} minutes; networks in {output}/best and {output}/last{report}")
    return 0


def _train_parser() -> Parser:
    parser = config_parser("train")
    parser.usage = "routeseg train FOLDER [--minutes M] [options], or routeseg train --config PRESET [options]"
    parser.first = FIRST
    _add_run_arguments(parser, RUNS)
    parser.add_argument("--init", type=str | None, default=None, help="folder of a network to take weights from")
    parser.add_argument(
        "--minutes", type=float | None, default=None, help="time to train on this machine; else recipe.iterations"
    )
    parser.add_argument(
        "--epochs", type=float | None, default=None, help="how often each image is seen; else recipe.iterations"
    )
    return parser


def _start(folder: str | None, given: Collection[str], output: Path) -> dict[str, str]:
    """What a training starts from beside the options that are given, by option: what a folder of images is short for,
    with the bundled network's weights; or the configuration of the run that goes on.

    Raises ValueError if there is nothing to train on.
    """
    if folder is not None:
        found = of_folder(folder, given)
        if "config" in found and not {"init", "resume"} & {*given}:
            from routeseg.model.checkpoints import PRETRAINED

            found["init"] = str(PRETRAINED)
        return found
    if "resume" in given and (known := output / RUN_CONFIG_FILE).is_file():
        return {"config": str(known)}
    if not any(name == "h" or name.startswith(("config", "data.", "resume", "help", "print")) for name in given):
        raise ValueError(
            "nothing to train on: give the folder of your images, as in `routeseg train my`, or a preset, as in "
            "`routeseg train --config scenes/small`"
        )
    return {}


def _train(args: Namespace, began: Clock, chooses_crop: bool, alone: bool = False) -> RunResult[Evaluation]:
    """Trains what the configuration, and the options of `train`, ask for.

    chooses_crop  the images say how large a crop is
    alone         no other processes help to look the images over
    """
    data, recipe, budget = parts_of(args)
    read_trackers(args.logger)  # a mistake is told before PyTorch is imported
    for name in ("minutes", "epochs"):
        if args[name] is not None and not args[name] > 0:
            raise ValueError(f"--{name} is {args[name]}: it must be positive")
    if args.resume and (args.minutes or args.epochs):
        raise ValueError(
            "--resume goes on with the iterations of the run, or the time that it had left: leave out --minutes and "
            "--epochs"
        )
    if args.minutes is not None and args.epochs is not None:
        raise ValueError("--minutes and --epochs both say how long: leave one of them out")
    output = Path(args.output)
    check_run_folder(output, args.resume)
    if args.init is not None:
        args.init = best_of_run(args.init)
    if args.init is not None and not args.resume:
        from routeseg.model import checkpoints

        checkpoints.read_config(Path(args.init))  # a wrong folder is told before PyTorch is imported
    clock = None if args.minutes is None else began.given(60 * args.minutes)
    refuse_errors(data, recipe.seed, alone=alone)
    if chooses_crop:
        data = fit_crop(data, recipe.seed)
    model = new_network(args, data, recipe, pretrained=args.init is None and not args.resume)

    from routeseg.cli.run.training import start_from
    from routeseg.training.pace import fitted, measure_pace
    from routeseg.training.report import FIGURES_FOLDER, REPORT_FILE, FinishedRun, write_report
    from routeseg.training.segmentation import train

    quiet_libraries()
    start_from(model, args.init, output, args.resume)
    if clock is not None:
        check_writable(output)
        recipe = fitted(recipe, measure_pace(model, data, recipe, budget), clock, VALIDATIONS, REPORT_S)
        print(f"about {recipe.iterations} iterations fit into {args.minutes:g} minutes here, as fast as it is now")
    if args.epochs is not None:
        recipe = _of_epochs(recipe, data, args.epochs)
    sections = {
        "model": vars(args.model),
        "data": asdict(data),
        "recipe": asdict(recipe),
        "gate_budget": vars(args.gate_budget),
    }
    options = replace(run_options(args), configuration=sections, clock=clock)
    with enough_memory(SMALLER_STEPS):
        result = train(model, data, recipe, budget, options)
    if result.is_global_zero and result.found is not None:
        with only_warned_of("report"):
            recipe = replace(recipe, iterations=result.steps)  # with --minutes they are not known beforehand
            run = FinishedRun.of(result, options.output, model, data, recipe, budget)
            write_report(run, options.output / REPORT_FILE, options.output / FIGURES_FOLDER)
    return result


def _output_of(words: Sequence[str]) -> Path:
    """The folder that --output names, before the words are parsed."""
    found = RUNS
    for word, following in zip(words, [*words[1:], ""], strict=False):
        key, _, value = word.partition("=")
        found = (value or following) if key == "--output" else found
    return Path(found)


def _of_epochs(recipe: Recipe, data: DataConfig, epochs: float) -> Recipe:
    """The recipe with so many iterations that each image is seen that often; of one process."""
    from routeseg.data.config import open_data
    from routeseg.training.pace import logged_every

    pictures = data.train_share * len(open_data(data, data.train_split, recipe.seed))
    count = max(1, math.ceil(epochs * pictures / (data.batch_size * recipe.accumulate)))
    return replace(
        recipe,
        iterations=count,
        validate_every=min(recipe.validate_every, count),
        log_every=logged_every(recipe, count),
        warmup_steps=min(recipe.warmup_steps, count // 10),
    )


def calibrate_command(words: Sequence[str]) -> int:

    parser = config_parser("calibrate", ["data"])
    parser.add_argument("checkpoint", type=str, help="a checkpoint folder of a network with exits; written anew")
    parser.add_argument(
        "--split", type=str | None, default=None, help="whose labels tell what each exit is worth; data.train_split"
    )
    parser.add_argument(
        "--budget_split",
        type=str | None,
        default=None,
        help="whose images tell what budgets cost, without their labels; data.val_split",
    )
    parser.add_argument(
        "--images", type=int, default=CALIBRATION_IMAGES, help="at most so many, evenly spread over each split"
    )
    parser.add_argument(
        "--class_offsets",
        type=bool,
        default=False,
        help="first fit an offset of each class to labels of --split, with which the mIoU there is highest; also of a "
        "network without exits",
    )
    parser.add_argument(
        "--sizes",
        type=list[Any] | None,
        default=None,
        help="at which budgets may have images looked at, factors of their sides, such as [0.5,0.7,1,1.4], "
        "or pairs of a first and a closer look, such as [0.5,1,[0.5,1]]; by default "
        "those that the network has. Scores of each come from the labels of --budget_split",
    )
    args, data = read_data(parser, of_run(words))

    check_writable(Path(args.checkpoint))
    images, others = (
        evenly_spread(open_data(data, split, args.seed), args.images)
        for split in (args.split or data.train_split, args.budget_split or data.val_split)
    )
    model = checkpoints.load_segmenter(args.checkpoint)
    check_classes(args.checkpoint, model, data, images.classes)

    from routeseg.cli.run.calibration import run_calibrate

    return run_calibrate(args, data, images, others, model)


def pretrain_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg pretrain")
    add_config_argument(parser)
    parser.add_class_arguments(
        NetworkConfig, "model", skip=NETWORK_SKIP | {"zeros_arrive", "exits", "backbone", "head"}, as_group=True
    )
    parser.add_class_arguments(ClassificationConfig, "data")
    parser.add_class_arguments(PretrainingRecipe, "recipe")
    _add_run_arguments(parser, "runs/pretrain")
    args = parser.parse_args(list(words))
    read_trackers(args.logger)
    data, recipe = ClassificationConfig(**vars(args.data)), PretrainingRecipe(**vars(args.recipe))
    classes = open_trees(data)[0].classes
    config = NetworkConfig(num_classes=len(classes), class_names=classes, head="classifier", **network_options(args))

    from routeseg.cli.run.pretraining import run_pretrain

    with enough_memory(SMALLER_STEPS):
        return run_pretrain(config, data, recipe, run_options(args))


def _add_run_arguments(parser: Parser, output: str) -> None:
    """The keys of `run_options`."""
    parser.add_argument("--output", type=str, default=output, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT/last.ckpt")
    parser.add_argument(
        "--devices",
        type=int | Literal["auto"],
        default="auto",
        help="processes on this machine, each with one GPU; auto: all GPUs, or those that torchrun started",
    )
    parser.add_argument("--accelerator", type=str, default="auto", help="cpu, gpu or auto")
    parser.add_argument(
        "--logger",
        type=str,
        default="tensorboard",
        help="who keeps the numbers beside OUTPUT/logs: tensorboard, wandb, mlflow, or several with commas",
    )


def run_options(args: Namespace) -> RunOptions:
    """The options of `_add_run_arguments`."""
    from routeseg.training.run import RunOptions

    trackers = read_trackers(args.logger)
    return RunOptions(Path(args.output), args.resume, args.devices, args.accelerator, trackers=trackers)


def demo_command(words: Sequence[str]) -> int:
    began, parser = Clock(), config_parser("demo")
    parser.add_argument("--output", type=str, default="runs/demo", help="folder of the run and its report")
    parser.add_argument("--minutes", type=float | None, default=None, help="time for all of it; else recipe.iterations")
    args = parser.parse_args(list(words))
    data, recipe, budget = parts_of(args)
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"--minutes is {args.minutes}: it must be positive")
    refuse_errors(data, recipe.seed)
    model = new_network(args, data, recipe)

    from routeseg.demo import run_demo

    quiet_libraries()
    clock = None if args.minutes is None else began.given(60 * args.minutes)
    run_demo(model, data, recipe, budget, Path(args.output), clock)
    return 0
