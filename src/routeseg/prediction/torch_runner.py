"""The `Runner` (files.py) of a checkpoint. onnx_runner.py has the one of an exported file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from routeseg.budgets.budgeted import Budgeted, Steered
from routeseg.description import describe
from routeseg.engine import SkipEngine
from routeseg.labels import label_map
from routeseg.model import DynamicRoutingNetwork, Segmentation
from routeseg.prediction.files import Ran

if TYPE_CHECKING:
    from routeseg.budgets.asked import Asked
    from routeseg.description import NetworkDescription
    from routeseg.evaluation import Forward


class TorchNetwork:
    """Segments one image after another.

    forward    what computes the segmentation: the model itself, or an engine that is built from it, which is asked for
               labels alone
    model      tells classes, colours and cost
    precision  of the engine, or of the model's weights
    budget     that is asked for, in words; None: there is none
    network    the model's description; None makes one, which reads all weights
    """

    def __init__(
        self, forward: Forward, model: DynamicRoutingNetwork, network: NetworkDescription | None = None
    ) -> None:
        self.forward, self.model, self.network = forward, model, network or describe(model)
        weight = next(model.parameters())
        self.device = weight.device
        self.precision = getattr(forward, "precision", str(weight.dtype).removeprefix("torch."))
        self.budget = str(forward.asked) if isinstance(forward, Budgeted) else None

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Ran:
        own = image if image.flags.writeable else image.copy()  # PyTorch has no tensors that are not
        pixels = torch.from_numpy(own).permute(2, 0, 1)[None].to(self.device)  # [1,3,H,W]
        was_training = self.forward is self.model and self.model.training  # engines do not care
        if was_training:
            self.model.eval()
        try:
            result = getattr(self.forward, "labels", self.forward)(pixels)
        finally:
            if was_training:
                self.model.train()
        if isinstance(result, Segmentation):
            result = result.labelled()
        labels = label_map(result.labels[0].cpu().numpy(), self.model.config.num_classes)
        exits = None if result.exits is None else result.exits[0].cpu().numpy()
        return Ran(labels, result.gates[0].float().cpu().numpy(), exits, seen=result.seen, first=result.first)


def open_network(
    model: DynamicRoutingNetwork,
    precision: Any = "float32",
    device: torch.device | str = "cpu",
    threads: int | None = None,
    budget: Asked | None = None,
    steered: bool = False,
) -> TorchNetwork:
    """The runner of a network in this precision, on this device.

    threads  of PyTorch, in this process; None: as they are
    budget   what images may cost in the mean, for a network with exits; None: what helps
    steered  images of a network with exits cost what `forward.level` says (`Steered`)

    Raises ValueError for a precision that there is not, and if a network without exits is steered.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    model = model.to(device).eval()
    forward = SkipEngine(model, precision)
    if steered:
        return TorchNetwork(Steered(forward, model), model)
    return TorchNetwork(forward if budget is None else Budgeted(forward, model, budget), model)
