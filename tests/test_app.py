"""The explorer: what it answers, what it refuses, and its page in a real browser.

The browser is Debian's Chromium, driven by playwright; `make browser` installs it. Set ROUTESEG_SCREENSHOTS to a folder
to keep what the tests see there: the pictures of the documents come from here.
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
from routeseg.app import BODY_BYTES, Guard
from routeseg.app.explorer import HELD, SIDE, Explorer, Survey
from routeseg.cli import main
from routeseg.data.config import DataConfig, open_data
from routeseg.data.scenes import draw_scene
from routeseg.evaluation.route_statistics import object_size

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

    def test_labels_give_a_score(self, explorer, street, opened):
        found = labels_of(explorer.look({"picture": opened["picture"]}))
        known = explorer.open({"file": text(png(street)), "labels": text(png(found))})
        assert explorer.look({"picture": known["picture"]})["score"] == 1.0

    def test_a_large_picture_is_shrunk(self, explorer):
        big = explorer.open({"file": text(png(np.zeros((600, 2 * SIDE, 3), np.uint8)))})
        assert (big["height"], big["width"]) == (300, SIDE)

    def test_only_the_last_pictures_are_held(self, explorer, street):
        tokens = [explorer.open({"file": text(png(street))})["picture"] for _ in range(HELD + 1)]
        assert "no longer held" in explorer.look({"picture": tokens[0]})["error"]
        assert "error" not in explorer.look({"picture": tokens[-1]})

    def test_pictures_of_a_data_set_are_opened_by_name(self, explorer, survey):
        name = survey.about()["pictures"][2][0]
        assert explorer.open({"survey": name})["name"] == name
        assert "no such picture" in explorer.open({"survey": "../../etc/passwd"})["error"]


class TestRefusals:
    @pytest.mark.parametrize(
        "question, words",
        [
            (None, "an object"),
            ({}, "choose a picture"),
            ({"file": "%%%"}, "damaged"),
            ({"file": text(b"words")}, "cannot read"),
            ({"file": text(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")}, "cannot read"),
            ({"file": text(png(np.zeros((1, 60_000_000), np.uint8)))}, "at most"),
            ({"file": "A" * (4 * 20_000_000 // 3 + 8)}, "larger than 20 MB"),
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
        ],
    )
    def test_of_questions(self, explorer, opened, question, words):
        assert words in explorer.look({"picture": opened["picture"], **question})["error"]


class TestGuard:
    """The guard in front of the server, asked as a server asks it."""

    def ask(self, path: str, headers=(), chunks=(b"",)) -> tuple[int, bytes]:
        sent, left = [], [{"type": "http.request", "body": chunk} for chunk in chunks]

        async def app(scope, receive, send):
            size = 0
            for _ in chunks:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionError
                size += len(message["body"])
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body", "body": str(size).encode()})

        async def receive():
            return left.pop(0)

        async def send(message):
            sent.append(message)

        asyncio.run(
            Guard(app)({"type": "http", "method": "POST", "path": path, "headers": list(headers)}, receive, send)
        )
        return sent[0]["status"], sent[1]["body"]

    def test_what_is_too_large_is_refused_before_it_is_read(self):
        assert self.ask("/x", [(b"content-length", str(BODY_BYTES + 1).encode())])[0] == 413
        assert self.ask("/x", [(b"content-length", b"a lot")])[0] == 413

    def test_what_does_not_say_its_size_is_cut_off(self):
        assert self.ask("/x", chunks=[b"a" * 10] * 3) == (200, b"30")
        with pytest.raises(ConnectionError):
            self.ask("/x", chunks=[b"a" * (BODY_BYTES // 2)] * 3)

    def test_no_file_is_written(self):
        assert self.ask("/gradio_api/upload")[0] == 403


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

    def test_a_survey_tells_its_data_set(self, tmp_path):
        from routeseg.cli.app import _survey

        data = DataConfig(name="scenes", image_size=SIZE, val_images=2)
        facts = {"data_config": asdict(data), "data": "scenes", "split": "val", "seed": 0, "per_image": []}
        (tmp_path / "routes.json").write_text(json.dumps(facts))
        assert len(_survey(tmp_path).pictures) == 2


def test_the_space_shows_the_same_explorer(monkeypatch):
    shown = []
    monkeypatch.setattr("routeseg.app.launch", lambda *given, **how: shown.append((given, how)))
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "space" / "app.py"))
    ((model, name), how) = shown[0]
    assert model.exits is not None and "CamVid" in name and how == {"host": "0.0.0.0", "port": 7860}


@pytest.fixture(scope="module")
def address(explorer):
    pytest.importorskip("gradio", reason="the explorer needs the extra `app`")
    from routeseg.app import launch

    page = launch(explorer.model, explorer.name, explorer.survey, wait=False)
    yield page.local_url
    page.close()


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
