"""Training by a recipe.

recipe.py has the settings and the schedule; task.py what a training step is; segmentation.py and classification.py the
loss and the validation of each task; trial.py in which precision steps are faster; run.py a run (start, resume,
processes, the folder); callbacks.py when it validates and saves; batch_norm.py whose statistics count;
initialization.py weights from another network.
"""

from routeseg.training.classification import pretrain
from routeseg.training.recipe import Recipe
from routeseg.training.run import RunOptions
from routeseg.training.segmentation import train

__all__ = ["Recipe", "RunOptions", "pretrain", "train"]
