"""Runs the code blocks of a document, in the order of the page, in a folder with small stand-ins for what it speaks of.

Python        runs as it stands; a page has one namespace, as a notebook has
`routeseg`    runs in this process, by the words of the page, with SMALL behind them: tiny networks, images of 64x96,
              two steps in place of `--minutes`. A budget in MACs, which is one of a network of usual size, is a
              percentage
`make`        what `make -n` says of `routeseg`
`benchmarks/` these take hours: their own parsers read the words
`pip install` looked up: the extra is one of pyproject.toml
`examples/`, `curl`  a server in a thread, and curl

What a page needs and does not make lies there under the name that the page has for it: `STAND_INS`. A block behind
`<!-- not run: REASON -->` is left out, and any other command is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import jsonargparse
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from safetensors.torch import load_file

import routeseg
from conftest import GOLDEN, spread_gates, with_exits
from routeseg.cli import main
from routeseg.data.config import DataConfig
from routeseg.data.tools.layouts import write_layout

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
BLOCK = re.compile(r"(?:^<!-- not run: ([^\n]*) -->\n\n)?^```(\w*)\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)
SIZE = (64, 96)
NETWORK = {"--model.depth": 8, "--model.base_channels": 8, "--model.stem_channels": 8}
STEPS = {"--data.crop": "64x96", "--data.batch_size": 2, "--data.workers": 0}
STEPS |= {"--recipe.iterations": 2, "--recipe.precise_bn_batches": 1, "--recipe.warmup_steps": 0}
PLAIN = {"--recipe.class_offsets": "false"}
SCENES = {"--data.image_size": "64x96", "--data.train_images": 8, "--data.val_images": 8}
SMALL = {
    "train": STEPS | NETWORK | PLAIN,
    "train own": STEPS | PLAIN,  # from the bundled network, which has its size
    "demo": STEPS | SCENES | PLAIN,
    "pretrain": STEPS | NETWORK | {"--data.crop": 32, "--data.resize": 40},
    "calibrate": {"--data.crop": "64x96"},
    "profile": {"--repeats": 1},
    "app": {"--browser": "false"},
}


def blocks(path: Path) -> list[tuple[str, str, str]]:
    """Why it is not run, or nothing, the language, and the code of each block of a document."""
    return BLOCK.findall(path.read_text())


def commands(code: str) -> list[list[str]]:
    """The words of each command of a shell block."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def scenes(layout: str) -> Callable[[Path], None]:
    """Scenes in the layout of a data set."""
    few = DataConfig(image_size=SIZE, train_images=8, val_images=8)
    return lambda folder: write_layout(layout, folder, few)  # type: ignore[arg-type]


def data_sets(folder: Path) -> None:
    """Scenes in three layouts in one folder, as pages write FOLDER for any of them."""
    for layout in ("cityscapes", "camvid", "voc"):
        scenes(layout)(folder / layout)
        for entry in list((folder / layout).iterdir()):
            entry.rename(folder / entry.name)
        (folder / layout).rmdir()


def photo(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    Image.fromarray(noise).resize(SIZE[::-1], Image.Resampling.BICUBIC).save(path)


def photos(folder: Path) -> None:
    for number in range(2):
        photo(folder / f"{number}.jpg", number)


def listing(path: Path) -> None:
    photos(path.parent / "photos")
    path.write_text("photos/0.jpg\nphotos/1.jpg\n")


def clip(path: Path) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 5, SIZE[::-1])
    for number in range(4):
        writer.write(np.full((*SIZE, 3), 50 * number, np.uint8))
    writer.release()


def object_masks(folder: Path) -> None:
    """A mask for each of two classes."""
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        mask = np.zeros(SIZE, np.uint8)
        mask[20 * number :, 30:60] = 255
        Image.fromarray(mask).save(folder / name / "0.png")


def class_folders(folder: Path) -> None:
    for part in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            for number in range(4):
                photo(folder / part / name / f"{number}.JPEG", number)


def released(path: Path) -> None:
    """Weights under the names of the authors' code."""
    torch.save({"model": load_file(GOLDEN / "tiny_small_gate.weights.safetensors")}, path)


def network(classes: int, **options: Any) -> Callable[[Path], object]:
    """A network that was not trained."""

    def save(folder: Path) -> object:
        torch.manual_seed(0)
        small = {"depth": 8, "base_channels": 8, "stem_channels": 8} | options
        return spread_gates(routeseg.DynamicRoutingNetwork(num_classes=classes, **small)).save(folder)

    return save


def run_of_own_images(folder: Path) -> None:
    scenes("folder")(Path("my"))
    assert main(["train", "my", *flags(SMALL["train own"]), "--output", str(folder)]) == 0


def route_file(path: Path) -> None:
    """Of the network in runs/a/best."""
    photo(Path("a.jpg"))
    assert main(["predict", "runs/a/best", "a.jpg", "--output", "routes_of_a", "--pictures", "false"]) == 0
    shutil.copy("routes_of_a/a_route.json", path)


