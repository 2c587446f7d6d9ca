"""An exported network (`routeseg export`) run by ONNX Runtime, the extra `routeseg[onnx]`. No torch here.

Legend: B images, H, W image size, K classes, L depth, S scales.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from routeseg.budgets.asked import Asked
from routeseg.budgets.keeping import Spending
from routeseg.description import FORMAT, METADATA_KEY, NetworkDescription
from routeseg.errors import DIVERGED, NOT_FINITE, require
from routeseg.files import parse_json
from routeseg.labels import label_type
from routeseg.model.prices import Look
from routeseg.prediction.files import Ran
from routeseg.space import MIN_IMAGE_SIZE, seen_size

LABEL_TYPES = {np.dtype(kind): f"tensor({kind})" for kind in ("uint8", "uint16")}  # in the words of ONNX Runtime
FATAL_ONLY = 4  # of the log of ONNX Runtime, which also raises its errors
NO_MEMORY = ("Failed to allocate memory", "bad allocation", "bad_alloc")  # in the words of ONNX Runtime


class OnnxNetwork:
    """The network of an ONNX file: `OnnxNetwork(file)(image)`, a `Runner` (files.py).

    file     as `routeseg export` writes it
    threads  that compute one image; None: OMP_NUM_THREADS, or all cores that this process may use
    content  the file's bytes, if this machine does not have the file
    budget   of a file with exits, what images may cost in the mean: a share such as 0.4, "40%" or "0.5GMACs"; None:
             what helps

    network    its NetworkDescription
    kind       "static", "exits", or "dense": with gates, all paths are computed
    precision  "float32" or "int8"
    labels     it gives labels and their probability in the place of logits
    session    ONNX Runtime's

    Raises ValueError, naming the file, if it is missing or damaged, if routeseg did not write it, or another version of
    it did, if it takes no such budget, and if ONNX Runtime is not installed; and BudgetNotKept for a budget below the
    cheapest exit.
    """

    def __init__(
        self,
        file: str | Path,
        threads: int | None = None,
        content: bytes | None = None,
        budget: Asked | str | float | None = None,
    ) -> None:
        self.file = Path(file)
        self.session = _open(self.file, threads or _default_threads(), content)
        data = _read_metadata(self.file, self.session.get_modelmeta().custom_metadata_map)
        self.kind, self.precision = str(data.get("kind")), str(data.get("precision"))
        try:
            self.network = NetworkDescription.from_metadata(data)
        except ValueError as error:
            raise ValueError(f"{file} does not say what network it holds: {error}. Export it anew") from error
        self.labels = "labels" in {value.name for value in self.session.get_outputs()}
        _check_tensors(self)
        self._asked = self._check_budget(budget)
        self.budget = None if self._asked is None else str(self._asked)
        self._spending = None if self._asked is None else Spending(self._asked, self.network)

    def __call__(self, image: np.ndarray) -> Ran:
        """Segments an image uint8 [H,W,3] RGB, H and W at least 32.

        Raises ValueError if an output is not finite, and MemoryError if memory is short.
        """
        height, width = image.shape[:2]
        look = Look(1.0, 0.0) if self._spending is None else self._spending.look((height, width))
        seen = seen_size((height, width), look.size)
        looked_at = image if seen == (height, width) else _resized(image, seen)
        price = look.price if self.kind == "exits" else None
        first, *known, gates = self.run(looked_at.transpose(2, 0, 1)[None], price)
        labels, certain = (first[0], known[0][0]) if self.labels else most_likely(first[0])
        if not np.isfinite(certain).all() or not np.isfinite(gates).all():
            raise ValueError(DIVERGED)
        if looked_at is not image and self.labels:
            labels = _resized(labels, (height, width), Image.Resampling.NEAREST)
            certain = _resized(certain, (height, width))
        elif looked_at is not image:
            labels, certain = most_likely(np.stack([_resized(one, (height, width)) for one in first[0]]))
        confidence = certain if self.labels else None
        ran = Ran(labels, gates[0], confidence=confidence, seen=None if looked_at is image else seen)
        if self._spending is not None:
            self._spending.saw((height, width), look, ran)
        return ran

    def run(self, images: np.ndarray, price: float | None = None) -> tuple[np.ndarray, ...]:
        """Images [B,3,H,W] RGB, uint8 or floating point in 0..1, H and W at least 32 -> float32 logits [B,K,H,W],
        gates [B,L+1,S,3]: what `routeseg.model.Segmentation` holds. A file with labels gives in the logits' place
        labels [B,H,W] and confidence [B,H,W], the probability of each, float32.

        price  of a file with exits, in the budget's place: what its rule compares with

        Raises ValueError for other images and prices, BudgetNotKept for a budget that cannot be kept at their size, and
        MemoryError if memory is short.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not len(images) or min(images.shape[2:]) < MIN_IMAGE_SIZE:
            raise ValueError(
                f"images have shape {list(images.shape)}: expected [B,3,H,W], RGB, H and W at least {MIN_IMAGE_SIZE}"
            )
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"images have dtype {images.dtype}: give uint8, or floating point in 0..1")
        if images.dtype != np.uint8 and not np.isfinite(images).all():
            raise ValueError(NOT_FINITE)
        if price is not None and self.kind != "exits":
            raise ValueError(f"{self.file} takes no price, for it has no exits")
        if price is not None and not np.isfinite(price):
            raise ValueError(f"a price of {price} is none: give a finite number")
        if self.kind == "static" or len(images) == 1:
            return tuple(self._run(images, price))
        parts = [self._run(image[None], price) for image in images]  # each takes a route of its own
        return tuple(np.concatenate(some) for some in zip(*parts, strict=True))

    def _run(self, images: np.ndarray, price: float | None = None) -> list[np.ndarray]:
        """The outputs of the graph, of images that are right."""
        height, width = images.shape[2:]
        feed = {"images": as_float(images)}
        if self.kind == "exits":
            feed["price"] = np.array(self._price(height, width) if price is None else price, dtype=np.float32)
        try:
            return self.session.run([*self._segmentation, "gates"], feed)
        except Exception as error:  # ONNX Runtime's errors share no class but this one
            if any(words in str(error) for words in NO_MEMORY):
                raise MemoryError(str(error)) from error
            raise ValueError(f"{self.file} cannot be run on images of {height}x{width}: {reason(error)}") from error

    @property
    def _segmentation(self) -> list[str]:
        """The outputs of the graph before the gates."""
        return ["labels", "confidence"] if self.labels else ["logits"]

    def _price(self, height: int, width: int) -> float:
        """The price that keeps the budget for images of this size, as they are."""
        return 0.0 if self._asked is None else self._asked.look(self.network, (height, width), 1.0).price

    def _check_budget(self, budget: Asked | str | float | None) -> Asked | None:
        """The budget, if the file takes it."""
        if budget is None:
            return None
        if self.kind != "exits":
            raise ValueError(f"{self.file} takes no budget, it has one cost: export a network with exits, all of them")
        asked = budget if isinstance(budget, Asked) else Asked.parse(budget)
        if asked.unit == "ms":
            raise ValueError(
                f"{self.file} takes no budget in milliseconds, tables of latency are of checkpoints: give a share such "
                "as 40%, or MACs such as 0.5GMACs"
            )
        if asked.unit == "share":
            asked.look(self.network, (MIN_IMAGE_SIZE, MIN_IMAGE_SIZE))  # the same for all sizes
        return asked


