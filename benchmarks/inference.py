"""Does time follow the route? Milliseconds of a forward against its MACs, a plain implementation and exported files.

    python benchmarks/inference.py --camvid path/to/camvid   # to results/inference_cpu.json
    python benchmarks/inference.py --device cuda [--batches 1 8]
    python benchmarks/tables.py                              # then writes its tables into the documents

Sections, each a run in which its methods take turns (inference_methods.py):
    latency   a network with random weights: plain (every path computed, as the authors' code); SkipEngine without its
              kernels, and with them on routes of 100, 75, 50, 25, 0 % of the nodes; static files in ONNX
              Runtime and OpenVINO; and the rate of matrix products, which bounds them all
    skipping  does a route save in full what it leaves out: its time against t(0) + f * (t(1) - t(0)); f is the share
              of MACs that it keeps
    batches   images of different routes in one call, against the sum of their own times
    equality  logits against the dense forward; a trained network over CamVid in float32 and bfloat16
    real      time against cost over real images, each with the route that a trained network chooses
    memory    what one forward adds to the peak of a fresh process
    startup   seconds from the start of a process to its first result
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

import routeseg
from inference_methods import (
    GATED,
    PRECISIONS,
    Method,
    alternate,
    correlation,
    cost_facts,
    draw_route,
    engines,
    gated_to,
    in_words,
    new_network,
    onnxruntime_method,
    openvino_method,
    plain_forward,
    precisions,
    products,
    random_images,
    spread_gates,
)
from inference_processes import MEMORY_SIZE, memory, memory_of, startup
from inference_tables import tables
from routeseg import DynamicRoutingNetwork, Route, SkipEngine
from routeseg.cost.macs import model_cost
from routeseg.data.config import DataConfig, open_data
from routeseg.data.loaders import evaluation_loader
from routeseg.evaluation import evaluate, machine_facts
from routeseg.export import export
from routeseg.files import write_json
from routeseg.model import Segmentation

RESULTS = Path("results")
BATCHES = {"cpu": [1, 4], "cuda": [1, 8]}
SHARES = (0.75, 0.5, 0.25)  # of the nodes, on drawn routes
DRAWS = {"latency": 2, "skipping": 4, "equality": 2}  # routes of each share


def latency(args: Namespace) -> dict[str, Any]:
    """size -> batch -> method -> times and facts."""
    model = new_network(args)
    return {
        in_words(size): {str(batch): latency_of(model, size, batch, args) for batch in args.batches}
        for size in args.size
    }


def latency_of(model: DynamicRoutingNetwork, size: tuple[int, int], batch: int, args: Namespace) -> dict[str, Any]:
    images, space = random_images(batch, size, args.seed).to(args.device), model.space
    whole, nothing = Route.all_open(space), Route(space)
    static, facts = model.specialize(whole), partial(cost_facts, model, size)
    routes = {"all open": whole} | (drawn(space, "latency", args) if batch == 1 else {}) | {"0 %": nothing}
    gate_routes = {"all open": whole, "half open": draw_route(space, 0.5, args.seed), "closed": nothing}
    eager, float32 = SkipEngine(model, backend="eager"), {"precision": "float32"}
    methods = products(args.device, precisions(args.device))
    methods.append(Method("plain", partial(plain_forward, model, images), facts(whole, gated=True) | float32))
    methods.append(Method("eager, gates all open", partial(eager, images), facts(whole, gated=True) | float32))
    methods.append(Method("eager, all open", partial(eager, images, whole), facts(whole) | float32))
    for precision, engine in engines(model, args).items():
        name, used = f"engine {precision}", {"precision": engine.precision}
        for words, route in gate_routes.items():
            closing = SkipEngine(gated_to(model, route), precision)
            methods.append(Method(f"{name}, gates {words}", partial(closing, images), facts(route, gated=True) | used))
        for words, route in routes.items():
            methods.append(Method(f"{name}, {words}", partial(engine, images, route), facts(route) | used))
        methods.append(Method(f"{name}, static", partial(SkipEngine(static, precision), images), facts(whole) | used))
    with tempfile.TemporaryDirectory() as folder:
        if args.device == "cpu":
            pixels = images.numpy()
            file, shape = export(static, Path(folder) / "static.onnx"), facts(whole)
            methods += file_methods("static", file, pixels, args, shape, precisions("cpu"))
        found = alternate(methods, args.seconds, args.device, args.seed)
    for row in found.values():
        product = found.get(f"product {row['precision']}", {})
        if product and "product_gmacs" in row:
            row["bound_ms"] = batch * row["product_gmacs"] * product["min_ms"] / product["gmacs"]
    return found


def file_methods(
    name: str, file: Path, images: np.ndarray, args: Namespace, facts: dict, precisions: Sequence[str] = ()
) -> list[Method]:
    """An exported file in the runtimes that are installed; OpenVINO runs it in each precision, else in float32."""
    made = []
    if find_spec("onnxruntime"):
        made.append(onnxruntime_method(f"{name}, ONNX Runtime", file, images, args.threads, facts))
    if find_spec("openvino"):
        for precision in precisions or ("float32",):
            words = f"{name}, OpenVINO" + (f" {precision}" if precisions else "")
            made.append(openvino_method(words, file, images, args.threads, precision, facts))
    return made


def skipping(args: Namespace) -> dict[str, Any]:
    """size -> precision -> routes and the worst ratio of measured to t(0) + f * (t(1) - t(0))."""
    model, found = new_network(args), {}
    for size in args.size:
        images, methods = random_images(1, size, args.seed).to(args.device), []
        routes = {"all open": Route.all_open(model.space), "0 %": Route(model.space)}
        routes |= drawn(model.space, "skipping", args)
        for precision, engine in engines(model, args).items():
            for words, route in routes.items():
                facts = cost_facts(model, size, route) | {"precision": engine.precision}
                methods.append(Method(f"{precision}, {words}", partial(engine, images, route), facts))
        times = alternate(methods, args.seconds, args.device, args.seed)
        found[in_words(size)] = {p: against_bound(times, p, list(routes)) for p in precisions(args.device)}
    return found


def against_bound(times: dict[str, dict], precision: str, names: list[str]) -> dict[str, Any]:
    """The rows of a precision with `ratio` (of medians) and `min_ratio` (of minima), and the worst of each."""
    rows = {name: dict(times[f"{precision}, {name}"]) for name in names}
    for row in rows.values():
        for key, ratio in (("median_ms", "ratio"), ("min_ms", "min_ratio")):
            fixed, full = rows["0 %"][key], rows["all open"][key]
            row[ratio] = row[key] / (fixed + row["open_share"] * (full - fixed))
    routed = [row for name, row in rows.items() if name not in ("0 %", "all open")]  # those two are the bound itself
    return {"routes": rows, "correlation": with_cost(rows.values())} | {
        f"worst_{key}": max(row[key] for row in routed) for key in ("ratio", "min_ratio")
    }


def with_cost(rows: Iterable[dict]) -> float | None:
    """How time goes with cost: the correlation of the fastest times with MACs, from -1 to 1."""
    costs, times = zip(*((row["gmacs"], row["min_ms"]) for row in rows), strict=True)
    return correlation(costs, times)


def batches(args: Namespace) -> dict[str, Any]:
    """size -> batch -> precision -> times of the batch, the sum of its images' own times, their ratio."""
    model, found = new_network(args), {}
    for size in args.size:
        methods, setting = [], {}
        for batch in args.batches:
            images = random_images(batch, size, args.seed).to(args.device)
            shares = [(1.0, *SHARES)[number % (1 + len(SHARES))] for number in range(batch)]
            routes = [draw_route(model.space, share, args.seed + i) for i, share in enumerate(shares)]
            for precision, engine in engines(model, args).items():
                names = [f"{batch} {precision} {i}" for i in range(batch)]
                runs = [partial(engine, images[i : i + 1], route) for i, route in enumerate(routes)]
                methods.append(Method(f"{batch} {precision}", partial(engine, images, routes)))
                methods += [Method(name, run) for name, run in zip(names, runs, strict=True)]
                setting[str(batch), precision] = names
        times = alternate(methods, args.seconds, args.device, args.seed)
        rows: dict[str, dict] = found.setdefault(in_words(size), {})
        for (batch, precision), names in setting.items():
            row = times[f"{batch} {precision}"]
            for key in ("median_ms", "min_ms"):
                row[f"sum_{key}"] = sum(times[name][key] for name in names)
            ratios = {"ratio": row["median_ms"] / row["sum_median_ms"], "min_ratio": row["min_ms"] / row["sum_min_ms"]}
            rows.setdefault(batch, {})[precision] = row | ratios
    return found


