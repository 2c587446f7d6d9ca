"""The commands that measure and show: evaluate, routes, architectures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from routeseg.cli.common import config_parser, of_run, read_data
from routeseg.cli.options import PRECISION_HELP, add_budget_arguments, parse_size
from routeseg.cli.parser import Parser
from routeseg.data.config import open_data
from routeseg.evaluation.boundary import BOUNDARY_WIDTH
from routeseg.evaluation.windows import OVERLAP
from routeseg.files import SURVEY_FILE
from routeseg.model import checkpoints
from routeseg.survey.route_statistics import PERMUTATIONS


def evaluate_command(words: Sequence[str]) -> int:
    parser = config_parser("evaluate", ["data"])
    parser.usage = "routeseg evaluate RUN [options], or routeseg evaluate CHECKPOINT --config FILE [options]"
    parser.first = {
        "RUN": "folder of a run, for its best network on its data; or a checkpoint folder",
        "config PRESET": "the data, if the run does not know them; --data.root FOLDER: where they lie",
        "split SPLIT": "train, val or test [the configuration's val_split]",
        "budget BUDGET": "what an image may cost in the mean: 40%, 0.5GMACs, or 25ms with --latency TABLE",
        "json FILE": "write the result there, too",
        "worst FILE.png": "draw the images with the lowest scores there",
        "scales [S,...]": "sizes of each image whose predictions are averaged [[1.0]]",
        "window HxW": "size of windows that slide over large images",
        "precision P": "float32, bfloat16, float16, or auto: what is faster here [float32]",
        "device DEVICE": "cpu or cuda [cpu]",
    }
    parser.add_argument("checkpoint", type=str, help="a checkpoint folder")
    parser.add_argument("--json", type=str | None, default=None, help="also write the result to this file")
    _add_split(parser)
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", type=str, default="float32", help=PRECISION_HELP)
    parser.add_argument("--convention", type=str, default="authors", help="how cost is counted: authors or full")
    parser.add_argument("--scales", type=list[float], default=[1.0], help="several sizes of each image, averaged")
    parser.add_argument("--flip", type=bool, default=False, help="each view mirrored too, averaged")
    parser.add_argument(
        "--window", type=str | None, default=None, help="HEIGHTxWIDTH of windows that slide over large images"
    )
    parser.add_argument(
        "--overlap", type=float, default=OVERLAP, help="what neighbouring windows share, a part of their side"
    )
    parser.add_argument("--window_batch", type=int, default=1, help="how many windows run at once")
    parser.add_argument(
        "--boundary_width",
        type=float,
        default=BOUNDARY_WIDTH,
        help="how wide the bands of boundary IoU are, a share of the diagonal; 0: no boundary IoU",
    )
    parser.add_argument(
        "--submission", type=str | None, default=None, help="write predictions in the official form into this folder"
    )
    parser.add_argument(
        "--worst", type=str | None, default=None, help="draw the images with the lowest scores into this .png"
    )
    add_budget_arguments(parser)
    args, data = read_data(parser, of_run(words))

    if args.worst is not None and Path(args.worst).suffix != ".png":
        raise ValueError(f"--worst is {args.worst}: it is drawn as a .png, name it so")
    if not 0 <= args.boundary_width <= 1:
        raise ValueError(f"--boundary_width is {args.boundary_width}: it is a share of the diagonal, 0 to 1")
    args.window_size = None if args.window is None else parse_size("--window", args.window)
    args.split = args.split or data.val_split
    images = open_data(data, args.split, args.seed)
    model = checkpoints.load_segmenter(args.checkpoint)

    from routeseg.cli.run.analysis import run_evaluate

    return run_evaluate(args, data, images, model, words)


def _add_split(parser: Parser) -> None:
    parser.add_argument(
        "--split", type=str | None, default=None, help="train, val or test, as the data set calls them; data.val_split"
    )


def routes_command(words: Sequence[str]) -> int:
    parser = config_parser("routes", ["data"])
    parser.add_argument("checkpoint", type=str, help="a checkpoint folder, of a network with gates or exits")
    _add_split(parser)
    parser.add_argument("--output", type=str, default="runs/routes", help=f"folder for {SURVEY_FILE} and the figures")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--images", type=int | None, default=None, help="only so many, evenly spread over the set")
    parser.add_argument(
        "--common", type=float | None, default=None, help="write common_route.json: edges open in this share of images"
    )
    parser.add_argument("--permutations", type=int, default=PERMUTATIONS, help="relabellings of the permutation test")
    add_budget_arguments(parser)
    args, data = read_data(parser, of_run(words))

    args.split = args.split or data.val_split
    images = open_data(data, args.split, args.seed)
    model = checkpoints.load_segmenter(args.checkpoint)

    from routeseg.cli.run.analysis import run_routes

    return run_routes(args, data, images, model, words)


def architectures_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg architectures")
    parser.add_argument("--size", type=str, default="1024x2048", help="HEIGHTxWIDTH of the image that costs are for")
    parser.add_argument("--depth", type=int, default=16, help="layers of the routing space")
    parser.add_argument("--base_channels", type=int, default=64, help="channels at the finest scale")
    parser.add_argument("--num_classes", type=int, default=19)
    parser.add_argument("--convention", type=str, default="authors", help="how cost is counted: authors, full or conv")
    parser.add_argument("--json", type=str | None, default=None, help="also write the table to this file")
    parser.add_argument("--figure", type=str | None, default=None, help="draw all of them into this .png or .svg")
    args = parser.parse_args(list(words))
    size = parse_size("--size", args.size)

    from routeseg.cli.run.analysis import run_architectures

    return run_architectures(args, size)
