"""The recipe of a training: its numbers, and the learning rate at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Precision = Literal["32-true", "bf16-mixed"]
FLOAT32: Precision = "32-true"
BFLOAT16: Precision = "bf16-mixed"


@dataclass
class TrainingRecipe:
    """What the recipes of all trainings have; the defaults are the authors' for Cityscapes from scratch.

    iterations, lr               steps of the optimiser, and their learning rate. It belongs to the images of a step,
                                 data.batch_size * processes * accumulate: 0.05 is for 8; scale it with their number
    accumulate                   each process adds up the gradients of so many batches for one step
    optimizer                    sgd (the authors'), or adamw, which wants some 1/50 of its lr, and a weight_decay from
                                 0.01 on
    momentum, weight_decay       of SGD; of AdamW the first beta, and what decays beside the gradient. Norm weights do
                                 not decay
    gate_lr_factor               the gates' learning rate, as a multiple of lr (2.5 from ImageNet weights)
    poly_power, warmup_steps, warmup_factor   lr * (1 - step / iterations)^power after a linear warm-up
    clip_norm                    a longer gradient is shortened to this norm; inf clips nothing
    drop_path                    p of the scheduled drop path at the last layer and the last step
    batch_norm                   statistics of the batches of all processes (synced), of each process's batch (own), or
                                 those that the weights came with (frozen); auto: synced on several GPUs, else own
    precise_bn_batches           BatchNorm statistics are estimated from so many batches before each validation
    ema_decay                    validate and save an average of the weights, which keeps this share of itself at each
                                 step (0.9998 averages over some 5000 steps); 0: the weights themselves
    validate_every, save_every, log_every   in iterations
    precision                    32-true, bf16-mixed, or auto: the one in which this machine is faster (trial.py). A run
                                 that is resumed keeps the one that it began with
    """

    iterations: int = 190_000
    lr: float = 0.05
    accumulate: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    gate_lr_factor: float = 1.0
    poly_power: float = 0.9
    warmup_steps: int = 1000
    warmup_factor: float = 0.001
    clip_norm: float = 5.0
    drop_path: float = 0.0
    batch_norm: Literal["auto", "synced", "own", "frozen"] = "auto"
    precise_bn_batches: int = 200
    ema_decay: float = 0.0
    validate_every: int = 5000
    save_every: int = 1000
    log_every: int = 20
    precision: Precision | Literal["auto"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("iterations", "accumulate", "validate_every", "save_every", "log_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"recipe.{key} is {getattr(self, key)}: it must be at least 1")
        for key in ("poly_power", "warmup_steps", "precise_bn_batches", "weight_decay"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"recipe.{key} is {getattr(self, key)}: it must not be negative")
        for key in ("lr", "clip_norm"):
            if not getattr(self, key) > 0:
                raise ValueError(f"recipe.{key} is {getattr(self, key)}: it must be positive")
        if math.isinf(self.lr):
            raise ValueError("recipe.lr is inf: it must be a number")
        for key in ("momentum", "drop_path"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"recipe.{key} is {getattr(self, key)}: it must be at least 0 and below 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"recipe.ema_decay is {self.ema_decay}: it must be at least 0 (off) and below 1")


@dataclass
class Recipe(TrainingRecipe):
    """The `recipe` section of a configuration of `routeseg train`: what all recipes have, and

    pretrained      a backbone starts from its published weights
    backbone_lr_factor   the learning rate of its stages, as a multiple of lr
    backbone_frozen   share of the iterations before they learn; 1: never
    backbone_frozen_stages   so many of them, from the first, never learn: the first one costs most of a step
    class_balance   the loss of a pixel counts 1 / (its class's share of the training pixels)^class_balance, relative to
                    the others: 0 all pixels alike, 1 all classes alike; between them rare classes gain
    places_from     from this share of the iterations on, places of a network that has them leave while it learns, and
                    BatchNorm keeps its statistics (training/segmentation.py); 1: never. 0 is for a network that is
                    trained already, with a small lr: while it learns much, this costs it points (docs/any_budget.md)
    class_offsets   the networks that are validated and saved have an offset for the logit of each class, with which the
                    mIoU of training images is highest (offsets.py): what `class_balance` says too often is said less
    """

    pretrained: bool = True
    backbone_lr_factor: float = 0.2
    backbone_frozen: float = 0.1
    backbone_frozen_stages: int = 1
    class_balance: float = 0.0
    class_offsets: bool = False
    places_from: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.backbone_lr_factor > 0:
            raise ValueError(f"recipe.backbone_lr_factor is {self.backbone_lr_factor}: it must be positive")
        if not 0 <= self.backbone_frozen <= 1:
            raise ValueError(f"recipe.backbone_frozen is {self.backbone_frozen}: it must be from 0 to 1")
        if self.backbone_frozen_stages < 0:
            raise ValueError(f"recipe.backbone_frozen_stages is {self.backbone_frozen_stages}: it must not be negative")
        if not 0 <= self.places_from <= 1:
            raise ValueError(f"recipe.places_from is {self.places_from}: it must be from 0 to 1 (never)")
        if not 0 <= self.class_balance <= 1:
            raise ValueError(f"recipe.class_balance is {self.class_balance}: it must be from 0 (off) to 1")


@dataclass
class PretrainingRecipe(TrainingRecipe):
    """The `recipe` section of a configuration of `routeseg pretrain`: what all recipes have, with other defaults (lr
    0.2 for 256 images, 120 epochs of ImageNet, BatchNorm's running statistics), and

    label_smoothing   this share of a label is spread over all classes
    """

    iterations: int = 600_600
    lr: float = 0.2
    precise_bn_batches: int = 0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"recipe.label_smoothing is {self.label_smoothing}: it must be at least 0 and below 1")


def lr_factor(step: float, recipe: TrainingRecipe) -> float:
    """Poly decay with a linear warm-up from `warmup_factor`."""
    poly = (1.0 - min(step, recipe.iterations) / recipe.iterations) ** recipe.poly_power
    if step >= recipe.warmup_steps:
        return poly
    share = step / recipe.warmup_steps
    return poly * (recipe.warmup_factor * (1 - share) + share)
