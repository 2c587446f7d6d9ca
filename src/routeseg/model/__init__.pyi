from .decoder import Segmentation as Segmentation
from .network import DynamicRoutingNetwork as DynamicRoutingNetwork
