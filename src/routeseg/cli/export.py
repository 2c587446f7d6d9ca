"""The command that writes a network in the format of other runtimes: export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from routeseg.cli.parser import Parser
from routeseg.files import best_of_run
from routeseg.model import checkpoints


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

    checkpoints.read_config(Path(args.checkpoint))  # a wrong folder is told before PyTorch is imported

    from routeseg.cli.run.export import run_export

    return run_export(args)
