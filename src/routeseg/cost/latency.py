"""What a network takes in milliseconds on a machine: a table that `routeseg profile` measures (engine/profiling.py).

A network with exits (model/exits.py) has a time for each stretch of its way: from the image to the first exit, and from
each exit to the next. What an image takes is the sum over the stretches that it enters:

    fixed + share * running        if a share of its places goes on there
    whole                          if all of them do, or it decides as a whole

Decisions, and the decoder of the exit, are in it. A network without exits is one stretch, with all of its paths open.
An image that is looked at twice (model/closer.py) has two, the first look and the closer one. An image may be looked at
in several sizes: each has a table. Here nothing is measured, and torch is not imported.

Legend: K exits, T rows of a table of prices.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from routeseg.config import NO_GATE, NetworkConfig, is_size
from routeseg.files import read_json, write_json
from routeseg.space import Size, padded_size, size_words

FORMAT = 3  # of the file; 1 had times by part, 2 no time of a whole image
REPEATS = 11  # medians of 5 were off by 6 % on a restless machine
KINDS = ("fixed", "running", "whole")  # the times of a stretch
WHOLE = KINDS.index("whole")
# Fields that the time does not depend on.
UNTIMED = ("gate", "sizes", "class_names", "palette", "pixel_mean", "pixel_std")


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of a network on one machine, for one image of one size, from the image to its labels.

    size          height, width of the image
    device        cpu, cuda, ...
    precision     of the weights and maps, as the engine ran
    network       what the times depend on (`network_shape`); `fingerprint` is made of it
    stretches_ms  [K,3], fixed, running, whole; [1,3] without exits, [2,3] of two looks
    facts         how it was measured, machine, date, versions: kept in the file
    look          the size in which the image is looked at
    """

    size: tuple[int, int]
    device: str
    precision: str
    network: dict[str, Any]
    stretches_ms: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)
    look: Size = 1.0

    @property
    def exits_ms(self) -> np.ndarray:
        """Milliseconds of an image that leaves at each exit as a whole, float64 [K]; without exits, with all paths
        open [1]."""
        return np.cumsum(self.stretches_ms[:, WHOLE])

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell networks of other shapes apart; weights do not enter."""
        return hashlib.sha256(json.dumps(self.network, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """`latency_<device>_<HxW>_<precision>`, the file's name without its suffix; `_in_<look>` behind the size if it
        is not 1."""
        look = "" if self.look == 1 else f"_in_{size_words(self.look)}"
        return f"latency_{self.device}_{self.size[0]}x{self.size[1]}{look}_{self.precision}".replace(":", "")

    def check(self, config: NetworkConfig, name: str | Path) -> None:
        """Raises ValueError, naming the file, if the table belongs to another shape of network."""
        shape = network_shape(config)
        for key in shape:
            if shape[key] != self.network.get(key):
                raise ValueError(
                    f"{name} is the latency of another network: {key} is {self.network.get(key)} there, {shape[key]} "
                    "here. Measure this one: `routeseg profile`"
                )

    def as_dict(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "format": FORMAT,
            "size": list(self.size),
            "look": self.look,
            "device": self.device,
            "precision": self.precision,
            "fingerprint": self.fingerprint,
            "network": self.network,
            "stretches_ms": [dict(zip(KINDS, row, strict=True)) for row in self.stretches_ms.tolist()],
            **self.facts,
        }

    def write(self, path: str | Path) -> None:
        write_json(path, self.as_dict())

    @classmethod
    def read(cls, path: str | Path) -> LatencyTable:
        """The inverse of `write`. Raises ValueError, naming the file, if it is damaged or no latency table."""
        try:
            return cls.from_dict(read_json(path))
        except FileNotFoundError as error:
            raise ValueError(f"no latency table {path}: `routeseg profile` writes one") from error
        except (KeyError, TypeError, AttributeError, OSError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path} is no latency table, or damaged ({reason}): run `routeseg profile` again"
            ) from error

    @classmethod
    def read_all(cls, path: str | Path) -> list[LatencyTable]:
        """The table of a file, or those of a folder, such as a checkpoint's. Raises ValueError if there is none."""
        if not Path(path).is_dir():
            return [cls.read(path)]
        if not (files := sorted(Path(path).glob("latency_*.json"))):
            raise ValueError(f"no latency table in {path}: `routeseg profile` writes one")
        return [cls.read(file) for file in files]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTable:
        """The inverse of `as_dict`. Raises ValueError, KeyError or TypeError if it is none."""
        rest = dict(data)
        if (form := rest.pop("format")) != FORMAT:
            raise ValueError(f"it has format {form!r}, this version reads {FORMAT}")
        (height, width), look, device, precision, network, stretches, fingerprint = (
            rest.pop(key) for key in ("size", "look", "device", "precision", "network", "stretches_ms", "fingerprint")
        )
        look = tuple(look) if isinstance(look, list) else look
        if not is_size(look):
            raise ValueError(f"it has the look {look!r}")
        shape, count = _checked(network)
        count = len(look) if isinstance(look, tuple) else count
        times = np.array([[float(row[kind]) for kind in KINDS] for row in stretches])
        table = cls((int(height), int(width)), str(device), str(precision), shape, times, rest, look)
        if times.shape != (count, len(KINDS)):
            raise ValueError(f"times of {len(times)} stretches, the network has {count}")
        if not (np.isfinite(times) & (times >= 0)).all():
            raise ValueError("a time is negative or no number")
        if table.fingerprint != fingerprint:
            raise ValueError("network and fingerprint do not belong together")
        return table


