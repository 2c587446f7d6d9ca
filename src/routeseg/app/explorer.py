"""What the explorer shows, without its page: images that are held for a while, and what a network makes of them.

Everything here takes and gives what JSON can hold, since a browser is on the other side. Images live in memory
alone, the last few of them, under names that nobody can guess.

Legend: H, W image size, K classes, L depth, S scales.
"""

from __future__ import annotations

import base64
import io
import math
import secrets
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial, wraps
from typing import Any, cast

import cv2
import numpy as np
from PIL import Image

from routeseg import figures
from routeseg.architectures import ARCHITECTURES
from routeseg.cost.macs import exit_costs
from routeseg.data.decoding import BAD_IMAGE, UnreadableImage, decode_image
from routeseg.data.pairs import SegmentationData
from routeseg.data.scenes import CLASSES, PRESETS, draw_scene
from routeseg.data.subset import evenly_spread
from routeseg.errors import BudgetNotKept
from routeseg.evaluation.ranking import image_score
from routeseg.figures.routes import ACTIVATION_COLORS
from routeseg.labels import IGNORE, see_through
from routeseg.model import DynamicRoutingNetwork
from routeseg.prediction.files import GIGA, Segmented, class_shares, effort_of, pad_small, segment
from routeseg.prediction.torch_runner import TorchNetwork, open_network
from routeseg.space import FIRST_LOOK, Route, Size, padded_size

MAX_BYTES = 20_000_000  # of a file that is sent
MAX_PIXELS = 50_000_000  # of an image that is decoded
SIDE = 1024  # a larger image is shrunk: one looks at it live
HELD = 32  # images, the last ones
EXAMPLE_SIZE = (256, 512)
EXAMPLE_SEED = 7
EXAMPLES = 3
STREET = {"road", "building", "car"}  # what drawn streets are for: a network of these classes
MS = 1000.0
COLOURS = 16  # of the scales of activations and of effort


class Refused(ValueError):
    """What the user gave cannot be shown; the message is a sentence for them."""


@dataclass(eq=False)
class OpenImage:
    """An image that is looked at.

    image   uint8 [H,W,3]; labels uint8 [H,W], IGNORE where unknown, or None
    exit_ms what each exit's route takes at this size, ms [K], once it was measured
    seen    (precision, route or budget) -> what the network made of it, the last few
    """

    name: str
    image: np.ndarray
    labels: np.ndarray | None = None
    exit_ms: np.ndarray | None = None
    seen: OrderedDict[Any, dict[str, Any]] = field(default_factory=OrderedDict)


