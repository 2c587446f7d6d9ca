"""What a cell may compute (Eq. 1): each operation keeps the shape, says what it costs, and how it is exported.

Another operation is a subclass of `Operation`, with its name in registry.OPERATIONS (docs/extending.md).

Legend: B images, C channels, h, w the size of a feature map.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from routeseg import counting
from routeseg.counting import NOTHING, Macs
from routeseg.errors import NotExportable
from routeseg.model.graph import Graph
from routeseg.model.layers import separable_conv
from routeseg.model.places import Running


class Operation(nn.Module):
    """[B,C,h,w] -> [B,C,h,w]. Made with the number of channels.

    droppable  the scheduled drop path drops it
    """

    droppable: ClassVar[bool] = True

    def among(self, features: Tensor, running: Running) -> Tensor:
        """`forward` where only some pixels run (model/places.py). An operation of one layer that reads neighbours needs
        nothing else: what it reads is there. One of several gives the later ones `running.filled` maps."""
        return self(features)

    @classmethod
    def macs(cls, channels: int, stride: int) -> Macs:
        """MACs for any image size; `stride` is that of the map, in pixels of the image."""
        raise NotImplementedError

    def onnx(self, graph: Graph, name: str, features: str) -> str:
        """Adds the operation, its BatchNorm folded, to a graph of ONNX; `name` is the prefix of its tensors' names.

        Returns the output's name. Raises NotExportable if it has no export.
        """
        raise NotExportable(f"the cell operation {type(self).__name__} has no export: give it a method `onnx`")


class Identity(Operation):
    """The input itself."""

    droppable = False

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, features: Tensor) -> Tensor:
        return features

    @classmethod
    def macs(cls, channels: int, stride: int) -> Macs:
        return NOTHING

    def onnx(self, graph: Graph, name: str, features: str) -> str:
        return features


class SepConv(nn.Sequential, Operation):
    """The paper's SepConv: two separable convolutions, ReLU only between them."""

    kernel_size: ClassVar[int]

    def __init__(self, channels: int) -> None:
        super().__init__(
            separable_conv(channels, channels, self.kernel_size),
            separable_conv(channels, channels, self.kernel_size, relu=False),
        )

    def among(self, features: Tensor, running: Running) -> Tensor:
        first, second = self
        return second(running.filled(first(features), self.kernel_size // 2))

    @classmethod
    def macs(cls, channels: int, stride: int) -> Macs:
        first, second = (counting.separable(channels, channels, cls.kernel_size, stride, r) for r in (True, False))
        return first + second

    def onnx(self, graph: Graph, name: str, features: str) -> str:
        return graph.sequence(self, name, features)


class SepConv3x3(SepConv):
    kernel_size = 3


class SepConv5x5(SepConv):
    kernel_size = 5
