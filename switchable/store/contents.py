"""What a checkpoint will hold, copied out of the training objects.

Each rank copies what it will write: its own rows of sharded tensors. Rank 0 copies everything else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from switchable.ffn.convert import is_router_parameter
from switchable.store.readme import class_name
from switchable.store.tensorfile import Piece, copy_piece

PER_LAYER = {"last": "structure", "patterns": "pattern", "routes": "route"}
"""Parts of a controller's state that are a tensor (or None) per layer, and what a layer's is called in the file."""
NEURON_IDS = ".neuron_ids"
"""Ending of the names under which older checkpoints hold `layer.ssd.neuron_ids_F`."""
SUFFIX = ".tensors"
"""Of our own safetensors files: tools that read every `*.safetensors` of a folder take them for weights."""
ROUTERS = f"switchable{SUFFIX}"
"""Routers, with the description of each one's FFN."""


@dataclass
class Contents:
    """The contents of a checkpoint, by file."""

    tensors: dict[str, dict[str, Piece]]
    """File in safetensors form -> tensor name -> this rank's rows."""
    documents: dict[str, Any]
    """File -> value, as JSON, or the text of a `.md`."""
    configs: list[Any]
    """Objects with `save_pretrained(folder)`: the model's config, its generation config."""
    tokenizer: PreTrainedTokenizerBase | None = None


def contents_of(
    model: nn.Module, training: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None
) -> Contents:
    """Copy what a checkpoint of a converted model holds; `training` is what a resumed run needs (`training_state`)."""
    tensors: dict[str, dict[str, Piece]] = {"model.safetensors": {}, ROUTERS: {}}
    for name, tensor in untied_state(model).items():
        tensors[ROUTERS if is_router_parameter(name) else "model.safetensors"][name] = copy_piece(tensor)
    documents: dict[str, Any] = {}
    if training is not None:
        tensors[f"training{SUFFIX}"] = {name: copy_piece(tensor) for name, tensor in training[0].items()}
        documents["training.json"] = training[1]
    generation = getattr(model, "generation_config", None)
    configs = [_config(model), *([] if generation is None else [generation])]
    return Contents(tensors, documents, configs)


def own_tensors(folder: Path, name: str) -> Path:
    """Return our own tensors of a checkpoint: `"switchable"` or `"training"`. Until 0.2 they were `*.safetensors`."""
    path = folder / f"{name}{SUFFIX}"
    return path if path.exists() else path.with_suffix(".safetensors")


def untied_state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name; a tensor with several names is there once, under the first."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def _config(model: nn.Module) -> Any:
    """Return the model's config as transformers would save it."""
    config: Any = copy.deepcopy(model.config)
    config.architectures = [class_name(model)]
    config.dtype = next(model.parameters()).dtype
    return config


def training_state(
    model: nn.Module, optimizer: Optimizer, controller_state: Mapping[str, Any], counters: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gather what a resumed run needs besides the model, as tensors (by parameters' names) and as plain values."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    values: dict[str, Any] = {"counters": dict(counters), "optimizer": {}}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            full = f"{names[id(parameter)]}:{key}"
            if isinstance(value, Tensor):
                tensors[f"optimizer:{full}"] = value
            elif value is not None:
                values["optimizer"][full] = value
    plain = dict(controller_state)
    for key, name in PER_LAYER.items():
        found = enumerate(plain.pop(key))
        tensors |= {f"{name}:{i}": tensor for i, tensor in found if tensor is not None}
    values["controller"] = plain
    return tensors, values
