"""The training step on kernels of our own, on CPUs, in float32: fewer passes over memory than PyTorch's operations
make. Gradients agree with theirs to float rounding.

A map that BatchNorm follows stays as the convolution made it; mean, scale and shift travel beside it (`Term`), and
whoever reads the map applies them on the way, with ReLU, weight and upsampling. So a node writes one map for each
convolution and one for each sum (engine/kernels/training.h). What the kernels do not know (another gate, another
operation, another norm) runs as it is.

Legend: B images, C channels, h, w the size of a feature map; maps are [B,C,h,w] in channels_last.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from routeseg.config import NetworkConfig
from routeseg.engine.compiled import find_library, first_difference, raise_failure
from routeseg.labels import IGNORE
from routeseg.model.cell import Cell, RoutingNode
from routeseg.model.compute import Compute, spread, take
from routeseg.model.decoder import Decoder
from routeseg.model.gate import Gate, shrink
from routeseg.model.head import Head
from routeseg.model.layers import BatchNorm, Stem, Subsample, Transform, Upsample, single_value, upsample
from routeseg.model.operations import Identity, SepConv, SepConv3x3, SepConv5x5
from routeseg.model.places import Running
from routeseg.space import DIRECTIONS, KEEP, SMALL_GATE_FACTOR, STEM_STRIDE, UP

LAST: dict[str, Any] = {"memory_format": torch.channels_last}
LANES = 4  # channels must be whole vectors of so many


class _Unit(Structure):
    """`Unit` of kernels/training.h."""

    _fields_ = [
        *((n, c_int32) for n in "images h w inputs outputs kernel stride dense relu frozen".split()),
        *((n, c_void_p) for n in "x center a b taps weight gamma beta running_mean running_variance batches".split()),
        *((n, c_float) for n in "momentum epsilon".split()),
        *((n, c_void_p) for n in "z mean scale shift inverse dz dscale dshift plus".split()),
        *((n, c_void_p) for n in "dx da db dtaps dweight dgamma dbeta".split()),
    ]


class _Term(Structure):
    """`Term` of kernels/training.h."""

    _fields_ = [
        *((n, c_void_p) for n in "map mean scale shift weight".split()),
        *((n, c_int32) for n in "relu halved".split()),
        *((n, c_void_p) for n in "dmap dscale dshift dweight".split()),
    ]


class _Sum(Structure):
    """`Sum` of kernels/training.h."""

    _fields_ = [
        *((n, c_int32) for n in "images h w c terms".split()),
        ("term", POINTER(_Term)),
        *((n, c_void_p) for n in "out dout".split()),
    ]


class _Mean(Structure):
    """`Mean` of kernels/training.h."""

    _fields_ = [
        *((n, c_int32) for n in "images pixels c".split()),
        *((n, c_void_p) for n in "z mean scale shift out dout dz dscale dshift".split()),
    ]


class _Entropy(Structure):
    """`Entropy` of kernels/training.h."""

    _fields_ = [
        *((n, c_int32) for n in "images classes h w height width".split()),
        *((n, c_void_p) for n in "scores labels weights".split()),
        ("ignored", c_int64),
        *((n, c_void_p) for n in "loss dscores".split()),
    ]


STRUCTURES = (_Unit, _Term, _Sum, _Mean, _Entropy)


@cache
def _library() -> ctypes.CDLL | None:
    """The kernels, which then run on PyTorch's threads; None if there are none for this machine."""
    library = find_library(torch.float32)
    if library is None:
        return None
    library.routeseg_training_layout.restype = library.routeseg_layout.restype
    if first_difference(library.routeseg_training_layout(), STRUCTURES) is not None:
        return None
    for name in ("unit", "sum", "mean"):
        getattr(library, f"routeseg_{name}").argtypes = [c_void_p, c_int, c_int]
    library.routeseg_entropy.argtypes = [c_void_p, c_int]
    if hasattr(os, "RTLD_NOLOAD"):
        try:  # only if PyTorch has loaded it
            threads = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            library.routeseg_share_threads(ctypes.cast(threads.GOMP_parallel, c_void_p))
        except (OSError, AttributeError):
            pass
    return library


