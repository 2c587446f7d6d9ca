"""`routeseg predict` for videos: which words mean one, and what is asked of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from jsonargparse import Namespace

from routeseg.cli.options import progress_bar
from routeseg.cli.parser import USAGE_ERROR, Parser
from routeseg.errors import require
from routeseg.prediction.clips import UnreadableVideo, is_video, open_clip
from routeseg.prediction.files import Runner
from routeseg.prediction.sources import Source, find_inputs, is_url, output_names
from routeseg.prediction.video import FramePace, predict_video, video_folder

ONLY_VIDEOS = ("fps", "frame_ms", "frames", "effort")  # options that images have no use for
ONLY_IMAGES = {"resume": "a video is segmented anew", "workers": "one process takes the frames in turn"}
ONLY_IMAGES["ray_address"] = ONLY_IMAGES["workers"]
MS_PER_S = 1000.0


def add_video_arguments(parser: Parser) -> None:
    """--source, --fps, --frame_ms, --frames and --effort."""
    parser.add_argument(
        "--source", type=str | None, default=None, help="a video: the number of a camera, a stream (rtsp://...), a file"
    )
    parser.add_argument(
        "--fps",
        type=float | None,
        default=None,
        help="of a video, frames a second that are to hold while others use the machine, with a network with exits",
    )
    parser.add_argument(
        "--frame_ms", type=float | None, default=None, help="the same as milliseconds that a frame may take"
    )
    parser.add_argument("--frames", type=int | None, default=None, help="of a video, end after so many frames")
    parser.add_argument(
        "--effort",
        action="store_true",
        default=None,
        help="of a video, its overlay shows how far each place went at --budget, with a network with places",
    )


def find_videos(words: Sequence[str], args: Namespace) -> list[Source]:
    """The videos that are meant, each once; none if these words mean images, for which the options are checked.

    Raises ValueError for images and videos together, and for options of the one that are given with the other.
    """
    if args.source is not None and words:
        raise ValueError(f"--source is {args.source}: leave out {words[0]}, or --source")
    given = list(words) if args.source is None else [args.source]
    videos = given if args.source is not None else [word for word in given if is_video(word)]
    if not videos:
        for option in ONLY_VIDEOS:
            if getattr(args, option) is not None:
                raise ValueError(f"--{option} only applies to videos: leave it out")
        return []
    for word in given:
        if word not in videos:
            raise ValueError(f"{videos[0]} is a video, {word} is none: predict them in commands of their own")
    for option, why in ONLY_IMAGES.items():
        if getattr(args, option):
            raise ValueError(f"--{option} only applies to images, {why}: leave it out")
    if args.frames is not None and args.frames < 1:
        raise ValueError(f"--frames is {args.frames}: give 1 or more")
    if args.effort and (args.budget is None or not args.pictures):
        raise ValueError("--effort draws how far places go at a budget: give --budget, and no --pictures false")
    frame_ms(args)
    found: list[Source] = []
    for word in videos:
        found += [word] if word.isdecimal() and args.source is not None or is_url(word) else find_inputs([word])
    return list(dict.fromkeys(found))


def frame_ms(args: Namespace) -> float | None:
    """What a frame may take. Raises ValueError for what is no time, and for two ways to say it."""
    if args.latency is not None and re.fullmatch(r"[\d.]+\s*m?s", args.latency):
        number = args.latency.rstrip("ms ")
        raise ValueError(f"--latency is {args.latency}, and means the table of a machine: give --frame_ms {number}")
    given = [name for name in ("fps", "frame_ms", "budget") if getattr(args, name) is not None]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} are given: choose one, each decides how far frames go")
    for name in ("fps", "frame_ms"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} is {value:g}: give a number above 0")
    return args.frame_ms if args.fps is None else MS_PER_S / args.fps


def predict_videos(sources: Sequence[Source], args: Namespace, open_runner: Callable[[], Runner]) -> int:
    """Segments one video after the other. The network is opened once one of them could be."""
    require("av", "video", "a video")

    video_folder(args.output)
    target, runner, skipped = frame_ms(args), None, list[str]()
    camera = args.source is not None and args.source.isdecimal()
    names = [f"camera-{args.source}"] if camera else [name or "stream" for name in output_names(sources)]
    for source, name in zip(sources, names, strict=True):
        try:
            clip = open_clip(source, args.max_pixels)
            if runner is None:
                runner = open_runner()
            pace = None if target is None else FramePace(cast(Any, runner).forward, target)
            with progress_bar(name, clip.frames if args.frames is None else args.frames) as step:
                summary = predict_video(
                    runner, clip, args.output, name, args.pictures, pace, args.frames, step, bool(args.effort)
                )
        except UnreadableVideo as error:
            if len(sources) == 1:
                raise
            skipped.append(str(error))
        else:
            print(summary.table())
    for reason in skipped:
        print(f"skipped: {reason}")
    return USAGE_ERROR if skipped else 0
