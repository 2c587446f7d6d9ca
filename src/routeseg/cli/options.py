"""What several commands share: options of the same meaning, routes, a progress bar. No PyTorch here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.progress import Progress

from routeseg.architectures import DRAWN, architecture
from routeseg.budgets.asked import Asked
from routeseg.cli.parser import Parser
from routeseg.cost.latency import LatencyTable
from routeseg.errors import lacks_memory
from routeseg.files import MAX_JSON, check_writable, read_file
from routeseg.model.request import check_route
from routeseg.space import Route, edge_name

PRECISION_HELP = (
    "float32 (the default), bfloat16 (GPUs, CPUs with AVX512_BF16), float16 (GPUs), or auto: float32 or bfloat16, the "
    "one in which this machine is faster, measured anew each time"
)


def parse_size(option: str, text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH as numbers. Raises ValueError, naming the option, for anything else, and for sides under 32."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or min(size := (int(match[1]), int(match[2]))) < 32:
        raise ValueError(f"{option} is {text!r}: give HEIGHTxWIDTH, both at least 32, such as 1024x2048")
    return size


def check_files(args: Namespace, *names: str) -> None:
    """Raises ValueError, naming the option, if a file that one of these options names cannot be written."""
    for name in names:
        if args[name] is not None:
            check_writable(Path(args[name]).parent, f"--{name}")


def add_budget_arguments(parser: Parser) -> None:
    """--budget, --per_image, --budget_fixed and --latency."""
    parser.add_argument(
        "--budget",
        type=str | None,
        default=None,
        help="what a pass may cost in the mean, for a network with exits: 40%, 150% (of larger images), 0.5GMACs, or "
        "25ms with --latency",
    )
    parser.add_argument(
        "--per_image",
        action="store_true",
        help="each image keeps --budget, not the mean of them: for networks whose places leave by themselves",
    )
    parser.add_argument(
        "--budget_fixed",
        action="store_true",
        help="what an image may cost does not follow what others have cost: its result depends on it alone",
    )
    parser.add_argument(
        "--latency",
        type=str | None,
        default=None,
        help="table of this machine for --budget in ms, from `profile`; or a folder with tables of several sizes",
    )


def read_budget(args: Namespace) -> Asked | None:
    """The budget that is asked for. Raises ValueError if it is none, and for a latency table that is not needed."""
    if args.budget is None:
        for option in ("per_image", "budget_fixed"):
            if getattr(args, option):
                raise ValueError(f"--{option} is about --budget: give one, or leave it out")
        if args.latency is not None:
            raise ValueError("--latency only applies to --budget in ms: give one, or leave it out")
        return None
    tables = [] if args.latency is None else LatencyTable.read_all(args.latency)
    asked = Asked.parse(args.budget, tables, args.latency or "")
    if tables and asked.unit != "ms":
        raise ValueError("--latency only applies to --budget in ms: leave it out")
    if args.per_image and args.budget_fixed:
        raise ValueError("--per_image keeps a budget by itself: leave --budget_fixed out")
    return replace(asked, per_image=args.per_image, fixed=args.budget_fixed)


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

        self.bar = Progress(transient=True)
        self.task = self.bar.add_task(title, total=total)

    def __enter__(self) -> Callable[[], None]:
        self.bar.start()
        return lambda: self.bar.advance(self.task)

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()


def read_route(name: str, whole: Route) -> Route:
    """An architecture's route, or that of a file, as `Route.to_json` and `routeseg predict` write it; `whole` has the
    edges of the network.

    Raises ValueError, naming it, if it is neither, if its space is another one, and if it has dead ends or edges that
    the network lacks.
    """
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
