"""kernels/forward.cpp, as Python calls it: weights folded and packed once, then one call for each image.

The library is built when the package is installed, once for each instruction set, if there is a C++ compiler; without
one the engine runs on PyTorch's operations (eager.py).

Legend: C channels, padded with zeros to whole vectors; L depth, S scales.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Sequence
from ctypes import POINTER, Structure, addressof, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from routeseg.engine.folding import fold_batch_norm
from routeseg.errors import NOT_FINITE
from routeseg.model import DynamicRoutingNetwork
from routeseg.model.cell import RoutingNode
from routeseg.model.layers import Subsample
from routeseg.space import DIRECTIONS, padded_size

BUILDS = ("generic", "avx2", "avx512", "avx512bf16")  # in the order of `routeseg_level`; see setup.py
STEPS = ("gather", "gate", "cell", "up", "down")  # of a node, whose times can be taken
FLOAT32: Any = {"dtype": torch.float32, "device": "cpu"}  # of memory that the kernels see, whatever PyTorch defaults to


class _Conv(Structure):
    """`Conv` of kernels/convolution.h."""

    _fields_ = [
        *((name, c_int32) for name in ("depthwise", "kernel", "stride", "padding", "wide", "inputs", "outputs")),
        *((name, c_void_p) for name in ("weights", "bias", "taps")),
    ]


class _Image(Structure):
    """`Image` of kernels/maps.h."""

    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("channel_step", "row_step", "column_step")),
        *((name, c_int32) for name in ("height", "width", "bytes")),
        *((name, c_float * 3) for name in ("mean", "std")),
    ]


class _Node(Structure):
    """`Node` of kernels/forward.cpp."""

    _fields_ = [
        *((name, c_int32) for name in ("operations", "identity")),
        ("directions", c_int32 * len(DIRECTIONS)),
        *((name, c_int32) for name in ("gated", "small_gate", "features")),
        ("cell", POINTER(_Conv)),
        ("transforms", _Conv * len(DIRECTIONS)),
        ("squeeze", _Conv),
        *((name, c_void_p) for name in ("weight", "bias")),
    ]


class _Network(Structure):
    """`Network` of kernels/forward.cpp."""

    _fields_ = [
        *((name, c_int32) for name in ("depth", "scales", "zeros_arrive", "softmax", "classes")),
        ("stem", POINTER(_Conv)),
        ("nodes", POINTER(_Node)),
        ("merges", POINTER(_Conv)),
        ("predictor", _Conv),
    ]


class _Request(Structure):
    """`Request` of kernels/forward.cpp."""

    _fields_ = [
        ("image", _Image),
        *((name, c_int32) for name in ("padded_height", "padded_width")),
        ("given", c_void_p),
        ("own", c_int32),
        *((name, c_void_p) for name in ("gates", "logits", "seconds")),
        ("threads", c_int32),
    ]


class CompiledForward:
    """A network's forward on a CPU, for one image after another, with as many threads as PyTorch uses.

    Raises ValueError where no library was built for this dtype (float32, bfloat16): ask `is_compiled` before.
    """

    def __init__(self, model: DynamicRoutingNetwork, dtype: torch.dtype) -> None:
        library = find_library(dtype)
        if library is None:
            raise ValueError(
                "compiled kernels are not at hand: they need a C++ compiler when routeseg is installed, and for "
                "bfloat16 a CPU with AVX512_BF16. Leave compiled out to run on PyTorch's operations"
            )
        self.space, self.classes = model.space, model.num_classes
        self.mean = tuple(model.normalize.mean.flatten().tolist())
        self.std = tuple(model.normalize.std.flatten().tolist())
        self._forward = getattr(library, f"routeseg_forward_{_name(dtype)}")
        self._packed = _Packed(fold_batch_norm(model), dtype, library.routeseg_vector(), library.routeseg_panel())
        self._workspace = library.routeseg_open()
        close = weakref.finalize(self, library.routeseg_close, self._workspace)
        close.atexit = False  # a thread may still be inside a forward then

    def __call__(
        self, images: Tensor, given: np.ndarray | None, own: bool, seconds: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images [B,3,H,W], and gates of given routes [B,L+1,S,3], to logits [B,K,H,W] and gates [B,L+1,S,3].

        own      the open paths of a given route have the network's own activations
        seconds  float64, zeros: the time of each step of each node is added, [L+1,S,5], then of stem and decoder [2]

        Raises ValueError for images with values that are not finite, and MemoryError.
        """
        batch, _, height, width = images.shape
        pixels = images if images.dtype in (torch.uint8, torch.float32) else images.float()
        logits = torch.empty((batch, self.classes, height, width), **FLOAT32)
        gates = torch.empty((batch, self.space.depth + 1, self.space.num_scales, len(DIRECTIONS)), **FLOAT32)
        for number, image in enumerate(pixels):
            request = _Request(
                _Image(
                    image.data_ptr(), *image.stride(), height, width, image.dtype == torch.uint8, self.mean, self.std
                ),
                *padded_size(self.space, height, width),
                None if given is None else given[number].ctypes.data,
                own,
                gates[number].data_ptr(),
                logits[number].data_ptr(),
                None if seconds is None else seconds.ctypes.data,
                torch.get_num_threads(),
            )
            status = self._forward(addressof(self._packed.network), addressof(request), self._workspace)
            if status == 1:
                raise ValueError(NOT_FINITE)
            if status == 2:
                raise MemoryError(f"not enough memory for a forward of {height}x{width} pixels")
        return logits, gates


