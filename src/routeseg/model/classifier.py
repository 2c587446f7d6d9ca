"""The head of a classifier, which pre-trains a segmenter (on ImageNet; Sec. 4 of the paper): a decoder turned around.

Legend: B images, H, W image size, K classes, L depth, S scales, C base channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from routeseg import counting
from routeseg.config import NetworkConfig
from routeseg.counting import ONCE, Macs, each
from routeseg.model.head import Head
from routeseg.model.layers import Subsample, conv_norm
from routeseg.space import STEM_STRIDE


@dataclass(frozen=True)
class Classification:
    """What a forward of the classifier returns.

    logits  [B,K]
    gates   [B,L+1,S,3], as in `Segmentation`
    """

    logits: Tensor
    gates: Tensor


class ClassifierHead(Head):
    """The decoder turned around: from the finest scale to the coarsest, then the mean over the map and to classes.

    Features of every scale, scale s [B, C*2**s, H/(4*2**s), W/(4*2**s)] -> logits [B,K]. Zeros that pad an image to the
    space's stride count in the mean.
    """

    task = "image-classification"

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        coarsest = config.num_scales - 1
        self.merge = nn.ModuleList(
            nn.Sequential(
                Subsample() if s < coarsest else nn.Identity(),
                *conv_norm(config.channels(s), config.channels(min(s + 1, coarsest))),
            )
            for s in range(config.num_scales)
        )
        self.predictor = nn.Linear(config.channels(coarsest), config.num_classes)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        running: Tensor | None = None
        for x, merge in zip(features, self.merge, strict=True):
            running = merge(x if running is None else x + running)
        assert running is not None
        return self.predictor(running.mean(dim=(2, 3)))

    def result(self, output: Tensor, gates: Tensor, size: tuple[int, int]) -> Classification:
        return Classification(output, gates)

    @classmethod
    def macs(cls, config: NetworkConfig) -> Macs:
        """A 1x1 convolution at each scale, the mean over the coarsest map, a linear layer."""
        total, channels, coarsest = Macs(), config.base_channels, config.num_scales - 1
        stride = STEM_STRIDE * 2**coarsest
        for scale in range(config.num_scales):
            coarser = min(scale + 1, coarsest)
            out, stride = config.channels(coarser), STEM_STRIDE * 2**coarser
            total += counting.conv_norm_macs(channels, out, stride)
            channels = out
        return total + each("pool", channels, stride) + each("conv", channels * config.num_classes, 1, ONCE)
