"""The probe of a study: the fixed tokens on which everything is measured.

A run keeps its probe (`probe.safetensors`, a few kB), so that it can be studied without its text. For other models the
probe is made of text: windows of equal length, without padding.

    run's folder, or text + tokenizer  ->  Probe  ->  measures.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from switchable.data.corpora import documents
from switchable.data.tokenizers import added_tokens
from switchable.errors import InputError
from switchable.files import whole_file
from switchable.infer.loss import objective_of_model, positions_of

Batch = Mapping[str, Tensor]
MIN_TOKENS = 64
"""Fewer tokens than this say nothing about thousands of neurons."""
ROWS = 8
"""Windows per batch of a probe made of text."""


@dataclass(frozen=True)
class Probe:
    """Fixed model inputs."""

    batches: list[Batch]
    """Model inputs: `input_ids` [B, S], and what else the model takes."""
    source: str
    """Where the text is from, for the reader of the report."""

    @property
    def tokens(self) -> int:
        """Tokens measured on."""
        return sum(batch["input_ids"].numel() for batch in self.batches)

    @property
    def sequence_length(self) -> int:
        """Tokens per sequence."""
        return self.batches[0]["input_ids"].shape[1]


def save_probe(path: Path, batches: Sequence[Batch]) -> None:
    """Keep a run's probe, the model inputs that the monitor measures on, in a file of its folder."""
    tensors = {
        f"{i}.{name}": value.detach().cpu().contiguous()
        for i, batch in enumerate(batches)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    with whole_file(path) as temporary:
        temporary.write_bytes(save(tensors))  # save_file makes it for its owner alone


def load_probe(path: Path, tokens: int | None = None) -> Probe:
    """Read the probe of a run: whole sequences of at most `tokens` tokens (None: all).

    Raises:
        InputError: no such file, a damaged one, or too few tokens.
    """
    batches: dict[int, dict[str, Tensor]] = {}
    try:
        tensors = load_file(path)
        tensors.pop("token_counts", None)  # which version 0.2 wrote
        for name, tensor in tensors.items():
            number, _, key = name.partition(".")
            batches.setdefault(int(number), {})[key] = tensor
        shown = first_tokens([batches[i] for i in sorted(batches)], tokens)
    except FileNotFoundError:
        raise InputError(
            f"{path.parent} keeps no probe ({path.name}); say on which text to measure with --text"
        ) from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}); say on which text to measure with --text") from None
    return _checked(Probe(shown, "the run's validation text"), tokens)


def first_tokens(batches: Sequence[Batch], tokens: int | None) -> list[Batch]:
    """Return whole sequences of at most `tokens` tokens together (all if None), at least one."""
    kept: list[Batch] = []
    left = sys.maxsize if tokens is None else tokens
    for batch in batches:
        rows, length = batch["input_ids"].shape
        take = min(rows, max(left // length, 0 if kept else 1))
        if take:
            kept.append({key: value[:take] for key, value in batch.items()})
            left -= take * length
        if take < rows:
            break
    return kept


def probe_from_text(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, model: nn.Module, tokens: int, length: int
) -> Probe:
    """Make a probe of text.

    A sequence-to-sequence model reads the first half of each window and is given the second half to predict. `sources`
    are as for training (none: the Python installation's own source files), `tokens` are wanted in all, and `length` of
    them in a sequence, which is cut to what the model can take.

    Raises:
        InputError: the text holds too few tokens, or the tokenizer is not the model's.
    """
    config = model.config
    length = min(length, positions_of(model) or length)
    ids = _token_ids(documents(sources), tokenizer, tokens)
    vocab_size = int(getattr(config, "vocab_size", 0)) or len(tokenizer)
    if ids.numel() and int(ids.max()) >= vocab_size:
        raise InputError(
            f"the tokenizer has a token {int(ids.max())}, but the model only {vocab_size}; "
            "give the model's own tokenizer with --tokenizer"
        )
    rows = min(tokens, ids.numel()) // length
    where = ", ".join(sources) or "the Python installation's own source files"
    if rows * length < MIN_TOKENS:
        raise InputError(
            f"{where} holds {ids.numel()} tokens, {rows} sequences of {length}; measuring needs at least "
            f"{MIN_TOKENS} tokens: give more text with --text, or a shorter --sequence-length"
        )
    before = added_tokens(tokenizer)[0] if objective_of_model(model) == "causal" else []
    leading = torch.tensor(before, dtype=torch.long).expand(rows, -1)
    text = ids[: rows * (length - len(before))].view(rows, -1)
    two_sides = bool(getattr(config, "is_encoder_decoder", False))
    windows = torch.split(torch.hstack([leading, text]), ROWS)
    return _checked(Probe([_inputs(piece, two_sides) for piece in windows], where), tokens)


def _inputs(ids_BS: Tensor, two_sides: bool) -> Batch:
    if not two_sides:
        return {"input_ids": ids_BS}
    half = ids_BS.shape[1] // 2
    return {"input_ids": ids_BS[:, :half].contiguous(), "decoder_input_ids": ids_BS[:, half:].contiguous()}


def _token_ids(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, wanted: int) -> Tensor:
    ids: list[int] = []
    for text in texts:
        # Longer texts than needed are cut: a token is rarely more than a few characters.
        ids += tokenizer(text[: 16 * wanted], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= wanted:
            break
    return torch.tensor(ids[:wanted], dtype=torch.long)


def _checked(probe: Probe, wanted: int | None) -> Probe:
    if probe.tokens < MIN_TOKENS or (wanted is not None and wanted < MIN_TOKENS):
        raise InputError(
            f"a probe of {min(probe.tokens, wanted or probe.tokens)} tokens is too small for the measures; "
            f"use at least {MIN_TOKENS} tokens (--probe-tokens, or more text with --text)"
        )
    return probe
