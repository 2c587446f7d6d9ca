"""Parts by name: the gates, cell operations, heads, choices and backbones that a configuration may ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Name -> class. A class may stand here as "package.module:Class", and is imported when it is first asked for, so
    that a name can be checked without PyTorch.

    `registry[name] = Class` adds one. Raises ValueError for a name that is there already.
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind, self._entries = kind, dict[str, Any](entries)

    def __getitem__(self, name: str) -> T:
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(import_module(module), attribute)
        return entry

    def __setitem__(self, name: str, part: T) -> None:
        if name in self._entries:
            raise ValueError(f"there is a {self.kind} {name!r} already: choose another name")
        self._entries[name] = part

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


GATES: Registry[Any] = Registry(
    "gate", {"soft": "routeseg.model.gate:SoftGate", "softmax": "routeseg.model.gate:SoftmaxGate"}
)
OPERATIONS: Registry[Any] = Registry(
    "cell operation",
    {
        "sep_conv_3x3": "routeseg.model.operations:SepConv3x3",
        "sep_conv_5x5": "routeseg.model.operations:SepConv5x5",
        "identity": "routeseg.model.operations:Identity",
    },
)
HEADS: Registry[Any] = Registry(
    "head", {"decoder": "routeseg.model.decoder:Decoder", "classifier": "routeseg.model.classifier:ClassifierHead"}
)
CHOICES: Registry[Any] = Registry(
    "choice", {"loss": "routeseg.model.choice:LossChoice", "entropy": "routeseg.model.choice:EntropyChoice"}
)
BACKBONES: Registry[Any] = Registry(
    "backbone",
    {
        "efficientnet_lite0": "routeseg.model.backbone:EfficientNetLite0",
        "efficientnet_lite1": "routeseg.model.backbone:EfficientNetLite1",
        "efficientnet_lite2": "routeseg.model.backbone:EfficientNetLite2",
    },
)
