"""BatchNorm in training: which images its statistics are of, and precise statistics before an evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

import torch
from torch import Tensor, nn

from routeseg.collectives import rank_and_world, total
from routeseg.model.grid import RoutedNetwork
from routeseg.model.layers import running_statistics
from routeseg.space import SMALL_GATE_FACTOR, STEM_STRIDE, padded_size

Mode = Literal["synced", "own", "frozen"]


def choose_mode(asked: str, on_gpu: bool, processes: int) -> Mode:
    """The mode that `recipe.batch_norm` asks for: "auto" is synced on several GPUs, and own otherwise.

    Raises ValueError for synced on CPUs.
    """
    if asked == "auto":
        return "synced" if on_gpu and processes > 1 else "own"
    if asked == "synced" and not on_gpu:
        raise ValueError(
            "recipe.batch_norm is synced, but torch's SyncBatchNorm refuses modules on CPUs. Set --recipe.batch_norm "
            "own (statistics of each process's batches, averaged over the processes before an evaluation) or frozen "
            "(those of the weights that you start from), or train on GPUs"
        )
    return cast(Mode, asked)


def check_enough_values(model: RoutedNetwork, crop: tuple[int, int], batch_size: int) -> None:
    """Raises ValueError if a BatchNorm would see a single value per channel, which has no variance.

    The coarsest scale has the fewest values, and a small gate there one for 16 pixels.
    """
    scale = max(s for _, s in model.route.nodes)
    height, width = (side // (STEM_STRIDE * 2**scale) for side in padded_size(model.space, *crop))
    if model.config.gated and model.config.small_gate:
        height, width = (max(1, side // SMALL_GATE_FACTOR) for side in (height, width))
    if batch_size * height * width < 2:
        small = " with small gates" if model.config.gated and model.config.small_gate else ""
        raise ValueError(
            f"data.batch_size {batch_size} and data.crop {crop[0]}x{crop[1]} leave a single value per channel for "
            f"BatchNorm at the coarsest scale{small}, which has no variance: take a larger batch or crop, or, "
            "with weights from --init, set --recipe.batch_norm frozen"
        )


def norms_of(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def precise_batch_norm(model: RoutedNetwork, batches: Iterable[dict[str, Tensor]]) -> None:
    """Sets BatchNorm's statistics to their mean over these batches, instead of a running mean over training.

    In a job of several processes each brings its share of the batches, and all get the mean over all of them.
    """
    norms = norms_of(model)
    device, was_training = next(model.parameters()).device, model.training
    momenta = [norm.momentum for norm in norms]
    before = [(mean.clone(), variance.clone()) for mean, variance in map(running_statistics, norms)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
    model.train()
    for batch in batches:
        model(batch["image"].to(device))
    tracked = torch.stack([cast(Tensor, norm.num_batches_tracked) for norm in norms])
    average_statistics(model, tracked)
    for norm, momentum, kept, count in zip(norms, momenta, before, total(tracked), strict=True):
        norm.momentum = momentum
        if not count:  # a node that no picture reached keeps what it had
            for statistic, value in zip(running_statistics(norm), kept, strict=True):
                statistic.copy_(value)
    model.train(was_training)


@torch.no_grad()
def average_statistics(model: nn.Module, weights: Tensor | None = None) -> None:
    """Sets BatchNorm's statistics to their mean over the processes, weighted by `weights` of each process [norms]."""
    if rank_and_world()[1] == 1:
        return
    norms = norms_of(model)
    statistics = [statistic for norm in norms for statistic in running_statistics(norm)]
    weights = torch.ones(len(norms), device=statistics[0].device) if weights is None else weights.float()
    sizes = [len(statistic) for statistic in statistics]
    each = weights.repeat_interleave(torch.tensor(sizes[::2], device=weights.device) * 2)  # mean and variance
    sums = total(torch.stack((torch.cat(statistics) * each, each)))
    for statistic, mean in zip(statistics, (sums[0] / sums[1].clamp(min=1)).split(sizes), strict=True):
        statistic.copy_(mean)