def _resized(
    values: np.ndarray, size: tuple[int, int], how: Image.Resampling = Image.Resampling.BILINEAR
) -> np.ndarray:
    """An image uint8 [H,W,3], or a map [H,W], of another size."""
    return np.asarray(Image.fromarray(values).resize(size[::-1], how))


def as_float(images: np.ndarray) -> np.ndarray:
    """Images [B,3,H,W], uint8 or floating point in 0..1 -> what the graph takes: float32 in 0..1."""
    prepared = np.empty(images.shape, dtype=np.float32)
    return np.divide(images, 255 if images.dtype == np.uint8 else 1, out=prepared)


def most_likely(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [K,H,W] -> the first of the largest [H,W], and its logit [H,W], which is NaN if any of the K is.

    One class after another, which is more than twice as fast as `argmax` over the first axis.
    """
    labels, best = np.zeros(logits.shape[1:], label_type(len(logits))), logits[0].copy()
    for number, one in enumerate(logits[1:], start=1):
        np.putmask(labels, one > best, number)
        np.maximum(best, one, out=best)
    return labels, best


def _default_threads() -> int:
    """As many as torch takes: OMP_NUM_THREADS if it is set, else all cores that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open(file: Path, threads: int, content: bytes | None) -> Any:
    """ONNX Runtime's session of a file, or of its content."""
    onnxruntime = require("onnxruntime", "onnx", "prediction with an ONNX file")
    if content is None and not file.is_file():
        raise ValueError(f"no file {file}: `routeseg export CHECKPOINT {file}` writes one")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = FATAL_ONLY
    try:
        return onnxruntime.InferenceSession(content or file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no class but this one
        raise ValueError(f"{file} is no ONNX file, or a damaged one: {reason(error)}") from error


def _read_metadata(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the file says of its network. Raises ValueError if routeseg did not write it, or a later version did."""
    if METADATA_KEY not in metadata:
        raise ValueError(f"{file} is an ONNX file, but `routeseg export` did not write it: give one that it wrote")
    try:
        data = parse_json(metadata[METADATA_KEY])
        written = data["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} does not say what network it holds: its metadata is damaged. Export it anew"
        ) from error
    if written != FORMAT:
        raise ValueError(
            f"{file} has format {written}, and routeseg {data.get('version', '?')} wrote it; this version reads format "
            f"{FORMAT}: install that version, or export the network anew"
        )
    return data


def _check_tensors(onnx: OnnxNetwork) -> None:
    """Raises ValueError if inputs and outputs of the graph are not those of the network that the file describes."""
    config, session = onnx.network.config, onnx.session
    inputs: dict[str, tuple[int | None, ...]] = {"images": (None, 3, None, None)}
    outputs: dict[str, tuple[int | None, ...]] = {"logits": (None, config.num_classes, None, None)}
    if onnx.kind == "exits":
        inputs["price"] = ()
    if onnx.labels:
        outputs = {"labels": (None,) * 3, "confidence": (None,) * 3}
    outputs["gates"] = (None, config.space.depth + 1, config.space.num_scales, 3)
    takes, gives = session.get_inputs(), session.get_outputs()
    if [one.name for one in takes] != [*inputs] or [one.name for one in gives] != [*outputs]:
        raise ValueError(
            f"{onnx.file} takes {[one.name for one in takes]} and gives {[one.name for one in gives]}, not "
            f"{[*inputs]} and {[*outputs]}: export it anew"
        )
    expected = inputs | outputs
    for value in (*takes, *gives):
        shape = expected[value.name]
        kind = LABEL_TYPES[label_type(config.num_classes)] if value.name == "labels" else "tensor(float)"
        fits = len(value.shape) == len(shape) and all(
            want is None or have == want for have, want in zip(value.shape, shape, strict=True)
        )
        if not fits or value.type != kind:
            raise ValueError(
                f"{onnx.file}: {value.name} is {value.type} {value.shape}, which does not fit the network that the "
                "file describes: export it anew"
            )


def reason(error: Exception) -> str:
    """The first line of what ONNX Runtime says, without its name and number for it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(" : ", 2)[-1]
