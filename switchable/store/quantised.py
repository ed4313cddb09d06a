"""A model for decoding in 8 bits, whose wider weights are never in memory all at once.

    a sparse export in 8 bits    has them beside its own: nothing is rounded, the wider ones are not looked at
        int8.tensors    matrix:NAME int8 [N, D], scale:NAME [N]    a decoder's matrices
                        plain:NAME                                 all other parameters, by the model's own names
    a run, any other export      one matrix after another is read and rounded

The model is built without memory for its matrices. Other tools do not see int8.tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from switchable.data.tokenizers import check_fits
from switchable.errors import InputError
from switchable.ffn.builders import class_of
from switchable.infer.decoding.decoder import Decoder, why_not
from switchable.infer.decoding.matrices import Quantised, Stacked, Stored, in_8_bits
from switchable.infer.decoding.rounded import matrices_of
from switchable.infer.generate import why_not_ours
from switchable.infer.sampling import Sampling
from switchable.store import tensorfile
from switchable.store.contents import SUFFIX, own_tensors
from switchable.store.experts import restore_experts
from switchable.store.folders import MANIFEST, check_whole
from switchable.store.load import find_model, load_tokenizer_of
from switchable.store.pretrained import load_config, quiet_transformers
from switchable.store.tensorfile import TensorFile

FILE = f"int8{SUFFIX}"
FORMAT = 1
KEY = "switchable_int8"
"""Of the format, among the file's metadata."""


class QuantisedModel(NamedTuple):
    """What a folder holds."""

    model: nn.Module
    """Without its matrices, which only a decoder can do without."""
    tokenizer: PreTrainedTokenizerBase
    stored: Stored
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


def load_int8(folder: Path, mode: str = "dense", sampling: Sampling | None = None) -> QuantisedModel | None:
    """Return a folder's model for decoding in 8 bits in a mode; None where only `load` can open or use it.

    Raises:
        InputError: the folder is damaged, its 8 bits are of a later version or another model's, or as `load`.
    """
    place = find_model(folder)
    if not (place / MANIFEST).is_file():
        return None
    kept = (place / FILE).is_file()
    check_whole(place, skip="*.safetensors" if kept else "")
    tokenizer, model = load_tokenizer_of(place), _empty(place)
    if tokenizer is None or model is None or why_not_ours(model, mode, sampling or Sampling()) is not None:
        return None
    stored = _kept(place / FILE, model) if kept else _rounded(place, model)
    if stored is None:
        return None
    check_fits(tokenizer, model.get_input_embeddings().weight.shape[0], place)
    return QuantisedModel(model, tokenizer, stored)


def _empty(place: Path) -> Any:
    """Return the model with its experts and no memory, or None if it has no experts."""
    config = load_config(place)
    with torch.device("meta"), quiet_transformers():
        model: Any = class_of(config)(config)
    if not restore_experts(place, model):
        return None
    if (place / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(place, local_files_only=True)
    return model.eval()


# Below, a file is opened anew for each tensor: pages that were read count as the process's until it is closed.


def _kept(path: Path, model: nn.Module) -> Stored:
    """Return what reads a file's 8 bits; give the model its other parameters."""
    file = TensorFile(path)
    if file.metadata.get(KEY) != str(FORMAT):
        raise InputError(
            f"{path} is of format {file.metadata.get(KEY)}, not {FORMAT}; export the model again"
        )
    shapes = {name: file.shape(name) for name in file.names}
    plain = {name.removeprefix("plain:"): name for name in shapes if name.startswith("plain:")}
    known = dict(model.named_parameters())
    for name, full in plain.items():
        if name not in known or known[name].shape != shapes[full]:
            raise InputError(f"{name} of {path} does not fit the model beside it; export it again")
    _fill(model, {name: (path, full) for name, full in plain.items()})

    def stored(name: str, parts: Stacked) -> Quantised:
        shape = (sum(each.shape[turned] for each, turned in parts), parts[0][0].shape[not parts[0][1]])
        matrix, scale = f"matrix:{name}", f"scale:{name}"
        if (shapes.get(matrix), shapes.get(scale)) != (shape, shape[:1]):
            raise InputError(f"the weights in 8 bits do not fit the model: {name}; export it again")
        return Quantised(TensorFile(path).tensor(matrix), TensorFile(path).tensor(scale))

    return stored


def _rounded(place: Path, model: nn.Module) -> Stored | None:
    """Return what rounds a folder's weights; give the model its other parameters. None if the names are not its own."""
    files = [*place.glob("*.safetensors"), own_tensors(place, "switchable")]
    where = {name: path for path in files for name in TensorFile(path).names}
    known = dict(model.named_parameters())
    if not all(n in where and TensorFile(where[n]).shape(n) == tuple(p.shape) for n, p in known.items()):
        return None
    names = {parameter: name for name, parameter in known.items()}
    matrices = {module.weight for module in matrices_of(model)}
    _fill(model, {name: (where[name], name) for name, each in known.items() if each not in matrices})

    def rows(parameter: Tensor, turned: bool) -> Tensor:
        name = names[cast(nn.Parameter, parameter)]
        found = TensorFile(where[name]).mapped(name)
        return found.t() if turned else found

    return lambda _, parts: in_8_bits(rows(*part) for part in parts)


def _fill(model: nn.Module, tensors: Mapping[str, tuple[Path, str]]) -> None:
    """Give a model parameters, each from a name in a file."""
    for name, (path, full) in tensors.items():
        module, _, leaf = name.rpartition(".")
        tensor = TensorFile(path).tensor(full)
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
