"""The skip engine: a closed path and a dropped cell are not computed, per image also inside a batch.

BatchNorm is folded into the convolutions (in float64, once). Same result as the dense forward, in eval mode, to float32
rounding; if a deep network amplifies rounding, it does so in both (in float64 they agree to 1e-12).

At the threshold: a path is open if its activation, as computed here, is above 0. An activation that the dense forward
rounds to the other side of 0 is below 1e-6 there; only a node whose every activation is that small can differ. In
bfloat16 the features that gates see are rounded to 8 bits, and so an activation can differ by some 0.01.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from routeseg.engine.compiled import CompiledForward, is_compiled
from routeseg.engine.eager import EagerForward
from routeseg.model.grid import RoutedNetwork, check_images
from routeseg.model.request import Activation, Request, Routes

Precision = Literal["float32", "bfloat16", "float16"]
Backend = Literal["auto", "kernels", "eager", "batched"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SkipEngine:
    """An inference forward of a network: `engine(images, route=..., activation=...)` as the network itself.

    The network's weights are copied: train on, and build a new engine afterwards.
    """

    forward: CompiledForward | EagerForward

    def __init__(self, model: RoutedNetwork, precision: Precision = "float32", backend: Backend = "auto") -> None:
        """The engine on the device where the model is.

        precision  of weights and feature maps; gates and logits are float32 in any case. bfloat16 is for CPUs with
                   AVX512_BF16 and for GPUs, float16 for GPUs; elsewhere the dtype of the network takes their place, and
                   a warning is logged, once
        backend    kernels: those built at installation, for CPUs, one image after the other. eager: PyTorch's
                   operations, one image after the other, which spares copies. batched: PyTorch's operations, the images
                   layer by layer together, choosing rows if routes differ. auto: kernels on CPUs if they can run the
                   network, else eager, with the reason logged once; batched on GPUs

        Raises ValueError for another precision or backend, and if kernels are demanded that cannot run the network.
        """
        self.model = model
        parameter = next(model.parameters())
        self.device = parameter.device
        dtype = _supported(precision, model)
        if backend not in ("auto", "kernels", "eager", "batched"):
            raise ValueError(f"backend {backend!r}: choose one of auto, kernels, eager, batched")
        if backend == "auto" and self.device.type != "cpu":
            backend = "batched"
        elif backend == "auto":
            reason = CompiledForward.supports(model, dtype)
            backend = "eager" if reason else "kernels"
            if reason and parameter.dtype == torch.float32:
                _say_once(f"running on PyTorch's operations, which is slower: {reason}")
        if backend == "kernels":
            self.forward = CompiledForward(model, dtype)
        else:
            self.forward = EagerForward(model, dtype, together=backend == "batched")
        self.precision = str(dtype).removeprefix("torch.")

    @torch.inference_mode()
    def __call__(self, images: Tensor, route: Routes = None, activation: Activation = "one") -> Any:
        """See `RoutedNetwork.forward`. Raises ValueError also for images on another device than the engine, and for
        images on a CPU with NaN or infinity."""
        check_images(images)
        if images.device != self.device:
            raise ValueError(f"the images are on {images.device}, the engine is on {self.device}: move them there")
        return self.forward(images, Request.of(self.model.config, len(images), route, activation))


def _supported(precision: str, model: RoutedNetwork) -> torch.dtype:
    """The dtype of this name, or that of the network's weights if its device lacks it; says so once."""
    if precision not in DTYPES:
        raise ValueError(f"precision {precision!r}: choose one of {', '.join(DTYPES)}")
    parameter = next(model.parameters())
    dtype, stored, device = DTYPES[precision], parameter.dtype, parameter.device
    if dtype == torch.float32:
        return stored
    if device.type == "cpu":
        reason, name = CompiledForward.supports(model, dtype), "CPU"
        supported = reason is None
        if not supported and is_compiled(dtype):
            name += f" for this network ({reason})"
    else:
        supported, name = dtype == torch.float16 or _has_bfloat16(device), "GPU"
    if not supported:
        _say_once(f"no fast {precision} on this {name}: running in {str(stored).removeprefix('torch.')}")
    return dtype if supported else stored


def _has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16, and does not emulate it (NVIDIA: from compute capability 8.0 on)."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def _say_once(message: str) -> None:
    logging.getLogger("routeseg").warning(message)
