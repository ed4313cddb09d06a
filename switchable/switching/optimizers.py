"""What an optimizer remembers of each neuron, wherever it keeps it; and what cannot be told is refused.

A neuron that moves without its moments is wrong without a word. State of a parameter [F, D] that is understood:

    [F, D]              of the same shape: moments, averages
    [F, 1], [1, D]      a factor; also as vectors [F] or [D], where F and D differ (Adafactor)
    [N, ...]            one tensor for the N parameters of a group, kept with one of them (as Muon is often written)
    codes of 8 bits     with their scales: bitsandbytes, torchao (`packed.py`)
    one number, text    nothing to move

Shapes: D d_model, F d_ff, N parameters of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from switchable.errors import InputError
from switchable.ffn.layer import SwitchableFFN
from switchable.ffn.layout import neuron_parameters
from switchable.ranks import has_plain_type, permute
from switchable.switching.packed import Move, packed_in

PLAIN = (bool, int, float, str, type(None))
DEPTH = 4
"""Of lists, wrappers and attributes that are looked into."""
USE = "use an optimizer of plain tensors, e.g. AdamW, SGD with momentum, Lion, Muon"


def optimizers_in(given: object) -> list[Any]:
    """Return every optimizer in what a loop steps (optimizers, lists, what wraps them); InputError if there is none."""
    found: dict[int, Any] = {}
    _look_for_optimizers(given, found, DEPTH)
    if not found:
        raise InputError(
            f"no optimizer in {given!r}; give the one that has just stepped, or all: controller.step(muon, adamw)"
        )
    return list(found.values())


def _look_for_optimizers(thing: Any, found: dict[int, Any], depth: int) -> None:
    if id(thing) in found or depth == 0 or isinstance(thing, (Tensor, nn.Module, *PLAIN)):
        return
    if isinstance(thing, (list, tuple, dict)):
        inside = list(thing.values() if isinstance(thing, dict) else thing)
    else:
        inside = list(getattr(thing, "__dict__", {}).values())
        # A wrapper that passes on the state of what it wraps is no second optimizer.
        if hasattr(thing, "param_groups") and all(
            _state(thing) is not _state(each) for each in found.values()
        ):
            found[id(thing)] = thing
    for each in inside:
        _look_for_optimizers(each, found, depth - 1)


def check_trained(layers: Sequence[SwitchableFFN], optimizers: Sequence[Any]) -> None:
    """Raise InputError for a loop that leaves out what it should train: it is frozen, or in none of the optimizers."""
    trained = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    for layer in layers:
        router = layer.router.weight
        if layer.ssd.router_learns and not router.requires_grad:
            raise InputError(
                f"the router of {layer.ssd.name} is frozen (requires_grad=False) and would never learn; unfreeze the "
                "routers after what froze them (PEFT: modules_to_save=['router'])"
            )
        for what, parameter in (("router", router), *(("FFN", p) for p, _ in neuron_parameters(layer))):
            if parameter.requires_grad and id(parameter) not in trained:
                raise InputError(
                    f"the {what} of {layer.ssd.name} is in none of the optimizers given to step(); give all that "
                    "step, controller.step(muon, adamw), built after convert(model) from model.parameters()"
                )


def check_state(layers: Sequence[SwitchableFFN], optimizers: Sequence[Any]) -> None:
    """Raise InputError for an optimizer whose state cannot move with the neurons; it names both."""
    neurons = {id(p): p for layer in layers for p, _ in neuron_parameters(layer)}
    least = min(p.numel() for p in neurons.values() if p.ndim == 2)
    for optimizer in optimizers:
        groups = [g for g in optimizer.param_groups if any(id(p) in neurons for p in g["params"])]
        for group in groups:
            for owner in group["params"]:
                for key, value in _entries(optimizer, owner).items():
                    if _is_laid_out_anew(value, owner):
                        raise InputError(
                            f"optimizer {type(optimizer).__name__} wants contiguous parameters: it has made them so, "
                            f"and not its state {key!r}; begin anew with convert(..., neuron_major=False)"
                        )
                    if not _is_understood(optimizer, key, owner, group["params"], id(owner) in neurons):
                        raise InputError(
                            f"the state {key!r} of optimizer {type(optimizer).__name__} ({_kind(value)}, of a "
                            f"parameter of shape {tuple(owner.shape)}) cannot move with the neurons; {USE}"
                        )
            _check_elsewhere({k: v for k, v in group.items() if k != "params"}, least, optimizer)
        if groups:
            _check_elsewhere(_outside_groups(optimizer), least, optimizer)


def state_of(parameter: Tensor, dim: int, optimizer: Any) -> Iterator[tuple[Tensor, int, Move]]:
    """Yield what an optimizer keeps of a parameter with neurons along `dim`: tensor, their dimension, how it moves.

    `check_state` must have passed the optimizer.
    """
    for group in optimizer.param_groups:
        params = group["params"]
        place = next((i for i, each in enumerate(params) if each is parameter), None)
        for owner in () if place is None else params:
            entries = _entries(optimizer, owner)
            packed = packed_in(entries, owner)
            for key, value in entries.items():
                if (move := packed.get(key)) is not None and owner is parameter:
                    yield value, dim, move
                if key in packed or not isinstance(value, Tensor) or value.numel() == 1:
                    continue
                at: int | None = dim
                if _is_stacked(optimizer, key, owner, params):
                    value = value[place]
                elif owner is not parameter:
                    continue
                elif value.ndim < parameter.ndim:
                    at = 0 if len(value) == parameter.shape[dim] else None
                if at is not None and value.shape[at] > 1:
                    yield value, at, permute


def _state(optimizer: Any) -> Mapping[Any, Any]:
    """What an optimizer keeps of each parameter; one that remembers nothing may have no `state`."""
    return getattr(optimizer, "state", {})


def _entries(optimizer: Any, owner: Tensor) -> Mapping[Any, Any]:
    entries = _state(optimizer).get(owner, {})
    return entries if isinstance(entries, Mapping) else {"": entries}


def _is_understood(optimizer: Any, key: Any, owner: Tensor, params: Sequence[Tensor], neurons: bool) -> bool:
    value = _entries(optimizer, owner)[key]
    if isinstance(value, PLAIN) or (isinstance(value, Tensor) and value.numel() == 1):
        return True
    if key in packed_in(_entries(optimizer, owner), owner):
        return True
    # Another subclass may hold blocks with a common scale, and so may whole numbers: they cannot move one by one.
    if not (isinstance(value, Tensor) and has_plain_type(value)) or not value.is_floating_point():
        return False
    if _is_stacked(optimizer, key, owner, params):
        return True
    # Of another parameter: nobody minds, unless it is so large that it may hold those of neurons.
    return _fits(value, owner) if neurons else value.numel() <= owner.numel()


def _is_laid_out_anew(value: Any, owner: Tensor) -> bool:
    """Whether state alone is still stored neuron by neuron: kernels that read both flat would take it for another's."""
    of_one_shape = isinstance(value, Tensor) and value.shape == owner.shape
    return of_one_shape and owner.is_contiguous() and not value.is_contiguous()


