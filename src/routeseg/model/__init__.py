"""The network and its parts."""

from routeseg.model.network import DynamicRoutingNetwork, Segmentation

__all__ = ["DynamicRoutingNetwork", "Segmentation"]
