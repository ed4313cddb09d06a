"""A model for decoding in 8 bits, whose wider weights are never in memory all at once.

    a sparse export in 8 bits    has them beside its own, with all that a decoder needs: nothing else is looked at
        int8.tensors    matrix:NAME int8 [N, D], scale:NAME [N]    a decoder's matrices
                        plain:NAME                                 its other numbers, float32
                        metadata                                   what is not in the shapes (`skeleton.py`)
    a run, any other export      one matrix after another is read and rounded (`rounding.py`)

Other tools do not see int8.tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from switchable.data.tokenizers import check_fits, without_copies
from switchable.errors import InputError
from switchable.infer.decoding.decoder import Decoder, why_not
from switchable.infer.decoding.families import parts_of
from switchable.infer.decoding.matrices import Quantised, Stacked, Stored
from switchable.infer.decoding.skeleton import facts_and_tensors, skeleton
from switchable.infer.generate import why_not_ours
from switchable.infer.sampling import Sampling
from switchable.memory import give_back_freed_memory
from switchable.store.contents import SUFFIX
from switchable.store.find import find_model, load_tokenizer_of
from switchable.store.folders import MANIFEST, check_whole
from switchable.store.tensorfile import TensorFile, fill

FILE = f"int8{SUFFIX}"
FORMAT = 2
KEY = "switchable_int8"
"""Of the format, among the file's metadata."""
FACTS = "model"


class QuantisedModel(NamedTuple):
    """What a folder holds."""

    model: nn.Module
    """Without its matrices, which only a decoder can do without."""
    tokenizer: PreTrainedTokenizerBase
    stored: Stored
    """For `Decoder`."""


def check_int8(model: nn.Module) -> None:
    """Raise InputError if a model is none that is decoded in 8 bits."""
    if (reason := why_not(model)) is not None:
        raise InputError(
            f"weights=int8 is for models of our own decoding, and this one {reason}; use weights=bfloat16"
        )


def write_int8(model: nn.Module, folder: Path) -> None:
    """Write a converted model's matrices in 8 bits, and what else a decoder needs; the model is used up by it."""
    facts, plain = facts_and_tensors(model)
    tensors = {f"plain:{name}": each for name, each in plain.items()}
    for name, (rows_ND, scale_N) in Decoder(model, "int8").matrices.taken.items():
        tensors |= {f"matrix:{name}": rows_ND, f"scale:{name}": scale_N}  # type: ignore[dict-item]
    save_file(tensors, folder / FILE, {KEY: str(FORMAT), FACTS: json.dumps(facts)})


def load_int8(folder: Path, mode: str = "dense", sampling: Sampling | None = None) -> QuantisedModel | None:
    """Return a folder's model for decoding in 8 bits in a mode; None where only `load` can open or use it.

    Raises:
        InputError: the folder is damaged, its 8 bits are of another version, or as `load`.
    """
    place = find_model(folder)
    if not (place / MANIFEST).is_file():
        return None
    kept = (place / FILE).is_file()
    check_whole(place, skip="*.safetensors" if kept else "")
    if (tokenizer := load_tokenizer_of(place)) is not None:
        tokenizer = without_copies(tokenizer, place)
    give_back_freed_memory()
    if kept:
        found: tuple[nn.Module, Stored] | None = opened(place / FILE)
    else:
        from switchable.store.rounding import rounded  # transformers' models: half of the memory

        found = rounded(place)
    if tokenizer is None or found is None:
        return None
    model, stored = found
    if (place / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{place / 'generation_config.json'} cannot be used: {error}") from None
    if why_not_ours(model, mode, sampling or Sampling()) is not None:
        return None
    check_fits(tokenizer, parts_of(model).tokens.num_embeddings, place)
    return QuantisedModel(model, tokenizer, stored)


def opened(path: Path) -> tuple[nn.Module, Stored]:
    """Return the model of a file, with all but its matrices, and what reads those."""
    file = TensorFile(path)
    written = file.metadata.get(KEY)
    if written != str(FORMAT):
        raise InputError(f"{path} is of format {written}, not {FORMAT}; export the model again")
    shapes = {name: file.shape(name) for name in file.names}
    plain = {name.removeprefix("plain:"): (path, name) for name in shapes if name.startswith("plain:")}
    numbers = {
        name.partition(":")[2]: shape for name, shape in shapes.items() if not name.startswith("scale:")
    }
    try:
        model = skeleton(json.loads(file.metadata[FACTS]), numbers)
        for name in numbers.keys() - plain.keys():
            if shapes[f"scale:{name}"] != numbers[name][:1]:
                raise ValueError(f"scale:{name} has another length")
        fill(model, plain)
    except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        raise InputError(f"{path} does not hold a whole model ({error}); export it again") from None

    def stored(name: str, _parts: Stacked) -> Quantised:
        # Opened anew for each matrix: pages that were read count as the process's until the file is closed.
        return Quantised(*(TensorFile(path).tensor(f"{kind}:{name}") for kind in ("matrix", "scale")))

    return model, stored
