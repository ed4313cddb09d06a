"""Balanced k-means: the assignment against an exact solver, the estimator against hand-computed and brute force."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from switchable.errors import InputError
from switchable.structure import kmeans
from switchable.structure.assignment import balanced_assignment, lower_bound
from switchable.structure.kmeans import BalancedKMeans
from switchable.structure.local_search import _closest_pairs, resplit_pairs, seed_centers, sketch


def planted(rows: int, width: int, groups: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows around random directions, in groups as equal as can be, and their group."""
    generator = torch.Generator().manual_seed(seed)
    group_N = torch.randperm(rows, generator=generator) % groups
    center_GD = torch.nn.functional.normalize(torch.randn(groups, width, generator=generator), dim=1)
    return center_GD[group_N] + noise * torch.randn(rows, width, generator=generator) / width**0.5, group_N


def inertia_of(rows_ND: Tensor, labels_N: Tensor) -> float:
    """The definition: squared distances to the mean of the cluster, in float64."""
    rows_ND = rows_ND.double()
    groups = [rows_ND[labels_N == e] for e in labels_N.unique()]
    return float(sum((group - group.mean(0)).square().sum() for group in groups))


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


def at_angles(*degrees: float, lengths: tuple[float, ...] = (1.0,)) -> Tensor:
    """Rows of the plane in these directions, each of these lengths."""
    angles = torch.deg2rad(torch.tensor(degrees))
    directions = torch.stack([angles.cos(), angles.sin()], dim=1)
    return torch.cat([length * directions for length in lengths])


def test_fit_by_hand() -> None:
    # A pair's inertia is half its squared distance, 1 - cos of the angle between. {0, 10} and {20, 120}: 0.0152 +
    # 1.1736. Plain k-means would take {0, 10, 20} and {120}; {0, 20} with {10, 120} gives 1.4023.
    fitted = BalancedKMeans(2).fit(at_angles(0, 10, 20, 120))
    assert fitted.labels_[0] == fitted.labels_[1] != fitted.labels_[2] == fitted.labels_[3]
    assert fitted.inertia_ == pytest.approx(1.188840, rel=1e-5)


def test_directions_count_and_lengths_do_not() -> None:
    fitted = BalancedKMeans(2).fit(at_angles(0, 37, lengths=(1.0, 100.0)))
    assert fitted.labels_[0] == fitted.labels_[2] != fitted.labels_[1] == fitted.labels_[3]
    assert fitted.inertia_ == pytest.approx(0, abs=1e-6)


def unit(rows_ND: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows_ND.double(), dim=1)


