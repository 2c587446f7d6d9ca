"""What crosses between host and device: all of it passes through here.

A copy to the host waits until the device has finished, and each copy costs a launch. So what belongs together crosses
together: one copy per layer in each direction at most (eager.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_host(values: Tensor) -> np.ndarray:
    """Values of a device on the host; waits for them."""
    return values.cpu().numpy()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device, which does not wait for it. The array may be kept, so do not change it."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class DeviceArrays:
    """Places (int64) and weights (float32), each [n], on a device: brought in one copy, found by their values."""

    def __init__(self, arrays: Sequence[np.ndarray], device: torch.device) -> None:
        self._found: dict[tuple[str, bytes], Tensor] = {}
        unique = {_key(array): array for array in arrays}
        if not unique:
            return
        bits = [array if array.dtype == np.float32 else array.astype(np.int32) for array in unique.values()]
        moved = to_device(np.concatenate([part.view(np.int32) for part in bits]), device)
        for (key, array), part in zip(unique.items(), moved.split([len(array) for array in bits]), strict=True):
            self._found[key] = part.view(torch.float32) if array.dtype == np.float32 else part

    def __getitem__(self, array: np.ndarray) -> Tensor:
        """The array of these values on the device, int32 or float32; one of those given."""
        return self._found[_key(array)]


def _key(array: np.ndarray) -> tuple[str, bytes]:
    return array.dtype.str, array.tobytes()
