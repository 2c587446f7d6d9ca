"""The skip engine: a closed path and a dropped cell are not computed, per image also inside a batch.

BatchNorm is folded into the convolutions (in float64, once). Same logits and gates as the dense forward, in eval mode,
to float32 rounding; where a deep network amplifies rounding, it does so in both (in float64 they agree to 1e-12).

At the threshold: a path is open where its activation, as computed here, is above 0. An activation that the dense
forward rounds to the other side of 0 is below 1e-6 there; only a node whose every activation is that small can differ.
In bfloat16 the features that gates see are rounded to 8 bits, and so an activation can differ by some 0.01.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from routeseg.engine.compiled import CompiledForward, is_compiled
from routeseg.engine.eager import EagerForward
from routeseg.model import DynamicRoutingNetwork, Segmentation
from routeseg.model.grid import check_images
from routeseg.model.network import Activation, Routes, route_gates

Precision = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SkipEngine:
    """An inference forward of a network: `engine(images, route=..., activation=...)` as the network itself.

    The network's weights are copied: train on, and build a new engine afterwards.
    """

    forward: CompiledForward | EagerForward

    def __init__(
        self,
        model: DynamicRoutingNetwork,
        precision: Precision = "float32",
        together: bool | None = None,
        compiled: bool | None = None,
    ) -> None:
        """The engine on the device where the model is.

        precision  of weights and feature maps; gates and logits are float32 in any case. bfloat16 is for CPUs with
                   AVX512_BF16 and for GPUs, float16 for GPUs; elsewhere the network's own takes their place, and a
                   warning is logged, once
        together   run the images of a batch layer by layer together, choosing rows where routes differ (None: on
                   GPUs); otherwise one after the other, which spares the copies and is faster on CPUs
        compiled   run on the kernels built at installation, which take float32 networks on CPUs, one image after the
                   other (None: where they can); otherwise on PyTorch's operations

        Raises ValueError for another precision, and where kernels are demanded that are not there.
        """
        self.model = model
        parameter = next(model.parameters())
        self.device = parameter.device
        dtype = _supported(precision, parameter)
        if compiled is None:
            compiled = parameter.device.type == "cpu" and parameter.dtype == torch.float32 and is_compiled(dtype)
            compiled = compiled and not together
        if compiled:
            if together or parameter.device.type != "cpu":
                raise ValueError("compiled kernels run on CPUs, one image after the other: leave compiled out")
            if parameter.dtype != torch.float32:
                raise ValueError(f"compiled kernels take float32 networks, not {parameter.dtype}: leave compiled out")
            self.forward = CompiledForward(model, dtype)
        else:
            self.forward = EagerForward(model, dtype, parameter.device.type != "cpu" if together is None else together)
        self.precision = str(dtype).removeprefix("torch.")

    @torch.inference_mode()
    def __call__(self, images: Tensor, route: Routes = None, activation: Activation = "one") -> Segmentation:
        """See `DynamicRoutingNetwork.forward`. Raises ValueError also for images on another device than the engine,
        and for images on a CPU with NaN or infinity."""
        check_images(images)
        if images.device != self.device:
            raise ValueError(f"the images are on {images.device}, the engine is on {self.device}: move them there")
        given = route_gates(self.model, route, len(images), torch.device("cpu"))
        own = given is None or activation == "own"
        return Segmentation(*self.forward(images, None if given is None else given.numpy(), own))


def _supported(precision: str, parameter: Tensor) -> torch.dtype:
    """The dtype of this name, or the network's own one where its device lacks it; says so once."""
    if precision not in DTYPES:
        raise ValueError(f"precision {precision!r}: choose one of {', '.join(DTYPES)}")
    dtype, own, device = DTYPES[precision], parameter.dtype, parameter.device.type
    if dtype == torch.float32:
        return own
    if device == "cpu":
        supported = dtype == torch.bfloat16 and own == torch.float32 and is_compiled(dtype)
    else:
        supported = dtype == torch.float16 or _has_bfloat16(parameter.device)
    if not supported:
        name = "CPU" if device == "cpu" else "GPU"
        _say_once(f"no fast {precision} on this {name}: running in {str(own).removeprefix('torch.')}")
    return dtype if supported else own


def _has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16, and does not emulate it (NVIDIA: from compute capability 8.0 on)."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def _say_once(message: str) -> None:
    logging.getLogger("routeseg").warning(message)
