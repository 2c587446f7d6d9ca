"""A network behind HTTP in several processes or on several machines, with Ray Serve. What waits runs as one batch.

    python examples/serve_ray.py runs/my/best --replicas 2
    curl --data-binary @street.jpg "http://127.0.0.1:8000/segment?budget=40%25"

What it takes and answers is that of serve_fastapi.py, which must lie beside it. A batch may hold images of any sizes
and budgets: images of one size that are looked at alike run together, each for its own budget, and each leaves the
network where it wants to. It needs the extra `routeseg[serve]` and `ray[serve]`.
"""

import argparse
import asyncio
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ray
import torch
from fastapi import FastAPI, HTTPException, Request, Response
from ray import serve
from ray.serve.config import HTTPOptions
from serve_fastapi import Answer, admit, decode, parse, read, respond

import routeseg
from routeseg.cost.macs import model_cost
from routeseg.description import describe
from routeseg.errors import BudgetNotKept
from routeseg.labels import label_map
from routeseg.model.prices import Look
from routeseg.prediction.files import Prediction, Segmented, pad_small
from routeseg.prediction.image import SegmentedImage
from routeseg.space import Size

BATCH, BATCH_SECONDS = 8, 0.005  # images that run as one, and how long the first waits for others
BATCH_PIXELS = 20_000_000  # of them; what is beyond that runs next
RUNNING, QUEUED = 16, 16  # requests inside a replica, and in front of it; one more gets 503
ENDING_SECONDS = 60.0  # for what is inside when the server is told to end
app = FastAPI(title="routeseg")


class Job(NamedTuple):
    """An image uint8 [H,W,3], and how it is looked at so that its budget is kept; None: what helps."""

    image: np.ndarray
    look: Look | None


class Batches:
    """A network that segments images of any sizes and budgets, those of one size together."""

    def __init__(self, model: routeseg.DynamicRoutingNetwork) -> None:
        self.model, self.network = model, describe(model)
        self.engine = routeseg.SkipEngine(model)

    def __call__(self, jobs: Sequence[Job]) -> list[SegmentedImage]:
        """The results, in the order of the jobs; `milliseconds` are those of the images that ran together."""
        padded = [pad_small(job.image) for job in jobs]
        alike: dict[tuple, list[int]] = defaultdict(list)
        for place, job in enumerate(jobs):
            how = (None, False) if job.look is None else (job.look.size, job.look.price > 0)  # else nobody decides
            alike[padded[place].shape, *how].append(place)
        found: dict[int, SegmentedImage] = {}
        for (shape, size, _), places in alike.items():
            most = max(1, BATCH_PIXELS // (shape[0] * shape[1]))
            for first in range(0, len(places), most):
                some = places[first : first + most]
                images = np.stack([padded[place] for place in some]).transpose(0, 3, 1, 2)
                found |= zip(some, self.run(images, [jobs[place] for place in some], size), strict=True)
        return [found[place] for place in range(len(jobs))]

    def run(self, images: np.ndarray, jobs: Sequence[Job], size: Size | None) -> list[SegmentedImage]:
        """Images uint8 [B,3,H,W], which are those of the jobs or padded; all have a budget that looks at them in this
        size, or none has one."""
        start = time.perf_counter()
        prices = [job.look.price for job in jobs if job.look is not None] or None
        found = self.engine.labels(torch.from_numpy(images.copy()).to(self.engine.device), price=prices, size=size)
        labels = label_map(found.labels.cpu().numpy(), self.network.config.num_classes)
        gates = found.gates.float().cpu().numpy()
        seconds, own = time.perf_counter() - start, (images.shape[2], images.shape[3])
        table, full = model_cost(self.network, found.seen or own), model_cost(self.network, own).full
        before = None if found.first is None else model_cost(self.network, found.first)
        made = []
        exits = [None] * len(jobs) if found.exits is None else found.exits.cpu().numpy()
        for job, label, gate, left in zip(jobs, labels, gates, exits, strict=True):
            height, width = job.image.shape[:2]
            prediction = Prediction("image", "image", (height, width), float(table.of_result(gate, left, before)), full)
            whole = np.ascontiguousarray(label[:height, :width])
            segmented = Segmented(prediction, whole, gate, seconds, exits=left, seen=found.seen, first=found.first)
            made.append(SegmentedImage(job.image, segmented, self.network, self.engine.precision))
        return made


@serve.deployment(max_ongoing_requests=RUNNING, max_queued_requests=QUEUED, graceful_shutdown_timeout_s=ENDING_SECONDS)
@serve.ingress(app)
class Replica:
    """A process with a network of its own; `host` and `names` as `admit` takes them."""

    def __init__(self, checkpoint: str | None, host: str, names: Sequence[str]) -> None:
        model, self.host, self.names = routeseg.load(checkpoint), host, names
        self.segment_all = Batches(model.cuda() if torch.cuda.is_available() else model)

    @app.post("/segment")
    async def segment(self, request: Request, budget: str | None = None, answer: Answer = "json") -> Response:
        await admit(request, self.host, self.names)
        body, model = await read(request), self.segment_all.model
        asked = parse(budget, model)
        image = await asyncio.to_thread(decode, body)
        try:
            look = None if asked is None else asked.look(model, pad_small(image).shape[:2])
        except BudgetNotKept as error:
            raise HTTPException(400, str(error)) from error
        return await asyncio.to_thread(respond, await self.batch(Job(image, look)), answer)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_SECONDS)
    async def batch(self, jobs: list[Job]) -> list[SegmentedImage]:
        return await asyncio.to_thread(self.segment_all, jobs)

    @app.get("/health")
    async def health(self, request: Request) -> dict[str, list[str]]:
        await admit(request, self.host, self.names)
        return {"classes": list(self.segment_all.model.config.class_names)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="a folder; the bundled network, if there is none")
    parser.add_argument("--host", default="127.0.0.1", help="this machine alone, unless it is another address")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--names", nargs="*", default=[], help="others that it is reached under, as of a proxy")
    parser.add_argument("--replicas", type=int, default=1, help="processes, which share the cores of this machine")
    parser.add_argument("--waiting", type=int, default=QUEUED, help="requests before the replicas; one more gets 503")
    parser.add_argument("--ray_address", default="local", help="local: a Ray that ends with this; auto, or HOST:PORT")
    args = parser.parse_args()
    checkpoint = None if args.checkpoint is None else str(Path(args.checkpoint).resolve())
    cores, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    ray.init(args.ray_address, **({"include_dashboard": False} if args.ray_address == "local" else {}))
    serve.start(http_options=HTTPOptions(host=args.host, port=args.port))
    resources = {"num_cpus": max(1, cores // args.replicas), "num_gpus": gpus / args.replicas}
    replica = Replica.options(num_replicas=args.replicas, max_queued_requests=args.waiting, ray_actor_options=resources)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    serve.run(replica.bind(checkpoint, args.host, args.names))
    stop.wait()
    serve.delete("default")  # answers what is inside; shutdown alone ends the process that would pass it on
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