def _call(name: str, structure: Structure, *backward: bool) -> None:
    library = cast(ctypes.CDLL, _library())
    status = getattr(library, f"routeseg_{name}")(byref(structure), *backward, torch.get_num_threads())
    raise_failure(library, status, "a training step")


def _taken(tensor: Tensor) -> bool:
    """Whether the kernels take a tensor of this kind, and are there."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and _library() is not None


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _packed(map: Tensor) -> Tensor:
    """A map in memory as the kernels read it."""
    return map.contiguous(**LAST)


class Term(NamedTuple):
    """What arrives somewhere: weight * up(relu(scale * (map - mean) + shift)), of which only the map is in memory.

    map                 [B,C,h,w], or the features that it is the present view of
    mean, scale, shift  [C], or None
    weight              [B], or None
    """

    map: Tensor | Features
    mean: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    weight: Tensor | None = None
    relu: bool = False
    halved: bool = False


class Features:
    """A map that several units read one after another. Each hands on a view of it, so that in the backward pass each
    adds its gradient to that of those behind it, instead of a sum of its own."""

    def __init__(self, map: Tensor) -> None:
        self.map = map


class _ConvNorm(Function):
    """x, and center, a, b if it is normalised -> z, mean, scale, shift, and a view of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, center: Any, a: Any, b: Any, taps: Any, weight: Tensor, gamma: Tensor, beta: Tensor,
        relu: bool, stride: int, norm: nn.BatchNorm2d,
    ) -> Any:  # fmt: skip
        x, weight = _packed(x), weight.contiguous()
        images, inputs, h, w = x.shape
        kernel, dense = (weight if taps is None else taps).shape[-1], weight.shape[-1] > 1
        outputs = len(weight)
        if stride == SMALL_GATE_FACTOR:
            size = (h // stride, w // stride)
        else:
            size = ((h - dense * (kernel - 1) - 1) // stride + 1, (w - dense * (kernel - 1) - 1) // stride + 1)
        z = torch.empty((images, outputs, *size), **LAST)
        frozen = not norm.training or single_value(z)
        mean, scale, shift, inverse = torch.empty(4, outputs).unbind()
        momentum = -1.0 if norm.momentum is None else norm.momentum
        ctx.facts = (images, h, w, inputs, outputs, kernel, stride, dense, relu, frozen)
        ctx.numbers = (momentum, norm.eps)
        unit = _Unit(
            *ctx.facts, _at(x), _at(center), _at(a), _at(b), _at(taps), _at(weight), _at(gamma), _at(beta),
            _at(norm.running_mean), _at(norm.running_var), _at(norm.num_batches_tracked), *ctx.numbers,
            _at(z), _at(mean), _at(scale), _at(shift), _at(inverse),
        )  # fmt: skip
        _call("unit", unit, False)
        ctx.save_for_backward(x, center, a, b, taps, weight, gamma, beta, z, mean, scale, shift, inverse)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean)  # the statistics' share is in what `backward` gives
        return z, mean, scale, shift, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Any, _: Any, dscale: Any, dshift: Any, plus: Any) -> Any:
        x, center, a, b, taps, weight, gamma, beta, z, mean, scale, shift, inverse = ctx.saved_tensors
        dz = torch.zeros_like(z) if dz is None else _packed(dz)
        dscale = torch.zeros_like(scale) if dscale is None else dscale.contiguous()
        dshift = torch.zeros_like(shift) if dshift is None else dshift.contiguous()
        plus = None if plus is None else _packed(plus)
        dx = None if ctx.facts[7] else torch.empty_like(x)
        dweight, dgamma, dbeta = map(torch.empty_like, (weight, gamma, beta))
        da, db, dtaps = (None if t is None else torch.empty_like(t) for t in (a, b, taps))
        unit = _Unit(
            *ctx.facts, _at(x), _at(center), _at(a), _at(b), _at(taps), _at(weight), _at(gamma), _at(beta), None, None,
            None, *ctx.numbers, _at(z), _at(mean), _at(scale), _at(shift), _at(inverse), _at(dz), _at(dscale),
            _at(dshift), _at(plus), _at(dx), _at(da), _at(db), _at(dtaps), _at(dweight), _at(dgamma), _at(dbeta),
        )  # fmt: skip
        _call("unit", unit, True)
        return dx, None, da, db, dtaps, dweight, dgamma, dbeta, None, None, None


