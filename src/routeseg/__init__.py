"""routeseg: semantic segmentation with a network that picks its own depth and resolution for every image.

import routeseg
model = routeseg.load()                        # the small street-scene network that is shipped
result = routeseg.SkipEngine(model)(images)    # images [B,3,H,W], RGB, uint8 or 0..1
result.labels, routeseg.model_cost(model, (H, W)).of_gates(result.gates)
"""

from routeseg.architectures import ARCHITECTURES, common_route
from routeseg.checkpoints import import_checkpoint, load
from routeseg.cost import Budget, cost_table, model_cost
from routeseg.engine import SkipEngine, build_engine
from routeseg.model import DynamicRoutingNetwork, Segmentation
from routeseg.space import Route, RoutingSpace
from routeseg.version import __version__

__all__ = [
    "ARCHITECTURES",
    "Budget",
    "DynamicRoutingNetwork",
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
