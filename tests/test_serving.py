"""examples/serve_fastapi.py and serve_ray.py: each 200 is what `predict` says, and the other codes are those of
docs/serving.md. No test starts a server, but for the slow one."""

from __future__ import annotations

import asyncio
import io
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import routeseg
from conftest import environment_with, with_exits
from routeseg import DynamicRoutingNetwork
from routeseg.budgets.asked import Asked
from routeseg.budgets.calibration import calibrate
from routeseg.data.config import open_data
from routeseg.data.loaders import evaluation_loader
from routeseg.data.scenes import draw_scene
from routeseg.model.prices import Look
from routeseg.prediction.files import pad_small
from test_closer import DATA, network

httpx = pytest.importorskip("httpx", reason="the extra routeseg[dev]")
pytest.importorskip("uvicorn", reason="the extra routeseg[serve]")
fastapi = pytest.importorskip("fastapi", reason="the extra routeseg[serve]")
from fastapi.testclient import TestClient  # noqa: E402

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import serve_fastapi  # noqa: E402
from serve_fastapi import service  # noqa: E402

SIZES = ((64, 96), (64, 96), (50, 70), (24, 40))  # the last one is below what a network takes
BUDGETS = (None, "45%", "70%", "100%")
WAIT_S = 120  # for what would hang otherwise

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(ray|uvicorn|websockets).*"),
]


class Case(NamedTuple):
    """An image as a file, what is asked of it, and what `predict` finds."""

    body: bytes
    query: dict[str, str]
    result: routeseg.prediction.image.SegmentedImage


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return Path(with_exits(SIZES[0]).save(tmp_path_factory.mktemp("serving")))


@pytest.fixture
def model(checkpoint) -> DynamicRoutingNetwork:
    return routeseg.load(checkpoint)


@pytest.fixture(scope="module")
def cases(checkpoint) -> list[Case]:
    """Images of several sizes, each for every budget, as JSON and as an image in turns."""
    alone, made = routeseg.load(checkpoint), []
    for number, (height, width) in enumerate(SIZES):
        image = np.ascontiguousarray(draw_scene(0, number, SIZES[0], "mixed")[0][:height, :width])
        for budget in BUDGETS:
            query = {} if budget is None else {"budget": budget}
            if len(made) % 3 == 2:
                query["answer"] = "png"
            made.append(Case(png(image), query, alone.predict(image, budget)))
    return made


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def is_right(answer: httpx.Response, case: Case) -> bool:
    """Whether a 200 is what `predict` found alone."""
    assert answer.status_code == 200, answer.text
    if "answer" in case.query:
        assert answer.headers["content-type"] == "image/png"
        return np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), case.result.labels)
    facts = answer.json()
    assert facts["milliseconds"] > 0 and facts["cost_share"] == case.result.found.prediction.share
    assert facts["image_size"] == list(case.result.labels.shape)
    return facts["class_shares"] == case.result.shares and facts["cost_gmacs"] == case.result.cost_gmacs


@contextmanager
def serving(*given, **options):
    """send(case) -> its answer; `send.http` is the client."""
    with TestClient(service(*given, **options), "http://127.0.0.1:8000") as client:

        def send(case: Case) -> httpx.Response:
            return client.post("/segment", params=case.query, content=case.body)

        send.http = client
        yield send


class Held:
    """A network that does not answer before it is told to."""

    def __init__(self, model: DynamicRoutingNetwork) -> None:
        self.go, self.model = threading.Event(), model

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def predict(self, *args):
        assert self.go.wait(WAIT_S)
        return self.model.predict(*args)


