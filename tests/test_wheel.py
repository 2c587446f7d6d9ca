"""A wheel that is built here works outside the clone: kernels, presets and networks are in it."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import page

CLONE = Path(__file__).parents[1]
LEAN = next(code for _, _, code in page.blocks(CLONE / "docs" / "prediction.md") if "lean/bin/pip" in code)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(words) with the Python of an environment that has the wheel. Other packages are those of this environment, by
    a path file, which does not bring this package along."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, CLONE], check=True)
    (wheel,) = folder.glob("routeseg-*.whl")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    place = sysconfig.get_path("purelib", vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")})
    (Path(place) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "ROUTESEG"))}
    return lambda *words: subprocess.run([python, *words], cwd=folder, env=elsewhere, timeout=1800).returncode


def test_a_wheel_in_an_empty_environment(run):
    assert run(CLONE / "tests" / "installed.py") == 0


def test_the_blocks_of_the_documents(run):
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", "-k", "blocks_run"]
    assert run(*words, CLONE / "tests" / "test_documents.py") == 0


def test_the_environment_without_pytorch(tmp_path, monkeypatch):
    """The block of docs/prediction.md as it stands, with packages from the index."""
    monkeypatch.chdir(tmp_path)
    page.photos(tmp_path / "photos")
    page.network(5)(Path("network"))
    assert page.main(["export", "network", "net.onnx"]) == 0
    code = LEAN.replace("--no-deps .", f"--no-deps {CLONE}")
    elsewhere = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    subprocess.run(["bash", "-e", "-c", code], check=True, env=elsewhere)
    assert len(list(Path("predictions").glob("*_labels.png"))) == 2
