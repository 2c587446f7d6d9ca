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
    parser.add_argument(
        "--route",
        type=str | None,
        default=None,
        help="one route for all images: a JSON file, an architecture, or of a network with exits exit-LAYER",
    )
    parser.add_argument(
        "--int8", type=str | None, default=None, help="quantise: images to calibrate with, a folder, glob, URL or @LIST"
    )
    parser.add_argument(
        "--labels", action="store_true", help="the file gives labels and their probability, in the place of logits"
    )
    if "--routed" in words:
        raise ValueError(
            "--routed is gone: without it a file with exits takes a price, and one with gates computes all paths"
        )
    args = parser.parse_args(list(words))
    args.checkpoint = best_of_run(args.checkpoint)

    from routeseg.model import checkpoints

    checkpoints.read_config(Path(args.checkpoint))  # a wrong folder is told before PyTorch is imported

    from routeseg.export import check_name, export, kind_of, require_onnx

    path = check_name(args.output)
    require_onnx()
    check_writable(path.parent, "OUT")
    model = checkpoints.load_segmenter(args.checkpoint)
    if args.route is not None:
        route = model.config.named_routes.get(args.route)
        model = model.specialize(read_route(args.route, model.route) if route is None else route)
    kind_of(model)
    if args.int8 is None:
        export(model, path, args.labels)
    else:
        _export_int8(model, path, args.int8, args.labels)
    summary, size_mb = _summary(model), path.stat().st_size / MEGABYTE
    budget = "" if model.exits is None else " --budget 50%"
    print(f"{path}: {summary}, {size_mb:.1f} MB\nrun it: routeseg predict {path} IMAGES{budget}")
    return 0


def _export_int8(model: DynamicRoutingNetwork, path: Path, images: str, labels: bool) -> None:
    from routeseg.export.int8 import chosen, export_int8
    from routeseg.prediction.sources import find_inputs

    sources = chosen(find_inputs([images]))
    with progress_bar("calibrate", len(sources)) as step:
        export_int8(model, path, sources, step, labels)
    print(f"int8, calibrated with {len(sources)} images")


def _summary(model: DynamicRoutingNetwork) -> str:
    """Kind and cost of what is written."""
    from routeseg.cost.macs import model_cost
    from routeseg.export.metadata import COST_SIZE

    what = f"a static network of {len(model.route)} edges"
    if model.exits is not None:
        what = f"a network with {len(model.exits.layers)} exits, which takes a price for each image"
    elif model.config.gated:
        what = "a network with gates, all paths computed"
    return f"{what}, {model_cost(model, COST_SIZE).full / 1e9:.2f} GMACs at {'x'.join(map(str, COST_SIZE))}"
