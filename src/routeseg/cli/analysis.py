"""The commands that measure and show: evaluate, routes, architectures."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routeseg.cli.common import (
    PRECISION_HELP,
    add_budget_arguments,
    check_classes,
    config_parser,
    enough_memory,
    find_device,
    of_run,
    parse_size,
    progress_bar,
    quiet_libraries,
    read_data,
    say_precision,
    with_budget,
)
from routeseg.cli.parser import USAGE_ERROR, Parser
from routeseg.files import SURVEY_FILE, check_writable, write_atomically, write_json

if TYPE_CHECKING:
    import numpy as np

    from routeseg.budgets.worth import Worth
    from routeseg.evaluation import Evaluation
    from routeseg.evaluation.ranking import Ranking
    from routeseg.evaluation.submission import Submission


def evaluate_command(words: Sequence[str]) -> int:
    from routeseg.evaluation.boundary import BOUNDARY_WIDTH
    from routeseg.evaluation.windows import OVERLAP

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

    from routeseg.data.config import open_data
    from routeseg.model import checkpoints

    if args.worst is not None and Path(args.worst).suffix != ".png":
        raise ValueError(f"--worst is {args.worst}: it is drawn as a .png, name it so")
    if not 0 <= args.boundary_width <= 1:
        raise ValueError(f"--boundary_width is {args.boundary_width}: it is a share of the diagonal, 0 to 1")
    window = None if args.window is None else parse_size("--window", args.window)
    args.split = args.split or data.val_split
    pictures = open_data(data, args.split, args.seed)
    model = checkpoints.load_segmenter(args.checkpoint)

    from routeseg.cli.tables import print_evaluation
    from routeseg.data.loaders import evaluation_loader
    from routeseg.engine import SkipEngine
    from routeseg.evaluation import MultiPass, evaluate, machine_facts
    from routeseg.evaluation.ranking import Ranking
    from routeseg.evaluation.submission import Submission

    quiet_libraries()
    model = model.to(find_device(args.device))
    engine = with_budget(SkipEngine(model, args.precision), model, args)
    say_precision(engine)
    forward = MultiPass(engine, args.scales, args.flip, window, args.overlap, args.window_batch)
    check_classes(args.checkpoint, model, data, pictures.classes)
    for option, path in (("--json", args.json), ("--worst", args.worst)):
        if path is not None:
            check_writable(Path(path).parent, option)
    submission = None if args.submission is None else Submission(args.submission, data.name, args.split)
    ranking = None if args.worst is None else Ranking(pictures)

    def tell(name: str, prediction: np.ndarray) -> None:
        if submission is not None:
            submission.write(name, prediction)
        if ranking is not None:
            ranking(name, prediction)

    remedy = "let a window slide over them with --window 768x768, or leave out the larger --scales"
    with enough_memory(remedy), progress_bar(f"evaluate {data.name} {args.split}", len(pictures)) as step:
        result = evaluate(
            model,
            evaluation_loader(pictures, data.workers),
            forward,
            args.convention,
            step,
            args.boundary_width,
            None if submission is None and ranking is None else tell,
        )
    print_evaluation(result)
    if ranking is not None:
        _draw_worst(args.worst, ranking, result, model.config.palette)
    if args.json is not None:
        how = {key: args[key] for key in ("split", "scales", "flip", "window", "overlap", "boundary_width", "budget")}
        how["precision"] = engine.precision
        write_json(Path(args.json), result.as_dict() | how | {"command": ["evaluate", *words]} | machine_facts())
    if submission is not None:
        return _report_submission(submission, result.skipped)
    return 0


def _add_split(parser: Parser) -> None:
    parser.add_argument(
        "--split", type=str | None, default=None, help="train, val or test, as the data set calls them; data.val_split"
    )


def _draw_worst(path: str, ranking: Ranking, result: Evaluation, palette: Any) -> None:
    from routeseg import figures

    tiles = []
    for one in ranking.worst:
        image, labels = ranking.read(one)
        tiles.append((f"{one.name}, labels", image, labels))
        tiles.append((f"prediction: {100 * one.score:.1f} %", image, one.prediction))
    seen = result.confusion.sum(1)
    figures.contact_sheet(
        path,
        f"The {len(ranking.worst)} worst of {len(ranking.pictures)} images",
        [figures.Section("Labels, and beside them the prediction with its mean IoU over their classes", tiles)],
        result.class_names,
        palette,
        seen / max(seen.sum(), 1),
    )
    print(f"{path}: the worst images")


def _report_submission(submission: Submission, skipped: int) -> int:
    """Says what was written, and what is wrong with it; the exit code."""
    print(f"predictions written: {len(submission.written)}, as {submission.path('NAME')}")
    strangers = submission.strangers()
    if strangers:
        print(
            f"routeseg: note: other PNGs lie there, {len(strangers)} of them, such as {strangers[0].name}: take them "
            "out before you submit, unless they belong to it",
            file=sys.stderr,
        )
    if skipped:
        print(
            f"routeseg: error: the submission is not complete, images that could not be read: {skipped}",
            file=sys.stderr,
        )
    return USAGE_ERROR if skipped else 0


def routes_command(words: Sequence[str]) -> int:
    from routeseg.survey.route_statistics import PERMUTATIONS

    parser = config_parser("routes", ["data"])
    parser.add_argument("checkpoint", type=str, help="a checkpoint folder, of a network with gates or exits")
    _add_split(parser)
    parser.add_argument("--output", type=str, default="runs/routes", help="folder for routes.json and the figures")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--images", type=int | None, default=None, help="only so many, evenly spread over the set")
    parser.add_argument(
        "--common", type=float | None, default=None, help="write common_route.json: edges open in this share of images"
    )
    parser.add_argument("--permutations", type=int, default=PERMUTATIONS, help="relabellings of the permutation test")
    add_budget_arguments(parser)
    args, data = read_data(parser, of_run(words))

    from routeseg.data.config import open_data
    from routeseg.model import checkpoints

    args.split = args.split or data.val_split
    pictures = open_data(data, args.split, args.seed)
    model = checkpoints.load_segmenter(args.checkpoint)

    import numpy as np

    from routeseg.architectures import common_route
    from routeseg.budgets.worth import exits_of, look_at_exits, worth_of_choice
    from routeseg.cli.tables import print_survey
    from routeseg.cost.macs import exit_costs, model_cost
    from routeseg.data.loaders import evaluation_loader
    from routeseg.data.subset import evenly_spread
    from routeseg.engine import SkipEngine
    from routeseg.evaluation import machine_facts
    from routeseg.survey.routes import draw_survey, pictures_to_see, survey_routes

    quiet_libraries()
    model, output = model.to(find_device(args.device)), Path(args.output)
    check_classes(args.checkpoint, model, data, pictures.classes)
    if args.common is not None and not 0 < args.common <= 1:
        raise ValueError(f"--common is {args.common}: it is a share of the images, above 0 and at most 1")
    check_writable(output)
    engine = with_budget(SkipEngine(model), model, args)
    total = pictures_to_see(data, len(evenly_spread(pictures, args.images)))
    with enough_memory("give smaller images"), progress_bar(f"routes over {data.name} {args.split}", total) as step:
        survey = survey_routes(
            model, engine, data, args.split, args.seed, args.images, args.permutations, step, args.checkpoint
        )
    common = None if args.common is None else common_route(survey.observation.gates, args.common)
    figures = draw_survey(survey, model, engine, output)
    worth: Worth | None = None
    facts: dict[str, Any] = {"command": ["routes", *words], "data": data.name, "split": args.split, "seed": args.seed}
    facts["data_config"] = asdict(replace(data, root=data.root and os.path.abspath(data.root)))  # for `routeseg app`
    if model.exits is not None and survey.observation.evaluation.has_labels:
        observation = survey.observation
        costs_at = cache(lambda size: exit_costs(model, size))
        costs = np.stack([costs_at(size) for size in observation.sizes])
        costs /= costs[:, -1:]
        with progress_bar("every exit", len(observation.pictures)) as step:
            seen = look_at_exits(model, evaluation_loader(observation.pictures, data.workers), step)
        worth = worth_of_choice(seen, exits_of(model, observation.gates), costs, args.seed)
        facts["worth_of_choice"] = worth.as_dict()
    write_json(output / SURVEY_FILE, survey.as_dict() | facts | machine_facts())
    print_survey(survey)
    if worth is not None:
        print(worth)
    if common is not None:
        write_atomically(output / "common_route.json", (common.to_json() + "\n").encode())
        cost_at = cache(lambda size: model_cost(model, size).of_route(common) / 1e9)
        static_gmacs = sum(map(cost_at, survey.observation.sizes)) / len(survey.observation.sizes)
        print(
            f"{len(common)} edges open in {100 * args.common:g} % of the images, {static_gmacs:.3f} GMACs as a static "
            f"network: train it with --model.gate fixed --model.route {output}/common_route.json"
        )
    print(f"{output}/{SURVEY_FILE} and {len(figures)} figures beside it: " + ", ".join(path.name for path in figures))
    return 0


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

    from routeseg import figures
    from routeseg.architectures import ARCHITECTURES
    from routeseg.cli.tables import print_architectures
    from routeseg.evaluation.architecture_table import architecture_table
    from routeseg.space import Route, RoutingSpace

    space = RoutingSpace(args.depth)
    for option, path in (("--json", args.json), ("--figure", args.figure)):
        if path is not None:
            check_writable(Path(path).parent, option)
    if args.figure is not None:
        figures.picture_kind(args.figure)
    rows = architecture_table(
        space,
        size,
        num_classes=args.num_classes,
        base_channels=args.base_channels,
        convention=args.convention,
    )
    print_architectures(rows, f"{space}, {args.base_channels} channels, {args.num_classes} classes, at {args.size}")
    if args.json is not None:
        write_json(Path(args.json), rows)
    if args.figure is not None:
        routes = [*(known(space) for known in ARCHITECTURES.values()), Route.all_open(space)]
        panels = [
            (
                f"{row['name']}: {row['static_gmacs']:.1f} GMACs, {row['static_params_m']:.1f} M parameters",
                route.to_gates(),
            )
            for row, route in zip(rows, routes, strict=True)
        ]
        figures.route_grid(args.figure, space, panels)
    return 0
