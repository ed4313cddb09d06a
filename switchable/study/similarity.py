"""How alike the checkpoints of a series are, every one with every other, layer by layer.

    pattern        Jaccard index of the sets of active neurons on the same tokens, mean over tokens
    co-activation  Pearson correlation of the entries above the diagonal of two co-activation matrices,
                   C_ij = correlation over tokens of "i is active" and "j is active"

Both compare neuron by neuron and therefore need every pattern in the neurons' first order, as `measure_model` returns
it. Memory: the patterns (a bit per token and neuron; `tokens_within` keeps them below 512 MiB) and, one layer at a
time, one co-activation matrix per checkpoint over at most 512 neurons, drawn once (all if F is smaller).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from switchable.progress import progress_bar
from switchable.switching.measures import jaccard, unpack

MAX_BYTES = 512 * 2**20
MAX_NEURONS = 512
Matrix = npt.NDArray[np.float64]


def tokens_within(checkpoints: int, neurons: int) -> int:
    """Return how many tokens' patterns may be kept: `neurons` of all layers together, one bit each per checkpoint."""
    return max(1, MAX_BYTES * 8 // max(1, checkpoints * neurons))


def compare_checkpoints(
    patterns: Sequence[Sequence[Tensor]], neurons: Sequence[int], progress: bool = False
) -> dict[str, list[Matrix]]:
    """Compare all pairs of checkpoints by the patterns (per checkpoint, per layer) of the same tokens.

    `neurons` has each layer's F. Returns `"pattern"` and `"coactivation"`: per layer a symmetric matrix
    [checkpoints, checkpoints] with 1 on the diagonal; NaN where a correlation is not defined.
    """
    found: dict[str, list[Matrix]] = {"pattern": [], "coactivation": []}
    layers = list(zip(neurons, *patterns, strict=True))
    for count, *of_layer in progress_bar("comparing", "layer", show=progress, over=layers):
        found["pattern"].append(_pattern_similarity(of_layer))
        found["coactivation"].append(_coactivation_similarity(of_layer, count))
    return found


def _pattern_similarity(patterns: Sequence[Tensor]) -> Matrix:
    matrix = np.eye(len(patterns))
    for i, j in combinations(range(len(patterns)), 2):
        matrix[i, j] = matrix[j, i] = jaccard(patterns[i], patterns[j])
    return matrix


def _coactivation_similarity(patterns: Sequence[Tensor], neurons: int) -> Matrix:
    picked = np.random.default_rng(0).permutation(neurons)[:MAX_NEURONS]
    above = torch.triu_indices(len(picked), len(picked), offset=1)
    entries = []
    for pattern_TW in patterns:
        matrix_FF = coactivation(unpack(pattern_TW, neurons)[:, torch.from_numpy(picked)])
        entries.append(matrix_FF[above[0], above[1]].double().numpy())
    stacked = np.stack(entries)
    centred = stacked - stacked.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1)
    length[length < 1e-9] = np.nan  # a layer whose neurons never change has nothing to correlate
    matrix: Matrix = centred @ centred.T / np.outer(length, length)
    matrix = np.clip(matrix, -1.0, 1.0)
    np.fill_diagonal(matrix, 1.0)
    return matrix


def coactivation(active_TF: Tensor) -> Tensor:
    """Return the correlations [F, F] of the neurons' activity over tokens; 0 for a neuron that never changes."""
    z_TF = active_TF.float()
    z_TF = z_TF - z_TF.mean(dim=0)
    deviation_F = z_TF.square().mean(dim=0).sqrt()
    z_TF /= torch.where(deviation_F > 0, deviation_F, torch.inf)
    return z_TF.T @ z_TF / len(z_TF)
