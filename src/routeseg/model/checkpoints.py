"""Reading networks from disk: folders, as `model.save` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from routeseg.files import CONFIG_FILE, WEIGHTS_FILE
from routeseg.model import DynamicRoutingNetwork

PRETRAINED = Path(__file__).parents[1] / "pretrained" / "camvid_small"


def load(folder: str | Path | None = None) -> DynamicRoutingNetwork:
    """The network of a checkpoint folder, in eval mode; without a folder, the small CamVid network that is shipped.

    Raises ValueError, naming the file, where the folder is no checkpoint, is damaged, or does not fit its config.
    """
    folder = Path(folder) if folder is not None else PRETRAINED
    config = read_config(folder)
    try:
        model = DynamicRoutingNetwork(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} describes no network: {error}") from error
    state = read_weights(folder)
    if any(key.startswith("head.") for key in state):
        raise ValueError(
            f"{folder} is a classifier, of `routeseg pretrain`: it segments nothing yet. Start from it with "
            f"`routeseg train --init {folder}`"
        )
    load_state(model, state, folder / WEIGHTS_FILE)
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The arguments of the network in a checkpoint folder. Raises ValueError where it is none."""
    if not folder.is_dir():
        raise ValueError(f"no checkpoint folder {folder}: give a folder with {WEIGHTS_FILE} and {CONFIG_FILE}")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            inside = [str(path.parent) for path in sorted(folder.glob(f"*/{WEIGHTS_FILE}"))]
            hint = f"Did you mean {inside[0]}?" if inside else "`routeseg train` writes such folders"
            raise ValueError(f"{folder} is no checkpoint: {name} is missing. {hint}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} describes no network: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG_FILE} describes no network: it holds no object")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder, in float32."""
    state = read_safetensors(folder / WEIGHTS_FILE)
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def load_state(model: DynamicRoutingNetwork, state: Mapping[str, Tensor], name: str | Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"{name} does not fit the network that its config describes: {first}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}. Is the file complete?") from error
