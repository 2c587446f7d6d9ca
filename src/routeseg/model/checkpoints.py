"""Reading networks from disk: folders, as `model.save` writes them. Nothing is allocated before a file is checked, and
PyTorch is not imported before config and header are read: a wrong folder is told at once.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from safetensors import SafetensorError, safe_open

from routeseg.config import LATER, NetworkConfig
from routeseg.files import (
    BUNDLED,
    CONFIG_FILE,
    MAX_JSON,
    WEIGHTS_FILE,
    best_of_run,
    bundled_networks,
    parse_json,
    read_json,
)

if TYPE_CHECKING:
    from torch import Tensor

    from routeseg.model import DynamicRoutingNetwork

Network = TypeVar("Network", bound="DynamicRoutingNetwork")
PRETRAINED = BUNDLED / "camvid"  # the one that is taken if none is named
LENGTH_BYTES = 8  # at the start of a safetensors file: the length of its header
FLOATS, COUNTS = ("F64", "F32", "F16", "BF16"), ("I64",)  # safetensors' dtypes for weights, and for counts


@dataclass(frozen=True)
class Stored:
    """What a file says of one of its tensors."""

    shape: tuple[int, ...]
    dtype: str


@overload
def load(folder: str | Path | None = None) -> DynamicRoutingNetwork: ...
@overload
def load(folder: str | Path | None, kind: type[Network]) -> Network: ...
def load(folder: str | Path | None = None, kind: type[DynamicRoutingNetwork] | None = None) -> DynamicRoutingNetwork:
    """The network of a checkpoint folder, the best one of a run, or the bundled one of a name, in eval mode; without a
    folder, the bundled one for streets. Its class is DynamicRoutingNetwork, or the subclass `kind`, its head the one
    that its config names.

    Raises ValueError, naming the file, if the folder is no checkpoint, is damaged, or does not fit its config.
    """
    folder = Path(best_of_run(folder)) if folder is not None else PRETRAINED
    config, stored = read_config(folder), read_header(folder)
    if config.head == "decoder" and any(key.startswith("head.") for key in stored):
        config = replace(config, head="classifier")  # of earlier versions, which did not say it
    check_nodes(config, stored, folder / WEIGHTS_FILE)  # at once, also for a depth whose network takes seconds to build
    import torch

    from routeseg.model import DynamicRoutingNetwork

    kind = kind or DynamicRoutingNetwork
    with torch.device("meta"):
        expected = kind(config).state_dict()
    later = LATER - stored.keys()
    check_fit({key: one for key, one in expected.items() if key not in later}, stored, folder / WEIGHTS_FILE)
    model = kind(config)
    own = model.state_dict()
    model.load_state_dict(read_weights(folder) | {key: own[key] for key in later & own.keys()})
    return model.eval()


def average(folders: Sequence[str | Path]) -> DynamicRoutingNetwork:
    """The network of which every weight is the mean over those of several, in eval mode. Trainings that began with the
    same weights, with other seeds, make one that is better than each of them (Wortsman et al. 2022, "Model soups").

    BatchNorm's statistics are averaged, too. Budgets are the first one's: calibrate it anew. Raises ValueError if there
    is none, or if they are of different networks.
    """
    if not folders:
        raise ValueError("there is nothing to average: give checkpoint folders")
    models = [load(folder) for folder in folders]
    mean = models[0]
    for folder, model in zip(folders, models, strict=True):
        if replace(model.config, sizes=mean.config.sizes) != mean.config:
            raise ValueError(f"{folder} is another network than {folders[0]}: only the same ones can be averaged")
    kept = set() if mean.exits is None else {tensor.data_ptr() for tensor in mean.exits.calibration()}
    others = [model.state_dict() for model in models[1:]]
    for name, tensor in mean.state_dict().items():
        if tensor.is_floating_point() and tensor.data_ptr() not in kept:
            tensor.copy_(sum((other[name] for other in others), tensor) / len(models))
    return mean


def load_segmenter(folder: str | Path | None = None) -> DynamicRoutingNetwork:
    """`load`, and a ValueError with the remedy if the head of the network segments nothing."""
    model = load(folder)
    if not model.head.segments:
        raise ValueError(
            f"{folder} segments nothing, its head is {model.config.head}: start a segmenter from it with "
            f"`routeseg train --init {folder}`"
        )
    return model


def read_config(folder: Path) -> NetworkConfig:
    """What makes the network in a checkpoint folder. Raises ValueError, naming the file, if there is none."""
    if not folder.is_dir():
        names = ", ".join(bundled_networks())
        raise ValueError(
            f"no checkpoint folder {folder}: give a folder with {WEIGHTS_FILE} and {CONFIG_FILE}, or the name of a "
            f"bundled network ({names})"
        )
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            inside = [str(path.parent) for path in sorted(folder.glob(f"*/{WEIGHTS_FILE}"))]
            hint = f"Did you mean {inside[0]}?" if inside else "`routeseg train` writes such folders"
            raise ValueError(f"{folder} is no checkpoint: {name} is missing. {hint}")
    try:
        return NetworkConfig.from_dict(read_json(folder / CONFIG_FILE))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} describes no network: {error}") from error


def read_header(folder: Path) -> dict[str, Stored]:
    """Shape and dtype of the weights in a checkpoint folder, by name, without reading or mapping them. They stand at
    the head of the file (a length, then JSON; see safetensors' format)."""
    path = folder / WEIGHTS_FILE
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(LENGTH_BYTES))
            header = parse_json(file.read(min(length, MAX_JSON + 1)))
        end = path.stat().st_size - LENGTH_BYTES - length
        return {name: _stored(one, end) for name, one in header.items() if name != "__metadata__"}
    except (OSError, struct.error, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"cannot read {path}: it is no safetensors file, or cut off ({error})") from error


