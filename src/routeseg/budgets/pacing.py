"""A frame time that holds: how much each frame of a video may cost in a network with exits. Nothing is measured here,
and torch is not imported.

A budget keeps the mean of many images (model/exits.py). A deadline is about each frame, so here a frame is told what
it costs, one of a few levels: where it leaves, or how many of its places go on. Which level that is, the frames before
it say:

    the dearest level at which each of the last n frames would have been in time.

So one slow frame counts at once, and it is forgotten once n others were faster. If times only scatter, the next frame
is the slowest of n + 1 with a chance of 1 in n + 1, whatever their distribution. Where levels lie far apart a few
frames are enough, and they let a frame go far again soon after a load has gone; where a time lies just at what was
asked, more are needed. So n learns: it grows by LESSON with each frame that was late and need not have been, and
shrinks by 1 with each other. It stands still if 1 frame in LESSON + 1 is late, whatever the times do: fewer than 5 in
100, without a margin that somebody would have to choose. A load that begins makes one frame late each time; that frame
has felt only the end of what comes, so the one behind a late frame has the first level, and shows how slow the machine
is now.

What a frame would have taken at another level:

    rest + pace * weight of the level

where `rest` is all but the network (decoding, drawing, writing), `pace` what the network took for a weight of 1, and
the weights say how the levels' times compare on this machine when nothing else runs.

Legend: N levels.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import NamedTuple

import numpy as np

FEWEST, MOST = 8, 75  # frames that are remembered
LESSON = 24  # of them, for each frame that is late


class Allowed(NamedTuple):
    """The level of the next frame, and the share of the full network's cost that its time would have allowed."""

    level: int
    share: float


class Pacer:
    """Says of each frame how far it goes, and is told afterwards what it took.

    costs     [N] of the levels, as shares of the full network's, ascending
    frame_ms  what a frame may take
    weights   [N], how the times of the levels compare, ascending; None: as their costs do
    """

    def __init__(self, costs: np.ndarray, frame_ms: float, weights: np.ndarray | None = None) -> None:
        self.costs, self.frame_ms = np.asarray(costs, float), frame_ms
        self.weights = self.costs if weights is None else np.asarray(weights, float)
        self._seen: deque[tuple[float, float]] = deque(maxlen=MOST)  # pace and rest of a frame, ms; the newest first
        self._memory = FEWEST  # n
        self._was_late = False  # the last frame, and need not have been

    def next(self) -> Allowed:
        """The level of the next frame: the cheapest as long as nothing is known, behind a late frame, and if no other
        is in time."""
        if self._was_late:
            return Allowed(0, float(self.costs[0]))
        last = itertools.islice(self._seen, self._memory)
        room = min(((self.frame_ms - rest) / pace for pace, rest in last), default=0.0)
        level = int(np.searchsorted(self.weights, room, side="right")) - 1
        return Allowed(max(level, 0), float(np.interp(room, self.weights, self.costs)))

    def saw(self, level: int, network_ms: float, frame_ms: float) -> None:
        """What a frame of this level took: the network, and all in all."""
        self._was_late = frame_ms > self.frame_ms and level > 0
        self._memory = int(np.clip(self._memory + (LESSON if self._was_late else -1), FEWEST, MOST))
        self._seen.appendleft((max(network_ms, 1e-6) / self.weights[level], max(frame_ms - network_ms, 0.0)))


def time_weights(costs: np.ndarray, times_ms: np.ndarray) -> np.ndarray:
    """How the times of the levels compare, given those that were measured [N]: float64 [N], the last is 1. A level that
    takes longer than a dearer one counts as that, and so is passed over.

    A measurement that something disturbed does no great harm: weights lie between the costs (time and cost are
    proportional) and 1 (all levels take the same time).
    """
    costs = np.asarray(costs, float) / costs[-1]
    faster = np.minimum.accumulate(np.asarray(times_ms, float)[::-1])[::-1]
    return np.clip(faster / faster[-1], costs, 1.0)
