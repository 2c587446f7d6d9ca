"""What several commands share: the typed configuration, the network it describes, a progress bar."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from routeseg.errors import lacks_memory
from routeseg.files import CONFIG_FILE, RUN_CONFIG_FILE, expand_user

if TYPE_CHECKING:
    import torch

    from routeseg.cost.request import Asked
    from routeseg.data.config import DataConfig
    from routeseg.model import DynamicRoutingNetwork
    from routeseg.space import Route
    from routeseg.training.recipe import Recipe

USAGE_ERROR = 2
PRESETS = Path(__file__).parents[1] / "presets"
PRECISION_HELP = (
    "engine skip computes in float32, bfloat16 (GPUs, CPUs with AVX512_BF16), float16 (GPUs), or auto: float32 or "
    "bfloat16, the one in which this machine is faster"
)
SECTIONS = ("model", "data", "recipe", "budget")  # of a configuration
SEED_KEY = "recipe.seed"
SIZES = ("--data.crop", "--data.image_size")  # may be given as HEIGHTxWIDTH
KINDS = {  # what values must be, by the name of their type; of several the first counts
    "tuple": "two numbers, [HEIGHT, WIDTH]",
    "list": "a list, such as [0.5, 1.0]",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
}
SYNONYMS = {  # what other tools call it
    "max_epochs": "epochs",
    "epochs": "epochs",
    "max_steps": "recipe.iterations",
    "steps": "recipe.iterations",
    "learning_rate": "recipe.lr",
    "backbone": "model.backbone",
}
NETWORK_SKIP = {"num_classes", "class_names", "palette", "pixel_mean", "pixel_std"}  # the data decide these


class Parser(ArgumentParser):
    """jsonargparse, with the nearest valid name for a key that does not exist, and a --help for people.

    passed_over  sections that a configuration file may have, and that this command does not use
    in_python    a mistake is a ValueError, and not the end of the program
    first        what --help shows, option and value -> meaning; --help-all shows all. Empty: --help shows all
    """

    passed_over: tuple[str, ...] = ()
    in_python = False
    first: Mapping[str, str] = {}

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **how: Any) -> Namespace:  # type: ignore[override]
        """Keys of a section that is passed over are unknown, also if an option has the section's name (--budget). A
        size may be given as HEIGHTxWIDTH."""
        words = list(args or ())
        if self.first and "--help-all" in words:
            self.first = {}
            words = ["--help"]
        for place, word in enumerate(words):
            key, _, value = word.removeprefix("--").partition("=")
            if word.startswith("--") and "." in key and key.partition(".")[0] in self.passed_over:
                self.error(f"Unrecognized arguments: --{key}")
            if f"--{key}" in SIZES:
                at = place if value else place + 1
                words[at : at + 1] = [re.sub(r"(\d+)x(\d+)$", r"[\1, \2]", one) for one in words[at : at + 1]]
        return super().parse_args(words, *more, **how)

    def format_help(self, formatter: Any = None) -> str:
        if not self.first:
            return super().format_help(formatter)
        wide = max(map(len, self.first))
        rows = [
            f"  {'' if name.isupper() else '--'}{name:<{wide + 2 * name.isupper()}}  {text}"
            for name, text in self.first.items()
        ]
        return "\n".join([f"usage: {self.usage}", "", *rows, "", f"All keys: {self.prog} --help-all", ""])

    def error(self, message: str, ex: Exception | None = None) -> Any:
        message = _wrong_value(message)
        known = [a.dest for a in self._actions if a.dest not in ("help", "==SUPPRESS==")]
        for wrong in _unknown_keys(message):
            if wrong.partition(".")[0] in self.passed_over:
                remedy = "give --seed instead" if wrong == SEED_KEY else "leave it out"
                message = f"`{self.prog}` does not take --{wrong}: {remedy}"
                break
            known += [f"{name}.{wrong.partition('.')[2]}" for name in self.passed_over]
            near = [key for key in known if key == SYNONYMS.get(wrong.rpartition(".")[2])]
            near = near or difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
            near = near or [key for key in known if key.rsplit(".", 1)[-1] == wrong.rsplit(".", 1)[-1]][:1]
            hint = f"did you mean {near[0]}?" if near else f"see `{self.prog} --help`"
            message = f"no key {wrong!r} in the configuration: {hint}"
            break
        if self.in_python:
            raise ValueError(_first_lines(message))
        print(f"routeseg: error: {_first_lines(message)}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


def field_texts(kind: type) -> dict[str, str]:
    """What the table in the docstring of a class, and of those it derives from, says of its fields, by name: rows of
    names, at least two spaces, and a text that goes on in lines that are indented deeper."""
    texts: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        names: list[str] = []
        for line in inspect.cleandoc(one.__doc__ or "").splitlines():
            if row := re.fullmatch(r"(\w+(?:, \w+)*)\s{2,}(\S.*)", line):
                names = row[1].split(", ")
                texts |= dict.fromkeys(names, row[2])
            elif line.startswith("    "):
                texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
            else:
                names = []
    return texts


class ConfigFile(ActionConfigFile):
    """--config FILE. A file that was made for training serves the other commands, too: they pass over the sections that
    they do not use, but for the recipe's seed."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        *before, values = _presets(parser, values)
        for one in before:
            self(parser, cfg, one, option_string)
        text = Path(values).read_text() if os.path.isfile(values) else values
        try:
            document: Any = yaml.compose(text)  # and not `load`, so that every value stays as it is written
        except yaml.YAMLError as error:
            parser.error(f"{values} is no YAML: {error}")
        if not isinstance(document, yaml.MappingNode):
            parser.error(f"--config {values} has no sections: it must be a YAML file with {', '.join(SECTIONS)}")
        else:
            kept = []
            for key, value in document.value:
                if key.value in SECTIONS and not isinstance(value, yaml.MappingNode):
                    parser.error(f"section {key.value!r} of {values} is no mapping: give its keys, a line each")
                if key.value not in parser.passed_over:
                    kept.append((key, value))
                elif key.value == "recipe":
                    kept = [pair for pair in value.value if pair[0].value == "seed"] + kept
            if kept != document.value:
                document.value = kept
                values = yaml.serialize(document)
        super().__call__(parser, cfg, values, option_string)


