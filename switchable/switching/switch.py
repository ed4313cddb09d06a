"""The switch itself: put a layer's neurons in the order of a new structure, weights and optimizer state together.

    FFN(x) = down · act(up · x) = down[:, π] · act(up[π] · x)        for every permutation π of the neurons

so regrouping changes nothing but the names of the neurons. An optimizer that works element by element (AdamW, SGD
with momentum, Lion) commutes with it exactly, and one that treats rows alike (Muon) to its rounding, provided its
state moves along: step-then-permute equals permute-then-step. This module is the only one that moves weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from switchable.ffn.layer import SwitchableFFN
from switchable.ffn.layout import entries, neuron_parameters
from switchable.ffn.plain import check_movable
from switchable.ranks import gathered, permute
from switchable.structure.groups import match_labels, permutation_from_labels
from switchable.switching.optimizers import check_state, state_of
from switchable.switching.packed import Move

Copy = Mapping[int, Tensor]
"""Tensors that hold a model's parameters too, by the parameters' ids (`copied_tensors`)."""


def regroup(
    layers: Sequence[SwitchableFFN],
    structures: Sequence[Tensor | None],
    optimizers: Sequence[Any] = (),
    copies: Sequence[Copy] = (),
    twins: Sequence[Sequence[SwitchableFFN]] | None = None,
) -> list[Tensor | None]:
    """Give each layer a new structure by permuting its neurons in place.

    New experts take the number (and the router row) of the old expert they overlap most. What moves along are the
    states of `optimizers` (`optimizers_in`), `copies` (`copied_tensors`), and each layer's `twins` in other models.
    A layer's structure is labels_F, the expert of each neuron in its present place; None leaves it alone.

    Returns the permutation perm_F of each layer (new row i was row perm_F[i]), None where nothing moved.

    Raises:
        InputError: the optimizer holds state, or a projection something, that cannot be permuted; nothing has been
            changed then.
    """
    pairs = zip(layers, structures, strict=True)
    perms = [None if labels is None else _permutation(layer, labels) for layer, labels in pairs]
    for layer, perm in zip(layers, perms, strict=True):
        if perm is not None:
            check_movable(layer.ssd)
    check_state(layers, optimizers)
    for layer, perm, others in zip(layers, perms, twins or [()] * len(layers), strict=True):
        if perm is None:
            continue
        before = _fingerprint(layer)
        _permute(layer, perm, optimizers, copies)
        for twin in others:
            _permute(twin, perm)
        after = _fingerprint(layer)
        scale = before.abs().max().clamp_min(1e-6)
        if not torch.isnan(before).any() and (after - before).abs().max() > 1e-2 * scale:
            raise RuntimeError(f"regrouping changed the function of {layer.ssd.name}: a bug in switchable")
    return perms


def group_anew(layers: Sequence[SwitchableFFN], structures: Sequence[Tensor]) -> None:
    """Put the neurons of a model that is not being trained in the order of structures, and start its routers."""
    regroup(layers, structures)
    for layer in layers:
        layer.router.initialise(layer.ssd.reads_FD)


def _permutation(layer: SwitchableFFN, labels_F: Tensor) -> Tensor | None:
    current_F = current_structure(layer)
    labels_F = match_labels(current_F, labels_F.cpu(), layer.ssd.num_experts)
    perm_F = permutation_from_labels(labels_F, layer.ssd.num_experts)
    return None if torch.equal(perm_F, torch.arange(layer.ssd.d_ff)) else perm_F


def current_structure(layer: SwitchableFFN) -> Tensor:
    """Return labels_F of the structure in use: neurons stand in cluster order, so expert e owns rows e·I to (e+1)·I."""
    return torch.arange(layer.ssd.num_experts).repeat_interleave(layer.ssd.d_ff // layer.ssd.num_experts)


@torch.no_grad()
def _permute(
    layer: SwitchableFFN, perm_F: Tensor, optimizers: Sequence[Any] = (), copies: Sequence[Copy] = ()
) -> None:
    for parameter, dim in neuron_parameters(layer):
        kept = [parameter.detach(), *(copy[id(parameter)] for copy in copies)]
        if parameter.grad is not None:
            kept.append(parameter.grad)
        moving: list[tuple[Tensor, int, Move]] = [(tensor, dim, permute) for tensor in kept]
        for optimizer in optimizers:
            moving += state_of(parameter, dim, optimizer)
        # Wrappers and what they wrap may hold one tensor; twice moved it would be wrong.
        for tensor, at, move in {id(each[0]): each for each in moving}.values():
            move(tensor, at, entries(layer, perm_F, tensor.shape[at]))
    layer.ssd.neuron_ids_F = layer.ssd.neuron_ids_F[perm_F]


@torch.no_grad()
def _fingerprint(layer: SwitchableFFN) -> Tensor:
    """Return the dense output for two fixed tokens: regrouping must not change it."""
    with gathered(*layer.ssd.holders):
        return layer.ssd.write(layer.ssd.activations(layer.ssd.two_tokens_TD)).float()
