"""routeseg: semantic segmentation with a network that picks its own depth and resolution for every image.

import routeseg
model = routeseg.load()                        # the small street-scene network that is shipped
result = routeseg.SkipEngine(model)(images)    # images [B,3,H,W], RGB, uint8 or 0..1
result.labels, routeseg.model_cost(model, (H, W)).of_gates(result.gates)

The public names and their homes: `__init__.pyi`. A name is imported when it is first used, so that what needs no torch
runs without it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
