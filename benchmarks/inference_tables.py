"""The tables of benchmarks/inference.py: printed when it is done, and what the documents quote (tables.py)."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from result_tables import Facts
from result_tables import table as _table

DRAW = re.compile(r" \(\d+\)$")  # behind the name of a drawn route
OPENED = ("all open", "half open", "closed")


def tables(facts: Mapping[str, Any]) -> dict[str, str]:
    """Every table of what was measured, by its name, in Markdown."""
    found = {}
    for size, by_batch in facts.get("latency", {}).items():
        found |= {f"latency {size}, batch {batch}": _latency(methods) for batch, methods in by_batch.items()}
        if "1" in by_batch:
            found[f"summary {size}"] = _summary(by_batch["1"], size)
    for size, by_precision in facts.get("skipping", {}).items():
        found[f"skipping {size}"] = _skipping(by_precision)
    for size, by_batch in facts.get("batches", {}).items():
        found[f"batches {size}"] = _batches(by_batch)
    if "equality" in facts:
        found |= _equality(facts["equality"])
    if "real" in facts and "methods" in facts["real"]:
        found["real"] = _real(facts["real"])
    if "memory" in facts:
        rows = [[name, f"{row['peak_mib']:.0f}"] for name, row in facts["memory"]["methods"].items()]
        found["memory"] = _table(["", f"MiB at {facts['memory']['size']}"], rows)
    if "startup" in facts:
        rows = [[name, f"{row['median_s']:.2f}", f"{row['min_s']:.2f}"] for name, row in facts["startup"].items()]
        found["startup"] = _table(["", "s, median", "s, fastest"], rows)
    return found


def _grouped(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Routes drawn alike are one row: the means of their numbers."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, row in methods.items():
        groups.setdefault(DRAW.sub("", name), []).append(row)
    return {
        name: {
            key: sum(row[key] for row in some) / len(some) if isinstance(value, int | float) else value
            for key, value in some[0].items()
        }
        for name, some in groups.items()
    }


def _cell(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _latency(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for each method. Products have no route, and so no numbers that follow from one."""
    plain, rows = methods["plain"], []
    on_gpu = "peak_mib" in plain
    for name, row in _grouped(methods).items():
        routed = "bound_ms" in row
        cells = [name, _cell(row["gmacs"], 1), _cell(row.get("open_share"), 2)]
        cells += [_cell(row["median_ms"], 1), _cell(row["min_ms"], 1)]
        cells += [_cell(plain[key] / row[key] if routed else None, 2) for key in ("median_ms", "min_ms")]
        cells += [_cell(100 * row["bound_ms"] / row["min_ms"] if routed else None)]
        rows.append(cells + ([_cell(row["peak_mib"])] if on_gpu else []))
    head = ["", "GMACs", "f", "ms, median", "ms, fastest", "times as fast as plain", "of the fastest", "% of the bound"]
    return _table(head + (["MiB"] if on_gpu else []), rows)


def _summary(methods: Mapping[str, Mapping[str, Any]], size: str) -> str:
    """Median milliseconds, and times as fast as the plain forward, with gates that open everything, half, nothing."""
    named = {
        "plain PyTorch, every path computed": ["plain"],
        "`SkipEngine`, float32": [f"engine float32, gates {words}" for words in OPENED],
        "`SkipEngine`, bfloat16": [f"engine bfloat16, gates {words}" for words in OPENED],
        "exported without gates, ONNX Runtime": ["static, ONNX Runtime"],
        "exported without gates, OpenVINO, float32": ["static, OpenVINO float32"],
        "exported without gates, OpenVINO, bfloat16": ["static, OpenVINO bfloat16"],
    }
    rows, plain_ms = [], methods["plain"]["median_ms"]
    for words, names in named.items():
        times = [methods[name]["median_ms"] for name in names if name in methods]
        cells = [f"{time:.0f} ({plain_ms / time:.1f}x)" for time in times]
        rows += [[words, *cells, *[""] * (len(OPENED) - len(cells))]] if times else []
    return _table([f"ms, one image of {size}", *OPENED], rows)


