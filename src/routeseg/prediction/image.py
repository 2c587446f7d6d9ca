"""Images in Python: `routeseg.load()("street.jpg")`, or `model.predict(...)` for whatever holds an image.

Legend: B images, H, W image size, K classes, L depth, S scales.
"""

from __future__ import annotations

import ctypes
import io
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsFloat
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from routeseg import figures
from routeseg.budgets.asked import Asked, in_words, levels
from routeseg.budgets.budgeted import Budgeted
from routeseg.cost.latency import LatencyTable
from routeseg.data.decoding import as_bytes, read_pillow
from routeseg.description import NetworkDescription
from routeseg.engine import Precision, SkipEngine
from routeseg.files import check_writable, expand_user, write_atomically
from routeseg.model import DynamicRoutingNetwork
from routeseg.prediction.files import (
    GIGA,
    Segmented,
    Target,
    class_shares,
    effort_of,
    read_source,
    segment,
    write_results,
)
from routeseg.prediction.sources import Source, is_url, locate, open_folder, output_names
from routeseg.prediction.torch_runner import TorchNetwork
from routeseg.space import Route

Single = str | Path | Image.Image | np.ndarray  # what one image may be, beside a tensor
Several = list[Any] | tuple[Any, ...]
Budget = float | str | SupportsFloat | None
Latency = LatencyTable | Sequence[LatencyTable] | str | Path | None
MS = 1000.0


