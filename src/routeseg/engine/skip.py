"""The skip engine: a closed path and a dropped cell are not computed, per image also inside a batch.

BatchNorm is folded into the convolutions (in float64, once). Same result as the dense forward, in eval mode, to float32
rounding; if a deep network amplifies rounding, it does so in both (in float64 they agree to 1e-12).

At the threshold: a path is open if its activation, as computed here, is above 0. An activation that the dense forward
rounds to the other side of 0 is below 1e-6 there; only a node whose every activation is that small can differ. In
bfloat16 the features that gates see are rounded to 8 bits, and so an activation can differ by some 0.01.
"""

from __future__ import annotations

import logging
from functools import cache, partial
from typing import Any, Generic, Literal, TypeVar, Unpack, cast, overload

import torch
from torch import Tensor

from routeseg import bfloat16, stopwatch
from routeseg.engine.compiled import CompiledForward
from routeseg.engine.folding import FoldedForward
from routeseg.model.decoder import Labelled, Segmentation
from routeseg.model.grid import RoutedNetwork, check_images
from routeseg.model.network import DynamicRoutingNetwork
from routeseg.model.request import Options, Request, Routes

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Result = TypeVar("Result")
Backend = Literal["auto", "kernels", "eager"]
PROBE_SIZE, PROBE_ROUNDS = (128, 256), 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SkipEngine(Generic[Result]):
    """An inference forward of a network: `engine(images, route=..., activation=...)` as the network itself.

    The network's weights are copied: train on, and build a new engine afterwards.

    precision         of weights and feature maps: float32, bfloat16, float16
    precision_reason  why it is this one, if that was left to the machine ("auto"); else None
    """

    forward: CompiledForward | FoldedForward

    @overload
    def __init__(
        self: SkipEngine[Segmentation],
        model: DynamicRoutingNetwork,
        precision: Precision = "float32",
        backend: Backend = "auto",
    ) -> None: ...
    @overload
    def __init__(
        self: SkipEngine[Any], model: RoutedNetwork, precision: Precision = "float32", backend: Backend = "auto"
    ) -> None: ...
    def __init__(self, model: RoutedNetwork, precision: Precision = "float32", backend: Backend = "auto") -> None:
        """The engine on the device where the model is.

        precision  of weights and feature maps; gates and logits are float32 in any case. bfloat16 is for GPUs, and for
                   CPUs whose kernels or whose PyTorch compute in it (AVX512_BF16, AMX), float16 for GPUs. Elsewhere
                   they would be emulated, many times as slow and no more exact: the dtype of the network takes their
                   place, and a warning is logged, once. auto: on GPUs bfloat16, on CPUs float32 or, if the kernels
                   are faster in it on this machine (measured once in a process), bfloat16
        backend    kernels: those built at installation, for CPUs, one image after the other. eager: PyTorch's
                   operations, the images layer by layer together. auto: kernels on CPUs if they can run the network,
                   else eager, with the reason logged once; eager on GPUs

        Raises ValueError for another precision or backend, and if kernels are demanded that cannot run the network.
        """
        self.model = model
        parameter = next(model.parameters())
        self.device = parameter.device
        if backend not in ("auto", "kernels", "eager"):
            raise ValueError(f"backend {backend!r}: choose one of auto, kernels, eager")
        self.precision_reason: str | None = None
        if precision == "auto":
            precision, self.precision_reason = _faster(model, backend)
        dtype = _supported(precision, model)
        self.precision = _name(dtype)
        if self.precision_reason is not None:
            _say_once(f"precision: {self.precision} ({self.precision_reason})", logging.INFO)
        if backend == "auto" and self.device.type != "cpu":
            backend = "eager"
        elif backend == "auto":
            reason = CompiledForward.supports(model, dtype)
            backend = "eager" if reason else "kernels"
            if reason and parameter.dtype == torch.float32:
                _say_once(f"running on PyTorch's operations, which is slower: {reason}")
        self.forward = (CompiledForward if backend == "kernels" else FoldedForward)(model, dtype)

    @torch.inference_mode()
    def __call__(self, images: Tensor, route: Routes = None, **options: Unpack[Options]) -> Result:
        """See `RoutedNetwork.forward`. Raises ValueError also for images on another device than the engine, and for
        images on a CPU with NaN or infinity."""
        return cast(Result, self.forward(images, self._request(images, route, options)))

    @torch.inference_mode()
    def labels(self, images: Tensor, route: Routes = None, **options: Unpack[Options]) -> Labelled:
        """The most likely classes, for those who need nothing of the logits: they are never written. Raises as
        `__call__`, and ValueError if the weights give scores that are not finite."""
        request = self._request(images, route, options)
        if not self.model.head.segments:
            raise ValueError(f"the head {self.model.config.head} segments nothing")
        return self.forward.labels(images, request)

    def _request(self, images: Tensor, route: Routes, options: Options) -> Request:
        check_images(images)
        if images.device != self.device:
            raise ValueError(f"the images are on {images.device}, the engine is on {self.device}: move them there")
        return self.model.request(len(images), route, **options)


