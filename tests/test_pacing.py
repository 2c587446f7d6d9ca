"""The frame time of videos, on a machine that is only simulated: no clock is read."""

import numpy as np
import pytest

from routeseg.budgets.pacing import FEWEST, LESSON, Pacer, time_weights

COSTS = np.array([0.28, 0.54, 0.79, 0.80, 0.87, 1.0])  # those of the bundled network, nearly
FULL_MS, REST_MS, TARGET_MS = 140.0, 12.0, 155.0
WITHIN = 1.1  # of what was asked: the 95th percentile of the frame time


class Machine:
    """Takes times that scatter. While others work, `load` times as long.

    base  of the network's time, what does not depend on the exit: as a share of the full network's
    """

    def __init__(self, seed=0, scatter=0.04, base=0.0, rest_ms=REST_MS):
        self.rng, self.scatter, self.rest_ms = np.random.default_rng(seed), scatter, rest_ms
        self.times = FULL_MS * (base + (1 - base) * COSTS)

    def run(self, exit, load=1.0):
        """-> ms of the network, and of the whole frame."""
        network = self.times[exit] * load * self.rng.lognormal(0, self.scatter)
        return network, network + self.rest_ms * load * self.rng.lognormal(0, 3 * self.scatter)


def drive(machine, loads, target=TARGET_MS, weights=None):
    """A video: the exits [N] at which frames leave, and their times [N]."""
    pacer = Pacer(COSTS, target, weights)
    exits, times = [], []
    for load in loads:
        exit = pacer.next().level
        network, frame = machine.run(exit, load)
        pacer.saw(exit, network, frame)
        exits.append(exit)
        times.append(frame)
    return np.array(exits), np.array(times)


def late(times, target=TARGET_MS):
    return (times > target).mean()


def coming_and_going(frames=1200, period=100, load=2.0):
    """The frame in which a load begins, or ends, feels half of it."""
    loads = np.where(np.arange(frames) // period % 2, load, 1.0)
    return np.where(loads == np.roll(loads, 1), loads, (1 + load) / 2)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("load", [1.4, 2.0, 2.5])
@pytest.mark.parametrize("period", [60, 100, 400])
def test_the_frame_time_holds_while_a_load_comes_and_goes(seed, load, period):
    loads = coming_and_going(period=period, load=load)
    exits, times = drive(Machine(seed), loads)
    assert np.percentile(times, 95) <= WITHIN * TARGET_MS and late(times) < 0.05
    fixed = np.array([Machine(seed).run(5, one)[1] for one in loads])
    assert np.percentile(fixed, 95) > WITHIN * TARGET_MS, "it would not hold by itself"


def test_quality_follows_what_the_machine_has_left():
    loads = coming_and_going(period=400)
    exits, _ = drive(Machine(), loads, target=200.0)
    rested = loads == np.roll(loads, LESSON)  # not just behind a change
    assert COSTS[exits[rested & (loads == 1)]].mean() > 0.95
    assert 0.5 < COSTS[exits[rested & (loads == 2)]].mean() < 0.6


@pytest.mark.parametrize("base", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("target", [70.0, 90.0, 110.0, 130.0, 155.0, 200.0])
def test_times_that_are_not_proportional_to_cost(base, weighed, target):
    """Nor if nothing of that was measured beforehand: fewer than 5 in 100 are late in any case."""
    machine = Machine(base=base)
    weights = time_weights(COSTS, machine.times) if weighed else None
    exits, times = drive(machine, np.ones(1200), target, weights)
    if machine.times[0] + REST_MS > 0.9 * target:
        assert (exits == 0).all()
        return
    assert late(times, target) < 0.05
    if weighed:
        best = np.flatnonzero(machine.times + REST_MS < 0.85 * target)[-1]
        assert COSTS[exits[FEWEST:]].mean() >= 0.95 * COSTS[best]


def test_heavy_tails_and_slow_writing():
    """Now and then a frame takes three times as long; or every 25th, or every 12th, is written slowly."""
    rng = np.random.default_rng(1)
    loads = np.where(rng.random(2000) < 0.01, 3.0, 1.0)
    _, times = drive(Machine(1), loads)
    assert late(times) < 0.05
    for every in (25, 12):
        machine, pacer, found = Machine(2), Pacer(COSTS, TARGET_MS), []
        for number in range(1000):
            exit = pacer.next().level
            network, frame = machine.run(exit)
            frame += 60 * (number % every == 0)
            pacer.saw(exit, network, frame)
            found.append(frame)
        assert late(np.array(found)) < 0.05


def test_what_cannot_be_kept_stays_at_the_cheapest_exit():
    exits, times = drive(Machine(), np.ones(100), target=20.0)
    assert (exits == 0).all() and late(times, 20.0) == 1
    assert Pacer(COSTS, 1e9).next() == (0, COSTS[0]), "nothing is known yet"


def test_one_slow_frame_counts_at_once_and_is_forgotten():
    pacer = Pacer(COSTS, 100.0)
    pacer.saw(5, 90.0, 95.0)
    assert pacer.next() == (5, 1.0)
    pacer.saw(5, 180.0, 185.0)
    assert pacer.next() == (0, COSTS[0])
    pacer.saw(0, 90.0 * COSTS[0], 5 + 90.0 * COSTS[0])
    exit, share = pacer.next()
    assert exit == 0 and share == pytest.approx(np.interp(95 / 180, COSTS, COSTS)) and share < COSTS[1]
    remembered = 1
    while pacer.next().level == 0:
        pacer.saw(0, 90.0 * COSTS[0], 5 + 90.0 * COSTS[0])
        remembered += 1
    assert remembered == (FEWEST + LESSON) / 2 and pacer.next().level == 5
    pacer.saw(5, 90.0, 300.0)
    assert pacer.next() == (0, COSTS[0]), "writing alone took too long"


def test_a_load_that_was_there_all_the_time_is_soon_forgotten():
    """Frames that could not have been in time teach nothing."""
    exits, _ = drive(Machine(scatter=0), np.repeat([9.0, 1.0], 100), target=200.0)
    assert (exits[:100] == 0).all() and (exits[100 + FEWEST :] == 5).all()


def test_weights():
    assert time_weights(COSTS, 100 * COSTS) == pytest.approx(COSTS)
    times = np.array([64.0, 70, 80, 90, 95, 100])
    assert time_weights(COSTS, times) == pytest.approx(np.maximum(times / 100, COSTS))
    assert time_weights(COSTS, np.linspace(1, 100, 6))[0] == COSTS[0], "never less than the cost"
    assert time_weights(COSTS, np.linspace(200, 100, 6)) == pytest.approx(np.ones(6))
    assert time_weights(np.array([1.0]), np.array([5.0])) == pytest.approx([1])


def test_a_level_that_takes_longer_than_a_dearer_one_is_passed_over():
    times = np.array([40.0, 60, 85, 120, 110, 100])
    weights = time_weights(COSTS, times)
    assert (np.diff(weights) >= 0).all() and weights[3:].tolist() == [1, 1, 1]
    pacer = Pacer(COSTS, 150.0, weights)
    pacer.saw(5, 100.0, 105.0)
    assert pacer.next().level == 5
