"""Export."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from routeseg.cli.options import progress_bar, read_route
from routeseg.cost.macs import model_cost
from routeseg.export import check_name, export, kind_of, require_onnx
from routeseg.export.int8 import chosen, export_int8
from routeseg.export.metadata import COST_SIZE
from routeseg.files import check_writable
from routeseg.model import DynamicRoutingNetwork, checkpoints
from routeseg.prediction.sources import find_inputs

MEGABYTE = 1e6


def run_export(args: Namespace) -> int:
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
    sources = chosen(find_inputs([images]))
    with progress_bar("calibrate", len(sources)) as step:
        export_int8(model, path, sources, step, labels)
    print(f"int8, calibrated with {len(sources)} images")


def _summary(model: DynamicRoutingNetwork) -> str:
    """Kind and cost of what is written."""
    what = f"a static network of {len(model.route)} edges"
    if model.exits is not None:
        what = f"a network with {len(model.exits.layers)} exits, which takes a price for each image"
    elif model.config.gated:
        what = "a network with gates, all paths computed"
    return f"{what}, {model_cost(model, COST_SIZE).full / 1e9:.2f} GMACs at {'x'.join(map(str, COST_SIZE))}"
