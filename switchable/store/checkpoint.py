"""Checkpoints: a folder that is complete, checked and readable by plain transformers, or does not exist.

    model.safetensors, config.json    the dense model under its Hugging Face names: `from_pretrained(folder)` reads it
    switchable.tensors                routers, and of each FFN: experts, K, whether it is sparse, which neuron is which
    training.tensors, .json           optimizer moments, structures, random state; step, data position, schedule
    manifest.json                     size and SHA-256 of each file above

The folder is written under a temporary name, flushed to disk, and renamed. Nothing is ever pickled. One process or
many, sharded or not, write the same folder (`tensorfile.py`). Any other number of them can read it (`restore.py`):
each reads its own rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from switchable import ranks
from switchable.data.tokenizers import save_tokenizer
from switchable.errors import InputError
from switchable.ffn.convert import layers_of
from switchable.files import finish_folder, full_disk_told, remove, temporary_name, write_json, write_text
from switchable.finite import check_finite
from switchable.store import tensorfile
from switchable.store.contents import Contents, contents_of
from switchable.store.folders import entry, seal
from switchable.store.pretrained import name_as_before, quiet_transformers
from switchable.store.readme import readme

DIVERGED = "nothing was written. Its training has diverged: lower the learning rate"
REMEDY = (
    "nothing was damaged and what was saved before stands. Free some space and start again (pretrain: with --resume, "
    "and perhaps a lower --keep)"
)


def save(
    folder: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a finished model as the checkpoint `folder`; every rank must call it.

    `notes` are plain values to keep beside it, by file name.

    Raises:
        InputError: no space left on the device, or weights that are not finite. What was there before is untouched.
    """
    ranks.together(lambda: check_finite(model, f"the model for {folder}", DIVERGED))
    contents = contents_of(model)
    contents.tokenizer = tokenizer
    contents.documents |= notes or {}
    if layers_of(model)[0].has_dense_mode:  # what has none, a baseline of a comparison, is never opened again
        contents.documents["README.md"] = readme(model, "sparse", folder.name, tokenizer is not None)
    write(folder, contents)


def write(folder: Path, contents: Contents) -> None:
    """Write a checkpoint; an older one of the same name is replaced. What was there stands until then.

    Every rank must call it, with its own contents and a folder on a file system that all ranks share. Raises InputError
    if no space is left on the device, or a rank does not see the folder.
    """
    temporary = temporary_name(folder)
    guarded = full_disk_told(f"saving {folder}", REMEDY)
    try:
        ranks.on_main(guarded(lambda: _begin(temporary, contents)))
        ranks.gather(guarded(lambda: _write_rows(temporary, contents)))
        # Checksums are of what is on disk, not of what was meant to be. The ranks share the files out.
        parts = ranks.gather(guarded(lambda: _checksums(temporary)))
        files = {name: entry for part in parts for name, entry in part.items()}
        ranks.on_main(guarded(lambda: _finish(temporary, folder, files)))
    finally:
        if ranks.is_main():
            remove(temporary)


def _begin(temporary: Path, contents: Contents) -> None:
    """Make the folder with every file in its full size."""
    remove(temporary)
    temporary.mkdir(parents=True)
    with quiet_transformers():
        for config in contents.configs:
            config.save_pretrained(temporary)
    name_as_before(temporary)
    if contents.tokenizer is not None:
        save_tokenizer(contents.tokenizer, temporary)
    for name, value in contents.documents.items():
        (write_text if name.endswith(".md") else write_json)(temporary / name, value)
    for name, pieces in contents.tensors.items():
        tensorfile.create(temporary / name, pieces)


def _write_rows(temporary: Path, contents: Contents) -> None:
    if not temporary.is_dir():
        raise InputError(
            f"rank {ranks.rank()} does not see {temporary.parent}; --out must be on a file system that all ranks share"
        )
    for name, pieces in contents.tensors.items():
        tensorfile.write(temporary / name, pieces)


def _checksums(temporary: Path) -> dict[str, dict[str, Any]]:
    """Return the manifest's entries of this rank's share of the files."""
    paths = sorted(temporary.iterdir())[ranks.rank() :: ranks.world_size()]
    return {path.name: entry(path) for path in paths}


def _finish(temporary: Path, folder: Path, files: Mapping[str, Any]) -> None:
    """Write the manifest, flush, and give the folder its name."""
    seal(temporary, files)
    finish_folder(temporary, folder)
