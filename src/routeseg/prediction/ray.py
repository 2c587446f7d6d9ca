"""`predict_files` in several processes, on this machine or on a cluster, with Ray Data (the extra `routeseg[ray]`).

The driver lists the images and puts into Ray's object store what opens the network. Each worker, an actor, takes it
from there once, opens the network, and segments images block by block. Ray restarts a worker that dies and gives its
block to another one, which writes the same files again. An image at which several workers died is skipped.
No torch here.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from routeseg.data.decoding import MAX_PIXELS
from routeseg.description import NetworkDescription
from routeseg.errors import require
from routeseg.files import silent_stderr
from routeseg.prediction.files import (
    Job,
    Plan,
    Prediction,
    PredictionSummary,
    Runner,
    Segmenter,
    Skip,
    Target,
    collect,
    plan_work,
)
from routeseg.prediction.sources import Source, is_url

OpenRunner = Callable[..., Runner]  # called with `threads=N` in each worker
STORE_BYTES = 200 * 2**20  # Ray's object store, beside the network: images and results do not pass through it
BLOCKS_PER_WORKER, LARGEST_BLOCK = 8, 16  # images that a worker takes at once: few, to lose few and to end together
MAX_ATTEMPTS = 3  # workers that may die at one image
CONNECT_SECONDS = 5
DEVICES = ("cpu", "cuda")
DONE, SKIPPED, FAILED = "done", "skipped", "failed"


def predict_with_ray(
    open_runner: OpenRunner,
    network: NetworkDescription,
    images: Sequence[Source],
    output: Source,
    workers: int | None = None,
    address: str | None = None,
    device: str = "cpu",
    on_image: Callable[[], None] | None = None,
    resume: bool = False,
    pictures: bool = True,
    max_pixels: int = MAX_PIXELS,
    asked: Mapping[str, str | None] = MappingProxyType({}),
) -> PredictionSummary:
    """`predict_files` in several processes: the same files.

    open_runner  gives each process its runner, such as `partial(open_network, model)` or
                 `partial(OnnxNetwork, file, content=file.read_bytes())`; it travels to them as a pickle
    network      the network of the runner
    workers      how many processes; None: one for each core, or for each GPU, of this machine or the cluster
    address      None: a Ray of its own on this machine, which ends with the call; "auto" or "HOST:PORT": a running
                 cluster, whose machines have routeseg installed and see paths where this one sees them
    device       where the runner computes, cpu or cuda; with cuda Ray gives each process a GPU of its own
    asked        what is asked of the runner (`asked_of`), as far as it is known: with `resume` earlier results must be
                 of the same

    Inside a program that has called `ray.init`, that Ray is used, and left as it is.
    Raises ValueError as `predict_files` does, and if Ray is not installed, or there is no such cluster or GPU.
    """
    require("ray.data", "ray", "prediction in several processes (--workers, --ray_address)")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers is {workers}: it must be at least 1")
    if device not in DEVICES:
        raise ValueError(
            f"--device is {device}: with --workers or --ray_address, choose cpu, or cuda, which gives each worker a GPU"
        )
    plan = plan_work(network, images, output, resume, pictures, max_pixels, asked)
    _refuse_memory(plan)
    if not plan.jobs:  # all done
        return collect(plan, (), on_image)
    return collect(plan, _outcomes(open_runner, plan, workers, address, device), on_image)


def _outcomes(
    open_runner: OpenRunner,
    plan: Plan,
    workers: int | None,
    address: str | None,
    device: str,
) -> Iterator[Prediction | Skip]:
    """What becomes of the plan's jobs, in the order in which they are done."""
    import ray
    import ray.data

    opener = ray.cloudpickle.dumps(open_runner)
    with ray_session(address, workers, STORE_BYTES + len(opener)), _quiet_data():
        workers, threads, gpus = _share_out(workers, len(plan.jobs), device)
        attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Attempts).remote()
        blocks = max(-(-len(plan.jobs) // LARGEST_BLOCK), min(len(plan.jobs), BLOCKS_PER_WORKER * workers))
        rows = [
            {"number": number, "image": _pack(job.image), "location": _pack(job.location), "name": job.name}
            for number, job in enumerate(plan.jobs)
        ]
        data = ray.data.from_items(rows, override_num_blocks=blocks).map(
            _Worker,  # type: ignore[arg-type]
            fn_constructor_args=(ray.put(opener), plan.target, threads, attempts),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=threads,
            num_gpus=gpus,
        )
        try:
            for row in data.iter_rows():
                yield _unpack_outcome(row, plan)
        except ray.exceptions.RayError as error:
            raise ValueError(
                f"Ray gave up: {_last_line(error)}. The results that are written stay: go on from them with --resume"
            ) from error


class _Worker:
    """One process of the pool: row of a job -> row of its outcome."""

    def __init__(self, opener: Any, target: Target, threads: int, attempts: Any) -> None:
        import ray

        self.attempts, self.failure = attempts, ""
        try:
            self.segment = Segmenter(ray.cloudpickle.loads(ray.get(opener))(threads=threads), target)
        except ValueError as error:  # if it came from here, Ray would try again for ever
            self.failure = str(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import ray

        number = int(row["number"])
        outcome: dict[str, Any] = {"number": number, "kind": DONE, "reason": ""}
        outcome |= {"height": 0, "width": 0, "cost": 0.0, "full": 0.0}
        if self.failure:
            return outcome | {"kind": FAILED, "reason": _text(self.failure)}
        image = _unpack(row["image"])
        if ray.get(self.attempts.begin.remote(number)) > MAX_ATTEMPTS:
            reason = _text(f"{image}: {MAX_ATTEMPTS} processes died at it, perhaps for want of memory")
            return outcome | {"kind": SKIPPED, "reason": reason}
        try:
            result = self.segment(Job(image, _unpack(row["location"]), row["name"]))
        except ValueError as error:
            return outcome | {"kind": FAILED, "reason": _text(str(error))}
        except Exception as error:  # Ray would tell neither the image nor the cause
            return outcome | {"kind": FAILED, "reason": _text(f"{image}: {type(error).__name__}: {error}")}
        finally:
            self.attempts.end.remote(number)
        if isinstance(result, Skip):
            return outcome | {"kind": SKIPPED, "reason": _text(result.reason)}
        height, width = result.size
        return outcome | {"height": height, "width": width, "cost": result.cost_macs, "full": result.full_macs}


class _Attempts:
    """Counts, for each image, the workers that began it and did not finish it."""

    def __init__(self) -> None:
        self.begun: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        self.begun[number] += 1
        return self.begun[number]

    def end(self, number: int) -> None:
        del self.begun[number]


def _unpack_outcome(row: dict[str, Any], plan: Plan) -> Prediction | Skip:
    job = plan.jobs[row["number"]]
    if row["kind"] == FAILED:
        raise ValueError(row["reason"])
    if row["kind"] == SKIPPED:
        return Skip(job.image, job.name, row["reason"])
    return Prediction(job.image, job.name, (row["height"], row["width"]), row["cost"], row["full"])


def _share_out(workers: int | None, jobs: int, device: str) -> tuple[int, int, int]:
    """(workers, threads of each, GPUs of each) for the machines that Ray has. Raises ValueError if they are too few.

    A worker asks Ray for as many CPUs as it has threads, and no worker asks for more than the smallest machine has.
    Nothing else in the cluster needs a CPU, because the rows lie in the object store: the workers may take all of them.
    """
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(resources["CPU"]) for resources in machines if resources.get("CPU", 0) >= 1]
    if not cores:
        raise ValueError("the Ray cluster has no machine with a CPU: see what it has with `ray status`")
    most, gpus = sum(cores), 0
    if device == "cuda":
        most, gpus = int(sum(resources.get("GPU", 0) for resources in machines)), 1
        if most < (workers or 1):
            raise ValueError(
                f"--device {device} gives each worker a GPU, and Ray has {most}: lower --workers, or take --device cpu"
            )
    workers = min(workers or most, jobs)
    return workers, max(1, min(sum(cores) // workers, *cores)), gpus


@contextmanager
def ray_session(
    address: str | None = None, workers: int | None = None, store_bytes: int = STORE_BYTES
) -> Iterator[None]:
    """A Ray for this block: the one that this program has started, else one of our own, or a cluster."""
    import ray

    if address is not None:
        _check_reachable(address)
    if ray.is_initialized():
        if address is not None:
            raise ValueError(f"this program has started a Ray already, which is used: leave the address {address} out")
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # for Ray's notes on stderr
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options |= {"address": "local", "num_cpus": max(cores, workers or 1), "object_store_memory": store_bytes}
        options |= {"include_dashboard": False}
    try:
        with silent_stderr():  # Ray says in one line that it was told to be quiet
            ray.init(**options)
    except (OSError, RuntimeError, ValueError) as error:
        where = "start Ray" if address is None else f"reach a Ray cluster at {address}"
        raise ValueError(f"cannot {where}: {_last_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises ValueError if this is no address, and if nobody answers there: Ray itself would wait for minutes."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit()) or "//" in address:
        raise ValueError(f"--ray_address is {address!r}: give auto, or HOST:PORT as `ray start --head` prints it")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot reach a Ray cluster at {address}: {error}. `ray start --head` starts one") from error


@contextmanager
def _quiet_data() -> Iterator[None]:
    """In this block Ray Data shows no bars and no remarks."""
    import ray.data

    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before, level = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        context.enable_progress_bars = before
        logger.setLevel(level)


def _refuse_memory(plan: Plan) -> None:
    """Raises ValueError for memory://, because every process has its own."""
    for name in (plan.target.folder.locate(""), *(job.location for job in plan.jobs)):
        if isinstance(name, str) and name.startswith("memory:"):
            raise ValueError(f"only one process can see {name}: leave --workers out, or take another store")


def _pack(source: Source) -> bytes:
    """Bytes, because a column of a table takes no text that is not UTF-8."""
    return os.fsencode(source)


def _unpack(packed: bytes) -> Source:
    text = os.fsdecode(packed)
    return text if is_url(text) else Path(text)


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _last_line(error: BaseException) -> str:
    """The cause that one of Ray's errors tells, below a traceback."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
