"""Is this machine faster in bfloat16 than in float32? Measured, for it depends on more than its instructions.

A CPU without instructions for bfloat16 emulates it: a product of matrices then takes tens or hundreds of times as long.
A CPU with them need not be faster, for float32 may have the better kernels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch

clock = time.perf_counter
ROUNDS = 3
GAIN = 1.05  # bfloat16 must be so many times as fast, for float32 is more exact
# Rows of the matrices. A large product takes seconds if it is emulated; a small one tells little on many cores.
SMALL, LARGE = 128, 1024
CLEAR = 2.0  # a work that takes so many times as long as another is clearly slower
WARM_UP_S = 1.0  # what the first turn of a work may take longer than the next
EMULATED = 10.0  # a CPU with instructions for bfloat16 does not take so many times as long as in float32


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


def pays(float32_s: float, bfloat16_s: float) -> bool:
    """Whether bfloat16 is faster, and by enough to give up the exactness of float32."""
    return bfloat16_s * GAIN <= float32_s


@cache
def product_ratio() -> float:
    """How many times as long a product of matrices takes on this CPU in bfloat16 as in float32."""
    ratio = 0.0
    for size in (SMALL, LARGE):
        matrices = [torch.ones(size, size, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
        float32_s, bfloat16_s = (min(some) for some in take_turns([partial(torch.mm, x, x) for x in matrices]))
        ratio = bfloat16_s / float32_s
        if ratio >= EMULATED:
            break
    return ratio


def product_words() -> str:
    """`product_ratio` in words."""
    return f"on this CPU a product of matrices takes {product_ratio():.3g} times as long in bfloat16 as in float32"


def on_gpu(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16, and does not emulate it (NVIDIA: from compute capability 8.0 on)."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
