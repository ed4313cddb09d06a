"""The balanced assignment: N rows to E clusters of exactly I = N/E rows each, at the least total cost.

Every cluster has a price, and each row takes the cluster with the least `cost[n, e] + price[e]`. Whatever sizes come
out, that assignment is optimal *for those sizes*. Two steps make the sizes equal:

1. Prices: all clusters at once move their price to where their own demand would be I if the others stood still (an
   auction in big steps). A few rounds leave a few rows in excess.
2. Shortest paths: in the E x E graph whose edge a -> b weighs the least `cost[n, b] - cost[n, a]` over the rows n of a,
   the shortest path from a cluster with too many rows to one with too few is the cheapest way to move one row. The
   assignment stays optimal for its new sizes, so the end is the exact optimum (successive shortest paths, Ford and
   Fulkerson 1962, on E nodes in place of N + E; several paths at once where they do not meet).

Costs are rounded to a grid of 2^-36 of their largest magnitude, below float32's own rounding. Every sum of them is then
exact in float64: there is no tolerance, no negative cycle and no endless loop. The graph's distances at the end are
dual prices, which prove the result by weak duality (`lower_bound`):

    sum_n min_e (cost[n, e] + price[e]) - I * sum_e price[e]  <=  optimum  <=  cost of the assignment.

All runs on the host in NumPy. Shapes: N rows, E clusters, I = N/E rows per cluster, M rows of one cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from switchable.arrays import Floats, Ints
from switchable.errors import InputError, divisors_near

GRID_BITS = 36  # of a float64's 53: the rest is room for the sums of 2 E costs along a path, for E up to 2^14
MAX_PRICE = 2.0**46  # on the grid; prices only start the search, so a limit costs time at worst
PRICE_ROUNDS = 12
PRICE_STEP = 0.9  # of the way that would be right for each price alone
LEAST_PRICE_STEP = 0.1


@dataclass(frozen=True)
class Assignment:
    """A balanced assignment, the prices that prove it, and how it was reached."""

    labels: Ints
    """The cluster of each row; every cluster occurs N/E times."""
    prices: Floats
    """Dual prices: with them every row sits in a cheapest cluster. Good starting prices for similar costs."""
    moved: int
    """Rows that the price rounds left in excess and the shortest paths moved."""


def balanced_assignment(cost_NE: npt.NDArray[Any], prices_E: Floats | None = None) -> Assignment:
    """Return the assignment of least total cost with N/E rows in every cluster, starting from `prices_E`."""
    cost_NE = _checked(cost_NE)
    clusters = cost_NE.shape[1]
    start_E = np.zeros(clusters) if prices_E is None else np.asarray(prices_E, dtype=np.float64)
    if start_E.shape != (clusters,) or not np.isfinite(start_E).all():
        shape = start_E.shape
        raise InputError(f"prices of shape {shape}; give {clusters} finite numbers, one per cluster, or None")
    capacity = cost_NE.shape[0] // clusters
    # Onto the grid: the largest cost becomes some 2^36 units. A power of two, so only last bits are lost.
    shift = GRID_BITS - int(np.frexp(np.abs(cost_NE).max())[1])
    units_NE = np.rint(np.ldexp(cost_NE, shift))
    start_E = np.clip(np.rint(np.ldexp(start_E, shift)), -MAX_PRICE, MAX_PRICE)
    labels_N = _settle_prices(units_NE, start_E, capacity)
    edges_EE, moved = _move_excess(units_NE, labels_N, capacity)
    return Assignment(labels_N, np.ldexp(_central_prices(edges_EE), -shift), moved)


def lower_bound(cost_NE: npt.NDArray[Any], prices_E: Floats) -> float:
    """Return what no balanced assignment can cost less than, by weak duality, for any prices."""
    capacity = cost_NE.shape[0] // cost_NE.shape[1]
    priced_NE = np.asarray(cost_NE, dtype=np.float64) + prices_E
    return float(priced_NE.min(axis=1).sum() - capacity * prices_E.sum())


def _checked(cost_NE: npt.NDArray[Any]) -> Floats:
    cost_NE = np.ascontiguousarray(cost_NE, dtype=np.float64)
    if cost_NE.ndim != 2 or 0 in cost_NE.shape:
        raise InputError(f"costs of shape {cost_NE.shape}; give one row per row and one column per cluster")
    rows, clusters = cost_NE.shape
    if rows % clusters:
        allowed = ", ".join(map(str, divisors_near(rows, clusters)))
        raise InputError(f"{clusters} clusters do not divide {rows} rows; use one of {allowed}")
    if not np.isfinite(cost_NE).all():
        raise InputError("NaN or infinite costs; give finite numbers (check the rows they were made from)")
    return cost_NE


def _settle_prices(cost_NE: Floats, prices_E: Floats, capacity: int) -> Ints:
    """Return each row's cheapest cluster, under prices that leave few rows in excess."""
    clusters = cost_NE.shape[1]
    priced_NE = cost_NE + prices_E
    labels_N: Ints = priced_NE.argmin(axis=1)
    excess_E = np.bincount(labels_N, minlength=clusters) - capacity
    part = PRICE_STEP
    for _ in range(PRICE_ROUNDS):
        excess = int(np.abs(excess_E).sum()) // 2
        if excess <= clusters // 4 or part < LEAST_PRICE_STEP:
            break  # from here a shortest path per row is cheaper than another round
        step_E = _price_steps(priced_NE, labels_N, excess_E)
        # All prices move at once, so that the full step can do more harm than good: then take less of it.
        while part >= LEAST_PRICE_STEP:
            tried_E = np.clip(np.rint(prices_E + part * step_E), -MAX_PRICE, MAX_PRICE)
            priced_NE = cost_NE + tried_E
            tried_N = priced_NE.argmin(axis=1)
            sizes_E = np.bincount(tried_N, minlength=clusters)
            if int(np.abs(sizes_E - capacity).sum()) // 2 < excess - 2:
                prices_E, labels_N, excess_E = tried_E, tried_N, sizes_E - capacity
                break
            part /= 2
    return labels_N


