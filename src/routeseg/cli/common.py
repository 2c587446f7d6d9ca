"""What several commands share: the typed configuration, the network it describes, a progress bar."""

from __future__ import annotations

import difflib
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from routeseg.data.datamodule import DataConfig
    from routeseg.model import DynamicRoutingNetwork
    from routeseg.space import RoutingSpace
    from routeseg.training import Recipe

USAGE_ERROR = 2
NETWORK_SKIP = {"num_classes", "class_names", "palette", "pixel_mean", "pixel_std"}  # the data decide these


class Parser(ArgumentParser):
    """jsonargparse, with the nearest valid name for a key that does not exist."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        known = [a.dest for a in self._actions if a.dest not in ("help", "==SUPPRESS==")]
        for wrong in _unknown_keys(message):
            near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
            near = near or [key for key in known if key.rsplit(".", 1)[-1] == wrong.rsplit(".", 1)[-1]][:1]
            hint = f"did you mean {near[0]}?" if near else f"see `{self.prog} --help`"
            message = f"no key {wrong!r} in the configuration: {hint}"
            break
        print(f"routeseg: error: {_first_lines(message)}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


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


def config_parser(command: str) -> Parser:
    """The typed configuration: sections model, data, recipe and budget; files with --config, then single keys."""
    from routeseg.cost import Budget
    from routeseg.data.datamodule import DataConfig
    from routeseg.model import DynamicRoutingNetwork
    from routeseg.training import Recipe

    parser = Parser(prog=f"routeseg {command}", exit_on_error=True)
    parser.add_argument("--config", action="config", help="a YAML file with any of the keys below; may be given again")
    parser.add_class_arguments(DynamicRoutingNetwork, "model", skip=NETWORK_SKIP, as_group=True)
    parser.add_class_arguments(DataConfig, "data")
    parser.add_class_arguments(Recipe, "recipe")
    parser.add_class_arguments(Budget, "budget")
    return parser


def read_parts(parser: Parser, words: Sequence[str]) -> tuple[Namespace, Any, Any, Any]:
    """The parsed words and the data, recipe and budget sections as objects."""
    from routeseg.cost import Budget
    from routeseg.data.datamodule import DataConfig
    from routeseg.training import Recipe

    args = parser.parse_args(list(words))
    quiet_libraries()
    data, recipe, budget = (
        kind(**vars(args[key])) for kind, key in ((DataConfig, "data"), (Recipe, "recipe"), (Budget, "budget"))
    )
    return args, data, recipe, budget


def new_network(args: Namespace, data: DataConfig, recipe: Recipe) -> DynamicRoutingNetwork:
    """The network of the model section, for the classes of the data, with weights drawn from the recipe's seed."""
    import torch

    from routeseg.data.datamodule import open_data
    from routeseg.model import DynamicRoutingNetwork
    from routeseg.space import RoutingSpace

    classes = open_data(data, data.train_split, recipe.seed).classes
    options = vars(args.model)
    if str(options["route"]).endswith(".json"):
        options = options | {
            "route": _read_route(Path(options["route"]), RoutingSpace(args.model.depth, args.model.num_scales))
        }
    torch.manual_seed(recipe.seed)
    return DynamicRoutingNetwork(
        num_classes=len(classes), class_names=classes.names, palette=classes.palette, **options
    )


def _read_route(path: Path, space: RoutingSpace) -> list[tuple[int, int, str]]:
    """The edges of a route file, as `Route.to_json` and `routeseg predict` write it."""
    from routeseg.space import Route, edge_name

    try:
        route = Route.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error
    if route.space != space:
        raise ValueError(f"{path} is drawn in {route.space}, the network has {space}: set --model.depth to match")
    for edge in sorted(route.dead_ends):
        raise ValueError(
            f"{path} has {len(route.dead_ends)} open edges that no path leads to, the first is {edge_name(edge)}: take "
            "them out of its list `open`, or open a path to them"
        )
    return route.named_edges


def check_classes(checkpoint: str, model: DynamicRoutingNetwork, data: DataConfig, classes: int) -> None:
    """Raises ValueError where the data set has not as many classes as the network."""
    if classes != model.num_classes:
        raise ValueError(
            f"{checkpoint} has {model.num_classes} classes, the data set {data.name} has {classes}: "
            "give the configuration that it was trained with"
        )


class progress_bar:
    """A progress bar as a context; entering gives a function that advances it by one."""

    def __init__(self, title: str, total: int) -> None:
        from rich.progress import Progress

        self.bar = Progress(transient=True)
        self.task = self.bar.add_task(title, total=total)

    def __enter__(self) -> Callable[[], None]:
        self.bar.start()
        return lambda: self.bar.advance(self.task)

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()
