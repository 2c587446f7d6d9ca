"""Measuring a LatencyTable (latency.py) on this machine, and how well it predicts.

Two sets of random routes run in turns, in another order every round. The table is taken from one set and tested on the
other (`--routes`). In each set half of the routes run their gates.

clocked  if the engine has compiled kernels (engine/compiled.py), they take the time of each step of each node. A part's
         time is the median over all nodes of a scale, routes and rounds, times a factor near 1. The factor is the same
         for all parts: disturbances only lengthen times, so the median of a sum is more than the sum of the medians.
fitted   otherwise (GPUs, CPUs without a compiler) the parts' times are the non-negative ones that explain best, in
         relative error, what whole forwards took. Stem and decoder always run together and cannot be told apart, nor
         can a path up and what its arrival costs. The sum is more reliable than its parts, which trade time among each
         other: read those as rough.

Legend: L depth, S scales, P parts of a node, N routes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from routeseg.cost.latency import (
    ARRIVAL,
    CALL,
    CELL,
    DECODER,
    GATE,
    GLANCE,
    HALVED,
    PARTS,
    REPEATS,
    ROUTES,
    SEND_DOWN,
    SEND_UP,
    STAGE,
    STEM,
    STEM_AND_DECODER,
    SUM,
    LatencyTable,
    network_shape,
    route_counts,
)
from routeseg.engine import Precision, SkipEngine
from routeseg.engine.compiled import STEPS, CompiledForward
from routeseg.engine.skip import Backend
from routeseg.model import DynamicRoutingNetwork
from routeseg.model.gate import GATE_BIAS
from routeseg.model.grid import check_images
from routeseg.model.request import Request
from routeseg.space import Route

CALIBRATION_ROUTES = 40  # the fit has up to 24 unknowns
STEP_PARTS = (None, GATE, CELL, SEND_UP, SEND_DOWN, STAGE)  # the part that each of STEPS times; gather times three
FITTED = (GATE, CELL, SEND_UP, SEND_DOWN, ARRIVAL, STAGE)
MS = 1000.0


@dataclass
class _Job:
    """A route to be timed, with its gates or without, and what the rounds gave: `ms` of each, `steps` [L+1,S,6] and
    `fixed` stem, decoder, call, in seconds, if there are clocks."""

    route: Route
    gates: bool
    ms: list[float] = field(default_factory=list)
    steps: list[np.ndarray] = field(default_factory=list)
    fixed: list[np.ndarray] = field(default_factory=list)


def profile(
    model: DynamicRoutingNetwork,
    size: tuple[int, int],
    precision: Precision = "float32",
    routes: int = ROUTES,
    repeats: int = REPEATS,
    seed: int = 0,
    backend: Backend = "auto",
    step: Callable[[], None] = lambda: None,
) -> LatencyTable:
    """The latency table of a network for images of this size, on the device where it is, with as many threads as
    PyTorch uses. `step` is called after each of the `forwards(routes) * repeats` forwards.

    routes    how many routes the table is tested on
    repeats   how many rounds; their median counts
    backend   as SkipEngine takes it

    Raises ValueError for fewer than one route or repeat, and what SkipEngine raises.
    """
    for name, value in (("routes", routes), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    engine = SkipEngine(_opened(model), precision, backend)
    clocked = isinstance(engine.forward, CompiledForward)
    device = next(model.parameters()).device
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed)).to(device)
    check_images(images)
    calibration, tested = _jobs(model, routes, random.Random(seed))
    runs = [(job, clocked) for job in calibration] + [(job, False) for job in tested]
    runs += [(job, False) for job in calibration[:2]]  # everything open is shown as well, measured without clocks
    for job in calibration[:2]:  # warms up
        _forward(engine, images, job)
        job.ms.clear()
    order = random.Random(seed)
    for _ in range(repeats):
        order.shuffle(runs)
        for job, with_clocks in runs:
            (_clocked_forward if with_clocks else _forward)(engine, images, job)
            step()
    fixed_ms, part_ms = _from_clocks(model, calibration) if clocked else _from_fit(model, calibration)
    table = LatencyTable(size, str(device), engine.precision, network_shape(model.config), fixed_ms, part_ms)
    table.facts.update(how="clocked" if clocked else "fitted", repeats=repeats, seed=seed)
    if model.exits is not None and model.exits.calibrated:
        table.facts[GLANCE] = _glance_ms(SkipEngine(model, precision, backend), images, repeats)
    if engine.precision_reason is not None:
        table.facts["precision_reason"] = engine.precision_reason
    table.facts.update(all_open=[_tested(table, job) for job in calibration[:2]], test=_test(table, tested))
    return table


def forwards(routes: int) -> int:
    """How many forwards a round of `profile` has."""
    return CALIBRATION_ROUTES + routes + 2


def measure_route(
    model: DynamicRoutingNetwork,
    table: LatencyTable,
    route: Route,
    repeats: int = REPEATS,
    backend: Backend = "auto",
) -> list[dict[str, Any]]:
    """A route's predicted and measured milliseconds, without its gates and, if the network has gates, with them."""
    engine = SkipEngine(_opened(model), table.precision, backend)  # type: ignore[call-overload]
    images = torch.rand(1, 3, *table.size).to(next(model.parameters()).device)
    rows = []
    for job in [_Job(route, gates) for gates in (False, True)[: 1 + model.config.gated]]:
        _forward(engine, images, job)
        job.ms.clear()  # of the first, which warms up
        for _ in range(repeats):
            _forward(engine, images, job)
        rows.append(_tested(table, job))
    return rows


