"""What several commands share: the typed configuration, the network it describes, a progress bar."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from routeseg.cli.parser import SECTIONS, SEED_KEY, ConfigFile, Parser, field_texts
from routeseg.errors import lacks_memory, printable
from routeseg.files import MAX_JSON, RESUME_FILE, RUN_CONFIG_FILE, best_of_run, expand_user, read_file

if TYPE_CHECKING:
    import torch

    from routeseg.budgets.asked import Asked
    from routeseg.data.config import DataConfig
    from routeseg.labels import Classes
    from routeseg.model import DynamicRoutingNetwork
    from routeseg.space import Route
    from routeseg.training.gate_budget import Budget
    from routeseg.training.recipe import Recipe

PRECISION_HELP = (
    "float32 (the default), bfloat16 (GPUs, CPUs with AVX512_BF16), float16 (GPUs), or auto: float32 or bfloat16, the "
    "one in which this machine is faster, measured anew each time"
)
NETWORK_SKIP = {"num_classes", "class_names", "palette", "pixel_mean", "pixel_std"}  # the data decide these


def quiet_libraries() -> None:
    """Silences remarks of libraries that no user can act on; to be called once they are imported."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.|torch\.|lightning_utilities\.")


class _Plain(logging.Formatter):
    """Lines without control characters, which a file name may have."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """What the package logs, such as unreadable images that are skipped, goes to stderr: a line each.

    Loader processes inherit it. It is the stream of this moment, not one that a progress bar puts in its place.
    """
    log, stream = logging.getLogger("routeseg"), sys.stderr
    over_a_bar = "\r\x1b[K" if stream.isatty() else ""  # back to the line's start, and erase the bar that stands there
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Plain(over_a_bar + "routeseg: %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


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
    from routeseg.config import NetworkConfig
    from routeseg.data.config import DataConfig
    from routeseg.training.gate_budget import Budget
    from routeseg.training.recipe import Recipe

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
    from routeseg.data.config import layout_of

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
    from routeseg.data.config import open_data, pair
    from routeseg.data.crops import filled_crop

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
    from routeseg.data.config import DataConfig, known_classes
    from routeseg.data.sets.masks import UnclearMasks

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
    from routeseg.data.tools.findings import examine

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
    from routeseg.training.gate_budget import Budget
    from routeseg.training.recipe import Recipe

    return data_of(args), Recipe(**vars(args.recipe)), Budget(**vars(args.gate_budget))


def new_network(args: Namespace, data: DataConfig, recipe: Recipe, pretrained: bool = True) -> DynamicRoutingNetwork:
    """The network of the model section, for the classes of the data. Its weights are drawn from the recipe's seed, but
    those of a backbone are the published ones, if `pretrained` and the recipe's `pretrained` say so.

    PyTorch is imported once the configuration, the data set and the route are known to be right.
    """
    from routeseg.config import NetworkConfig
    from routeseg.data.config import open_data

    classes = open_data(data, data.train_split, recipe.seed).classes
    config = NetworkConfig(
        num_classes=len(classes), class_names=classes.names, palette=classes.palette or (), **network_options(args)
    )

    import torch

    from routeseg.model import DynamicRoutingNetwork

    torch.manual_seed(recipe.seed)
    model = DynamicRoutingNetwork(config)
    if not model.head.segments:
        raise ValueError(f"--model.head is {config.head}, which segments nothing: leave it out")
    if pretrained and recipe.pretrained and model.backbone is not None:
        model.load_pretrained()
    return model


def network_options(args: Namespace) -> dict[str, Any]:
    """The model section; a route that is given as a JSON file is read."""
    from routeseg.space import Route, RoutingSpace

    options = vars(args.model)
    if str(options["route"]).endswith(".json"):
        space = RoutingSpace(args.model.depth, args.model.num_scales)
        options = options | {"route": read_route(options["route"], Route.all_open(space)).named_edges}
    return options


def start_from(model: DynamicRoutingNetwork, folder: str | None, output: Path, resume: bool) -> None:
    """Takes over the weights of a checkpoint folder by name, says which, and writes it to OUTPUT/init.json.

    A run that is resumed has its own weights, and the input normalisation that it began with.
    Raises ValueError if the weights do not fit.
    """
    from lightning.pytorch.utilities import rank_zero_only

    from routeseg.files import check_writable, write_json
    from routeseg.model.checkpoints import read_config
    from routeseg.training.callbacks import LAST_FOLDER
    from routeseg.training.initialization import adopt_normalization, initialize

    first_process = getattr(rank_zero_only, "rank", 0) == 0
    if resume:
        if (output / LAST_FOLDER).is_dir():
            adopt_normalization(model, read_config(output / LAST_FOLDER))
        if folder is not None and first_process:
            print(f"--init {folder} is not used: --resume goes on with the weights of the run")
    elif folder is not None:
        report = initialize(model, folder)
        if first_process:
            print(report)
        if first_process and not (output / RESUME_FILE).exists():  # `train` refuses a folder that holds a run
            check_writable(output)
            write_json(output / "init.json", report.as_dict())


def read_route(name: str, whole: Route) -> Route:
    """An architecture's route, or that of a file, as `Route.to_json` and `routeseg predict` write it; `whole` has the
    edges of the network.

    Raises ValueError, naming it, if it is neither, if its space is another one, and if it has dead ends or edges that
    the network lacks.
    """
    from routeseg.architectures import DRAWN, architecture
    from routeseg.model.request import check_route
    from routeseg.space import Route, edge_name

    try:
        if name in DRAWN:
            route = architecture(name, whole.space)
        elif Path(name).is_file():
            route = Route.from_json(read_file(name, MAX_JSON))
        else:
            raise ValueError(f"no such file, and no route of this name: choose one of {', '.join(DRAWN)}")
        if route.space != whole.space:
            raise ValueError(
                f"the route is drawn in {route.space}, the network has {whole.space}: the depths must match"
            )
        for edge in sorted(route.dead_ends):
            raise ValueError(
                f"{len(route.dead_ends)} open edges that no path leads to, the first is {edge_name(edge)}: take them "
                "out of its list `open`, or open a path to them"
            )
        check_route(whole, route)
    except ValueError as error:
        raise ValueError(f"route {name}: {error}") from error
    return route


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


def parse_size(option: str, text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH as numbers. Raises ValueError, naming the option, for anything else, and for sides under 32."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or min(size := (int(match[1]), int(match[2]))) < 32:
        raise ValueError(f"{option} is {text!r}: give HEIGHTxWIDTH, both at least 32, such as 1024x2048")
    return size


def find_device(name: str) -> torch.device:
    """The device of this name, such as cpu, cuda or cuda:1. Raises ValueError if there is none."""
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        why = "there is no such kind of device" if reason.startswith("Expected one of") else reason
        raise ValueError(f"--device {name} cannot be used here ({why}): take cpu, or cuda with a GPU") from error
    return device


def add_budget_arguments(parser: Parser) -> None:
    """--budget, --per_image and --latency."""
    parser.add_argument(
        "--budget",
        type=str | None,
        default=None,
        help="what a pass may cost in the mean, for a network with exits: 40%, 0.5GMACs, or 25ms with --latency",
    )
    parser.add_argument(
        "--per_image",
        action="store_true",
        help="each image keeps --budget, not the mean of them: for networks whose places leave by themselves",
    )
    parser.add_argument(
        "--latency",
        type=str | None,
        default=None,
        help="table of this machine for --budget in ms, from `profile`; or a folder with tables of several sizes",
    )


def read_budget(args: Namespace) -> Asked | None:
    """The budget that is asked for. Raises ValueError if it is none, and for a latency table that is not needed."""
    from routeseg.budgets.asked import Asked
    from routeseg.cost.latency import LatencyTable

    if args.budget is None:
        if args.per_image:
            raise ValueError("--per_image is about --budget: give one, or leave it out")
        if args.latency is not None:
            raise ValueError("--latency only applies to --budget in ms: give one, or leave it out")
        return None
    tables = [] if args.latency is None else LatencyTable.read_all(args.latency)
    asked = Asked.parse(args.budget, tables, args.latency or "")
    if tables and asked.unit != "ms":
        raise ValueError("--latency only applies to --budget in ms: leave it out")
    return replace(asked, per_image=args.per_image)


def with_budget(engine: Any, model: DynamicRoutingNetwork, args: Namespace) -> Any:
    """An engine that keeps the budget that is asked for, if one is. Raises ValueError if the network takes none."""
    asked = read_budget(args)
    if asked is None:
        return engine

    from routeseg.budgets.budgeted import Budgeted

    return Budgeted(engine, model, asked)


def say_precision(engine: Any) -> None:
    """Prints which precision an engine computes in, and why, if that was left to the machine."""
    if getattr(engine, "precision_reason", None):
        print(f"precision: {engine.precision} ({engine.precision_reason})")


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Turns the error of a memory that is too small into a ValueError that tells the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if lacks_memory(error):
            reason = (str(error).splitlines() or ["none is left"])[0]
            raise ValueError(f"the images are too large for the memory ({reason}): {remedy}") from error
        raise


class progress_bar:
    """A progress bar as a context; entering gives a function that advances it by one. A total of None is not known."""

    def __init__(self, title: str, total: int | None) -> None:
        from rich.progress import Progress

        self.bar = Progress(transient=True)
        self.task = self.bar.add_task(title, total=total)

    def __enter__(self) -> Callable[[], None]:
        self.bar.start()
        return lambda: self.bar.advance(self.task)

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()
