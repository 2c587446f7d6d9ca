"""routeseg: semantic segmentation with a network that picks its own depth and resolution for every image.

import routeseg
model = routeseg.load()                        # the street-scene network that is shipped; or load("runs/my")
result = model("street.jpg")                   # a path, URL, PIL image, array [H,W,3]; or a list of these
result = model.predict(tensor)                 # also a tensor [3,H,W]; model(images) is the forward of [B,3,H,W]
result.labels, result.shares, result.route, result.cost_gmacs, result.overlay(), result.save("folder" or "x.png")

run = routeseg.train("my", minutes=20)         # your images, as `routeseg train my --minutes 20`
run.model("photo.jpg"), run.evaluation.miou

engine = routeseg.SkipEngine(model)            # for batches of tensors [B,3,H,W], RGB, uint8 or 0..1
engine(images).logits

The public names and their homes: `__init__.pyi`. A name is imported when it is first used, so that what needs no torch
runs without it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
