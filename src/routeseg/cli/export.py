"""The command that writes a network in the format of other runtimes: export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from routeseg.cli.common import best_of_run, progress_bar, read_route
from routeseg.cli.parser import Parser
from routeseg.files import check_writable

if TYPE_CHECKING:
    from routeseg.model import DynamicRoutingNetwork

MEGABYTE = 1e6


def export_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg export")
    parser.add_argument("checkpoint", type=str, help="a checkpoint folder, or that of a run")
    parser.add_argument("output", type=str, help="the file to write, NAME.onnx")
    parser.add_argument("--routed", action="store_true", help="with gates: the route is chosen for each image")
    parser.add_argument(
        "--route",
        type=str | None,
        default=None,
        help="one route for all images: a JSON file, an architecture, or of a network with exits exit-LAYER",
    )
    parser.add_argument(
        "--int8", type=str | None, default=None, help="quantise: images to calibrate with, a folder, glob, URL or @LIST"
    )
    args = parser.parse_args(list(words))
    args.checkpoint = best_of_run(args.checkpoint)

    from routeseg.model import checkpoints

    if args.routed and args.route is not None:
        raise ValueError("--routed keeps every route, --route keeps one: give one of them")
    checkpoints.read_config(Path(args.checkpoint))  # a wrong folder is told before PyTorch is imported

    from routeseg.export import check_kind, check_name, export, require_onnx

    path = check_name(args.output)
    require_onnx()
    check_writable(path.parent, "OUT")
    model = checkpoints.load(args.checkpoint)
    if args.route is not None:
        route = model.config.named_routes.get(args.route)
        model = model.specialize(read_route(args.route, model.route) if route is None else route)
    check_kind(model, args.routed)
    if args.int8 is None:
        export(model, path, args.routed)
    else:
        _export_int8(model, path, args.int8)
    summary, size_mb = _summary(model, skips=args.int8 is None), path.stat().st_size / MEGABYTE
    print(f"{path}: {summary}, {size_mb:.1f} MB\nrun it: routeseg predict {path} IMAGES")
    return 0


def _export_int8(model: DynamicRoutingNetwork, path: Path, images: str) -> None:
    from routeseg.export.int8 import chosen, export_int8
    from routeseg.prediction.sources import find_inputs

    sources = chosen(find_inputs([images]))
    with progress_bar("calibrate", len(sources)) as step:
        export_int8(model, path, sources, step)
    note = ". Closed paths are computed as well: in this file the gates spare nothing" if model.config.gated else ""
    print(f"int8, calibrated with {len(sources)} images{note}")


def _summary(model: DynamicRoutingNetwork, skips: bool) -> str:
    """Kind and cost of what is written; `skips`: closed paths are not computed."""
    from routeseg.cost.macs import model_cost
    from routeseg.export.metadata import COST_SIZE
    from routeseg.space import Route

    table, size = model_cost(model, COST_SIZE), "x".join(map(str, COST_SIZE))
    full = f"{table.full / 1e9:.2f} GMACs at {size}"
    if not model.config.gated:
        return f"a static network of {len(model.route)} edges, {full}"
    if not skips:
        return f"a network with gates, all paths computed, {full}"
    least = float(table.of_gates(Route(model.space).to_gates()))
    return f"a routed network, from {least / 1e9:.2f} (all paths closed) to {full}"
