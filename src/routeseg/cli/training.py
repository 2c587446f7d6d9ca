"""The commands that train: train, demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from routeseg.cli.common import config_parser, new_network, read_parts


def train_command(words: Sequence[str]) -> int:
    parser = config_parser("train")
    parser.add_argument("--output", type=str, default="runs/train", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT/last.ckpt")
    parser.add_argument("--devices", type=str, default="auto", help="how many devices, or auto")
    parser.add_argument("--accelerator", type=str, default="auto", help="cpu, gpu or auto")
    args, data, recipe, budget = read_parts(parser, words)

    from routeseg.tables import print_evaluation
    from routeseg.training import train

    model = new_network(args, data, recipe)
    result = train(
        model,
        data,
        recipe,
        budget,
        Path(args.output),
        resume=args.resume,
        devices=args.devices if args.devices == "auto" else int(args.devices),
        accelerator=args.accelerator,
    )
    if not result.trainer.is_global_zero:
        return 0
    if result.evaluation is not None:
        print_evaluation(result.evaluation)
    print(f"{result.seconds / 60:.1f} minutes; networks in {result.output}/best and {result.output}/last")
    return 0


def demo_command(words: Sequence[str]) -> int:
    parser = config_parser("demo")
    parser.add_argument("--output", type=str, default="runs/demo", help="folder of the run and its report")
    parser.add_argument("--minutes", type=float | None, default=None, help="time to train; else recipe.iterations")
    args, data, recipe, budget = read_parts(parser, words)

    from routeseg.demo import run_demo

    run_demo(new_network(args, data, recipe), data, recipe, budget, Path(args.output), args.minutes)
    return 0
