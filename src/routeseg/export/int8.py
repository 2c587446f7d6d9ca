"""int8 files: post-training quantisation of an exported network, by ONNX Runtime (the extra `routeseg[onnx]`).

Static: the ranges of activations are those of calibration images. Activations are uint8, with one scale a map, weights
int8 of 7 bits (-64 to 64), with one scale a channel. The first convolution, which sees the pixels, the last one, and
the resizing of the logits stay float32; so do the gates behind their convolution and what exits look at, for they
decide the route.

Why 7 bits: x86 processors without VNNI add two products of uint8 by int8 in 16 bits (`vpmaddubsw`). 8-bit weights
saturate that sum, and the logits are far off; 2 * 255 * 64 fits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from routeseg.description import METADATA_KEY
from routeseg.errors import require
from routeseg.export import build_flat, check_name
from routeseg.files import write_atomically
from routeseg.model import DynamicRoutingNetwork
from routeseg.prediction.files import pad_small, read_source
from routeseg.prediction.onnx_runner import as_float, reason
from routeseg.prediction.sources import Source, locate

if TYPE_CHECKING:
    import onnx

CALIBRATION_IMAGES = 16  # of those given, evenly spread; with 2 to 64 the mIoU on CamVid is within 0.3 of float32
OPERATORS = ("Conv", "Relu", "Clip", "Add", "Mul", "Resize")  # those that work on maps


def export_int8(
    model: DynamicRoutingNetwork,
    path: str | Path,
    images: Sequence[Source],
    on_image: Callable[[], None] | None = None,
    labels: bool = False,
) -> Path:
    """Writes a network as an int8 ONNX file, whole or not at all; with `labels` as `export` does.

    images    to calibrate with, such as the network will see; CALIBRATION_IMAGES of them at most are read
    on_image  called after each image (for a progress bar)

    Raises ValueError where the name does not end in .onnx, there is no image, one cannot be read, they are too large
    for the memory, or the extra is not installed.
    """
    path = check_name(path)
    if not images:
        raise ValueError("no image to calibrate with: give some such as the network will see")
    require("onnxruntime", "onnx", "--int8")
    float_model = build_flat(model, labels)
    step = on_image or (lambda: None)

    def calibration() -> Iterator[np.ndarray]:
        for source in chosen(images):
            image = pad_small(read_source(source, locate(source)))
            yield as_float(image.transpose(2, 0, 1)[None])
            step()

    write_atomically(path, quantize(float_model, calibration()).SerializeToString())
    return path


def chosen(images: Sequence[Source]) -> list[Source]:
    """The images that calibrate: all, or CALIBRATION_IMAGES of them, evenly spread."""
    count = min(len(images), CALIBRATION_IMAGES)
    return [images[number * len(images) // count] for number in range(count)]


def quantize(model: onnx.ModelProto, images: Iterator[np.ndarray]) -> onnx.ModelProto:
    """A flat float32 network (`build_flat`) in int8, with branches for its exits; `images` float32 [1,3,H,W] as the
    graph takes them."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    from routeseg.export.nesting import nested

    price = {value.name: np.zeros((), np.float32) for value in model.graph.input if value.name == "price"}

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(images, None)
            return None if image is None else {"images": image} | price

    with tempfile.TemporaryDirectory() as scratch, _silent(), _named_errors():
        quantize_static(
            model,
            Path(scratch) / "int8.onnx",
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,  # with int8 few operators can be joined, and it is slower than float32
            weight_type=QuantType.QInt8,
            reduce_range=True,  # 7 bits: right on processors without VNNI, too
            op_types_to_quantize=list(OPERATORS),
            nodes_to_quantize=_to_quantize(model),
        )
        result = nested(onnx.load(Path(scratch) / "int8.onnx"))
    digest = hashlib.sha256(result.SerializeToString(deterministic=True)).hexdigest()
    (words,) = (entry for entry in result.metadata_props if entry.key == METADATA_KEY)
    # Another network than the float32 one, for those who resume a run: its results differ.
    words.value = json.dumps(json.loads(words.value) | {"precision": "int8", "fingerprint": digest[:16]})
    return result


def _to_quantize(model: onnx.ModelProto) -> list[str]:
    """Names of the operators on maps that make the logits, but for those at the two ends: not of what decides."""
    from onnx import shape_inference

    from routeseg.export.nesting import is_choice

    inferred = shape_inference.infer_shapes(model).graph
    is_map = {value.name: _is_map(value) for value in (*inferred.value_info, *inferred.output)}
    makers = {output: node for node in model.graph.node for output in node.output}
    ends = {next(node.name for node in model.graph.node if node.op_type == "Conv")}
    found: dict[str, onnx.NodeProto] = {}
    left = [(model.graph.output[0].name, True)]  # values, and whether they lie behind a predictor
    while left:
        value, is_end = left.pop()
        node = makers.get(value)
        if node is None or node.name in found:
            continue
        found[node.name] = node
        if is_end:  # back over the resizing to the predictor
            ends.add(node.name)
        left += [
            (one, is_end and node.op_type != "Conv") for one in (node.input[1:] if is_choice(node) else node.input)
        ]
    nodes = [node for node in model.graph.node if node.name in found.keys() - ends and node.op_type in OPERATORS]
    return [node.name for node in nodes if is_map.get(node.output[0], False)]


def _is_map(value: onnx.ValueInfoProto) -> bool:
    """Whether this is [B,C,h,w] of more than a pixel."""
    dims = value.type.tensor_type.shape.dim
    return len(dims) == 4 and dims[3].dim_value != 1  # 0 where it is only known at run time


@contextmanager
def _named_errors() -> Iterator[None]:
    """Turns what ONNX Runtime raises, while it runs the images, into a ValueError that tells the remedy."""
    try:
        yield
    except (ValueError, OSError):  # of the images
        raise
    except Exception as error:  # ONNX Runtime has its own, which share no class but this one
        raise ValueError(f"calibration failed ({reason(error)}): give smaller images") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Without the quantiser's advice, which it logs as of no module, for this block."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
