"""Training by a recipe.

recipe.py has the settings and the schedule; task.py what a training step is; segmentation.py and classification.py the
loss and the validation of each task, losses.py what may be changed in it; trial.py in which precision steps are faster;
fused.py the kernels of a step on CPUs; run.py a run (start, resume, processes, the folder); callbacks.py when it
validates and saves; batch_norm.py whose statistics count; initialization.py weights from another network.

The public names and their homes: `__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