def answered(method: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """What the browser calls: one at a time, and a mistake of the user is an answer, `{"error": sentence}`."""

    @wraps(method)
    def call(self: Explorer, question: Any) -> dict[str, Any]:
        try:
            if not isinstance(question, Mapping):
                raise Refused("a question is an object")
            with self.lock:
                return method(self, question)
        except (Refused, UnreadableImage, BudgetNotKept) as error:
            return {"error": str(error)}

    return call


class Explorer:
    """A network, and the images that are looked at with it.

    name     what the page calls the network
    survey   what `routeseg routes` wrote of a data set, and how its images are read: a page of its own
    images those that the network is for: some are its examples. None: drawn streets, if it knows streets
    """

    def __init__(
        self,
        model: DynamicRoutingNetwork,
        name: str,
        survey: Survey | None = None,
        pictures: SegmentationData | None = None,
    ) -> None:
        self.model, self.name, self.survey, self.pictures = model.eval(), name, survey, pictures
        self.config = model.config
        self.lock = threading.Lock()
        self._runners: dict[str, TorchNetwork] = {}
        self._pictures: OrderedDict[str, OpenImage] = OrderedDict()
        self.known = known_routes(model)

    # --- What the page asks ---------------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """What the page must know of the network before there is an image."""
        space = self.config.space
        ramp = (255 * ACTIVATION_COLORS(np.linspace(0, 1, COLOURS))[:, :3]).round().astype(int)
        heat = figures.heat_colours(np.linspace(0, 1, COLOURS))
        return {
            "name": self.name,
            "depth": space.depth,
            "scales": space.num_scales,
            "edges": sorted(self.config.whole_route.edges),
            "nodes": space.nodes,
            "stages": self.config.backbone_stages,
            "classes": list(self.config.class_names),
            "palette": [list(colour) for colour in self.config.palette],
            "ramp": ["#{:02x}{:02x}{:02x}".format(*colour) for colour in ramp],
            "budgets": self.model.exits is not None and self.model.exits.calibrated,
            "gated": self.config.gated,
            "place": self.config.place,
            "heat": heat.tolist(),
            "known": [{"key": key, "name": known.name} for key, known in self.known.items()],
            "precisions": ["float32", "bfloat16", "auto"],
            "clear": see_through(self.config.class_names, self.config.palette),
            "examples": [
                {"key": key, "name": one.name, "thumbnail": _jpeg_url(_thumbnail(one.image))}
                for key, one in self.examples.items()
            ],
            "survey": None if self.survey is None else self.survey.about(),
            "max_bytes": MAX_BYTES,
        }

    @answered
    def open(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """An image: {"file": base64, "name"}, {"example": preset} or {"survey": name}; with "labels", base64 of a
        label map, its labels. -> what `look` calls it, its size, what each exit costs there."""
        picture = self._picture(question)
        if question.get("labels"):
            picture.labels = self._labels(_bytes(question["labels"]), picture)
        token = secrets.token_urlsafe(16)
        self._pictures[token] = picture
        while len(self._pictures) > HELD:
            self._pictures.popitem(last=False)
        return {
            "picture": token,
            "name": picture.name,
            "height": picture.image.shape[0],
            "width": picture.image.shape[1],
            "image": _jpeg_url(picture.image),
            "labelled": picture.labels is not None,
            "range": self._range(picture),
        }

    @answered
    def look(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """What the network makes of an image.

        picture    what `open` called it
        budget     {"value", "unit": share, gmacs or ms}: the mean cost that is asked for
        route      edges [layer, scale, direction] that may be used; then no budget
        places     {"exits", "size"} of an earlier answer's effort, with exits that were changed: what the network chose
                   for the budget stands beside
        precision  as `SkipEngine` takes it
        against    a known route (`about`), or edges: what it makes of the image stands beside
        """
        token = _text(question, "picture")
        picture = self._pictures.get(token)
        if picture is None:
            raise Refused("this image is no longer held: open it again")
        self._pictures.move_to_end(token)
        precision = _text(question, "precision", "float32")
        route = None if question.get("route") is None else self._route(question["route"])
        budget = None if route is not None else self._share(picture, question.get("budget"))
        places = None if route is not None else question.get("places")
        view, labels = self._view(picture, precision, route, budget, places)
        against = question.get("against")
        if not (places or against):
            return view
        if places:
            beside, of = None, budget
        else:
            named = self.known.get(against) if isinstance(against, str) else None
            beside, of = self._route(against) if named is None else named.route, None
        view["against"], theirs = self._view(picture, precision, beside, of, remembered=True)
        view["changed"] = float((labels != theirs).mean())
        return view

    # --- Images ------------------------------------------------------------------------------------------------

    @cached_property
    def examples(self) -> dict[str, OpenImage]:
        """Some images that the network is for: of its data, or a drawn street of each preset."""
        if self.pictures is not None:
            some = evenly_spread(self.pictures, min(EXAMPLES, len(self.pictures)))
            with suppress(UnreadableImage, ValueError, OSError):  # they are gone, or of other classes by now
                return {some.name(k): OpenImage(some.name(k), *some.read(k)) for k in range(len(some))}
            return {}
        if not STREET <= set(self.config.class_names):
            return {}
        same = list(self.config.class_names) == list(CLASSES)
        drawn = {preset: draw_scene(EXAMPLE_SEED, 0, EXAMPLE_SIZE, preset) for preset in PRESETS}
        return {
            preset: OpenImage(f"drawn street, {preset} things", image, labels if same else None)
            for preset, (image, labels) in drawn.items()
        }

    def _picture(self, question: Mapping[str, Any]) -> OpenImage:
        if example := _text(question, "example"):
            if example not in self.examples:
                raise Refused("there is no such example")
            one = self.examples[example]
            name, image, known = one.name, one.image, one.labels
        elif surveyed := _text(question, "survey"):
            if self.survey is None:
                raise Refused("there is no data set here")
            name, image, known = self.survey.read(surveyed)
        else:
            name, known = _text(question, "name", "picture")[:200], None
            image = decode_image(io.BytesIO(_bytes(question.get("file"))), name, MAX_PIXELS)
        height, width = image.shape[:2]
        if max(height, width) > SIDE:
            size = tuple(max(1, round(side * SIDE / max(height, width))) for side in (width, height))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            known = None if known is None else cv2.resize(known, size, interpolation=cv2.INTER_NEAREST)
        return OpenImage(name, np.ascontiguousarray(image), known)

    def _labels(self, data: bytes, picture: OpenImage) -> np.ndarray:
        """A label map of the image, shrunk as it was."""
        if self.config.num_classes > IGNORE:
            raise Refused(f"the network has {self.config.num_classes} classes: labels hold at most {IGNORE}")
        try:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as file:
                if file.width * file.height > MAX_PIXELS or file.mode not in ("L", "P"):
                    raise Refused("labels are a PNG file with one number of a class for each pixel")
                labels = np.asarray(file).astype(np.uint8)
        except BAD_IMAGE as error:
            raise error if isinstance(error, Refused) else Refused(f"cannot read the labels: {error}") from error
        worst = int(labels[labels != IGNORE].max(initial=0))
        if worst >= self.config.num_classes:
            raise Refused(f"the labels have a class {worst}, the network knows 0 to {self.config.num_classes - 1}")
        height, width = picture.image.shape[:2]
        if abs(labels.shape[1] / labels.shape[0] / (width / height) - 1) > 0.02:
            raise Refused("the labels have other proportions than the image")
        return cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)

    # --- The network -----------------------------------------------------------------------------------------------

    def _runner(self, precision: str) -> TorchNetwork:
        if precision not in self._runners:
            try:
                self._runners[precision] = open_network(self.model, precision)
            except ValueError as error:
                raise Refused(str(error)) from error
        return self._runners[precision]

    def _segment(self, picture: OpenImage, runner: TorchNetwork, **how: Any) -> Segmented:
        """The image, segmented as `predict` does it; `how`: a route or a budget, as the forward takes them."""
        asked = TorchNetwork(partial(cast(Any, runner.forward).labels, **how), self.model, runner.network)
        return segment(asked, picture.image, picture.name, picture.name)

    def _view(
        self,
        picture: OpenImage,
        precision: str,
        route: Route | None,
        budget: float | None,
        places: Any = None,
        remembered: bool = False,
    ) -> tuple[dict[str, Any], np.ndarray]:
        """What a forward gives, for the page, and its labels [H,W]. With `remembered` it need not be a new one."""
        key = (precision, route, budget)
        if remembered and key in picture.seen:
            return dict(picture.seen[key]["view"]), picture.seen[key]["labels"]
        runner = self._runner(precision)
        how: dict[str, Any] = {"size": 1.0}
        if route is not None:
            how |= {"route": route, "activation": "own" if self.config.gated else "one"}
        elif places is not None:
            how = self._told(places)
        elif budget is not None:
            assert self.model.prices is not None
            look = self.model.prices.look_up(budget)
            how = {"price": look.price, "size": look.size}
        try:
            found = self._segment(picture, runner, **how)
        except ValueError as error:
            if places is None:
                raise
            raise Refused(str(error)) from error
        labels, gates, space = found.labels, found.gates, self.config.space
        runs, arrived = np.any(gates > 0, axis=-1), space.reached(gates)
        view = {
            "labels": base64.b64encode(zlib.compress(labels.tobytes(), 1)).decode(),
            "shares": class_shares(labels, self.config.class_names),
            "ms": MS * found.seconds,
            "gmacs": found.prediction.cost_macs / GIGA,
            "share": found.prediction.share,
            "asked": budget,
            "precision": runner.precision,
            "open": [[*edge, round(float(gates[edge]), 3)] for edge in space.edges if gates[edge] > 0],
            "runs": [node for node in space.nodes if runs[node]],
            "passes": [node for node in space.nodes if arrived[node] and not runs[node]],
            "effort": self._effort(runner, found, how["size"]),
            "score": None if picture.labels is None else image_score(picture.labels, labels),
        }
        if places is None:
            picture.seen[key] = {"view": view, "labels": labels}
        while len(picture.seen) > len(self.known) + 2:
            picture.seen.popitem(last=False)
        return dict(view), labels

    def _effort(self, runner: TorchNetwork, found: Segmented, size: Size) -> dict[str, Any] | None:
        """What each place cost (`effort_of`), where it left and where it may, the size of the image of which they are
        places, and that in which it was looked at; None: no place decided."""
        if found.exits is None:
            return None
        assert self.config.exits is not None
        last = len(self.config.exits) - 1
        return {
            "shares": effort_of(runner.network, found).round(3).tolist(),
            "seen": list(found.seen or found.labels.shape),
            "exits": found.exits.tolist(),
            "choices": [FIRST_LOOK, last] if isinstance(size, tuple) else list(range(last + 1)),
            "size": size,
        }

    def _told(self, places: Any) -> dict[str, Any]:
        """What the forward takes. Raises Refused for what says no places."""
        try:
            return {"exits": np.array(places["exits"], dtype=np.int64), "size": places["size"]}
        except (TypeError, LookupError, ValueError, OverflowError) as error:
            raise Refused("places are the exits and the size of an answer's effort") from error

    def _route(self, edges: Any) -> Route:
        """The route of these edges. Raises Refused for what is none of this network's."""
        try:
            if not isinstance(edges, list | tuple) or any(len(edge) != 3 for edge in edges):
                raise ValueError("give a list of [layer, scale, direction]")
            route = Route(self.config.space, edges)
        except (ValueError, TypeError) as error:
            raise Refused(f"no route: {error}") from error
        if not route.edges <= self.config.whole_route.edges:
            raise Refused("the network does not have all of these paths")
        return route

    # --- Budgets -------------------------------------------------------------------------------------------------

    def _exit_costs(self, picture: OpenImage, unit: str) -> np.ndarray:
        """[K] of the exits' routes at the size of the image, ascending: shares, GMACs or ms of this machine."""
        assert self.model.exits is not None
        if unit == "ms":
            if picture.exit_ms is None:
                run = partial(self._segment, picture, self._runner("float32"))
                times = [_best_ms(partial(run, route=route)) for route in self.config.exit_routes]
                picture.exit_ms = np.maximum.accumulate(times)
            return picture.exit_ms
        costs = exit_costs(self.model, padded_size(self.config.space, *pad_small(picture.image).shape[:2]))
        return costs / GIGA if unit == "gmacs" else costs / costs[-1]

    def _range(self, picture: OpenImage) -> dict[str, list[float]] | None:
        """What can be asked for, in each unit: lowest and highest."""
        if self.model.exits is None or not self.model.exits.calibrated:
            return None
        assert self.model.prices is not None
        costs = {unit: self._exit_costs(picture, unit) for unit in ("share", "gmacs", "ms")}
        found = {unit: [float(some[0]), float(some[-1])] for unit, some in costs.items()}
        for unit in ("share", "gmacs"):  # a smaller image costs less than the first exit
            found[unit][0] = min(found[unit][0], self.model.prices.least * found[unit][1])
        return found

    def _share(self, picture: OpenImage, budget: Any) -> float | None:
        """The share of the full network that a budget stands for; None leaves it to the network."""
        if budget is None or self.model.exits is None or not self.model.exits.calibrated:
            return None
        try:
            value, unit = float(budget["value"]), budget["unit"]
        except (TypeError, LookupError, ValueError, OverflowError) as error:
            raise Refused("a budget is a number and its unit: share, gmacs or ms") from error
        if unit not in ("share", "gmacs", "ms") or not 0 < value < math.inf:
            raise Refused("a budget is a number above 0, and its unit: share, gmacs or ms")
        costs = self._exit_costs(picture, unit)
        if value >= costs[-1]:
            return 1.0
        if unit != "ms" and value < costs[0]:
            assert self.model.prices is not None
            return max(value / float(costs[-1]), self.model.prices.least)
        table = self.model.exits.table
        return min(1.0, table.cost_at(float(table.price_of(np.array(max(value, costs[0])), costs, f" {unit}"))))


@dataclass(frozen=True)
class Known:
    """A route that the page knows by name."""

    name: str
    route: Route


def known_routes(model: DynamicRoutingNetwork) -> dict[str, Known]:
    """The routes that a network can be compared with: all of it, where its exits are, and the known networks that it
    has the paths of."""
    config = model.config
    found = {"all": Known("the full network", config.whole_route)}
    for name, route in list(config.named_routes.items())[:-1]:
        found[name] = Known(f"up to the exit behind layer {name.rsplit('-', 1)[-1]}", route)
    for key, architecture in ARCHITECTURES.items():
        try:
            route = architecture(config.space)
        except ValueError:
            continue
        if route.edges <= config.whole_route.edges:
            found[key] = Known(architecture.name, route)
    return found


class Survey:
    """A data set as `routeseg routes` saw it: what each image costs, and how large its objects are."""

    def __init__(self, facts: Mapping[str, Any], pictures: SegmentationData) -> None:
        """`facts` are those of routes.json, `pictures` the data set that they are of."""
        self.pictures, self.title = pictures, f"{facts.get('data', 'data set')} {facts.get('split', '')}".strip()
        self.rows: Sequence[Mapping[str, Any]] = facts["per_image"]
        self.words = list(facts.get("in_words", []))
        self._places = {pictures.name(index): index for index in range(len(pictures))}

    def about(self) -> dict[str, Any]:
        """Title, what the tests say, and (name, cost share, object size) of each image that can be opened."""
        return {
            "title": self.title,
            "words": self.words,
            "pictures": [
                [row["name"], row["cost_share"], row["object_size"]] for row in self.rows if row["name"] in self._places
            ],
        }

    def read(self, name: str) -> tuple[str, np.ndarray, np.ndarray]:
        """Name, image and labels of an image."""
        if name not in self._places:
            raise Refused("the data set has no such image")
        return name, *self.pictures.read(self._places[name])


def _best_ms(run: Callable[[], Segmented], rounds: int = 2) -> float:
    """What the network takes at best, but for the first time."""
    return MS * min([run().seconds for _ in range(1 + rounds)][1:])


def _text(question: Mapping[str, Any], key: str, default: str = "") -> str:
    """A text of a question. Raises Refused for what is none."""
    value = question.get(key)
    if not isinstance(value, str | None):
        raise Refused(f"{key} is no text")
    return value or default


def _bytes(text: Any) -> bytes:
    """The file that a text in base64 holds."""
    if not isinstance(text, str) or not text:
        raise Refused("no file came: choose an image")
    if len(text) * 3 // 4 > MAX_BYTES:
        raise Refused(f"the file is larger than {MAX_BYTES // 1_000_000} MB")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Refused("the file came damaged: choose it again") from error


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """The middle of an image, twice as wide as high."""
    height, width = image.shape[:2]
    tall, wide = min(height, max(1, width // 2)), min(width, 2 * height)
    top, left = (height - tall) // 2, (width - wide) // 2
    return cv2.resize(image[top : top + tall, left : left + wide], (128, 64), interpolation=cv2.INTER_AREA)


def _jpeg_url(image: np.ndarray) -> str:
    """uint8 [H,W,3] as an address that holds the image itself."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