class _Add(Function):
    """The sum of terms: flags (relu, halved) of each, then map, mean, scale, shift, weight of each."""

    @staticmethod
    def forward(ctx: Any, flags: Sequence[tuple[bool, bool]], *tensors: Any) -> Tensor:
        maps = [_packed(map) for map in tensors[::5]]
        parts = [
            (map, *(None if t is None else t.contiguous() for t in tensors[5 * i + 1 : 5 * i + 5]))
            for i, map in enumerate(maps)
        ]
        images, c, h, w = maps[0].shape
        if flags[0][1]:
            h, w = 2 * h, 2 * w
        out = torch.empty((images, c, h, w), **LAST)
        terms = (_Term * len(parts))(*(_Term(*map(_at, p), *f) for p, f in zip(parts, flags, strict=True)))
        _call("sum", _Sum(images, h, w, c, len(terms), terms, _at(out)), False)
        ctx.flags, ctx.shape = flags, (images, h, w, c)
        ctx.save_for_backward(*(tensor for part in parts for tensor in part))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        dout = _packed(dout)
        saved, gradients, terms = ctx.saved_tensors, [], []
        for i, flags in enumerate(ctx.flags):
            part = saved[5 * i : 5 * i + 5]
            if not any(flags) and part[1] is None and part[4] is None:  # the map itself
                gradients += [dout, None, None, None, None]
                continue
            dmap, _, *others = (None if t is None else torch.empty_like(t) for t in part)
            gradients += [dmap, None, *others]
            terms.append(_Term(*map(_at, part), *flags, *map(_at, (dmap, *others))))
        if terms:
            array = (_Term * len(terms))(*terms)
            _call("sum", _Sum(*ctx.shape, len(terms), array, None, _at(dout)), True)
        return None, *gradients


class _MeanOf(Function):
    """The mean over the pixels of relu(scale * (z - mean) + shift): [B,C]."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        images, c, h, w = z.shape
        out = torch.empty(images, c)
        _call("mean", _Mean(images, h * w, c, *map(_at, (z, mean, scale, shift, out))), False)
        ctx.save_for_backward(z, mean, scale, shift)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        z, mean, scale, shift = ctx.saved_tensors
        images, c, h, w = z.shape
        dz, dscale, dshift = map(torch.empty_like, (z, scale, shift))
        dout = dout.contiguous()
        own = map(_at, (z, mean, scale, shift, None, dout, dz, dscale, dshift))
        _call("mean", _Mean(images, h * w, c, *own), True)
        return dz, None, dscale, dshift


class _CrossEntropy(Function):
    """Scores [B,K,h,w] of logits four times their size, labels [B,H,W], weights [B,H,W] or None -> the sum over the
    pixels that have a label. The gradient is found on the way."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor, weights: Any) -> Tensor:
        loss, dscores = torch.empty((), dtype=torch.float64), torch.empty_like(scores)
        own = map(_at, (scores, labels, weights))
        _call("entropy", _Entropy(*scores.shape, *labels.shape[1:], *own, IGNORE, _at(loss), _at(dscores)))
        ctx.save_for_backward(dscores)
        return loss.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Any:
        return dloss * ctx.saved_tensors[0], None, None


