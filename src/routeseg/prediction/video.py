"""A video in; the same with its segmentation laid over it out, and a table of what each frame cost.

For a video named NAME the output folder gets
    NAME_overlay.mp4    each frame tinted with its segmentation, at its own time
    NAME_overlay.png    the first one of them, with a legend
    NAME_frames.csv     a row for each frame (`Row`)
    NAME_summary.json   what became of all of them (`VideoSummary`); written last

Frames run through the same `Runner` as images (files.py). With `FramePace`, a network with exits keeps the time that is
asked for each frame (budgets/pacing.py). What is decoded and encoded, and how: clips.py. No torch here.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np

from routeseg import figures
from routeseg.budgets.pacing import Allowed, Pacer, time_weights
from routeseg.description import NetworkDescription
from routeseg.errors import NO_PLACES, BudgetNotKept, lacks_memory
from routeseg.files import check_writable, expand_user, write_atomically, write_json, written_whole
from routeseg.prediction.clips import Clip, Frame, UnreadableVideo, VideoWriter
from routeseg.prediction.files import GIGA, Runner, Segmented, effort_of, segment
from routeseg.prediction.sources import Source, is_url

OVERLAY, STILL, FRAMES, SUMMARY = "_overlay.mp4", "_overlay.png", "_frames.csv", "_summary.json"
MS = 1000.0
LATEST = 95  # percentile of the frame time that is reported
PROBES = 2  # of each level, before the first frame


class Row(NamedTuple):
    """A frame in the table.

    frame            its number; time_s since the first one
    cost_gmacs       of what ran, and as a share of the full network's
    requested_share  what the time for a frame would have allowed; None without a `FramePace`, as `late`
    exit             at which it left, 0 the cheapest, or the last of its places did; None: there are none, or it ran in
                     windows that left at several
    ms               of the network; frame_ms of all: reading, drawing and writing, too
    late             it took longer than was asked
    """

    frame: int
    time_s: float
    cost_gmacs: float
    share: float
    requested_share: float | None
    exit: int | None
    ms: float
    frame_ms: float
    late: bool | None


@dataclass(frozen=True)
class VideoSummary:
    """What became of a video.

    broken, lost     frames that could not be decoded, and those of a live video that came while another was worked on
    cost_gmacs       mean, least and greatest real cost of a frame; shares the same, of the full network's
    ms, frame_ms     median and 95th percentile of the network's time, and of the whole frame's
    asked_ms         what a frame was to take; None: nothing was asked. late: the share of those that took longer
    network          fingerprint of the network, and the precision that it computed in
    """

    video: str
    output: str
    frames: int
    broken: int
    lost: int
    size: tuple[int, int]
    seconds: float
    cost_gmacs: tuple[float, float, float]
    shares: tuple[float, float, float]
    ms: tuple[float, float]
    frame_ms: tuple[float, float]
    asked_ms: float | None
    late: float | None
    network: str
    precision: str

    def table(self) -> str:
        """The summary as lines of text."""
        said = [f"{self.broken} broken"] if self.broken else []
        said += [f"{self.lost} lost while others were worked on"] if self.lost else []
        rows = [("video", self.video), ("frames", ", ".join([str(self.frames), *said]))]
        for name, cost, share in zip(("mean", "min", "max"), self.cost_gmacs, self.shares, strict=True):
            rows.append((f"real cost, {name}", f"{cost:.4g} GMACs ({100 * share:.1f} % of the full network)"))
        for name, (half, most) in (("network", self.ms), ("frame, all in all", self.frame_ms)):
            rows.append((name, f"{half:.1f} ms (median), {most:.1f} ms ({LATEST}th percentile)"))
        if self.asked_ms is not None and self.late is not None:
            rows.append(("asked", f"{self.asked_ms:.1f} ms; {100 * self.late:.1f} % of the frames were late"))
        rows += [("time", f"{self.seconds:.1f} s"), ("results", self.output)]
        wide = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{wide}}  {value}" for name, value in rows)


class Steering(Protocol):
    """A forward that is told what its images cost: `budgets.budgeted.Steered`."""

    level: int

    def costs(self, size: tuple[int, int]) -> np.ndarray: ...


class FramePace:
    """Keeps the time of each frame: `steering` is in the runner that segments them.

    frame_ms  what a frame may take, all in all
    """

    def __init__(self, steering: Steering, frame_ms: float) -> None:
        self.steering, self.frame_ms = steering, frame_ms
        self._pacer: Pacer | None = None

    def begin(self, size: tuple[int, int], run: Callable[[], object]) -> None:
        """Finds out how the times of the levels compare; `run` segments the first frame, of this size."""
        costs = self.steering.costs(size)
        seconds: list[list[float]] = [[] for _ in costs]
        for level in list(range(len(costs))) * PROBES:
            self.steering.level, start = level, time.perf_counter()
            run()
            seconds[level].append(time.perf_counter() - start)
        weights = time_weights(costs, MS * np.min(seconds, axis=1))
        self._pacer = Pacer(costs, self.frame_ms, weights)

    def next(self) -> Allowed:
        """Has the next frame cost what its time allows, and says what that is."""
        assert self._pacer is not None
        allowed = self._pacer.next()
        self.steering.level = allowed.level
        return allowed

    def saw(self, row: Row) -> None:
        assert self._pacer is not None
        if row.frame > 0:  # what begins with the first frame, such as the encoder, takes its time once
            self._pacer.saw(self.steering.level, row.ms, row.frame_ms)


def predict_video(
    runner: Runner,
    clip: Clip,
    output: Source,
    name: str,
    pictures: bool = True,
    pace: FramePace | None = None,
    most: int | None = None,
    on_frame: Callable[[], None] | None = None,
    effort: bool = False,
) -> VideoSummary:
    """Segments a video frame by frame and writes its files into the folder `output`, replacing older ones.

    name      NAME of the files
    pictures  False: no overlays, the table alone
    pace      what keeps the time of each frame; None: all take what they take
    most      frames after which it ends; None: at the end of the video
    on_frame  called after each frame (for a progress bar)
    effort    overlays show how far each place of a frame went, in place of its classes

    Each file is written whole or not at all: Ctrl-C leaves none, but for a live video, which ends by it. The video is
    closed in any case. Raises UnreadableVideo for one without a frame, or too large for the memory or the budget;
    ValueError if the folder cannot be written or is none of this machine, a result would overwrite the video, or effort
    is asked of a network whose places do not leave by themselves.
    """
    with ExitStack() as stack:
        stack.callback(clip.close)
        folder, rows, began = video_folder(output), list[Row](), time.perf_counter()
        _keep_input(clip.source, folder, name)
        if effort and runner.network.config.place is None:
            raise ValueError(f"there is no effort to draw: {NO_PLACES}")
        overlays = _Overlays(stack, folder / name, clip, runner.network, effort) if pictures else None
        try:
            for row in _rows(runner, clip, name, overlays, pace):
                rows.append(row)
                if on_frame is not None:
                    on_frame()
                if len(rows) == most:
                    break
        except KeyboardInterrupt:
            if not (clip.live and rows):
                raise
        except BudgetNotKept as error:
            raise UnreadableVideo(f"{clip.source}: {error}") from error
        except (MemoryError, RuntimeError, cv2.error) as error:
            if not lacks_memory(error):
                raise
            raise UnreadableVideo(f"{clip.source} is too large for the memory") from error
        if not rows:
            raise UnreadableVideo(f"no frame of {clip.source} can be decoded ({clip.broken} are broken)")
        size, seconds = clip.size, time.perf_counter() - began
        _named(folder, name, SUMMARY).unlink(missing_ok=True)  # while the others change, nothing says they fit together
        if overlays is not None:
            overlays.finish()
    write_atomically(_named(folder, name, FRAMES), _csv(rows))
    asked_ms = None if pace is None else pace.frame_ms
    summary = _summary(runner, clip, folder, rows, size, seconds, asked_ms)
    write_json(_named(folder, name, SUMMARY), asdict(summary))
    return summary


def video_folder(output: Source) -> Path:
    """The folder for results, made if missing. Raises ValueError if it cannot be written or is none of this machine."""
    if is_url(output):
        raise ValueError(
            f"--output is {output}: results of videos go into a folder of this machine, copy them from there"
        )
    folder = expand_user(output)
    check_writable(folder)
    return folder


class _Overlays:
    """The overlay video and the still of it, begun with the first frame; `stack` ends them."""

    def __init__(self, stack: ExitStack, path: Path, clip: Clip, network: NetworkDescription, effort: bool) -> None:
        self.stack, self.path, self.clip, self.network, self.effort = stack, path, clip, network, effort
        self.writer: VideoWriter | None = None
        self.first: tuple[np.ndarray, Segmented] | None = None

    def add(self, frame: Frame, found: Segmented) -> None:
        if self.writer is None:
            file = self.stack.enter_context(written_whole(_named(self.path.parent, self.path.name, OVERLAY)))
            self.writer = VideoWriter(file, found.labels.shape, self.clip.rate, self.clip.aspect)
            self.stack.callback(self.writer.close)
            self.first = frame.pixels, found
        self.writer.write(self._picture(frame.pixels, found, legend=False), frame.time_s)

    def finish(self) -> None:
        assert self.writer is not None and self.first is not None
        self.writer.finish()
        still = figures.png_bytes(self._picture(*self.first, legend=True))
        write_atomically(_named(self.path.parent, self.path.name, STILL), still)

    def _picture(self, pixels: np.ndarray, found: Segmented, legend: bool) -> np.ndarray:
        config = self.network.config
        if not self.effort:
            return figures.overlay(pixels, found.labels, config.class_names, config.palette, legend=legend)
        if found.exits is None or config.place is None:  # all of it was asked for
            return figures.effort(pixels, np.full((1, 1), found.prediction.share), max(pixels.shape), legend)
        return figures.effort(pixels, effort_of(self.network, found), config.place, legend, found.seen)


def _rows(
    runner: Runner,
    clip: Clip,
    name: str,
    overlays: _Overlays | None,
    pace: FramePace | None,
) -> Iterator[Row]:
    """Works through the frames."""
    frames, config = iter(clip), runner.network.config
    routes = [] if config.exits is None else [route.to_gates() > 0 for route in config.exit_routes]
    for number in itertools.count():
        start = time.perf_counter()
        frame = next(frames, None)
        if frame is None:
            return
        if clip.live:  # waiting for a frame is no work
            start = time.perf_counter()
        run = partial(segment, runner, frame.pixels, clip.source, name)
        if pace is not None and number == 0:
            pace.begin(frame.pixels.shape[:2], run)
            start = time.perf_counter()
        allowed = None if pace is None else pace.next()
        found = run()
        if overlays is not None:
            overlays.add(frame, found)
        frame_ms = MS * (time.perf_counter() - start)
        row = Row(
            number,
            frame.time_s,
            found.prediction.cost_macs / GIGA,
            found.prediction.share,
            None if allowed is None else allowed.share,
            next((exit for exit, route in enumerate(routes) if np.array_equal(found.gates > 0, route)), None),
            MS * found.seconds,
            frame_ms,
            None if pace is None else frame_ms > pace.frame_ms,
        )
        if pace is not None:
            pace.saw(row)
        yield row


def _named(folder: Path, name: str, ending: str) -> Path:
    return folder / f"{name}{ending}"


def _keep_input(source: Source, folder: Path, name: str) -> None:
    """Raises ValueError if a result would overwrite the video."""
    for ending in (OVERLAY, STILL, FRAMES, SUMMARY):
        result = _named(folder, name, ending)
        if isinstance(source, Path) and os.path.realpath(source) == os.path.realpath(result):
            raise ValueError(f"{result} is itself an input: choose another --output, it would be lost")


def _csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    for row in rows:
        writer.writerow([_cell(value) for value in row])
    return text.getvalue().encode()


def _cell(value: float | bool | None) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(int(value))


def _summary(
    runner: Runner,
    clip: Clip,
    folder: Path,
    rows: Sequence[Row],
    size: tuple[int, int],
    seconds: float,
    asked_ms: float | None,
) -> VideoSummary:
    def spread(values: Sequence[float]) -> tuple[float, float, float]:
        return float(np.mean(values)), float(np.min(values)), float(np.max(values))

    def times(values: Sequence[float]) -> tuple[float, float]:
        return float(np.median(values)), float(np.percentile(values, LATEST))

    return VideoSummary(
        video=str(clip.source),
        output=str(folder),
        frames=len(rows),
        broken=clip.broken,
        lost=clip.lost,
        size=size,
        seconds=seconds,
        cost_gmacs=spread([row.cost_gmacs for row in rows]),
        shares=spread([row.share for row in rows]),
        ms=times([row.ms for row in rows]),
        frame_ms=times([row.frame_ms for row in rows]),
        asked_ms=asked_ms,
        late=None if asked_ms is None else float(np.mean([bool(row.late) for row in rows])),
        network=runner.network.fingerprint,
        precision=runner.precision,
    )
