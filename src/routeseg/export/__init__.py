"""ONNX files of a network: of one route, or with its gates (docs/export.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from routeseg.description import METADATA_KEY
from routeseg.engine.folding import fold_batch_norm
from routeseg.errors import require
from routeseg.export.metadata import metadata
from routeseg.files import write_atomically
from routeseg.model.grid import RoutedNetwork
from routeseg.prediction.sources import is_url

if TYPE_CHECKING:
    import onnx

SUFFIX = ".onnx"

__all__ = ["build_onnx", "export", "metadata", "require_onnx"]


def export(model: RoutedNetwork, path: str | Path) -> Path:
    """Writes a network as an ONNX file, whole or not at all.

    Raises ValueError if the name does not end in .onnx, no file holds the network, or onnx is not installed.
    """
    path = check_name(path)
    write_atomically(path, build_onnx(model).SerializeToString())
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


def build_onnx(model: RoutedNetwork) -> onnx.ModelProto:
    """The ONNX model of a network. Input `images` [B,3,H,W], outputs `logits` [B,K,H,W] and `gates` [B,L+1,S,3]. With
    gates it takes one image at a time, and closed paths are computed and multiplied by 0.

    Raises ValueError if no file holds the network, or onnx is not installed.
    """
    require_onnx()
    from onnx import TensorProto, helper

    from routeseg.export.dense import dense_outputs
    from routeseg.export.graph import Graph
    from routeseg.export.static import static_outputs

    kind, outputs = ("dense", dense_outputs) if model.config.gated else ("static", static_outputs)
    check_kind(model)
    graph, folded, space = Graph(), fold_batch_norm(model).float().cpu(), model.space
    logits, gates = outputs(graph, folded, "images")
    batch: int | str = "batch" if kind == "static" else 1
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, "height", "width"])
    return graph.model(
        [images],
        {
            "logits": (logits, [batch, model.config.num_classes, "height", "width"]),
            "gates": (gates, [batch, space.depth + 1, space.num_scales, 3]),
        },
        {METADATA_KEY: json.dumps(metadata(model, kind))},
    )


def check_kind(model: RoutedNetwork) -> None:
    """Raises ValueError, with the remedy, if no file holds the network."""
    if model.exits is not None:
        raise ValueError(
            "the network chooses an exit for each image, and no file holds that: name one for all images with --route "
            f"{' or '.join(model.config.named_routes)}"
        )
    if model.config.gated and model.backbone is not None:
        raise ValueError(
            "no file holds a network with gates and a backbone: name one route for all images with --route FILE or an "
            "architecture's NAME"
        )


def require_onnx() -> None:
    """Raises ValueError if the package onnx is not installed."""
    require("onnx", "onnx", "`routeseg export`")
