"""The search beyond Lloyd's algorithm: better partitions, disjoint pairs, sketches and seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from structure.rows import inertia_of, planted

from switchable.structure.kmeans import BalancedKMeans
from switchable.structure.local_search import _closest_pairs, resplit_pairs, seed_centers, sketch


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


def test_warm_start_with_sweeps_searches_from_the_labels() -> None:
    rows, _ = planted(1600, 32, 25, noise=0.5)
    start = torch.arange(1600) % 16
    plain = BalancedKMeans(16, init=start).fit(rows)
    searched = BalancedKMeans(16, init=start, sweeps=4).fit(rows)
    assert searched.inertia_ < plain.inertia_
