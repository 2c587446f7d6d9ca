"""The explorer as a Hub Space. `MODEL` is a checkpoint folder beside this file; without one it is the bundled
network."""

import os

import routeseg
from routeseg.app import launch

folder = os.environ.get("MODEL")
names = [os.environ[key] for key in ("SPACE_HOST",) if key in os.environ]  # as the Hub calls it
launch(routeseg.load(folder), folder or "street scenes, trained on CamVid", host="0.0.0.0", port=7860, names=names)