def _presets(parser: Any, name: str) -> list[str]:
    """The files of a preset; a file, and YAML itself, as it is. camvid/dynamic_a is dynamic_a on top of camvid/base."""
    if os.path.isfile(name) or "\n" in name or ":" in name:
        return [name]
    path = PRESETS / f"{name.removesuffix('.yaml')}.yaml"
    base, change = path.with_name("base.yaml"), PRESETS / path.name
    if not path.is_file() and base.is_file() and change.is_file() and path.parent.parent == PRESETS:
        return [str(base), str(change)]
    if not path.is_file():
        known = sorted(one.relative_to(PRESETS).with_suffix("").as_posix() for one in PRESETS.glob("**/*.yaml"))
        near = difflib.get_close_matches(name, known, n=1)
        parser.error(
            f"--config {name}: there is no such file, and no preset of this name: "
            + (f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}")
        )
    return [str(path)]


def _wrong_value(message: str) -> str:
    """jsonargparse's message about the value of a key, in words for people; other messages as they are."""
    if not (found := re.match(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL)):
        return message
    key, said = found.groups()
    value = re.search(r"Got value: (.*)|Given value: (.*)", said)
    kinds = next((text for name, text in KINDS.items() if re.search(rf"\b{name}\b", said)), None)
    if choices := re.findall(r"Literal\[(.*?)\]", said):
        kinds = "one of " + ", ".join(dict.fromkeys(", ".join(choices).replace("'", "").split(", ")))
    if kinds is None:
        return f"--{key}: {said}"
    given = "" if value is None else f" is {(value[1] or value[2] or '').strip()}"
    return f"--{key}{given}: it must be {kinds}" if given else f"--{key} must be {kinds}"