@torch.inference_mode()
def equality(args: Namespace) -> dict[str, Any]:
    """engine -> the largest difference to the dense forward, over that forward's largest logit."""
    model, size = new_network(args), args.size[0]
    choosing = spread_gates(model, args.seed).to(args.device)
    images = random_images(2, size, args.seed).to(args.device)
    made = {"eager float32": partial(SkipEngine, backend="eager")}
    made |= {f"engine {p}": partial(SkipEngine, precision=p) for p in precisions(args.device)}
    runs = {words: (model, route) for words, route in drawn(model.space, "equality", args).items()}
    runs |= {"all open": (model, Route.all_open(model.space)), "0 %": (model, Route(model.space))}
    runs["gates"] = (choosing, None)
    found: dict[str, dict[str, dict]] = {name: {} for name in made}
    for words, (network, route) in runs.items():
        expected = network(images, route)
        for name, make in made.items():
            found[name][words] = difference(make(network)(images, route), expected)
    worst = {name: max(row["logits"] for row in rows.values()) for name, rows in found.items()}
    return {"size": in_words(size), "worst": worst, "random": found, "trained": trained_equality(args)}


def difference(ours: Segmentation, expected: Segmentation) -> dict[str, float]:
    return {
        "logits": float((ours.logits - expected.logits).abs().max() / expected.logits.abs().max()),
        "gates": float((ours.gates - expected.gates).abs().max()),
        "same_labels": float((ours.labels == expected.labels).float().mean()),
        "open": float((expected.gates > 0).sum()) / len(expected.gates),
    }


