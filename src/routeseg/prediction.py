"""Files in; label maps, overlays and routes out.

For every image, named NAME below, the output folder gets
    NAME_labels.png    class of each pixel, a palette PNG: its bytes are the class ids
    NAME_overlay.png   the image tinted with its segmentation, and a legend
    NAME_route.png     the route as a picture
    NAME_route.json    the route, its activations and its cost; written last, `Route.from_json` reads it

NAME is the image's file name without its suffix. Images that share it keep their suffix (`x.png`, `x.jpg`),
and where even that is the same (`a/x.png`, `b/x.png`) the later ones get a number (`x.png-2`).

Legend: H, W image size, K classes, L depth, S scales.
"""

from __future__ import annotations

import glob
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from routeseg.cost import model_cost
from routeseg.data.pairs import IMAGE_SUFFIXES, UnreadableImage, read_image
from routeseg.data.transforms import IGNORE, PADDING_RGB
from routeseg.evaluation import Forward
from routeseg.figures import overlay, png_bytes, save_route
from routeseg.files import check_writable, write_atomically
from routeseg.model import DynamicRoutingNetwork
from routeseg.model.network import MIN_IMAGE_SIZE, padded_size
from routeseg.space import Route

INPUT_SUFFIXES = (*IMAGE_SUFFIXES, ".bmp", ".tif", ".tiff", ".webp")
LABELS, OVERLAY, ROUTE_PICTURE, ROUTE = "_labels.png", "_overlay.png", "_route.png", "_route.json"
OUTPUTS = (LABELS, OVERLAY, ROUTE_PICTURE, ROUTE)
GIGA = 1e9


@dataclass(frozen=True)
class Prediction:
    """What became of one image.

    image                 the file; `name` is NAME, as its output files are called
    size                  (H, W) of the image, upright
    route                 the paths that were open
    cost_macs, full_macs  its real cost, and the cost with every path open at this size
    """

    image: Path
    name: str
    size: tuple[int, int]
    route: Route
    cost_macs: float
    full_macs: float

    @property
    def share(self) -> float:
        """The cost as a share of the full network's, 0..1."""
        return self.cost_macs / self.full_macs


@dataclass(frozen=True)
class PredictionSummary:
    """What `predict_files` did: a Prediction for each image, and (file, reason) for each that was skipped."""

    output: Path
    predictions: tuple[Prediction, ...]
    skipped: tuple[tuple[Path, str], ...]
    seconds: float

    def table(self) -> str:
        """The summary as lines of text."""
        rows = [("images", str(len(self.predictions)))]
        if self.predictions:
            costs = np.array([p.cost_macs for p in self.predictions]) / GIGA
            shares = np.array([p.share for p in self.predictions])
            for name, reduce in (("mean", np.mean), ("min", np.min), ("max", np.max)):
                cost = f"{reduce(costs):.4g} GMACs ({_percent(reduce(shares))} of the full network)"
                rows.append((f"real cost, {name}", cost))
        rows.append(("time", f"{self.seconds:.1f} s"))
        rows.append(("results", str(self.output)))
        if self.skipped:
            rows.append(("skipped", str(len(self.skipped))))
            rows += [("", reason) for _, reason in self.skipped]
        wide = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{wide}}  {value}" for name, value in rows)


def find_inputs(inputs: Sequence[str]) -> list[Path]:
    """The image files that these names mean, each once, in the order given.

    A file is taken as it is, whatever its suffix. A folder gives the images in it (INPUT_SUFFIXES), sorted,
    without hidden ones and those in its subfolders. Anything else is a glob (`**` goes through folders),
    sorted too; it gives images, or any file where it names a suffix itself (`*.jp2`).

    Raises ValueError, naming the input, where it gives nothing.
    """
    if not inputs:
        raise ValueError("no images given: name image files, folders or globs")
    found: dict[str, Path] = {}
    for text in inputs:
        for path in _expand(text):
            found.setdefault(os.path.abspath(path), path)
    return list(found.values())


def _expand(text: str) -> list[Path]:
    if not text:
        raise ValueError("an input is empty: name an image file, a folder or a glob")
    path = Path(text).expanduser()
    known = ", ".join(INPUT_SUFFIXES)
    if path.is_file():
        return [path]
    if path.is_dir():
        try:
            candidates = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        except OSError as error:
            raise ValueError(f"cannot read the folder {text}: {error.strerror}") from error
        images = [p for p in candidates if p.suffix.lower() in INPUT_SUFFIXES and p.is_file()]
        if not images:
            raise ValueError(f"the folder {text} holds no images ({known}); its subfolders: '{path}/**'")
        return images
    if not glob.has_magic(str(path)):
        raise ValueError(f"no file or folder {text}: check the name")
    files = [p for p in map(Path, sorted(glob.glob(str(path), recursive=True))) if p.is_file()]
    named = path.suffix and not glob.has_magic(path.suffix)
    images = files if named else [p for p in files if p.suffix.lower() in INPUT_SUFFIXES]
    if not images:
        raise ValueError(f"{text} matches {len(files)} files, and no image ({known}): check the pattern")
    return images