def convolved(source: Term, block: nn.Module, shrunk: int = 1) -> Term:
    """A convolution, or a depthwise one and a 1x1 behind it, and its BatchNorm; a ReLU behind is left to the reader.

    The source has neither a weight nor half the size. It is resized by 1/`shrunk` first: 1 or SMALL_GATE_FACTOR.
    """
    layers = list(cast(nn.Sequential, block))
    *taps, conv, norm = [layer for layer in layers if isinstance(layer, nn.Conv2d | BatchNorm)]
    stride: int = 2 if isinstance(layers[0], Subsample) else cast(nn.Conv2d, taps[0] if taps else conv).stride[0]
    stride *= shrunk
    features = source.map if isinstance(source.map, Features) else Features(source.map)
    depthwise = taps[0].weight if taps else None
    z, mean, scale, shift, features.map = _ConvNorm.apply(
        features.map, source.mean, source.scale, source.shift, depthwise, conv.weight, norm.weight, norm.bias,
        source.relu, stride, norm,
    )  # fmt: skip
    return Term(z, mean, scale, shift, relu=any(isinstance(layer, nn.ReLU) for layer in layers[layers.index(norm) :]))


def add(terms: Sequence[Term]) -> Tensor:
    """The sum of terms, in memory."""
    tensors: list[Any] = []
    for term in terms:
        own = term.map.map if isinstance(term.map, Features) else term.map
        tensors += [own, term.mean, term.scale, term.shift, term.weight]
    flags = [(term.relu, term.halved) for term in terms]
    if len(terms) == 1 and not any(flags[0]) and tensors[1] is None and tensors[4] is None:
        return tensors[0]
    return _Add.apply(flags, *tensors)


