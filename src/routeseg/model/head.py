"""What stands behind the grid: a head reads out the features of all scales.

The decoder (decoder.py) segments, the classifier's head (classifier.py) classifies; another one is a subclass of `Head`
with a name in registry.HEADS (docs/extending.md).

Legend: B images, H, W (padded) image size, C base channels, L depth, S scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from routeseg.config import NetworkConfig
from routeseg.counting import Macs
from routeseg.errors import NotExportable
from routeseg.model.graph import Graph
from routeseg.model.places import Running

GLANCE = 4  # by which a glance shrinks both sides of the features


class Head(nn.Module):
    """Features of every scale, scale s [B, C*2**s, H/(4*2**s), W/(4*2**s)] -> the network's output.

    key       the name of its tensors in a checkpoint
    segments  the network's result is a `Segmentation`
    task      what the network does, as the Hub calls it: image-segmentation; None: it has no name there
    """

    key: ClassVar[str] = "head"
    segments: ClassVar[bool] = False
    task: ClassVar[str | None] = None

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError

    def coarse(self, features: Sequence[Tensor], running: Running | None = None) -> Tensor:
        """The output before it is enlarged to the size of the images, if the head enlarges it: of a decoder at
        1 / STEM_STRIDE of the padded size. `running` tells which pixels run (model/places.py); None: all."""
        return self(features)

    def glance(self, features: Sequence[Tensor | None], even: bool = False) -> Tensor:
        """Rough logits [B,K,h,w] for who decides at an exit, of features by scale that are shrunk by the factor GLANCE:
        `coarse` on small maps.

        features  as `forward` reads them; None, or missing at the end, where nothing arrives
        even      no map is shrunk beyond 1 / (GLANCE * STEM_STRIDE) of the image's size, the one that the logits have:
                  for places, of which the coarsest map has few pixels
        """
        raise NotImplementedError(f"the head {type(self).__name__} has no glance, so no network with exits can have it")

    @classmethod
    def glance_macs(cls, config: NetworkConfig) -> Macs:
        """MACs of an `even` glance, for any image size."""
        raise NotImplementedError

    def result(self, output: Tensor, gates: Tensor, size: tuple[int, int]) -> Any:
        """What the network returns: the head's output, gates [B,L+1,S,3]; `size` is the images' before padding."""
        raise NotImplementedError

    @classmethod
    def macs(cls, config: NetworkConfig) -> Macs:
        """MACs for any image size."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draws the weights that need other values than those of most convolutions; called once all parts are there."""

    def class_bias(self) -> Tensor | None:
        """What is added to the logit of each class [K], if the head segments and has such a parameter."""
        return None

    def onnx(self, graph: Graph, maps: Sequence[str | None]) -> str:
        """Adds the head to a graph of ONNX: a map of each scale, None for zeros -> the output's name.

        Raises NotExportable if the head has no export.
        """
        raise NotExportable(f"the head {type(self).__name__} has no export: give it a method `onnx`")

    def onnx_glance(self, graph: Graph, maps: Sequence[str | None], even: bool = False) -> str:
        """Adds `glance` to a graph of ONNX. Raises NotExportable if the head has no export of it."""
        raise NotExportable(
            f"the head {type(self).__name__} has no export of its glance: give it a method `onnx_glance`"
        )
