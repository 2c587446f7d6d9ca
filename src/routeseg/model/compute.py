"""How a network computes its parts and adds up what they send: here with PyTorch's operations, on any device.

Another way is a subclass of `Compute`, set as `model.compute`; it is asked in training alone (training/fused.py).

Legend: B images, C channels, h, w the size of a feature map; alpha [B] the activations of an edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routeseg.config import NetworkConfig
from routeseg.labels import IGNORE
from routeseg.model.cell import RoutingNode
from routeseg.model.head import Head
from routeseg.model.layers import upsample
from routeseg.model.places import Running
from routeseg.space import STEM_STRIDE


class Compute:
    """The parts of a network, one after another.

    Features are what arrives at a node and what its cell makes of it, arrivals what is sent to a node. What they are is
    a matter of the subclass alone; here both are maps [B,C,h,w].
    """

    def usable(self, config: NetworkConfig, images: Tensor) -> bool:
        """Whether it can compute this network for these images; if not, PyTorch's operations do."""
        return True

    def stem(self, stem: nn.Module, images: Tensor) -> Any:
        """Normalised images [B,3,H,W] -> the features of the first node."""
        return stem(images)

    def activations(self, node: RoutingNode, features: Any) -> Tensor:
        """`RoutingNode.activations`: [B,3]."""
        return node.activations(features)

    def cell(self, node: RoutingNode, features: Any, drop_path: float, running: Running | None = None) -> Any:
        """Eq. 1: the features that the node's cell makes, where pixels run; None: everywhere."""
        return node.cell(features, drop_path, running)

    def send(
        self, node: RoutingNode, direction: int, hidden: Any, alpha: Tensor | None, running: Running | None = None
    ) -> Any:
        """Eq. 5: what leaves a node in a direction, each image times its activation; None: 1 for all."""
        out = node.transform(direction, hidden, running)
        return out if alpha is None else each(alpha).to(out.dtype) * out

    def skip(self, features: Any, images: Tensor | None) -> Any:
        """What a node without its cell hands on: its input, of the images [B] that drop the cell; None: of all."""
        return features if images is None else torch.where(each(images), features, 0.0)

    def gather(self, arrivals: Sequence[Any]) -> Any:
        """The features of a node: the sum of what arrives."""
        total = arrivals[0]
        for one in arrivals[1:]:
            total = total + one
        return total

    def map(self, features: Any) -> Tensor:
        """Features as a map [B,C,h,w], without a gradient."""
        return features

    def kept(self, new: Any, before: Any, running: Running) -> Any:
        """`Running.kept`, of features; None where nothing arrived."""
        return running.kept(new, before)

    def take(self, features: Any, rows: Tensor) -> Any:
        """The features of some of the images."""
        return take(features, rows)

    def spread(self, arrival: Any, rows: Tensor, images: int) -> Any:
        """What is sent by some images, as one of so many images whose `rows` they are; of the others nothing comes."""
        return spread(arrival, rows, images)

    def head(self, head: Head, features: Sequence[Any], coarse: bool = False, running: Running | None = None) -> Any:
        """The output of the head, from the features of every scale.

        coarse  as it is before it is enlarged (`Head.coarse`), where pixels run
        """
        return head.coarse(features, running) if coarse else head(features)

    def cross_entropy_sum(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The sum of the cross-entropies of logits [B,K,H,W] and labels [B,H,W], over the pixels that have a label;
        each times its weight [B,H,W], if there are weights. Coarse logits [B,K,h,w] are enlarged first."""
        logits = enlarged(logits, labels.shape[-2:])
        if weights is None:
            return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        return (weights * F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")).sum()


PLAIN = Compute()


def enlarged(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits [B,K,H,W] of images of this size, from coarse ones [B,K,h,w], or from themselves."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return upsample(logits, STEM_STRIDE)[..., : size[0], : size[1]]


def fill_missing(maps: Sequence[Any], stem: Tensor) -> list[Any]:
    """What leaves the grid, by scale: zeros [B,C*2**s,h/2**s,w/2**s] for a scale that no image reached. The stem's
    output is [B,C,h,w]."""
    batch, channels, h, w = stem.shape
    return [
        stem.new_zeros(batch, channels * 2**s, h // 2**s, w // 2**s) if x is None else x for s, x in enumerate(maps)
    ]


def rows_among(images: np.ndarray, among: np.ndarray) -> Tensor:
    """Where images stand among others; both are places in the batch, in order."""
    return torch.from_numpy(np.searchsorted(among, images))


def choose(compute: Compute, features: Any, images: np.ndarray, chosen: np.ndarray) -> Any:
    """The features of some of their images."""
    return features if len(chosen) == len(images) else compute.take(features, rows_among(chosen, images))


def take(map: Tensor, rows: Tensor) -> Tensor:
    """Rows of a map [B,C,h,w], which stays in channels_last."""
    return map.permute(0, 2, 3, 1).index_select(0, rows.to(map.device)).permute(0, 3, 1, 2)


def spread(map: Tensor, rows: Tensor, images: int) -> Tensor:
    """A map [b,C,h,w] as those rows of a map [images,C,h,w] of zeros, in channels_last."""
    pixels = map.permute(0, 2, 3, 1)
    zeros = pixels.new_zeros(images, *pixels.shape[1:])
    return zeros.index_copy(0, rows.to(map.device), pixels).permute(0, 3, 1, 2)


def each(values: Tensor) -> Tensor:
    """A value for each image [B] as [B,1,1,1]."""
    return values[:, None, None, None]
