"""Balanced k-means: N rows into E clusters of exactly I = N/E rows, each close to its cluster's mean.

Lloyd's two steps in turn: with the centres fixed, the best *balanced* assignment (exact, see
`assignment.py`); with the assignment fixed, the means. For equal sizes a centre's squared norm counts
equally often whatever the assignment, so that only the inner products matter, one matrix product:

    inertia = sum_n ||x_n - mu(n)||^2 = sum_n ||x_n||^2 - I * sum_e ||mu_e||^2
    cost[n, e] = ||mu_e||^2 - 2 x_n . mu_e

A fresh fit starts on a narrow sketch of the rows with k-means++, then alternates pairwise re-splits there
with Lloyd's iterations at full width (`local_search.py`). A fit from labels goes straight to Lloyd's
iterations. Each iteration hands its prices to the next assignment, which then has little left to do.

Zhang et al. (MoEfication, 2022) group an FFN's neurons by balanced k-means on the rows of its input
projection; their assignment is an auction. `features.py` says what the rows are, `groups.py`
does all layers of a model.
Shapes: N rows, D width, E clusters, I = N/E rows per cluster.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from switchable.errors import InputError, divisors_near, nearest
from switchable.structure.assignment import balanced_assignment
from switchable.structure.local_search import few_threads, resplit_pairs, seed_centers, sketch

Rows = Tensor | npt.NDArray[Any]
METRICS = ("cosine", "euclidean")

SKETCH_WIDTHS = (64, 256)  # as wide as there are clusters, within these limits
ROUNDS = (4, 64)  # of pairs in a sweep: half the number of clusters, within these limits
SWEEPS_OF_A_FRESH_FIT = 4
SWEEP_TOLERANCE = 1e-3  # Lloyd's iterations between two sweeps need not converge further than this
SWEEP_GAIN = 5e-4  # a sweep that gains less is the last one


class BalancedKMeans:
    """k-means with clusters of exactly equal size, in scikit-learn's manners.

    n_clusters: the number of clusters; must divide the number of rows.
    init: "k-means++", or labels of the rows (each cluster equally often) to start from.
    max_iter: Lloyd's iterations at most, over the whole fit.
    tol: stop when an iteration lowers the inertia by less than this fraction of it.
    metric: "cosine" divides every row by its norm first (zero rows stay zero); "euclidean" takes rows as
    they are.
    sweeps: rounds of local search, at most; None means 4 for a fresh fit and 0 for a fit from labels.
    random_state: seed; equal seeds give equal results. The global random state is neither read nor changed.

    After `fit`: `labels_` (int64), `cluster_centers_` (means, of the unit rows for "cosine"), `inertia_`,
    `n_iter_`. Tensors in, tensors out on the same device; arrays in, arrays out. Inside it is float32.
    """

    labels_: Any
    cluster_centers_: Any
    inertia_: float
    n_iter_: int

    def __init__(
        self,
        n_clusters: int,
        *,
        init: Literal["k-means++"] | Rows = "k-means++",
        max_iter: int = 100,
        tol: float = 2e-4,
        metric: Literal["cosine", "euclidean"] = "cosine",
        sweeps: int | None = None,
        random_state: int = 0,
    ) -> None:
        self.n_clusters, self.init, self.max_iter, self.tol = n_clusters, init, max_iter, tol
        self.metric, self.sweeps, self.random_state = metric, sweeps, random_state

    @torch.no_grad()
    def fit(self, rows: Rows, y: None = None) -> BalancedKMeans:  # noqa: ARG002 - scikit-learn passes y
        """Cluster the rows; return self."""
        for name, least in (("n_clusters", 1), ("max_iter", 1), ("random_state", 0), ("sweeps", 0)):
            if name != "sweeps" or self.sweeps is not None:
                _check_whole(name, getattr(self, name), least)
        if not 0 <= self.tol < 1:
            raise InputError(f"tol={self.tol!r}; give a fraction of the inertia from 0 up to 1, such as 1e-4")
        if self.metric not in METRICS:
            close = nearest(str(self.metric), METRICS)
            raise InputError(f"metric={self.metric!r}; use one of {', '.join(METRICS)}{close}")
        rows_ND, peak_N = _as_rows(rows, self.n_clusters)
        start_N = _as_labels(self.init, len(rows_ND), self.n_clusters, rows_ND.device)
        rows_ND, mean_D, scale = _standardise(rows_ND, peak_N, self.metric)
        lloyd = _Lloyd(rows_ND, self.n_clusters, self.max_iter)
        sweeps = self.sweeps
        if sweeps is None:
            sweeps = SWEEPS_OF_A_FRESH_FIT if start_N is None else 0
        labels_N = _search(lloyd, start_N, sweeps, self.tol, self.random_state)
        centers_ED = _centers(rows_ND, labels_N, self.n_clusters)
        self.inertia_ = lloyd.inertia(centers_ED) * scale**2
        self.n_iter_ = lloyd.iterations
        centers_ED = (centers_ED + mean_D) * scale
        if isinstance(rows, Tensor):
            self.labels_, self.cluster_centers_ = labels_N, centers_ED
        else:
            self.labels_, self.cluster_centers_ = labels_N.numpy(), centers_ED.numpy()
        return self


class _Lloyd:
    """Lloyd's iterations on prepared rows, with the prices and the number of iterations they share."""

    def __init__(self, rows_ND: Tensor, clusters: int, max_iter: int) -> None:
        self.rows_ND = rows_ND
        self.clusters = clusters
        self.max_iter = max_iter
        self.iterations = 0
        self.prices_E: npt.NDArray[np.float64] | None = None
        self._total = _squares(rows_ND)

    def run(self, labels_N: Tensor, tol: float) -> tuple[Tensor, float]:
        """Iterate from balanced labels until the inertia falls by less than `tol`; return the best labels."""
        centers_ED = _centers(self.rows_ND, labels_N, self.clusters)
        inertia = self.inertia(centers_ED)
        while self.iterations < self.max_iter:
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