def is_compiled(dtype: torch.dtype) -> bool:
    """Whether this machine has the library for this dtype."""
    return find_library(dtype) is not None


@cache
def find_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The best build that this machine runs; None where nothing was built, or not for this dtype."""
    generic = _load(BUILDS[0])
    if generic is None:
        return None
    runnable = (_load(build) for build in BUILDS[generic.routeseg_level() :: -1])
    return next((library for library in runnable if hasattr(library, f"routeseg_forward_{_name(dtype)}")), None)


@cache
def _load(build: str) -> ctypes.CDLL | None:
    """A build's library; None where there is none, or, with a warning, where it cannot be used."""
    paths = [Path(__file__).with_name(f"_forward_{build}{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
        sizes = [ctypes.sizeof(structure) for structure in (_Conv, _Image, _Node, _Network, _Request)]
        if not library.routeseg_fits(*sizes):
            raise OSError(f"{path} was built from other sources")
        library.routeseg_open.restype = c_void_p
        library.routeseg_close.argtypes = [c_void_p]
    except (OSError, AttributeError) as error:  # AttributeError: a library that lacks a function
        logging.getLogger("routeseg").warning("running without compiled kernels, install routeseg again: %s", error)
        return None
    for name in ("float32", "bfloat16"):
        if hasattr(library, f"routeseg_forward_{name}"):
            function = getattr(library, f"routeseg_forward_{name}")
            function.argtypes, function.restype = [c_void_p] * 3, c_int
    return library


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Packed:
    """A network as `_Network`, and all that its pointers point to."""

    def __init__(self, folded: DynamicRoutingNetwork, dtype: torch.dtype, vector: int, panel: int) -> None:
        self.dtype, self.vector, self.panel = dtype, vector, panel
        self.kept: list[Tensor | ctypes.Array] = []
        space = folded.space
        nodes = (_Node * ((space.depth + 1) * space.num_scales))()
        for layer, scale in folded.route.nodes:
            nodes[layer * space.num_scales + scale] = self._node(folded.node(layer, scale))
        self.kept.append(nodes)
        gates = {node.gate.activation for node in folded.nodes.values() if node.gate is not None}  # type: ignore
        self.network = _Network(
            space.depth, space.num_scales, space.zeros_arrive, "softmax" in gates, folded.num_classes,
            self._convs([self._conv(_layers(part), image=not i) for i, part in enumerate(folded.stem)]),
            nodes,
            self._convs([self._conv(_layers(merge)) for merge in folded.decoder.merge]),
            self._conv([folded.decoder.predictor], wide=True),
        )  # fmt: skip

    def _node(self, node: RoutingNode) -> _Node:
        operations = [_layers(operation) for name, operation in node.cell.items() if name != "identity"]
        packed = _Node(len(operations), "identity" in node.cell)
        packed.cell = self._convs([self._conv(_layers(half)) for halves in operations for half in halves])
        for direction in node.directions:
            packed.directions[direction] = 1
            layers = _layers(node.transforms[DIRECTIONS[direction]])
            if any(isinstance(layer, nn.Conv2d) for layer in layers):
                packed.transforms[direction] = self._conv(layers)
        if node.gate is not None:
            score = node.gate.score
            weight = torch.zeros((len(DIRECTIONS), score.in_features), **FLOAT32)
            bias = torch.zeros(len(DIRECTIONS), **FLOAT32)
            weight[list(node.directions)], bias[list(node.directions)] = score.weight, score.bias
            packed.gated, packed.small_gate, packed.features = 1, node.gate.small, score.in_features
            packed.squeeze = self._conv(_layers(node.gate.squeeze))
            packed.weight, packed.bias = self._keep(weight), self._keep(bias)
        return packed

    def _conv(self, layers: Sequence[nn.Module], image: bool = False, wide: bool = False) -> _Conv:
        """Layers with one convolution, or a depthwise one and a 1x1 behind it; Subsample before it is a stride.

        image  it is what the convolution reads: three channels, and no zeros behind them
        """
        convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        first, last = convs[0], convs[-1]
        stride = 2 if any(isinstance(layer, Subsample) for layer in layers) else first.stride[0]
        inputs = last.in_channels if image else self._padded(last.in_channels)
        outputs = self._padded(last.out_channels)
        assert last.bias is not None
        bias = torch.zeros(outputs, **FLOAT32)
        bias[: last.out_channels] = last.bias
        taps = torch.zeros(0, **FLOAT32)
        if len(convs) == 2:  # depthwise weights [C,1,k,k] as [k*k][C]
            taps = torch.zeros((first.kernel_size[0] ** 2, inputs), **FLOAT32)
            taps[:, : first.in_channels] = first.weight.flatten(1).T
        return _Conv(
            len(convs) == 2, first.kernel_size[0], stride, int(first.padding[0]), wide, inputs, outputs,
            self._keep(self._pack(last.weight, inputs, outputs)), self._keep(bias), self._keep(taps),
        )  # fmt: skip

    def _pack(self, weight: Tensor, inputs: int, outputs: int) -> Tensor:
        """Weights [N,C,k,k] as the matrix product reads them: panels [k*k*C][n], of bfloat16 [k*k*C/2][n][2]."""
        n, c, k, _ = weight.shape
        depth = k * k * inputs
        matrix = torch.zeros((depth + depth % 2, outputs), **FLOAT32)
        matrix[:depth].view(k, k, inputs, outputs)[:, :, :c, :n] = weight.permute(2, 3, 1, 0)
        panels = matrix.to(self.dtype).split(self.panel, dim=1)
        if self.dtype == torch.bfloat16:
            panels = tuple(panel.reshape(len(panel) // 2, 2, -1).transpose(1, 2) for panel in panels)
        return torch.cat([panel.flatten() for panel in panels])

    def _padded(self, channels: int) -> int:
        return -(-channels // self.vector) * self.vector

    def _keep(self, tensor: Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _convs(self, convs: Sequence[_Conv]) -> ctypes.Array[_Conv]:
        array = (_Conv * len(convs))(*convs)
        self.kept.append(array)
        return array


def _layers(sequence: nn.Module) -> list[nn.Module]:
    return list(cast(nn.Sequential, sequence))
