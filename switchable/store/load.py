"""From a folder to a model in either mode: a run, one of its checkpoints, or an exported model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from switchable.config import RunConfig, read_stored
from switchable.data.tokenizers import check_fits, load_tokenizer
from switchable.errors import InputError
from switchable.options import checked
from switchable.store.contents import own_tensors
from switchable.store.experts import restore_experts
from switchable.store.folders import MANIFEST, check_whole
from switchable.store.pretrained import NEW_HEAD, load_config, load_pretrained
from switchable.store.rundir import RunDir


def load(
    folder: Path | str, kind: Any = None, **changes: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model with its routers, in dense mode, in evaluation mode, on the CPU.

    A plain Hugging Face checkpoint is opened as it is, without switchable FFNs, which is logged as a warning.

    Args:
        folder: a run's folder (its `final` model, else its newest checkpoint), a checkpoint's, an export's, or what
            `save_pretrained` or transformers' Trainer wrote.
        kind: a class of transformers, e.g. `AutoModelForSequenceClassification`, whose new head is drawn at random;
            None: the class that was saved.
        changes: settings of its config, e.g. `num_labels=3`.

    Returns:
        The model, and its tokenizer if there is one.

    Raises:
        InputError: no such folder, nothing to load in it, a damaged file, or a tokenizer that does not fit.
    """
    chosen = find_model(Path(checked("folder", folder, Path | str)))
    tokenizer = load_tokenizer_of(chosen)
    if own_tensors(chosen, "switchable").is_file() or (chosen / MANIFEST).is_file():
        check_whole(chosen)
    new = "" if kind is None else NEW_HEAD
    model = load_pretrained(chosen, load_config(chosen, **changes), kind, new)
    if not restore_experts(chosen, model):
        logging.getLogger(__name__).warning(
            "%s is a plain dense model; make it switchable with: switchable convert %s --data TEXT --out DIR",
            *(folder, folder),
        )
    if tokenizer is not None:
        check_fits(tokenizer, model.get_input_embeddings().weight.shape[0], chosen)
    return model.eval(), tokenizer


def load_with_tokenizer(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return what `load` does, for jobs that cannot do without the tokenizer; raise InputError if there is none."""
    model, tokenizer = load(folder)
    if tokenizer is None:
        raise InputError(f"{folder} holds no tokenizer; give the folder of the run instead")
    return model, tokenizer


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
    """Return the folder of weights that `folder` stands for; raise InputError if there is none."""
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; give the folder of a run, e.g. runs/demo")
    rundir = RunDir(folder)
    for place in (folder, rundir.final):
        if any((place / name).is_file() for name in ("config.json", MANIFEST)):
            return place
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
