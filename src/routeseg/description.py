"""What is known of a network without its weights: enough to predict with it and to count its cost. No torch here.

A network gives it (`describe`), and so does the metadata of an exported file (`from_metadata`; the file's format is in
docs/export.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from routeseg.config import LATER, NetworkConfig
from routeseg.counting import PartMacs
from routeseg.model.prices import Prices

if TYPE_CHECKING:
    from routeseg.model.grid import RoutedNetwork

METADATA_KEY, FORMAT = "routeseg", 3  # in an exported file: the key of its description, and the format of that


@dataclass(frozen=True)
class NetworkDescription:
    """A network without its weights; `routeseg.model_cost` takes it as it takes the network.

    config       what makes the network
    macs         what its parts cost
    fingerprint  tells networks apart
    prices       what prices cost, of a network with exits
    """

    config: NetworkConfig
    macs: PartMacs
    fingerprint: str
    prices: Prices | None = field(default=None, compare=False)  # which the fingerprint covers

    def as_metadata(self) -> dict[str, Any]:
        """The inverse of `from_metadata`."""
        known = {"config": self.config.as_dict(), "macs": self.macs.as_json(), "fingerprint": self.fingerprint}
        return known if self.prices is None else known | {"exits": self.prices.as_json()}

    @classmethod
    def from_metadata(cls, data: Mapping[str, Any]) -> NetworkDescription:
        """What an exported file says about its network. Raises ValueError if it says too little, or nonsense."""
        try:
            config = NetworkConfig.from_dict(data["config"])
            prices = None if config.exits is None else Prices.from_json(data["exits"], len(config.exits))
            macs = PartMacs.from_json(data["macs"], config.num_scales)
            return cls(config, macs, str(data["fingerprint"]), prices)
        except KeyError as error:
            raise ValueError(f"it has no {error.args[0]}") from error


def describe(model: RoutedNetwork) -> NetworkDescription:
    """The description of a network."""
    return NetworkDescription(model.config, model.macs, fingerprint(model), model.prices)


def fingerprint(model: RoutedNetwork) -> str:
    """16 hexadecimal digits that tell networks apart, made of configuration and weights."""
    facts = model.config.as_dict()
    for name, before in {"head": "decoder", "sizes": None}.items():  # later names: what was made before stays known
        if facts[name] == before:
            del facts[name]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for key, value in sorted(model.state_dict().items()):
        if key in LATER and bool((value == 1).all()):
            continue
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
