"""routeseg: semantic segmentation with a network that picks its own depth and resolution for every image.

import routeseg
model = routeseg.load()                        # the small street-scene network that is shipped
result = routeseg.SkipEngine(model)(images)    # images [B,3,H,W], RGB, uint8 or 0..1
result.labels, routeseg.model_cost(model, (H, W)).of_gates(result.gates)

A name is imported when it is first used, so that what needs no torch runs where there is none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from routeseg.version import __version__

if TYPE_CHECKING:
    from routeseg.architectures import ARCHITECTURES, common_route
    from routeseg.cost.latency import LatencyTable
    from routeseg.cost.macs import Budget, cost_table, model_cost
    from routeseg.engine import SkipEngine, build_engine
    from routeseg.model import DynamicRoutingNetwork, Segmentation
    from routeseg.model.checkpoints import import_checkpoint, load
    from routeseg.prediction.onnx_runner import OnnxNetwork
    from routeseg.space import Route, RoutingSpace

__all__ = [
    "ARCHITECTURES",
    "Budget",
    "DynamicRoutingNetwork",
    "LatencyTable",
    "OnnxNetwork",
    "Route",
    "RoutingSpace",
    "Segmentation",
    "SkipEngine",
    "__version__",
    "build_engine",
    "common_route",
    "cost_table",
    "import_checkpoint",
    "load",
    "model_cost",
]

_NAMES = {
    "architectures": ("ARCHITECTURES", "common_route"),
    "model.checkpoints": ("import_checkpoint", "load"),
    "cost.macs": ("Budget", "cost_table", "model_cost"),
    "engine": ("SkipEngine", "build_engine"),
    "cost.latency": ("LatencyTable",),
    "model": ("DynamicRoutingNetwork", "Segmentation"),
    "prediction.onnx_runner": ("OnnxNetwork",),
    "space": ("Route", "RoutingSpace"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return import_module(f"{__name__}.{name}")  # which also sets the attribute
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