def _is_stacked(optimizer: Any, key: Any, owner: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether a state holds that of all parameters of a group, in their order."""
    value = _entries(optimizer, owner)[key]
    return (
        value.ndim == owner.ndim + 1
        and len(value) == len(params)
        and all(each.shape == owner.shape for each in params)
        and _broadcasts(value[0], owner)
        and sum(key in _entries(optimizer, each) for each in params) == 1
    )


def _fits(value: Tensor, owner: Tensor) -> bool:
    if value.ndim == owner.ndim:
        return _broadcasts(value, owner)
    # Whether a vector belongs to the rows or the columns of a square matrix, nobody can tell.
    square = len(set(owner.shape)) == 1
    return value.ndim == 1 and owner.ndim == 2 and len(value) in owner.shape and not square


def _broadcasts(value: Tensor, owner: Tensor) -> bool:
    return all(v in (1, p) for v, p in zip(value.shape, owner.shape, strict=True))


def _outside_groups(optimizer: Any) -> dict[str, Any]:
    """What an optimizer keeps neither in a group nor with a parameter."""
    own = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups", "defaults")}
    rest = {str(key): value for key, value in _state(optimizer).items() if not isinstance(key, Tensor)}
    return {**own, **rest}


def _check_elsewhere(kept: Mapping[str, Any], least: int, optimizer: Any) -> None:
    for key, value in kept.items():
        for tensor in _tensors_in(value, DEPTH):
            if tensor.numel() >= least and not isinstance(tensor, nn.Parameter):
                raise InputError(
                    f"optimizer {type(optimizer).__name__} keeps a tensor of shape {tuple(tensor.shape)} in {key!r}, "
                    f"which may belong to neurons and would not move with them; {USE}"
                )


def _tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)) and depth:
        inside: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for each in inside:
            yield from _tensors_in(each, depth - 1)


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{type(value).__name__} of {value.dtype}, shape {tuple(value.shape)}"
    return type(value).__name__