@pytest.mark.parametrize("seed", range(6))
def test_small_fits_reach_the_optimum_of_all_partitions(seed: int) -> None:
    rows = torch.randn(10, 3, generator=torch.Generator().manual_seed(seed))
    halves = (torch.zeros(10).index_fill(0, torch.tensor(c), 1) for c in itertools.combinations(range(10), 5))
    best = min(inertia_of(unit(rows), half) for half in halves)
    found = min(BalancedKMeans(2, random_state=s).fit(rows).inertia_ for s in range(3))
    assert found == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "width", "clusters"),
    [(96, 8, 1), (96, 200, 3), (120, 5, 8), (64, 64, 64), (90, 2, 5), (77, 4, 11)],
)
def test_sizes_are_equal_and_the_inertia_is_theirs(rows: int, width: int, clusters: int) -> None:
    rows_ND = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)) + 0.5
    fitted = BalancedKMeans(clusters).fit(rows_ND)
    assert (torch.bincount(fitted.labels_, minlength=clusters) == rows // clusters).all()
    assert fitted.inertia_ == pytest.approx(inertia_of(unit(rows_ND), fitted.labels_), rel=1e-4, abs=1e-4)


def test_planted_groups_are_found_exactly() -> None:
    rows, group_N = planted(600, 40, 12, noise=0.3)
    labels = BalancedKMeans(12).fit(rows).labels_
    assert all(len(group_N[labels == e].unique()) == 1 for e in range(12))


def test_local_search_beats_lloyd_alone() -> None:
    # 25 groups of 64 in 16 clusters of 100: lumps must be cut. One start can be lucky, so three of them.
    inputs = [planted(1600, 32, 25, noise=0.4, seed=seed)[0] for seed in range(3)]
    alone = sum(BalancedKMeans(16, sweeps=0).fit(rows).inertia_ for rows in inputs)
    searched = sum(BalancedKMeans(16).fit(rows).inertia_ for rows in inputs)
    assert searched < 0.995 * alone


def test_resplitting_never_raises_the_inertia() -> None:
    rows, _ = planted(300, 10, 7, noise=1.0)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 5
    for _ in range(8):
        better = resplit_pairs(rows, labels, 5, rounds=1, generator=generator)
        assert (better.bincount(minlength=5) == 60).all()
        assert inertia_of(rows, better) <= inertia_of(rows, labels) * (1 + 1e-6)
        labels = better
    assert inertia_of(rows, labels) < 0.9 * inertia_of(rows, torch.arange(300) % 5)


@pytest.mark.parametrize("seed", range(6))
def test_pairs_are_the_greedy_ones_and_disjoint(seed: int) -> None:
    rng = np.random.default_rng(seed)
    distance_EE = rng.random((9 + seed, 9 + seed))
    distance_EE += distance_EE.T
    distance_EE[distance_EE > 1.5] = np.inf
    np.fill_diagonal(distance_EE, np.inf)
    found = sorted(map(tuple, _closest_pairs(distance_EE.copy()).tolist()))
    greedy = []
    while np.isfinite(distance_EE).any():
        a, b = sorted(np.unravel_index(distance_EE.argmin(), distance_EE.shape))
        greedy.append((a, b))
        distance_EE[[a, b], :] = distance_EE[:, [a, b]] = np.inf
    assert found == sorted(greedy)


def test_sketch_keeps_the_leading_directions_and_seeds_are_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 3, generator=generator) @ torch.randn(3, 50, generator=generator)
    narrow = sketch(rows, 3, generator)
    torch.testing.assert_close(torch.cdist(narrow, narrow), torch.cdist(rows, rows), atol=3e-2, rtol=1e-3)
    centers = seed_centers(rows, 10, generator)
    assert torch.cdist(centers, rows).min(1).values.max() < 1e-2
    assert len(centers.unique(dim=0)) == 10


def test_deterministic_by_seed_without_touching_the_global_state() -> None:
    rows = torch.randn(320, 16, generator=torch.Generator().manual_seed(0))
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (BalancedKMeans(10, random_state=seed).fit(rows).labels_ for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch_before, torch.random.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002


def test_warm_start_never_worsens_and_keeps_a_local_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = planted(400, 20, 8, noise=1.5)
    start = torch.arange(400) % 8
    warm = BalancedKMeans(8, init=start).fit(rows)
    used = torch.nn.functional.normalize(rows, dim=1)
    assert warm.inertia_ < inertia_of(used, start)
    monkeypatch.setattr(kmeans, "TOLERANCE", 0.0)
    settled = BalancedKMeans(8, init=warm.labels_).fit(rows)
    again = BalancedKMeans(8, init=settled.labels_).fit(rows)
    assert torch.equal(again.labels_, settled.labels_)
    assert again.n_iter_ == 1


def test_warm_start_with_sweeps_searches_from_the_labels() -> None:
    rows, _ = planted(1600, 32, 25, noise=0.5)
    start = torch.arange(1600) % 16
    plain = BalancedKMeans(16, init=start).fit(rows)
    searched = BalancedKMeans(16, init=start, sweeps=4).fit(rows)
    assert searched.inertia_ < plain.inertia_


def test_one_row_per_cluster_keeps_the_labels_given() -> None:
    start = torch.tensor([3, 1, 0, 2])
    assert torch.equal(BalancedKMeans(4, init=start).fit(torch.eye(4)).labels_, start)


def test_there_is_a_limit_to_the_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "MOST_ITERATIONS", 2)
    fitted = BalancedKMeans(20).fit(torch.randn(600, 8, generator=torch.Generator().manual_seed(0)))
    assert fitted.n_iter_ <= 2
    assert (fitted.labels_.bincount(minlength=20) == 30).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_other_dtypes_work_and_the_input_is_left_alone(dtype: torch.dtype) -> None:
    rows = (
        (8 * torch.randn(60, 6, generator=torch.Generator().manual_seed(0)))
        .to(dtype)
        .requires_grad_(dtype.is_floating_point)
    )
    before = rows.detach().clone()
    fitted = BalancedKMeans(4).fit(rows)
    assert torch.equal(rows.detach(), before)
    assert fitted.inertia_ == pytest.approx(inertia_of(unit(before), fitted.labels_), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-36, 1e-3, 1e3, 1e36])
