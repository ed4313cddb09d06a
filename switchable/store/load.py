"""From a folder to a model in either mode: a run, one of its checkpoints, or an exported model."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from switchable.config import RunConfig, read_stored
from switchable.data.tokenizers import check_fits, load_tokenizer
from switchable.errors import InputError
from switchable.ffn.description import make_switchable
from switchable.files import read_json
from switchable.options import checked
from switchable.store.folders import MANIFEST, verify
from switchable.store.pretrained import load_pretrained
from switchable.store.restore import restore_routers
from switchable.store.rundir import RunDir
from switchable.store.sparse_folder import METHOD, register


def load(folder: Path | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model with its routers, in evaluation mode, on the CPU: a sparse export in sparse mode, others in dense.

    A plain Hugging Face checkpoint is opened as it is, without switchable FFNs, which is logged as a warning.

    Args:
        folder: a run's folder (its `final` model, else its newest checkpoint), a checkpoint's, or an export's.

    Returns:
        The model, and its tokenizer if there is one.

    Raises:
        InputError: no such folder, nothing to load in it, a damaged file, or a tokenizer that does not fit.
    """
    chosen = find_model(Path(checked("folder", folder, Path | str)))
    tokenizer = load_tokenizer_of(chosen)
    if is_sparse_export(chosen):
        register()
        model = load_pretrained(chosen)
    elif is_plain(chosen):
        model = load_pretrained(chosen)
        logging.getLogger(__name__).warning(
            "%s is a plain dense model; make it switchable with: switchable convert %s --data TEXT --out DIR",
            *(folder, folder),
        )
    else:
        model = _load_ours(chosen)
    if tokenizer is not None:
        check_fits(tokenizer, model.get_input_embeddings().weight.shape[0], chosen)
    return model.eval(), tokenizer


def _load_ours(folder: Path) -> PreTrainedModel:
    """Load a model that `checkpoint.save` wrote, or a run."""
    damage = verify(folder)
    if damage is not None:
        raise InputError(f"{folder} is damaged ({damage}); name another checkpoint of the run")
    model = load_pretrained(folder)
    make_switchable(model, read_json(folder / "switchable.json"))
    restore_routers(folder, model)
    return model


def load_with_tokenizer(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return what `load` does, for jobs that cannot do without the tokenizer.

    Raises:
        InputError: there is none, or as `load`.
    """
    model, tokenizer = load(folder)
    if tokenizer is None:
        raise InputError(f"{folder} holds no tokenizer; give the folder of the run instead")
    return model, tokenizer


def is_sparse_export(folder: Path) -> bool:
    """Return whether a folder is what `switchable export --to sparse` writes."""
    try:
        return bool(read_json(folder / "config.json")["quantization_config"]["quant_method"] == METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_plain(folder: Path) -> bool:
    """Return whether a folder is a Hugging Face checkpoint with nothing of ours, as `switchable export --to dense`."""
    ours = ("switchable.json", MANIFEST)
    return (folder / "config.json").is_file() and not any((folder / name).is_file() for name in ours)


def run_config(folder: Path) -> RunConfig | None:
    """Return the configuration of the run that a folder is, or lies in (as a checkpoint); None if there is none."""
    for place in (folder, folder.parent, folder.parent.parent):
        if RunDir(place).config.is_file():
            return read_stored(RunDir(place).config)
    return None


def trained_precision(folder: Path) -> str | None:
    """Return the precision that the run of `run_config` multiplied in; None if there is no run."""
    config = run_config(folder)
    return None if config is None else config.train.precision


def find_model(folder: Path) -> Path:
    """Return the folder of weights that `folder` stands for.

    Raises:
        InputError: there is none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; give the folder of a run, e.g. runs/demo")
    if (folder / "switchable.json").is_file() or is_plain(folder):
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
            return load_tokenizer(place)
    return None
