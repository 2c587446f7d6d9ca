"""A network of torch, as files.py runs it; onnx_runner.py has its brother for exported files."""

from __future__ import annotations

import numpy as np
import torch

from routeseg.description import describe
from routeseg.errors import DIVERGED
from routeseg.evaluation import Forward
from routeseg.model import DynamicRoutingNetwork


class TorchNetwork:
    """A `Runner` (files.py) of a network.

    forward  what computes the segmentation, in eval mode: the model itself or an engine built from it
    model    gives classes, colours and cost
    """

    def __init__(self, forward: Forward, model: DynamicRoutingNetwork) -> None:
        self.forward, self.model, self.network = forward, model, describe(model)
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].to(self.device)  # [1,3,H,W]
        was_training = self.model.training
        if was_training:
            self.model.eval()
        try:
            result = self.forward(pixels)
        finally:
            if was_training:
                self.model.train()
        if not result.logits.isfinite().all() or not result.gates.isfinite().all():
            raise ValueError(DIVERGED)
        return result.labels[0].cpu().numpy().astype(np.uint8), result.gates[0].float().cpu().numpy()
