"""The commands about data sets: make-data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from routeseg.cli.common import Parser, progress_bar


def make_data_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg make-data")
    parser.add_argument("name", type=str, help="scenes")
    parser.add_argument("output", type=str, help="folder to write: images/, masks/ and classes.yaml")
    parser.add_argument("--train", type=int, default=200, help="training pictures")
    parser.add_argument("--val", type=int, default=50, help="validation pictures")
    parser.add_argument("--size", type=tuple[int, int], default=(256, 512), help="[height, width]")
    parser.add_argument("--preset", type=str, default="mixed", help="large, small or mixed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(list(words))
    if args.name != "scenes":
        raise ValueError(f"cannot make {args.name!r}: choose scenes")

    from routeseg.data.datamodule import DataConfig, write_folder

    config = DataConfig(image_size=args.size, preset=args.preset, train_images=args.train, val_images=args.val)
    with progress_bar("make-data", args.train + args.val) as step:
        write_folder(config, Path(args.output), args.seed, step)
    print(f"{args.output}: {args.train} training and {args.val} validation pictures")
    print(f"train on them with --data.name folder --data.root {args.output}")
    return 0
