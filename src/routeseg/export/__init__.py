"""ONNX files of a network: of one route, with its exits, or with its gates (docs/export.md)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from routeseg.description import METADATA_KEY
from routeseg.engine.folding import fold_batch_norm
from routeseg.errors import require
from routeseg.export.metadata import metadata
from routeseg.files import write_atomically
from routeseg.labels import label_type
from routeseg.model import DynamicRoutingNetwork
from routeseg.model.grid import RoutedNetwork
from routeseg.prediction.sources import is_url

if TYPE_CHECKING:
    import onnx

SUFFIX = ".onnx"
STATIC, DENSE, EXITS = "static", "dense", "exits"

__all__ = ["build_onnx", "export", "metadata", "require_onnx"]


def export(model: RoutedNetwork, path: str | Path, labels: bool = False) -> Path:
    """Writes a network as an ONNX file, whole or not at all.

    labels  the most likely class and its probability in the place of logits (`build_onnx`)

    Raises ValueError if the name does not end in .onnx, no file holds the network, or onnx is not installed.
    """
    path = check_name(path)
    write_atomically(path, build_onnx(model, labels).SerializeToString())
    return path


def check_name(path: str | Path) -> Path:
    """The path. Raises ValueError if it does not end in .onnx, or is a folder or URL."""
    if is_url(path):
        raise ValueError(f"{path}: files are written to a disk: give a path, and copy it there")
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"{path} is no name of an ONNX file: let it end in {SUFFIX}, such as {path.stem}{SUFFIX}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file")
    return path


def build_onnx(model: RoutedNetwork, labels: bool = False) -> onnx.ModelProto:
    """The ONNX model of a network. Input `images` [B,3,H,W] of any size, outputs `logits` [B,K,H,W] and `gates`
    [B,L+1,S,3]; or in the place of the logits, with `labels`, `labels` [B,H,W] and their probability, `confidence`.

    With exits it also takes a `price`, and runs as far as the exit at which that has the image leave: as a whole, also
    of a network whose places leave by themselves. With gates closed paths are computed and multiplied by 0. Both take
    one image at a time.

    Raises ValueError if no file holds the network, or onnx is not installed.
    """
    require_onnx()
    from routeseg.export.nesting import nested

    return nested(build_flat(model, labels))


def build_flat(model: RoutedNetwork, labels: bool = False) -> onnx.ModelProto:
    """The same, which computes all exits (nesting.py)."""
    require_onnx()
    from onnx import TensorProto, helper

    from routeseg.export import parts
    from routeseg.export.dense import dense_outputs
    from routeseg.export.exits import exits_outputs
    from routeseg.export.graph import FLOAT, Graph
    from routeseg.export.static import static_outputs

    kind, config, space = kind_of(model), model.config, model.space
    if isinstance(model, DynamicRoutingNetwork) and config.place is not None:
        model = model.as_wholes()
    graph, folded = Graph(), fold_batch_norm(model).float().cpu()
    batch: int | str = "batch" if kind == STATIC else 1
    inputs = [helper.make_tensor_value_info("images", FLOAT, [batch, 3, "height", "width"])]
    images = parts.prepare(graph, folded, "images")
    if kind == EXITS:
        inputs.append(helper.make_tensor_value_info("price", FLOAT, []))
        padded, gates = exits_outputs(graph, folded, images, "price")
    else:
        padded, gates = (dense_outputs if kind == DENSE else static_outputs)(graph, folded, images)
    logits = parts.crop(graph, padded, "images")
    outputs: dict[str, tuple[str, int, Sequence[int | str]]]
    if labels:
        integers = TensorProto.UINT8 if label_type(config.num_classes).itemsize == 1 else TensorProto.UINT16
        found, confidence = parts.most_likely(graph, logits, config.num_classes, integers)
        shape = [batch, "height", "width"]
        outputs = {"labels": (found, integers, shape), "confidence": (confidence, FLOAT, shape)}
    else:
        outputs = {"logits": (logits, FLOAT, [batch, config.num_classes, "height", "width"])}
    outputs["gates"] = (gates, FLOAT, [batch, space.depth + 1, space.num_scales, 3])
    return graph.model(inputs, outputs, {METADATA_KEY: json.dumps(metadata(model, kind))})


def kind_of(model: RoutedNetwork) -> str:
    """What kind of file holds the network. Raises ValueError, with the remedy, if none does."""
    config = model.config
    if config.gated and model.backbone is not None:
        raise ValueError(
            "no file holds a network with gates and a backbone: name one route for all images with --route FILE or an "
            "architecture's NAME"
        )
    if model.exits is None:
        return DENSE if config.gated else STATIC
    remedy = f"name an exit for all images with --route {' or '.join(config.named_routes)}"
    if not model.exits.calibrated:
        raise ValueError(f"the network was not calibrated, so it cannot decide: run `routeseg calibrate`, or {remedy}")
    return EXITS


def require_onnx() -> None:
    """Raises ValueError if the package onnx is not installed."""
    require("onnx", "onnx", "`routeseg export`")
