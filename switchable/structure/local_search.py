"""Where balanced k-means starts, and how it leaves a poor local optimum: both on a sketch of the rows.

The sketch: the rows in the span of their R leading principal directions (subspace iteration, Halko, Martinsson and
Tropp 2011). The centres of k-means lie close to that span, so its distances tell clusters apart, at R/D of the cost.

The start is k-means++ (Arthur and Vassilvitskii 2007), greedy: each next centre is the best of a few candidates.

The search: Lloyd's iterations move rows one by one and cannot exchange whole lumps between clusters. So take clusters
in pairs, pool the 2 I rows of each pair and split the pool again by balanced 2-means, from the pool's main direction
on; keep the new split if it is better. With the pool's sum fixed,

    inertia = constant - ||S_a - S_b||^2 / (2 I),        S = the sum of a cluster's rows,

and the balanced split for a direction v = S_a - S_b is exactly "the I largest of x.v": a sort, no assignment problem.
A round treats E/2 disjoint pairs in one batch, the closest that were not tried since either of their clusters changed.

Its gains: docs/clustering.md. Shapes: N rows, R sketch width, E clusters, I = N/E rows per cluster, P pairs, J = 2 I.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from switchable.arrays import Floats, Ints

SUBSPACE_STEPS = 2
SEEDING_TRIALS = 4
POWER_STEPS = 3
SPLIT_STEPS = 4
SMALL = 2**20  # numbers; operations on fewer are too short to share between threads
LEAST_GAIN = 1e-5  # relative: below it a new split is float32 rounding


@contextmanager
def few_threads(rows_NR: Tensor) -> Iterator[None]:
    """Let torch use one CPU thread where the rows are few.

    Two threads gain nothing on thousands of operations of 0.1 ms, and lose a great deal (a factor of 20 was seen)
    when another process takes one of the cores: every operation then waits for the thread that does not run.
    """
    threads = torch.get_num_threads()
    if not rows_NR.is_cpu or rows_NR.numel() > SMALL or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sketch(rows_ND: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Return the (centred) rows' coordinates in about their `width` leading principal directions."""
    if width >= rows_ND.shape[1]:
        return rows_ND
    basis_DR = torch.randn(rows_ND.shape[1], width, generator=generator, device="cpu").to(rows_ND)
    for _ in range(SUBSPACE_STEPS):
        basis_DR = torch.linalg.qr(rows_ND.T @ (rows_ND @ basis_DR)).Q
    return rows_ND @ basis_DR


