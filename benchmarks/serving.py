"""Images per second and milliseconds of the servers in examples/, for one client and for many, and under overload.

    python benchmarks/serving.py [--output results/serving_cpu.json] [--seconds 3.5]

The network that is shipped; procedural scenes as JPEG files; JSON answers. Server and clients share the machine, and
the clients take a part of it. A server is a process of its own, as its command starts it.

clients    each of N clients sends its next image once the last one is answered. All ask for the same budget, or each
           request for another of BUDGETS in turns ("mixed")
overload   requests come at OFFERED times the best rate that the server had before, whether it answers or not

Each answer is compared with what `predict` finds alone. `lost` counts requests without an answer, `wrong` the answers
that differ; both should be 0. A refused request (503) counts neither as an image nor in the milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

import routeseg
from routeseg.data.scenes import draw_scene
from routeseg.evaluation import machine_facts
from routeseg.files import write_json

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZE = (128, 256)  # small, so that some seconds have enough answers for a p99
IMAGES, QUALITY = 8, 90
BUDGETS = ("30%", "50%", "100%")
FIXED = "50%"
CLIENTS = (1, 2, 4, 8, 16)
WARM = 4
OFFERED = 2.0
READY_SECONDS, ANSWER_SECONDS = 90, 60
SERVERS = {
    "FastAPI": ["serve_fastapi.py"],
    "Ray Serve": ["serve_ray.py"],
    "Ray Serve, 2 replicas": ["serve_ray.py", "--replicas", "2"],
}
UNITS = {"closed": "clients", "open": "offered_per_s"}
PACKAGES = ("fastapi", "uvicorn", "ray")  # whose versions the results name, too
MS = 1000.0


class Load:
    """Requests to one server, what became of them, and how long that took."""

    def __init__(self, http: httpx.AsyncClient, requests: list[tuple[dict, bytes, dict]]) -> None:
        self.http, self.next = http, itertools.cycle(requests)
        self.ms: list[float] = []
        self.refused = self.lost = self.wrong = 0

    async def send(self) -> None:
        query, body, expected = next(self.next)
        start = time.perf_counter()
        try:
            answer = await self.http.post("/segment", params=query, content=body)
        except httpx.HTTPError:
            self.lost += 1
            return
        if answer.status_code == 503:
            self.refused += 1
        else:
            self.ms.append(MS * (time.perf_counter() - start))
            facts = answer.json()
            self.wrong += any(facts.get(key) != value for key, value in expected.items())

    async def closed(self, clients: int, seconds: float) -> None:
        """So many clients, each with one request at a time."""
        end = time.perf_counter() + seconds

        async def client() -> None:
            while time.perf_counter() < end:
                await self.send()

        await asyncio.gather(*(client() for _ in range(clients)))

    async def open(self, rate: float, seconds: float) -> None:
        """So many requests a second, whatever becomes of them."""
        start, sent = time.perf_counter(), []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
            sent.append(asyncio.create_task(self.send()))
        await asyncio.gather(*sent)

    def facts(self, seconds: float) -> dict[str, Any]:
        requests = len(self.ms) + self.refused + self.lost
        p50, p99 = np.percentile(self.ms, (50, 99)) if self.ms else (float("nan"),) * 2
        return {
            "requests": requests,
            "images_per_s": len(self.ms) / seconds,
            "p50_ms": float(p50),
            "p99_ms": float(p99),
            "refused": self.refused / max(requests, 1),
            "lost": self.lost,
            "wrong": self.wrong,
        }


async def measure(server: str, port: int, requests: dict[str, list], seconds: float) -> list[dict[str, Any]]:
    """The rows of a server that runs."""
    limits = httpx.Limits(max_connections=None)
    address = f"http://127.0.0.1:{port}"
    rows = []
    async with httpx.AsyncClient(base_url=address, timeout=ANSWER_SECONDS, limits=limits, trust_env=False) as http:

        async def row(budget: str, run: str, number: float, seconds: float) -> dict[str, Any]:
            load, start = Load(http, requests[budget]), time.perf_counter()
            await getattr(load, run)(number, seconds)
            facts = load.facts(time.perf_counter() - start)
            return {"server": server, "budget": budget, UNITS[run]: number} | facts

        await row(FIXED, "closed", WARM, seconds / 2)  # to get going
        for budget in requests:
            for clients in CLIENTS:
                rows.append(await row(budget, "closed", clients, seconds))
                print(rows[-1], flush=True)
        rate = OFFERED * max(one["images_per_s"] for one in rows)
        rows.append(await row("mixed", "open", rate, 2 * seconds))
        print(rows[-1], flush=True)
    return rows


@contextmanager
def running(words: list[str]) -> Iterator[int]:
    """The port of a server that is up; it ends with the block."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / words[0]), *words[1:], "--port", str(port)]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        for _ in range(10 * READY_SECONDS):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if process.poll() is not None:
                raise ValueError(f"{' '.join(command)} ended with {process.returncode}: run it alone to see why")
            time.sleep(0.1)
        else:
            raise ValueError(f"{' '.join(command)} was not up after {READY_SECONDS} s")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(READY_SECONDS)
        finally:
            process.kill()


def all_requests() -> dict[str, list[tuple[dict, bytes, dict]]]:
    """By budget: query, body and what the answer must say, of each image."""
    model, made = routeseg.load(), {}
    for name, budgets in ((FIXED, (FIXED,)), ("mixed", BUDGETS)):
        made[name] = []
        for number in range(IMAGES):
            for budget in budgets:
                file = io.BytesIO()
                Image.fromarray(draw_scene(0, number, SIZE)[0]).save(file, "JPEG", quality=QUALITY)
                result = model.predict(np.asarray(Image.open(file).convert("RGB")), budget)
                expected = {"cost_gmacs": result.cost_gmacs, "class_shares": result.shares}
                made[name].append(({"budget": budget}, file.getvalue(), expected))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/serving_cpu.json"))
    parser.add_argument("--seconds", type=float, default=3.5, help="of each measurement")
    args = parser.parse_args()
    requests, rows = all_requests(), []
    for server, words in SERVERS.items():
        with running(words) as port:
            rows += asyncio.run(measure(server, port, requests, args.seconds))
    facts = {
        "network": routeseg.model.checkpoints.PRETRAINED.name,
        "size": list(SIZE),
        "budgets": list(BUDGETS),
        "seconds": args.seconds,
        "offered": OFFERED,
        "rows": rows,
    }
    machine = machine_facts()
    machine["versions"] |= {name: version(name) for name in PACKAGES}
    write_json(args.output, {**facts, **machine})


if __name__ == "__main__":
    main()
