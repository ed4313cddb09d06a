"""Checkpoints: a folder that is complete, checked and readable by plain transformers, or does not exist.

    model.safetensors, config.json    the dense model under its Hugging Face names: `from_pretrained(folder)` reads it
    switchable.safetensors, .json     routers, which neuron is which; experts, K and which layers are sparse
    training.safetensors, .json       optimizer moments, structures, random state; step, data position, schedule
    manifest.json                     size and SHA-256 of each file above

The folder is written under a temporary name, flushed to disk, and renamed. Nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from switchable.errors import InputError
from switchable.ffn.convert import is_router_parameter, layers_of
from switchable.ffn.description import describe
from switchable.ffn.layout import laid_out_like
from switchable.train.rundir import TEMPORARY, is_no_space, write_json

MANIFEST = "manifest.json"
SHARD_SIZE = "5GB"
"""Largest file of weights."""
PER_LAYER = {"last": "structure", "patterns": "pattern", "routes": "route"}
"""Parts of a controller's state that are a tensor (or None) per layer, and what a layer's is called in the file."""
NEURON_IDS = ".neuron_ids"
"""Ending of the names under which `SwitchableFFN.neuron_ids_F` is stored."""


def save(
    folder: Path,
    model: nn.Module,
    training: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    notes: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a checkpoint, atomically; an older one of the same name is replaced.

    Args:
        folder: where it shall stand.
        model: a converted transformers model.
        training: tensors and plain values a resumed run needs (`training_state`), or None for a model only.
        tokenizer: the model's tokenizer, to make the folder complete by itself.
        notes: plain values to keep beside it, by file name.

    Raises:
        InputError: no space left on the device. What was there before is untouched.
    """
    remedy = "earlier checkpoints stand. Free some space (or lower --keep) and go on with --resume"
    with whole_folder(folder, remedy) as temporary:
        save_model(temporary, model)
        if training is not None:
            save_file(training[0], temporary / "training.safetensors")
            write_json(temporary / "training.json", training[1])
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        for name, values in (notes or {}).items():
            write_json(temporary / name, values)
        _seal(temporary)


@contextmanager
def whole_folder(folder: Path, remedy: str) -> Iterator[Path]:
    """Give the `with` block a new folder to fill, which takes the place of `folder` at its end, or is removed.

    Args:
        folder: where it shall stand; an older one is replaced.
        remedy: what to do when the disk is full, for the message.

    Raises:
        InputError: no space left on the device. What was there before is untouched.
    """
    temporary = folder.with_name(TEMPORARY + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        if not is_no_space(error):
            raise
        raise InputError(
            f"no space left on the device while saving {folder}; nothing was damaged and {remedy}"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def save_model(folder: Path, model: nn.Module) -> None:
    """Write the dense model in Hugging Face form, and what makes it switchable beside it."""
    save_dense(folder, model)
    routers = {n: t.detach().contiguous() for n, t in model.state_dict().items() if is_router_parameter(n)}
    neuron_ids = {layer.name + NEURON_IDS: layer.neuron_ids_F.contiguous() for layer in layers_of(model)}
    save_file(routers | neuron_ids, folder / "switchable.safetensors")
    write_json(folder / "switchable.json", describe(model))


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


def _seal(folder: Path) -> None:
    """Write the manifest of a folder and flush every file to disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / MANIFEST, {"format": 1, "files": files})


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
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if sha256(path) != checksum:
            return f"{name} does not have its checksum"
    return None


def training_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    controller_state: Mapping[str, Any],
    counters: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gather what a resumed run needs besides the model, as tensors and as plain values.

    Args:
        model: the model trained.
        optimizer: its optimizer; states are stored under their parameter's name.
        controller_state: `Controller.state_dict()`.
        counters: plain values of the loop.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    values: dict[str, Any] = {"counters": dict(counters), "optimizer": {}}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            full = f"{names[id(parameter)]}:{key}"
            if isinstance(value, Tensor):
                tensors[f"optimizer:{full}"] = value.detach().contiguous()
            elif value is not None:
                values["optimizer"][full] = value
    plain = dict(controller_state)
    for key, name in PER_LAYER.items():
        found = enumerate(plain.pop(key))
        tensors |= {f"{name}:{i}": tensor for i, tensor in found if tensor is not None}
    values["controller"] = plain
    return tensors, values


def restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a verified checkpoint into a converted model and its optimizer.

    Returns:
        The controller's state and the loop's counters.
    """
    restore_model(folder, model)
    device = next(model.parameters()).device
    tensors = load_file(folder / "training.safetensors")
    values = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    torch.set_rng_state(tensors.pop("random.cpu"))
    cuda = tensors.pop("random.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name.startswith("optimizer:"):
            _, parameter_name, key = name.split(":")
            # AdamW keeps its step count on the CPU; moments live beside their parameter.
            parameter = parameters[parameter_name]
            home = tensor if tensor.ndim == 0 else laid_out_like(tensor.to(device), parameter)
            optimizer.state[parameter][key] = home
    for full, value in values["optimizer"].items():
        parameter_name, key = full.split(":")
        optimizer.state[parameters[parameter_name]][key] = value
    controller_state = values["controller"]
    layers = range(len(layers_of(model)))
    controller_state |= {key: [tensors.get(f"{name}:{i}") for i in layers] for key, name in PER_LAYER.items()}
    return controller_state, values["counters"]


def restore_model(folder: Path, model: nn.Module, routers: bool = True) -> None:
    """Load weights and routers of a checkpoint into a converted model of the same shape.

    Args:
        folder: the checkpoint.
        model: the model to load into.
        routers: whether to load the routers too; if not, the model keeps its own, of whatever shape.

    Raises:
        InputError: names or shapes do not fit.
    """
    state = load_file(folder / "switchable.safetensors") if routers else {}
    for shard in folder.glob("model*.safetensors"):
        state |= load_file(shard)
    _take_neuron_ids(state, model)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise InputError(f"{folder} does not fit the model: {str(error).splitlines()[-1].strip()}") from None
    # Of tied parameters one name is stored; the others are the same tensor.
    held = dict(model.state_dict())
    loaded = {held[name].data_ptr() for name in state if name in held}
    kept = () if routers else tuple(filter(is_router_parameter, missing))
    missing = [name for name in missing if name not in kept and held[name].data_ptr() not in loaded]
    if missing or unexpected:
        raise InputError(
            f"{folder} does not fit the model: {len(missing)} tensors missing, {len(unexpected)} unexpected, "
            f"e.g. {(missing + unexpected)[0]}"
        )


def restore_routers(folder: Path, model: nn.Module) -> None:
    """Load the routers of a checkpoint, and the names of its neurons, into a converted model.

    Raises:
        InputError: names or shapes do not fit.
    """
    state = load_file(folder / "switchable.safetensors")
    _take_neuron_ids(state, model)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise InputError(
            f"the routers of {folder} do not fit: {str(error).splitlines()[-1].strip()}"
        ) from None
    wrong = [*unexpected, *(name for name in missing if is_router_parameter(name))]
    if wrong:
        raise InputError(f"the routers of {folder} do not fit the model: {wrong[0]}")


def _take_neuron_ids(state: dict[str, Tensor], model: nn.Module) -> None:
    """Move the names of the neurons from a file's tensors to the layers."""
    for layer in layers_of(model):
        # Models of other origin have none: their neurons stand in their first order.
        layer.neuron_ids_F = state.pop(layer.name + NEURON_IDS, torch.arange(layer.d_ff))
