"""What benchmarks/inference.py compares, and how it takes the time: methods take turns, in another order every round.

Legend: B images, L depth, S scales.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from routeseg import DynamicRoutingNetwork, Route, SkipEngine
from routeseg.cost.macs import model_cost
from routeseg.model import Segmentation
from routeseg.space import KEEP, SCALE_STEP, Node, RoutingSpace, padded_size

# Seconds between two calls. The threads of a library's pool spin for a while after a call, and would take a core from
# the next method: 30 ms in ONNX Runtime 1.32, 4 ms in PyTorch 2.13 and 1 ms in OpenVINO 2026.4, on a 2-core EPYC.
PAUSE_S = 0.05
GATED = Path("results/camvid_small")  # a network with the paper's gates, trained on CamVid
PRECISIONS = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16")}
WARM_UP = {"cpu": 1, "cuda": 3}  # calls of each method before the rounds
MIN_ROUNDS = 3
PRODUCT_SIZE = 2048  # rows and columns of the matrices whose product gives the machine's rate
SETTLE_SIZE = (128, 256)  # of the random images that BatchNorm takes its statistics from
GATE_SCORE = 1.5  # of gates that are to be open, and -1.5 of closed ones


@dataclass(frozen=True)
class Method:
    """What takes turns with others. `facts` are kept beside its times."""

    name: str
    run: Callable[[], object]
    facts: dict[str, Any] = field(default_factory=dict)


@torch.inference_mode()
def alternate(methods: Sequence[Method], seconds: float, device: str = "cpu", seed: int = 0) -> dict[str, dict]:
    """name -> its facts with `median_ms`, `min_ms` and `rounds`; on a GPU also `peak_mib`, what a call takes of its
    memory. Rounds of all methods for so many seconds, three at least."""
    times: dict[str, list[float]] = {method.name: [] for method in methods}
    peaks: dict[str, dict[str, float]] = {method.name: {} for method in methods}
    for method in methods:
        for _ in range(WARM_UP[device]):
            method.run()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            method.run()
            torch.cuda.synchronize()
            peaks[method.name] = {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
    turns, order, end = list(methods), random.Random(seed), time.perf_counter() + seconds
    while len(times[methods[0].name]) < MIN_ROUNDS or time.perf_counter() < end:
        order.shuffle(turns)
        for method in turns:
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            result = method.run()
            if device == "cuda":
                torch.cuda.synchronize()
            times[method.name].append(1000 * (time.perf_counter() - start))
            del result  # outside of the time
    return {
        method.name: method.facts
        | {"median_ms": statistics.median(some), "min_ms": min(some), "rounds": len(some)}
        | peaks[method.name]
        for method in methods
        for some in [times[method.name]]
    }


def random_network(depth: int, channels: int, classes: int, seed: int) -> DynamicRoutingNetwork:
    """Random weights, with the statistics of random images; all of its gates are open. In eval mode."""
    torch.manual_seed(seed)
    model = DynamicRoutingNetwork(num_classes=classes, depth=depth, base_channels=channels, stem_channels=channels)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(random_images(2, SETTLE_SIZE, seed))
    return model.eval()


def new_network(args: Namespace) -> DynamicRoutingNetwork:
    return random_network(args.depth, args.channels, args.classes, args.seed).to(args.device)


def engines(model: DynamicRoutingNetwork, args: Namespace) -> dict[str, SkipEngine]:
    return {precision: SkipEngine(model, precision) for precision in precisions(args.device)}


def precisions(device: str) -> list[str]:
    """The precisions that this machine computes in and does not emulate, which takes minutes; a small network tells."""
    tiny = DynamicRoutingNetwork(num_classes=2, depth=3, base_channels=2, stem_channels=1).to(device)
    return [precision for precision in PRECISIONS[device] if SkipEngine(tiny, precision).precision == precision]


def random_images(batch: int, size: tuple[int, int], seed: int) -> Tensor:
    """Images [B,3,H,W], float32 in 0..1."""
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed)) ** 2


def draw_route(space: RoutingSpace, share: float, seed: int) -> Route:
    """A random route on which this share of the space's nodes run: each with all its edges, the others drop their cell.

    Nodes are opened one after the other, each among those that features arrive at by then: there are no dead ends.
    """
    rng = random.Random(seed)
    chosen: list[Node] = []
    arrives = {(layer, 0) for layer in range(space.depth + 1)}  # what the stem sends is kept along scale 0
    for _ in range(round(share * len(space.nodes))):
        node = rng.choice(sorted(arrives.difference(chosen)))
        chosen.append(node)
        layer, scale = node
        for direction in space.directions(layer, scale):
            target = scale + SCALE_STEP[direction]
            arrives |= {(later, target) for later in range(layer + 1, space.depth + 1)}
    return Route(space, [(*node, direction) for node in chosen for direction in space.directions(*node)])


def cost_facts(
    model: DynamicRoutingNetwork, size: tuple[int, int], route: Route, gated: bool = False
) -> dict[str, float]:
    """What one image of this size costs on a route, with its gates or without.

    gmacs          as the authors count
    product_gmacs  convolutions alone: what is computed as matrix products, or could be
    open_share     f: the share of cells' and transforms' MACs (those that a route can leave out) that this route keeps
    """
    table, multiplied = model_cost(model, size), model_cost(model, size, convention="conv")
    fixed = table.of_route(Route(table.space))
    share = (table.of_route(route) - fixed) / (table.of_route(Route.all_open(table.space)) - fixed)
    gmacs, product_gmacs = (some.of_route(route, count_gates=gated) / 1e9 for some in (table, multiplied))
    return {"gmacs": gmacs, "product_gmacs": product_gmacs, "open_share": share}


def gated_to(model: DynamicRoutingNetwork, route: Route) -> DynamicRoutingNetwork:
    """A copy whose gates are computed as ever, but always open exactly this route."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for layer, scale in copied.route.nodes:
            node = copied.node(layer, scale)
            assert node.gate is not None
            node.gate.score.weight.zero_()
            for row, direction in enumerate(node.directions):
                node.gate.score.bias[row] = GATE_SCORE if (layer, scale, direction) in route else -GATE_SCORE
    return copied