def _opened(model: DynamicRoutingNetwork) -> DynamicRoutingNetwork:
    """A copy whose gates are computed as ever, but always open every path, so that exactly a given route runs."""
    other: dict[str, Any] = {"gate": "soft"} if model.config.gated else {"exits": None, "choice": None, "place": None}
    config = replace(model.config, **other)
    opened = DynamicRoutingNetwork(config).to(next(model.parameters()))
    opened.load_state_dict(model.state_dict(), strict=False)  # a gate of another kind may have more
    with torch.no_grad():
        for layer, scale in opened.route.nodes:
            gate = opened.node(layer, scale).gate
            if gate is not None:
                gate.score.weight.zero_()
                gate.score.bias.fill_(GATE_BIAS)
    return opened.eval()


def _jobs(model: DynamicRoutingNetwork, routes: int, rng: random.Random) -> tuple[list[_Job], list[_Job]]:
    """Calibration: everything open, with gates and without, and routes whose shares of nodes and edges differ between
    scales, so that no part always comes with another. Test: routes with one share of nodes and one of edges."""
    calibration = [_Job(model.route, gates=model.config.gated), _Job(model.route, gates=False)]
    scales = range(model.space.num_scales)
    while len(calibration) < CALIBRATION_ROUTES:
        shares = [(rng.random(), rng.random()) for _ in scales]
        calibration.append(
            _Job(random_route(model.route, shares, rng), model.config.gated and len(calibration) % 2 == 0)
        )
    tested = []
    for number in range(routes):
        shares = [(rng.random(), rng.random())] * len(scales)
        tested.append(_Job(random_route(model.route, shares, rng), model.config.gated and number % 2 == 0))
    return calibration, tested


def random_route(whole: Route, shares: list[tuple[float, float]], rng: random.Random) -> Route:
    """Some of a route's edges: each node runs with the first share of its scale, each of its edges is then open with
    the second; without dead ends."""
    running = {node for node in sorted(whole.nodes) if rng.random() < shares[node[1]][0]}
    return Route(
        whole.space, [edge for edge in whole if edge[:2] in running and rng.random() < shares[edge[1]][1]]
    ).pruned()


def _glance_ms(engine: SkipEngine, images: Tensor, repeats: int) -> float:
    """What the decision at an exit takes: an image that passes all of them, against the same route when it is given."""
    given, asked = [], []
    for _ in range(1 + repeats):
        given.append(_seconds(images, lambda: engine(images, engine.model.route)))
        asked.append(_seconds(images, lambda: engine(images, budget=1.0)))
    decisions = len(engine.model.config.exit_routes) - 1
    return MS * max(0.0, float(np.median(asked[1:]) - np.median(given[1:]))) / decisions  # the first warm up


def _seconds(images: Tensor, forward: Callable[[], Any]) -> float:
    start = time.perf_counter()
    forward()
    if images.device.type != "cpu":
        torch.accelerator.synchronize(images.device)
    return time.perf_counter() - start


