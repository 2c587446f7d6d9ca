"""The explorer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from routeseg.app import Survey, launch
from routeseg.cli.common import config_parser, of_run, read_data
from routeseg.data.config import open_data
from routeseg.data.pairs import SegmentationData
from routeseg.files import RUN_CONFIG_FILE, best_of_run
from routeseg.model import checkpoints


def run_app(args: Namespace) -> int:
    checkpoint = None if args.checkpoint is None else best_of_run(args.checkpoint)
    model = checkpoints.load_segmenter(checkpoint)
    about: dict[str, Any] = {} if checkpoint is None else {"name": str(args.checkpoint)}
    if checkpoint is not None and (Path(checkpoint).parent / RUN_CONFIG_FILE).is_file():
        about["pictures"] = _data_of_run(checkpoint)
    page = launch(
        model,
        survey=None if args.survey is None else Survey(*args.survey),
        host=args.host,
        port=args.port,
        names=args.names,
        wait=False,
        inbrowser=args.browser,
        **about,
    )
    print(f"the explorer is at {page.local_url} (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0


def _data_of_run(checkpoint: str) -> SegmentationData | None:
    """What a run was validated on, if it is still there."""
    parser = config_parser("app", ["data"])
    parser.add_argument("checkpoint", type=str)
    parser.in_python = True
    try:
        args, data = read_data(parser, of_run([checkpoint]))
        return open_data(data, data.val_split, args.seed)
    except (ValueError, OSError):
        return None
