"""Pretrain."""

from __future__ import annotations

import torch

from routeseg.cli.logs import quiet_libraries
from routeseg.config import NetworkConfig
from routeseg.data.classification import ClassificationConfig
from routeseg.model import DynamicRoutingNetwork
from routeseg.training.classification import pretrain
from routeseg.training.recipe import PretrainingRecipe
from routeseg.training.run import RunOptions


def run_pretrain(
    config: NetworkConfig, data: ClassificationConfig, recipe: PretrainingRecipe, options: RunOptions
) -> int:
    quiet_libraries()
    torch.manual_seed(recipe.seed)
    model = DynamicRoutingNetwork(config)
    result = pretrain(model, data, recipe, options)
    if not result.is_global_zero:
        return 0
    if result.found is not None:
        print(f"{config.num_classes} classes: {result.found}")
    print(
        f"{result.seconds / 60:.1f} minutes; start a segmenter with `routeseg train --init {options.output}/last ...`"
    )
    return 0