def stretches_at(
    tables: Sequence[LatencyTable], config: NetworkConfig, size: tuple[int, int], name: str | Path, look: Size = 1.0
) -> np.ndarray | None:
    """The stretches [K,3] of an image (height, width) that is looked at in this size, in milliseconds, from tables of
    images of any sizes. Between two of them they are linear in the number of pixels, beyond the last one in proportion
    to it. None: there is no table of the look.

    Raises ValueError, naming the file, if a table belongs to another network.
    """

    def pixels(image: tuple[int, int]) -> int:
        return math.prod(padded_size(config.space, *image))

    for table in tables:
        table.check(config, name)
    in_order = sorted(tables, key=lambda table: table.size == size)
    known = {pixels(table.size): table.stretches_ms for table in in_order if table.look == look}
    if not known:
        return None
    asked, sizes = pixels(size), sorted(known)
    if sizes[0] <= asked <= sizes[-1]:
        times = np.stack([known[one] for one in sizes], axis=-1)  # [K,3,sizes]
        return np.apply_along_axis(lambda ms: np.interp(asked, sizes, ms), -1, times)
    nearest = sizes[0] if asked < sizes[0] else sizes[-1]
    return known[nearest] * asked / nearest


def mean_ms(stretches: np.ndarray, frequencies: np.ndarray, places: int | None = None) -> np.ndarray:
    """Milliseconds of an image in the mean, float64 [T], if these shares [T,K] leave at each exit. Where all places go
    all the way, it is the time of nearly all of them, from which a budget's price is interpolated: that of all is less.

    stretches  [K,3]
    places     how many each image has, if the shares are of its places; None: they are of images
    """
    fixed, running, whole = stretches.T
    shares = 1 - frequencies.cumsum(1) + frequencies  # that enter each stretch
    if places is None:
        means: np.ndarray = shares @ whole
        return means
    shares = (shares * places).round() / places
    some = fixed + shares * running
    nearly = (shares == 1).all(1, keepdims=True) & (np.arange(len(stretches)) > 0)
    return np.select([shares == 0, (shares == 1) & ~nearly], [0, whole], some).sum(1)


def _checked(network: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The shape of a network from a file, and how many stretches it has. Raises ValueError, KeyError or TypeError if it
    is none."""
    shape = dict(network)
    gate = {} if shape["gated"] else {"gate": NO_GATE}
    config = NetworkConfig.from_dict({name: value for name, value in shape.items() if name != "gated"} | gate)
    return shape, 1 if config.exits is None else len(config.exits)


def network_shape(config: NetworkConfig) -> dict[str, Any]:
    """What the time of a forward depends on, as JSON has it: space, widths, operations, gates; not the weights."""
    shape = {name: value for name, value in config.as_dict().items() if name not in UNTIMED}
    if len(config.whole_route) == len(config.space.edges):
        shape["route"] = None
    return json.loads(json.dumps(shape | {"gated": config.gated}))
