"""Networks of a command: on which device, and with which budget."""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse import Namespace

from routeseg.budgets.budgeted import Budgeted
from routeseg.cli.options import read_budget
from routeseg.config import NetworkConfig
from routeseg.model import DynamicRoutingNetwork


def find_device(name: str) -> torch.device:
    """The device of this name, such as cpu, cuda or cuda:1. Raises ValueError if there is none."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        why = "there is no such kind of device" if reason.startswith("Expected one of") else reason
        raise ValueError(f"--device {name} cannot be used here ({why}): take cpu, or cuda with a GPU") from error
    return device


def with_budget(engine: Any, model: DynamicRoutingNetwork, args: Namespace) -> Any:
    """An engine that keeps the budget that is asked for, if one is. Raises ValueError if the network takes none."""
    asked = read_budget(args)
    return engine if asked is None else Budgeted(engine, model, asked)


def draw_network(config: NetworkConfig, seed: int) -> DynamicRoutingNetwork:
    """A network that segments, whose weights are drawn from a seed. Raises ValueError if its head segments nothing."""
    torch.manual_seed(seed)
    model = DynamicRoutingNetwork(config)
    if not model.head.segments:
        raise ValueError(f"--model.head is {config.head}, which segments nothing: leave it out")
    return model
