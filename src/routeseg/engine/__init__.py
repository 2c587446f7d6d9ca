"""How a forward runs: `SkipEngine(model)(images, route=None, activation="one", budget=None)`."""

from __future__ import annotations

from routeseg.engine.skip import Precision, SkipEngine

__all__ = ["Precision", "SkipEngine"]
