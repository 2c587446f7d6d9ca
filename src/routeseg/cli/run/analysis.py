"""Evaluate, routes and architectures."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace

from routeseg import figures
from routeseg.architectures import ARCHITECTURES, common_route
from routeseg.budgets.worth import Worth, exits_of, look_at_exits, worth_of_choice
from routeseg.cli.common import check_classes
from routeseg.cli.logs import quiet_libraries
from routeseg.cli.options import check_files, enough_memory, progress_bar, say_precision
from routeseg.cli.parser import USAGE_ERROR
from routeseg.cli.run.networks import find_device, with_budget
from routeseg.cli.tables import print_architectures, print_evaluation, print_survey
from routeseg.cost.macs import exit_costs, model_cost
from routeseg.data.config import DataConfig
from routeseg.data.loaders import evaluation_loader
from routeseg.data.pairs import SegmentationData
from routeseg.data.subset import evenly_spread
from routeseg.engine import SkipEngine
from routeseg.evaluation import Evaluation, MultiPass, evaluate, machine_facts
from routeseg.evaluation.architecture_table import architecture_table
from routeseg.evaluation.ranking import Ranking
from routeseg.evaluation.submission import Submission
from routeseg.files import SURVEY_FILE, check_writable, write_atomically, write_json
from routeseg.model import DynamicRoutingNetwork
from routeseg.space import Route, RoutingSpace
from routeseg.survey.routes import draw_survey, images_to_see, survey_routes


def run_evaluate(
    args: Namespace, data: DataConfig, images: SegmentationData, model: DynamicRoutingNetwork, words: Sequence[str]
) -> int:
    quiet_libraries()
    model = model.to(find_device(args.device))
    engine = with_budget(SkipEngine(model, args.precision), model, args)
    say_precision(engine)
    forward = MultiPass(engine, args.scales, args.flip, args.window_size, args.overlap, args.window_batch)
    check_classes(args.checkpoint, model, data, images.classes)
    check_files(args, "json", "worst")
    submission = None if args.submission is None else Submission(args.submission, data.name, args.split)
    ranking = None if args.worst is None else Ranking(images)

    def tell(name: str, prediction: np.ndarray) -> None:
        if submission is not None:
            submission.write(name, prediction)
        if ranking is not None:
            ranking(name, prediction)

    remedy = "let a window slide over them with --window 768x768, or leave out the larger --scales"
    with enough_memory(remedy), progress_bar(f"evaluate {data.name} {args.split}", len(images)) as step:
        result = evaluate(
            model,
            evaluation_loader(images, data.workers),
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


def _draw_worst(path: str, ranking: Ranking, result: Evaluation, palette: Any) -> None:
    tiles = []
    for one in ranking.worst:
        image, labels = ranking.read(one)
        tiles.append((f"{one.name}, labels", image, labels))
        tiles.append((f"prediction: {100 * one.score:.1f} %", image, one.prediction))
    seen = result.confusion.sum(1)
    figures.contact_sheet(
        path,
        f"The {len(ranking.worst)} worst of {len(ranking.images)} images",
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


def run_routes(
    args: Namespace, data: DataConfig, images: SegmentationData, model: DynamicRoutingNetwork, words: Sequence[str]
) -> int:
    quiet_libraries()
    model, output = model.to(find_device(args.device)), Path(args.output)
    check_classes(args.checkpoint, model, data, images.classes)
    if args.common is not None and not 0 < args.common <= 1:
        raise ValueError(f"--common is {args.common}: it is a share of the images, above 0 and at most 1")
    check_writable(output)
    engine = with_budget(SkipEngine(model), model, args)
    total = images_to_see(data, len(evenly_spread(images, args.images)))
    with enough_memory("give smaller images"), progress_bar(f"routes over {data.name} {args.split}", total) as step:
        survey = survey_routes(
            model, engine, data, args.split, args.seed, args.images, args.permutations, step, args.checkpoint
        )
    common = None if args.common is None else common_route(survey.observation.gates, args.common)
    figures = draw_survey(survey, model, engine, output)
    worth: Worth | None = None
    facts: dict[str, Any] = {"command": ["routes", *words], "data": data.name, "split": args.split, "seed": args.seed}
    facts["data_config"] = asdict(replace(data, root=data.root and os.path.abspath(data.root)))  # for `routeseg app`
    if model.exits is not None and model.config.place is None and survey.observation.evaluation.has_labels:
        observation = survey.observation
        costs_at = cache(lambda size: exit_costs(model, size))
        costs = np.stack([costs_at(size) for size in observation.sizes])
        costs /= costs[:, -1:]
        with progress_bar("every exit", len(observation.images)) as step:
            seen = look_at_exits(model, evaluation_loader(observation.images, data.workers), step)
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


def run_architectures(args: Namespace, size: tuple[int, int]) -> int:
    space = RoutingSpace(args.depth)
    check_files(args, "json", "figure")
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
