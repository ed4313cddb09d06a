"""Checkpoints: a folder that is complete, checked and readable by plain transformers, or does not exist.

    model.safetensors, config.json    the dense model under its Hugging Face names: `from_pretrained(folder)` reads it
    switchable.safetensors, .json     routers; experts, K and which layers are sparse
    training.safetensors, .json       optimizer moments, structures, random state; step, data position, schedule
    manifest.json                     size and SHA-256 of each file above

The folder is written under a temporary name, flushed to disk, and renamed. Nothing is ever pickled. Whether one
process wrote it or many, sharded or not, it is the same folder (`tensorfile.py`), and any other number of them reads
it: each its own rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from switchable import ranks
from switchable.errors import InputError
from switchable.ffn.convert import is_router_parameter, layers_of
from switchable.train import tensorfile
from switchable.train.rundir import TEMPORARY, is_no_space, remove, sync_folder, write_json
from switchable.train.snapshot import Snapshot, take, untied_state
from switchable.train.tensorfile import TensorFile

MANIFEST = "manifest.json"
METADATA = {"format": "pt"}
"""What transformers wants to see in the header of a safetensors file."""


def save(
    folder: Path,
    model: nn.Module,
    training: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a checkpoint, atomically; an older one of the same name is replaced. Every rank must call it.

    Args:
        folder: where it shall stand.
        model: a converted transformers model.
        training: tensors and plain values a resumed run needs (`training_state`), or None for a model only.
        tokenizer: the model's tokenizer, to make the folder complete by itself.

    Raises:
        InputError: no space left on the device. What was there before is untouched.
    """
    write(folder, take(model, training, tokenizer))


def write(folder: Path, snapshot: Snapshot, group: dist.ProcessGroup | None = None) -> None:
    """Write a snapshot as the checkpoint `folder`; every rank must call it, with its own.

    Args:
        folder: where it shall stand; on a file system that all ranks share.
        snapshot: what to write.
        group: ranks to talk to; one of its own where this runs beside training.

    Raises:
        InputError: no space left on the device, or a rank does not see the folder. What was there before is untouched.
    """
    temporary = folder.with_name(TEMPORARY + folder.name)
    try:
        ranks.gather(lambda: _guarded(folder, lambda: _begin(temporary, snapshot)), group)
        ranks.gather(lambda: _guarded(folder, lambda: _write_rows(temporary, snapshot)), group)
        # Checksums are of what is on disk, not of what was meant to be; the files are shared out.
        parts = ranks.gather(lambda: _guarded(folder, lambda: _checksums(temporary)), group)
        files = {name: entry for part in parts for name, entry in part.items()}
        ranks.gather(lambda: _guarded(folder, lambda: _finish(temporary, folder, files)), group)
    finally:
        if ranks.is_main():
            remove(temporary)


def _guarded(folder: Path, work: Any) -> Any:
    """Do `work`; a full disk is the user's affair, anything else a bug."""
    try:
        return work()
    except (OSError, SafetensorError) as error:
        if not is_no_space(error):
            raise
        raise InputError(
            f"no space left on the device while saving {folder}; nothing was damaged and earlier checkpoints stand. "
            "Free some space (or lower --keep) and go on with --resume"
        ) from None


def _begin(temporary: Path, snapshot: Snapshot) -> None:
    """Make the folder with every file in its full size (rank 0)."""
    if not ranks.is_main():
        return
    remove(temporary)
    temporary.mkdir(parents=True)
    for config in snapshot.configs:
        config.save_pretrained(temporary)
    for name, value in snapshot.documents.items():
        write_json(temporary / name, value)
    for name, pieces in snapshot.tensors.items():
        tensorfile.create(temporary / name, pieces, METADATA)


def _write_rows(temporary: Path, snapshot: Snapshot) -> None:
    if not temporary.is_dir():
        raise InputError(
            f"rank {ranks.rank()} does not see {temporary.parent}; --out must be on a file system that all ranks share"
        )
    for name, pieces in snapshot.tensors.items():
        tensorfile.write(temporary / name, pieces, METADATA)


def _checksums(temporary: Path) -> dict[str, dict[str, Any]]:
    """Return the manifest's entries of this rank's share of the files."""
    paths = sorted(temporary.iterdir())[ranks.rank() :: ranks.world_size()]
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}


def _finish(temporary: Path, folder: Path, files: Mapping[str, Any]) -> None:
    """Write the manifest, flush, and give the folder its name (rank 0)."""
    if not ranks.is_main():
        return
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    write_json(temporary / MANIFEST, {"format": 1, "files": dict(sorted(files.items()))})
    sync_folder(temporary)
    remove(folder)
    temporary.rename(folder)
    sync_folder(folder.parent)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> str | None:
    """Return None if a checkpoint is whole, else what is wrong with it, in a few words."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {
            name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()
        }
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, (size, checksum) in files.items():
        path = folder / name
        if Path(name).name != name:
            return f"{MANIFEST} names a file outside the folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if sha256(path) != checksum:
            return f"{name} does not have its checksum"
    return None


def restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a verified checkpoint into a converted model and its optimizer, however either is sharded.

    Returns:
        The controller's state and the loop's counters.
    """
    restore_model(folder, model)
    file = TensorFile(folder / "training.safetensors")
    values = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    torch.set_rng_state(file.tensor("random.cpu"))
    if "random.cuda" in file.names and torch.cuda.is_available():
        torch.cuda.set_rng_state(file.tensor("random.cuda"))
    parameters = dict(model.named_parameters())
    for name in sorted(file.names):
        if name.startswith("optimizer:"):
            _, parameter_name, key = name.split(":")
            parameter = parameters[parameter_name]
            if file.shape(name) == ():
                optimizer.state[parameter][key] = file.tensor(name)  # AdamW keeps its step count on the CPU
            else:
                optimizer.state[parameter][key] = torch.zeros_like(
                    parameter
                )  # moments lie as their parameter does
                file.read_into(name, optimizer.state[parameter][key])
    for full, value in values["optimizer"].items():
        parameter_name, key = full.split(":")
        optimizer.state[parameters[parameter_name]][key] = value
    controller_state = values["controller"]
    labels = [f"structure:{i}" for i in range(len(layers_of(model)))]
    controller_state["last"] = [file.tensor(name) if name in file.names else None for name in labels]
    return controller_state, values["counters"]


def restore_model(folder: Path, model: nn.Module, routers: bool = True) -> None:
    """Load weights and routers of a checkpoint into a converted model of the same shape.

    Args:
        folder: the checkpoint.
        model: the model to load into.
        routers: whether to load the routers too; if not, the model keeps its own, of whatever shape.

    Raises:
        InputError: names or shapes do not fit; the model is unchanged then.
    """
    state = {n: t for n, t in untied_state(model).items() if routers or not is_router_parameter(n)}
    names = ("model.safetensors", "switchable.safetensors") if routers else ("model.safetensors",)
    files = [TensorFile(folder / name) for name in names]
    stored = {name: file for file in files for name in file.names}
    strange = sorted(state.keys() ^ stored.keys())
    if strange:
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
    for name, tensor in state.items():
        stored[name].read_into(name, tensor)
