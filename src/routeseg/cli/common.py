"""The typed configuration of a command: its parser, the data set that it names, and the network that it describes."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from routeseg.cli.options import progress_bar, read_route
from routeseg.cli.parser import SECTIONS, SEED_KEY, ConfigFile, Parser, field_texts
from routeseg.config import NetworkConfig
from routeseg.data.config import DataConfig, known_classes, layout_of, open_data, pair
from routeseg.data.crops import filled_crop
from routeseg.data.sets.masks import UnclearMasks
from routeseg.data.tools.findings import examine
from routeseg.files import RUN_CONFIG_FILE, best_of_run, expand_user
from routeseg.labels import Classes
from routeseg.space import Route, RoutingSpace
from routeseg.training.gate_budget import Budget
from routeseg.training.recipe import Recipe

if TYPE_CHECKING:
    from routeseg.model import DynamicRoutingNetwork

NETWORK_SKIP = {"num_classes", "class_names", "palette", "pixel_mean", "pixel_std"}  # the data decide these


def of_run(words: Sequence[str]) -> list[str]:
    """The words of a command whose first is a checkpoint: one of a run brings the run's configuration along."""
    if not words or words[0].startswith("-"):
        return list(words)
    checkpoint = best_of_run(words[0])
    known = Path(checkpoint).parent / RUN_CONFIG_FILE
    return [*(["--config", str(known)] if known.is_file() else []), checkpoint, *words[1:]]


def config_parser(command: str, sections: Sequence[str] = SECTIONS) -> Parser:
    """The typed configuration: these sections of it; files with --config, then single keys.

    A command that has no recipe takes --seed.
    """
    parser = Parser(prog=f"routeseg {command}", exit_on_error=True)
    parser.passed_over = tuple(name for name in SECTIONS if name not in sections)
    add_config_argument(parser)
    texts = {f"model.{field}": text for field, text in field_texts(NetworkConfig).items()}
    if "model" in sections:
        parser.add_class_arguments(NetworkConfig, "model", skip=NETWORK_SKIP, as_group=True)
    for name, kind in (("data", DataConfig), ("recipe", Recipe), ("gate_budget", Budget)):
        if name in sections:
            parser.add_class_arguments(kind, name)
            texts |= {f"{name}.{field}": text for field, text in field_texts(kind).items()}
    for action in parser._actions:
        if action.dest in texts:
            action.help = texts[action.dest]
    if "recipe" not in sections:
        parser.add_argument(
            "--seed", type=int, default=0, help=f"for all that is drawn at random; a file has it as {SEED_KEY}"
        )
    return parser


def add_config_argument(parser: Parser) -> None:
    """--config FILE."""
    parser.add_argument(
        "--config",
        action=ConfigFile,
        help="a YAML file with any of the keys below, or a preset such as camvid/small; may be given again",
    )


def options_of(words: Sequence[str]) -> set[str]:
    """The options among the words of a command, such as config and recipe.lr."""
    return {word.partition("=")[0].lstrip("-") for word in words if word.startswith("-")}


def of_folder(folder: str, given: Collection[str]) -> dict[str, str]:
    """What a folder of images is short for, by option: its layout, and the preset `small` unless `config` is among the
    given ones."""
    layout = layout_of(expand_user(folder))
    if layout != "folder":
        print(f"{folder} is taken for {layout}, by its folders; if it is other data, a classes.yaml in it says so")
    data = {"data.name": layout, "data.root": folder}
    return data if "config" in given else {"config": "small"} | data


def with_words(options: Mapping[str, str], words: Sequence[str]) -> list[str]:
    """These options and the words of a command, which count where both say something; but a --config of its own stands
    before all options."""
    added = [f"--{name}={value}" for name, value in options.items()]
    return [*added, *words] if "config" in options else [*words, *added]


def leaves_crop(given: Collection[str]) -> bool:
    """Whether these options of `train FOLDER`, or `check-data FOLDER`, leave the crop to the images."""
    return not {"config", "data.crop"} & {*given}


