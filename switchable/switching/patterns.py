"""Activation patterns: which neurons fire on which tokens, kept in one bit each, whoever moves the neurons.

    Jaccard index of two patterns, per token t:   J(t) = |A(t) ∩ B(t)| / |A(t) ∪ B(t)|,  A(t) the set of active neurons

A regrouping reorders the neurons of a layer. Patterns are therefore packed in the neurons' first order
(`layer.ssd.neuron_ids_F`), so that two patterns of the same tokens can be compared whatever happened in between.

Shapes: T tokens, F neurons, W = ceil(F/8) bytes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack(active_TF: Tensor, neuron_ids_F: Tensor) -> Tensor:
    """Return the pattern of neurons in their present order as bits, uint8 [T, W], in their first order, on the CPU."""
    row_of_F = np.argsort(neuron_ids_F.cpu().numpy())
    first_TF = np.take(active_TF.cpu().numpy(), row_of_F, axis=1)
    return torch.from_numpy(np.packbits(first_TF, axis=1))


def unpack(packed_TW: Tensor, neurons: int) -> Tensor:
    """Return the pattern of `pack` as bool [T, neurons], in the neurons' first order."""
    return torch.from_numpy(np.unpackbits(packed_TW.numpy(), axis=1, count=neurons).view(np.bool_))


def jaccard(a_TW: Tensor, b_TW: Tensor) -> float:
    """Return the Jaccard index of two packed patterns of the same tokens, mean over the tokens.

    A token on which no neuron fires in either pattern counts as 1: nothing differs.
    """
    a, b = a_TW.numpy(), b_TW.numpy()
    both_T, either_T = (np.bitwise_count(bits).sum(axis=1, dtype=np.int64) for bits in (a & b, a | b))
    index_T = np.where(either_T > 0, both_T / np.maximum(either_T, 1), 1.0)
    return float(index_T.mean())


def routes_changed(a_TK: Tensor, b_TK: Tensor) -> float | None:
    """Return the share of tokens whose set of K experts is another one; None if K is another: then every set is."""
    k = a_TK.shape[1]
    if b_TK.shape[1] != k:
        return None
    kept_T = (a_TK[:, :, None] == b_TK[:, None, :]).sum(dim=(1, 2))
    return float((kept_T < k).double().mean())
