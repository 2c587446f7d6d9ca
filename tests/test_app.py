"""The explorer: what it answers, what it refuses, and its page in a real browser.

The browser is Debian's Chromium, driven by playwright; `make browser` installs it. Set ROUTESEG_SCREENSHOTS to a folder
to keep what the tests see there: the images of the documents come from here.
"""

import asyncio
import base64
import io
import itertools
import json
import os
import runpy
import shutil
import socket
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import routeseg
from routeseg import Route, SkipEngine, model_cost
from routeseg.app import Guard, guard
from routeseg.app.explorer import SIDE, Explorer, Survey
from routeseg.budgets.calibration import calibrate
from routeseg.cli import main
from routeseg.data.config import DataConfig, open_data
from routeseg.data.loaders import evaluation_loader
from routeseg.data.scenes import draw_scene
from routeseg.survey.route_statistics import object_size
from test_places import DATA, network

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOTS = os.environ.get("ROUTESEG_SCREENSHOTS")
SIZE = (96, 160)
SURVEYED = 24


def png(image: np.ndarray, **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="PNG", **options)
    return data.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def street() -> np.ndarray:
    return draw_scene(3, 1, SIZE)[0]


@pytest.fixture(scope="module")
def survey() -> Survey:
    """What drawn streets cost at a budget of 40 %, and how large their objects are, as `routeseg routes` says it."""
    model = routeseg.load()
    engine, table = SkipEngine(model), model_cost(model, SIZE)
    pictures = open_data(DataConfig(name="scenes", image_size=SIZE, val_images=SURVEYED), "val", 0)
    rows = []
    for index in range(SURVEYED):
        image, labels = pictures.read(index)
        gates = engine(torch.from_numpy(image).permute(2, 0, 1)[None], budget=0.4).gates
        cost = float(table.of_gates(gates)[0]) / table.full
        rows.append({"name": pictures.name(index), "cost_share": cost, "object_size": object_size(labels)})
    return Survey({"data": "scenes", "split": "val", "per_image": rows, "in_words": []}, pictures)


@pytest.fixture(scope="module")
def explorer(survey) -> Explorer:
    return Explorer(routeseg.load(), "the network", survey)


@pytest.fixture
def opened(explorer, street) -> dict:
    return explorer.open({"file": text(png(street)), "name": "street.png"})


def labels_of(view: dict, size=SIZE) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(view["labels"])), np.uint8).reshape(size)


