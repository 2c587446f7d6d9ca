"""The classifier that the segmenter is pre-trained as (on ImageNet): the same stem and grid, a decoder turned around.

Legend: B images, H, W image size, K classes, L depth, S scales, C base channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from routeseg.model.grid import IMAGENET_MEAN, IMAGENET_STD, RoutingGrid, prepare
from routeseg.model.layers import Subsample, conv_norm

MODEL_CARD = """---
{{ card_data }}
---

An image classifier of `routeseg`, made to start a segmenter from: `routeseg train --init FOLDER`. Its stem and nodes
have the names of those of a segmenter ("Learning Dynamic Routing for Semantic Segmentation", CVPR 2020).
"""


@dataclass(frozen=True)
class Classification:
    """What a forward of the classifier returns.

    logits  [B,K]
    gates   [B,L+1,S,3], as in `Segmentation`
    """

    logits: Tensor
    gates: Tensor


class ClassifierHead(nn.Module):
    """The decoder turned around: from the finest scale to the coarsest, then the mean over the map and to classes.

    Features of every scale, scale s [B, C*2**s, H/(4*2**s), W/(4*2**s)] -> logits [B,K].
    """

    def __init__(self, num_scales: int, base_channels: int, num_classes: int) -> None:
        super().__init__()
        channels = [base_channels * 2**s for s in range(num_scales)]
        coarsest = num_scales - 1
        self.merge = nn.ModuleList(
            nn.Sequential(
                Subsample() if s < coarsest else nn.Identity(), *conv_norm(channels[s], channels[min(s + 1, coarsest)])
            )
            for s in range(num_scales)
        )
        self.predictor = nn.Linear(channels[coarsest], num_classes)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        running: Tensor | None = None
        for x, merge in zip(features, self.merge, strict=True):
            running = merge(x if running is None else x + running)
        assert running is not None
        return self.predictor(running.mean(dim=(2, 3)))


class DynamicRoutingClassifier(
    RoutingGrid,
    library_name="routeseg",
    tags=["image-classification", "dynamic-routing"],
    license="apache-2.0",
    pipeline_tag="image-classification",
    model_card_template=MODEL_CARD,
):
    """Image classification with a route per image: the pre-training of the paper (Sec. 4), down to stride 32.

    The arguments are those of `DynamicRoutingNetwork`, but for what only a segmenter needs.
    Raises ValueError, naming the argument, where they make no network.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        depth: int = 16,
        num_scales: int = 4,
        base_channels: int = 64,
        stem_channels: int = 64,
        cell_operations: Sequence[str] = ("sep_conv_3x3", "identity"),
        gate: Literal["soft", "softmax", "fixed"] = "soft",
        small_gate: bool = False,
        route: str | Sequence[tuple[int, int, str]] | None = None,
        class_names: Sequence[str] | None = None,
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(
            num_classes,
            depth,
            num_scales,
            base_channels,
            stem_channels,
            cell_operations,
            gate,
            small_gate,
            route,
            False,
            class_names,
            pixel_mean,
            pixel_std,
        )
        self.head = ClassifierHead(num_scales, base_channels, num_classes)
        self._initialize()

    def forward(self, images: Tensor) -> Classification:
        """Classifies images [B,3,H,W], RGB, uint8 or float in 0..1, any H, W from 32.

        Sizes that the space's stride does not divide are padded with zeros, which count in the mean.
        """
        x, _ = prepare(self, images)
        features, gates = self._route(self.stem(x), None, own=True)
        return Classification(self.head(features), gates)
