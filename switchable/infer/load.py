"""From a folder to a model in either mode: a run, one of its checkpoints, or an exported model."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from switchable.config import RunConfig, from_dict, read_yaml
from switchable.data.tokenizers import check_fits
from switchable.errors import InputError
from switchable.ffn.builders import model_of
from switchable.ffn.convert import convert, layers_of
from switchable.switching.config import SwitchConfig
from switchable.train.checkpoint import restore_model, verify
from switchable.train.rundir import RunDir


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
    damage = verify(chosen)
    if damage is not None:
        raise InputError(f"{chosen} is damaged ({damage}); name another checkpoint of the run")
    described = json.loads((chosen / "switchable.json").read_text(encoding="utf-8"))
    # Only the shape: every weight is then read from the verified files.
    model = model_of(AutoConfig.from_pretrained(chosen, local_files_only=True))
    convert(model, SwitchConfig(num_experts=described["num_experts"], experts_per_token=1))
    restore_model(chosen, model)
    for layer in layers_of(model):
        stored = described["layers"][layer.name]
        layer.expert_gate = described.get("gate", "unit")
        layer.set_experts_per_token(stored["experts_per_token"])
        layer.takes_part = stored["takes_part"]
    tokenizer = load_tokenizer_of(chosen)
    if tokenizer is not None:
        check_fits(tokenizer, model.get_input_embeddings().weight.shape[0], chosen)  # type: ignore[operator]
    return model.eval(), tokenizer


def run_config(folder: Path) -> RunConfig | None:
    """Return the configuration of the run that a folder is, or lies in (as a checkpoint); None if there is none."""
    for place in (folder, folder.parent, folder.parent.parent):
        if RunDir(place).config.is_file():
            return from_dict(read_yaml(RunDir(place).config), str(RunDir(place).config))
    return None


def find_model(folder: Path) -> Path:
    """Return the folder of weights that `folder` stands for.

    Raises:
        InputError: there is none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; give the folder of a run, e.g. runs/demo")
    if (folder / "switchable.json").is_file():
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
