"""A wheel that is built here works outside the clone: kernels, presets and networks are in it."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

CLONE = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment(tmp_path):
    """Other packages are those of this environment, by a path file, which does not bring this package along."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, CLONE], check=True)
    (wheel,) = tmp_path.glob("routeseg-*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    place = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")})
    (Path(place) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "ROUTESEG"))}
    done = subprocess.run([python, CLONE / "tests" / "installed.py"], cwd=tmp_path, env=elsewhere, timeout=600)
    assert done.returncode == 0
