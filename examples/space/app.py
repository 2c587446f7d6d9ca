"""The explorer as a Hub Space. `MODEL` is a checkpoint folder beside this file; without one it is the network that
comes along."""

import os

import routeseg
from routeseg.app import launch

folder = os.environ.get("MODEL")
launch(routeseg.load(folder), folder or "street scenes, trained on CamVid", host="0.0.0.0", port=7860)
