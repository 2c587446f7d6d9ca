"""BatchNorm in training: which images its statistics are of, and precise statistics before an evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

import torch
from torch import Tensor, nn

from routeseg.collectives import rank_and_world, total
from routeseg.model.grid import RoutedNetwork
from routeseg.model.layers import running_statistics
from routeseg.space import DIRECTIONS, SMALL_GATE_FACTOR, STEM_STRIDE, is_diagonal, padded_size, walk

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
    """Sets BatchNorm's statistics to their mean over these batches, instead of a running mean over training: that of
    each norm over the images that it normalises, so that a batch in which a node has few of them counts for less.

    In a job of several processes each brings its share of the batches, and all get the mean over all of them.
    """
    norms = norms_of(model)
    device, was_training = next(model.parameters()).device, model.training
    momenta = [norm.momentum for norm in norms]
    statistics = [statistic for norm in norms for statistic in running_statistics(norm)]
    before, sizes = torch.cat(statistics), torch.tensor([len(statistic) for statistic in statistics], device=device)
    sums, seen = torch.zeros_like(before, dtype=torch.float64), torch.zeros(len(norms), device=device)
    for norm in norms:
        norm.momentum = 1.0  # the statistics of the last batch
        norm.num_batches_tracked = torch.zeros_like(cast(Tensor, norm.num_batches_tracked))
    model.train()
    for batch in batches:
        images = images_of_norms(model, model(batch["image"].to(device), coarse=True).gates).to(device)
        sums += torch.cat(statistics) * _for_each_value(images, sizes)
        seen += images
    sums, seen = total(sums), total(seen)
    means = sums / _for_each_value(seen, sizes).clamp(min=1)
    found = torch.where(_for_each_value(seen, sizes) > 0, means.to(before.dtype), before)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for statistic, value in zip(statistics, found.split(sizes.tolist()), strict=True):
        statistic.copy_(value)  # a node that no image ran keeps what it had
    model.train(was_training)


def images_of_norms(model: RoutedNetwork, gates: Tensor) -> Tensor:
    """How many images each norm of `norms_of` normalised in a forward with these gates [B,L+1,S,3]: float32 [norms]."""
    counts: dict[str, int] = {}
    for layer, now in enumerate(walk(model.space, gates.cpu().numpy(), model.config.zeros_arrive)):
        for scale in model.space.scales(layer):
            counts[f"nodes.{layer}-{scale}.gate"] = int(now.arrived[scale].sum())
            counts[f"nodes.{layer}-{scale}.cell"] = int(now.runs[scale].sum())
        for (scale, direction), sends in now.sends.items():
            if is_diagonal(layer, scale, direction):
                counts[f"stem.project.{scale + 1}"] = int(sends.sum())
            counts[f"nodes.{layer}-{scale}.transforms.{DIRECTIONS[direction]}"] = int(sends.sum())
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parts = name.split(".")
            length = 4 if "transforms" in parts else 3
            images = counts.get(".".join(parts[:length]), len(gates))  # else of stem or head, which all images run
            found.append(len(gates) if images and model.config.zeros_arrive else images)
    return torch.tensor(found, dtype=torch.float32)


def _for_each_value(of_norms: Tensor, sizes: Tensor) -> Tensor:
    """A number of each norm, for each value of its mean and of its variance."""
    return of_norms.repeat_interleave(2).repeat_interleave(sizes)


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Sets BatchNorm's statistics to their mean over the processes."""
    world = rank_and_world()[1]
    if world == 1:
        return
    statistics = [statistic for norm in norms_of(model) for statistic in running_statistics(norm)]
    means = total(torch.cat(statistics)) / world
    for statistic, mean in zip(statistics, means.split([len(statistic) for statistic in statistics]), strict=True):
        statistic.copy_(mean)