def _unknown_keys(message: str) -> list[str]:
    """The names that jsonargparse does not know, from its messages for files and for the command line."""
    pairs = re.findall(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    alone = re.findall(r"Option '([\w.]+)' is not accepted|[Uu]nrecognized arguments: --([\w.\-]+)", message)
    return [".".join(pair) for pair in pairs] + ["".join(pair) for pair in alone]


def _first_lines(message: str) -> str:
    return " ".join(line.strip() for line in message.strip().splitlines()[:6])


def quiet_libraries() -> None:
    """Silences remarks of libraries that no user can act on; to be called once they are imported."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.|torch\.|lightning_utilities\.")


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """What the package logs, such as unreadable pictures that are skipped, goes to stderr: a line each.

    Loader processes inherit it. It is the stream of this moment, not one that a progress bar puts in its place.
    """
    log, stream = logging.getLogger("routeseg"), sys.stderr
    over_a_bar = "\r\x1b[K" if stream.isatty() else ""  # back to the line's start, and erase the bar that stands there
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(over_a_bar + "routeseg: %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def best_of_run(word: str) -> str:
    """The folder of a run stands for its best network; any other word for itself."""
    folder = Path(word)
    best = folder / "best"
    return str(best) if (best / CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).is_file() else word


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
    from routeseg.cost.budget import Budget
    from routeseg.data.config import DataConfig
    from routeseg.training.recipe import Recipe

    parser = Parser(prog=f"routeseg {command}", exit_on_error=True)
    parser.passed_over = tuple(name for name in SECTIONS if name not in sections)
    add_config_argument(parser)
    texts = {f"model.{field}": text for field, text in field_texts(NetworkConfig).items()}
    if "model" in sections:
        parser.add_class_arguments(NetworkConfig, "model", skip=NETWORK_SKIP, as_group=True)
    for name, kind in (("data", DataConfig), ("recipe", Recipe), ("budget", Budget)):
        if name in sections:
            parser.add_class_arguments(kind, name)
            texts |= {f"{name}.{field}": text for field, text in field_texts(kind).items()}
    for action in parser._actions:
        if action.dest in texts:
            action.help = texts[action.dest].replace("%", "%%")
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


def of_folder(folder: str, words: Sequence[str], more: Sequence[str] = ()) -> list[str]:
    """The words that a folder in front of others is short for: the preset `small` and `more`, and the layout of the
    folder. With a --config of its own it only means the data."""
    from routeseg.data.config import layout_of

    found = [f"--data.name={layout_of(expand_user(folder))}", f"--data.root={folder}"]
    if any(word.partition("=")[0] == "--config" for word in words):
        return [*words, *found]
    return ["--config=small", *found, *more, *words]


def read_data(parser: Parser, words: Sequence[str], lenient: bool = False) -> tuple[Namespace, DataConfig]:
    """The parsed words, and the data section as an object, with the classes that the masks of a folder tell: a line
    says so.

    lenient  classes that are not clear stay unknown, for a report; else they are a ValueError
    """
    from routeseg.data.config import DataConfig, known_classes
    from routeseg.data.sets.masks import UnclearMasks

    args = parser.parse_args(list(words))
    data = DataConfig(**vars(args.data))
    first = all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK"))  # of the processes of a job
    try:
        data = known_classes(data, print if first else lambda line: None)
    except UnclearMasks:
        if not lenient:
            raise
    return args, data


def read_parts(parser: Parser, words: Sequence[str]) -> tuple[Namespace, Any, Any, Any]:
    """The parsed words, and the data, recipe and budget sections as objects."""
    from routeseg.cost.budget import Budget
    from routeseg.training.recipe import Recipe

    args, data = read_data(parser, words)
    return args, data, Recipe(**vars(args.recipe)), Budget(**vars(args.budget))


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
    from routeseg.training.callbacks import LAST_FOLDER, RESUME_FILE
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
            route = Route.from_json(Path(name).read_text())
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


def check_classes(checkpoint: str, model: DynamicRoutingNetwork, data: DataConfig, classes: int) -> None:
    """Raises ValueError if the data set has more classes than the network, or fewer."""
    if classes != model.config.num_classes:
        raise ValueError(
            f"{checkpoint} has {model.config.num_classes} classes, the data set {data.name} has {classes}: "
            "give the configuration that it was trained with"
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
    """--budget and --latency."""
    parser.add_argument(
        "--budget",
        type=str | None,
        default=None,
        help="what a pass may cost in the mean, for a network with exits: 40%%, 0.5GMACs, or 25ms with --latency",
    )
    parser.add_argument(
        "--latency", type=str | None, default=None, help="table of this machine for --budget in ms, from `profile`"
    )


def read_budget(args: Namespace) -> Asked | None:
    """The budget that is asked for. Raises ValueError if it is none, and for a latency table that is not needed."""
    from routeseg.cost.latency import LatencyTable
    from routeseg.cost.request import Asked

    if args.budget is None:
        if args.latency is not None:
            raise ValueError("--latency only applies to --budget in ms: give one, or leave it out")
        return None
    table = None if args.latency is None else LatencyTable.read(args.latency)
    asked = Asked.parse(args.budget, table, args.latency or "")
    if table is not None and asked.unit != "ms":
        raise ValueError("--latency only applies to --budget in ms: leave it out")
    return asked


def with_budget(engine: Any, model: DynamicRoutingNetwork, args: Namespace) -> Any:
    """An engine that keeps the budget that is asked for, if one is. Raises ValueError if the network takes none."""
    asked = read_budget(args)
    if asked is None:
        return engine

    from routeseg.engine.budgeted import Budgeted

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