def output_names(paths: Iterable[Path]) -> list[str]:
    """NAME of each image (see the top of this file): no two are the same, also where case does not count."""
    paths = list(paths)
    stems = Counter(path.stem.casefold() for path in paths)
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        wanted = path.stem if stems[path.stem.casefold()] == 1 else path.name
        name, number = wanted, 1
        while name.casefold() in taken:
            number += 1
            name = f"{wanted}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


@torch.no_grad()
def predict_files(
    forward: Forward,
    model: DynamicRoutingNetwork,
    paths: Sequence[Path],
    output: Path,
    on_file: Callable[[], None] | None = None,
) -> PredictionSummary:
    """Segments image files and writes the four files of each into the folder `output`, replacing older ones.

    forward   what computes the segmentation, the model itself or an engine built from it
    model     gives classes, colours and cost
    on_file   called after each file (for a progress bar)

    Each file is written whole or not at all. An image that cannot be read is skipped, and listed in the
    summary. Images with a side under 32 pixels are padded for the network, and their results cropped.
    Raises ValueError, before any work, where the folder cannot be written or a result would overwrite an
    image, and later where a file cannot be written.
    """
    start = time.monotonic()
    if model.num_classes > IGNORE:
        raise ValueError(f"the network has {model.num_classes} classes: a label map holds at most {IGNORE}")
    names = output_names(paths)
    _prepare_folder(output, paths, names)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    predictions: list[Prediction] = []
    skipped: list[tuple[Path, str]] = []
    try:
        for path, name in zip(paths, names, strict=True):
            try:
                image = read_image(path)
            except UnreadableImage as error:
                skipped.append((path, str(error)))
            else:
                predictions.append(_predict(forward, model, device, image, path, output / name))
            if on_file is not None:
                on_file()
    finally:
        model.train(was_training)
    return PredictionSummary(output, tuple(predictions), tuple(skipped), time.monotonic() - start)


def _predict(
    forward: Forward,
    model: DynamicRoutingNetwork,
    device: torch.device,
    image: np.ndarray,
    path: Path,
    target: Path,
) -> Prediction:
    """Segments one image uint8 [H,W,3] and writes TARGET_labels.png and the others."""
    height, width = image.shape[:2]
    pixels = torch.from_numpy(_pad(image).transpose(2, 0, 1).copy())[None]  # [1,3,H,W], H and W at least 32
    result = forward(pixels.to(device))
    labels = result.labels[0, :height, :width].cpu().numpy().astype(np.uint8)
    gates = result.gates[0].float().cpu().numpy()
    table = model_cost(model, padded_size(model.space, *pixels.shape[-2:]))
    prediction = Prediction(
        image=path,
        name=target.name,
        size=(height, width),
        route=Route.from_gates(model.space, gates),
        cost_macs=float(table.of_gates(gates)),
        full_macs=table.full,
    )
    cost = f"{prediction.cost_macs / GIGA:.4g} GMACs, {_percent(prediction.share)} of the full network"
    with _writing(target.parent):
        save_route(_file(target, ROUTE_PICTURE), model.space, gates, f"{path.name}: {cost}")
        write_atomically(_file(target, LABELS), _label_png(labels, model.palette))
        tinted = overlay(image, labels, model.class_names, model.palette)
        write_atomically(_file(target, OVERLAY), png_bytes(tinted))
        write_atomically(_file(target, ROUTE), _route_json(prediction, gates).encode())
    return prediction


def _pad(image: np.ndarray) -> np.ndarray:
    """The image [H,W,3], with grey to the right and below where a side is shorter than the network takes."""
    height, width = (max(side, MIN_IMAGE_SIZE) for side in image.shape[:2])
    padded = np.full((height, width, 3), PADDING_RGB, dtype=np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded


def _label_png(labels: np.ndarray, palette: Iterable[Iterable[int]]) -> bytes:
    picture = Image.fromarray(labels)
    picture.putpalette([part for colour in palette for part in colour])
    return png_bytes(picture)


def _route_json(prediction: Prediction, gates: np.ndarray) -> str:
    """The object of `Route.to_json`, and with it the activation of each open edge, the image and the cost."""
    data = json.loads(prediction.route.to_json())
    data |= {
        "activations": [float(gates[edge]) for edge in prediction.route],  # in the order of `open`
        "image": str(prediction.image),
        "image_size": list(prediction.size),
        "cost_gmacs": prediction.cost_macs / GIGA,
        "full_gmacs": prediction.full_macs / GIGA,
        "share_of_full": prediction.share,
    }
    return json.dumps(data) + "\n"


def _file(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _prepare_folder(output: Path, paths: Sequence[Path], names: Sequence[str]) -> None:
    """Makes the output folder. Raises ValueError where it cannot be written or an image lies in the way."""
    images = {os.path.realpath(path) for path in paths}
    for name in names:
        for result in (_file(output / name, ending) for ending in OUTPUTS):
            if os.path.realpath(result) in images:
                raise ValueError(f"{result} is itself an input: choose another --output, it would be lost")
    check_writable(output)


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write into {output}: {error.strerror}. Choose another --output") from error
