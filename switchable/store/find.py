"""What a folder stands for: weights, their tokenizer, the run that they are of. Nothing of it is opened here."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from switchable.config import RunConfig, read_stored
from switchable.data.tokenizers import load_tokenizer
from switchable.errors import InputError
from switchable.store.folders import MANIFEST
from switchable.store.rundir import RunDir


def run_config(folder: Path) -> RunConfig | None:
    """Return the configuration of the run that a folder is, or lies in (as a checkpoint); None if there is none."""
    for place in (folder, *folder.absolute().parents[:2]):
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
    raise InputError(f"{folder} holds no finished run and no checkpoint; train one with switchable pretrain")


def load_tokenizer_of(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model, from its folder or the run that it lies in; None if there is none."""
    for place in (folder, folder.absolute().parent.parent / "tokenizer"):
        if (place / "tokenizer_config.json").is_file():
            return load_tokenizer(place)
    return None
