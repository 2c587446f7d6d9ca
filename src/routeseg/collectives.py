"""The processes of a job exchange sums, flags and objects. One process alone gets back what it gives."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are; (0, 1) outside of a job."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def total(values: Tensor) -> Tensor:
    """The sum over all processes; the same numbers in each."""
    if rank_and_world()[1] > 1:
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def anywhere(flags: Tensor) -> Tensor:
    """The flags that are set in at least one process; the same in each."""
    if rank_and_world()[1] == 1:
        return flags
    counts = flags.to(torch.uint8)
    torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
    return counts.bool()


def gather(share: T) -> list[T]:
    """What every process gives, in the order of the processes; the same list in each."""
    _, world = rank_and_world()
    if world == 1:
        return [share]
    shares: list[Any] = [None] * world
    torch.distributed.all_gather_object(shares, share)
    return shares
