"""How a forward runs. One interface: `engine(images, route=None, activation="one") -> Segmentation`.

dense   the network's own forward: every path computed and multiplied by its activation; the oracle
skip    closed paths and dropped cells are not computed
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from routeseg.engine.skip import SkipEngine
from routeseg.model import DynamicRoutingNetwork, Segmentation

Engine = Callable[..., Segmentation]
EngineName = Literal["skip", "dense"]


def build_engine(model: DynamicRoutingNetwork, name: EngineName = "skip") -> Engine:
    """The forward of this name for a network in eval mode. Raises ValueError for another name."""
    if name == "dense":
        return model.eval()
    if name == "skip":
        return SkipEngine(model)
    raise ValueError(f"engine {name!r}: choose skip or dense")


__all__ = ["Engine", "EngineName", "SkipEngine", "build_engine"]
