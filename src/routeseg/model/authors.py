"""Reading the networks that the authors released."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from routeseg.config import NO_GATE, NetworkConfig
from routeseg.model.network import DynamicRoutingNetwork
from routeseg.space import DIRECTIONS, DOWN, KEEP, UP

# The authors feed BGR in 0..255, less this mean, not divided.
AUTHORS_MEAN_BGR = (103.53, 116.28, 123.675)
AUTHORS_GATE_ORDER = (KEEP, UP, DOWN)
IGNORED_KEYS = re.compile(r"(pixel_mean|pixel_std)$|num_batches_tracked$")


def import_checkpoint(
    source: str | Path | Mapping[str, Tensor], small_gate: bool = False, normalize: bool = True
) -> DynamicRoutingNetwork:
    """The network of one of the authors' released checkpoints, in eval mode.

    source      their `.pth` file, the same state dict as `.safetensors`, or the state dict itself
    small_gate  whether its gates look at a quarter-size input (Dynamic-A, B, C); the tensors do not tell
    normalize   True: the network takes RGB like every other of ours, with the authors' normalisation folded in;
                False: the images given are what enters their stem (BGR, already normalised)

    Depth, width, classes, scales, and whether there are gates, are read off the tensors.
    Raises ValueError if the file is damaged, is no such checkpoint, or holds more than tensors; no code in it runs.
    """
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    theirs = dict(source) if isinstance(source, Mapping) else _read_authors_file(Path(source))
    config = _infer_config(theirs, name)
    config["small_gate"], config["zeros_arrive"] = small_gate, True
    config["pixel_mean"] = [m / 255.0 for m in reversed(AUTHORS_MEAN_BGR)] if normalize else [0.0, 0.0, 0.0]
    config["pixel_std"] = [1 / 255.0 if normalize else 1.0] * 3
    model = DynamicRoutingNetwork(NetworkConfig(**config))
    state = _translate(model, theirs, name, flip_channels=normalize)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"{name} does not fit the network that its tensors describe: {first}") from error
    return model.eval()


def _read_authors_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"no file {path}: give one of the authors' checkpoints, .pth or .safetensors")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read {path}: {error}. Is the file complete?") from error
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors (refused: a pickle can run code, and this one asks for it)"
        ) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError, ValueError, IndexError) as error:
        raise ValueError(f"cannot read {path}: it is truncated or no PyTorch checkpoint") from error
    state = data.get("model", data) if isinstance(data, Mapping) else data
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not one of the authors' checkpoints: it has no state dict under 'model'")
    return dict(state)


def _infer_config(theirs: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Depth, width, classes and gates from the shapes of the authors' tensors."""
    nodes = {
        tuple(map(int, m.groups()))
        for key in theirs
        if (m := re.match(r"backbone\.all_cell_list\.(\d+)\.(\d+)\.", key))
    }
    try:
        return {
            "depth": max(layer for layer, _ in nodes) + 1,
            "num_scales": max(scale for _, scale in nodes) + 1,
            "stem_channels": theirs["backbone.stem.stem_1.weight"].shape[0],
            "base_channels": theirs["backbone.stem.stem_3.1.weight"].shape[0],
            "num_classes": theirs["sem_seg_head.predictor.weight"].shape[0],
            "gate": "soft" if "backbone.init_layer.gate_conv_beta.0.weight" in theirs else NO_GATE,
        }
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{name} is not one of the authors' dynamic-routing checkpoints: it lacks "
            f"{error.args[0] if isinstance(error, KeyError) else 'backbone.all_cell_list'}"
        ) from error


def _translate(
    model: DynamicRoutingNetwork, theirs: Mapping[str, Tensor], name: str, flip_channels: bool
) -> dict[str, Tensor]:
    """The authors' tensors under our names; every one of them must be used, and none of ours be left."""
    state: dict[str, Tensor] = {}
    used = set()
    for ours, value in model.state_dict().items():
        key = _authors_key(ours)
        if key not in theirs:
            if ours.endswith("num_batches_tracked"):  # older files lack it, and nothing depends on it
                state[ours] = value
                continue
            raise ValueError(f"{name} is not one of the authors' dynamic-routing checkpoints: it lacks {key}")
        used.add(key)
        tensor = theirs[key]
        if ".gate.score." in ours:
            tensor = tensor.flatten(1) if tensor.ndim > 1 else tensor
            layer, scale = map(int, ours.split(".")[1].split("-"))
            legal = model.space.directions(layer, scale)
            rows = [d for d in AUTHORS_GATE_ORDER if d in legal]
            if len(tensor) != len(rows):
                raise ValueError(
                    f"{name}: {key} has {len(tensor)} rows, node ({layer}, {scale}) has {len(rows)} directions"
                )
            tensor = tensor[[rows.index(d) for d in legal]]
        if flip_channels and ours == "stem.0.0.weight":
            tensor = tensor.flip(1)  # BGR to RGB
        state[ours] = tensor.float() if tensor.is_floating_point() else tensor
    left = sorted(key for key in set(theirs) - used if not IGNORED_KEYS.search(key))
    if left:
        raise ValueError(f"{name} has tensors that this network does not: {left[0]} (and {len(left) - 1} more)")
    return state


def _authors_key(ours: str) -> str:
    """The authors' name of one of our tensors."""
    parts = ours.split(".")
    if parts[0] == "stem":
        block, position = int(parts[1]), int(parts[2])
        if block == 0:
            return f"backbone.stem.stem_1.{'norm.' * position}{parts[-1]}"
        return f"backbone.stem.stem_{block + 1}.{_separable_key(position)}{parts[-1]}"
    if parts[0] == "decoder":
        if parts[1] == "predictor":
            return f"sem_seg_head.predictor.{parts[-1]}"
        return f"sem_seg_head.layer_decoder_list.{parts[2]}.{'norm.' * int(parts[3])}{parts[-1]}"
    layer, scale = map(int, parts[1].split("-"))
    node = "backbone.init_layer" if layer == 0 else f"backbone.all_cell_list.{layer - 1}.{scale}"
    if parts[2] == "cell":  # nodes.L-S.cell.sep_conv_3x3.{0,1}.{0,1,2}.weight
        first, rest = _separable_key(int(parts[5])).split(".", 1)
        return f"{node}.cell_ops._ops.0.op.{2 * int(parts[4]) + int(first)}.{rest}{parts[-1]}"
    if parts[2] == "gate":
        if parts[3] == "score":
            return f"{node}.gate_conv_beta.2.{parts[-1]}"
        return f"{node}.gate_conv_beta.0.{'norm.' * int(parts[4])}{parts[-1]}"
    assert parts[2] == "transforms" and parts[3] in DIRECTIONS
    conv = 1 if parts[3] == "up" else 2
    return f"{node}.res_{parts[3]}.1.{'norm.' * (int(parts[4]) - conv)}{parts[-1]}"


def _separable_key(position: int) -> str:
    """Depthwise convolution, 1x1 convolution, norm: positions 0, 1, 2 of ours."""
    return ("0.", "1.", "1.norm.")[position]
