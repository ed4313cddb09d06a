"""Text from either mode of one model, through transformers' `generate` with its KV cache."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from switchable.errors import InputError
from switchable.ffn.convert import set_mode
from switchable.infer.fill import fill_masks, fill_spans
from switchable.infer.loss import objective_of_model, positions_of
from switchable.infer.sampling import Sampling


def generate_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    mode: str = "dense",
    experts_per_token: int | None = None,
    sampling: Sampling | None = None,
) -> str:
    """Return the prompt and what the model writes after it, or into its blanks (see `fill.py`).

    Args:
        model: a converted language model: causal, masked, or encoder-decoder.
        tokenizer: its tokenizer.
        prompt: text to continue, which may be empty; for a masked model, text with masks.
        mode: `"dense"` or `"sparse"`.
        experts_per_token: K in sparse mode; None keeps the model's own.
        sampling: how tokens are drawn.

    Raises:
        InputError: impossible mode or K, no room for a new token within the model's positions, or no mask in the
            prompt of a masked model.
    """
    sampling = sampling or Sampling()
    set_mode(model, mode, experts_per_token)
    torch.manual_seed(sampling.seed)
    objective = objective_of_model(model)
    if objective == "masked":
        return fill_masks(model, tokenizer, prompt, sampling)
    write = fill_spans if objective == "span" else _continue
    return write(model, tokenizer, prompt, sampling)


def _continue(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling) -> str:
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    positions = positions_of(model) or sys.maxsize
    room = min(sampling.max_new_tokens, positions - len(ids))
    if room < 1:
        raise InputError(
            f"the prompt has {len(ids)} tokens and the model {positions} positions: there is no room for an answer; "
            f"use a prompt of at most {positions - 1} tokens"
        )
    input_ids = torch.tensor([ids], device=next(model.parameters()).device)
    written = sampling.generate(model, input_ids, room, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(written, skip_special_tokens=True))
