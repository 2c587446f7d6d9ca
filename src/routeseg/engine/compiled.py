"""kernels/forward.cpp, as Python calls it: weights folded and packed once, then one call for each image.

The library is built when the package is installed, once for each instruction set, if there is a C++ compiler; without
one the engine runs on PyTorch's operations (folding.py).

Legend: C channels, padded with zeros to whole vectors; L depth, S scales.
"""

from __future__ import annotations

import copy
import ctypes
import logging
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from ctypes import POINTER, Structure, addressof, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from routeseg.engine.folding import fold_batch_norm
from routeseg.errors import DIVERGED, NOT_FINITE
from routeseg.model import Segmentation
from routeseg.model.backbone import Backbone, EfficientNetLite, FrozenNormConv, InvertedResidual
from routeseg.model.cell import Cell, RoutingNode
from routeseg.model.choice import Choice, EntropyChoice, LossChoice, LossGate
from routeseg.model.decoder import Decoder, Labelled
from routeseg.model.exits import Exits, Priced
from routeseg.model.gate import Gate, SoftGate
from routeseg.model.grid import RoutedNetwork
from routeseg.model.layers import BatchNorm, InputNorm, Stem, Subsample, Transform, Upsample
from routeseg.model.operations import Identity, Operation, SepConv3x3, SepConv5x5
from routeseg.model.request import Request
from routeseg.space import DIRECTIONS, first_size, padded_size, place_sides, seen_size

BUILDS = ("generic", "avx2", "avx512", "avx512bf16", "amx")  # in the order of `routeseg_level`; see setup.py
FOLDER = "ROUTESEG_KERNELS"  # environment variable: a folder whose builds are used in place of the installed ones
# `Status` of kernels/forward.cpp; any other value comes with a text.
DONE, NOT_FINITE_STATUS, NO_MEMORY, DIVERGED_STATUS = range(4)
MOST_LABELS = 256  # that a label of the kernels tells apart
# The only layers that the kernels compute, by their exact type: a subclass may do something else.
LAYERS = (
    *(InputNorm, Stem, RoutingNode, Cell, SepConv3x3, SepConv5x5, Identity, SoftGate),
    *(Transform, Upsample, Subsample, Decoder, Exits, Priced, LossChoice, LossGate, EntropyChoice),
    *(InvertedResidual, FrozenNormConv, nn.BatchNorm2d, nn.ReLU6, nn.ZeroPad2d),
    *(nn.Conv2d, BatchNorm, nn.SyncBatchNorm, nn.ReLU, nn.Identity, nn.Linear),
    *(nn.Sequential, nn.ModuleDict, nn.ModuleList),
)
FLOAT32: Any = {"dtype": torch.float32, "device": "cpu"}  # of memory that the kernels see


class _Conv(Structure):
    """`Conv` of kernels/convolution.h."""

    _fields_ = [
        *((n, c_int32) for n in "depthwise kernel stride padding ending wide inputs outputs".split()),
        *((n, c_void_p) for n in "weights bias taps middle".split()),
        ("high", c_float),
    ]


class _Image(Structure):
    """`Image` of kernels/maps.h."""

    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("channel_step", "row_step", "column_step")),
        *((name, c_int32) for name in ("height", "width", "is_uint8")),
        *((name, c_float * 3) for name in ("mean", "std")),
    ]


class _Map(Structure):
    """`Map` of kernels/convolution.h. The forward makes its own; benchmarks/kernels.py needs some, and sums of them."""

    _fields_ = [("data", c_void_p), *((name, c_int32) for name in ("h", "w", "c", "first", "rows"))]


class _Summand(Structure):
    """`Summand` of kernels/maps.h."""

    _fields_ = [("map", _Map), ("weight", c_float), ("halved", c_int32)]


class _Node(Structure):
    """`Node` of kernels/forward.cpp."""

    _fields_ = [
        *((name, c_int32) for name in ("operations", "identity")),
        ("directions", c_int32 * len(DIRECTIONS)),
        *((name, c_int32) for name in ("gated", "small_gate", "features")),
        ("cell", POINTER(_Conv)),
        ("transforms", _Conv * len(DIRECTIONS)),
        ("squeeze", _Conv),
        *((name, c_void_p) for name in ("weight", "bias")),
    ]


