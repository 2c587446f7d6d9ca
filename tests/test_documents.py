"""README.md, CONTRIBUTING.md, CHANGELOG.md and docs/: tables are those of the results files, links lead somewhere,
commands parse, blocks run (page.py), the names of Python blocks exist; and the site that is built of them."""

import ast
import json
import re
import shlex
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import page
import routeseg
import tables
from routeseg.cli import common, main
from routeseg.cli.parser import Parser
from routeseg.cost.macs import exit_costs
from routeseg.data.scenes import draw_scene
from routeseg.registry import BACKBONES, CHOICES, GATES, HEADS, OPERATIONS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
CODE = [
    path.as_posix() for part in ("src", "benchmarks", "tests", "examples") for path in (ROOT / part).glob("**/*.py")
]
# Named in a document, and no files of ours: what a command writes or the benchmark of VOC expects.
NOT_HERE = (
    "results/VOC2012/Segmentation/comp6_test_cls/NAME.png",
    "results/inference_cuda.json",
    "configs/camvid/small_cpu.yaml",  # before presets: CHANGELOG.md
)
LONG = ("data", "export", "index", "prediction", "results", "training")  # pages that take a minute or more
PAGES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in LONG else [])
    for path in DOCUMENTS
    if re.search(r"^```(sh|python)", path.read_text(), re.MULTILINE)
]
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?[^)]*\)")
COMMAND = re.compile(r"(?:^|\s)(?:\S*/)?routeseg(?:\.cli)? ([a-z][\w-]+ .*)")


BUDGET = re.compile(r"\b([\d.]+)GMACs")


def blocks(path: Path, *languages: str) -> list[str]:
    """The code blocks of a document in these languages."""
    return [code for _, language, code in page.blocks(path) if language in languages]


def test_tables_are_those_of_the_results_files(capsys):
    """`python benchmarks/tables.py` would change nothing."""
    assert tables.main(["--check"]) == 0, (
        f"run `python benchmarks/tables.py`, it would change {capsys.readouterr().out}"
    )


def test_quoted_files_say_where_they_come_from():
    quoted = {
        name for path in DOCUMENTS for match in tables.MARKS.finditer(path.read_text()) for name in match[2].split()
    }
    assert len(quoted) >= 8
    for name in quoted:
        facts = json.loads((ROOT / name).read_text())
        assert {"machine", "date", "versions"} <= set(facts) and not facts.get("missing"), name