class Fused(Compute):
    """The parts of a network on the kernels, as far as these know them; the others run as they are.

    Features are `Features`, arrivals are `Term`s. In float32 on a CPU: elsewhere, and under autocast, `usable` says no.
    """

    def usable(self, config: NetworkConfig, images: Tensor) -> bool:
        return config.base_channels % LANES == 0 and not torch.is_autocast_enabled("cpu") and _taken(images)

    def stem(self, stem: nn.Module, images: Tensor) -> Tensor:
        if images.requires_grad or not _known(stem):
            return super().stem(stem, images)
        term = Term(images)
        for layers in cast(nn.Sequential, stem):
            term = convolved(term, layers)
        return add([term])

    def activations(self, node: RoutingNode, features: Features) -> Tensor:
        gate = node.gate
        if gate is None or type(gate).scores is not Gate.scores or type(gate).pool is not Gate.pool or not _known(gate):
            return super().activations(node, features.map)
        if not gate.small:
            squeezed = convolved(Term(features), gate.squeeze)
        elif min(features.map.shape[-2:]) >= SMALL_GATE_FACTOR:
            squeezed = convolved(Term(features), gate.squeeze, SMALL_GATE_FACTOR)
        else:
            squeezed = convolved(Term(shrink(features.map)), gate.squeeze)
        pooled = _MeanOf.apply(*squeezed[:4])
        return node.by_direction(gate.activate(gate.score(pooled)))

    def cell(self, node: RoutingNode, features: Features, drop_path: float, running: Running | None = None) -> Features:
        if not _known(node.cell):
            return Features(super().cell(node, features.map, drop_path, running))
        terms = []
        for operation in node.cell.operations.values():
            term = Term(features)
            if not isinstance(operation, Identity):
                first, second = cast(nn.Sequential, operation)
                middle = convolved(term, first)
                if running is not None:
                    middle = Term(running.filled(add([middle]), cast(SepConv, operation).kernel_size // 2))
                term = convolved(middle, second)
            if drop_path > 0 and operation.droppable:
                keep = torch.rand(len(features.map), 1, 1, 1) >= drop_path  # drawn as Cell does
                term = term._replace(weight=keep.flatten() / (1.0 - drop_path))
            terms.append(term)
        return Features(add(terms))

    def send(
        self, node: RoutingNode, direction: int, hidden: Features, alpha: Tensor | None, running: Running | None = None
    ) -> Term:
        layers = node.transforms[DIRECTIONS[direction]]
        alpha = None if alpha is None else alpha.to(torch.float32)
        if not _known(layers):
            return Term(node.transform(direction, hidden.map, running), weight=alpha)
        if direction == KEEP:
            return Term(hidden, weight=alpha, relu=True)
        sent = convolved(Term(hidden, relu=True), layers)
        if running is not None and direction == UP:
            sent = Term(running.filled(add([sent])))
        return sent._replace(weight=alpha, halved=direction == UP)

    def skip(self, features: Features, images: Tensor | None) -> Term:
        return Term(features, weight=None if images is None else images.to(torch.float32))

    def gather(self, arrivals: Sequence[Term | Tensor]) -> Features:
        return Features(add([Term(one) if isinstance(one, Tensor) else one for one in arrivals]))

    def map(self, features: Features | Tensor) -> Tensor:
        return (features if isinstance(features, Tensor) else features.map).detach()

    def kept(self, new: Features, before: Features | None, running: Running) -> Features:
        return Features(running.kept(new.map, None if before is None else before.map))

    def take(self, features: Features | Tensor, rows: Tensor) -> Features:
        return Features(take(features if isinstance(features, Tensor) else features.map, rows))

    def spread(self, arrival: Term | Tensor, rows: Tensor, images: int) -> Term:
        arrival = Term(arrival) if isinstance(arrival, Tensor) else arrival
        map = arrival.map.map if isinstance(arrival.map, Features) else arrival.map
        weight = torch.ones(len(map)) if arrival.weight is None else arrival.weight
        weight = weight.new_zeros(images).index_copy(0, rows, weight)
        return arrival._replace(map=spread(map, rows, images), weight=weight)

    def head(
        self,
        head: Head,
        features: Sequence[Features | Tensor],
        coarse: bool = False,
        running: Running | None = None,
    ) -> Any:
        maps = [one if isinstance(one, Tensor) else one.map for one in features]
        if type(head) is not Decoder or not _known(head):
            return super().head(head, maps, coarse, running)
        total: Term | None = None
        for scale in reversed(range(len(maps))):
            own = Term(maps[scale])
            total = convolved(own if total is None else Term(add([own, total])), head.merge[scale])
            if running is not None:
                total = Term(running.filled(add([total])))
            total = total._replace(halved=scale > 0)
        scores = head.predictor(add([cast(Term, total)]))
        return scores if coarse else upsample(scores, STEM_STRIDE)

    def cross_entropy_sum(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        if logits.shape[-2:] == labels.shape[-2:] or not _taken(logits) or labels.dtype != torch.int64:
            return super().cross_entropy_sum(logits, labels, weights)
        weights = None if weights is None else weights.to(torch.float32).contiguous()
        return _CrossEntropy.apply(logits.contiguous(), labels.contiguous(), weights)


KNOWN = (
    *(Stem, Cell, Identity, SepConv3x3, SepConv5x5, Transform, Upsample, Subsample, Decoder),
    *(nn.Sequential, nn.ModuleList, nn.Conv2d, BatchNorm, nn.ReLU, nn.Linear),
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_found: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # looking takes longer than some kernels do


def _known(module: nn.Module) -> bool:
    """Whether the kernels compute what a part of a network does: parts of ours, of whole vectors of channels, without
    hooks. It is looked at again once a hook was registered anywhere."""
    hooks_so_far = RemovableHandle.next_id
    if _found.get(module) != hooks_so_far:
        for part in module.modules():
            known = type(part) in KNOWN or isinstance(part, Gate)  # of a gate only the squeeze is computed
            if isinstance(part, BatchNorm) and part.num_features % LANES:
                known = False
            if not known or any(getattr(part, hooks) for hooks in HOOKS):
                return False
        _found[module] = hooks_so_far
    return True
