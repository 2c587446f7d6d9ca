"""How a forward runs. One interface: `engine(images, route=None, activation="one", budget=None)`.

dense   the network's own forward: every path computed and multiplied by its activation; the oracle
skip    closed paths and dropped cells are not computed
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from routeseg.engine.skip import Precision, SkipEngine
from routeseg.model import Segmentation
from routeseg.model.grid import RoutedNetwork

Engine = Callable[..., Segmentation]
EngineName = Literal["skip", "dense"]


def build_engine(model: RoutedNetwork, name: EngineName = "skip", precision: Precision = "float32") -> Engine:
    """The forward of this name for a network in eval mode, on the device where the network is.

    precision  only applies to the skip engine (see there); the dense forward runs in the network's own precision, which
               auto leaves to it

    Raises ValueError for another name or precision.
    """
    if name == "dense":
        if precision not in ("auto", "float32"):
            raise ValueError(f"precision {precision} only applies to engine skip: leave it out for engine dense")
        return model.eval()
    if name == "skip":
        return SkipEngine(model, precision)
    raise ValueError(f"engine {name!r}: choose skip or dense")


__all__ = ["Engine", "EngineName", "Precision", "SkipEngine", "build_engine"]