def _price_steps(priced_NE: Floats, labels_N: Ints, excess_E: Ints) -> Floats:
    """Return by how much each price must move for its cluster to be full, were all other prices to stay.

    A cluster with k rows too many raises its price by the k-th smallest margin to the row's second choice;
    one with k too few lowers it by the k-th smallest margin over what other clusters' rows pay now.
    Overwrites `priced_NE`.
    """
    every_N = np.arange(len(labels_N))
    paid_N = priced_NE[every_N, labels_N]
    step_E = np.zeros(len(excess_E))
    for e in np.flatnonzero(excess_E < 0):
        lacking = -int(excess_E[e])
        margin_M = (priced_NE[:, e] - paid_N)[labels_N != e]
        step_E[e] = -np.partition(margin_M, lacking - 1)[lacking - 1]
    priced_NE[every_N, labels_N] = np.inf
    margin_N = priced_NE.min(axis=1) - paid_N
    for e in np.flatnonzero(excess_E > 0):
        surplus = int(excess_E[e])
        step_E[e] = np.partition(margin_N[labels_N == e], surplus - 1)[surplus - 1]
    return step_E


def _move_excess(cost_NE: Floats, labels_N: Ints, capacity: int) -> tuple[Floats, int]:
    """Equalise the sizes in place by shortest paths; return the final E x E graph and how many rows moved."""
    sizes_E = np.bincount(labels_N, minlength=cost_NE.shape[1])
    edges_EE = np.stack([_edges_from(cost_NE, labels_N, e) for e in range(len(sizes_E))])
    moved = 0
    while True:
        surplus_E = sizes_E - capacity
        if not surplus_E.any():
            return edges_EE, moved
        touched: set[int] = set()
        for path in _cheapest_paths(edges_EE, surplus_E):
            # Rows of exactly equal cost (zero rows of dead neurons, say) share a path: they go together.
            hops = [_cheapest_rows(cost_NE, labels_N, a, b) for a, b in pairwise(path)]
            count = min(int(surplus_E[path[0]]), -int(surplus_E[path[-1]]), *(len(hop) for hop in hops))
            for hop, b in zip(hops, path[1:], strict=True):
                labels_N[hop[:count]] = b
            sizes_E[path[0]] -= count
            sizes_E[path[-1]] += count
            moved += count
            touched.update(path)
        for e in touched:
            edges_EE[e] = _edges_from(cost_NE, labels_N, e)


