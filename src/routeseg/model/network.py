"""The network: the grid of gated nodes (grid.py) and a decoder. `forward` is the dense one: the trainer's, the oracle.

Legend: B images, H, W image size, K classes, L depth, S scales, C base channels.
    gates [B, L+1, S, 3]   activation of every edge, direction 0 up, 1 keep, 2 down
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from routeseg.model.decoder import Decoder
from routeseg.model.grid import IMAGENET_MEAN, IMAGENET_STD, RoutingGrid, check_per_class, prepare
from routeseg.space import Route, edge_name

MODEL_CARD = """---
{{ card_data }}
---

A network of `routeseg`: semantic segmentation with a route per image ("Learning Dynamic Routing for Semantic
Segmentation", CVPR 2020). `routeseg.load(folder)` reads it; `config.json` has its classes and its normalisation.
"""

Routes = Route | Sequence[Route] | None
Activation = Literal["one", "own"]


@dataclass(frozen=True)
class Segmentation:
    """What a forward returns, always.

    logits  [B,K,H,W] at the size of the images given
    gates   [B,L+1,S,3] in [0,1] (those of gates are below 1): exactly 0 on illegal edges, closed paths and nodes
            that nothing reached. `routeseg.cost.macs` turns them into MACs, `Route.from_gates` into a route.
    """

    logits: Tensor
    gates: Tensor

    @property
    def labels(self) -> Tensor:
        """The most likely class of every pixel, int64 [B,H,W]."""
        return self.logits.argmax(dim=1)


torch.export.register_dataclass(Segmentation)  # so that `torch.export` takes a network as it is


class DynamicRoutingNetwork(
    RoutingGrid,
    library_name="routeseg",
    tags=["semantic-segmentation", "dynamic-routing"],
    license="apache-2.0",
    pipeline_tag="image-segmentation",
    model_card_template=MODEL_CARD,
):
    """Semantic segmentation with a route per image ("Learning Dynamic Routing for Semantic Segmentation", CVPR 2020).

    num_classes      K
    depth            L, the layers after the first node
    num_scales       S, 1/4 of the image's resolution and S-1 halvings
    base_channels    C at scale 0, doubling with each scale; even
    stem_channels    width of the stem's first two convolutions
    cell_operations  names in CELL_OPERATIONS, summed (Eq. 1)
    gate             "soft" (Eq. 4); "softmax", where one path leaves each node; or "fixed": no gates, all paths open
    small_gate       gates look at a quarter-size input (used with a budget)
    route            a static network: only the parts that this route uses exist. The name of a known network
                     (`routeseg.architectures`), or its edges (layer, scale, "up" | "keep" | "down"). Needs gate "fixed"
    zeros_arrive     closed paths send zeros that arrive, as in the authors' networks (see RoutingSpace): those need it
    class_names, palette  names and RGB colours of the classes, kept with the weights
    pixel_mean, pixel_std input normalisation of RGB in 0..1

    Raises ValueError, naming the argument, where they make no network.
    """

    def __init__(
        self,
        num_classes: int = 19,
        depth: int = 16,
        num_scales: int = 4,
        base_channels: int = 64,
        stem_channels: int = 64,
        cell_operations: Sequence[str] = ("sep_conv_3x3", "identity"),
        gate: Literal["soft", "softmax", "fixed"] = "soft",
        small_gate: bool = False,
        route: str | Sequence[tuple[int, int, str]] | None = None,
        zeros_arrive: bool = False,
        class_names: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
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
            zeros_arrive,
            class_names,
            pixel_mean,
            pixel_std,
        )
        check_per_class("palette", palette, num_classes)
        self.palette = tuple(tuple(colour) for colour in palette or default_palette(num_classes))
        self.decoder = Decoder(num_scales, base_channels, num_classes)
        self._initialize()
        nn.init.normal_(self.decoder.predictor.weight, std=0.01)

    def specialize(self, route: Route) -> DynamicRoutingNetwork:
        """A static network of this route: no gates, no unused parameters, the same interface, with copies of the
        weights. Trainable; its outputs are those of `self(images, route)`.

        Gates that were below 1 are now 1, so train it anew, or on, before you use it.
        Raises ValueError for a route of another space, with edges that this network lacks, or with dead ends.
        """
        check_route(self.route, route)
        config = self.arguments | {"gate": "fixed", "small_gate": False, "route": route.check().named_edges}
        with next(self.parameters()).device:
            static = DynamicRoutingNetwork(**config)
        own = self.state_dict()
        static.load_state_dict({key: own[key] for key in static.state_dict()})
        return static.to(next(self.parameters()).dtype).train(self.training)

    def forward(self, images: Tensor, route: Routes = None, activation: Activation = "one") -> Segmentation:
        """Segments images [B,3,H,W], RGB, uint8 or float in 0..1, any H, W from 32.

        route       None: the gates decide, per image. A Route: exactly its edges are open, for all images, as far as
                    something arrives at them (`Route.check` finds dead ends); or a sequence, one Route for each image.
        activation  of the open edges of a given route: "one", or "own", the network's own gates (an edge that they
                    close stays closed).

        The result for an image does not depend on the other images of the batch (in eval mode).
        Raises ValueError for images of another shape, and for a route of another space.
        """
        x, (height, width) = prepare(self, images)
        given = route_gates(self, route, len(images), images.device)
        features, gates = self._route(self.stem(x), given, own=given is None or activation == "own")
        logits = self.decoder(features)
        return Segmentation(logits[..., :height, :width], gates)


def route_gates(model: DynamicRoutingNetwork, route: Routes, batch: int, device: torch.device) -> Tensor | None:
    """A given route, or one for each image, as gates of 0 and 1 [B,L+1,S,3]; None stays None."""
    if route is None:
        return None
    routes = [route] * batch if isinstance(route, Route) else list(route)
    if len(routes) != batch:
        raise ValueError(f"{len(routes)} routes for {batch} images: give one route, or one for each image")
    for one in routes:
        check_route(model.route, one)
    return torch.from_numpy(np.stack([one.to_gates() for one in routes])).to(device)


def check_route(whole: Route, route: Route) -> None:
    """Raises ValueError where the route is of another space than the network, or has edges that it lacks; `whole` has
    those of the network."""
    if route.space != whole.space:
        raise ValueError(f"the route is drawn in {route.space}, the network has {whole.space}")
    lacking = sorted(route.edges - whole.edges)
    if lacking:
        raise ValueError(
            f"the network has no {edge_name(lacking[0])} (and lacks {len(lacking) - 1} more of the route): it is a "
            "static network, made for another route"
        )


def default_palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Colours far from each other: hues by the golden ratio, in three brightnesses."""
    colours = []
    for k in range(num_classes):
        hue = (k * 0.618034) % 1.0 * 6.0
        value = (230, 170, 110)[k % 3]
        ramp = [abs((hue + shift) % 6.0 - 3.0) - 1.0 for shift in (0.0, 4.0, 2.0)]
        colours.append(tuple(int(value * min(max(r, 0.0), 1.0) * 0.8 + value * 0.2) for r in ramp))
    return cast(list[tuple[int, int, int]], colours)
