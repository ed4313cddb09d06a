"""The switch itself: put a layer's neurons in the order of a new structure, weights and optimizer state together.

    FFN(x) = down · act(up · x) = down[:, π] · act(up[π] · x)        for every permutation π of the neurons

so regrouping changes nothing but the names of the neurons. An optimizer that works element by element (AdamW, SGD
with momentum, Lion) commutes with it exactly, provided its state moves along: step-then-permute equals
permute-then-step. This module is the only one that moves weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from switchable.errors import InputError
from switchable.ffn.families import permute_neurons
from switchable.ffn.layer import SwitchableFFN
from switchable.ffn.plain import check_movable
from switchable.ranks import gathered
from switchable.structure.groups import match_labels, permutation_from_labels


def regroup(
    layers: Sequence[SwitchableFFN],
    structures: Sequence[Tensor | None],
    optimizer: torch.optim.Optimizer | None,
) -> list[Tensor | None]:
    """Give each layer a new structure by permuting its neurons in place.

    New experts take the number (and the router row) of the old expert they overlap most.

    Args:
        layers: switchable FFNs.
        structures: labels_F per layer, the expert of each neuron in its present place; None leaves a layer alone.
        optimizer: the one that trains the layers, whose state moves along; None if there is none.

    Returns:
        The permutation perm_F of each layer (new row i was row perm_F[i]), None where nothing moved.

    Raises:
        InputError: the optimizer holds state, or a projection something, that cannot be permuted; nothing has been
            changed then.
    """
    perms = [
        None if labels is None else _permutation(layer, labels)
        for layer, labels in zip(layers, structures, strict=True)
    ]
    moving = [(layer, perm) for layer, perm in zip(layers, perms, strict=True) if perm is not None]
    for layer, _ in moving:
        check_movable(layer.ssd)
        if optimizer is not None:
            check_optimizer(layer, optimizer)
    for layer, perm in moving:
        before = _fingerprint(layer)
        _permute(layer, perm, optimizer)
        layer.ssd.neuron_ids_F = layer.ssd.neuron_ids_F[perm]
        after = _fingerprint(layer)
        scale = before.abs().max().clamp_min(1e-6)
        if not torch.isnan(before).any() and (after - before).abs().max() > 1e-2 * scale:
            raise RuntimeError(
                f"regrouping changed the function of {layer.ssd.name}; this is a bug in switchable"
            )
    return perms


def group_anew(layers: Sequence[SwitchableFFN], structures: Sequence[Tensor]) -> None:
    """Put the neurons of a model that is not being trained in the order of structures, and start its routers.

    Args:
        layers: switchable FFNs.
        structures: labels_F per layer.
    """
    regroup(layers, [labels_F.cpu() for labels_F in structures], None)
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


def neuron_parameters(layer: SwitchableFFN) -> Iterator[tuple[nn.Linear, bool, Tensor, bool]]:
    """Yield (projection, is output projection, parameter, is bias) for every parameter with a neuron axis."""
    for projection, output in (
        (layer.ssd.gate_projection, False),
        (layer.ssd.up_projection, False),
        (layer.ssd.down_projection, True),
    ):
        if projection is None:
            continue
        yield projection, output, projection.weight, False
        if projection.bias is not None and not output:
            yield projection, output, projection.bias, True


def check_optimizer(layer: SwitchableFFN, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose state cannot move with the neurons.

    Raises:
        InputError: names the optimizer and the state.
    """
    for _, _, parameter, _ in neuron_parameters(layer):
        for key, value in optimizer.state.get(parameter, {}).items():
            movable = not isinstance(value, Tensor) or value.ndim == 0 or value.shape == parameter.shape
            if isinstance(value, (list, tuple, dict)) or not movable:
                kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise InputError(
                    f"the state {key!r} of optimizer {type(optimizer).__name__} ({kind}) does not have the shape of "
                    f"its parameter {tuple(parameter.shape)} in {layer.ssd.name} and cannot move with the neurons; "
                    "use an element-wise optimizer, e.g. AdamW, SGD with momentum, Lion"
                )


@torch.no_grad()
def _permute(layer: SwitchableFFN, perm_F: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    for projection, output, parameter, is_bias in neuron_parameters(layer):
        tensors = [parameter.detach()]
        if parameter.grad is not None:
            tensors.append(parameter.grad)
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        tensors += [v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape]
        for tensor in tensors:
            permute_neurons(projection, output, perm_F, tensor, is_bias)


@torch.no_grad()
def _fingerprint(layer: SwitchableFFN) -> Tensor:
    """Return the dense output for two fixed tokens: regrouping must not change it."""
    parameter = layer.ssd.up_projection.weight
    x_TD = (
        torch.linspace(-1, 1, 2 * layer.ssd.d_model)
        .sin()
        .view(2, layer.ssd.d_model)
        .to(parameter.device, parameter.dtype)
    )
    with gathered(*layer.ssd.holders):
        return layer.ssd.write(layer.ssd.activations(x_TD)).float()
