"""Weights in 8 bits beside a sparse export's own, so that `--weights int8` need neither read the wider ones nor round.

    int8.tensors    matrix:NAME int8 [N, D], scale:NAME [N]    a decoder's matrices
                    plain:NAME                                 all other parameters, under the model's own names

The model is then built without memory for its matrices. Other tools do not see the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from switchable.errors import InputError
from switchable.ffn.builders import class_of
from switchable.infer.decoding.decoder import Decoder, why_not
from switchable.store import tensorfile
from switchable.store.contents import SUFFIX
from switchable.store.experts import restore_experts
from switchable.store.folders import verify
from switchable.store.load import find_model, load_tokenizer_of
from switchable.store.pretrained import load_config, quiet_transformers

FILE = f"int8{SUFFIX}"
FORMAT = 1
KEY = "switchable_int8"
"""Of the format, among the file's metadata."""


class QuantisedModel(NamedTuple):
    """What a folder with 8 bits holds."""

    model: nn.Module
    """Without its matrices, which only a decoder can do without."""
    tokenizer: PreTrainedTokenizerBase
    stored: dict[str, Tensor]
    """For `Decoder`."""


def check_int8(model: nn.Module) -> None:
    """Raise InputError if a model is none that is decoded in 8 bits."""
    reason = why_not(model)
    if reason is not None:
        raise InputError(
            f"weights=int8 is for models of our own decoding, and this one {reason}; use weights=bfloat16"
        )


def write_int8(model: nn.Module, folder: Path) -> None:
    """Write a converted model's matrices in 8 bits, and what else a decoder needs; the model is used up by it."""
    taken = Decoder(model, "int8").matrices.taken
    tensors = {f"plain:{name}": each for name, each in model.named_parameters() if each.numel()}
    for name, (rows_ND, scale_N) in taken.items():
        tensors |= {f"matrix:{name}": rows_ND, f"scale:{name}": scale_N}  # type: ignore[dict-item]
    pieces = {name: tensorfile.copy_piece(each) for name, each in tensors.items()}
    metadata = {KEY: str(FORMAT)}
    tensorfile.create(folder / FILE, pieces, metadata)
    tensorfile.write(folder / FILE, pieces, metadata)


def load_int8(folder: Path) -> QuantisedModel | None:
    """Return the model that a folder holds in 8 bits, or None if it does not.

    Raises:
        InputError: the file is damaged, of a later version, or not this model's.
    """
    place = find_model(folder)
    if not (place / FILE).is_file():
        return None
    damage = verify(place, skip="*.safetensors")
    if damage is not None:
        raise InputError(f"{place} is damaged ({damage}); export it again")
    file = tensorfile.TensorFile(place / FILE)
    written = file.metadata.get(KEY)
    if written != str(FORMAT):
        raise InputError(f"{place / FILE} is of format {written}, not {FORMAT}; export the model again")
    tokenizer = load_tokenizer_of(place)
    if tokenizer is None:
        raise InputError(f"{place} holds no tokenizer; export a model that has one")
    model = _empty(place)
    found: dict[str, dict[str, Tensor]] = {"plain": {}, "matrix": {}, "scale": {}}
    for full in file.names:
        kind, _, name = full.partition(":")
        found[kind][name] = file.tensor(full)
    _fill(model, found["plain"], place)
    scales = {f"{name}.scale": each for name, each in found["scale"].items()}
    return QuantisedModel(model, tokenizer, found["matrix"] | scales)


def _empty(place: Path) -> nn.Module:
    """Return the model with its experts and no memory."""
    config = load_config(place)
    with torch.device("meta"), quiet_transformers():
        kind: Any = class_of(config)
        model: nn.Module = kind(config)
    restore_experts(place, model)
    if (place / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(place, local_files_only=True)
    return model.eval()


def _fill(model: nn.Module, plain: Mapping[str, Tensor], place: Path) -> None:
    """Give a model its parameters but for the matrices."""
    known = dict(model.named_parameters())
    for name, tensor in plain.items():
        if name not in known or known[name].shape != tensor.shape:
            raise InputError(f"{name} of {place / FILE} does not fit the model of {place}; export it again")
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