class TestFastAPI:
    def test_concurrent_clients_get_what_predict_says(self, model, cases):
        """Each by its own budget."""
        assert len({case.result.cost_gmacs for case in cases if case.result.labels.shape == SIZES[0]}) > 1
        with serving(model) as send, ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(send, cases))
            assert send.http.get("/health").json() == {"classes": list(model.config.class_names)}
        assert all(is_right(answer, case) for answer, case in zip(answers, cases, strict=True))

    def test_overload_is_refused_and_what_was_accepted_is_answered(self, model, cases):
        held, case = Held(model), cases[0]
        with serving(held, waiting=2) as send, ThreadPoolExecutor(7) as threads:
            answers = as_completed([threads.submit(send, case) for _ in range(7)], WAIT_S)
            refused = [next(answers).result() for _ in range(5)]
            assert [answer.status_code for answer in refused] == [503] * 5
            assert refused[0].headers["retry-after"] == "1" and "2 images are waiting" in refused[0].json()["detail"]
            assert send.http.get("/health").status_code == 200
            held.go.set()
            assert [is_right(answer.result(), case) for answer in answers] == [True, True]
            assert is_right(send(case), case), "the places are free again"

    def test_bad_requests(self, model, cases, monkeypatch):
        monkeypatch.setattr(serve_fastapi, "BODY_BYTES", 100_000)
        image = cases[0].body
        header = b"IHDR" + struct.pack(">IIBBBBB", 5000, 5000, 8, 2, 0, 0, 0)
        bomb = image[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + image[33:]
        with serving(model, waiting=1) as send:
            for body, query, code, words in (
                (b"", {}, 400, "cannot read the body as an image"),
                (b"no image", {}, 400, "cannot read the body as an image"),
                (image[:-30], {}, 400, "cannot read the body as an image"),
                (bomb, {}, 400, "it has 5000x5000 pixels; at most 20000000 are decoded"),
                (b"\0" * 100_001, {}, 413, "at most 100000 are taken"),
                (b"\0" * 3_000_000, {}, 413, "at most 100000 are taken"),
                (image, {"budget": "much"}, 400, "budget is 'much': give a share"),
                (image, {"budget": "0"}, 400, "budget is '0': give a share"),
                (image, {"budget": "nan%"}, 400, "give a share"),
                (image, {"budget": "130%"}, 400, "more than the full network"),
                (image, {"budget": "1%"}, 400, "cannot be kept"),
                (image, {"budget": "0.00001GMACs"}, 400, "cannot be kept"),
                (image, {"budget": "25ms"}, 400, "milliseconds need"),
                (image, {"answer": "gif"}, 422, "'json' or 'png'"),
            ):
                answer = send(Case(body, query, None))
                assert answer.status_code == code and words in str(answer.json()["detail"]), answer.text
            assert send.http.get("/segment").status_code == 405
            assert is_right(send(cases[0]), cases[0])

    def test_pages_of_others_are_refused(self, model, cases):
        case = cases[0]
        with serving(model, names=["streets.example.org"]) as send:
            for headers, code in (
                ({"Host": "evil.example"}, 403),
                ({"Origin": "https://evil.example"}, 403),
                ({"Origin": "null"}, 403),
                ({"Origin": str(send.http.base_url).rstrip("/")}, 200),
                ({"Host": "localhost"}, 200),
                ({"Host": "streets.example.org", "Origin": "https://streets.example.org"}, 200),
            ):
                answer = send.http.post("/segment", params=case.query, content=case.body, headers=headers)
                assert answer.status_code == code, headers
                assert send.http.get("/health", headers=headers).status_code == code
            assert send.http.post("/segment", content=case.body, headers={"Host": "evil.example"}).json()["detail"]

    def test_a_network_without_exits(self, tiny_network, cases, tmp_path):
        with serving(routeseg.load(tiny_network.save(tmp_path))) as send:
            answer = send(cases[1])
            assert answer.status_code == 400 and "takes no budget" in answer.json()["detail"]
            assert send(cases[0]).status_code == 200

    @pytest.mark.parametrize("leaves", (True, False))
    def test_a_client_that_stops_sending_gives_its_place_up(self, leaves, monkeypatch):
        monkeypatch.setattr(serve_fastapi, "BODY_SECONDS", 0.05)
        parts = [{"type": "http.request", "body": b"some", "more_body": True}]
        parts += [{"type": "http.disconnect"}] if leaves else []

        async def receive():
            return parts.pop(0) if parts else await asyncio.sleep(WAIT_S)

        with pytest.raises(fastapi.HTTPException, match="408"):
            asyncio.run(serve_fastapi.read(fastapi.Request({"type": "http"}, receive)))


@pytest.fixture
def serve_ray():
    pytest.importorskip("ray.serve", reason="the extra routeseg[serve]", exc_type=ImportError)
    import serve_ray

    return serve_ray


class TestRayServe:
    @pytest.mark.parametrize("pixels", (20_000_000, 1))
    def test_a_batch_of_unequal_images_and_budgets(self, pixels, serve_ray, model, checkpoint, cases, monkeypatch):
        """Whatever runs together: all images of a size, or each alone."""
        monkeypatch.setattr(serve_ray, "BATCH_PIXELS", pixels)
        alone, jobs = routeseg.load(checkpoint), []
        for case in cases:
            asked = serve_fastapi.parse(case.query.get("budget"), alone)
            jobs.append(
                serve_ray.Job(case.result.image, asked and asked.look(alone, pad_small(case.result.image).shape[:2]))
            )
        for case, found in zip(cases, serve_ray.Batches(model)(jobs), strict=True):
            assert np.array_equal(found.labels, case.result.labels)
            assert np.array_equal(found.gates, case.result.gates)
            assert found.cost_gmacs == case.result.cost_gmacs and found.shares == case.result.shares

    def test_a_budget_chooses_the_size_as_alone(self, serve_ray):
        """Also two looks."""
        model = network()
        assert calibrate(model, [], list(evaluation_loader(open_data(DATA, "val"))), least=1) == 0
        budgets, image = ("30%", "60%", "100%", "30%"), draw_scene(0, 1, (96, 128), "mixed")[0]
        jobs = [serve_ray.Job(image, Asked.parse(text).look(model, image.shape[:2])) for text in budgets]
        assert len({job.look.size for job in jobs}) > 1
        jobs += [serve_ray.Job(image, Look((0.5, 1.0), 0.5))] * 2
        found = serve_ray.Batches(model)(jobs)
        for budget, one in zip(budgets, found, strict=False):
            alone = model.predict(image, budget)
            assert np.array_equal(one.labels, alone.labels) and one.cost_gmacs == alone.cost_gmacs
        assert found[-1].exits is not None and found[-1].cost_gmacs == found[-2].cost_gmacs


@pytest.mark.slow
@pytest.mark.parametrize("name", ("serve_fastapi", "serve_ray"))
def test_as_a_command(name, checkpoint, cases):
    """It answers, and ends when it is told to."""
    if name == "serve_ray":
        pytest.importorskip("ray.serve", reason="the extra routeseg[serve]", exc_type=ImportError)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, EXAMPLES / f"{name}.py", checkpoint, "--port", str(port)]
    process = subprocess.Popen(command, env=environment_with())
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S, trust_env=False) as client:
            while process.poll() is None:
                try:
                    answer = client.post("/segment", params=cases[1].query, content=cases[1].body)
                    if answer.status_code != 404:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)  # it is not up yet
        assert is_right(answer, cases[1])
        process.terminate()
        assert process.wait(WAIT_S) in (0, -signal.SIGTERM)
    finally:
        process.kill()