def test_scale_does_not_matter(scale: float) -> None:
    rows, _ = planted(240, 12, 6, noise=0.5)
    plain, scaled = BalancedKMeans(6).fit(rows), BalancedKMeans(6).fit(rows * scale)
    assert torch.equal(plain.labels_, scaled.labels_)
    assert scaled.inertia_ == pytest.approx(plain.inertia_, rel=1e-4)


def test_equal_zero_and_dead_rows_work() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows in (torch.zeros(48, 7), torch.full((48, 7), 3.7), torch.randn(1, 7).expand(48, 7)):
        fitted = BalancedKMeans(6).fit(rows)
        assert (fitted.labels_.bincount(minlength=6) == 8).all()
        assert fitted.inertia_ == pytest.approx(0, abs=1e-3)
    rows = torch.randn(480, 7, generator=generator)
    rows[torch.randperm(480, generator=generator)[:200]] = 0.0
    fitted = BalancedKMeans(6).fit(rows)
    assert (fitted.labels_.bincount(minlength=6) == 80).all()
    # Two clusters of dead rows alone are possible; a local optimum may leave a few live ones among them.
    live_E = fitted.labels_[rows.any(1)].bincount(minlength=6)
    assert live_E.sort().values[:2].sum() <= 4


def test_constructor_only_stores() -> None:
    stored = BalancedKMeans(-3, init="nonsense", sweeps=-7)  # type: ignore[arg-type]
    assert (stored.n_clusters, stored.init, stored.sweeps) == (-3, "nonsense", -7)
    assert not hasattr(stored, "labels_")


GOOD = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("parameters", "rows", "said"),
    [
        ({"n_clusters": 5}, GOOD, r"n_clusters=5 does not divide the 12 rows; use one of 1, 2, 3, 4, 6"),
        ({"n_clusters": 24}, GOOD, r"12 rows for n_clusters=24; give at least as many"),
        ({"n_clusters": 0}, GOOD, "n_clusters=0 is out of range; use a whole number of at least 1"),
        ({"n_clusters": 2.0}, GOOD, r"n_clusters=2\.0 must be a whole number"),
        ({"n_clusters": True}, GOOD, "n_clusters=True"),
        ({"sweeps": -1}, GOOD, "sweeps=-1"),
        ({"random_state": -1}, GOOD, "random_state=-1"),
        ({"init": torch.zeros(11, dtype=torch.int64)}, GOOD, "give 12 whole numbers"),
        ({"init": torch.zeros(12)}, GOOD, "give 12 whole numbers"),
        ({"init": torch.arange(12)}, GOOD, "n_clusters=3 allows 0 to 2"),
        (
            {"init": torch.tensor([0] * 5 + [1] * 4 + [2] * 3)},
            GOOD,
            "from 3 to 5 rows; every cluster must have 4",
        ),
        ({"init": torch.tensor([0, 1] * 6)}, GOOD, "from 0 to 6 rows; every cluster must have 4"),
        ({}, GOOD[0], r"rows are \(3,\), torch\.float32; give a tensor of real numbers"),
        ({}, GOOD[:, :0], r"rows are \(12, 0\)"),
        ({}, GOOD[:0], "0 rows for n_clusters=3"),
        ({}, GOOD.index_fill(0, torch.tensor([7]), float("nan")), "1 of 12 rows hold NaN.*first is row 7"),
        ({}, GOOD.index_fill(0, torch.tensor([2, 3]), float("inf")), "2 of 12 rows.*first is row 2"),
        ({}, GOOD.double() * 1e300, "overflowing"),
        ({}, GOOD.to(torch.complex64), "real numbers"),
        ({}, GOOD.numpy(), "rows are ndarray; give a tensor"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(parameters: dict[str, Any], rows: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        BalancedKMeans(**({"n_clusters": 3} | parameters)).fit(rows)
