"""A node of the grid (Sec. 3.2): its cell, its gate, and the transforms on its edges.

Legend: B images, C channels, h, w the size of a feature map; alpha [B,3] activations up, keep, down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from routeseg.model.gate import Gate
from routeseg.model.layers import Transform
from routeseg.model.operations import Operation
from routeseg.model.places import Running
from routeseg.registry import GATES, OPERATIONS
from routeseg.space import DIRECTIONS


class Cell(nn.ModuleDict):
    """H = sum of the operations on X (Eq. 1): [B,C,h,w] -> [B,C,h,w]."""

    def __init__(self, channels: int, operations: Sequence[str]) -> None:
        super().__init__({name: OPERATIONS[name](channels) for name in operations})

    @property
    def operations(self) -> dict[str, Operation]:
        """The operations by name."""
        return dict(self.items())  # type: ignore[arg-type]  # which ModuleDict takes for any modules

    def forward(self, features: Tensor, drop_path: float = 0.0, running: Running | None = None) -> Tensor:
        """With `drop_path` each operation but identity is dropped per image with this probability, and the others are
        divided by the keep probability (scheduled drop path; training only). `running` tells which pixels run; None:
        all."""
        total: Tensor | None = None
        for operation in self.operations.values():
            out = operation(features) if running is None else operation.among(features, running)
            if drop_path > 0 and operation.droppable:
                keep = torch.rand(len(out), 1, 1, 1, device=out.device) >= drop_path
                out = out * (keep / (1.0 - drop_path)).to(out.dtype)
            total = out if total is None else total + out
        assert total is not None
        return total


class RoutingNode(nn.Module):
    """Cell, gate (None: every direction is open) and transforms of a node with these directions."""

    def __init__(
        self, channels: int, directions: Sequence[int], operations: Sequence[str], gate: str | None, small_gate: bool
    ) -> None:
        super().__init__()
        self.directions = tuple(directions)
        self.cell = Cell(channels, operations)
        self.transforms = nn.ModuleDict({DIRECTIONS[d]: Transform(channels, d) for d in self.directions})
        self.gate: Gate | None = None if gate is None else GATES[gate](channels, len(self.directions), small_gate)

    def activations(self, features: Tensor) -> Tensor:
        """alpha [B,3], float32: 0 if the node lacks the direction, 1 on the others if it has no gate."""
        if self.gate is None:
            return self.by_direction(features.new_ones(len(features), len(self.directions), dtype=torch.float32))
        return self.by_direction(self.gate(features))

    def by_direction(self, alpha: Tensor) -> Tensor:
        """Activations of the node's directions [B,D] as [B,3], 0 for those that it lacks."""
        if len(self.directions) == len(DIRECTIONS):
            return alpha
        all_of_them = alpha.new_zeros(len(alpha), len(DIRECTIONS))
        all_of_them[:, self.directions] = alpha
        return all_of_them

    def transform(self, direction: int, features: Tensor, running: Running | None = None) -> Tensor:
        """T_j(H) of Eq. 5."""
        return cast(Transform, self.transforms[DIRECTIONS[direction]])(features, running)
