"""What the tests of prediction share: a network worth looking at, a run of it, and the label maps that it wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from routeseg import DynamicRoutingNetwork
from routeseg.prediction.files import PredictionSummary, predict_files
from routeseg.prediction.torch_runner import TorchNetwork


def sharpen(network: DynamicRoutingNetwork) -> DynamicRoutingNetwork:
    """Classes then win in different places, so that a label map is no single colour."""
    with torch.no_grad():
        network.decoder.predictor.weight.mul_(30)
    return network


def run(network, paths, output, **options) -> PredictionSummary:
    return predict_files(TorchNetwork(network, network), paths, output, **options)


def labels_of(output: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(output / f"{name}_labels.png"))