def seed_centers(rows_NR: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Return rows drawn as first centres by greedy k-means++."""
    rows = rows_NR.shape[0]
    norm_N = rows_NR.square().sum(1)
    chosen = [int(torch.randint(rows, (1,), generator=generator))]
    nearest_N = _distances_to(rows_NR, norm_N, chosen)[:, 0]
    while len(chosen) < clusters:
        # Drawn by inverting the cumulated distances, which lets a CPU generator serve rows on any device.
        cumulated_N = nearest_N.double().cumsum(0)
        draw = torch.rand(SEEDING_TRIALS, generator=generator, dtype=torch.float64).to(rows_NR.device)
        trial = torch.searchsorted(cumulated_N, draw * cumulated_N[-1], right=True).clamp_(max=rows - 1)
        distance_NT = torch.minimum(nearest_N[:, None], _distances_to(rows_NR, norm_N, trial))
        best = int(distance_NT.sum(0).argmin())
        chosen.append(int(trial[best]))
        nearest_N = distance_NT[:, best]
    return rows_NR[chosen]


def _distances_to(rows_NR: Tensor, norm_N: Tensor, chosen: Tensor | list[int]) -> Tensor:
    """Squared distances from every row to the chosen rows."""
    return (norm_N[:, None] + norm_N[chosen] - 2 * (rows_NR @ rows_NR[chosen].T)).clamp_(min=0)


def resplit_pairs(
    rows_NR: Tensor, labels_N: Tensor, clusters: int, rounds: int, generator: torch.Generator
) -> Tensor:
    """Return balanced labels of no more inertia on `rows_NR`, after at most `rounds` rounds of pairs."""
    capacity = rows_NR.shape[0] // clusters
    members_EI = labels_N.argsort(stable=True).view(clusters, capacity)
    rows_EIR = rows_NR[members_EI]
    untried_EE = ~np.eye(clusters, dtype=bool)
    for _ in range(rounds):
        centers_ER = rows_EIR.mean(1)
        distance_EE = torch.cdist(centers_ER, centers_ER).double().cpu().numpy()
        distance_EE += distance_EE.T  # the last bits differ on the two sides of the diagonal
        pairs_P2 = _closest_pairs(np.where(untried_EE, distance_EE, np.inf))
        if not len(pairs_P2):
            break
        untried_EE[pairs_P2, pairs_P2[:, ::-1]] = False
        pairs = torch.from_numpy(pairs_P2).to(rows_NR.device)
        pool_PJR = rows_EIR[pairs].flatten(1, 2)
        order_PJ, better_P = _split(pool_PJR, generator)
        changed = pairs[better_P].flatten()
        if not len(changed):
            continue
        members_PJ = members_EI[pairs[better_P]].flatten(1).gather(1, order_PJ[better_P])
        members_EI[changed] = members_PJ.view(-1, capacity)
        rows_EIR[changed] = rows_NR[members_EI[changed]]
        changed_C = changed.cpu().numpy()
        untried_EE[changed_C, :] = untried_EE[:, changed_C] = True
        np.fill_diagonal(untried_EE, False)
    labels_EI = torch.arange(clusters, device=labels_N.device)[:, None].expand(-1, capacity)
    return torch.empty_like(labels_N).scatter_(0, members_EI.flatten(), labels_EI.flatten())


def _closest_pairs(distance_EE: Floats) -> Ints:
    """Return disjoint pairs (a, b), greedily the closest first; infinite distances are no pairs.

    Those that are each other's nearest are pairs in the greedy order too: take them all at once, and look again.
    Overwrites `distance_EE` (symmetric).
    """
    every_E = np.arange(len(distance_EE))
    pairs = []
    while True:
        nearest_E = distance_EE.argmin(axis=1)
        mutual_E = (nearest_E[nearest_E] == every_E) & (every_E < nearest_E)
        mutual_E &= np.isfinite(distance_EE[every_E, nearest_E])
        if not mutual_E.any():
            break
        found_P2 = np.stack([every_E[mutual_E], nearest_E[mutual_E]], axis=1)
        pairs.append(found_P2)
        distance_EE[found_P2.ravel(), :] = distance_EE[:, found_P2.ravel()] = np.inf
    return np.concatenate([np.empty((0, 2), dtype=np.int64), *pairs])


def _split(pool_PJR: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split each pool by balanced 2-means; return its new order (first half: one cluster), if it gains."""
    pairs, pooled, width = pool_PJR.shape
    half = pooled // 2
    pool_PJR = pool_PJR - pool_PJR.mean(1, keepdim=True)
    # Centred, S_a = -S_b: the squared norm of S_a alone is the gain to compare.
    old_P = pool_PJR[:, :half].sum(1).square().sum(1)
    direction_PR1 = torch.randn(pairs, width, 1, generator=generator, device="cpu").to(pool_PJR)
    for _ in range(POWER_STEPS):
        direction_PR1 = pool_PJR.mT @ (pool_PJR @ direction_PR1)
        direction_PR1 = torch.nn.functional.normalize(direction_PR1, dim=1)
    for _ in range(SPLIT_STEPS):
        top_PI = (pool_PJR @ direction_PR1).squeeze(2).topk(half, dim=1).indices
        chosen_PJ = pool_PJR.new_zeros(pairs, pooled).scatter_(1, top_PI, 1.0)
        direction_PR1 = (chosen_PJ[:, None] @ pool_PJR).mT
    new_P = direction_PR1.square().sum((1, 2))
    order_PJ = chosen_PJ.argsort(dim=1, descending=True, stable=True)
    return order_PJ, new_P > old_P * (1 + LEAST_GAIN)
