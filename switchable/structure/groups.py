"""Which neurons go together, in every layer of a model.

    rows (`features.py`) -> cluster_layers -> labels_F -> match_labels -> permutation_from_labels

The layers are independent of one another: they are shared out over threads and, where torch.distributed runs, over
ranks. Matching labels (the assignment of most overlap) lets an unchanged expert keep its number, its place in the
weights and its router row.

Shapes: F neurons, D width, E experts, I = F/E neurons per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from switchable import ranks
from switchable.arrays import Ints
from switchable.errors import InputError
from switchable.progress import progress_bar
from switchable.structure.kmeans import BalancedKMeans

MARGIN = 0.005
"""A fresh fit replaces the warm one if its inertia is lower by more than this fraction. Groupings of nearly equal
inertia can have little in common: with 0 experts change for next to nothing."""
PROMISING = 0.003
"""A fresh fit this close above its goal after one sweep is worth finishing."""


def cluster_layers(
    rows_per_layer: Sequence[Tensor | None],
    num_experts: int,
    *,
    warm: Sequence[Tensor | None] | None = None,
    random_state: int = 0,
    fresh: bool = True,
    progress: bool = True,
) -> list[Tensor]:
    """Group the neurons of all layers into `num_experts` equal groups each; return labels_F per layer.

    warm: labels to start from, per layer; None (the whole or an entry) starts from scratch. The result keeps
        the numbers of the experts it started from.
    fresh: try a start from scratch as well where there are labels to start from.
    progress: say how far the work is, if it takes a while.

    Under torch.distributed every rank must call it; a rank needs the rows of its own layers only (`groups_layer`),
    the others may be None. Every rank gets the same labels.
    """
    starts = [None] * len(rows_per_layer) if warm is None else warm
    if len(starts) != len(rows_per_layer):
        raise InputError(f"{len(starts)} warm starts for {len(rows_per_layer)} layers; give one each or None")

    def one(layer: int) -> Tensor:
        rows_FD, start_F = rows_per_layer[layer], starts[layer]
        assert rows_FD is not None, f"the rows of layer {layer} are missing on the rank that groups it"
        try:
            return _cluster_layer(rows_FD, num_experts, start_F, random_state + layer, fresh)
        except InputError as error:
            raise InputError(f"layer {layer} of {len(rows_per_layer)}: {error}") from error

    mine = [layer for layer in range(len(rows_per_layer)) if groups_layer(layer)]
    show = progress and ranks.is_main()
    parts = ranks.gather(lambda: [labels_F.cpu().numpy() for labels_F in _in_threads(one, mine, show)])
    world = len(parts)
    return [
        torch.from_numpy(parts[layer % world][layer // world]).to("cpu" if rows is None else rows.device)
        for layer, rows in enumerate(rows_per_layer)
    ]


def groups_layer(layer: int) -> bool:
    """Return whether this rank is the one that groups a layer's neurons (always, in a single process)."""
    return layer % ranks.world_size() == ranks.rank()


def _cluster_layer(rows_FD: Tensor, experts: int, start_F: Tensor | None, seed: int, fresh: bool) -> Tensor:
    """One layer: from its labels, from scratch, or the better of both."""
    if start_F is None:
        return BalancedKMeans(experts, random_state=seed).fit(rows_FD).labels_
    warm = BalancedKMeans(experts, init=start_F, random_state=seed).fit(rows_FD)
    labels_F: Tensor = warm.labels_
    if not fresh or warm.inertia_ == 0:
        return labels_F
    goal = (1 - MARGIN) * warm.inertia_
    # One sweep of local search tells whether the rest of a fresh fit, some two thirds of it, can be saved.
    other = BalancedKMeans(experts, sweeps=1, random_state=seed).fit(rows_FD)
    if goal <= other.inertia_ < goal * (1 + PROMISING):
        other = BalancedKMeans(experts, init=other.labels_, sweeps=3, random_state=seed).fit(rows_FD)
    return match_labels(start_F, other.labels_, experts) if other.inertia_ < goal else labels_F


def _in_threads(one: Callable[[int], Tensor], layers: Sequence[int], show: bool) -> list[Tensor]:
    """Return `one(layer)` for each of the layers, in their order; a bar appears if it takes a while."""
    threads = torch.get_num_threads()
    workers = max(1, min(threads, len(layers)))
    # One thread per layer beats all threads in each operation: much of the work is small operations.
    each = (threads // workers or 1,)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=each) as pool:
            return list(progress_bar("clustering", "layer", len(layers), show, pool.map(one, layers)))
    finally:
        torch.set_num_threads(threads)  # the workers' setting is also the default for threads to come


def match_labels(old_labels: Tensor, new_labels: Tensor, num_experts: int) -> Tensor:
    """Return the new labels renumbered so that as many neurons as possible keep their old label."""
    old_F = _checked("old_labels", old_labels, num_experts)
    new_F = _checked("new_labels", new_labels, num_experts)
    if len(old_F) != len(new_F):
        raise InputError(f"labels of {len(old_F)} and {len(new_F)} neurons; give groupings of the same")
    overlap_EE = np.bincount(new_F * num_experts + old_F, minlength=num_experts**2)
    new_E, old_E = linear_sum_assignment(overlap_EE.reshape(num_experts, num_experts), maximize=True)
    number_E = np.empty(num_experts, dtype=np.int64)
    number_E[new_E] = old_E
    return torch.from_numpy(number_E[new_F]).to(new_labels.device)


def permutation_from_labels(labels_F: Tensor, num_experts: int) -> Tensor:
    """Return perm_F with `new = old[perm_F]`, so that expert e's neurons become rows e * I to (e + 1) * I.

    A neuron that already stands among its expert's rows stays; the others fill the gaps in their order.
    """
    labels = _checked("labels_F", labels_F, num_experts)
    sizes_E = np.bincount(labels, minlength=num_experts)
    if sizes_E.min() != sizes_E.max():
        raise InputError(
            f"labels_F give experts of {sizes_E.min()} to {sizes_E.max()} neurons; all must have equally many:"
            " take the labels from cluster_layers or BalancedKMeans"
        )
    place_F = np.arange(len(labels))
    moves_F = labels != place_F // sizes_E[0]
    movers = place_F[moves_F]
    # The gaps, in ascending order, belong to experts in ascending order, as many to each as come to it.
    place_F[moves_F] = movers[labels[movers].argsort(kind="stable")]
    return torch.from_numpy(place_F).to(labels_F.device)


def _checked(name: str, labels: Tensor, experts: int) -> Ints:
    """Return labels on the host; InputError unless they are whole numbers, one per neuron, from 0 to experts - 1."""
    if not isinstance(labels, Tensor) or labels.ndim != 1 or not len(labels) or labels.is_floating_point():
        given = (labels.dtype, tuple(labels.shape)) if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(f"{name} is {given}; give a tensor of whole numbers, one per neuron")
    labels_F: Ints = labels.detach().cpu().numpy().astype(np.int64)
    if experts < 1 or labels_F.min() < 0 or labels_F.max() >= experts:
        raise InputError(
            f"{name} go from {labels_F.min()} to {labels_F.max()} with num_experts={experts}; labels are 0 to"
            f" num_experts - 1: give the number of experts they were made for"
        )
    return labels_F