def _skipping(by_precision: Mapping[str, Any]) -> str:
    rows = []
    for precision, found in by_precision.items():
        for name, row in found["routes"].items():
            cells = [precision, name, f"{row['gmacs']:.1f}", f"{row['open_share']:.2f}", f"{row['median_ms']:.1f}"]
            rows.append([*cells, f"{row['ratio']:.3f}", f"{row['min_ratio']:.3f}"])
        worst = [f"{found[f'worst_{key}']:.3f}" for key in ("ratio", "min_ratio")]
        rows.append([precision, "worst drawn route", "", "", "", *worst])
        rows.append([precision, "correlation of time with GMACs", "", "", "", _cell(found["correlation"], 3), ""])
    return _table(["", "nodes", "GMACs", "f", "ms, median", "measured / bound", "of the fastest"], rows)


def _batches(by_batch: Mapping[str, Any]) -> str:
    rows = [
        [batch, precision, f"{row['median_ms']:.1f}", f"{row['sum_median_ms']:.1f}"]
        + [f"{row['ratio']:.3f}", f"{row['min_ratio']:.3f}"]
        for batch, by_precision in by_batch.items()
        for precision, row in by_precision.items()
    ]
    return _table(["images", "", "ms together, median", "ms one by one", "ratio", "of the fastest"], rows)


def _equality(facts: Mapping[str, Any]) -> dict[str, str]:
    names = list(next(iter(facts["random"].values())))
    rows = [[words, *(f"{facts['random'][name][words]['logits']:.1e}" for name in facts["random"])] for words in names]
    rows.append(["worst", *(f"{worst:.1e}" for worst in facts["worst"].values())])
    found = {"equality, random": _table(["largest difference / largest logit", *facts["random"]], rows)}
    if "note" not in facts["trained"]:
        rows = [
            [name, f"{100 * row['miou']:.2f} %", f"{100 * row['same_labels']:.3f} %"]
            + [f"{100 * row['least_same_labels']:.3f} %", f"{row['gates_max']:.1e}", f"{row['gates_mean']:.1e}"]
            + [f"{100 * row['same_route']:.1f} %"]
            for name, row in facts["trained"].items()
        ]
        head = [
            "",
            "mIoU",
            "labels as dense",
            "in the worst image",
            "gates off by, at most",
            "on average",
            "same route",
        ]
        found["equality, trained"] = _table(head, rows)
    return found


def _real(facts: Mapping[str, Any]) -> str:
    plain, rows = facts["methods"]["plain"], []
    for name, row in facts["methods"].items():
        costs = [image["gmacs"] for image in row["images"].values()]
        cells = [name, f"{min(costs):.2f} to {max(costs):.2f}", f"{row['median_ms']:.1f}", f"{row['min_ms']:.1f}"]
        cells += [f"{plain[key] / row[key]:.2f}" for key in ("median_ms", "min_ms")]
        rows.append([*cells, _cell(row["correlation"], 3)])
    head = ["", f"GMACs, of {facts['full_gmacs']:.2f}", "ms, median", "ms, fastest", "times as fast as plain"]
    return _table([*head, "of the fastest", "correlation of time with cost"], rows)


def saved(facts: Sequence[Facts], words: str) -> str:
    """How far the time of drawn routes lies above what their MACs would take, for each size and precision."""
    rows = []
    for found in facts:
        for size, by_precision in found["skipping"].items():
            for precision, row in by_precision.items():
                drawn = [r["ratio"] for name, r in row["routes"].items() if name not in ("all open", "0 %")]
                cells = [size, precision, str(len(drawn)), f"{statistics.median(drawn):.3f}"]
                cells += [f"{row[f'worst_{key}']:.3f}" for key in ("ratio", "min_ratio")]
                rows.append([*cells, f"{row['correlation']:.3f}"])
    head = ["image", "", "routes", "measured / line, median", "worst", "worst, of the fastest rounds"]
    return _table([*head, "correlation of time with MACs"], rows)


def same(facts: Sequence[Facts], words: str) -> str:
    """Whether it is the same network: random weights, worst of all routes; a trained one over CamVid."""
    (found,) = facts
    worst, trained = found["equality"]["worst"], found["equality"]["trained"]
    head = ["", "largest difference of a logit / largest logit", "CamVid: mIoU", "labels as dense", "same route"]
    rows = [["dense forward", "", f"{100 * trained['dense']['miou']:.2f} %", "", ""]]
    for name, value in worst.items():
        row = trained.get(name)
        cells = ["", "", ""]
        if row:
            cells = [f"{100 * row[key]:.{digits}f} %" for key, digits in (("miou", 2), ("same_labels", 3))]
            cells.append(f"{100 * row['same_route']:.1f} %")
        rows.append([name, f"{value:.1e}", *cells])
    return _table(head, rows)


ACROSS_FILES = {"saved": saved, "same": same}  # short tables, of one file or several