def trained_equality(args: Namespace) -> dict[str, Any]:
    """A trained network over CamVid: engine -> accuracy, and labels and gates against the dense forward."""
    if args.camvid is None:
        return {"note": NO_CAMVID}
    model, data = routeseg.load(GATED).to(args.device), open_camvid(args)
    forwards: dict[str, Callable] = {"dense": model} | {f"engine {p}": e for p, e in engines(model, args).items()}
    found, labels, gates = {}, {}, {}
    for name, forward in forwards.items():
        labels[name] = {}
        result = evaluate(model, evaluation_loader(data), forward, on_prediction=labels[name].__setitem__)
        gates[name] = result.gates
        same = [np.mean(mask == labels["dense"][picture]) for picture, mask in labels[name].items()]
        off = np.abs(gates[name] - gates["dense"])
        same_route = ((gates[name] > 0) == (gates["dense"] > 0)).all(axis=(1, 2, 3))
        found[name] = {"images": len(same), "miou": result.miou, "same_labels": float(np.mean(same))}
        found[name] |= {"least_same_labels": float(np.min(same)), "gates_max": float(off.max())}
        found[name] |= {"gates_mean": float(off[:, model.space.legal].mean()), "same_route": float(same_route.mean())}
    return found


def real(args: Namespace) -> dict[str, Any]:
    """method -> the mean over images, from the cheapest to the dearest; correlation of time with cost; each image."""
    if args.camvid is None:
        return {"note": NO_CAMVID}
    model, data = routeseg.load(GATED).to(args.device).eval(), open_camvid(args)
    forwards: dict[str, Callable] = {"plain": partial(plain_forward, model)}
    made = engines(model, args)
    forwards |= {f"engine {precision}": engine for precision, engine in made.items()}
    choosing, costs, images = next(iter(made.values())), {}, {}
    for number in range(len(data)):
        image = torch.from_numpy(data.read(number)[0].transpose(2, 0, 1).copy())[None].to(args.device)
        table = model_cost(model, (image.shape[2], image.shape[3]))
        images[data.name(number)] = image
        costs[data.name(number)] = float(table.of_gates(choosing(image).gates)[0]) / 1e9
    by_cost = sorted(costs, key=lambda name: costs[name])
    places = np.linspace(0, len(by_cost) - 1, min(args.images, len(by_cost))).round().astype(int)
    costs = {by_cost[place]: costs[by_cost[place]] for place in places}
    methods = [
        Method(f"{name} {key}", partial(forward, images[name])) for name in costs for key, forward in forwards.items()
    ]
    times = alternate(methods, args.seconds, args.device, args.seed)
    found = {}
    for key in forwards:
        rows = {name: times[f"{name} {key}"] | {"gmacs": costs[name]} for name in costs}
        found[key] = {of: statistics.mean(row[of] for row in rows.values()) for of in ("median_ms", "min_ms")}
        found[key] |= {"correlation": with_cost(rows.values()), "images": rows}
    return {"full_gmacs": table.full / 1e9, "methods": found}


