"""What is known of a network without its weights: enough to predict with it and to count its cost. No torch here.

A DynamicRoutingNetwork gives it (`describe`), and so does what an exported file says about itself (`from_metadata`; the
file's format is in docs/export.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from routeseg.space import Route, RoutingSpace

if TYPE_CHECKING:
    from routeseg.model import DynamicRoutingNetwork

METADATA_KEY, FORMAT = "routeseg", 1  # where an exported file says what it is, and the form in which it does
Colour = tuple[int, ...]


@dataclass(frozen=True)
class NetworkDescription:
    """A network without its weights; `routeseg.cost.macs.model_cost` takes it as it takes the network.

    route        the edges that the network has
    gated        whether it has gates
    palette      RGB 0..255 of each class
    pixel_mean, pixel_std   input normalisation of RGB in 0..1
    fingerprint  tells networks apart
    The others are the arguments of DynamicRoutingNetwork.
    """

    space: RoutingSpace
    route: Route
    num_classes: int
    base_channels: int
    stem_channels: int
    cell_operations: tuple[str, ...]
    gated: bool
    small_gate: bool
    class_names: tuple[str, ...]
    palette: tuple[Colour, ...]
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    fingerprint: str

    @classmethod
    def from_metadata(cls, data: Mapping[str, Any]) -> NetworkDescription:
        """What an exported file says about its network. Raises ValueError where it says too little, or nonsense."""
        try:
            space = RoutingSpace(data["depth"], data["num_scales"], bool(data["zeros_arrive"]))
            edges = data["route"]
            description = cls(
                space=space,
                route=Route.all_open(space) if edges is None else Route.from_named_edges(space, edges),
                num_classes=int(data["num_classes"]),
                base_channels=int(data["base_channels"]),
                stem_channels=int(data["stem_channels"]),
                cell_operations=tuple(data["cell_operations"]),
                gated=bool(data["gated"]),
                small_gate=bool(data["small_gate"]),
                class_names=tuple(str(name) for name in data["class_names"]),
                palette=tuple(tuple(int(part) for part in colour) for colour in data["palette"]),
                pixel_mean=tuple(float(value) for value in data["pixel_mean"]),
                pixel_std=tuple(float(value) for value in data["pixel_std"]),
                fingerprint=str(data["fingerprint"]),
            )
        except KeyError as error:
            raise ValueError(f"it has no {error.args[0]}") from error
        except TypeError as error:
            raise ValueError(str(error)) from error
        for name, expected in (
            ("class_names", description.num_classes),
            ("palette", description.num_classes),
            ("pixel_mean", 3),
            ("pixel_std", 3),
        ):
            if len(getattr(description, name)) != expected:
                raise ValueError(f"{name} has {len(getattr(description, name))} entries, expected are {expected}")
        return description


def describe(model: DynamicRoutingNetwork) -> NetworkDescription:
    """The description of a network."""
    return NetworkDescription(
        space=model.space,
        route=model.route,
        num_classes=model.num_classes,
        base_channels=model.base_channels,
        stem_channels=model.stem_channels,
        cell_operations=model.cell_operations,
        gated=model.gated,
        small_gate=model.small_gate,
        class_names=model.class_names,
        palette=model.palette,
        pixel_mean=tuple(model.normalize.mean.flatten().tolist()),
        pixel_std=tuple(model.normalize.std.flatten().tolist()),
        fingerprint=fingerprint(model),
    )


def fingerprint(model: DynamicRoutingNetwork) -> str:
    """16 hexadecimal digits that tell networks apart, made of configuration and weights."""
    digest = hashlib.sha256(json.dumps(model.arguments, sort_keys=True, default=str).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
