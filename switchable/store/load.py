"""From a folder to a model in either mode: a run, one of its checkpoints, or an exported model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from switchable.data.tokenizers import check_fits
from switchable.errors import InputError
from switchable.options import checked
from switchable.store.contents import own_tensors
from switchable.store.experts import restore_experts
from switchable.store.find import find_model, load_tokenizer_of
from switchable.store.folders import MANIFEST, check_whole
from switchable.store.pretrained import load_config, load_pretrained


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
    model = load_pretrained(chosen, load_config(chosen, **changes), kind)
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