def _supported(precision: str, model: RoutedNetwork) -> torch.dtype:
    """The dtype of this name, or that of the network's weights if its device lacks it; says so once."""
    if precision not in DTYPES:
        raise ValueError(f"precision {precision!r}: choose one of auto, {', '.join(DTYPES)}")
    parameter = next(model.parameters())
    dtype, stored, device = DTYPES[precision], parameter.dtype, parameter.device
    if dtype == torch.float32:
        return stored
    if device.type != "cpu":
        supported, where = dtype == torch.float16 or bfloat16.on_gpu(device), "on this GPU"
    elif dtype == torch.bfloat16:
        supported = CompiledForward.supports(model, dtype) is None or bfloat16.product_ratio() < 1
        where = "here" if supported else f"here ({bfloat16.product_words()})"
    else:
        supported, where = False, "on this CPU"
    if not supported:
        _say_once(f"no fast {precision} {where}: running in {_name(stored)}")
    return dtype if supported else stored


def _faster(model: RoutedNetwork, backend: Backend) -> tuple[Precision, str]:
    """The precision in which this machine runs the network faster, and why."""
    parameter = next(model.parameters())
    if parameter.dtype != torch.float32:
        return "float32", "that of the network"
    if parameter.device.type != "cpu":
        fast = bfloat16.on_gpu(parameter.device)
        return ("bfloat16", "this GPU computes in it") if fast else ("float32", "this GPU does not compute in bfloat16")
    if backend == "eager" or CompiledForward.supports(model, torch.bfloat16) is not None:
        return "float32", "without kernels for bfloat16"
    float32_ms, bfloat16_ms = kernels_ms()
    if bfloat16.pays(float32_ms, bfloat16_ms):
        return "bfloat16", f"a small network takes {bfloat16_ms:.3g} ms, in float32 {float32_ms:.3g} ms"
    return "float32", f"a small network takes {float32_ms:.3g} ms, in bfloat16 {bfloat16_ms:.3g} ms"


@cache
def kernels_ms() -> tuple[float, float]:
    """Milliseconds of the kernels in float32 and in bfloat16, for one image through a small network, all paths open.

    Where there are no kernels for bfloat16, `SkipEngine` raises ValueError.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = DynamicRoutingNetwork(depth=3, base_channels=32, stem_channels=32).eval()
        image = torch.rand(1, 3, *PROBE_SIZE)
    engines = [SkipEngine(model, precision, "kernels") for precision in ("float32", "bfloat16")]
    times = stopwatch.take_turns([partial(engine, image, model.route) for engine in engines], PROBE_ROUNDS)
    float32_s, bfloat16_s = (min(some) for some in times)
    return 1000 * float32_s, 1000 * bfloat16_s


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _say_once(message: str, level: int = logging.WARNING) -> None:
    logging.getLogger("routeseg").log(level, message)
