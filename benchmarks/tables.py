"""Writes every table of the documents from its results file, the whole tables under results/, and the figure of speed.

    python benchmarks/tables.py             # rewrites what has changed, and names it
    python benchmarks/tables.py --check     # writes nothing; exit code 1 if it would

In a document a table stands between `<!-- results/FILE.json: NAME -->` and `<!-- end -->`, with several files if its
rows come from several. NAME is one of MAKERS, or a table of benchmarks/inference.py (inference_tables.py), whose files
are named results/inference*.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import inference_tables
import result_tables
from result_tables import Facts

ROOT = Path(__file__).parents[1]
MARKS = re.compile(r"(<!-- (results/[^:>]+): ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
INFERENCE = "results/inference"
FIGURE = Path("results/inference_cpu.png")
FIGURE_FACTS = "results/inference_cpu.json"
MAKERS: dict[str, Callable[[Sequence[Facts], str], str]] = {
    "alternatives": result_tables.alternatives,
    "any budget": result_tables.any_budget,
    "architectures": result_tables.architectures,
    "busy": result_tables.busy,
    "classes": result_tables.classes,
    "clock": result_tables.clock,
    "comparison": result_tables.comparison,
    "equal time": result_tables.equal_time,
    "exits file": result_tables.exits_file,
    "exits times": result_tables.exits_times,
    "explorer": result_tables.explorer,
    "how": result_tables.how,
    "int8": result_tables.int8,
    "loaders": result_tables.loaders,
    "needed": result_tables.needed,
    "places": result_tables.places,
    "overload": result_tables.overload,
    "scores": result_tables.scores,
    "serving": result_tables.serving,
    "stages": result_tables.stages,
    "steps": result_tables.steps,
    "trainings": result_tables.trainings,
    "trials": result_tables.trials,
    "video": result_tables.video,
    "workers": result_tables.workers,
} | inference_tables.ACROSS_FILES


def read(root: Path, name: str) -> Facts:
    try:
        return json.loads((root / name).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is no results file ({error}): measure first") from error


def make(root: Path, files: Sequence[str], name: str) -> str:
    """One table. Raises ValueError, naming file and table, if the file does not have it."""
    facts = [read(root, file) for file in files]
    kind = next((kind for kind in MAKERS if name == kind or name.startswith(f"{kind}: ")), None)
    there = {} if kind or not files[0].startswith(INFERENCE) else inference_tables.tables(facts[0])
    if kind is None and name not in there:
        raise ValueError(f"no table {name!r} of {files[0]}: there are {', '.join(there or MAKERS)}")
    try:
        return there[name] if kind is None else MAKERS[kind](facts, name.removeprefix(kind).removeprefix(": "))
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{' '.join(files)} has no table {name!r} ({error!r}): was it written for another?") from error


def fill(document: str, root: Path = ROOT) -> str:
    """The document with its tables as the results files have them."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{make(root, match[2].split(), match[3])}\n\n{match[4]}"

    return MARKS.sub(block, document)


def texts(root: Path = ROOT) -> dict[Path, str]:
    """Every file that this command writes, but the figure, and what it should hold."""
    documents = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    made = {document: fill(document.read_text(), root) for document in documents}
    for path in sorted((root / "results").glob("inference*.json")):
        facts = read(root, path.relative_to(root).as_posix())
        parts = [f"# {path.name}", result_tables.how([facts], "")]
        parts += [f"## {name}\n\n{table}" for name, table in inference_tables.tables(facts).items()]
        made[path.with_suffix(".md")] = "\n\n".join(parts) + "\n"
    for path in sorted((root / "results").glob("table1_*.json")):
        name = path.relative_to(root).as_posix()
        made[path.with_suffix(".md")] = make(root, [name], "comparison") + "\n"
    return made


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    args = parser.parse_args(words)
    try:
        made = texts()
    except ValueError as error:
        print(f"tables: error: {error}", file=sys.stderr)
        return 2
    changed = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    for path in changed:
        print(path.relative_to(ROOT))
    if args.check:
        return 1 if changed else 0
    from inference_figure import time_against_macs
    from routeseg.files import write_atomically

    for path in changed:
        write_atomically(path, made[path].encode())
    time_against_macs(ROOT / FIGURE, read(ROOT, FIGURE_FACTS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