def _forward(engine: SkipEngine, images: Tensor, job: _Job) -> None:
    job.ms.append(MS * _seconds(images, lambda: engine(images, job.route, activation="own" if job.gates else "one")))


@torch.inference_mode()
def _clocked_forward(engine: SkipEngine, images: Tensor, job: _Job) -> None:
    """A forward with the kernels' clocks; time that they do not see belongs to the call."""
    assert isinstance(engine.forward, CompiledForward)
    nodes = engine.model.space.legal.shape[:2]
    seconds = np.zeros(nodes[0] * nodes[1] * len(STEPS) + 2)
    start = time.perf_counter()
    check_images(images)
    request = Request.of(engine.model.config, 1, job.route, activation="own" if job.gates else "one")
    engine.forward(images, request, seconds)
    call = time.perf_counter() - start - seconds.sum()
    job.steps.append(seconds[:-2].reshape(*nodes, len(STEPS)))
    job.fixed.append(np.array([*seconds[-2:], call]))


def _from_clocks(model: DynamicRoutingNetwork, jobs: list[_Job]) -> tuple[dict[str, float], np.ndarray]:
    counts = np.stack([route_counts(network_shape(model.config), job.route, job.gates) for job in jobs])  # [N,L+1,S,P]
    steps_ms = MS * np.stack([np.median(job.steps, axis=0) for job in jobs])  # [N,L+1,S,6]
    part_ms = np.zeros((model.space.num_scales, len(PARTS)))
    for scale in range(model.space.num_scales):
        count, ms = counts[:, :, scale], steps_ms[:, :, scale]
        for number, part in enumerate(STEP_PARTS):
            if part is not None and (runs := count[..., part] > 0).any():
                part_ms[scale, part] = np.median(ms[runs, number])
        if (summed := count[..., SUM] > 0).any():
            # Sums by what arrives: the median of each kind, then the times of writing and of each map that is read.
            kinds, kind = np.unique(count[summed][:, [SUM, ARRIVAL, HALVED]], axis=0, return_inverse=True)
            medians = [np.median(ms[summed][kind.ravel() == k, 0]) for k in range(len(kinds))]
            part_ms[scale, [SUM, ARRIVAL, HALVED]] = nnls(kinds, np.array(medians))[0]
    fixed_ms = MS * np.median(np.concatenate([job.fixed for job in jobs]), axis=0).clip(0)
    whole_ms = [
        MS * np.median([steps.sum() + fixed.sum() for steps, fixed in zip(job.steps, job.fixed, strict=True)])
        for job in jobs
    ]
    sums_ms = (counts.sum(1) * part_ms).sum((1, 2)) + fixed_ms.sum()
    factor = float(np.median(whole_ms / sums_ms))
    return dict(zip((STEM, DECODER, CALL), (factor * fixed_ms).tolist(), strict=True)), factor * part_ms


def _from_fit(model: DynamicRoutingNetwork, jobs: list[_Job]) -> tuple[dict[str, float], np.ndarray]:
    shape = network_shape(model.config)
    counts = np.stack([route_counts(shape, job.route, job.gates).sum(0) for job in jobs])[..., FITTED]  # [N,S,p]
    measured = np.array([np.median(job.ms) for job in jobs])
    rows = np.column_stack([np.ones(len(jobs)), counts.reshape(len(jobs), -1)])
    times = nnls(rows / measured[:, None], np.ones(len(jobs)))[0]
    part_ms = np.zeros((model.space.num_scales, len(PARTS)))
    part_ms[:, FITTED] = times[1:].reshape(-1, len(FITTED))
    return {STEM_AND_DECODER: float(times[0])}, part_ms


def _tested(table: LatencyTable, job: _Job) -> dict[str, Any]:
    return {
        "open_edges": len(job.route),
        "gates": job.gates,
        "predicted_ms": table.of_route(job.route, job.gates),
        "measured_ms": float(np.median(job.ms)),
    }


def _test(table: LatencyTable, jobs: list[_Job]) -> dict[str, Any]:
    """Predicted and measured times of the test's routes; errors as shares of what was measured."""
    rows = [_tested(table, job) for job in jobs]
    errors = [abs(row["predicted_ms"] / row["measured_ms"] - 1) for row in rows]
    return {"median_error": float(np.median(errors)), "worst_error": max(errors), "routes": rows}
