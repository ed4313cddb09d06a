"""Balanced assignment against an exact solver, and the bound that proves it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from switchable.errors import InputError
from switchable.structure.assignment import balanced_assignment, lower_bound


def exact_cost(cost_NE: np.ndarray[Any, Any]) -> float:
    """The optimum from SciPy's solver of square assignments: every cluster as I columns."""
    square_NN = np.repeat(cost_NE, cost_NE.shape[0] // cost_NE.shape[1], axis=1)
    chosen = linear_sum_assignment(square_NN)
    return float(square_NN[chosen].sum())


COSTS = {
    "gaussian": lambda rng, n, e: rng.normal(size=(n, e)),
    "one dear column": lambda rng, n, e: rng.normal(size=(n, e)) + 5 * (np.arange(e) == 0),
    "few values": lambda rng, n, e: rng.integers(0, 3, size=(n, e)),
    "lumps": lambda rng, n, e: (
        rng.normal(size=(4, e))[rng.integers(0, 4, n)] + 1e-3 * rng.normal(size=(n, e))
    ),
    "distances": lambda rng, n, e: np.abs(rng.normal(size=(n, 1)) - rng.normal(size=(1, e))) ** 2,
    "huge": lambda rng, n, e: 1e30 * rng.normal(size=(n, e)),
    "tiny": lambda rng, n, e: 1e-30 * rng.normal(size=(n, e)),
    "large rows": lambda rng, n, e: rng.normal(size=(n, e)) + 1e4 * rng.normal(size=(n, 1)),
}


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize(("rows", "clusters"), [(12, 3), (60, 4), (96, 32), (150, 5), (7, 7), (240, 2)])
def test_assignment_reaches_the_exact_optimum_and_proves_it(kind: str, rows: int, clusters: int) -> None:
    for seed in range(3):
        cost_NE = np.asarray(COSTS[kind](np.random.default_rng(seed), rows, clusters), dtype=np.float64)
        solved = balanced_assignment(cost_NE)
        assert (np.bincount(solved.labels, minlength=clusters) == rows // clusters).all()
        cost = float(cost_NE[np.arange(rows), solved.labels].sum())
        # The stated bound: costs are rounded to 2^-36 of the largest, half a unit each, for two assignments.
        rounding = rows * 2.0**-36 * np.abs(cost_NE).max()
        assert abs(cost - exact_cost(cost_NE)) <= rounding
        assert lower_bound(cost_NE, solved.prices) == pytest.approx(cost, rel=1e-9, abs=2 * rounding)


def test_assignment_by_hand() -> None:
    # Both rows prefer cluster 0 at 1 against 4 and 2 against 9; two places each. Sending row 2 away costs least.
    cost_NE = np.array([[1.0, 4.0], [2.0, 9.0], [1.0, 2.0], [5.0, 0.0]])
    assert balanced_assignment(cost_NE).labels.tolist() == [0, 0, 1, 1]


def test_prices_only_speed_up_and_a_wrong_price_does_no_harm() -> None:
    cost_NE = np.random.default_rng(0).normal(size=(400, 8))
    cold = balanced_assignment(cost_NE)
    warm = balanced_assignment(cost_NE, cold.prices)
    absurd = balanced_assignment(cost_NE, np.array([1e12, -1e12, 0, 0, 5, 0, 0, 0]))
    assert warm.moved <= 2  # ties at the prices themselves
    assert (warm.labels == cold.labels).all()
    assert (absurd.labels == cold.labels).all()


def test_any_prices_bound_the_cost_from_below() -> None:
    rng = np.random.default_rng(1)
    cost_NE = rng.normal(size=(90, 6))
    optimum = exact_cost(cost_NE)
    assert all(lower_bound(cost_NE, rng.normal(size=6)) <= optimum + 1e-9 for _ in range(20))


@pytest.mark.parametrize(
    ("cost_NE", "prices_E", "said"),
    [
        (np.zeros((7, 3)), None, "use one of 1, 7"),
        (np.zeros(6), None, r"shape \(6,\)"),
        (np.zeros((0, 3)), None, r"shape \(0, 3\)"),
        (np.array([[np.nan, 1.0]] * 2), None, "NaN"),
        (np.zeros((6, 3)), np.zeros(2), "3 finite numbers"),
        (np.zeros((6, 3)), np.array([0, 0, np.inf]), "3 finite numbers"),
    ],
)
def test_assignment_refuses_bad_costs(cost_NE: Any, prices_E: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        balanced_assignment(cost_NE, prices_E)
