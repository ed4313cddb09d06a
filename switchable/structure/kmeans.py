"""Balanced k-means: N rows into E clusters of exactly I = N/E rows, each close to its cluster's mean.

Lloyd's two steps in turn: with the centres fixed, the best *balanced* assignment (exact, see `assignment.py`); with the
assignment fixed, the means. One matrix product gives the costs:

    inertia = sum_n ||x_n - mu(n)||^2 = sum_n ||x_n||^2 - I * sum_e ||mu_e||^2
    cost[n, e] = ||mu_e||^2 - 2 x_n . mu_e

A fresh fit starts on a narrow sketch of the rows with k-means++, then alternates pairwise re-splits there with Lloyd's
iterations at full width (`local_search.py`). A fit from labels goes straight to Lloyd's iterations. Each iteration
hands its prices to the next assignment, which then has little left to do.

Source: Zhang et al. 2022 (MoEfication) group an FFN's neurons by balanced k-means on the rows of its input projection;
their assignment is an auction. Shapes: N rows, D width, E clusters, I = N/E rows per cluster.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from switchable.arrays import Floats
from switchable.errors import InputError, divisors_near
from switchable.options import checked
from switchable.structure.assignment import balanced_assignment
from switchable.structure.features import unit_rows
from switchable.structure.local_search import few_threads, resplit_pairs, seed_centers, sketch

SKETCH_WIDTHS = (64, 256)  # as wide as there are clusters, within these limits
ROUNDS = (4, 64)  # of pairs in a sweep: half the number of clusters, within these limits
SWEEPS_OF_A_FRESH_FIT = 4
MOST_ITERATIONS = 100  # of Lloyd's, over the whole fit
TOLERANCE = 2e-4  # Lloyd's iterations end with one that lowers the inertia by less than this fraction of it
SWEEP_TOLERANCE = 1e-3  # Lloyd's iterations between two sweeps need not converge further than this
SWEEP_GAIN = 5e-4  # a sweep that gains less is the last one


class BalancedKMeans:
    """k-means on the rows' directions with clusters of exactly equal size, in scikit-learn's manners.

    n_clusters: the number of clusters; must divide the number of rows.
    init: labels of the rows (each cluster equally often) to start from; None: k-means++.
    sweeps: rounds of local search, at most; None means 4 for a fresh fit and 0 for a fit from labels.
    random_state: seed; equal seeds give equal results. The global random state is neither read nor changed.

    After `fit`: `labels_` (int64, on the rows' device), `inertia_` (of the rows divided by their norms; zero rows stay
    zero) and `n_iter_`. Inside it is float32.
    """

    labels_: Tensor
    inertia_: float
    n_iter_: int

    def __init__(
        self, n_clusters: int, *, init: Tensor | None = None, sweeps: int | None = None, random_state: int = 0
    ) -> None:
        self.n_clusters, self.init, self.sweeps, self.random_state = n_clusters, init, sweeps, random_state

    @torch.no_grad()
    def fit(self, rows: Tensor) -> BalancedKMeans:
        """Cluster the rows; return self.

        Raises:
            InputError: rows not finite or not to be divided, labels that do not fit them, or a number out of range.
        """
        checked("n_clusters", self.n_clusters, int, least=1)
        checked("sweeps", self.sweeps, int | None, least=0)
        checked("random_state", self.random_state, int, least=0, most=2**63 - 1)
        rows_ND = _unit_rows(rows, self.n_clusters)
        start_N = None if self.init is None else _checked_labels(self.init, rows_ND, self.n_clusters)
        lloyd = _Lloyd(rows_ND, self.n_clusters)
        if (sweeps := self.sweeps) is None:
            sweeps = SWEEPS_OF_A_FRESH_FIT if start_N is None else 0
        self.labels_ = _search(lloyd, start_N, sweeps, self.random_state)
        self.inertia_ = lloyd.inertia(_centers(rows_ND, self.labels_, self.n_clusters))
        self.n_iter_ = lloyd.iterations
        return self


class _Lloyd:
    """Lloyd's iterations on prepared rows, with the prices and the number of iterations they share."""

    def __init__(self, rows_ND: Tensor, clusters: int) -> None:
        self.rows_ND, self.clusters, self.iterations = rows_ND, clusters, 0
        self.prices_E: Floats | None = None
        self._total = _squares(rows_ND)

    def run(self, labels_N: Tensor, tol: float) -> tuple[Tensor, float]:
        """Iterate from balanced labels until the inertia falls by less than `tol`; return the best labels."""
        centers_ED = _centers(self.rows_ND, labels_N, self.clusters)
        inertia = self.inertia(centers_ED)
        while self.iterations < MOST_ITERATIONS:
            self.iterations += 1
            assigned_N, self.prices_E = _assign(self.rows_ND, centers_ED, self.prices_E)
            if torch.equal(assigned_N, labels_N):
                break
            centers_ED = _centers(self.rows_ND, assigned_N, self.clusters)
            before, inertia_now = inertia, self.inertia(centers_ED)
            if inertia_now >= before:
                break
            labels_N, inertia = assigned_N, inertia_now
            if before - inertia <= tol * before:
                break
        return labels_N, inertia

    def inertia(self, centers_ED: Tensor) -> float:
        return max(0.0, self._total - len(self.rows_ND) // self.clusters * _squares(centers_ED))


def _squares(rows: Tensor) -> float:
    # A host sync: the stopping rule needs the number.
    return float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2


def _search(lloyd: _Lloyd, start_N: Tensor | None, sweeps: int, seed: int) -> Tensor:
    """Start (or take the given start), alternate re-splits and Lloyd's iterations, return the best labels."""
    clusters, rounds = lloyd.clusters, min(max(ROUNDS[0], lloyd.clusters // 2), ROUNDS[1])
    if clusters in (1, len(lloyd.rows_ND)):  # nothing to choose: all together, or each alone
        every_N = torch.arange(len(lloyd.rows_ND), device=lloyd.rows_ND.device)
        return every_N % clusters if start_N is None else start_N
    generator = torch.Generator().manual_seed(seed)
    sketch_NR = lloyd.rows_ND
    if start_N is None or sweeps:
        sketch_NR = sketch(lloyd.rows_ND, min(max(SKETCH_WIDTHS[0], clusters), SKETCH_WIDTHS[1]), generator)
    if start_N is None:
        with few_threads(sketch_NR):
            centers_ER = seed_centers(sketch_NR, clusters, generator)
        labels_N, lloyd.prices_E = _assign(sketch_NR, centers_ER, None)
        best_N, best = labels_N, math.inf
    else:
        labels_N, best = lloyd.run(start_N, SWEEP_TOLERANCE if sweeps else TOLERANCE)
        best_N = labels_N
    for _ in range(sweeps):
        with few_threads(sketch_NR):
            labels_N = resplit_pairs(sketch_NR, labels_N, clusters, rounds, generator)
        labels_N, inertia = lloyd.run(labels_N, SWEEP_TOLERANCE)
        if (gained := best - inertia) > 0:
            best_N, best = labels_N, inertia
        if gained <= SWEEP_GAIN * inertia:
            break
    if sweeps or start_N is None:
        best_N, _ = lloyd.run(best_N, TOLERANCE)
    return best_N


def _assign(rows_ND: Tensor, centers_ED: Tensor, prices_E: Floats | None) -> tuple[Tensor, Floats]:
    """Return the best balanced labels for these centres. The N x E costs go to the host, to the solver."""
    cost_NE = (centers_ED.square().sum(1) - 2 * (rows_ND @ centers_ED.T)).cpu().numpy()
    solved = balanced_assignment(cost_NE, prices_E)
    return torch.from_numpy(solved.labels).to(rows_ND.device), solved.prices


def _centers(rows_ND: Tensor, labels_N: Tensor, clusters: int) -> Tensor:
    """Return the clusters' means."""
    if rows_ND.is_cpu:
        sum_ED = rows_ND.new_zeros(clusters, rows_ND.shape[1]).index_add_(0, labels_N, rows_ND)
    else:  # elsewhere index_add adds in a different order on every run
        sum_ED = torch.nn.functional.one_hot(labels_N, clusters).T.to(rows_ND) @ rows_ND
    return sum_ED * (clusters / len(rows_ND))


def _unit_rows(rows: Tensor, clusters: int) -> Tensor:
    """Check the rows; return them in float32, divided by their norms and centred.

    Centring changes no distance and keeps float32 accurate when all rows share a large part.
    """
    if not isinstance(rows, Tensor) or rows.is_complex() or rows.ndim != 2 or rows.shape[1] == 0:
        given = f"{tuple(rows.shape)}, {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
        raise InputError(f"rows are {given}; give a tensor of real numbers, (number of rows, width)")
    rows_ND = rows.detach() if rows.is_floating_point() else rows.detach().float()
    if (count := len(rows_ND)) < clusters:
        raise InputError(f"{count} rows for n_clusters={clusters}; give at least as many, or fewer clusters")
    if count % clusters:
        allowed = ", ".join(map(str, divisors_near(count, clusters)))
        raise InputError(f"n_clusters={clusters} does not divide the {count} rows; use one of {allowed}")
    peak_N = torch.linalg.vector_norm(rows_ND, torch.inf, dim=1).float()
    bad_N = ~peak_N.isfinite()
    if bad_N.any():
        raise InputError(
            f"{int(bad_N.sum())} of {count} rows hold NaN, infinite or (in float32) overflowing values,"
            f" the first is row {int(bad_N.nonzero()[0])}; give finite rows (has the training diverged?)"
        )
    rows_ND = unit_rows(rows_ND)
    return rows_ND.sub_(rows_ND.mean(0))


def _checked_labels(labels: Tensor, rows_ND: Tensor, clusters: int) -> Tensor:
    """Return labels to start from as int64, on the rows' device."""
    count = len(rows_ND)
    if labels.shape != (count,) or labels.is_floating_point():
        raise InputError(
            f"init labels of shape {tuple(labels.shape)}, {labels.dtype}; give {count} whole numbers, one per row"
        )
    labels_N = labels.detach().to(rows_ND.device, torch.int64)
    if labels_N.min() < 0 or labels_N.max() >= clusters:
        raise InputError(
            f"init labels {labels_N.min()} to {labels_N.max()}; n_clusters={clusters} allows 0 to {clusters - 1}"
        )
    sizes = labels_N.bincount(minlength=clusters)
    if sizes.min() != sizes.max():
        raise InputError(
            f"init labels of unequal sizes, from {sizes.min()} to {sizes.max()} rows; every cluster must have"
            f" {count // clusters} (labels of a previous balanced fit have), or use none"
        )
    return labels_N