def spread_gates(model: DynamicRoutingNetwork, seed: int) -> DynamicRoutingNetwork:
    """A copy whose gates depend on the image; about half of them are closed."""
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer, scale in sorted(copied.route.nodes):
            gate = copied.node(layer, scale).gate
            assert gate is not None
            gate.score.weight.copy_(torch.randn(gate.score.weight.shape, generator=generator))
            gate.score.weight -= gate.score.weight.mean(dim=1, keepdim=True)
            gate.score.bias.zero_()
    return copied


def plain_forward(model: DynamicRoutingNetwork, images: Tensor) -> Segmentation:
    """A straightforward implementation of Eq. 1-5, as the authors' code was. Maps [B,C,h,w] lie in this order in
    memory, BatchNorm runs by itself, every cell and path is computed and multiplied by its activation, also by 0."""
    space, (height, width) = model.space, images.shape[-2:]
    padded_height, padded_width = padded_size(space, height, width)
    x = F.pad(model.normalize(images), (0, padded_width - width, 0, padded_height - height)).contiguous()
    batch, device = len(x), x.device
    arrivals = [model.stem(x)]
    reached = [torch.ones(batch, dtype=torch.bool, device=device)]
    gates = torch.zeros(batch, *space.legal.shape, device=device)
    for layer in range(space.depth + 1):
        after: list[list[Tensor]] = [[] for _ in space.scales(min(layer + 1, space.depth))]
        arrives = [torch.zeros(batch, dtype=torch.bool, device=device) for _ in after]
        for scale, features in enumerate(arrivals):
            node = model.node(layer, scale)
            alpha = node.activations(features) * reached[scale][:, None]
            gates[:, layer, scale] = alpha
            runs = (alpha > 0).any(dim=1)
            hidden = node.cell(features)
            for direction in node.directions:
                target = scale + SCALE_STEP[direction]
                after[target].append(alpha[:, direction, None, None, None] * node.transform(direction, hidden))
                arrives[target] |= runs if model.config.zeros_arrive else alpha[:, direction] > 0
            drops = reached[scale] & ~runs
            after[scale + SCALE_STEP[KEEP]].append(features * drops[:, None, None, None])
            arrives[scale] |= drops
        arrivals, reached = [sum(some[1:], start=some[0]) for some in after], arrives
    return Segmentation(model.decoder(arrivals)[..., :height, :width], gates)


def in_words(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def products(device: str, precisions: Sequence[str], size: int | None = None) -> list[Method]:
    """Matrix products: no forward can be faster than their rate."""
    n = size or PRODUCT_SIZE
    made = []
    for precision in precisions:
        a, b = (torch.rand(n, n, device=device).to(getattr(torch, precision)) for _ in range(2))
        facts = {"precision": precision, "gmacs": n**3 / 1e9}
        made.append(Method(f"product {precision}", partial(torch.mm, a, b), facts))
    return made


def onnxruntime_method(
    name: str,
    file: Path,
    images: np.ndarray,
    threads: int,
    facts: dict[str, Any] | None = None,
    price: float | None = None,
) -> Method:
    """An exported file in ONNX Runtime, made for images of this size; its outputs stay in its memory. One with exits
    takes a price."""
    import onnxruntime

    start = time.perf_counter()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    for axis, length in (("batch", len(images)), ("height", images.shape[2]), ("width", images.shape[3])):
        options.add_free_dimension_override_by_name(axis, length)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("images", images)
    if price is not None:
        binding.bind_cpu_input("price", np.array(price, np.float32))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    load_s = time.perf_counter() - start
    found = {"precision": "float32", "load_s": load_s, "file_mb": file.stat().st_size / 1e6}
    return Method(name, partial(session.run_with_iobinding, binding), (facts or {}) | found)


def openvino_method(
    name: str,
    file: Path,
    images: np.ndarray,
    threads: int,
    precision: str,
    facts: dict[str, Any] | None = None,
    price: float | None = None,
) -> Method:
    """The same in OpenVINO."""
    import openvino

    start = time.perf_counter()
    core = openvino.Core()
    network = core.read_model(file)
    network.reshape({"images": list(images.shape)})
    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(network, "CPU", config).create_infer_request()
    feed = {"images": images} if price is None else {"images": images, "price": np.array(price, np.float32)}
    run = partial(request.infer, feed, share_inputs=True, share_outputs=True)
    load_s = time.perf_counter() - start
    found = {"precision": precision, "load_s": load_s, "file_mb": file.stat().st_size / 1e6}
    return Method(name, run, (facts or {}) | found)


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's; None if one of them does not vary."""
    found = float(np.corrcoef(one, other)[0, 1]) if min(np.std(one), np.std(other)) > 0 else math.nan
    return None if math.isnan(found) else found