def anchors(path):
    """Those that GitHub gives the headings of a document, and so does the site."""
    headings = re.findall(r"^#+ (.*)", page.BLOCK.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@each_document
def test_links_and_names_lead_somewhere(path):
    text = path.read_text()
    for link, anchor in LINK.findall(page.BLOCK.sub("", text)):
        if not link.startswith("https://"):
            assert (path.parent / link).exists() or link in NOT_HERE, link
            assert not anchor or link in NOT_HERE or anchor in anchors(path.parent / link if link else path), (
                f"{link}#{anchor}"
            )
    for name in re.findall(r"\b((?:configs|results|docs)/[\w/.]+\.\w+)", text):
        assert (ROOT / name).exists() or name in NOT_HERE, name
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert any(path.endswith(f"/{name}") for path in CODE), name


def commands(path):
    """The words of every `routeseg ...` in the shell blocks of a document."""
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if match := COMMAND.search(line):
                yield shlex.split(match[1], comments=True)


class ParsedError(Exception):
    """The words are a command's."""


@each_document
def test_commands_parse(path, monkeypatch, capsys):
    """By the parser of the command itself; nothing of it is run."""
    parse = Parser.parse_args

    def parse_alone(self, *args, **options):
        parse(self, *args, **options)
        raise ParsedError

    monkeypatch.setattr(Parser, "parse_args", parse_alone)
    monkeypatch.setattr(common, "layout_of", lambda root: "folder")  # no folder of theirs is here
    monkeypatch.chdir(ROOT)
    for words in commands(path):
        try:
            main(words)
        except ParsedError:
            continue
        except SystemExit:
            pass
        pytest.fail(f"{' '.join(words)}: {capsys.readouterr().err}")


def test_commands_are_found():
    found = {words[0] for path in DOCUMENTS for words in commands(path)}
    assert {"train", "evaluate", "predict", "export", "profile", "check-data", "pretrain"} <= found


@each_document
def test_the_names_of_python_blocks_exist(path):
    """A block compiles, and what it takes from routeseg is there; nothing of it is run."""
    for code in blocks(path, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                for name in [alias.name for alias in node.names if alias.name.split(".")[0] == "routeseg"]:
                    import_module(name)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "routeseg":
                for alias in node.names:
                    assert hasattr(import_module(node.module), alias.name), f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "routeseg":
                assert hasattr(routeseg, node.attr), f"routeseg.{node.attr}"


NOT_RUN = 8  # blocks of all documents; each says why


@pytest.mark.parametrize("path", PAGES)
def test_the_blocks_run(path, tmp_path, monkeypatch, one_thread):
    """In the order of the page, on small stand-ins for data and trainings: page.py."""
    monkeypatch.chdir(tmp_path)
    for registry in (GATES, OPERATIONS, HEADS, CHOICES, BACKBONES):  # what a page registers is its own
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    page.Page(path, tmp_path, monkeypatch).run()


def test_few_blocks_are_not_run():
    found = [block for path in DOCUMENTS for block in page.blocks(path)]
    assert len([reason for reason, *_ in found if reason]) <= NOT_RUN
    assert {language for _, language, _ in found} <= {"sh", "python", "text", "yaml", "nginx"}


def test_the_site(tmp_path):
    """`mkdocs build --strict` passes; nothing in the pages is fetched from elsewhere; docstrings are readable."""
    mkdocs = shutil.which("mkdocs", path=ROOT / ".venv-docs" / "bin") or shutil.which("mkdocs")
    if mkdocs is None:
        pytest.skip("mkdocs is not installed: `make docs` installs it")
    done = subprocess.run(
        [mkdocs, "build", "-q", "--strict", "--site-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {built.relative_to(tmp_path).as_posix(): built.read_text() for built in tmp_path.glob("**/*.html")}
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= set(pages)
    for name, html in pages.items():
        assert not re.search(r"<(?:script|img|iframe|link)[^>]*(?:src|href)=\"?(?:https?:)?//", html), name
        assert "arithmatex" not in html and not re.search(r"<p>:::|href=\"[^\"]*/src/", html), name
    for name in routeseg.__all__:
        assert name.startswith("__") or f'id="routeseg.{name}"' in pages["api/routeseg.html"], name
    assert re.search(r"<li>\s*(?:<p>)?<code>weight</code>: lambda_2", pages["api/routeseg.html"])
    assert (tmp_path / "results" / "inference_cpu.png").exists() and "results/inference_cpu.html" in pages


def test_the_python_of_the_readme(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in code.splitlines() if line]) <= 5
    exec(compile(code, "README.md", "exec"), {})
    classes, cost = capsys.readouterr().out.splitlines()
    assert classes.startswith("{'") and classes.endswith("} (480, 640)") and len(cost.split()) == 2
    assert Image.open("overlay.png").width >= 640


def test_the_python_of_training(tmp_path, monkeypatch, capsys):
    averaged, short, pieces = blocks(ROOT / "docs" / "training.md", "python")[:3]
    monkeypatch.chdir(tmp_path)
    quick = '"train_images": 8, "val_images": 4, "image_size": [32, 64], "crop": [32, 64], "batch_size": 2'
    assert '"iterations": 2' in short and '"train_images": 16' in short
    short = short.replace('"iterations": 2', '"iterations": 2, "precise_bn_batches": 1')
    exec(short.replace('"train_images": 16', quick), {})
    assert (tmp_path / "runs" / "tried" / "report.html").is_file()
    exec(averaged.replace("first", "tried").replace("second", "tried"), {})
    assert routeseg.load("runs/average").config == routeseg.load("runs/tried/last").config
    exec(pieces, {})
    miou, steps, _ = capsys.readouterr().out.splitlines()[-1].split()
    assert 0 <= float(miou) <= 1 and int(steps) == 4 and (tmp_path / "runs" / "small" / "last").is_dir()


def test_the_sample_is_drawn_and_small():
    drawn = draw_scene(11, 0, (480, 640), "small")[0].astype(int)
    shipped = np.asarray(Image.open(routeseg.sample())).astype(int)
    assert np.abs(drawn - shipped).mean() < 3 and routeseg.sample().stat().st_size < 200_000


def test_budgets_in_macs_are_kept_by_the_bundled_network():
    """On the sample, and on CamVid's frames: so on a photo of usual size."""
    model = routeseg.load()
    said = {
        float(one)
        for path in DOCUMENTS
        if path.stem not in ("lab", "CHANGELOG")
        for one in BUDGET.findall(path.read_text())
    }
    assert said
    for size in ((360, 480), (480, 640)):
        costs = exit_costs(model, size) / 1e9
        assert costs[0] < min(said) and max(said) < costs[-1]


def test_the_export_of_the_readme_is_of_the_network_that_it_trains():
    """From the bundled network: one with exits, which a file holds as it is."""
    (words,) = [words[1:] for words in commands(ROOT / "README.md") if words[0] == "export"]
    assert words == ["runs/my/best", "net.onnx"]
    assert any(words[:2] == ["predict", "net.onnx"] and "--budget" in words for words in commands(ROOT / "README.md"))
    pytest.importorskip("onnx")
    from routeseg.export import EXITS, kind_of

    assert kind_of(routeseg.load()) == EXITS
