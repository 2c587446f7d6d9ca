"""A stopwatch for works that compete: each in turn, so that all of them meet the same moods of the machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

clock = time.perf_counter
ROUNDS = 3
CLEAR = 2.0  # a work that takes so many times as long as another is clearly slower
WARM_UP_S = 1.0  # what the first turn of a work may take longer than the next


def take_turns(
    works: Sequence[Callable[[], object]],
    rounds: int = ROUNDS,
    patience_s: float = math.inf,
    agreed: Callable[[list[float]], list[float]] = list,
) -> list[list[float]]:
    """The seconds of each work, round by round. One more round comes first, which warms up and does not count.

    patience_s  if it is given, a work that is clearly slower than another has no further turn, and no round begins once
                so many seconds have passed; of a work that had no other turn the first one counts
    agreed      the seconds of a round -> those by which all processes of a job decide this
    """
    seconds: list[list[float]] = [[] for _ in works]
    racing, passed = list(range(len(works))), 0.0
    for number in range(1 + rounds):
        for place in racing:
            start = clock()
            works[place]()
            seconds[place].append(clock() - start)
        if patience_s < math.inf:
            found = agreed([seconds[place][-1] for place in racing])
            passed += sum(found)
            most = CLEAR * min(found) + (WARM_UP_S if number == 0 else 0.0)
            racing = [place for place, one in zip(racing, found, strict=True) if one <= most]
            if passed >= patience_s:
                break
    return [times[1:] or times for times in seconds]