class _Exit(Structure):
    """`Exit` of kernels/forward.cpp."""

    _fields_ = [
        *((name, c_int32) for name in ("layer", "features", "later")),
        ("merges", POINTER(_Conv)),
        ("predictor", _Conv),
        ("glance", _Conv),
        *((name, c_void_p) for name in ("center", "weight", "bias")),
    ]


class _Block(Structure):
    """`Block` of kernels/forward.cpp."""

    _fields_ = [("expands", c_int32), ("residual", c_int32), ("expand", _Conv), ("depthwise", _Conv)]


class _Stage(Structure):
    """`Stage` of kernels/forward.cpp."""

    _fields_ = [("blocks", c_int32), ("block", POINTER(_Block)), ("project", _Conv)]


class _Network(Structure):
    """`Network` of kernels/forward.cpp."""

    _fields_ = [
        *((name, c_int32) for name in "depth scales zeros_arrive classes exits stages place".split()),
        ("stem", POINTER(_Conv)),
        ("nodes", POINTER(_Node)),
        ("exit", POINTER(_Exit)),
        ("stage", POINTER(_Stage)),
        ("class_weights", c_void_p),
    ]


class _Request(Structure):
    """`Request` of kernels/forward.cpp."""

    _fields_ = [
        ("image", _Image),
        *((name, c_int32) for name in ("seen_height", "seen_width", "padded_height", "padded_width")),
        *((f"first_{name}", c_int32) for name in ("height", "width", "padded_height", "padded_width")),
        ("given", c_void_p),
        ("own", c_int32),
        *((name, c_void_p) for name in ("prices", "left", "most")),
        ("price", c_float),
        ("told", c_int32),
        *((name, c_void_p) for name in ("gates", "logits", "labels")),
        ("threads", c_int32),
    ]


class _Field(Structure):
    """`Field` of kernels/forward.cpp."""

    _fields_ = [("name", c_char_p), ("offset", c_int32), ("size", c_int32)]


STRUCTURES = (_Conv, _Image, _Map, _Summand, _Node, _Exit, _Block, _Stage, _Network, _Request)


