"""The wider weights of a folder, rounded to 8 bits as a decoder asks for them: one matrix is in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from switchable.ffn.builders import class_of
from switchable.infer.decoding.matrices import Stored, in_8_bits
from switchable.infer.decoding.rounded import matrices_of
from switchable.store.contents import own_tensors
from switchable.store.experts import restore_experts
from switchable.store.pretrained import load_config, quiet_transformers
from switchable.store.tensorfile import TensorFile, fill


def rounded(place: Path) -> tuple[nn.Module, Stored] | None:
    """Return a folder's model with all but its matrices, and what reads and rounds those.

    None if it has no experts, or its parameters have other names in the folder than in the model.
    """
    config = load_config(place)
    with torch.device("meta"), quiet_transformers():
        model: Any = class_of(config)(config)
    if not restore_experts(place, model):
        return None
    files = [*place.glob("*.safetensors"), own_tensors(place, "switchable")]
    where = {name: path for path in files for name in TensorFile(path).names}
    known = dict(model.named_parameters())
    if not all(n in where and TensorFile(where[n]).shape(n) == tuple(p.shape) for n, p in known.items()):
        return None
    names = {parameter: name for name, parameter in known.items()}
    matrices = {module.weight for module in matrices_of(model)}
    fill(model, {name: (where[name], name) for name, each in known.items() if each not in matrices})

    def rows(parameter: Tensor, turned: bool) -> Tensor:
        name = names[cast(nn.Parameter, parameter)]
        found = TensorFile(where[name]).mapped(name)
        return found.t() if turned else found

    return model.eval(), lambda _, parts: in_8_bits(rows(*part) for part in parts)
