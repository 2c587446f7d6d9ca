"""What a part needs of an ONNX graph to export itself; `routeseg.export.graph.Graph` has it. Values are names."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn


class Graph(Protocol):
    """A graph that operators are added to, one by one."""

    def op(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds an operator of ONNX; the name of its one output. The input "" is one that is left out."""
        ...

    def constant(self, value: Any, dtype: Any = ...) -> str:
        """A small constant, float32 unless asked otherwise."""
        ...

    def integers(self, value: Any) -> str:
        """A small constant of int64."""
        ...

    def as_float(self, value: str) -> str:
        """0 and 1 of bools."""
        ...

    def conv(self, conv: nn.Conv2d, name: str, x: str, stride: int | None = None) -> str:
        """The convolution of this name in the network, with its bias if it has one; `stride` in place of its own."""
        ...

    def sequence(self, module: nn.Sequential, name: str, x: str) -> str:
        """Convolutions and ReLUs in a row, also nested; BatchNorm is folded. `name` is the prefix of their tensors."""
        ...

    def resize(self, x: str, factor: int) -> str:
        """Bilinear, corners not aligned."""
        ...

    def size(self, x: str) -> str:
        """Height and width of maps [B,C,h,w]: int64 [2]."""
        ...
