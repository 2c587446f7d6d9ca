"""What an exported file says of itself, so that a runner needs neither torch nor the checkpoint (docs/export.md)."""

from __future__ import annotations

from typing import Any

from routeseg.cost.macs import model_cost
from routeseg.description import FORMAT, describe
from routeseg.model.grid import RoutedNetwork
from routeseg.space import DIRECTIONS
from routeseg.version import __version__

COST_SIZE = (1024, 2048)  # the image size that costs are given for


def metadata(model: RoutedNetwork, kind: str, precision: str = "float32") -> dict[str, Any]:
    """The JSON object under `routeseg` in the metadata of a file.

    kind       "static", "exits", or "dense": with gates (`build_onnx`); `model` is the network that the file runs, so a
               static one is specialised already
    precision  "float32" or "int8"
    """
    facts = {"format": FORMAT, "kind": kind, "precision": precision, "version": __version__}
    return facts | describe(model).as_metadata() | {"cost_macs": cost_macs(model)}


def cost_macs(model: RoutedNetwork) -> dict[str, Any]:
    """The cost table at 1024x2048, in the authors' convention: what is always paid, and each node's own part.

    A node that is reached pays `gate`, one that runs `cell`, and each open path its own entry (docs/inference.md).
    """
    table = model_cost(model, COST_SIZE)
    nodes = {}
    for layer, scale in model.space.nodes:
        parts = {"cell": table.cell[layer, scale], "gate": table.gate[layer, scale]}
        edges = dict(zip(DIRECTIONS, table.edge[layer, scale], strict=True))
        nodes[f"{layer}-{scale}"] = {name: float(macs) for name, macs in (parts | edges).items()}
    return {"size": list(COST_SIZE), "fixed": table.stem + table.head, "nodes": nodes}
