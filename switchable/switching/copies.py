"""Copies of the model's weights that somebody else keeps, such as averages over steps: their neurons move too.

A copy is a module (`torch.optim.swa_utils.AveragedModel`, another converted model), a state dict, or a list of tensors
in the order of `model.parameters()`. It is looked at anew at each regrouping, since a loop may replace its tensors.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from switchable.errors import InputError
from switchable.ffn.convert import layers_of
from switchable.ffn.description import SavedRouter
from switchable.ffn.layer import SwitchableFFN
from switchable.ffn.layout import neuron_parameters
from switchable.ffn.ssd import COPIES


def twins(layers: Sequence[SwitchableFFN], copies: Sequence[object]) -> list[list[SwitchableFFN]]:
    """Return for each layer what it is in those copies that are modules; raise InputError if one has other layers."""
    models = [layers_of(copy) for copy in copies if isinstance(copy, nn.Module)]
    sizes = [(layer.ssd.d_ff, layer.ssd.d_model) for layer in layers]
    for theirs in models:
        if [(layer.ssd.d_ff, layer.ssd.d_model) for layer in theirs] != sizes:
            raise InputError(
                f"a copy of the model has {len(theirs)} switchable FFNs, not the same {len(layers)} as the model; make "
                "it after convert(model), e.g. AveragedModel(model)"
            )
    return [[theirs[i] for theirs in models] for i in range(len(layers))]


def not_given(layers: Sequence[SwitchableFFN], given: Sequence[Sequence[SwitchableFFN]]) -> int:
    """Return how many copies of the model's first FFN are alive that are not among those given (`twins`)."""
    known, lineage = {each.ssd for each in (layers[0], *given[0])}, layers[0].ssd.lineage

    def alive() -> int:
        return sum(ssd.lineage == lineage and ssd not in known for ssd in tuple(COPIES))

    if alive():
        gc.collect()  # what nobody has any more, but for a circle of references
    return alive()


def copied_tensors(model: nn.Module, copies: Sequence[object]) -> list[dict[int, Tensor]]:
    """Return for each copy that is no module its tensor of each parameter of neurons, by that parameter's id.

    Raises InputError if a copy does not fit the model.
    """
    named = dict(model.named_parameters())
    of_neurons = {id(p) for layer in layers_of(model) for p, _ in neuron_parameters(layer)}
    neurons = {name: p for name, p in named.items() if id(p) in of_neurons}
    found = []
    for copy in (each for each in copies if not isinstance(each, nn.Module)):
        tensors = _by_name(named, copy)
        for name, parameter in neurons.items():
            theirs, ours = tuple(tensors[name].shape), tuple(parameter.shape)
            if theirs != ours:
                raise InputError(f"a copy of the model has {name} of shape {theirs}, the model of {ours}")
        found.append({id(p): tensors[name] for name, p in neurons.items()})
    return found


def describe_anew(model: nn.Module, copies: Sequence[object]) -> None:
    """Write into copies that are whole state dicts what the model's FFNs now are, which no average tells."""
    for name, module in model.named_modules():
        for copy in copies if isinstance(module, SavedRouter) else ():
            if isinstance(copy, Mapping) and f"{name}._extra_state" in copy:
                copy[f"{name}._extra_state"].copy_(module.get_extra_state())


def _by_name(named: Mapping[str, nn.Parameter], copy: object) -> dict[str, Tensor]:
    """The tensors of a copy under the names of the model's parameters."""
    if isinstance(copy, Mapping) and set(named) <= set(copy):
        return {name: copy[name] for name in named}
    if isinstance(copy, (list, tuple)) and len(copy) == len(named):
        return dict(zip(named, copy, strict=True))
    size = f" of {len(copy)}" if isinstance(copy, Mapping | list) else ""
    raise InputError(
        f"a copy of the model is a {type(copy).__name__}{size}; give a module such as AveragedModel(model), a state "
        f"dict with the model's {len(named)} parameters by their names, or a list of them as in model.parameters()"
    )
