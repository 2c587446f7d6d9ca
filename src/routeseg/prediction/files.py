"""Images in; label maps, overlays and routes out.

For every image, named NAME below, the output folder gets
    NAME_labels.png    class of each pixel, a palette PNG: its bytes are the class ids (16 bits, greyscale, beyond 256)
    NAME_overlay.png   the image tinted with its segmentation, and a legend
    NAME_route.png     the route as an image
    NAME_route.json    the route, its activations and its cost; `Route.from_json` reads it

The JSON is written last: if it is there, the other files are, too. `output_names` makes NAME. Images may be
files or URLs, and so may the folder (see sources.py); `predict_files` runs here, one image after another, and
ray.py in several processes or machines, with the same results. What segments an image is a `Runner`:
torch_runner.py has that of a checkpoint, onnx_runner.py that of an exported file. No torch here.

Legend: H, W image size, K classes, L depth, S scales.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from routeseg import figures
from routeseg.budgets.asked import levels
from routeseg.cost.macs import model_cost, spent_macs
from routeseg.data.decoding import MAX_PIXELS, UnreadableImage, decode_image
from routeseg.data.transforms import PADDING_RGB
from routeseg.description import NetworkDescription
from routeseg.errors import NO_PLACES, BudgetNotKept, lacks_memory
from routeseg.evaluation.windows import starts
from routeseg.labels import label_type
from routeseg.prediction.sources import (
    ResultFolder,
    Source,
    file_name,
    is_url,
    locate,
    open_folder,
    output_names,
    read_bytes,
)
from routeseg.space import MIN_IMAGE_SIZE, Route

LABELS, OVERLAY, ROUTE_PICTURE, ROUTE = "_labels.png", "_overlay.png", "_route.png", "_route.json"
EFFORT = "_effort.png"  # of a network whose places leave by themselves
OUTPUTS = (LABELS, OVERLAY, ROUTE_PICTURE, ROUTE)
PASS_BYTES = 4 << 30  # a pass that would take more is made in windows: 20 million pixels of 11 classes
PIXEL_BYTES, CLASS_BYTES = 150, 5  # that a pass takes for each pixel, and for each of its logits (measured on a CPU)
FILE_BYTES = 4  # a pixel, of the largest file that is read: RGBA without compression
WINDOW, WINDOW_OVERLAP = 2048, 0.125  # side of a window, and the share of it that the next one has, too
SKIPS_NAMED = 20  # in the summary; beyond that they are counted
GIGA = 1e9


class Ran(NamedTuple):
    """What a network makes of an image.

    labels  [H,W] (`label_map`)
    gates   float32 [L+1,S,3]
    exits   where its places left, if they did so by themselves, int64 [hb,wb]
    seen    (h, w), the size at which it was looked at, if it is not its own; `first` that of a first look, if any
    confidence  the probability of each label, float32 [H,W], of a file that gives labels (`routeseg export --labels`)
    """

    labels: np.ndarray
    gates: np.ndarray
    exits: np.ndarray | None = None
    confidence: np.ndarray | None = None
    seen: tuple[int, int] | None = None
    first: tuple[int, int] | None = None


class Runner(Protocol):
    """A network, ready to segment one image after another, and the precision that it computes in. One that was asked
    for a budget says so: `budget`, in words."""

    network: NetworkDescription
    precision: str

    def __call__(self, image: np.ndarray) -> Ran:
        """Segments an image uint8 [H,W,3] RGB, H and W at least 32.

        Raises ValueError (DIVERGED) if an output is not finite, MemoryError or RuntimeError if memory is short.
        """
        ...


@dataclass(frozen=True)
class Prediction:
    """What became of one image.

    image                 the file or URL; `name` is NAME, as its output files are called
    size                  (H, W) of the image, upright
    cost_macs, full_macs  its real cost, and the cost with every path open at this size
    """

    image: Source
    name: str
    size: tuple[int, int]
    cost_macs: float
    full_macs: float

    @property
    def share(self) -> float:
        """The cost as a share of the full network's, 0..1."""
        return self.cost_macs / self.full_macs


@dataclass(frozen=True)
class Skip:
    """An image that could not be segmented, and why."""

    image: Source
    name: str
    reason: str


