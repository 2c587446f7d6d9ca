"""Training by a recipe.

recipe.py has the settings and the schedule; fitting.py what any training shares (optimiser, processes, the folder of
a run); segmentation.py and classification.py what a step computes; callbacks.py validation and saving; batch_norm.py
whose statistics count; initialization.py weights from another network.
"""

from routeseg.training.classification import pretrain
from routeseg.training.recipe import Recipe
from routeseg.training.segmentation import train

__all__ = ["Recipe", "pretrain", "train"]
