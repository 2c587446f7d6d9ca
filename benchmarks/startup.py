"""How long whole commands take, each as a process of its own: what a user waits for.

    python benchmarks/startup.py                                        # the installed package
    python benchmarks/startup.py --source BEFORE/src --source AFTER/src # several source trees, in turns

Small procedural scenes and the network that is shipped. The commands of all source trees alternate, so that a slow
minute of the machine hits all. Medians are reported; a first run of each is not counted, it fills the caches. In the
results file a source tree is named by its commit. It needs built kernels beside its sources (engine/*.so).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from routeseg.data.config import DataConfig
from routeseg.data.tools.layouts import write_layout
from routeseg.evaluation import machine_facts
from routeseg.files import write_json

ROOT = Path(__file__).parents[1]
SIZE = (96, 192)
PICTURES = {"train": 26, "val": 4}  # check-data reads all of them, predict those of val
DATA = ["--data.name", "folder", "--data.root"]
CLI = ["-m", "routeseg.cli"]
# What Python is given, in a folder that holds the data set `data`, and the exit code that it ends with.
COMMANDS: dict[str, tuple[list[str], int]] = {
    "python alone": (["-c", "pass"], 0),
    "import torch": (["-c", "import torch"], 0),
    "--version": ([*CLI, "--version"], 0),
    "evaluate --help": ([*CLI, "evaluate", "--help"], 0),
    "a wrong configuration": ([*CLI, "train", "--config", "nowhere.yaml"], 2),
    "a wrong data root": ([*CLI, "train", *DATA, "nowhere"], 2),
    "a wrong checkpoint": ([*CLI, "evaluate", "nowhere"], 2),
    "wrong images": ([*CLI, "predict", "nowhere"], 2),
    "check-data, 30 images": ([*CLI, "check-data", *DATA, "data"], 0),
    "predict, 1 image, labels alone": ([*CLI, "predict", "data/images/val/000000.png", "--pictures", "false"], 0),
    "predict, 4 images": ([*CLI, "predict", "data/images/val"], 0),
}


def seconds(name: str, source: Path | None, folder: Path) -> float:
    """Of one run of a command. Ends the benchmark if its exit code is not the one that it should have."""
    words, expected = COMMANDS[name]
    environment = os.environ if source is None else os.environ | {"PYTHONPATH": str(source)}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode != expected:
        raise SystemExit(f"{name}: exit code {done.returncode}, not {expected}\n{done.stderr}")
    return taken


def commit(source: Path | None) -> str:
    """Which sources these are: their commit, if git knows them."""
    if source is None:
        return "installed"
    call = ["git", "-C", str(source), "describe", "--always", "--dirty"]
    done = subprocess.run(call, capture_output=True, text=True)
    return done.stdout.strip() or str(source)


def main(words: Sequence[str] | None = None) -> None:
    default = Path(f"results/startup_cpu_{os.cpu_count()}_cores.json")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", type=Path, action="append", help="a folder with the package; may be given again; else the installed"
    )
    parser.add_argument("--rounds", type=int, default=7, help="how often each command is timed")
    parser.add_argument("--output", type=Path, default=default)
    args = parser.parse_args(words)
    sources = [None] if args.source is None else [source.resolve() for source in args.source]
    taken: dict[str, list[list[float]]] = {name: [[] for _ in sources] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = DataConfig(image_size=SIZE, train_images=PICTURES["train"], val_images=PICTURES["val"])
        write_layout("folder", folder / "data", pictures)
        for number in range(-1, args.rounds):
            for command in COMMANDS:
                for place, source in enumerate(sources):
                    run = seconds(command, source, folder)
                    if number >= 0:
                        taken[command][place].append(run)
    names = [commit(source) for source in sources]
    results = [
        {"command": command, "source": source, "median_s": statistics.median(runs), "seconds": runs}
        for command, of_sources in taken.items()
        for source, runs in zip(names, of_sources, strict=True)
    ]
    facts = {"size": list(SIZE), "pictures": PICTURES, "rounds": args.rounds, "sources": names}
    write_json(args.output, facts | {"results": results} | machine_facts())
    print(f"| seconds | {' | '.join(names)} |\n" + "|---" * (1 + len(names)) + "|")
    for command, of_sources in taken.items():
        print(f"| {command} | {' | '.join(f'{statistics.median(runs):.2f}' for runs in of_sources)} |")


if __name__ == "__main__":
    main()