@dataclass(frozen=True)
class PredictionSummary:
    """What became of all images, in the order given.

    resumed  how many of the predictions are from an earlier run
    seconds  of this run
    """

    output: str
    predictions: tuple[Prediction, ...]
    skipped: tuple[Skip, ...]
    resumed: int
    seconds: float

    def table(self) -> str:
        """The summary as lines of text."""
        earlier = f" ({self.resumed} of them from an earlier run)" if self.resumed else ""
        rows = [("images", f"{len(self.predictions)}{earlier}")]
        if self.predictions:
            costs = np.array([p.cost_macs for p in self.predictions]) / GIGA
            shares = np.array([p.share for p in self.predictions])
            for name, reduce in (("mean", np.mean), ("min", np.min), ("max", np.max)):
                cost = f"{reduce(costs):.4g} GMACs ({_percent(reduce(shares))} of the full network)"
                rows.append((f"real cost, {name}", cost))
        rows.append(("time", f"{self.seconds:.1f} s"))
        rows.append(("results", self.output))
        if self.skipped:
            rows.append(("skipped", str(len(self.skipped))))
            rows += [("", skip.reason) for skip in self.skipped[:SKIPS_NAMED]]
            if len(self.skipped) > SKIPS_NAMED:
                rows.append(("", f"and {len(self.skipped) - SKIPS_NAMED} more"))
        wide = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{wide}}  {value}" for name, value in rows)


@dataclass(frozen=True)
class Job:
    """One image to segment: as the user named it, where any process finds it, and NAME."""

    image: Source
    location: Source
    name: str


@dataclass(frozen=True)
class Target:
    """Where results go, whether images are among them, and the fingerprint of the network that makes them; images of
    more than `max_pixels` are skipped."""

    folder: ResultFolder
    pictures: bool
    network: str
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class Plan:
    """What is to be done, and what is done already; `names` are those of all images, in the order given."""

    target: Target
    names: tuple[str, ...]
    jobs: tuple[Job, ...]
    done: tuple[Prediction, ...]
    start: float


