"""Tries an installed package as a new user would, in an empty folder: own images, the commands, Python.

    python tests/installed.py

Needs nothing of a clone; test_wheel.py and the release workflow run it on a wheel. Exit code 0 if all works.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import routeseg
from routeseg.engine import compiled

SIZE = 64


def draw(folder: Path) -> None:
    """Images whose upper half is bright, with masks that say so."""
    rng = np.random.default_rng(0)
    rows = np.arange(SIZE)[:, None] < SIZE // 2
    for part, number in (("train", 12), ("val", 4)):
        for kind in ("images", "masks"):
            (folder / kind / part).mkdir(parents=True)
        for index in range(number):
            pixels = np.where(rows[..., None], 170, 60) + rng.integers(0, 60, (SIZE, SIZE, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / part / f"{index}.jpg")
            Image.fromarray(np.broadcast_to(rows, (SIZE, SIZE)).astype(np.uint8)).save(
                folder / "masks" / part / f"{index}.png"
            )


def command(*words: object) -> None:
    """Runs `routeseg` of this Python."""
    program = Path(sys.executable).parent / "routeseg"
    print("$ routeseg", *words, flush=True)
    subprocess.run([program, *map(str, words)], check=True)


def main() -> None:
    print(f"routeseg {routeseg.__version__} in {Path(routeseg.__file__).parent}")
    if sys.platform != "win32":  # MSVC does not know GCC's vectors
        assert compiled.is_compiled(torch.float32), "the kernels are missing"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder / "my")
        small = ["--data.crop", f"{SIZE}x{SIZE}", "--data.batch_size", 2, "--recipe.precise_bn_batches", 1]
        command("check-data", folder / "my")
        command("train", folder / "my", *small, "--recipe.iterations", 2, "--output", folder / "run")
        command("evaluate", folder / "run")
        command("predict", folder / "run", folder / "my" / "images" / "val", "--output", folder / "predictions")
        assert len(list((folder / "predictions").glob("*_labels.png"))) == 4
        command("demo", "--config", "scenes/small", *small, "--recipe.iterations", 2, "--output", folder / "demo")
        assert (folder / "demo" / "report.html").is_file()
        photo = folder / "my" / "images" / "val" / "0.jpg"
        result = routeseg.load()(photo)  # the bundled network
        assert result.labels.shape == (SIZE, SIZE) and result.cost_gmacs > 0
    print("all well")


if __name__ == "__main__":
    main()
