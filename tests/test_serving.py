"""examples/serve_fastapi.py and serve_ray.py: every request gets one answer, and each 200 is what `predict` says."""

from __future__ import annotations

import io
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import routeseg
from conftest import environment_with, with_exits
from routeseg import DynamicRoutingNetwork
from routeseg.data.scenes import draw_scene

httpx = pytest.importorskip("httpx", reason="the extra routeseg[dev]")
uvicorn = pytest.importorskip("uvicorn", reason="the extra routeseg[serve]")
pytest.importorskip("fastapi", reason="the extra routeseg[serve]")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import serve_fastapi  # noqa: E402
from serve_fastapi import service  # noqa: E402

SIZES = ((64, 96), (64, 96), (50, 70), (24, 40))  # the last one is below what a network takes
BUDGETS = (None, "45%", "70%", "100%")
WAIT_S = 120  # for what would hang otherwise

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
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
    """Images of several sizes, each for every budget, as JSON and as a picture in turns."""
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
    if "answer" in case.query:
        assert answer.headers["content-type"] == "image/png"
        return np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), case.result.labels)
    facts = answer.json()
    assert facts["milliseconds"] > 0 and facts["cost_share"] == case.result.found.prediction.share
    assert facts["image_size"] == list(case.result.labels.shape)
    return facts["class_shares"] == case.result.shares and facts["cost_gmacs"] == case.result.cost_gmacs


class Client:
    """Sends cases to a server, from as many threads as it is asked to."""

    def __init__(self, port: int) -> None:
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S, trust_env=False)

    def send(self, case: Case) -> httpx.Response:
        return self.http.post("/segment", params=case.query, content=case.body)

    def send_until_taken(self, case: Case) -> tuple[httpx.Response, int]:
        """The first answer that is no 503, and how many of those came before."""
        for refused in range(10_000):
            answer = self.send(case)
            if answer.status_code != 503:
                return answer, refused
            time.sleep(0.01)
        raise AssertionError("refused for ever")


