"""Checkpoints: a folder that is complete, checked and readable by plain transformers, or does not exist.

    model.safetensors, config.json    the dense model under its Hugging Face names: `from_pretrained(folder)` reads it
    switchable.safetensors, .json     routers, which neuron is which; experts, K and which layers are sparse
    training.safetensors, .json       optimizer moments, structures, random state; step, data position, schedule
    manifest.json                     size and SHA-256 of each file above

The folder is written under a temporary name, flushed to disk, and renamed. Nothing is ever pickled. Whether one
process wrote it or many, sharded or not, it is the same folder (`tensorfile.py`), and any other number of them reads
it: each its own rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from switchable import ranks
from switchable.errors import InputError
from switchable.ffn.convert import is_router_parameter, layers_of
from switchable.files import TEMPORARY, remove, sync_folder, write_json
from switchable.store import tensorfile
from switchable.store.folders import entry, full_disk_told, seal
from switchable.store.snapshot import NEURON_IDS, PER_LAYER, Snapshot, take, untied_state
from switchable.store.tensorfile import TensorFile

METADATA = {"format": "pt"}
"""What transformers wants to see in the header of a safetensors file."""
SHARD_SIZE = "5GB"
"""Largest file of weights that an export writes."""
REMEDY = "earlier checkpoints stand. Free some space (or lower --keep) and go on with --resume"


def save(
    folder: Path,
    model: nn.Module,
    training: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    notes: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a checkpoint, atomically; an older one of the same name is replaced. Every rank must call it.

    Args:
        folder: where it shall stand.
        model: a converted transformers model.
        training: tensors and plain values a resumed run needs (`training_state`), or None for a model only.
        tokenizer: the model's tokenizer, to make the folder complete by itself.
        notes: plain values to keep beside it, by file name.

    Raises:
        InputError: no space left on the device. What was there before is untouched.
    """
    write(folder, take(model, training, tokenizer, notes))


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


def _guarded(folder: Path, work: Callable[[], Any]) -> Any:
    """Do `work`; a full disk is the user's affair, anything else a bug."""
    with full_disk_told(folder, REMEDY):
        return work()


def _begin(temporary: Path, snapshot: Snapshot) -> None:
    """Make the folder with every file in its full size (rank 0)."""
    if not ranks.is_main():
        return
    remove(temporary)
    temporary.mkdir(parents=True)
    with quiet_transformers():
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
    return {path.name: entry(path) for path in paths}


def _finish(temporary: Path, folder: Path, files: Mapping[str, Any]) -> None:
    """Write the manifest, flush, and give the folder its name (rank 0)."""
    if not ranks.is_main():
        return
    seal(temporary, files)
    remove(folder)
    temporary.rename(folder)
    sync_folder(folder.parent)


def save_dense(
    folder: Path, model: nn.Module, routers: bool = False, max_shard_size: str = SHARD_SIZE
) -> None:
    """Write a converted model in Hugging Face form, under the plain model's names.

    Args:
        folder: where; must exist.
        model: a converted transformers model.
        routers: write the routers too, among the weights.
        max_shard_size: largest file of weights, as `"5GB"`; a larger model becomes several files and an index.
    """
    state = {n: t for n, t in model.state_dict().items() if routers or not is_router_parameter(n)}
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)  # type: ignore[operator]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from drawing bars and logging warnings; its settings are put back afterwards."""
    logging = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


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
    for key, name in PER_LAYER.items():
        names = [f"{name}:{i}" for i in range(len(layers_of(model)))]
        controller_state[key] = [file.tensor(each) if each in file.names else None for each in names]
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
    paths = [*folder.glob("model*.safetensors"), *([folder / "switchable.safetensors"] if routers else [])]
    stored = {name: file for file in map(TensorFile, paths) for name in file.names}
    _take_neuron_ids(stored, model)
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


def restore_routers(folder: Path, model: nn.Module) -> None:
    """Load the routers of a checkpoint, and which neuron is which, into a converted model.

    Raises:
        InputError: names or shapes do not fit.
    """
    path = folder / "switchable.safetensors"
    state = load_file(path)
    names = dict.fromkeys(state, TensorFile(path))
    _take_neuron_ids(names, model)
    state = {name: state[name] for name in names}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise InputError(
            f"the routers of {folder} do not fit: {str(error).splitlines()[-1].strip()}"
        ) from None
    wrong = [*unexpected, *(name for name in missing if is_router_parameter(name))]
    if wrong:
        raise InputError(f"the routers of {folder} do not fit the model: {wrong[0]}")


def _take_neuron_ids(stored: dict[str, TensorFile], model: nn.Module) -> None:
    """Move the names of the neurons from files to the layers."""
    for layer in layers_of(model):
        # Models of other origin have none: their neurons stand in their first order.
        file = stored.pop(layer.ssd.name + NEURON_IDS, None)
        layer.ssd.neuron_ids_F = (
            torch.arange(layer.ssd.d_ff) if file is None else file.tensor(layer.ssd.name + NEURON_IDS)
        )
