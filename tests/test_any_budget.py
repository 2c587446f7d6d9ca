"""benchmarks/any_budget.py: how choices are scored."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import any_budget
from routeseg.budgets.worth import AllExits, oracle

COSTS = np.array([0.2, 0.5, 1.0])


def seen(count: int = 40, seed: int = 0) -> dict:
    """Pictures of two classes: the half of large things is right at every exit, the other half at the last alone."""
    rng = np.random.default_rng(seed)
    hard = np.arange(count) % 2 == 1
    right = np.where(hard[:, None], [50, 60, 100], 100)  # correct pixels of 100 in each class
    confusion = np.zeros((count, 3, 2, 2), dtype=int)
    confusion[..., 0, 0] = confusion[..., 1, 1] = right
    confusion[..., 0, 1] = confusion[..., 1, 0] = 100 - right
    at = np.where(hard, 2, 0)
    return {
        "seen": AllExits.of(confusion),
        "left": {0.6: at, 1.0: np.full(count, 2)},
        "elsewhere": {0.6: np.where(at, 0, 1), 1.0: np.full(count, 2)},
        "costs": COSTS,
        "sizes": np.where(hard, 0.1, 0.5) + 0.01 * rng.random(count),
    }


def test_what_a_choice_is_worth():
    first, last = any_budget.analyse(seen(), 0)
    assert first["spent"] == pytest.approx(0.6) and (first["least"], first["most"]) == (0.2, 1.0)
    assert first["own"] == first["oracle"] == 1.0, "each picture leaves where it is right"
    assert first["shuffled"] < 0.9 and first["common"] < 0.9
    assert first["size_correlation"] < -0.8 and first["size_chance"] < 0.001, "small things cost more"
    assert last["own"] == last["shuffled"] == last["common"] == 1.0 and last["size_chance"] == 1.0
    assert first["leaving"] == [0.5, 0.0, 0.5]
    assert first["held_out"] == pytest.approx(0.35) and last["held_out"] == 1.0


def test_the_oracle_costs_what_was_spent():
    rng = np.random.default_rng(1)
    loss = rng.random((500, 3)) + (0.4, 0.2, 0.0)
    for cost in (0.3, 0.5, 0.8):
        assert COSTS[oracle(loss, COSTS, cost)].mean() == pytest.approx(cost, abs=0.005)


def test_means_over_seeds_and_the_best_static_network():
    rows = any_budget.mean_rows([any_budget.analyse(seen(seed=seed), seed) for seed in (0, 1)])
    assert rows[0]["own"] == 1.0 and rows[0]["own_std"] == 0.0 and rows[0]["leaving"] == [0.5, 0.0, 0.5]
    static = [
        {"name": name, "miou_mean": miou, "gmacs": {"mean": gmacs}}
        for name, miou, gmacs in (("a", 0.3, 1.0), ("b", 0.4, 5.9), ("c", 0.9, 7.0))
    ]
    any_budget.against_static(rows, static, full_gmacs=10.0)
    assert rows[0]["best_static"] == {"name": "b", "miou": 0.4} and rows[1]["best_static"]["name"] == "c"
