"""Balanced k-means against partitions computed by hand and by brute force."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from structure.rows import inertia_of, planted
from torch import Tensor

from switchable.errors import InputError
from switchable.structure import kmeans
from switchable.structure.kmeans import BalancedKMeans


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