def _stored(entry: Mapping[str, Any], end: int) -> Stored:
    """A tensor's entry in the header. Raises ValueError, TypeError or LookupError if it is none, or beyond the end."""
    first, last = entry["data_offsets"]
    if not 0 <= first <= last <= end:
        raise ValueError("its tensors are not all there")
    return Stored(tuple(operator.index(side) for side in entry["shape"]), str(entry["dtype"]))


def read_weights(folder: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder, or those of these names, in float32. Check the header first."""
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: it cannot be mapped
        raise ValueError(f"cannot read {path}: {error}. Is the file complete?") from error
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def check_nodes(config: NetworkConfig, stored: Collection[str], name: str | Path) -> None:
    """Raises ValueError, naming one, if the nodes of a file are not those of the network."""
    there = {key.split(".")[1] for key in stored if key.startswith("nodes.")}
    expected = {f"{layer}-{scale}" for layer, scale in config.whole_route.nodes}
    for what, nodes in (("it lacks the node", expected - there), ("the network has no node", there - expected)):
        if nodes:
            raise _misfit(name, f"{what} {min(nodes)} (and {len(nodes) - 1} more)")


def check_fit(expected: Mapping[str, Tensor], stored: Mapping[str, Stored], name: str | Path) -> None:
    """Raises ValueError, naming a tensor, if the weights of a file are not those of the network."""
    lacking, left = [[k for k in some if k not in other] for some, other in ((expected, stored), (stored, expected))]
    if lacking:
        raise _misfit(name, f"it lacks {lacking[0]} (and {len(lacking) - 1} more tensors)")
    if left:
        raise _misfit(name, f"the network has no {left[0]} (nor {len(left) - 1} more tensors)")
    for key, value in expected.items():
        one = stored[key]
        if one.shape != tuple(value.shape):
            raise _misfit(name, f"{key} has shape {list(one.shape)} there, {list(value.shape)} in the network")
        allowed = FLOATS if value.is_floating_point() else COUNTS
        if one.dtype not in allowed:
            raise _misfit(name, f"{key} is stored as {one.dtype}: it must be {' or '.join(allowed)}")


def _misfit(name: str | Path, what: str) -> ValueError:
    return ValueError(f"{name} does not fit the network that its config describes: {what}")
