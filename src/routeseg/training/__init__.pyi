from .classification import pretrain as pretrain
from .recipe import Recipe as Recipe
from .run import RunOptions as RunOptions
from .segmentation import train as train
