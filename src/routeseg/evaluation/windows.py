"""Where windows lie that slide over an image."""

from __future__ import annotations

OVERLAP = 0.33  # of two windows next to each other, as a share of the window's side


def starts(side: int, window: int, overlap: float) -> list[int]:
    """Where the windows of a side begin: the first at 0, the last at its end, each overlapping the one before."""
    step = max(1, int(window * (1 - overlap)))
    return [*range(0, side - window, step), side - window]