def _search(lloyd: _Lloyd, start_N: Tensor | None, sweeps: int, tol: float, seed: int) -> Tensor:
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
        labels_N, best = lloyd.run(start_N, SWEEP_TOLERANCE if sweeps else tol)
        best_N = labels_N
    for _ in range(sweeps):
        with few_threads(sketch_NR):
            labels_N = resplit_pairs(sketch_NR, labels_N, clusters, rounds, generator)
        labels_N, inertia = lloyd.run(labels_N, max(tol, SWEEP_TOLERANCE))
        gained = best - inertia
        if gained > 0:
            best_N, best = labels_N, inertia
        if gained <= SWEEP_GAIN * inertia:
            break
    if sweeps or start_N is None:
        best_N, _ = lloyd.run(best_N, tol)
    return best_N


def _assign(
    rows_ND: Tensor, centers_ED: Tensor, prices_E: npt.NDArray[np.float64] | None
) -> tuple[Tensor, npt.NDArray[np.float64]]:
    """Return the best balanced labels for these centres. The N x E costs go to the host, to the solver."""
    cost_NE = (centers_ED.square().sum(1) - 2 * (rows_ND @ centers_ED.T)).cpu().numpy()
    solved = balanced_assignment(cost_NE, prices_E)
    return torch.from_numpy(solved.labels).to(rows_ND.device), solved.prices


def _centers(rows_ND: Tensor, labels_N: Tensor, clusters: int) -> Tensor:
    """Return the clusters' means."""
    if rows_ND.is_cpu:
        sum_ED = torch.zeros(clusters, rows_ND.shape[1]).index_add_(0, labels_N, rows_ND)
    else:  # elsewhere index_add adds in a different order on every run
        sum_ED = torch.nn.functional.one_hot(labels_N, clusters).T.to(rows_ND) @ rows_ND
    return sum_ED * (clusters / len(rows_ND))


def _standardise(rows_ND: Tensor, peak_N: Tensor, metric: str) -> tuple[Tensor, Tensor, float]:
    """Return rows in float32, normalised, scaled and centred; `(rows + mean) * scale` gives them uncentred.

    Centring changes no distance and keeps float32 accurate when all rows share a large part; the division
    by the largest magnitude keeps squares of very large or small rows in range.
    """
    peak_N1 = peak_N[:, None]
    scale = 1.0
    if metric == "cosine":
        rows_ND = rows_ND.float() / torch.where(peak_N1 > 0, peak_N1, 1)
        norm_N1 = torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True)
        rows_ND /= torch.where(norm_N1 > 0, norm_N1, 1)
    else:
        scale = float(peak_N1.max()) or 1.0
        rows_ND = rows_ND.float() / scale
    mean_D = rows_ND.mean(0)
    return rows_ND.sub_(mean_D), mean_D, scale


def _as_rows(rows: Rows, clusters: int) -> tuple[Tensor, Tensor]:
    """Check the rows; return them as a tensor of floats, not copied where possible, and their largest entries."""
    if not isinstance(rows, Tensor | np.ndarray):
        raise InputError(
            f"rows are a {type(rows).__name__}; give a torch tensor or a NumPy array (rows x width)"
        )
    if rows.is_complex() if isinstance(rows, Tensor) else rows.dtype.kind not in "fiub":
        raise InputError(f"rows of dtype {rows.dtype}; give real numbers")
    if not isinstance(rows, Tensor):
        rows = torch.from_numpy(np.asarray(rows, dtype=np.float32))
    rows_ND = rows.detach()
    if rows_ND.ndim != 2 or rows_ND.shape[1] == 0:
        shape = tuple(rows_ND.shape)
        raise InputError(f"rows of shape {shape}; give two dimensions, (number of rows, width)")
    if not rows_ND.is_floating_point():
        rows_ND = rows_ND.float()
    count = len(rows_ND)
    if count < clusters:
        raise InputError(
            f"{count} rows for n_clusters={clusters}; give at least as many rows, or fewer clusters"
        )
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
    return rows_ND, peak_N


def _as_labels(init: Any, rows: int, clusters: int, device: torch.device) -> Tensor | None:
    """Return the labels to start from, or None for k-means++."""
    if isinstance(init, str):
        if init != "k-means++":
            raise InputError(f"init={init!r}; use 'k-means++', or an array of one label per row")
        return None
    labels = init.detach().cpu().numpy() if isinstance(init, Tensor) else np.asarray(init)
    if labels.shape != (rows,) or labels.dtype.kind not in "iu":
        raise InputError(
            f"init labels of shape {labels.shape}, {labels.dtype}; give {rows} whole numbers, one per row"
        )
    if labels.min() < 0 or labels.max() >= clusters:
        raise InputError(
            f"init labels {labels.min()} to {labels.max()}; n_clusters={clusters} allows 0 to {clusters - 1}"
        )
    sizes = np.bincount(labels.astype(np.int64), minlength=clusters)
    if sizes.min() != sizes.max():
        raise InputError(
            f"init labels of unequal sizes, from {sizes.min()} to {sizes.max()} rows; every cluster must have"
            f" {rows // clusters} (labels of a previous balanced fit have), or use init='k-means++'"
        )
    return torch.from_numpy(labels.astype(np.int64)).to(device)


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise InputError(f"{name}={value!r}; give a whole number of at least {least}")