@dataclass(frozen=True)
class SegmentedImage:
    """What a network made of one image. In a notebook it shows itself.

    image         uint8 [H,W,3], RGB
    labels        the class of each pixel, uint8 [H,W]; uint16 for more than 256 classes
    gates         what it opened, float32 [L+1,S,3]
    milliseconds  that the network took, without reading the image
    network       the network, without its weights; `precision` it computed in
    """

    image: np.ndarray
    found: Segmented
    network: NetworkDescription
    precision: str

    @property
    def labels(self) -> np.ndarray:
        return self.found.labels

    @property
    def gates(self) -> np.ndarray:
        return self.found.gates

    @property
    def milliseconds(self) -> float:
        return MS * self.found.seconds

    @property
    def name(self) -> str:
        """Of its file, without the suffix; or `image`."""
        return self.found.prediction.name

    @property
    def class_names(self) -> Sequence[str]:
        """K names."""
        return self.network.config.class_names

    @property
    def palette(self) -> Any:
        """The RGB colours of the classes."""
        return self.network.config.palette

    @property
    def cost_gmacs(self) -> float:
        """Multiply-accumulates of the paths that ran, in 10^9."""
        return self.found.prediction.cost_macs / GIGA

    @property
    def full_gmacs(self) -> float:
        """Those of all paths, at this size."""
        return self.found.prediction.full_macs / GIGA

    @property
    def levels(self) -> tuple[float, ...]:
        """What an image of this size can cost, as shares of the full network, ascending: one for each exit of the
        network. A budget between two of them is kept in the mean of many images. Empty for a network without exits, and
        for one whose places leave by themselves."""
        if self.network.config.exits is None or self.network.config.place is not None:
            return ()
        return tuple(levels(self.network, self.found.prediction.size).tolist())

    @property
    def shares(self) -> dict[str, float]:
        """The classes that are there, the largest first, and their share of the pixels."""
        return class_shares(self.labels, self.class_names)

    @property
    def route(self) -> Route:
        """The paths that were open."""
        return Route.from_gates(self.network.config.space, self.gates)

    @property
    def seen(self) -> tuple[int, int]:
        """(height, width) at which the network looked at the image: a budget may choose a smaller size than its own, or
        a larger one."""
        return self.found.seen or self.found.prediction.size

    @property
    def exits(self) -> np.ndarray | None:
        """Of a network whose places leave by themselves: the exit of each, int64 [h/b,w/b] (rounded up), at the size
        `seen`."""
        return self.found.exits

    def effort(self, legend: bool = True) -> Image.Image:
        """How far each place of the image went, as a heat map over it. Raises ValueError, with the remedy, if its
        places did not decide."""
        shares, place = effort_of(self.network, self.found), self.network.config.place
        assert place is not None
        return Image.fromarray(figures.effort(self.image, shares, place, legend, self.found.seen))

    def overlay(self, alpha: float = 0.55, legend: bool = True) -> Image.Image:
        """The image tinted with its segmentation; `figures.overlay` says more."""
        return Image.fromarray(
            figures.overlay(self.image, self.labels, self.class_names, self.palette, alpha, legend=legend)
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Writes what `routeseg predict` writes of an image: NAME_labels.png, NAME_overlay.png, NAME_route.png and
        NAME_route.json. The name of an image file, such as photo.png, gets the overlay alone. Returns what was written.

        Raises ValueError if it cannot be written."""
        ending = Path(folder).suffix.lower()
        if ending and ending in Image.registered_extensions() and not Path(folder).is_dir():
            return [self._save_overlay(expand_user(folder), Image.registered_extensions()[ending])]
        target = Target(open_folder(Path(folder)), True, self.network.fingerprint)
        target.folder.prepare()
        endings = write_results(target, self.network, self.found, self.image, self.precision)
        return [Path(folder) / f"{self.name}{ending}" for ending in endings]

    def _save_overlay(self, path: Path, form: str) -> Path:
        check_writable(path.parent)
        picture = io.BytesIO()
        try:
            self.overlay().save(picture, form)
        except (KeyError, OSError, ValueError) as error:  # Pillow cannot write this kind of file
            raise ValueError(f"cannot write {path} ({error}): name a .png or .jpg") from error
        write_atomically(path, picture.getvalue())
        return path

    def _repr_png_(self) -> bytes:
        return figures.png_bytes(self.overlay())

    def __repr__(self) -> str:
        height, width = self.labels.shape
        share = 100 * self.found.prediction.share
        classes = ", ".join(f"{name} {100 * part:.0f} %" for name, part in list(self.shares.items())[:4])
        steps = f" (it can be {in_words(np.array(self.levels))})" if self.levels else ""
        return (
            f"SegmentedImage({self.name!r}, {width}x{height}: {classes}; {self.cost_gmacs:.3g} GMACs, {share:.0f} % of "
            f"the network{steps}, {self.milliseconds:.0f} ms)"
        )


def predict(
    model: DynamicRoutingNetwork,
    images: Any,
    budget: Budget = None,
    latency: Latency = None,
    precision: Precision = "float32",
    per_image: bool = False,
) -> SegmentedImage | list[SegmentedImage]:
    """Segments an image, or each of several, on the fastest engine of the device where the network is.

    images     a path or URL, a PIL image, an array [H,W,3] (uint8, uint16, or floats in 0..1), a tensor [3,H,W] or
               [B,3,H,W] (the same); RGB. Or a list or tuple of these. One image gives one result, all others a list
    budget     of a network with exits, what images may cost in the mean: a share such as 0.4, or "40%", "0.5GMACs",
               "25ms"; None: what helps. A single image costs one of its `levels`
    latency    the table of this machine (`routeseg profile`) for a budget in ms, or those of several sizes; or their
               file or folder
    precision  as `SkipEngine` takes it; with "auto" results may differ from one process to the next
    per_image  each image keeps the budget, not the mean of them: of a network whose places leave by themselves

    Raises ValueError, with the remedy, for what is no image, cannot be read, or holds floats beyond 0..1; and for a
    budget that the network cannot keep.
    """
    several = isinstance(images, list | tuple) or (isinstance(images, Tensor | np.ndarray) and images.ndim == 4)
    parts = [one for some in (images if several else [images]) for one in _read(some)]
    runner = _runner(model, precision)
    for _, image in parts:
        if not image.size:
            raise ValueError(f"an image of {image.shape[0]}x{image.shape[1]} has no pixels")
    if budget is not None:
        asked = replace(Asked.parse(budget, *_tables(latency)), per_image=per_image)
        runner = TorchNetwork(Budgeted(runner.forward, model, asked), model, runner.network)
    names = output_names([source for source, _ in parts])
    found = [
        SegmentedImage(image, segment(runner, image, source, name), runner.network, runner.precision)
        for (source, image), name in zip(parts, names, strict=True)
    ]
    return found if several else found[0]


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
    byte, which takes a thirtieth of the bundled network's time for a photo of 360x480."""

    def __init__(self, model: DynamicRoutingNetwork, precision: Precision) -> None:
        self.asked = precision, model.config
        self.weights = [tensor.clone() for tensor in _weights(model)]

    def same(self, model: DynamicRoutingNetwork, precision: Precision) -> bool:
        weights = _weights(model)
        return (
            self.asked == (precision, model.config)
            and len(weights) == len(self.weights)
            and all(map(_same, weights, self.weights))
        )


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