class CompiledForward:
    """A network's forward on a CPU, for one image after another, with as many threads as PyTorch uses.

    Raises ValueError with the reason if it cannot run on the kernels in this dtype (float32, bfloat16): ask `supports`.
    """

    @staticmethod
    def supports(model: RoutedNetwork, dtype: torch.dtype) -> str | None:
        """Why this network cannot run on the kernels in this dtype; None if it can."""
        parameter = next(model.parameters())
        if parameter.device.type != "cpu":
            return f"the kernels run on CPUs, the network is on {parameter.device}"
        if parameter.dtype != torch.float32:
            return f"the kernels take float32 networks, not {_name(parameter.dtype)}"
        library = find_library(dtype)
        if library is None:
            return (
                "there are no kernels for this machine: they need a C++ compiler when routeseg is installed, and for "
                "bfloat16 a CPU with AVX512_BF16"
            )
        if type(model.head) is not Decoder:
            return f"there is no kernel for the head {type(model.head).__name__}"
        return next(_unknown_parts(model, library), None)

    def __init__(self, model: RoutedNetwork, dtype: torch.dtype) -> None:
        reason = self.supports(model, dtype)
        if reason is not None:
            raise ValueError(f"the kernels cannot run this network: {reason}. Choose another backend")
        self._library = library = cast(ctypes.CDLL, find_library(dtype))
        self.config, self.space = model.config, model.space
        self._forward = getattr(library, f"routeseg_forward_{_name(dtype)}")
        self._packed = _Packed(fold_batch_norm(model), dtype, library.routeseg_vector(), library.routeseg_panel())
        exits = model.exits
        self._costs = None  # of images that decide as wholes
        if exits is not None and exits.calibrated and exits.place is None:
            by_loss = isinstance(exits.gates, LossChoice)
            self._costs = exits.costs.float().numpy().copy() if by_loss else np.ones(len(exits.layers), np.float32)
        self._workspace = library.routeseg_open()
        if self._workspace is None:
            raise MemoryError("not enough memory for an engine")
        close = weakref.finalize(self, library.routeseg_close, self._workspace)
        close.atexit = False  # at exit a thread may still be inside a forward

    def __call__(self, images: Tensor, request: Request) -> Segmentation:
        """Segments images [B,3,H,W].

        Raises ValueError for images with values that are not finite, MemoryError, and RuntimeError with its text for
        any other failure of the kernels.
        """
        batch, _, height, width = images.shape
        logits = torch.empty((batch, self.config.num_classes, height, width), **FLOAT32)
        gates, exits, seen, first = self._run(images, request, logits=logits)
        return Segmentation(logits, gates, exits=exits, seen=seen, first=first)

    def labels(self, images: Tensor, request: Request) -> Labelled:
        """The most likely classes; up to 256 without writing their logits. Raises as `__call__`, and ValueError if
        scores are not finite."""
        if self.config.num_classes > MOST_LABELS:
            return self(images, request).labelled()
        batch, _, height, width = images.shape
        labels = torch.empty((batch, height, width), dtype=torch.uint8)
        return Labelled(labels, *self._run(images, request, labels=labels))

    def _run(
        self, images: Tensor, request: Request, logits: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, tuple[int, int] | None, tuple[int, int] | None]:
        """The gates, the exits of places, the size at which the images were looked at, and that of a first look; writes
        what is given."""
        batch, _, height, width = images.shape
        own = height, width
        seen, first = seen_size(own, request.size), first_size(own, request.size)
        before = (0,) * 4 if first is None else (*first, *padded_size(self.space, *first))
        pixels = images if images.dtype in (torch.uint8, torch.float32) else images.float()
        gates = torch.empty((batch, self.space.depth + 1, self.space.num_scales, len(DIRECTIONS)), **FLOAT32)
        mask, mean, std = request.mask.astype(np.float32), self.config.pixel_mean, self.config.pixel_std
        prices, places = self._prices(request, batch), self._places(request, batch, *seen)
        for number, image in enumerate(pixels):
            asked = _Request(
                _Image(image.data_ptr(), *image.stride(), height, width, image.dtype == torch.uint8, mean, std),
                *seen,
                *padded_size(self.space, *seen),
                *before,
                mask[number % len(mask)].ctypes.data,
                request.gated,
                None if prices is None else prices[number].ctypes.data,
                *(None, None, 0.0, False) if places is None else places.of(number),
                gates[number].data_ptr(),
                None if logits is None else logits[number].data_ptr(),
                None if labels is None else labels[number].data_ptr(),
                torch.get_num_threads(),
            )
            status = self._forward(addressof(self._packed.network), addressof(asked), self._workspace)
            raise_failure(self._library, status, f"a forward of {height}x{width} pixels")
        decided = places is not None and (first is not None or bool((places.price > 0).any()))
        exits = places.left if places is not None and decided else None
        return gates, exits, None if seen == own else seen, first

    def _places(self, request: Request, images: int, height: int, width: int) -> _Places | None:
        """What places go by; None if they do not leave by themselves."""
        place = self.config.place
        if place is None or self.config.exits is None or request.exits is not None:
            return None
        price = np.broadcast_to(np.zeros(1) if request.price is None else request.price, images)
        sides = place_sides(padded_size(self.space, height, width), place)
        told = request.told_to(images, sides)
        left = torch.full((images, *sides), len(self.config.exits) - 1) if told is None else torch.from_numpy(told)
        most = None
        if request.quota is not None:
            quota = np.broadcast_to(request.quota, (images, request.quota.shape[1]))
            most = (quota * math.prod(sides)).round().astype(np.int32)
        return _Places(price.astype(np.float32), left, most, told is not None)

    def _prices(self, request: Request, images: int) -> np.ndarray | None:
        """Price times cost of each exit for each image, or the price where entropy decides, float32 [B,K]; None if the
        images do not decide."""
        if self._costs is None or request.exits is not None:
            return None
        price = np.zeros(1) if request.price is None else request.price
        return np.broadcast_to(price, images).astype(np.float32)[:, None] * self._costs


@dataclass(frozen=True)
class _Places:
    """What the places of the images of a batch go by: price [B] or, if there is one, the number of places that go on
    behind each exit, `most` [B,K-1]; and the exits at which they leave [B,hb,wb], which are `told` or found out."""

    price: np.ndarray
    left: Tensor
    most: np.ndarray | None
    told: bool

    def of(self, image: int) -> tuple[int, int | None, float, bool]:
        """The fields of `_Request`."""
        most = None if self.most is None else self.most[image].ctypes.data
        return self.left[image].data_ptr(), most, float(self.price[image]), self.told