def drawn(space: routeseg.RoutingSpace, section: str, args: Namespace) -> dict[str, Route]:
    """Routes of each share of nodes, by name."""
    return {
        f"{round(100 * share)} % ({number + 1})": draw_route(space, share, args.seed + number)
        for share in SHARES
        for number in range(DRAWS[section])
    }


def open_camvid(args: Namespace) -> Any:
    return open_data(DataConfig(name="camvid", root=str(args.camvid)), "val")


def read_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


NO_CAMVID = "not measured: --camvid names the folder of CamVid"
SECTIONS = {f.__name__: f for f in (latency, skipping, batches, equality, real, memory, startup)}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--size", nargs="+", type=read_size, default=[(512, 1024)], help="such as 512x1024 1024x2048")
    parser.add_argument("--memory-size", type=read_size, default=MEMORY_SIZE)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a section at one size and batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=PRECISIONS, default="cpu")
    parser.add_argument("--camvid", type=Path, help="folder of CamVid, for real images")
    parser.add_argument("--images", type=int, default=16, help="of CamVid, that section real times")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(memory_of(args.one, args)))
        return
    output = args.output or RESULTS / f"inference_{args.device}.json"
    if args.output is None and set(args.sections) < set(SECTIONS) and output.exists():
        parser.error(f"{output} holds all sections: name another file with --output")
    if args.camvid is not None:
        try:
            open_camvid(args)
        except ValueError as error:
            parser.error(str(error))
    args.batches = args.batches or BATCHES[args.device]
    network = {"depth": args.depth, "channels": args.channels, "classes": args.classes}
    settings = {"network": network, "threads": args.threads, "seconds": args.seconds, "seed": args.seed}
    results = {}
    for name in args.sections:
        results[name] = SECTIONS[name](args)
        for title, table in tables({name: results[name]}).items():
            print(f"{title}\n\n{table}\n", flush=True)
    facts = machine_facts()
    facts["versions"] |= {name: version(name) for name in ("onnxruntime", "openvino") if find_spec(name)}
    write_json(output, {"device": args.device} | settings | results | facts)


if __name__ == "__main__":
    main()
