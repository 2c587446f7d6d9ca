"""How near patterns of each known network's shape come to the paper's Table 1, which shows no layers.

    python benchmarks/fit_architectures.py

For each architecture a family of patterns is tried, all that its shape leaves free, and each is counted at 1024x2048
twice: with the gates of its nodes, and without. Writes results/architectures_fit.json.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from routeseg.architectures import ARCHITECTURES, union, walk
from routeseg.evaluation import machine_facts
from routeseg.evaluation.architecture_table import RouteCounter
from routeseg.files import write_json
from routeseg.space import DOWN, KEEP, UP, Route, RoutingSpace

SPACE = RoutingSpace(16)
SIZE = (1024, 2048)
LAST = SPACE.depth
TOLERANCE = 0.05
Candidates = Iterator[tuple[dict[str, Any], Route]]


def fcn_32s() -> Candidates:
    """Free: the layers of the three steps down; whether it comes back up in the grid or leaves that to the decoder."""
    for down in itertools.combinations(range(1, LAST + 1), 3):
        turns = dict(zip(down, (1, 2, 3), strict=True))
        yield {"down": down, "up": None}, union(SPACE, walk(SPACE, turns))
        if down[-1] < LAST - 2:
            yield {"down": down, "up": (14, 15, 16)}, union(SPACE, walk(SPACE, turns | {14: 2, 15: 1, 16: 0}))


def deeplab_v3() -> Candidates:
    """Free: the layers of the steps down to 1/16, the layer of the pyramid, its branches beside that at 1/16."""
    for first, second, fan in itertools.combinations(range(1, LAST + 1), 3):
        trunk = {first: 1, second: 2}
        branches = {"1/32": {fan: 3}, "1/8": {fan: 1}, "1/4": {fan: 1, fan + 1: 0}}
        for chosen in itertools.chain.from_iterable(itertools.combinations(branches, n) for n in (1, 2, 3)):
            if "1/4" in chosen and ("1/8" not in chosen or fan == LAST):
                continue
            walks = [walk(SPACE, trunk | branches[name]) for name in chosen]
            yield {"down": (first, second), "fan": fan, "branches": chosen}, union(SPACE, walk(SPACE, trunk), *walks)


def u_net() -> Candidates:
    """Free: the layers of the steps down (up is the mirror image), and which crossings have cells."""
    for down in itertools.combinations(range(1, LAST // 2 + 1), 3):
        up = [LAST + 1 - layer for layer in reversed(down)]
        turns = dict(zip((*down, *up), (1, 2, 3, 2, 1, 0), strict=True))
        for cells in itertools.product((False, True), repeat=3):
            crossings = [
                walk(SPACE, turns, coarsest=s) if with_cells else [(down[s] - 1, s, KEEP)]
                for s, with_cells in enumerate(cells)
            ]
            yield {"down": down, "cells_in_crossings": cells}, union(SPACE, walk(SPACE, turns), *crossings)


def hrnet_v2() -> Candidates:
    """Free: the layer of the first branch, layers between branches, and layers between exchanges (from the first
    branch on)."""
    for first, between, period in itertools.product(range(1, LAST), range(1, 6), range(1, 7)):
        starts = {first + k * between: k + 1 for k in range(3)}
        if max(starts) >= LAST:
            continue
        branches = [walk(SPACE, starts, coarsest=s) for s in range(4)]
        exchanges = [
            (layer, s + up, UP if up else DOWN)
            for layer in range(first, LAST, period)
            for s in range(sum(start <= layer for start in starts))
            for up in (0, 1)
        ]
        yield {"starts": tuple(starts), "exchange_every": period}, union(SPACE, *branches, exchanges)


def auto_deeplab() -> Candidates:
    """The path that the search found, 1/4 1/8 1/16 1/8 1/16 1/32 1/16 1/8; free: how long it stays at each."""
    for turns in itertools.combinations(range(1, LAST + 1), 7):
        yield {"turns": turns}, union(SPACE, walk(SPACE, dict(zip(turns, (1, 2, 1, 2, 3, 2, 1), strict=True))))


FAMILIES = {
    "fcn-32s": fcn_32s,
    "deeplabv3": deeplab_v3,
    "u-net": u_net,
    "hrnetv2": hrnet_v2,
    "auto-deeplab": auto_deeplab,
}


def fit(name: str, count: RouteCounter) -> dict[str, Any]:
    """The pattern of the package and the nearest of the family, by the larger of the two relative deviations."""
    known = ARCHITECTURES[name]

    def judge(route: Route, gates: bool) -> dict[str, Any]:
        gmacs, params = count(route, gates)
        off = gmacs / known.paper_gmacs - 1, params / known.paper_params_m - 1
        return {"gmacs": gmacs, "params_m": params, "gmacs_off": off[0], "params_off": off[1]}

    def distance(found: dict[str, Any]) -> float:
        return max(abs(found["gmacs_off"]), abs(found["params_off"]))

    candidates = list(FAMILIES[name]())
    facts: dict[str, Any] = {"paper_gmacs": known.paper_gmacs, "paper_params_m": known.paper_params_m}
    facts |= {"patterns": len(candidates), "free": (FAMILIES[name].__doc__ or "").strip()}
    for key, gates in (("with_gates", True), ("static", False)):
        judged = [choice | judge(route, gates) for choice, route in candidates]
        facts[key] = {
            "ours": judge(known(SPACE), gates),
            "nearest": min(judged, key=distance),
            "within_5_percent": sum(distance(found) <= TOLERANCE for found in judged),
        }
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/architectures_fit.json"))
    args = parser.parse_args()
    count = RouteCounter(SPACE, SIZE)
    facts = {name: fit(name, count) for name in FAMILIES}
    write_json(args.output, {"architectures": facts, "command": "benchmarks/fit_architectures.py"} | machine_facts())
    for name, found in facts.items():
        for key in ("with_gates", "static"):
            ours, nearest = found[key]["ours"], found[key]["nearest"]
            print(
                f"{name:<13} {key:<10} ours {ours['gmacs']:.2f} GMACs ({ours['gmacs_off']:+.1%}), "
                f"{ours['params_m']:.2f} M ({ours['params_off']:+.1%}); "
                f"{found[key]['within_5_percent']} of {found['patterns']} within 5 %; nearest {nearest}"
            )


if __name__ == "__main__":
    main()
