"""An exported network (`routeseg export`) run by ONNX Runtime, the extra `routeseg[onnx]`. No torch here.

Legend: B images, H, W image size, K classes, L depth, S scales.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from routeseg.description import FORMAT, METADATA_KEY, NetworkDescription
from routeseg.errors import DIVERGED, NOT_FINITE, require
from routeseg.files import parse_json
from routeseg.labels import label_type
from routeseg.prediction.files import Ran
from routeseg.space import MIN_IMAGE_SIZE, padded_size

FATAL_ONLY = 4  # of the log of ONNX Runtime, which also raises its errors
NO_MEMORY = ("Failed to allocate memory", "bad allocation", "bad_alloc")  # in the words of ONNX Runtime


class OnnxNetwork:
    """The network of an ONNX file: `OnnxNetwork(file)(image)`, a `Runner` (files.py).

    file     as `routeseg export` writes it
    threads  that compute one image; None: OMP_NUM_THREADS, or all cores that this process may use
    content  the file's bytes, if this machine does not have the file

    network    its NetworkDescription
    kind       "static", or "dense": with gates, all paths are computed
    precision  "float32" or "int8"
    session    ONNX Runtime's

    Raises ValueError, naming the file, if it is missing or damaged, if routeseg did not write it, or a later version of
    it did, and if ONNX Runtime is not installed.
    """

    def __init__(self, file: str | Path, threads: int | None = None, content: bytes | None = None) -> None:
        self.file = Path(file)
        self.session = _open(self.file, threads or _default_threads(), content)
        data = _read_metadata(self.file, self.session.get_modelmeta().custom_metadata_map)
        self.kind, self.precision = str(data.get("kind")), str(data.get("precision"))
        try:
            self.network = NetworkDescription.from_metadata(data)
        except ValueError as error:
            raise ValueError(f"{file} does not say what network it holds: {error}. Export it anew") from error
        _check_tensors(self)

    def __call__(self, image: np.ndarray) -> Ran:
        """Segments an image uint8 [H,W,3] RGB, H and W at least 32.

        Raises ValueError if an output is not finite, and MemoryError if memory is short.
        """
        logits, gates = self.run(image.transpose(2, 0, 1)[None])
        labels, best = most_likely(logits[0])
        if not np.isfinite(best).all() or not np.isfinite(gates).all():
            raise ValueError(DIVERGED)
        return Ran(labels, gates[0])

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images [B,3,H,W] RGB, uint8 or floating point in 0..1, H and W at least 32 -> float32 logits [B,K,H,W],
        gates [B,L+1,S,3]: what `routeseg.model.Segmentation` holds.

        Raises ValueError for other images, and MemoryError if memory is short.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not len(images) or min(images.shape[2:]) < MIN_IMAGE_SIZE:
            raise ValueError(
                f"images have shape {list(images.shape)}: expected [B,3,H,W], RGB, H and W at least {MIN_IMAGE_SIZE}"
            )
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"images have dtype {images.dtype}: give uint8, or floating point in 0..1")
        if images.dtype != np.uint8 and not np.isfinite(images).all():
            raise ValueError(NOT_FINITE)
        if self.kind != "static" and len(images) > 1:  # each takes a route of its own
            parts = [self.run(image[None]) for image in images]
            return np.concatenate([logits for logits, _ in parts]), np.concatenate([gates for _, gates in parts])
        height, width = images.shape[2:]
        try:
            logits, gates = self.session.run(["logits", "gates"], {"images": prepare(self.network, images)})
        except Exception as error:  # ONNX Runtime's errors share no class but this one
            if any(words in str(error) for words in NO_MEMORY):
                raise MemoryError(str(error)) from error
            raise ValueError(f"{self.file} cannot be run on images of {height}x{width}: {reason(error)}") from error
        return logits[..., :height, :width], gates


def prepare(network: NetworkDescription, images: np.ndarray) -> np.ndarray:
    """Images [B,3,H,W], uint8 or floating point in 0..1 -> what the graph takes: float32 in 0..1, padded to the space's
    stride, right and below, with the mean pixel, which is 0 once normalised."""
    batch, _, height, width = images.shape
    prepared = np.empty((batch, 3, *padded_size(network.config.space, height, width)), dtype=np.float32)
    mean = np.array(network.config.pixel_mean, dtype=np.float32).reshape(3, 1, 1)
    np.divide(images, 255 if images.dtype == np.uint8 else 1, out=prepared[..., :height, :width])
    prepared[..., height:, :] = mean
    prepared[..., :height, width:] = mean
    return prepared


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
    space, session = onnx.network.config.space, onnx.session
    expected = {
        "images": (None, 3, None, None),
        "logits": (None, onnx.network.config.num_classes, None, None),
        "gates": (None, space.depth + 1, space.num_scales, 3),
    }
    found = {value.name: value for value in (*session.get_inputs(), *session.get_outputs())}
    if found.keys() != expected.keys() or [value.name for value in session.get_inputs()] != ["images"]:
        raise ValueError(
            f"{onnx.file} takes {[value.name for value in session.get_inputs()]} and gives "
            f"{[value.name for value in session.get_outputs()]}, not ['images'] and ['logits', 'gates']: export it anew"
        )
    for name, shape in expected.items():
        value = found[name]
        fits = len(value.shape) == len(shape) and all(
            want is None or have == want for have, want in zip(value.shape, shape, strict=True)
        )
        if not fits or value.type != "tensor(float)":
            raise ValueError(
                f"{onnx.file}: {name} is {value.type} {value.shape}, which does not fit the network that the file "
                "describes: export it anew"
            )


def reason(error: Exception) -> str:
    """The first line of what ONNX Runtime says, without its name and number for it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(" : ", 2)[-1]
