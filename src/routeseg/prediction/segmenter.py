"""A network that takes images in Python as people have them: `routeseg.load()("street.jpg")`.

Legend: B images, H, W image size.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, SupportsFloat, TypedDict, Unpack, overload
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from routeseg.budgets.asked import Asked
from routeseg.budgets.budgeted import Budgeted
from routeseg.cost.latency import LatencyTable
from routeseg.data.decoding import as_bytes, read_pillow
from routeseg.engine import Precision, SkipEngine
from routeseg.engine.compiled import find_library
from routeseg.model import DynamicRoutingNetwork, Segmentation, checkpoints, request
from routeseg.prediction.files import read_source, segment
from routeseg.prediction.image import SegmentedImage
from routeseg.prediction.sources import Source, is_url, locate, output_names
from routeseg.prediction.torch_runner import TorchNetwork

Single = str | Path | Image.Image | np.ndarray  # what one image may be, beside a tensor
Several = list[Any] | tuple[Any, ...]
Budget = float | str | SupportsFloat | None
Latency = LatencyTable | Sequence[LatencyTable] | str | Path | None


class Options(TypedDict, total=False):
    """How `Segmenter.predict` segments."""

    latency: Latency
    precision: Precision
    per_image: bool


class Segmenter(DynamicRoutingNetwork):
    """A network that also takes images as people have them: `routeseg.load()`.

    `segmenter("street.jpg")` is `segmenter.predict("street.jpg")`; for a tensor of images [B,3,H,W] it is the forward
    of the network, as training and engines ask it.
    """

    @overload
    def __call__(
        self, images: Tensor, route: request.Routes = None, **options: Unpack[request.Options]
    ) -> Segmentation: ...
    @overload
    def __call__(self, images: Single, budget: Budget = None, **options: Unpack[Options]) -> SegmentedImage: ...
    @overload
    def __call__(self, images: Several, budget: Budget = None, **options: Unpack[Options]) -> list[SegmentedImage]: ...
    def __call__(self, images: Any, *args: Any, **options: Any) -> Any:
        """`forward` for a tensor of images [B,3,H,W]; `predict` for everything else that is an image, or several."""
        if isinstance(images, Tensor):
            return super().__call__(images, *args, **options)
        return self.predict(images, *args, **options)

    @overload
    def predict(self, images: Single | Tensor, budget: Budget = None, **options: Unpack[Options]) -> SegmentedImage: ...
    @overload
    def predict(self, images: Several, budget: Budget = None, **options: Unpack[Options]) -> list[SegmentedImage]: ...
    def predict(
        self,
        images: Any,
        budget: Budget = None,
        latency: Latency = None,
        precision: Precision = "float32",
        per_image: bool = False,
    ) -> Any:
        """Segments an image, or each of several, on the fastest engine of the device where the network is.

        images     a path or URL, a PIL image, an array [H,W,3] (uint8, uint16, or floats in 0..1), a tensor [3,H,W] or
                   [B,3,H,W] (the same); RGB. Or a list or tuple of these. One image gives one `SegmentedImage`, all
                   others a list; for type checkers write `predict(list(images))` for a tensor of several
        budget     of a network with exits, what images may cost in the mean: a share such as 0.4, or "40%",
                   "0.5GMACs", "25ms"; None: what helps. A single image costs one of its `levels`
        latency    the table of this machine (`routeseg profile`) for a budget in ms, or those of several sizes; or
                   their file or folder
        precision  as `SkipEngine` takes it; with "auto" results may differ from one process to the next
        per_image  each image keeps the budget, not the mean of them: of a network whose places leave by themselves

        Raises ValueError, with the remedy, for what is no image, cannot be read, or holds floats beyond 0..1; and for a
        budget that the network cannot keep; and if its head segments nothing.
        """
        if not self.head.segments:
            raise ValueError(f"the head {self.config.head} segments nothing: call the network with a tensor [B,3,H,W]")
        several = isinstance(images, list | tuple) or (isinstance(images, Tensor | np.ndarray) and images.ndim == 4)
        parts = [one for some in (images if several else [images]) for one in _read(some)]
        runner = _runner(self, precision)
        for _, image in parts:
            if not image.size:
                raise ValueError(f"an image of {image.shape[0]}x{image.shape[1]} has no pixels")
        if budget is not None:
            asked = replace(Asked.parse(budget, *_tables(latency)), per_image=per_image)
            runner = TorchNetwork(Budgeted(runner.forward, self, asked), self, runner.network)
        names = output_names([source for source, _ in parts])
        found = [
            SegmentedImage(image, segment(runner, image, source, name), runner.network, runner.precision)
            for (source, image), name in zip(parts, names, strict=True)
        ]
        return found if several else found[0]


def load(folder: str | Path | None = None) -> Segmenter:
    """The network of a checkpoint folder, the best one of a run, or a bundled one by its name, in eval mode: `animals`
    (cat, cow, dog, horse, sheep, person) or `camvid` (streets), which is also taken without a name. It has the head
    that its config names; one that segments nothing takes tensors alone.

    Raises ValueError, naming the file, if the folder is no checkpoint, is damaged, or does not fit its config.
    """
    return checkpoints.load(folder, Segmenter)


# Of each network the runner that was built last, and what it was built from. Threads may ask for it at the same time.
_runners: WeakKeyDictionary[DynamicRoutingNetwork, tuple[_Known, TorchNetwork]] = WeakKeyDictionary()
_building = threading.Lock()


def _runner(model: DynamicRoutingNetwork, precision: Precision) -> TorchNetwork:
    """The runner of a network; built anew once its weights have changed."""
    known, runner = _runners.get(model, (None, None))
    if runner is None or known is None or not known.same(model, precision):
        with _building:
            known, runner = _runners.get(model, (None, None))
            if runner is None or known is None or not known.same(model, precision):
                known = _Known(model, precision)  # first: what changes from here on is noticed at the next image
                runner = TorchNetwork(SkipEngine(model, precision), model)
                _runners[model] = known, runner
    return runner


class _Known:
    """What an engine was built from: the precision that was asked for, the network's configuration, and a copy of its
    weights. Weights can change without a trace (`.data`, arrays that share their memory), so they are compared byte by
    byte; where the parts of the network and its tensors are the same objects as before, by the kernels."""

    def __init__(self, model: DynamicRoutingNetwork, precision: Precision) -> None:
        self.asked = precision, model.config
        parts = [(part._parameters, part._buffers, part._modules) for part in model.modules()]
        self.stores: list[dict[str, Any]] = [store for stores in parts for store in stores]
        self.objects = [one for store in self.stores for one in store.values()]  # kept, so that no other gets an id
        self.ids = self._ids()
        self.weights = [tensor.clone() for tensor in _weights(model)]
        self.tensors = [one for one in self.objects if isinstance(one, Tensor)]  # on a CPU in the same order
        self.at = self._addresses()
        on_cpu = all(tensor.device.type == "cpu" for tensor in self.tensors)
        alike = on_cpu and all(a.stride() == b.stride() for a, b in zip(self.tensors, self.weights, strict=True))
        self.library = find_library(torch.float32) if alike else None
        count = len(self.weights)
        self.copies = (
            (ctypes.c_void_p * count)(*(tensor.data_ptr() for tensor in self.weights)),
            (ctypes.c_size_t * count)(*(tensor.nbytes for tensor in self.weights)),
        )

    def same(self, model: DynamicRoutingNetwork, precision: Precision) -> bool:
        if self.asked != (precision, model.config):
            return False
        # Where nothing was exchanged, the weights lie where they did.
        if self.library is not None and self.ids == self._ids() and self.at == self._addresses():
            ours, count = (ctypes.c_void_p * len(self.at))(*self.at), len(self.at)
            return bool(self.library.routeseg_same(ours, *self.copies, count, torch.get_num_threads()))
        weights = _weights(model)
        return len(weights) == len(self.weights) and all(map(_same, weights, self.weights))

    def _ids(self) -> list[int]:
        """Of the parts of the network, and of its tensors."""
        return [id(one) for store in self.stores for one in store.values()]

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.tensors]


def _weights(model: DynamicRoutingNetwork) -> list[Tensor]:
    """Parameters and buffers; on a GPU as one tensor of bytes, since each comparison there is waited for."""
    # By module: `parameters()` and `buffers()` take ten milliseconds of a large network, at every image.
    tensors = [tensor for one in model.modules() for tensor in (*one._parameters.values(), *one._buffers.values())]
    found = [tensor.detach() for tensor in tensors if tensor is not None]
    if found[0].device.type == "cpu":
        return found
    return [torch.cat([tensor.flatten().view(torch.uint8) for tensor in found])]


def _same(now: Tensor, then: Tensor) -> bool:
    """Whether two tensors have the same bytes, NaN or not; `then` is a clone, and so without gaps in its memory."""
    if (now.shape, now.dtype, now.device) != (then.shape, then.dtype, then.device):
        return False
    if now.device.type != "cpu":
        return torch.equal(now, then)
    if now.stride() != then.stride():
        now = now.clone()
    return _memcmp(now.data_ptr(), then.data_ptr(), then.nbytes) == 0


# `torch.equal` and NumPy take four times as long, most of it for the many small tensors.
_memcmp = ctypes.PyDLL("msvcrt" if os.name == "nt" else None).memcmp
_memcmp.argtypes, _memcmp.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int


def _tables(latency: Latency) -> tuple[Sequence[LatencyTable], str]:
    """Latency tables, and what messages call them."""
    if isinstance(latency, str | Path):
        return LatencyTable.read_all(latency), str(latency)
    tables = [] if latency is None else [latency] if isinstance(latency, LatencyTable) else list(latency)
    return tables, ", ".join(table.name for table in tables)


def _read(image: Any) -> list[tuple[Source, np.ndarray]]:
    """The images that something holds: where each is from, and uint8 [H,W,3]."""
    if isinstance(image, str | Path):
        source = image if is_url(image) else Path(image)
        return [(source, read_source(source, locate(source)))]
    if isinstance(image, Image.Image):
        return [("image", read_pillow(image))]
    if isinstance(image, Tensor):
        if image.ndim not in (3, 4) or image.shape[-3] != 3:
            raise ValueError(f"a tensor of shape {list(image.shape)} is no image: give [3,H,W] or [B,3,H,W], RGB")
        pixels = image.detach().cpu().movedim(-3, -1).numpy()
        return [("image", as_bytes(one)) for one in (pixels if image.ndim == 4 else pixels[None])]
    if isinstance(image, np.ndarray):
        if image.ndim not in (3, 4) or image.shape[-1] != 3:
            hint = ""
            if image.ndim == 3 and image.shape[0] == 3:
                hint = "; yours may be [3,H,W]: image.transpose(1, 2, 0)"
            elif image.ndim == 3 and image.shape[-1] == 4:
                hint = "; yours has four channels: image[..., :3]"
            elif image.ndim == 2:
                hint = "; yours has no channels: numpy.stack([image] * 3, axis=-1)"
            raise ValueError(f"an array of shape {list(image.shape)} is no image: give [H,W,3], RGB{hint}")
        return [("image", as_bytes(one)) for one in (image if image.ndim == 4 else image[None])]
    raise ValueError(
        f"{type(image).__name__} is no image: give a path, a URL, a PIL image, an array [H,W,3] or a tensor [3,H,W]"
    )
