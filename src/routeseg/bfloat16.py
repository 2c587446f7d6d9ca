"""Is this machine faster in bfloat16 than in float32? Measured, for it depends on more than its instructions.

A CPU without instructions for bfloat16 emulates it: a product of matrices then takes tens or hundreds of times as long.
A CPU with them need not be faster, for float32 may have the better kernels.
"""

from __future__ import annotations

from functools import cache, partial

import torch

from routeseg import stopwatch

GAIN = 1.05  # bfloat16 must be so many times as fast, for float32 is more exact
# Rows of the matrices. A large product takes seconds if it is emulated; a small one tells little on many cores.
SMALL, LARGE = 128, 1024
EMULATED = 10.0  # a CPU with instructions for bfloat16 does not take so many times as long as in float32


def pays(float32_s: float, bfloat16_s: float) -> bool:
    """Whether bfloat16 is faster, and by enough to give up the exactness of float32."""
    return bfloat16_s * GAIN <= float32_s


@cache
def product_ratio() -> float:
    """How many times as long a product of matrices takes on this CPU in bfloat16 as in float32."""
    ratio = 0.0
    for size in (SMALL, LARGE):
        matrices = [torch.ones(size, size, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
        float32_s, bfloat16_s = map(min, stopwatch.take_turns([partial(torch.mm, x, x) for x in matrices]))
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
