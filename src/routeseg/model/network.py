"""The network: the grid of gated nodes (grid.py) with the head that its configuration names. Its dense forward is the
oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self, cast

from huggingface_hub import ModelCard

from routeseg.config import NO_GATE
from routeseg.errors import NO_PLACES
from routeseg.model.decoder import Segmentation
from routeseg.model.exits import Priced
from routeseg.model.grid import RoutedNetwork
from routeseg.model.request import check_route, exit_of
from routeseg.space import Route

MODEL_CARD = """---
{{ card_data }}
---

A network of `routeseg` with a route per image ("Learning Dynamic Routing for Semantic Segmentation", CVPR 2020) and the
head `{{ head }}`. `routeseg.load(folder)` reads it; `config.json` has its classes and its normalisation. A segmenter of
other classes starts from it: `routeseg train --init folder`.
"""

__all__ = ["DynamicRoutingNetwork", "Segmentation"]


class DynamicRoutingNetwork(
    RoutedNetwork,
    library_name="routeseg",
    tags=["dynamic-routing"],
    license="apache-2.0",
    model_card_template=MODEL_CARD,
):
    """Stem, grid and head, with a route per image ("Learning Dynamic Routing for Semantic Segmentation", CVPR 2020).

    `DynamicRoutingNetwork(config)`, or the fields of a `NetworkConfig` by name. `network(images)` gives what its head
    makes of a tensor [B,3,H,W]: a `Segmentation`, unless the configuration names another `head`. `routeseg.load` gives
    a `Segmenter`, which takes files and arrays, too.
    """

    def generate_model_card(self, *args: Any, **values: Any) -> ModelCard:
        """The model card of a saved network, for the Hub."""
        card = super().generate_model_card(*args, head=self.config.head, **values)
        card.data["pipeline_tag"] = self.head_class.task
        return card

    def specialize(self, route: Route) -> Self:
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
            static = type(self)(config)
        static.load_state_dict({key: weights[key] for key in static.state_dict()})
        return static.to(next(self.parameters()).dtype).train(self.training)

    def as_wholes(self) -> Self:
        """Of a network whose places leave by themselves, one whose images leave as wholes, with copies of the weights.

        Raises ValueError if its places do not.
        """
        if self.exits is None or self.exits.place is None:
            raise ValueError(f"there is nothing to change: {NO_PLACES}")
        weights = self.state_dict()
        with next(self.parameters()).device:
            found = type(self)(replace(self.config, place=None, sizes=self.config.sizes and self.exits.singles))
        found.load_state_dict({key: weights[key] for key in found.state_dict()})
        assert found.exits is not None
        for size, table in zip(self.exits.singles, self.exits.wholes, strict=True):
            found.exits.at(size).table = cast(Priced, table).table
        return found.to(next(self.parameters()).dtype).train(self.training)
