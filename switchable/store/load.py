"""From a folder to a model in either mode: a run, one of its checkpoints, or an exported model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from switchable.config import RunConfig, read_stored
from switchable.data.tokenizers import check_fits
from switchable.errors import InputError
from switchable.ffn.builders import class_of, name_the_loss
from switchable.ffn.description import make_switchable
from switchable.store.checkpoint import quiet_transformers, restore_routers, verify
from switchable.store.rundir import RunDir
from switchable.store.sparse_folder import METHOD, register


def load_switchable(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """Load a model with its routers, in dense mode, in evaluation mode, on the CPU.

    Args:
        folder: a run's folder (its `final` model, else its newest checkpoint), or a checkpoint's.

    Returns:
        The model, and its tokenizer if there is one.

    Raises:
        InputError: no such folder, nothing to load in it, a damaged file, or a tokenizer that does not fit.
    """
    chosen = find_model(folder)
    if is_sparse_export(chosen):
        return _open_sparse_export(chosen), load_tokenizer_of(chosen)
    damage = verify(chosen)
    if damage is not None:
        raise InputError(f"{chosen} is damaged ({damage}); name another checkpoint of the run")
    model = load_pretrained(chosen)
    make_switchable(model, json.loads((chosen / "switchable.json").read_text(encoding="utf-8")))
    restore_routers(chosen, model)
    tokenizer = load_tokenizer_of(chosen)
    if tokenizer is not None:
        check_fits(tokenizer, model.get_input_embeddings().weight.shape[0], chosen)  # type: ignore[operator]
    return model.eval(), tokenizer


def load_pretrained(folder: Path, config: PreTrainedConfig | None = None) -> nn.Module:
    """Load a plain Hugging Face checkpoint as the class that its config names, on the CPU, in its own dtype.

    Nothing is downloaded, no code of the folder is run, and no pickled weights are read.

    Args:
        folder: with `config.json` and `*.safetensors`.
        config: use this configuration instead of the folder's.

    Raises:
        InputError: no such folder, no weights, or weights that do not fit the config.
    """
    if config is None:
        config = load_config(folder)
    if not list(folder.glob("*.safetensors")):
        pickled = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
        raise InputError(
            f"{folder} holds no weights (*.safetensors)"
            + (
                f", only pickled ones ({', '.join(pickled)}), which we never open: they can run code. Load the model "
                "where you trust it and save it again with save_pretrained"
                if pickled
                else "; give the folder of a whole checkpoint"
            )
        )
    try:
        with quiet_transformers():
            model, found = class_of(config).from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    _check_complete(folder, found)
    name_the_loss(model)
    return cast(nn.Module, model.eval())


def _check_complete(folder: Path, found: Mapping[str, Any]) -> None:
    """Refuse weights that are missing, of another shape, or belong to layers that the config does not have."""
    wrong = {
        "missing": sorted(found["missing_keys"]),
        "of another shape": sorted(str(entry[0]) for entry in found["mismatched_keys"]),
        "of layers that the config does not have": sorted(
            key for key in found["unexpected_keys"] if re.search(r"\.\d+\.", key)
        ),
    }
    problems = [f"{len(names)} {what}, e.g. {names[0]}" for what, names in wrong.items() if names]
    if problems:
        raise InputError(f"the tensors of {folder} do not fit its config.json: {'; '.join(problems)}")


def load_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a checkpoint.

    Raises:
        InputError: no such folder, or no readable `config.json` of a model that transformers knows.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json; give the folder of a Hugging Face checkpoint")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'config.json'} cannot be used: {' '.join(str(error).split())[:300]}"
        ) from None


def is_sparse_export(folder: Path) -> bool:
    """Return whether a folder is what `switchable export --to sparse` writes."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _open_sparse_export(folder: Path) -> nn.Module:
    register()
    return load_pretrained(folder)


def run_config(folder: Path) -> RunConfig | None:
    """Return the configuration of the run that a folder is, or lies in (as a checkpoint); None if there is none."""
    for place in (folder, folder.parent, folder.parent.parent):
        if RunDir(place).config.is_file():
            return read_stored(RunDir(place).config)
    return None


def find_model(folder: Path) -> Path:
    """Return the folder of weights that `folder` stands for.

    Raises:
        InputError: there is none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; give the folder of a run, e.g. runs/demo")
    if (folder / "switchable.json").is_file() or is_sparse_export(folder):
        return folder
    rundir = RunDir(folder)
    if (rundir.final / "switchable.json").is_file():
        return rundir.final
    if rundir.steps():
        return rundir.checkpoint(rundir.steps()[-1])
    raise InputError(
        f"{folder} holds neither a finished run nor a checkpoint; train one with switchable pretrain"
    )


def load_tokenizer_of(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model, from its folder or the run that it lies in; None if there is none."""
    for place in (folder, folder.parent.parent / "tokenizer"):
        if (place / "tokenizer_config.json").is_file():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, local_files_only=True)
            return tokenizer
    return None