class TestAnswers:
    def test_labels_and_costs_are_those_of_the_engine(self, explorer, opened, street):
        view = explorer.look({"picture": opened["picture"], "precision": "float32"})
        alone = routeseg.load().predict(street, precision="float32")
        assert np.array_equal(labels_of(view), alone.labels)
        assert view["gmacs"] == pytest.approx(alone.cost_gmacs) and view["shares"] == alone.shares
        assert {tuple(edge[:3]) for edge in view["open"]} == alone.route.edges
        assert json.loads(json.dumps(view))["shares"] == view["shares"]

    @pytest.mark.parametrize("unit", ["share", "gmacs", "ms"])
    def test_a_budget_is_kept_in_each_unit(self, explorer, street, monkeypatch, unit):
        clock = itertools.count(5)
        monkeypatch.setattr("routeseg.app.explorer._best_ms", lambda _: next(clock))
        opened = explorer.open({"file": text(png(street))})
        low, high = opened["range"][unit]
        spent = [
            explorer.look({"picture": opened["picture"], "budget": {"value": value, "unit": unit}})
            for value in (low / 2, low, high)  # what lies below the cheapest route is that route
        ]
        assert spent[0]["share"] == spent[1]["share"] < spent[2]["share"]
        assert spent[0]["asked"] < 0.5 and spent[2]["asked"] > 0.9

    def test_a_route_of_ones_own_runs_and_is_compared(self, explorer, opened, street):
        whole = explorer.config.whole_route
        some = [edge for edge in whole.edges if edge != (2, 2, 2)]
        view = explorer.look({"picture": opened["picture"], "route": some, "against": "all", "precision": "float32"})
        image = torch.from_numpy(street).permute(2, 0, 1)[None]
        engine = SkipEngine(explorer.model)
        mine, full = engine(image, Route(whole.space, some)), engine(image, whole)
        assert np.array_equal(labels_of(view), mine.labels[0])
        assert np.array_equal(labels_of(view["against"]), full.labels[0])
        assert view["changed"] == pytest.approx(float((mine.labels != full.labels).float().mean()))
        assert view["gmacs"] < view["against"]["gmacs"] and [2, 2, 2, 1.0] not in view["open"]

    def test_examples_have_scores_where_the_classes_are_theirs(self, opened):
        from routeseg import DynamicRoutingNetwork
        from routeseg.data.scenes import CLASSES, PALETTE

        model = DynamicRoutingNetwork(
            depth=4, base_channels=4, num_classes=len(CLASSES), class_names=CLASSES, palette=PALETTE
        )
        gated = Explorer(model, "gated")
        example = gated.open({"example": "small"})
        assert example["labelled"] and example["range"] is None and not opened["labelled"]
        view = gated.look({"picture": example["picture"], "budget": {"value": 0.5, "unit": "share"}})
        assert 0 <= view["score"] <= 1 and view["asked"] is None

    def test_examples_are_what_the_network_is_for(self, explorer, tmp_path):
        from routeseg import DynamicRoutingNetwork

        assert [one["key"] for one in explorer.about()["examples"]] == ["large", "small", "mixed"]
        cells = {"num_classes": 2, "class_names": ("background", "cell")}
        model = DynamicRoutingNetwork(depth=4, base_channels=4, **cells)
        alone = Explorer(model, "cells")
        assert alone.about()["examples"] == [] and "no such example" in alone.open({"example": "small"})["error"]
        for kind in ("images", "masks"):
            (tmp_path / kind / "val").mkdir(parents=True)
        for k in range(5):
            Image.fromarray(np.full((48, 64, 3), 40 * k, np.uint8)).save(tmp_path / "images" / "val" / f"{k}.png")
            Image.fromarray(np.full((48, 64), k % 2, np.uint8)).save(tmp_path / "masks" / "val" / f"{k}.png")
        (tmp_path / "classes.yaml").write_text("names: [background, cell]\n")
        pictures = open_data(DataConfig(name="folder", root=str(tmp_path)), "val", 0)
        known = Explorer(model, "cells", pictures=pictures)
        assert [one["name"] for one in known.about()["examples"]] == ["0", "2", "4"]
        opened = known.open({"example": "2"})
        assert opened["labelled"] and opened["height"] == 48
        for path in (tmp_path / "images" / "val").iterdir():
            path.write_bytes(b"gone")
        assert Explorer(model, "cells", pictures=pictures).about()["examples"] == []

    def test_a_background_is_clear_as_in_an_overlay(self, explorer):
        from routeseg import DynamicRoutingNetwork

        assert explorer.about()["clear"] is False
        for names, clear in ((("background", "cell"), True), (("cell", "background"), False)):
            model = DynamicRoutingNetwork(depth=4, base_channels=4, num_classes=2, class_names=names)
            assert Explorer(model, "cells").about()["clear"] is clear

    def test_labels_give_a_score(self, explorer, street, opened):
        found = labels_of(explorer.look({"picture": opened["picture"]}))
        known = explorer.open({"file": text(png(street)), "labels": text(png(found))})
        assert explorer.look({"picture": known["picture"]})["score"] == 1.0

    def test_a_large_picture_is_shrunk(self, explorer):
        big = explorer.open({"file": text(png(np.zeros((600, 2 * SIDE, 3), np.uint8)))})
        assert (big["height"], big["width"]) == (300, SIDE)

    def test_only_the_last_pictures_are_held(self, explorer, street, monkeypatch):
        monkeypatch.setattr("routeseg.app.explorer.HELD", 2)
        tokens = [explorer.open({"file": text(png(street))})["picture"] for _ in range(3)]
        assert "no longer held" in explorer.look({"picture": tokens[0]})["error"]
        assert "error" not in explorer.look({"picture": tokens[-1]})

    def test_how_far_each_place_went(self, explorer, opened, monkeypatch):
        plain = Explorer(routeseg.DynamicRoutingNetwork(depth=4, base_channels=4, num_classes=2), "plain")
        assert plain.about()["place"] is None and explorer.look({"picture": opened["picture"]})["effort"] is None
        model = network()
        assert calibrate(model, [], list(evaluation_loader(open_data(DATA, "val")))) == 0
        places, image = Explorer(model, "places"), open_data(DATA, "val").read(0)[0]
        about = places.about()
        assert about["place"] == 32 and about["heat"][0] == [68, 1, 84] and about["heat"][-1] == [253, 231, 37]
        picture = places.open({"file": text(png(image))})["picture"]
        assert places.look({"picture": picture})["effort"] is None, "nobody decides unless a budget asks"
        asked = {"picture": picture, "budget": {"value": 0.6, "unit": "share"}}
        view = places.look(asked | {"against": "all"})
        alone, table = model.predict(image, budget=view["asked"]), model_cost(model, image.shape[:2])
        assert np.allclose(view["effort"]["shares"], table.exits[alone.exits] / table.full, atol=1e-3)
        assert view["effort"]["seen"] == list(image.shape[:2]) and view["against"]["effort"] is None
        assert json.loads(json.dumps(view))["effort"] == view["effort"]

        effort, exits = view["effort"], np.array(view["effort"]["exits"])
        assert np.array_equal(exits, alone.exits) and effort["choices"] == [0, 1, 2, 3] and effort["size"] == 1
        exits[0, 0] = (exits[0, 0] + 1) % 4  # as a click does it
        mine = places.look(asked | {"places": {"exits": exits.tolist(), "size": effort["size"]}})
        assert mine["effort"]["exits"] == exits.tolist() and mine["share"] != view["share"]
        assert mine["against"]["effort"] == effort and 0 <= mine["changed"] < 1, "beside what the network chose"

        run = Explorer._segment
        monkeypatch.setattr(Explorer, "_segment", lambda *given, **how: run(*given, price=0.5, size=2.0))
        view = places.look(asked)
        assert view["effort"]["seen"] == [128, 192] and np.shape(view["effort"]["shares"]) == (4, 6)

    def test_pictures_of_a_data_set_are_opened_by_name(self, explorer, survey):
        name = survey.about()["pictures"][2][0]
        assert explorer.open({"survey": name})["name"] == name
        assert "no such image" in explorer.open({"survey": "../../etc/passwd"})["error"]


