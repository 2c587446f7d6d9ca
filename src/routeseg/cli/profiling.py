"""The command that measures milliseconds: profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from routeseg.cli.common import (
    PRECISION_HELP,
    config_parser,
    enough_memory,
    find_device,
    network_options,
    parse_size,
    progress_bar,
    read_parts,
    read_route,
)
from routeseg.files import check_writable, write_json

if TYPE_CHECKING:
    from routeseg.cost.latency import LatencyTable
    from routeseg.model import DynamicRoutingNetwork

OUTPUT = "runs/profile"  # where no checkpoint is given


def profile_command(words: Sequence[str]) -> int:
    parser = config_parser("profile")
    parser.add_argument(
        "checkpoint",
        type=str | None,
        nargs="?",
        default=None,
        help="a checkpoint folder; without one, random weights in the network of the model section",
    )
    parser.add_argument("--size", type=str, default="1024x2048", help="HEIGHTxWIDTH of the image")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", type=str | None, default=None, help=PRECISION_HELP)
    parser.add_argument("--num_classes", type=int, default=19, help="of a network without a checkpoint")
    parser.add_argument("--routes", type=int | None, default=None, help="to test predictions on, drawn; 50")
    parser.add_argument("--repeats", type=int | None, default=None, help="forwards of each, whose median counts; 11")
    parser.add_argument(
        "--route", type=str | None, default=None, help="also time this route: a JSON file, or an architecture"
    )
    parser.add_argument(
        "--table", type=str | None, default=None, help="predict --route from this file, and measure no table"
    )
    parser.add_argument(
        "--output", type=str | None, default=None, help=f"folder; by default the checkpoint's, or {OUTPUT}"
    )
    parser.add_argument("--json", type=str | None, default=None, help="also write the result to this file")
    args, _, recipe, _ = read_parts(parser, words)
    size = parse_size("--size", args.size)

    from routeseg.cli.tables import print_latency
    from routeseg.cost.latency import LatencyTable, by_part
    from routeseg.cost.macs import model_cost
    from routeseg.engine.profiling import REPEATS, ROUTES, forwards, measure_route, profile
    from routeseg.evaluation import machine_facts
    from routeseg.figures import latency_scatter

    for option in ("routes", "repeats"):
        if args[option] is not None and args[option] < 1:
            raise ValueError(f"--{option} is {args[option]}: it must be at least 1")
    if args.table is not None and args.route is None:
        raise ValueError("--table predicts a route: name one with --route, or leave --table out to measure")
    for option in ("precision", "routes", "output"):
        if args.table is not None and args[option] is not None:
            raise ValueError(f"--{option} is of a new table, --table names one that is there: leave one of them out")
    routes, repeats = args.routes or ROUTES, args.repeats or REPEATS
    model = _network(args, recipe.seed).to(find_device(args.device))
    route = None if args.route is None else read_route(args.route, model.route)
    output = Path(args.output or args.checkpoint or OUTPUT)
    if args.table is None:
        check_writable(output)
    if args.json is not None:
        check_writable(Path(args.json).parent, "--json")
    with enough_memory("give a smaller --size"):
        if args.table is not None:
            table = LatencyTable.read(args.table)
            table.check(model.config, size, args.table)
            _check_conditions(table, model, args.table)
        else:
            with progress_bar("profile", repeats * forwards(routes)) as step:
                precision: Any = args.precision or "float32"
                table = profile(model, size, precision, routes, repeats, recipe.seed, step=step)
            table.facts["all_open_by_part"] = by_part(table, model_cost(model, size))
            table.facts.update({"command": ["profile", *words]} | machine_facts())
        timed = [] if route is None else measure_route(model, table, route, repeats)
    if args.table is None:
        path = output / f"{table.name}.json"
        table.write(path)
        title = f"{args.size}, {table.device}, {table.precision}"
        latency_scatter(path.with_suffix(".png"), table.facts["test"]["routes"], title)
        print_latency(table.facts["all_open_by_part"], table.facts, title)
        print(f"{path}, and a figure beside it")
    for row in timed:
        kind = "with gates" if row["gates"] else "without gates"
        print(f"{args.route}, {kind}: {row['predicted_ms']:.2f} ms predicted, {row['measured_ms']:.2f} measured")
    if args.json is not None:
        write_json(args.json, table.as_dict() | ({"route": args.route, "route_ms": timed} if timed else {}))
    return 0


def _network(args: Namespace, seed: int) -> DynamicRoutingNetwork:
    """The checkpoint's, or one with random weights as the model section says."""
    import torch

    from routeseg.model import DynamicRoutingNetwork, checkpoints

    if args.checkpoint is not None:
        return checkpoints.load(args.checkpoint)
    torch.manual_seed(seed)
    return DynamicRoutingNetwork(num_classes=args.num_classes, **network_options(args)).eval()


def _check_conditions(table: LatencyTable, model: DynamicRoutingNetwork, name: str) -> None:
    """Raises ValueError where a table was measured on another device, or with other threads, than would run now."""
    import torch

    device, threads = next(model.parameters()).device, table.facts.get("machine", {}).get("threads")
    if table.device != str(device):
        raise ValueError(f"{name} was measured on {table.device}, this runs on {device}: set --device")
    if device.type == "cpu" and threads not in (None, torch.get_num_threads()):
        raise ValueError(
            f"{name} was measured with {threads} threads, this runs with {torch.get_num_threads()}: set OMP_NUM_THREADS"
        )
