"""The command of the explorer: app."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routeseg.cli.common import config_parser, of_run, read_data
from routeseg.cli.parser import Parser
from routeseg.files import RUN_CONFIG_FILE, SURVEY_FILE, best_of_run, read_json

if TYPE_CHECKING:
    from routeseg.app import Survey
    from routeseg.data.pairs import SegmentationData


def app_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg app")
    parser.add_argument("checkpoint", type=str | None, nargs="?", default=None, help="a checkpoint folder, or a run")
    parser.add_argument("--survey", type=str | None, default=None, help="a folder that `routeseg routes` wrote")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="the address to listen on; 0.0.0.0: all")
    parser.add_argument("--port", type=int | None, default=None, help="by default the first free one from 7860 on")
    parser.add_argument(
        "--names", type=list[str], default=[], help="others that it is reached under, such as [streets.example.org]"
    )
    parser.add_argument("--browser", type=bool, default=True, help="false: do not open one")
    args = parser.parse_args(list(words))
    if args.port is not None and not 0 < args.port < 65536:
        raise ValueError(f"--port is {args.port}: give a number from 1 to 65535")
    survey = None if args.survey is None else _survey(Path(args.survey))

    from routeseg.errors import require

    require("gradio", "app", "`routeseg app`")  # before the network is read

    from routeseg.app import launch
    from routeseg.model import checkpoints

    checkpoint = None if args.checkpoint is None else best_of_run(args.checkpoint)
    model = checkpoints.load_segmenter(checkpoint)
    about: dict[str, Any] = {} if checkpoint is None else {"name": str(args.checkpoint)}
    if checkpoint is not None and (Path(checkpoint).parent / RUN_CONFIG_FILE).is_file():
        about["pictures"] = _data_of_run(checkpoint)
    page = launch(
        model,
        survey=survey,
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
    from routeseg.data.config import open_data

    parser = config_parser("app", ["data"])
    parser.add_argument("checkpoint", type=str)
    parser.in_python = True
    try:
        args, data = read_data(parser, of_run([checkpoint]))
        return open_data(data, data.val_split, args.seed)
    except (ValueError, OSError):
        return None


def _survey(folder: Path) -> Survey:
    """What `routeseg routes` wrote into a folder, and the data set that it is of."""
    from routeseg.data.config import DataConfig, open_data

    file = folder / SURVEY_FILE
    try:
        facts = read_json(file)
        config = DataConfig(**facts["data_config"])
        split, seed = str(facts["split"]), int(facts["seed"])
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}. `routeseg routes CHECKPOINT` writes it") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not say which data it is of: run `routeseg routes` again ({error})") from error
    from routeseg.app import Survey

    return Survey(facts, open_data(config, split, seed))