def predict_files(
    runner: Runner,
    images: Sequence[Source],
    output: Source,
    on_image: Callable[[], None] | None = None,
    resume: bool = False,
    pictures: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> PredictionSummary:
    """Segments images and writes the files of each into the folder `output`, a path or URL, replacing older ones.

    on_image  called after each image (for a progress bar)
    resume    images whose results are there already are left as they are
    pictures  False: no overlay and no image of the route, which take most of the time of small images
    max_pixels  an image that claims more is skipped, and not decoded

    Each file is written whole or not at all. An image that cannot be read is skipped, and listed in the
    summary. Images with a side under 32 pixels are padded for the network, and their results cropped.
    Raises ValueError, before any work, if the folder cannot be written, a result would overwrite an image, or
    `resume` finds results of another network, budget or precision; and later if a file cannot be written.
    """
    plan = plan_work(runner.network, images, output, resume, pictures, max_pixels, asked_of(runner))
    return collect(plan, map(Segmenter(runner, plan.target), plan.jobs), on_image)


def plan_work(
    network: NetworkDescription,
    images: Sequence[Source],
    output: Source,
    resume: bool,
    pictures: bool,
    max_pixels: int = MAX_PIXELS,
    asked: Mapping[str, str | None] = MappingProxyType({}),
) -> Plan:
    """Which images are to be segmented, into which folder. Raises the ValueErrors that come before any work."""
    start = time.monotonic()
    target = Target(open_folder(output), pictures, network.fingerprint, max_pixels)
    sources = [image if is_url(image) else Path(image) for image in images]
    jobs = [Job(source, locate(source), name) for source, name in zip(sources, output_names(sources), strict=True)]
    _keep_inputs(target.folder, jobs)
    target.folder.prepare()
    done = _earlier_results(target, jobs, asked) if resume else {}
    left = tuple(job for job in jobs if job.name not in done)
    return Plan(target, tuple(job.name for job in jobs), left, tuple(done.values()), start)


def collect(
    plan: Plan, outcomes: Iterable[Prediction | Skip], on_image: Callable[[], None] | None = None
) -> PredictionSummary:
    """Works through the outcomes of the plan's jobs, which may come in any order."""
    step = on_image or (lambda: None)
    predictions: list[Prediction] = []
    skipped: list[Skip] = []
    for outcome in itertools.chain(plan.done, outcomes):
        if isinstance(outcome, Skip):
            skipped.append(outcome)
        else:
            predictions.append(outcome)
        step()
    place = {name: number for number, name in enumerate(plan.names)}
    predictions.sort(key=lambda prediction: place[prediction.name])
    skipped.sort(key=lambda skip: place[skip.name])
    seconds = time.monotonic() - plan.start
    return PredictionSummary(str(plan.target.folder), tuple(predictions), tuple(skipped), len(plan.done), seconds)


class Segmenter:
    """Segments one image after another, and writes their files."""

    def __init__(self, runner: Runner, target: Target) -> None:
        self.runner, self.network, self.target = runner, runner.network, target

    def __call__(self, job: Job) -> Prediction | Skip:
        """Raises ValueError if a file cannot be written, and if the outputs of the network are NaN."""
        try:
            data = read_file(job.image, job.location, self.target.max_pixels)
            return self._segment(job, decode_file(data, job.image, self.target.max_pixels), content_of(data))
        except (UnreadableImage, BudgetNotKept) as error:
            return Skip(job.image, job.name, str(error))
        except (MemoryError, RuntimeError, cv2.error) as error:
            if not lacks_memory(error):
                raise
            return Skip(job.image, job.name, f"{job.image} is too large for the memory")

    def _segment(self, job: Job, image: np.ndarray, content: str) -> Prediction:
        """Segments one image uint8 [H,W,3] and writes NAME_labels.png and the others."""
        found = segment(self.runner, image, job.image, job.name)
        write_results(self.target, self.network, found, image, self.runner.precision, content)
        return found.prediction


class Segmented(NamedTuple):
    """One image, segmented: labels [H,W], gates float32 [L+1,S,3], how long the network took, in how many windows,
    whose mean the gates are, what else the result depends on (`asked_of`); of an image that is one window where its
    places left [hb,wb], the size (h, w) at which it was looked at, if not its own, and that of a first look."""

    prediction: Prediction
    labels: np.ndarray
    gates: np.ndarray
    seconds: float
    windows: int = 1
    asked: Mapping[str, str | None] = MappingProxyType({})
    exits: np.ndarray | None = None
    seen: tuple[int, int] | None = None
    first: tuple[int, int] | None = None


def asked_of(runner: Runner) -> dict[str, str | None]:
    """What a result depends on beside the network and the image: a budget (None: there was none), the precision."""
    return {"budget": getattr(runner, "budget", None), "precision": runner.precision}


def segment(runner: Runner, image: np.ndarray, source: Source, name: str) -> Segmented:
    """Segments one image uint8 [H,W,3] of any size; `source` and `name` are those of its `Prediction`. What would take
    more memory than PASS_BYTES is segmented in windows: a pixel gets its class from the one in whose middle it lies."""
    height, width = image.shape[:2]
    padded, config = pad_small(image), runner.network.config
    views = _views(padded.shape[0], padded.shape[1], config.num_classes)
    labels = np.empty(padded.shape[:2], label_type(config.num_classes))
    opened: list[np.ndarray] = []
    cost, full, seconds = 0.0, 0.0, 0.0
    table = partial(model_cost, runner.network)
    for rows, columns in views:
        view = np.ascontiguousarray(padded[rows.taken, columns.taken])
        start = time.perf_counter()
        ran = runner(view)
        seconds += time.perf_counter() - start
        labels[rows.kept, columns.kept] = ran.labels[rows.inside, columns.inside]
        own = (view.shape[0], view.shape[1])
        cost, full = cost + float(spent_macs(ran, own, table)), full + table(own).full
        opened.append(ran.gates)
    prediction = Prediction(source, name, (height, width), cost, full)
    mean = opened[0] if len(opened) == 1 else np.asarray(np.mean(opened, axis=0, dtype=np.float32))
    found = np.ascontiguousarray(labels[:height, :width])
    whole = (ran.exits, ran.seen, ran.first) if len(views) == 1 else ()
    return Segmented(prediction, found, mean, seconds, len(views), asked_of(runner), *whole)


def effort_of(network: NetworkDescription, found: Segmented) -> np.ndarray:
    """What each place of an image cost, as shares of what it costs in the full network at the size at which it was
    looked at, or in both looks: float64 [hb,wb].

    Raises ValueError, with the remedy, if its places did not decide.
    """
    if network.config.place is None:
        raise ValueError(f"there is no map of effort: {NO_PLACES}")
    if found.exits is None:
        why = "it was segmented in windows" if found.windows > 1 else "no budget was asked for, or all of it"
        raise ValueError(f"there is no map of effort of {found.prediction.image}: {why}")
    height, width = (max(side, MIN_IMAGE_SIZE) for side in found.prediction.size)
    table = model_cost(network, found.seen or (height, width))
    first = None if found.first is None else model_cost(network, found.first)
    whole = table.full if first is None else first.full + table.full
    shares: np.ndarray = table.of_exits(first)[found.exits] / whole
    return shares


class _Part(NamedTuple):
    """A window along a side: what of the image it takes, what of it is kept, and where that lies in the window."""

    taken: slice
    kept: slice
    inside: slice


def _views(height: int, width: int, classes: int) -> list[tuple[_Part, _Part]]:
    """The windows of an image, rows and columns: one, if a pass over the whole fits into PASS_BYTES."""
    whole = height * width * (PIXEL_BYTES + CLASS_BYTES * classes) <= PASS_BYTES
    rows, columns = (_parts(side, side if whole else min(side, WINDOW)) for side in (height, width))
    return [(row, column) for row in rows for column in columns]


def _parts(side: int, window: int) -> list[_Part]:
    """Neighbouring windows meet in the middle of what they share."""
    begins = starts(side, window, WINDOW_OVERLAP)
    cuts = [0, *((left + window + right) // 2 for left, right in itertools.pairwise(begins)), side]
    return [
        _Part(slice(begin, begin + window), slice(low, high), slice(low - begin, high - begin))
        for begin, (low, high) in zip(begins, itertools.pairwise(cuts), strict=True)
    ]


def write_results(
    target: Target,
    network: NetworkDescription,
    found: Segmented,
    image: np.ndarray,
    precision: str,
    content: str | None = None,
) -> list[str]:
    """Writes the files of one image, whose own file has this content (`content_of`); returns what their names have
    behind NAME."""
    config, prediction, name = network.config, found.prediction, found.prediction.name
    files = {LABELS: label_png(found.labels, config.palette)}
    if target.pictures:
        cost = f"{prediction.cost_macs / GIGA:.4g} GMACs, {_percent(prediction.share)} of the full network"
        shown = os.fsencode(file_name(prediction.image)).decode(errors="replace")
        files[OVERLAY] = figures.png_bytes(figures.overlay(image, found.labels, config.class_names, config.palette))
        if found.exits is not None and config.place is not None:
            heat = figures.effort(image, effort_of(network, found), config.place, seen=found.seen)
            files[EFFORT] = figures.png_bytes(heat)
        files[ROUTE_PICTURE] = figures.route_picture(
            config.space, found.gates, f"{shown}: {cost}", stages=config.backbone_stages
        )
    target.folder.remove(name + ROUTE)  # while the others change, nothing says that they belong together
    for ending, data in files.items():
        target.folder.write(name + ending, data)
    target.folder.write(name + ROUTE, _route_json(target, network, found, precision, content).encode())
    return [*files, ROUTE]


def _route_json(
    target: Target, network: NetworkDescription, found: Segmented, precision: str, content: str | None
) -> str:
    """The object of `Route.to_json`, and with it the activation of each open edge, the image, its classes and cost, and
    what the result depends on: the content of the image's file, the network, and what was asked."""
    prediction, gates = found.prediction, found.gates
    route = Route.from_gates(network.config.space, gates)
    data = json.loads(route.to_json())
    data |= {
        "activations": [float(gates[edge]) for edge in route],  # in the order of `open`
        "image": str(prediction.image),
        **({} if content is None else {"image_content": content}),
        "image_size": list(prediction.size),
        "class_shares": class_shares(found.labels, network.config.class_names),
        "cost_gmacs": prediction.cost_macs / GIGA,
        "full_gmacs": prediction.full_macs / GIGA,
        "share_of_full": prediction.share,
        **(
            {}
            if network.config.exits is None or network.config.place
            else {"levels_of_full": levels(network, prediction.size).tolist()}
        ),
        **({} if found.exits is None else {"exits": found.exits.tolist()}),
        **({} if found.seen is None else {"seen_size": list(found.seen)}),
        **({} if found.first is None else {"first_size": list(found.first)}),
        "pictures": target.pictures,
        "network": target.network,
        **found.asked,
        "precision": precision,
        **({"windows": found.windows} if found.windows > 1 else {}),
    }
    return json.dumps(data) + "\n"


def class_shares(labels: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """The classes that are there, the largest first, and their share of the pixels."""
    counts = np.bincount(labels.ravel(), minlength=len(class_names)) / labels.size
    return {class_names[k]: float(counts[k]) for k in np.argsort(-counts, kind="stable") if counts[k]}


def _earlier_results(target: Target, jobs: Sequence[Job], asked: Mapping[str, str | None]) -> dict[str, Prediction]:
    """NAME -> what an earlier run made of the image: those whose JSON is there, and complete, and whose image is still
    the same.

    Raises ValueError if another network made one of them, or something else was asked of it.
    """
    of_name = {job.name + ROUTE: job for job in jobs}
    done: dict[str, Prediction] = {}
    for file, content in target.folder.read(list(of_name)):
        job = of_name[file]
        try:
            data = json.loads(content)
            maker = data["network"]
            height, width = data["image_size"]
            costs = float(data["cost_gmacs"]) * GIGA, float(data["full_gmacs"]) * GIGA
            before = {name: data[name] for name in asked}
            same = data["image"] == str(job.image) and (data["pictures"] or not target.pictures)
            same = same and data["image_content"] == content_of(read_file(job.image, job.location, target.max_pixels))
        except (ValueError, KeyError, TypeError):
            continue  # no result of ours, or not a whole one
        differs = "of another network" if maker != target.network else None
        for name, value in asked.items():
            if before[name] != value and differs is None:
                differs = f"at {name} {before[name] or 'none'}, and {value or 'none'} is asked"
        if differs is not None:
            raise ValueError(
                f"{target.folder.locate(file)} is the result {differs}: choose another --output, or leave --resume out "
                "to segment all images anew"
            )
        if same:
            done[job.name] = Prediction(job.image, job.name, (height, width), *costs)
    return done


def read_source(image: Source, location: Source, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The image at this location, uint8 [H,W,3]. Raises UnreadableImage, naming `image`, if there is none, or if it has
    more than `max_pixels`."""
    return decode_file(read_file(image, location, max_pixels), image, max_pixels)


def read_file(image: Source, location: Source, max_pixels: int = MAX_PIXELS) -> bytes:
    """What the file or object at this location holds. Raises UnreadableImage, naming `image`, if it cannot be read, or
    is larger than images of so many pixels are."""
    try:
        return read_bytes(location, FILE_BYTES * max_pixels)
    except OSError as error:
        raise UnreadableImage(f"cannot read {image}: {error.strerror or error}") from error


def content_of(data: bytes) -> str:
    """16 hexadecimal digits that tell the contents of files apart."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def decode_file(data: bytes, image: Source, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The image in a file's content, as `read_source` gives it."""
    try:
        return decode_image(io.BytesIO(data), str(image), max_pixels)
    except UnreadableImage as error:
        if isinstance(error.__cause__, UnidentifiedImageError):  # its own message tells an address in memory
            raise UnreadableImage(f"cannot read {image}: it is no image, or a damaged one") from error
        raise


def pad_small(image: np.ndarray) -> np.ndarray:
    """The image [H,W,3], with grey to the right and below if a side is shorter than the network takes."""
    height, width = (max(side, MIN_IMAGE_SIZE) for side in image.shape[:2])
    if (height, width) == image.shape[:2]:
        return image
    padded = np.full((height, width, 3), PADDING_RGB, dtype=np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded


def label_png(labels: np.ndarray, palette: Iterable[Iterable[int]]) -> bytes:
    """A label map [H,W] as a PNG of class ids: a palette PNG with the colours of the classes, or, for more than 256
    classes, greyscale of 16 bits."""
    picture = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        picture.putpalette([part for colour in palette for part in colour])
    return figures.png_bytes(picture)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _keep_inputs(folder: ResultFolder, jobs: Sequence[Job]) -> None:
    """Raises ValueError if a result would overwrite an image."""
    inputs = {str(job.location) for job in jobs}
    for path in (job.location for job in jobs if isinstance(job.location, Path)):
        inputs |= {os.path.realpath(path), os.path.join(os.path.realpath(path.parent), path.name)}
    for job in jobs:
        for result in (folder.locate(job.name + ending) for ending in (*OUTPUTS, EFFORT)):
            if result in inputs:
                raise ValueError(f"{result} is itself an input: choose another --output, it would be lost")
