"""The commands about milliseconds: profile measures a table of them, latency predicts from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from routeseg.cli.common import (
    PRECISION_HELP,
    best_of_run,
    config_parser,
    enough_memory,
    find_device,
    network_options,
    parse_size,
    progress_bar,
    quiet_libraries,
    read_route,
)
from routeseg.cli.parser import Parser
from routeseg.files import check_writable, write_json

if TYPE_CHECKING:
    from routeseg.cost.latency import LatencyTable
    from routeseg.model import DynamicRoutingNetwork
    from routeseg.space import Route

OUTPUT = "runs/profile"  # if no checkpoint is given
CLASSES = 19  # of a network without a checkpoint
EVERYTHING_OPEN = "everything open"


def profile_command(words: Sequence[str]) -> int:
    from routeseg.cost.latency import REPEATS, ROUTES, by_part

    parser = config_parser("profile", ["model"])
    parser.add_argument(
        "checkpoint",
        type=str | None,
        nargs="?",
        default=None,
        help="a checkpoint folder; without one, a network with random weights, as the model section says",
    )
    parser.add_argument("--size", type=str, default="1024x2048", help="HEIGHTxWIDTH of the image")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", type=str, default="float32", help=PRECISION_HELP)
    parser.add_argument(
        "--num_classes", type=int | None, default=None, help=f"classes of a network without a checkpoint; {CLASSES}"
    )
    parser.add_argument("--routes", type=int, default=ROUTES, help="how many random routes test the predictions")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="forwards of each route; their median counts")
    parser.add_argument(
        "--output", type=str | None, default=None, help=f"folder; by default the checkpoint's, or {OUTPUT}"
    )
    parser.add_argument("--json", type=str | None, default=None, help="also write the table to this file")
    args = parser.parse_args(list(words))
    args.checkpoint = args.checkpoint and best_of_run(args.checkpoint)
    size = parse_size("--size", args.size)
    for option in ("routes", "repeats"):
        _check_positive(option, args[option])
    model = _network(args, words)

    from routeseg.cli.tables import print_latency
    from routeseg.cost.macs import model_cost
    from routeseg.engine.profiling import forwards, profile
    from routeseg.evaluation import machine_facts

    quiet_libraries()
    model = model.to(find_device(args.device))
    output = Path(args.output or args.checkpoint or OUTPUT)
    check_writable(output)
    if args.json is not None:
        check_writable(Path(args.json).parent, "--json")
    with (
        enough_memory("give a smaller --size"),
        progress_bar("profile", args.repeats * forwards(args.routes)) as step,
    ):
        table = profile(model, size, args.precision, args.routes, args.repeats, args.seed, step=step)
    if "precision_reason" in table.facts:
        print(f"precision: {table.precision} ({table.facts['precision_reason']})")
    table.facts["all_open_by_part"] = by_part(table, model_cost(model, size))
    table.facts.update({"command": ["profile", *words]} | machine_facts())
    path = output / f"{table.name}.json"
    table.write(path)
    title = f"{args.size}, {table.device}, {table.precision}"
    print_latency(table.facts["all_open_by_part"], table.facts, title)
    print(path)
    if args.json is not None:
        write_json(args.json, table.as_dict())
    return 0


def latency_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg latency")
    parser.add_argument("table", type=str, help="a table of milliseconds, as `routeseg profile` writes it")
    parser.add_argument(
        "--route", type=str | None, default=None, help=f"a JSON file, or an architecture; by default {EVERYTHING_OPEN}"
    )
    parser.add_argument(
        "--measure", type=str | None, default=None, help="also time the route in the network of this checkpoint folder"
    )
    parser.add_argument(
        "--repeats", type=int | None, default=None, help="forwards that --measure times; their median counts"
    )
    parser.add_argument("--json", type=str | None, default=None, help="also write the result to this file")
    args = parser.parse_args(list(words))

    from routeseg.cost.latency import LatencyTable

    if args.repeats is not None:
        if args.measure is None:
            raise ValueError("--repeats only applies to --measure: add that, or leave --repeats out")
        _check_positive("repeats", args.repeats)
    table = LatencyTable.read(args.table)
    whole = _whole_route(table)
    route = whole if args.route is None else read_route(args.route, whole)
    if args.json is not None:
        check_writable(Path(args.json).parent, "--json")
    if args.measure is None:
        rows: list[dict[str, Any]] = [
            {"open_edges": len(route), "gates": gates, "predicted_ms": table.of_route(route, gates)}
            for gates in (False, True)[: 1 + table.network["gated"]]
        ]
    else:
        rows = _measured(table, route, args)
    for row in rows:
        gates = "with gates" if row["gates"] else "without gates"
        measured = f", {row['measured_ms']:.2f} measured" if "measured_ms" in row else ""
        print(f"{args.route or EVERYTHING_OPEN}, {gates}: {row['predicted_ms']:.2f} ms predicted{measured}")
    if args.json is not None:
        write_json(
            args.json, {"table": args.table, "route": args.route, "route_ms": rows, "command": ["latency", *words]}
        )
    return 0


def _check_positive(option: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"--{option} is {value}: it must be at least 1")


def _network(args: Namespace, words: Sequence[str]) -> DynamicRoutingNetwork:
    """The checkpoint's network, or one with random weights as the model section says."""
    from routeseg.model import checkpoints

    if args.checkpoint is not None:
        for word in words:
            if word.startswith(("--model", "--num_classes")):
                raise ValueError(
                    f"{word.partition('=')[0]} describes a network without a checkpoint: leave it out, or leave out "
                    f"{args.checkpoint}"
                )
        return checkpoints.load_segmenter(args.checkpoint)
    from routeseg.config import NetworkConfig

    config = NetworkConfig(num_classes=args.num_classes or CLASSES, **network_options(args))

    import torch

    from routeseg.model import DynamicRoutingNetwork

    torch.manual_seed(args.seed)
    return DynamicRoutingNetwork(config).eval()


def _whole_route(table: LatencyTable) -> Route:
    """The edges that the network of a table has."""
    from routeseg.space import Route

    edges = table.network["route"]
    return Route.all_open(table.space) if edges is None else Route.from_named_edges(table.space, edges)


def _measured(table: LatencyTable, route: Route, args: Namespace) -> list[dict[str, Any]]:
    """The route's predicted and measured milliseconds, in the network of --measure."""
    from routeseg.cost.latency import REPEATS
    from routeseg.model import checkpoints

    model = checkpoints.load_segmenter(args.measure)

    from routeseg.engine.profiling import measure_route

    quiet_libraries()
    table.check(model.config, args.table)
    _check_machine(table, args.table)
    with enough_memory("measure a table of smaller images with `routeseg profile --size`"):
        return measure_route(model.to(table.device), table, route, args.repeats or REPEATS)


def _check_machine(table: LatencyTable, name: str) -> None:
    """Raises ValueError if a table was measured on a device that is not here, or with other threads than run now."""
    import torch

    try:
        find_device(table.device)
    except ValueError as error:
        raise ValueError(
            f"{name} was measured on {table.device}, which is not here: measure a table on this machine with "
            "`routeseg profile`"
        ) from error
    threads = table.facts.get("machine", {}).get("threads")
    if table.device == "cpu" and threads not in (None, torch.get_num_threads()):
        raise ValueError(
            f"{name} was measured with {threads} threads, this runs with {torch.get_num_threads()}: set OMP_NUM_THREADS"
        )
