"""Forwards of known routes, recorded and replayed: a CUDA graph launches all kernels of a forward at once.

One image does not fill a GPU: the forward is bound by the host, which launches some hundred kernels one by one. If the
route is known beforehand (a given route, a static network), the host has nothing to decide, and the launches can be
recorded. A route that gates choose is decided on the host, layer by layer, and cannot be recorded.

Legend: B images, H, W image size, K classes, L depth, S scales.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

# Images [B,3,H,W] to logits [B,K,H,W] on their device and gates [B,L+1,S,3] on the host.
Forward = Callable[[Tensor], tuple[Tensor, np.ndarray]]

SEEN = 1000  # keys: their misses are counted
KEPT = 4  # recordings: each holds the memory of a whole forward, some 0.5 GB for an image of 1024x2048
WARM_UP = 3  # forwards before a capture, as PyTorch's notes on CUDA graphs advise: libraries set themselves up in them


class Recorder(Protocol):
    """Records what a forward launches."""

    def record(self, forward: Forward, images: Tensor) -> Forward:
        """The same forward for images of this shape and dtype. Raises RuntimeError if it cannot be recorded."""
        ...


class CudaRecorder:
    """Records CUDA graphs. A replay reads its images from a buffer of its own; what it returns is a copy."""

    def record(self, forward: Forward, images: Tensor) -> Forward:
        """See `Recorder`."""
        device, buffer = images.device, images.clone()
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    forward(buffer)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # thread_local: a loader's thread that copies to the GPU meanwhile does no harm
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits, gates = forward(buffer)

        copied = torch.cuda.Event()

        def replay(images: Tensor) -> tuple[Tensor, np.ndarray]:
            with torch.cuda.device(device):
                torch.cuda.current_stream().wait_event(copied)  # the last replay may be on another stream
                buffer.copy_(images)
                graph.replay()
                result = logits.clone()
                copied.record()
                return result, gates

        return replay


class Recordings:
    """The recordings of an engine that were last used: `recordings(key, forward, images)` is `forward(images)`.

    A key is recorded when it comes for the second time: images whose size comes only once are not worth it. If more
    keys take turns than are kept, a key that was given up is recorded again at its 4th, 8th, 16th miss: so recording
    never takes most of the time. If recording fails, all forwards run without it from then on, and a warning is logged.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder: Recorder | None = recorder
        self.kept: OrderedDict[Hashable, Forward] = OrderedDict()
        self.misses: Counter[Hashable] = Counter()
        self.lock = threading.Lock()  # a recording has one buffer

    def __call__(self, key: Hashable, forward: Forward, images: Tensor) -> tuple[Tensor, np.ndarray]:
        """key  tells apart all that a recording cannot change: shape and dtype of the images, and the route."""
        with self.lock:
            recorded = self._recorded(key, forward, images)
            if recorded is not None:
                return recorded(images)
        return forward(images)

    def _recorded(self, key: Hashable, forward: Forward, images: Tensor) -> Forward | None:
        """The recording of this key, made now if it is time for it."""
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        if len(self.misses) == SEEN:
            self.misses.clear()
        self.misses[key] += 1
        misses = self.misses[key]
        if self.recorder is not None and misses > 1 and misses & (misses - 1) == 0:  # a power of two
            if len(self.kept) == KEPT:
                self.kept.popitem(last=False)
            try:
                self.kept[key] = self.recorder.record(forward, images)
            except RuntimeError as error:
                self.recorder = None
                self.kept.clear()  # perhaps memory is short
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                logging.getLogger("routeseg").warning("running without CUDA graphs, recording one failed: %s", reason)
        return self.kept.get(key)