@contextmanager
def serving(app, **options) -> Iterator[tuple[Client, uvicorn.Server]]:
    """The app under uvicorn, on a free port of this machine; it ends with the block."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", **options))
    started, startup = threading.Event(), server.startup

    async def start(*args, **more):
        await startup(*args, **more)
        started.set()

    server.startup = start
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert started.wait(WAIT_S)
        host, port = server.servers[0].sockets[0].getsockname()
        assert host == "127.0.0.1"
        yield Client(port), server
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
    assert not thread.is_alive()


class Held:
    """A network that does not answer before it is told to."""

    def __init__(self, model: DynamicRoutingNetwork) -> None:
        self.go, self.model = threading.Event(), model

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def predict(self, *args):
        assert self.go.wait(WAIT_S)
        return self.model.predict(*args)


def done(futures: list[Future], count: int) -> list[httpx.Response]:
    """The first answers."""
    answers = as_completed(futures, WAIT_S)
    return [next(answers).result() for _ in range(count)]


class TestFastAPI:
    def test_concurrent_clients_get_what_predict_says(self, model, cases):
        with serving(service(model, waiting=8)) as (client, _), ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(client.send, cases * 2))
            assert client.http.get("/health").json() == {"classes": list(model.config.class_names)}
        assert [answer.status_code for answer in answers] == [200] * len(answers)
        assert all(is_right(answer, case) for answer, case in zip(answers, cases * 2, strict=True))

    def test_a_request_gets_its_own_budget(self, model, cases):
        """Between others that ask for more."""
        whole, tight = ([case for case in cases if case.query.get("budget") == budget] for budget in ("100%", "45%"))
        some = [Case(one.body, {"budget": one.query["budget"]}, one.result) for one in whole + tight] * 2
        with serving(service(model)) as (client, _), ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(client.send, some))
        assert all(is_right(answer, case) for answer, case in zip(answers, some, strict=True))
        high, low = (
            np.array([answer.json()["cost_share"] for answer in answers]).reshape(2, 2, len(SIZES)).swapaxes(0, 1)
        )
        assert (low < high).all() and low.max() < 0.9 and high.mean() > 0.9

    def test_overload_is_refused_and_what_was_accepted_is_answered(self, model, cases):
        held, case = Held(model), cases[0]
        with serving(service(held, waiting=2)) as (client, _), ThreadPoolExecutor(7) as threads:
            futures = [threads.submit(client.send, case) for _ in range(7)]
            refused = done(futures, 5)
            assert [answer.status_code for answer in refused] == [503] * 5
            assert refused[0].headers["retry-after"] == "1" and "2 images are waiting" in refused[0].json()["detail"]
            assert client.http.get("/health").status_code == 200
            held.go.set()
            accepted = [answer for answer in done(futures, 7) if answer.status_code == 200]
            assert len(accepted) == 2 and all(is_right(answer, case) for answer in accepted)
            assert is_right(client.send(case), case), "the places are free again"

    def test_a_server_that_is_told_to_end_answers_first(self, model, cases):
        held, case = Held(model), cases[1]
        with serving(service(held, waiting=2)) as (client, server), ThreadPoolExecutor(3) as threads:
            futures = [threads.submit(client.send, case) for _ in range(3)]
            assert done(futures, 1)[0].status_code == 503  # so that the two others are inside
            server.should_exit = True  # what SIGTERM does
            held.go.set()
            assert [is_right(answer, case) for answer in done(futures, 3) if answer.status_code == 200] == [True] * 2

    def test_clients_that_try_again_lose_nothing(self, model, cases):
        """Many more than there are places."""
        with serving(service(model, waiting=2)) as (client, _), ThreadPoolExecutor(12) as threads:
            answers = list(threads.map(client.send_until_taken, cases * 2))
        assert all(is_right(answer, case) for (answer, _), case in zip(answers, cases * 2, strict=True))
        assert sum(refused for _, refused in answers) > 0

    def test_bad_requests(self, model, cases, monkeypatch):
        monkeypatch.setattr(serve_fastapi, "BODY_BYTES", 100_000)
        image = cases[0].body
        header = b"IHDR" + struct.pack(">IIBBBBB", 5000, 5000, 8, 2, 0, 0, 0)
        bomb = image[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + image[33:]
        with serving(service(model, waiting=1)) as (client, _):
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
                answer = client.send(Case(body, query, None))
                assert answer.status_code == code and words in str(answer.json()["detail"]), answer.text
            assert client.http.get("/segment").status_code == 405
            assert is_right(client.send(cases[0]), cases[0])

    def test_pages_of_others_are_refused(self, model, cases):
        case = cases[0]
        with serving(service(model, names=["streets.example.org"])) as (client, _):
            for headers, code in (
                ({"Host": "evil.example"}, 403),
                ({"Origin": "https://evil.example"}, 403),
                ({"Origin": "null"}, 403),
                ({"Origin": str(client.http.base_url).rstrip("/")}, 200),
                ({"Host": "localhost"}, 200),
                ({"Host": "streets.example.org", "Origin": "https://streets.example.org"}, 200),
            ):
                answer = client.http.post("/segment", params=case.query, content=case.body, headers=headers)
                assert answer.status_code == code, headers
                assert client.http.get("/health", headers=headers).status_code == code
            assert client.http.post("/segment", content=case.body, headers={"Host": "evil.example"}).json()["detail"]

    def test_a_network_without_exits(self, tiny_network, cases):
        with serving(service(tiny_network)) as (client, _):
            answer = client.send(cases[1])
            assert answer.status_code == 400 and "takes no budget" in answer.json()["detail"]
            assert client.send(cases[0]).status_code == 200

    @pytest.mark.parametrize("leaves", (True, False))
    def test_a_client_that_stops_sending_frees_its_place(self, leaves, model, cases, monkeypatch):
        if not leaves:
            monkeypatch.setattr(serve_fastapi, "BODY_SECONDS", 0.5)
        with serving(service(model, waiting=1)) as (client, _):
            sender = socket.create_connection(("127.0.0.1", client.http.base_url.port), WAIT_S)
            sender.sendall(b"POST /segment HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\nsome")
            if leaves:
                sender.close()
            else:
                assert sender.recv(1000).startswith(b"HTTP/1.1 408")
                sender.close()
            answer, _ = client.send_until_taken(cases[0])
            assert is_right(answer, cases[0])

    def test_as_a_command(self, checkpoint, cases, tmp_path):
        command = [sys.executable, str(EXAMPLES / "serve_fastapi.py"), str(checkpoint), "--port", "0"]
        with running(command, tmp_path / "log") as server:
            port = int(server.says(r"http://127\.0\.0\.1:(\d+) ")[1])
            assert is_right(Client(port).send(cases[0]), cases[0])
            assert server.end() in (0, -signal.SIGTERM)


class Running(NamedTuple):
    """A server in a process of its own."""

    process: subprocess.Popen
    log: Path

    def says(self, pattern: str) -> re.Match[str]:
        """Waits until the log has it."""
        while (found := re.search(pattern, self.log.read_text())) is None:
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        return found

    def end(self) -> int:
        """What SIGTERM makes of it."""
        self.process.terminate()
        return self.process.wait(WAIT_S)


@contextmanager
def running(command: list[str], log: Path) -> Iterator[Running]:
    """It ends with the block, whatever happens there."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment_with())
    try:
        yield Running(process, log)
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(WAIT_S)
        finally:
            process.kill()


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
            jobs.append(serve_ray.Job(case.result.image, asked and asked.price(alone, SIZES[0])))
        for case, found in zip(cases, serve_ray.Batches(model)(jobs), strict=True):
            assert np.array_equal(found.labels, case.result.labels)
            assert np.array_equal(found.gates, case.result.gates)
            assert found.cost_gmacs == case.result.cost_gmacs and found.shares == case.result.shares

    @pytest.mark.slow
    def test_a_cluster(self, serve_ray, checkpoint, cases, tmp_path):
        """Answers, overload, bad requests, and an end that loses nothing."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, str(EXAMPLES / "serve_ray.py"), str(checkpoint), "--port", str(port)]
        with running([*command, "--waiting", "4"], tmp_path / "log") as server:
            server.says("is ready at")
            client = Client(port)
            with ThreadPoolExecutor(8) as threads:
                answers = [answer for answer, _ in threads.map(client.send_until_taken, cases * 2)]
            assert all(is_right(answer, case) for answer, case in zip(answers, cases * 2, strict=True))
            with ThreadPoolExecutor(64) as threads:
                answers = list(threads.map(client.send, cases * 8))
            assert set(Counter(answer.status_code for answer in answers)) == {200, 503}
            right = zip(answers, cases * 8, strict=True)
            assert all(is_right(answer, case) for answer, case in right if answer.status_code == 200)
            for body, query, code in (
                (b"no image", {}, 400),
                (cases[0].body, {"budget": "1%"}, 400),
                (cases[0].body, {"budget": "0.00001GMACs"}, 400),
                (b"\0" * (serve_fastapi.BODY_BYTES + 1), {}, 413),
            ):
                assert client.send(Case(body, query, None)).status_code == code
            large = png(draw_scene(0, 0, (1024, 2048), "mixed")[0])
            with ThreadPoolExecutor(4) as threads:
                futures = [threads.submit(client.send, Case(large, {}, None)) for _ in range(4)]
                done(futures, 1)  # so that the others are inside
                ended = threads.submit(server.end)
                assert [answer.status_code for answer in done(futures, 4)] == [200] * 4
                assert ended.result() == 0
