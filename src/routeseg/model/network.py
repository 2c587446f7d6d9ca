"""The segmenter: the grid of gated nodes (grid.py) with the decoder for a head. Its dense forward is the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

from routeseg.config import NO_GATE
from routeseg.model.decoder import Decoder, Segmentation
from routeseg.model.grid import RoutedNetwork
from routeseg.model.request import Activation, Routes, Shares, check_route, exit_of
from routeseg.registry import PREDICT
from routeseg.space import Route

if TYPE_CHECKING:  # what `predict` takes and gives, which is a room above
    from routeseg.engine.skip import Precision
    from routeseg.prediction.image import Budget, Latency, SegmentedImage, Several, Single

MODEL_CARD = """---
{{ card_data }}
---

A network of `routeseg`: semantic segmentation with a route per image ("Learning Dynamic Routing for Semantic
Segmentation", CVPR 2020). `routeseg.load(folder)` reads it; `config.json` has its classes and its normalisation.
"""

__all__ = ["DynamicRoutingNetwork", "Segmentation"]


class DynamicRoutingNetwork(
    RoutedNetwork,
    library_name="routeseg",
    tags=["semantic-segmentation", "dynamic-routing"],
    license="apache-2.0",
    pipeline_tag="image-segmentation",
    model_card_template=MODEL_CARD,
):
    """Semantic segmentation with a route per image ("Learning Dynamic Routing for Semantic Segmentation", CVPR 2020).

    `DynamicRoutingNetwork(config)`, or the fields of a `NetworkConfig` by name; `network(images)` gives a
    `Segmentation`.
    """

    head_class = Decoder

    @overload
    def __call__(
        self, images: Tensor, route: Routes = None, activation: Activation = "one", budget: Shares = None
    ) -> Segmentation: ...
    @overload
    def __call__(
        self,
        images: Single,
        budget: Budget = None,
        latency: Latency = None,
        precision: Precision = "float32",
        per_image: bool = False,
    ) -> SegmentedImage: ...
    @overload
    def __call__(
        self,
        images: Several,
        budget: Budget = None,
        latency: Latency = None,
        precision: Precision = "float32",
        per_image: bool = False,
    ) -> list[SegmentedImage]: ...
    def __call__(self, images: Any, *args: Any, **options: Any) -> Any:
        """`forward` for a tensor of images [B,3,H,W]; `predict` for everything else that is an image, or several."""
        if isinstance(images, Tensor):
            return super().__call__(images, *args, **options)
        return self.predict(images, *args, **options)

    @overload
    def predict(
        self,
        images: Single | Tensor,
        budget: Budget = None,
        latency: Latency = None,
        precision: Precision = "float32",
        per_image: bool = False,
    ) -> SegmentedImage: ...
    @overload
    def predict(
        self,
        images: Several,
        budget: Budget = None,
        latency: Latency = None,
        precision: Precision = "float32",
        per_image: bool = False,
    ) -> list[SegmentedImage]: ...
    def predict(
        self, images: Any, budget: Any = None, latency: Any = None, precision: Any = "float32", per_image: bool = False
    ) -> Any:
        """Segments an image, or each of several, on the fastest engine: paths, URLs, PIL images, arrays [H,W,3],
        tensors [3,H,W]. One gives a `SegmentedImage`, several a list; `routeseg.prediction.image.predict` says more.

        An array or tensor of several images also gives a list; for type checkers write `predict(list(images))`.
        """
        return PREDICT["images"](self, images, budget, latency, precision, per_image)

    def specialize(self, route: Route) -> DynamicRoutingNetwork:
        """A static network of this route: no gates, no unused parameters, the same interface, with copies of the
        weights. Trainable; its outputs are those of `self(images, route)`.

        Gates that were below 1 are now 1, so train it anew, or on, before you use it; a network with exits needs none
        of that. Raises ValueError for a route of another space, with edges that this network lacks, or with dead ends.
        """
        check_route(self.route, route)
        edges = route.check().named_edges
        weights = self.state_dict()
        if self.exits is not None and (exit := exit_of(self.config, route)) < len(self.exits.decoders):
            own = self.exits.decoders[exit].state_dict()
            weights |= {f"{self.head_class.key}.{key}": value for key, value in own.items()}
        config = replace(
            self.config, gate=NO_GATE, small_gate=False, route=edges, exits=None, choice=None, place=None, sizes=None
        )
        with next(self.parameters()).device:
            static = DynamicRoutingNetwork(config)
        static.load_state_dict({key: weights[key] for key in static.state_dict()})
        return static.to(next(self.parameters()).dtype).train(self.training)
