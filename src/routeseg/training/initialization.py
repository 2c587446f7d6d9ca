"""Starts a network from the weights of another one, by name: a classifier, or a segmenter of other classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from routeseg.config import NetworkConfig
from routeseg.files import best_of_run
from routeseg.model.checkpoints import read_config, read_header, read_weights
from routeseg.model.grid import RoutedNetwork

SIZE_FIELDS = ("depth", "num_scales", "base_channels", "stem_channels", "cell_operations")
FREE_FIELDS = frozenset(
    ("num_classes", "class_names", "palette", "pixel_mean", "pixel_std", "head")
)  # may differ without a word
# What budgets rest on.
CALIBRATED = tuple(
    f"exits.{name}" for name in ("costs", "prices", "frequencies", "scores", "gates", "others", "wholes")
)
LISTED = 4  # names in a line of a report


@dataclass(frozen=True)
class InitReport:
    """What `initialize` took from a checkpoint and what it left, by the names of the tensors.

    used            in both, in the same shape; `values` is how many numbers they hold
    not_in_network  only in the checkpoint: not used
    other_shape     in both, in different shapes: not used; (name, shape in the checkpoint, shape in the network)
    missing         only in the network: they keep the values that they had
    differences     arguments that differ: (name, in the checkpoint, in the network)
    """

    source: str
    used: list[str]
    values: int
    not_in_network: list[str]
    other_shape: list[tuple[str, list[int], list[int]]]
    missing: list[str]
    differences: list[tuple[str, Any, Any]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        total = len(self.used) + len(self.other_shape) + len(self.missing)
        lines = [
            f"initialised from {self.source}: {len(self.used)} of the network's {total} tensors "
            f"({self.values / 1e6:.3f} M values)",
            *_listed("not used, the network has no such tensor", self.not_in_network),
            *_listed("not used, of another shape", [f"{n} ({a} there, {b} here)" for n, a, b in self.other_shape]),
            *_listed("not in the checkpoint, trained from scratch", self.missing),
        ]
        return "\n".join(
            [*lines, *(f"  {name} is {there} there, {here} here" for name, there, here in self.differences)]
        )


def initialize(model: RoutedNetwork, folder: str | Path) -> InitReport:
    """Copies into the network what a checkpoint folder holds under the same name, in the same shape.

    The folder may hold a classifier of `routeseg pretrain`, or a segmenter of any classes. The network also takes its
    input normalisation. Raises ValueError, and changes nothing, if the folder is no checkpoint, or if fewer than half
    of the tensors of the network's stem and nodes fit.
    """
    folder = Path(best_of_run(folder))
    config, stored, here = read_config(folder), read_header(folder), model.state_dict()
    there = {key: value for key, value in stored.items() if key in here}
    if any(getattr(config, name) != getattr(model.config, name) for name in ("exits", "choice", "place", "sizes")):
        there = {key: value for key, value in there.items() if not key.startswith(CALIBRATED)}  # another's budgets
    used = [key for key in here if key in there and there[key].shape == tuple(here[key].shape)]
    other = [key for key in here if key in there and there[key].shape != tuple(here[key].shape)]
    differences = differences_of(config, model.config)
    body = [key for key in here if key.startswith(("stem.", "nodes."))]
    fitting = len(set(used) & set(body))
    if 2 * fitting < len(body):
        raise ValueError(
            f"{folder} does not fit the network: {fitting} of the {len(body)} tensors of its stem and nodes are there "
            f"in the same shape. {_reason(differences)}"
        )
    report = InitReport(
        source=str(folder),
        used=used,
        values=sum(here[key].numel() for key in used),
        not_in_network=sorted(set(stored) - set(here)),
        other_shape=[(key, list(there[key].shape), list(here[key].shape)) for key in other],
        missing=[key for key in here if key not in there],
        differences=differences,
    )
    model.load_state_dict(read_weights(folder, used), strict=False)
    adopt_normalization(model, config)
    return report


def differences_of(
    there: NetworkConfig, here: NetworkConfig, free: Collection[str] = FREE_FIELDS
) -> list[tuple[str, Any, Any]]:
    """The fields, but for those that are `free`, that make another network: (name, value there, value here)."""
    return [
        (name, value, getattr(here, name))
        for name, value in there.as_dict().items()
        if name not in free and value != getattr(here, name)
    ]


def adopt_normalization(model: RoutedNetwork, config: NetworkConfig) -> None:
    """Gives the network the input normalisation of a checkpoint: its weights know no other."""
    model.set_normalization(config.pixel_mean, config.pixel_std)


def _reason(differences: list[tuple[str, Any, Any]]) -> str:
    """The likely reason, and the remedy, in words."""
    sizes = [d for d in differences if d[0] in SIZE_FIELDS]
    if not sizes:
        return "Its config does not tell why: did another program write the file?"
    said = ", ".join(f"{name} is {there} there and {here} here" for name, there, here in sizes)
    return f"The likely reason: {said}. Set {', '.join(f'--model.{name} {there}' for name, there, _ in sizes)}"


def _listed(what: str, names: list[str]) -> list[str]:
    """One line: how many tensors, and their names; if there are many, how many of each part of the network."""
    if not names:
        return []
    if len(names) <= LISTED:
        return [f"  {len(names)} {what}: {', '.join(names)}"]
    groups = Counter(_part(name) for name in names)
    return [f"  {len(names)} {what}: {', '.join(f'{part} ({count})' for part, count in groups.items())}"]


def _part(name: str) -> str:
    """nodes.3-1.gate.score.bias -> nodes.*.gate, decoder.merge.0.0.weight -> decoder.merge."""
    first, *rest = name.split(" ")[0].split(".")
    return ".".join([first, "*", *rest[1:2]] if first == "nodes" else [first, *rest[:1]])