def raise_failure(library: ctypes.CDLL, status: int, what: str) -> None:
    """Raises the error that a status of the kernels means, if they have failed; `what` names what they were to do."""
    if status == NOT_FINITE_STATUS:
        raise ValueError(NOT_FINITE)
    if status == DIVERGED_STATUS:
        raise ValueError(DIVERGED)
    if status == NO_MEMORY:
        raise MemoryError(f"not enough memory for {what}")
    if status != DONE:
        raise RuntimeError(f"the compiled kernels failed in {what}: {library.routeseg_failure().decode()}")


def _unknown_parts(model: RoutedNetwork, library: ctypes.CDLL) -> Iterator[str]:
    """The parts of a network that the kernels do not know, or cannot hold."""
    most = library.routeseg_most_channels()
    for name, layer in model.named_modules():
        kind = type(layer).__name__
        if layer is not model and type(layer) not in LAYERS and not _is_lite(layer):
            kinds = {Gate: "gate", Operation: "cell operation", Choice: "choice"}
            what = next((word for base, word in kinds.items() if isinstance(layer, base)), "layer")
            yield f"there is no kernel for the {what} {kind} ({name})"
        if isinstance(layer, nn.Conv2d) and most < max(layer.weight.shape[:2]):
            yield f"the kernels hold {most} channels, {name} has {max(layer.weight.shape[:2])}"
    if (scales := model.space.num_scales) > (most := library.routeseg_most_scales()):
        yield f"the kernels hold {most} scales, the network has {scales}"


def _is_lite(layer: nn.Module) -> bool:
    """Whether it is a member of the family of EfficientNet-Lite that is its tables alone."""
    kind = type(layer)
    return EfficientNetLite in kind.__bases__ and not vars(kind).keys() & {"forward", "run", "stage"}


def is_compiled(dtype: torch.dtype) -> bool:
    """Whether this machine has the library for this dtype."""
    return find_library(dtype) is not None


