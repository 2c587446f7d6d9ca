"""routeseg: semantic segmentation with a network that picks its own depth and resolution for every image."""

__version__ = "0.1.0"
