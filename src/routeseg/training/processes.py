"""Several processes that train one network: how many there are, and how they end together.

How they exchange values: collectives.py.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch

TIMEOUT = timedelta(minutes=10)  # a process waits so long for the others: then a dead machine is noticed
POLL_SECONDS = 0.5
LOST = (
    "another process of this job died, or can no longer be reached. The last checkpoint, if one was written, is kept: "
    "the same command with --resume goes on from it, also with another number of processes"
)


class TrainingStopped(RuntimeError):
    """A training ended early; the message tells why."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a run, which was saved at that step; the message tells how it goes on.

    signal  its number
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class ProcessLost(TrainingStopped):
    """Another process of the job died, or cannot be reached."""


def count_processes(devices: int | Literal["auto"], on_gpu: bool) -> tuple[int, int]:
    """(processes on this machine, machines): from torchrun's environment if it started this process, else from
    `devices`.

    Without torchrun, "auto" is every GPU, or one process on a CPU. Raises ValueError if torchrun and `devices`
    disagree, and for more processes than there are GPUs.
    """
    if devices != "auto" and devices < 1:
        raise ValueError(f"--devices is {devices}: it must be at least 1, or auto")
    gpus = torch.cuda.device_count() if on_gpu else 0
    local, machines = (max(1, gpus) if devices == "auto" else devices), 1
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        machines = world // local
        if local * machines != world:
            raise ValueError(
                f"torchrun started {local} processes on this machine and {world} in all: give every machine the same "
                "--nproc_per_node"
            )
        if devices not in ("auto", local):
            raise ValueError(
                f"--devices is {devices}, but torchrun started {local} processes on this machine: leave --devices out"
            )
    if on_gpu and local > gpus:
        raise ValueError(
            f"{local} processes were asked for, and this machine shows {gpus} GPUs: a GPU serves one process. "
            f"Ask for {gpus}, or set --accelerator cpu"
        )
    return local, machines


def connection_lost(error: BaseException) -> bool:
    """Whether the error says that another process cannot be reached."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()  # gloo raises a plain RuntimeError
    return isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text)


@contextmanager
def ending_together(children: Callable[[], Sequence[subprocess.Popen]]) -> Iterator[None]:
    """Ends this process, with a message and exit code 1, once another process of its job has ended early.

    A process that waits for a dead one inside the communication library, or on its GPU, hears no signal and no
    exception. So a thread ends it: at SIGTERM (torchrun sends it to the others when one dies), when a child fails, and
    when the launcher that started it is gone. Files are written whole or not at all, so that a process may end at any
    moment.
    """
    done = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handler = signal.signal(
        signal.SIGTERM, lambda *_: None
    )  # without a handler the process would end without a message
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    launcher = os.getppid() if started_by_a_launcher() else None
    watch = threading.Thread(target=_watch, args=(reader, done, children, launcher), daemon=True, name="job-watch")
    watch.start()
    try:
        yield
    except ProcessLost:
        handler = signal.SIG_IGN  # SIGTERM, which follows, must not end this process before it has said why
        raise
    finally:
        done.set()
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler)
        os.close(writer)  # wakes the thread
        watch.join()
        os.close(reader)


def started_by_a_launcher() -> bool:
    """Whether torchrun, or the first process of `--devices`, started this process: it ends when its launcher does."""
    elastic = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    return elastic or int(os.environ.get("LOCAL_RANK", 0)) > 0


def _watch(
    reader: int, done: threading.Event, children: Callable[[], Sequence[subprocess.Popen]], launcher: int | None
) -> None:
    while not done.is_set():
        if select.select([reader], [], [], POLL_SECONDS)[0] and signal.SIGTERM in os.read(reader, 64):
            break
        if any(child.poll() for child in children()) or launcher not in (None, os.getppid()):
            break
    if done.wait(POLL_SECONDS):  # an exception came first, and tells the reason
        return
    print(f"routeseg: stopped: {LOST}", file=sys.stderr, flush=True)
    for child in children():
        child.kill()
    os._exit(1)