@cache
def find_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The best build that this machine runs; None if nothing was built, or not for this dtype."""
    generic = _load(BUILDS[0])
    if generic is None:
        return None
    runnable = (_load(build) for build in BUILDS[generic.routeseg_level() :: -1])
    return next((library for library in runnable if hasattr(library, f"routeseg_forward_{_name(dtype)}")), None)


@cache
def _load(build: str) -> ctypes.CDLL | None:
    """A build's library; None if there is none. If it cannot be used, None with a warning."""
    named = os.environ.get(FOLDER)
    folder = Path(named) if named else Path(__file__).parent
    paths = [folder / f"_forward_{build}{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        if named and build == BUILDS[0]:
            raise ValueError(f"{FOLDER} is {named}, but that has no kernels: build them there, or unset it")
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.routeseg_layout.restype = POINTER(_Field)
        if (field := first_difference(library.routeseg_layout(), STRUCTURES)) is not None:
            raise OSError(f"{path} was built from other sources: they have another {field}")
        library.routeseg_open.restype = c_void_p
        library.routeseg_close.argtypes = [c_void_p]
        library.routeseg_failure.restype = c_char_p
        library.routeseg_same.argtypes = [c_void_p, c_void_p, c_void_p, c_int, c_int]
    except (OSError, AttributeError) as error:  # AttributeError: a library that lacks a function
        logging.getLogger("routeseg").warning("running without compiled kernels, install routeseg again: %s", error)
        return None
    for name in ("float32", "bfloat16"):
        if hasattr(library, f"routeseg_forward_{name}"):
            function = getattr(library, f"routeseg_forward_{name}")
            function.argtypes, function.restype = [c_void_p] * 3, c_int
    return library


def first_difference(fields: Any, structures: Sequence[type[Structure]]) -> str | None:
    """The first structure or field that lies elsewhere in the library, which tells its `fields`, than here; None if all
    are the same."""
    theirs: dict[str, tuple[int, int]] = {}
    for field in fields:
        if field.name is None:
            break
        theirs[field.name.decode()] = (field.offset, field.size)
    ours: dict[str, tuple[int, int]] = {}
    for structure in structures:
        name = structure.__name__.removeprefix("_")
        ours[name] = (0, ctypes.sizeof(structure))
        places = [(field[0], getattr(structure, field[0])) for field in structure._fields_]
        ours |= {f"{name}.{field}": (place.offset, place.size) for field, place in places}
    return next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Weights:
    """Layers as `_Conv`, and the memory that these point to."""

    def __init__(self, dtype: torch.dtype, vector: int, panel: int) -> None:
        self.dtype, self.vector, self.panel = dtype, vector, panel
        self.kept: list[Tensor | ctypes.Array] = []

    def conv(self, layers: Sequence[nn.Module], image: bool = False, wide: bool = False) -> _Conv:
        """Layers with one convolution, or a depthwise one and a 1x1 behind it; Subsample before it is a stride. The
        depthwise one's bias and a ReLU6 are the kernels' `middle` and `high`.

        image  the convolution reads the image: three channels, and no zeros behind them
        """
        convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        first, last = convs[0], convs[-1]
        stride = 2 if any(isinstance(layer, Subsample) for layer in layers) else first.stride[0]
        inputs = last.in_channels if image else self._padded(last.in_channels)
        outputs = self._padded(last.out_channels)
        assert last.bias is not None
        bias = torch.zeros(outputs, **FLOAT32)
        bias[: last.out_channels] = last.bias
        taps, middle = torch.zeros(0, **FLOAT32), None
        if len(convs) == 2:  # depthwise weights [C,1,k,k] as [k*k][C]
            taps = torch.zeros((first.kernel_size[0] ** 2, inputs), **FLOAT32)
            taps[:, : first.in_channels] = first.weight.flatten(1).T
            if first.bias is not None:
                middle = torch.zeros(inputs, **FLOAT32)
                middle[: first.in_channels] = first.bias
        around = next((layer.padding for layer in layers if isinstance(layer, nn.ZeroPad2d)), first.padding)
        high = next((layer.max_val for layer in layers if isinstance(layer, nn.ReLU6)), math.inf)
        return _Conv(
            len(convs) == 2, first.kernel_size[0], stride, int(around[0]), int(around[1]), wide, inputs, outputs,
            self._keep(self._pack(last.weight, inputs, outputs)), self._keep(bias), self._keep(taps),
            None if middle is None else self._keep(middle), high,
        )  # fmt: skip

    def _pack(self, weight: Tensor, inputs: int, outputs: int) -> Tensor:
        """Weights [N,C,k,k] as the matrix product reads them: panels [k*k*C][n], of bfloat16 [k*k*C/2][n][2]."""
        n, c, k, _ = weight.shape
        depth = k * k * inputs
        matrix = torch.zeros((depth + depth % 2, outputs), **FLOAT32)
        matrix[:depth].view(k, k, inputs, outputs)[:, :, :c, :n] = weight.permute(2, 3, 1, 0)
        panels = matrix.to(self.dtype).split(self.panel, dim=1)
        if self.dtype == torch.bfloat16:
            panels = tuple(panel.reshape(len(panel) // 2, 2, -1).transpose(1, 2) for panel in panels)
        return torch.cat([panel.flatten() for panel in panels])

    def _padded(self, channels: int) -> int:
        return -(-channels // self.vector) * self.vector

    def _keep(self, tensor: Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _convs(self, convs: Sequence[_Conv]) -> ctypes.Array[_Conv]:
        array = (_Conv * len(convs))(*convs)
        self.kept.append(array)
        return array


class _Packed(Weights):
    """A network as `_Network`, and all that its pointers point to."""

    def __init__(self, folded: RoutedNetwork, dtype: torch.dtype, vector: int, panel: int) -> None:
        super().__init__(dtype, vector, panel)
        space = folded.space
        nodes = (_Node * ((space.depth + 1) * space.num_scales))()
        for layer, scale in folded.route.nodes:
            nodes[layer * space.num_scales + scale] = self._node(folded.node(layer, scale))
        self.kept.append(nodes)
        exits = (_Exit * len(heads := _heads(folded)))(*(self._exit(*head) for head in heads))
        self.kept.append(exits)
        stem, stages = list(folded.stem.children()), (_Stage * 0)()
        if folded.backbone is not None:
            stem, stages = [next(folded.backbone.stages[0].children())], self._stages(folded.backbone)
        self.network = _Network(
            space.depth, space.num_scales, folded.config.zeros_arrive, folded.config.num_classes,
            len(exits), len(stages), folded.config.place or 0,
            self._convs([self.conv(_layers(part), image=not i) for i, part in enumerate(stem)]), nodes, exits, stages,
            self._class_weights(folded),
        )  # fmt: skip

    def _class_weights(self, folded: RoutedNetwork) -> int | None:
        choice = None if folded.exits is None else folded.exits.gates
        if not isinstance(choice, EntropyChoice) or bool((choice.weights == 1).all()):
            return None
        return self._keep(choice.weights.to(**FLOAT32).contiguous())

    def _stages(self, backbone: Backbone) -> ctypes.Array[_Stage]:
        stages = []
        for stage, project in zip(backbone.stages, backbone.project, strict=True):
            blocks = [self._block(part) for part in stage.children() if isinstance(part, InvertedResidual)]
            array = (_Block * len(blocks))(*blocks)
            self.kept.append(array)
            stages.append(_Stage(len(blocks), array, self.conv(_layers(project))))
        self.kept.append(packed := (_Stage * len(stages))(*stages))
        return packed

    def _block(self, block: InvertedResidual) -> _Block:
        expands = not isinstance(block.expand, nn.Identity)
        packed = _Block(expands, block.residual)
        if expands:
            packed.expand = self.conv(_layers(block.expand))
        packed.depthwise = self.conv([*_layers(block.depthwise), *_layers(block.project)])
        return packed

    def _exit(self, layer: int, decoder: Decoder, gate: LossGate | None) -> _Exit:
        merges, predictor = [self.conv(_layers(merge)) for merge in decoder.merge], [decoder.predictor]
        glance = copy.deepcopy(decoder.predictor)  # a new one would draw random numbers
        glance.weight, glance.kernel_size, glance.padding = nn.Parameter(decoder.glance_weight), (1, 1), (0, 0)
        packed = _Exit(layer, merges=self._convs(merges), predictor=self.conv(predictor, wide=True))
        packed.glance = self.conv([glance], wide=True)
        if gate is not None:
            packed.later, packed.features = gate.weight.shape
            for name in ("center", "weight", "bias"):
                setattr(packed, name, self._keep(getattr(gate, name).to(**FLOAT32).contiguous()))
        return packed

    def _node(self, node: RoutingNode) -> _Node:
        operations = [_layers(one) for one in node.cell.operations.values() if not isinstance(one, Identity)]
        packed = _Node(len(operations), len(operations) < len(node.cell))
        packed.cell = self._convs([self.conv(_layers(half)) for halves in operations for half in halves])
        for direction in node.directions:
            packed.directions[direction] = 1
            layers = _layers(node.transforms[DIRECTIONS[direction]])
            if any(isinstance(layer, nn.Conv2d) for layer in layers):
                packed.transforms[direction] = self.conv(layers)
        if node.gate is not None:
            score = node.gate.score
            weight = torch.zeros((len(DIRECTIONS), score.in_features), **FLOAT32)
            bias = torch.zeros(len(DIRECTIONS), **FLOAT32)
            weight[list(node.directions)], bias[list(node.directions)] = score.weight, score.bias
            packed.gated, packed.small_gate, packed.features = 1, node.gate.small, score.in_features
            packed.squeeze = self.conv(_layers(node.gate.squeeze))
            packed.weight, packed.bias = self._keep(weight), self._keep(bias)
        return packed


def _heads(model: RoutedNetwork) -> list[tuple[int, Decoder, LossGate | None]]:
    """What is at each exit: the layer before it, its decoder and its gate. The last one is the end of the grid."""
    found: list[Any] = [(model.space.depth, model.head, None)]
    if model.exits is not None:
        gates = [*model.exits.gates, *[None] * len(model.exits.decoders)]  # entropy needs none
        found = [*zip(model.exits.layers, model.exits.decoders, gates, strict=False), *found]
    return found


def _layers(sequence: nn.Module) -> list[nn.Module]:
    return list(cast(nn.Sequential, sequence))
