"""The command of the explorer: app."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from routeseg.cli.parser import Parser
from routeseg.data.config import DataConfig, open_data
from routeseg.data.pairs import SegmentationData
from routeseg.errors import require
from routeseg.files import SURVEY_FILE, read_json


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
    args.survey = None if args.survey is None else read_survey(Path(args.survey))
    require("gradio", "app", "`routeseg app`")  # before the network is read

    from routeseg.cli.run.app import run_app

    return run_app(args)


def read_survey(folder: Path) -> tuple[dict[str, Any], SegmentationData]:
    """What `routeseg routes` wrote into a folder, and the data set that it is of: the parts of a `Survey`."""
    file = folder / SURVEY_FILE
    try:
        facts = read_json(file)
        config = DataConfig(**facts["data_config"])
        split, seed = str(facts["split"]), int(facts["seed"])
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}. `routeseg routes CHECKPOINT` writes it") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not say which data it is of: run `routeseg routes` again ({error})") from error

    return facts, open_data(config, split, seed)
