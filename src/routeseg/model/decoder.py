"""The fixed decoder: from the coarsest scale to the finest, then to classes at the input size.

Legend: B images, C base channels, K classes, H, W the (padded) image size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from routeseg.model.layers import conv_norm, upsample
from routeseg.space import STEM_STRIDE


class Decoder(nn.Module):
    """Features of every scale, scale s [B, C*2**s, H/(4*2**s), W/(4*2**s)] or None -> logits [B,K,H,W]."""

    def __init__(self, num_scales: int, base_channels: int, num_classes: int) -> None:
        super().__init__()
        channels = [base_channels * 2**s for s in range(num_scales)]
        self.merge = nn.ModuleList(conv_norm(channels[s], channels[max(s - 1, 0)]) for s in range(num_scales))
        self.predictor = nn.Conv2d(base_channels, num_classes, 3, padding=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        running: Tensor | None = None
        for scale in reversed(range(len(self.merge))):
            x = features[scale] if running is None else features[scale] + running
            running = self.merge[scale](x)
            if scale > 0:
                running = upsample(running)
        return upsample(self.predictor(running), STEM_STRIDE)