STAND_INS: dict[str, Callable[[Path], object]] = {
    **dict.fromkeys(("my", "ROOT", "VOC_ANIMALS"), scenes("folder")),
    **dict.fromkeys(("CAMVID", "path/to/camvid"), scenes("camvid")),
    **dict.fromkeys(("CITYSCAPES", "path/to/cityscapes"), scenes("cityscapes")),
    "path/to/voc": scenes("voc"),
    "FOLDER": data_sets,
    "IMAGENET": class_folders,
    "masks": object_masks,
    "photos": photos,
    "list.txt": listing,
    **dict.fromkeys(("street.jpg", "src/routeseg/street.jpg"), photo),
    "clip.mp4": clip,
    "model_final.pth": released,
}
U_NET = {"gate": "fixed", "route": "u-net"}
EXITS = {"gate": "fixed", "route": "diagonal", "exits": [0, 1, 2, 3, 4, 5, 6]}
OF_PAGES: dict[str, dict[str, Callable[[Path], object]]] = {  # in this order
    "evaluation": {"runs/a/best": network(19), "runs/v/best": network(21)},
    "export": {
        "runs/a/best": network(11),
        "runs/any/best": lambda path: with_exits(SIZE, exits=[1, 3, 4]).save(path),
        "runs/static/best": network(11, **U_NET),
        "route.json": route_file,
    },
    "inference": {"runs/any/best": lambda path: with_exits(SIZE, exits=[1, 3, 4]).save(path)},
    "prediction": {"runs/a/best": network(11), "runs/my": run_of_own_images},
    "results": {"runs/a/best": network(11)},
    "training": {"CHECKPOINT": network(11, **EXITS)},
}


def flags(options: Mapping[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in options.items()]


class Page:
    """The blocks of a document, run in a folder, which is the current one, and under a monkeypatch of their own."""

    def __init__(self, path: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.path, self.folder, self.patch = path, folder, patch
        self.names: dict[str, Any] = {}
        self.server: uvicorn.Server | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])

    def run(self) -> None:
        for name, make in OF_PAGES.get(self.path.stem, {}).items():
            make(self.folder / name)
        for reason, language, code in blocks(self.path):
            if not reason and language == "python":
                self.provide(re.findall(r"""["']([^"'\n]+)["']""", code))
                code = code.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
                exec(compile(code, str(self.path), "exec"), self.names)
            elif not reason and language == "sh":
                for words in commands(code):
                    self.provide(words)
                    self.command(words)
        if self.server is not None:
            self.server.should_exit = True

    def provide(self, words: Sequence[str]) -> None:
        """What a command or a block names, and is not there."""
        for word in words:
            name = next((name for name in STAND_INS if re.fullmatch(rf"(.*[@=])?{re.escape(name)}(/.*)?", word)), None)
            if name is not None and not (self.folder / name).exists():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                STAND_INS[name](self.folder / name)

    def command(self, words: list[str]) -> None:
        match [Path(words[0]).name, *words[1:]]:
            case ["routeseg", *rest]:
                assert self.routeseg(rest) == 0, shlex.join(words)
            case ["make", *rest]:
                planned = subprocess.run(["make", "-n", *rest], cwd=ROOT, check=True, capture_output=True, text=True)
                for line in planned.stdout.splitlines():
                    if line.startswith(".venv/bin/routeseg "):
                        self.command(shlex.split(line))
            case ["python", program, *rest] if program.startswith("benchmarks/"):
                self.parsed(ROOT / program, rest)
            case ["python", program, *rest] if program.startswith("examples/"):
                self.serve(ROOT / program, rest)
            case ["curl", *rest]:
                rest = [word.replace(":8000", f":{self.port}") for word in rest]
                subprocess.run(["curl", "--silent", "--show-error", "--fail", *rest], check=True)
            case ["pip", "install", requirement]:
                name, extra = re.fullmatch(r"(\w+)\[(\w+)\]", requirement).groups()  # type: ignore[union-attr]
                assert name == "routeseg" and extra in EXTRAS, requirement
            case _:
                raise AssertionError(f"{self.path.name}: tests/page.py does not know how to run {shlex.join(words)}")

    def routeseg(self, words: list[str]) -> int:
        words = [re.sub(r"^[\d.]+GMACs$", "60%", word) for word in words]
        own = words[0] == "train" and "--config" not in words
        if "--minutes" in words:
            at = words.index("--minutes")
            words[at : at + 2] = []
        small = {} if own and "--resume" in words else SMALL.get("train own" if own else words[0], {})
        small = small | SCENES if words[0] == "train" and any(word.startswith("scenes/") for word in words) else small
        self.patch.setattr("gradio.Blocks.block_thread", lambda page: page.close())  # the explorer ends at once
        return main([*words, *flags(small)])

    def parsed(self, program: Path, words: list[str]) -> None:
        """A benchmark takes these words."""

        class Parsed(Exception):
            pass

        def known(parser, *args, **how):
            found, rest = parse_known(parser, *args, **how)
            if rest or isinstance(parser, jsonargparse.ArgumentParser):  # which reads what another one left
                return found, rest
            raise Parsed

        def all_of_them(parser, *args, **how):
            parse(parser, *args, **how)
            raise Parsed

        parse_known, parse = argparse.ArgumentParser.parse_known_args, jsonargparse.ArgumentParser.parse_args
        with self.patch.context() as patch, contextlib.suppress(Parsed):
            patch.setattr(argparse.ArgumentParser, "parse_known_args", known)
            patch.setattr(jsonargparse.ArgumentParser, "parse_args", all_of_them)
            patch.setattr(sys, "argv", [str(program), *words])
            patch.chdir(ROOT)
            runpy.run_path(str(program), run_name="__main__")
            raise AssertionError(f"{program} read no words")

    def serve(self, program: Path, words: list[str]) -> None:
        """In a thread, until the page ends."""

        def run(app, host: str, port: int) -> None:
            self.server = uvicorn.Server(uvicorn.Config(app, host, port, log_level="warning"))
            self.server.run()

        self.patch.setattr(uvicorn, "run", run)
        self.patch.setattr(sys, "argv", [str(program), *words[:-1], self.port] if words[-2] == "--port" else [])
        threading.Thread(
            target=runpy.run_path, args=[str(program)], kwargs={"run_name": "__main__"}, daemon=True
        ).start()
        for _ in range(600):
            if self.server is not None and self.server.started:
                return
            time.sleep(0.1)
        raise AssertionError(f"{program} does not answer")
