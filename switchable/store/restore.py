"""From a checkpoint back into a model and its optimizer, however either is sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from switchable.errors import InputError
from switchable.ffn.convert import is_router_parameter, layers_of
from switchable.ffn.description import take_over
from switchable.files import read_json
from switchable.store.contents import NEURON_IDS, PER_LAYER, own_tensors, untied_state
from switchable.store.experts import DESCRIPTION, descriptions
from switchable.store.tensorfile import TensorFile


def restore_training(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a verified checkpoint into model and optimizer; return the controller's state and the loop's counters."""
    restore_model(folder, model)
    file = TensorFile(own_tensors(folder, "training"))
    values = read_json(folder / "training.json")
    torch.set_rng_state(file.tensor("random.cpu"))
    if "random.cuda" in file.names and torch.cuda.is_available():
        torch.cuda.set_rng_state(file.tensor("random.cuda"))
    parameters = dict(model.named_parameters())
    for name in sorted(file.names):
        if name.startswith("optimizer:"):
            _, parameter_name, key = name.split(":")
            parameter = parameters[parameter_name]
            if file.shape(name) == ():
                value = file.tensor(name)  # AdamW keeps its step count on the CPU
            else:
                value = torch.zeros_like(parameter)  # moments lie in memory as their parameter does
                file.read_into(name, value)
            optimizer.state[parameter][key] = value
    for full, value in values["optimizer"].items():
        parameter_name, key = full.split(":")
        optimizer.state[parameters[parameter_name]][key] = value
    controller_state = values["controller"]
    for key, name in PER_LAYER.items():
        names = [f"{name}:{i}" for i in range(len(layers_of(model)))]
        controller_state[key] = [file.tensor(each) if each in file.names else None for each in names]
    return controller_state, values["counters"]


def restore_model(folder: Path, model: nn.Module, routers: bool = True) -> None:
    """Load weights of a checkpoint into a converted model of the same shape; raise InputError, unchanged, if not so.

    Without `routers` the model keeps its own, of whatever shape.
    """
    described = descriptions(folder) if routers else {}
    state = {n: t for n, t in untied_state(model).items() if routers or not is_router_parameter(n)}
    paths = [*folder.glob("model*.safetensors"), *([own_tensors(folder, "switchable")] if routers else [])]
    stored = {name: file for file in map(TensorFile, paths) for name in file.names}
    for tensors in (state, stored):
        for name in [name for name in tensors if name.endswith((DESCRIPTION, NEURON_IDS))]:
            del tensors[name]
    if strange := sorted(state.keys() ^ stored.keys()):
        missing = len(state.keys() - stored.keys())
        raise InputError(
            f"{folder} does not fit the model: {missing} tensors missing, {len(strange) - missing} unexpected, "
            f"e.g. {strange[0]}"
        )
    for name, tensor in state.items():
        if stored[name].shape(name) != tuple(tensor.shape):
            raise InputError(
                f"{folder} does not fit the model: {name} has shape {stored[name].shape(name)} there, "
                f"{tuple(tensor.shape)} in the model"
            )
    for layer in layers_of(model) if routers else ():
        take_over(layer.ssd, described.get(layer.ssd.name, {}))
    for name, tensor in state.items():
        stored[name].read_into(name, tensor)