def fit_crop(data: DataConfig, seed: int) -> DataConfig:
    """The data section with a crop that the smaller ones of the training images fill, too, if they are smaller than
    its own: a line says so."""
    crop = filled_crop(open_data(data, data.train_split, seed), pair(data.crop))
    if crop == pair(data.crop):
        return data
    if is_first_process():
        print(f"crops of {crop[0]}x{crop[1]}, for most images fill no {data.crop[0]}x{data.crop[1]} (height x width)")
    return replace(data, crop=crop)


def read_data(parser: Parser, words: Sequence[str], lenient: bool = False) -> tuple[Namespace, DataConfig]:
    """The parsed words, and their `data_of`."""
    args = parser.parse_args(list(words))
    return args, data_of(args, lenient)


def data_of(args: Namespace, lenient: bool = False) -> DataConfig:
    """The data section as an object, with the classes that the masks of a folder tell: a line says so.

    lenient  classes that are not clear stay unknown, for a report; else they are a ValueError
    """
    data = DataConfig(**vars(args.data))
    try:
        data = known_classes(data, print if is_first_process() else lambda line: None)
    except UnclearMasks:
        if not lenient:
            raise
    return data


def refuse_errors(data: DataConfig, seed: int, alone: bool = False) -> None:
    """Looks at every image of training and validation, as `routeseg check-data` does, before a training does.

    alone  no other processes help: a program that is not guarded against it would start again in each of them
    Raises ValueError, with the remedy, for what would end a training, or make it pointless.
    """
    if data.name == "scenes" or not is_first_process():  # drawn ones are always right
        return

    examined = examine(data, (data.train_split, data.val_split), seed, 1 if alone else None, progress_bar)
    errors = [finding for finding in examined.findings if finding.level == "error"]
    if errors:
        files = f" (the first: {errors[0].files[0]})" if errors[0].files else ""
        more = f"; {len(errors) - 1} more" if len(errors) > 1 else ""
        raise ValueError(f"{errors[0].text}{files}: {errors[0].remedy}. `routeseg check-data` tells all of it{more}")


def is_first_process() -> bool:
    """Of those of a job."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK"))


def parts_of(args: Namespace) -> tuple[DataConfig, Recipe, Budget]:
    """The sections data, recipe and gate_budget as objects."""
    return data_of(args), Recipe(**vars(args.recipe)), Budget(**vars(args.gate_budget))


def new_network(args: Namespace, data: DataConfig, recipe: Recipe, pretrained: bool = True) -> DynamicRoutingNetwork:
    """The network of the model section, for the classes of the data. Its weights are drawn from the recipe's seed, but
    those of a backbone are the published ones, if `pretrained` and the recipe's `pretrained` say so.

    PyTorch is imported once the configuration, the data set and the route are known to be right.
    """
    classes = open_data(data, data.train_split, recipe.seed).classes
    config = NetworkConfig(
        num_classes=len(classes), class_names=classes.names, palette=classes.palette or (), **network_options(args)
    )

    from routeseg.cli.run.networks import draw_network

    model = draw_network(config, recipe.seed)
    if pretrained and recipe.pretrained and model.backbone is not None:
        model.load_pretrained()
    return model


def network_options(args: Namespace) -> dict[str, Any]:
    """The model section; a route that is given as a JSON file is read."""
    options = vars(args.model)
    if str(options["route"]).endswith(".json"):
        space = RoutingSpace(args.model.depth, args.model.num_scales)
        options = options | {"route": read_route(options["route"], Route.all_open(space)).named_edges}
    return options


def check_classes(checkpoint: str, model: DynamicRoutingNetwork, data: DataConfig, classes: Classes) -> None:
    """Raises ValueError if the data set has more classes than the network, or fewer, or the same in another order."""
    theirs, ours = model.config.class_names, classes.names
    if len(ours) != len(theirs):
        raise ValueError(
            f"{checkpoint} has {len(theirs)} classes, the data set {data.name} has {len(ours)}: "
            "give the configuration that it was trained with"
        )
    if moved := [k for k, name in enumerate(ours) if name != theirs[k] and name in theirs]:
        k = moved[0]
        raise ValueError(
            f"{checkpoint} has the classes in another order: class {k} is {theirs[k]} there, and {ours[k]} in the "
            f"data set {data.name}. Give the configuration that it was trained with"
        )