class TestRefusals:
    @pytest.mark.parametrize(
        "question, words",
        [
            (None, "an object"),
            ({}, "choose an image"),
            ({"file": "%%%"}, "damaged"),
            ({"file": text(b"words")}, "cannot read"),
            ({"file": text(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")}, "cannot read"),
            ({"file": text(png(np.zeros((1, 60_000_000), np.uint8)))}, "at most"),
            ({"file": "A" * (4 * 20_000_000 // 3 + 8)}, "larger than 20 MB"),
            ({"file": ["A"]}, "choose an image"),
            ({"example": []}, "no text"),
            ({"example": {"small": 1}}, "no text"),
            ({"survey": ["x"]}, "no text"),
            ({"survey": 10**400}, "no text"),
            ({"name": {}, "file": "QQ=="}, "no text"),
        ],
    )
    def test_of_pictures(self, explorer, question, words):
        assert words in explorer.open(question)["error"]

    @pytest.mark.parametrize(
        "labels, words",
        [
            (b"words", "cannot read the labels"),
            (png(np.full(SIZE, 40, np.uint8)), "a class 40"),
            (png(np.zeros((96, 96), np.uint8)), "proportions"),
            (png(np.zeros((*SIZE, 3), np.uint8)), "one number"),
            (png(np.zeros((20_000, 20_000), np.uint8)), "cannot read the labels"),
            (png(np.zeros((8_000, 8_000), np.uint8)), "one number"),
        ],
    )
    def test_of_labels(self, explorer, street, labels, words):
        assert words in explorer.open({"file": text(png(street)), "labels": text(labels)})["error"]

    @pytest.mark.parametrize(
        "question, words",
        [
            ({"picture": "other"}, "no longer held"),
            ({"budget": {"value": "much", "unit": "share"}}, "a number"),
            ({"budget": {"value": float("nan"), "unit": "share"}}, "above 0"),
            ({"budget": {"value": 1, "unit": "euros"}}, "share, gmacs or ms"),
            ({"budget": 3}, "and its unit"),
            ({"route": [[0, 9, 9]]}, "no route"),
            ({"route": "all"}, "no route"),
            ({"route": [[4, 0, 1], [0, 0, 1], [1, 0, 1]]}, "does not have all"),
            ({"precision": "int3"}, "choose one of"),
            ({"against": "best"}, "no route"),
            ({"picture": []}, "no text"),
            ({"precision": 1e400}, "no text"),
            ({"budget": {"value": 10**400, "unit": "share"}}, "a number"),
            ({"budget": {"value": 1e400, "unit": "ms"}}, "above 0"),
            ({"budget": {"value": [], "unit": "ms"}}, "a number"),
            ({"budget": {"value": 1, "unit": ["ms"]}}, "share, gmacs or ms"),
            ({"budget": "ms"}, "a number"),
            ({"budget": []}, "a number"),
            ({"route": [[1e400, 0, 1]]}, "no route"),
            ({"route": [[10**400, 0, 1]]}, "no route"),
            ({"route": [[0.5, 0, 1]]}, "no route"),
            ({"route": [[[], 0, 1]]}, "no route"),
            ({"route": 5}, "no route"),
            ({"route": [[]]}, "no route"),
            ({"route": [[0, 0]]}, "no route"),
            ({"route": [[0, 0, 1, 2]]}, "no route"),
            ({"route": [[0, 0, "1"]]}, "no route"),
            ({"route": [[10**30, 0, 1]]}, "no route"),
            ({"route": {}}, "no route"),
            ({"against": [[1e400, 0, 1]]}, "no route"),
            ({"against": True}, "no route"),
            ({"places": 5}, "places are the exits and the size"),
            ({"places": {"exits": [[0]]}}, "places are the exits and the size"),
            ({"places": {"exits": [["far"]], "size": 1}}, "places are the exits and the size"),
            ({"places": {"exits": [[10**30]], "size": 1}}, "places are the exits and the size"),
            ({"places": {"exits": [[0]], "size": 1}}, "exits are of 1x1 places"),
            ({"places": {"exits": [[99]], "size": 1}}, "exits go from 99"),
            ({"places": {"exits": [[0]], "size": "large"}}, "size is"),
        ],
    )
    def test_of_questions(self, explorer, opened, question, words):
        assert words in explorer.look({"picture": opened["picture"], **question})["error"]


class TestGuard:
    """The guard in front of the server, asked as a server asks it."""

    JSON = ((b"host", b"127.0.0.1:7860"), (b"content-type", b"application/json"))

    def ask(self, path="/x", headers=JSON, chunks=(b"{}",), method="POST", bound="127.0.0.1", names=(), kind="http"):
        sent = []
        left = [{"type": "http.request", "body": one, "more_body": True} for one in chunks]
        left.append({"type": "http.request", "body": b"", "more_body": False})

        async def app(scope, receive, send):
            size = len((await receive())["body"]) if method == "POST" and kind == "http" else 0
            if b"fail" in b"".join(chunks):
                raise KeyError("component_id")
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body", "body": str(size).encode()})

        async def receive():
            if not left:
                await asyncio.sleep(10)
            return left.pop(0)

        async def send(message):
            sent.append(message)

        scope = {"type": kind, "method": method, "path": path, "headers": list(headers)}
        asyncio.run(Guard(app, 1000, bound, names)(scope, receive, send))
        return sent[0].get("status", sent[0]["type"]), sent[-1].get("body")

    def test_what_is_too_large_is_refused_before_it_is_read(self):
        assert self.ask(headers=[*self.JSON, (b"content-length", b"1001")])[0] == 413
        assert self.ask(headers=[*self.JSON, (b"content-length", b"a lot")])[0] == 413

    def test_what_does_not_say_its_size_is_cut_off(self):
        assert self.ask(chunks=[b"1" * 5] * 3) == (200, b"15")
        assert self.ask(chunks=[b" " * 400] * 3)[0] == 413
        assert self.ask(headers=[*self.JSON, (b"content-length", b"5")], chunks=[b" " * 400] * 3)[0] == 413

    def test_what_drips_is_cut_off(self, monkeypatch):
        monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)

        async def receive():
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b"x", "more_body": True}

        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/x", "headers": list(self.JSON)}
        asyncio.run(Guard(None, 1000)(scope, receive, send))
        assert sent[0]["status"] == 408

    def test_no_file_is_written(self):
        assert self.ask("/gradio_api/upload")[0] == 403

    @pytest.mark.parametrize("kind", [b"text/plain", b"", b"multipart/form-data", b"application/x-www-form-urlencoded"])
    def test_json_alone(self, kind):
        assert self.ask(headers=[self.JSON[0], (b"content-type", kind)])[0] == 415
        assert self.ask(headers=[self.JSON[0], (b"Content-Type".lower(), b"Application/JSON; charset=utf-8")])[0] == 200

    @pytest.mark.parametrize(
        "body", [b"no JSON", b"[" * 900, b'{"a": 1e400}', b'{"a": NaN}', b"1" * 30, b"\xff", b"", b'"fail"']
    )
    def test_what_is_no_question_is_refused_in_a_sentence(self, body):
        status, words = self.ask(chunks=[body])
        assert status == 400 and words.startswith(b"this question is none: ")

    @pytest.mark.parametrize(
        "bound, host, allowed",
        [
            ("127.0.0.1", "127.0.0.1:7860", True),
            ("127.0.0.1", "LOCALHOST.:9000", True),  # a tunnel has another port
            ("localhost", "[::1]:7860", True),
            ("127.0.0.1", "evil.example:7860", False),
            ("127.0.0.1", "127.0.0.1.evil.example", False),
            ("127.0.0.1", "localhost@evil.example", False),
            ("127.0.0.1", "192.168.1.5", False),
            ("127.0.0.1", "", False),
            ("192.168.1.5", "192.168.1.5:7860", True),
            ("192.168.1.5", "evil.example", False),
            ("0.0.0.0", "192.168.1.5:7860", True),  # a number cannot be rebound
            ("0.0.0.0", "[fe80::1]:7860", True),
            ("0.0.0.0", "localhost", True),
            ("::", socket.gethostname(), True),
            ("0.0.0.0", "evil.example", False),
            ("127.0.0.1", "streets.example.org", True),  # by its name
        ],
    )
    def test_hosts(self, bound, host, allowed):
        for method, kind in (("GET", "http"), ("POST", "http"), ("GET", "websocket")):
            headers = [(b"host", host.encode()), self.JSON[1]]
            status, _ = self.ask(headers=headers, bound=bound, method=method, kind=kind, names=["streets.example.org"])
            assert (status in (200, "http.response.start")) == allowed, (status, method, kind)
        assert self.ask(headers=[self.JSON[1]])[0] == 403 and self.ask(headers=[self.JSON[0], *self.JSON])[0] == 403

    @pytest.mark.parametrize(
        "host, origin, allowed",
        [
            ("127.0.0.1:7860", "http://127.0.0.1:7860", True),
            ("localhost", "http://localhost:80", True),
            ("streets.example.org", "https://streets.example.org", True),
            ("127.0.0.1:7860", "https://streets.example.org", True),  # a proxy that names itself
            ("127.0.0.1:7860", "http://127.0.0.1:7861", False),
            ("127.0.0.1:7860", "http://localhost:7860", False),
            ("127.0.0.1:7860", "https://evil.example", False),
            ("127.0.0.1:7860", "null", False),
            ("127.0.0.1:7860", "file://127.0.0.1:7860", False),
            ("127.0.0.1:7860", "", False),
        ],
    )
    def test_origins(self, host, origin, allowed):
        headers = [(b"host", host.encode()), self.JSON[1], (b"origin", origin.encode())]
        assert (self.ask(headers=headers, names=["streets.example.org"])[0] == 200) == allowed


class TestCommand:
    @pytest.mark.parametrize(
        "words, message",
        [
            (["missing"], "missing"),
            (["--port", "99999"], "1 to 65535"),
            (["--survey", "missing"], "routeseg routes CHECKPOINT"),
        ],
    )
    def test_mistakes(self, words, message, capsys):
        assert main(["app", *words]) == 2
        assert message in capsys.readouterr().err

    def test_a_taken_port(self, capsys):
        pytest.importorskip("gradio")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            assert main(["app", "--port", str(taken.getsockname()[1])]) == 2
        assert "is taken" in capsys.readouterr().err

    def test_without_the_extra(self, monkeypatch, capsys):
        monkeypatch.setitem(__import__("sys").modules, "gradio", None)
        assert main(["app"]) == 2
        assert "needs the package gradio" in capsys.readouterr().err

    def test_a_survey_of_an_older_version(self, tmp_path, capsys):
        (tmp_path / "routes.json").write_text('{"split": "val"}')
        assert main(["app", "--survey", str(tmp_path)]) == 2
        assert "run `routeseg routes` again" in capsys.readouterr().err

    def test_a_run_tells_its_data(self, tmp_path, capsys):
        from routeseg.cli.run.app import _data_of_run

        assert main(["make-data", "scenes", str(tmp_path / "data"), "--train=1", "--val=2", "--size=[48,64]"]) == 0
        (tmp_path / "run" / "best").mkdir(parents=True)
        config = tmp_path / "run" / "config.yaml"
        config.write_text(f"data: {{name: folder, root: {tmp_path}/data}}\nrecipe: {{seed: 3}}\nmodel: {{depth: 4}}\n")
        assert len(_data_of_run(str(tmp_path / "run" / "best"))) == 2
        config.write_text(f"data: {{name: folder, root: {tmp_path}/gone}}\n")
        assert _data_of_run(str(tmp_path / "run" / "best")) is None

    def test_a_survey_tells_its_data_set(self, tmp_path):
        from routeseg.cli.app import read_survey

        data = DataConfig(name="scenes", image_size=SIZE, val_images=2)
        facts = {"data_config": asdict(data), "data": "scenes", "split": "val", "seed": 0, "per_image": []}
        (tmp_path / "routes.json").write_text(json.dumps(facts))
        assert len(read_survey(tmp_path)[1]) == 2


def test_the_space_shows_the_same_explorer(monkeypatch):
    shown = []
    monkeypatch.setenv("SPACE_HOST", "a-b.hf.space")
    monkeypatch.setattr("routeseg.app.launch", lambda *given, **how: shown.append((given, how)))
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "space" / "app.py"))
    ((model, name), how) = shown[0]
    assert (
        model.exits is not None
        and "CamVid" in name
        and how == {"host": "0.0.0.0", "port": 7860, "names": ["a-b.hf.space"]}
    )


@pytest.fixture(scope="module")
def address(explorer):
    pytest.importorskip("gradio", reason="the explorer needs the extra `app`")
    from routeseg.app import launch

    page = launch(explorer.model, explorer.name, explorer.survey, wait=False)
    yield page.local_url
    page.close()


def test_the_server_itself(address, explorer):
    """Over HTTP: its own page may ask, another may not, and no question is an error of the server."""
    httpx = pytest.importorskip("httpx", reason="the extra routeseg[dev]")
    client = httpx.Client(base_url=address, trust_env=False)
    about = {"session_hash": "x", "fn_name": "about", "data": None}
    about["component_id"] = next(
        one["id"] for one in client.get("config").json()["components"] if one["type"] == "html"
    )
    url = "gradio_api/component_server"
    assert client.post(url, json=about).json()["name"] == explorer.name
    assert client.post(url, json=about, headers={"Origin": "https://evil.example"}).status_code == 403
    assert client.post(url, json=about, headers={"Host": "evil.example"}).status_code == 403
    assert client.get("", headers={"Host": "evil.example"}).status_code == 403
    assert client.post(url, content=json.dumps(about)).status_code == 415
    assert "no text" in client.post(url, json=about | {"fn_name": "open", "data": {"example": []}}).json()["error"]
    for wrong in ({"component_id": 10**6}, {"component_id": []}, {"session_hash": {}}, {"fn_name": None}):
        assert 400 <= client.post(url, json=about | wrong).status_code < 500
    for body in (b"[]", b"5", b"{}", b"[" * 10_000, b'{"data": 1e400}', b"\xff"):
        assert client.post(url, content=body, headers={"Content-Type": "application/json"}).status_code == 400


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    if BROWSER is None:
        pytest.skip("no Chromium is installed: `make browser` does that")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    flags += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=BROWSER, args=flags)
        yield browser
        browser.close()


class Page:
    """The explorer in a window, as a user has it."""

    def __init__(self, context, address: str) -> None:
        self.page, self.address = context.new_page(), address
        self.elsewhere: list[str] = []
        self.page.on("request", self._note)
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("[data-ready=yes]", timeout=60_000)

    def _note(self, request) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def state(self, path: str):
        return self.page.evaluate(f"document.querySelector('[data-ready]').routeseg.{path}")

    def settled(self) -> None:
        """Waits until no question is on its way."""
        self.page.wait_for_function(
            "(s => s.view && !s.busy && !s.stale)(document.querySelector('[data-ready]').routeseg)", timeout=60_000
        )

    def after(self, act) -> None:
        """Waits for an answer to what this does."""
        before = self.state("answers")
        act()
        self.page.wait_for_function(
            f"document.querySelector('[data-ready]').routeseg.answers > {before}", timeout=60_000
        )
        self.settled()

    def slide(self, value: int) -> None:
        self.page.locator(".rs-range").evaluate(
            "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }", value
        )

    def keep(self, name: str) -> None:
        if SCREENSHOTS:
            Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{SCREENSHOTS}/{name}.png", full_page=True)


@pytest.fixture
def page(chromium, address, request):
    """A fresh window; `request.param` are options of the browser's context."""
    options = {"viewport": {"width": 1280, "height": 900}, "permissions": ["camera"]} | getattr(request, "param", {})
    with chromium.new_context(**options) as context:
        window = Page(context, address)
        yield window
        assert not window.problems


@pytest.fixture
def picture(street, tmp_path) -> Path:
    """The user's own: a real street if there is one here, else a drawn one."""
    real = os.environ.get("ROUTESEG_SCREENSHOT_PICTURE")
    path = tmp_path / "mine.png"
    path.write_bytes(Path(real).read_bytes() if real else png(street))
    return path


class TestBrowser:
    def test_a_picture_a_budget_and_a_route(self, page, picture):
        window = page.page
        page.after(lambda: window.set_input_files(".rs-file", picture))
        assert "mine.png" in window.locator(".rs-this figcaption").inner_text()
        assert window.locator(".rs-numbers dd").count() >= 5
        assert window.locator(".rs-places").is_visible(), "places leave this network by themselves"
        dear = page.state("view.share")

        def drag() -> None:
            for value in range(900, -1, -100):
                page.slide(value)

        page.after(drag)
        assert page.state("view.share") < dear
        assert page.state("view.asked") == pytest.approx(page.state("picture.range.share[0]"), rel=0.05)  # the last one
        page.after(lambda: page.slide(1000))

        path = window.locator("[data-edge='1,1,2']")
        page.after(lambda: path.locator(".hit").click(force=True))
        assert path.get_attribute("aria-checked") == "false"
        assert "% of the pixels differ" in window.locator(".rs-effect").inner_text()
        assert window.locator(".rs-other").is_visible()
        page.keep("explorer")
        window.check(".rs-changes")
        page.after(lambda: window.locator("[data-node='0,0']").click())
        assert window.locator("[data-edge='0,0,2']").get_attribute("aria-checked") == "false"
        page.after(lambda: window.locator(".rs-reset").click())
        assert path.get_attribute("aria-checked") == "true" and not page.elsewhere

    def test_a_place_goes_on_or_leaves_earlier(self, page, picture):
        window = page.page
        page.after(lambda: window.set_input_files(".rs-file", picture))
        page.after(lambda: page.slide(250))
        window.check(".rs-effort")
        share, exits = page.state("view.share"), page.state("view.effort.exits")
        at = {"position": {"x": 30, "y": 30}}
        page.after(lambda: window.locator(".rs-this canvas").click(**at))
        assert (
            page.state("view.share") != share and page.state("places.exits") == page.state("view.effort.exits") != exits
        )
        assert "what the network chose" in window.locator(".rs-effect").inner_text()
        page.keep("places")
        page.after(lambda: window.locator(".rs-this canvas").click(modifiers=["Shift"], **at))
        assert page.state("view.effort.exits") == exits
        page.after(lambda: window.locator(".rs-reset").click())
        assert page.state("places") is None and page.state("view.share") == share

    def test_the_keyboard_alone(self, page):
        window = page.page
        example = window.locator("[data-example=large]")
        example.focus()
        page.after(lambda: window.keyboard.press("Enter"))
        window.locator(".rs-route [tabindex='0']").focus()
        window.keyboard.press("ArrowRight")
        edge = window.evaluate("document.activeElement.dataset.edge")
        was = window.evaluate("document.activeElement.getAttribute('aria-checked')")
        page.after(lambda: window.keyboard.press("Enter"))
        assert window.evaluate("document.activeElement.dataset.edge") == edge  # the focus stays
        assert window.evaluate("document.activeElement.getAttribute('aria-checked')") != was
        window.locator(".rs-range").focus()
        page.after(lambda: window.keyboard.press("Home"))
        assert page.state("view.share") < 0.5

    def test_names_under_the_pointer(self, page):
        window = page.page
        page.after(lambda: window.click("[data-example=mixed]"))
        window.locator(".rs-this canvas").hover(position={"x": 40, "y": 40})
        assert window.locator(".rs-this .rs-tip").inner_text() in page.state("about.classes")

    def test_what_is_no_picture(self, page, tmp_path):
        wrong = tmp_path / "words.png"
        wrong.write_text("words")
        page.page.set_input_files(".rs-file", wrong)
        page.page.wait_for_selector(".rs-error:visible")
        assert "cannot read words.png" in page.page.locator(".rs-error").inner_text()
        page.after(lambda: page.page.click("[data-example=small]"))
        assert page.page.locator(".rs-error").is_hidden()

    def test_compared_with_the_route_of_another_picture(self, page):
        window = page.page
        page.after(lambda: window.click("[data-example=small]"))
        page.after(lambda: window.click(".rs-keep"))
        page.after(lambda: window.click("[data-example=large]"))
        assert "the route of drawn street, small things" in window.locator(".rs-other figcaption").inner_text()

    def test_the_camera(self, page):
        page.page.click(".rs-camera")
        page.page.wait_for_function("document.querySelector('.rs-video').videoWidth > 0", timeout=20_000)
        page.after(lambda: page.page.click(".rs-take"))
        assert page.state("picture.name") == "camera"

    def test_a_data_set(self, page, survey):
        page.page.click("[data-tab=survey]")
        assert page.page.locator(".rs-scatter circle").count() == SURVEYED
        page.keep("explorer_data")
        cheapest = page.page.locator(".rs-cheapest button").first
        name = min(survey.rows, key=lambda row: row["cost_share"])["name"]
        assert name in cheapest.inner_text()
        page.after(cheapest.click)
        assert page.state("picture.name") == name

    @pytest.mark.parametrize(
        "page",
        [{"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "has_touch": True}],
        ids=["phone"],
        indirect=True,
    )
    def test_a_phone_in_the_dark(self, page):
        window = page.page
        page.after(lambda: window.tap("[data-example=mixed]"))
        assert window.evaluate("document.documentElement.scrollWidth") <= 360
        red, green, blue = window.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(", ")
        assert max(int(red), int(green), int(blue)) < 80
        page.after(lambda: page.slide(0))
        assert window.locator(".rs-this canvas").is_visible()
        page.keep("explorer_phone")