def _edges_from(cost_NE: Floats, labels_N: Ints, a: int) -> Floats:
    """Return what it costs to move the cheapest row of cluster a to each cluster (inf if a has none)."""
    rows_ME = cost_NE[np.flatnonzero(labels_N == a)]
    if not len(rows_ME):
        return np.full(cost_NE.shape[1], np.inf)
    extra_E: Floats = (rows_ME - rows_ME[:, a, None]).min(axis=0)
    return extra_E


def _cheapest_rows(cost_NE: Floats, labels_N: Ints, a: int, b: int) -> Ints:
    """Return the rows of cluster a that are the cheapest to move to b: one, or several of equal cost."""
    rows_M = np.flatnonzero(labels_N == a)
    extra_M = cost_NE[rows_M, b] - cost_NE[rows_M, a]
    cheapest_M: Ints = rows_M[extra_M == extra_M.min()]
    return cheapest_M


def _cheapest_paths(edges_EE: Floats, surplus_E: Ints) -> list[list[int]]:
    """Return shortest paths from clusters with a surplus to clusters with a lack, no two through one cluster.

    All are branches of one tree of shortest paths (Bellman-Ford). Minus the distances are prices at which every row
    is where it is cheapest and each step of the tree costs nothing: any of its paths keeps the assignment optimal.
    """
    clusters = len(surplus_E)
    distance_E = np.where(surplus_E > 0, 0.0, np.inf)
    before_E = np.full(clusters, -1)
    for _ in range(clusters):  # a shortest path has at most E - 1 edges
        through_EE = distance_E[:, None] + edges_EE
        via_E = through_EE.argmin(axis=0)
        reached_E = through_EE[via_E, np.arange(clusters)]
        shorter_E = reached_E < distance_E
        if not shorter_E.any():
            break
        distance_E = np.where(shorter_E, reached_E, distance_E)
        before_E = np.where(shorter_E, via_E, before_E)
    paths: list[list[int]] = []
    taken: set[int] = set()
    lacking = np.flatnonzero(surplus_E < 0)
    for e in lacking[distance_E[lacking].argsort(kind="stable")].tolist():
        path = [e]
        while before_E[path[-1]] >= 0:
            path.append(int(before_E[path[-1]]))
        if taken.isdisjoint(path):
            taken.update(path)
            paths.append(path[::-1])
    return paths


def _central_prices(edges_EE: Floats) -> Floats:
    """Return optimal dual prices from the middle of their range: they hold longest when the costs change.

    `-(distance to e)` and `(distance from e)` in a graph without negative cycles are both optimal; so is
    their mean.
    """
    return (_distances(edges_EE.T) - _distances(edges_EE)) / 2


def _distances(edges_EE: Floats) -> Floats:
    """Return the length of the shortest path to each cluster from whichever cluster is nearest."""
    distance_E = np.zeros(len(edges_EE))
    for _ in range(len(edges_EE)):
        shorter_E = np.minimum(distance_E, (distance_E[:, None] + edges_EE).min(axis=0))
        if (shorter_E == distance_E).all():
            break
        distance_E = shorter_E
    return distance_E
