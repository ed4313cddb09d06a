"""Text from either mode of one model, through transformers' `generate` with its KV cache."""

from __future__ import annotations

import sys
import time
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from switchable.ffn.convert import set_mode
from switchable.infer.fill import check_prompt, fill_masks, fill_spans, prompt_ids
from switchable.infer.loss import objective_of_model, positions_of
from switchable.infer.sampling import Sampling


class Written(NamedTuple):
    """A prompt and what a model has written to it."""

    text: str
    tokens: int
    """Those that are new."""
    seconds: float
    """Reading the prompt included."""


def write(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    mode: str = "dense",
    experts_per_token: int | None = None,
    sampling: Sampling | None = None,
    mass: float | None = None,
) -> Written:
    """Return the prompt with what the model writes after it, or into its blanks (see `fill.py`), and how fast it was.

    Args:
        model: a language model: causal, masked, or encoder-decoder; converted, for sparse mode.
        tokenizer: its tokenizer.
        prompt: text to continue, which may be empty; for a masked model, text with masks.
        mode: `"dense"` or `"sparse"`.
        experts_per_token: K in sparse mode; None keeps the model's own.
        sampling: how tokens are drawn.
        mass: in sparse mode, as for `set_mode`.

    Raises:
        InputError: impossible mode, K or mass, no room for a new token within the positions, a prompt that is not
            UTF-8, or no mask in that of a masked model.
    """
    sampling = sampling or Sampling()
    objective = objective_of_model(model)
    check_prompt(objective, tokenizer, prompt, positions_of(model))
    set_mode(model, mode, experts_per_token, mass)
    torch.manual_seed(sampling.seed)
    ways = {"masked": fill_masks, "span": fill_spans, "causal": _continue}
    begin = time.perf_counter()
    text, tokens = ways[objective](model, tokenizer, prompt, sampling)
    return Written(text, tokens, time.perf_counter() - begin)


def _continue(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling
) -> tuple[str, int]:
    ids, positions = prompt_ids(tokenizer, prompt), positions_of(model)
    room = min(sampling.max_new_tokens, sys.maxsize if positions is None else positions - len(ids))
    input_ids = torch.tensor([ids], device=next(model.parameters()).device)
    written = sampling.generate(model, input_ids, room, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(written, skip_special_tokens=True)), len(written) - len(ids)
