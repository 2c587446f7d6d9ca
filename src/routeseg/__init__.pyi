# The public names, and where each comes from: read when the package is imported (lazy_loader), and by type checkers.
from .architectures import ARCHITECTURES as ARCHITECTURES
from .architectures import common_route as common_route
from .config import NetworkConfig as NetworkConfig
from .cost.budget import Budget as Budget
from .cost.latency import LatencyTable as LatencyTable
from .cost.macs import model_cost as model_cost
from .engine import SkipEngine as SkipEngine
from .engine import build_engine as build_engine
from .model import DynamicRoutingNetwork as DynamicRoutingNetwork
from .model import Segmentation as Segmentation
from .model.authors import import_checkpoint as import_checkpoint
from .model.checkpoints import load as load
from .prediction.image import SegmentedImage as SegmentedImage
from .prediction.onnx_runner import OnnxNetwork as OnnxNetwork
from .space import Route as Route
from .space import RoutingSpace as RoutingSpace
from .version import __version__ as __version__
