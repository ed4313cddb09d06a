"""Text from either mode of one model: by our own decoding path, or through transformers' `generate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from switchable.ffn.convert import set_mode
from switchable.infer.decoding.decoder import Decoder, why_not
from switchable.infer.decoding.loop import decode, ends_of, why_not_written
from switchable.infer.decoding.matrices import WIDTHS, Stored
from switchable.infer.decoding.rounded import round_weights
from switchable.infer.fill import check_prompt, fill_masks, fill_spans, prompt_ids
from switchable.infer.loss import objective_of_model, positions_of
from switchable.infer.sampling import Sampling
from switchable.infer.text import EndOfTexts, GrowingText, padded


def why_not_ours(model: nn.Module, mode: str, sampling: Sampling) -> str | None:
    """Return None, or what keeps our own decoding from a model in a mode, or from such sampling: follows "it"."""
    return why_not(model, mode) or why_not_written(model, sampling)


def decoding(
    model: nn.Module, weights: str, mode: str, sampling: Sampling, stored: Stored | None = None
) -> tuple[nn.Module | Decoder, str | None]:
    """Return what decodes a model with weights of a width: a decoder, or the model itself, and then why.

    Args:
        model: its weights are taken over, see `Decoder`.
        weights: `"float32"`, `"bfloat16"` or `"int8"`. Without a decoder, 8 bits are a rounding of wider numbers.
        mode: that it will be in.
        sampling: how tokens will be drawn.
        stored: reads matrices in 8 bits from a file, for a model of which `why_not_ours` says None.

    Raises:
        InputError: this machine cannot multiply weights of this width.
    """
    reason = None if stored is not None else why_not_ours(model, mode, sampling)
    if reason is None:
        return Decoder(model, weights, stored), None
    round_weights(model, weights)
    return model, reason


def width_of(precision: str) -> str:
    """Return the width of weights that stand for a precision: nothing here multiplies float16, which is widened."""
    return precision if precision in WIDTHS else "float32"


class Written(NamedTuple):
    """A prompt and what a model has written to it."""

    text: str
    tokens: int
    """Those that are new."""
    seconds: float
    """Reading the prompt included, compiling not; of several prompts, all of them."""


def write(
    model: nn.Module | Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    mode: str = "dense",
    experts_per_token: int | None = None,
    sampling: Sampling | None = None,
    **how: Any,
) -> Written:
    """Return the prompt with what the model writes after it, or into its blanks; `how`: see `write_each`."""
    return write_each(model, tokenizer, [prompt], mode, experts_per_token, sampling, **how)[0]


def write_each(
    model: nn.Module | Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    mode: str = "dense",
    experts_per_token: int | None = None,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    show: Callable[[str], object] = lambda _: None,
) -> list[Written]:
    """Return prompts with what the model writes after each, or into its blanks (see `fill.py`), and how fast it was.

    Args:
        model: a language model: causal, masked, or encoder-decoder; converted, for sparse mode; or a decoder of one.
        tokenizer: its tokenizer.
        prompts: texts to continue, which may be empty; for a masked model, text with masks.
        mode: `"dense"` or `"sparse"`.
        experts_per_token: K in sparse mode; None keeps the model's own.
        sampling: how tokens are drawn.
        stop: strings at which a text ends; they are not part of it. Causal models only.
        show: gets the text of a single prompt as it grows, the prompt first.

    Raises:
        InputError: impossible mode or K, no room for a new token within the model's positions, a prompt that is not
            UTF-8, or no mask in that of a masked model.
    """
    sampling = sampling or Sampling()
    module: nn.Module = model.model if isinstance(model, Decoder) else model
    objective = objective_of_model(module)
    for prompt in prompts:
        check_prompt(objective, tokenizer, prompt, positions_of(module))
    set_mode(module, mode, experts_per_token)
    torch.manual_seed(sampling.seed)
    if isinstance(model, Decoder):
        model.warm(len(prompts))
    begin = time.perf_counter()
    if objective == "causal":
        ends = ends_of(module)
        shows = show if len(prompts) == 1 else lambda _: None
        texts = [GrowingText(tokenizer, prompt_ids(tokenizer, each), stop, ends, shows) for each in prompts]
        _continue(model, tokenizer, texts, sampling)
        found = [(text.close(), text.new_tokens) for text in texts]
    else:
        fill = fill_masks if objective == "masked" else fill_spans
        found = [fill(module, tokenizer, prompt, sampling) for prompt in prompts]
        if len(prompts) == 1:
            show(found[0][0])
    seconds = time.perf_counter() - begin
    return [Written(text, tokens, seconds) for text, tokens in found]


def _continue(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[GrowingText], sampling: Sampling
) -> None:
    longest = max(len(text.ids) for text in texts)
    positions = positions_of(model.model if isinstance(model, Decoder) else model)
    room = min(sampling.max_new_tokens, sys.maxsize if positions is None else positions - longest)
    if isinstance(model, Decoder):
        decode(model, texts, room, sampling)
        return
    pad, device = tokenizer.eos_token_id, next(model.parameters()).device
    ids_BS, pads_B = (each.to(device) for each in padded(texts, pad or 0))
    mask_BS = (torch.arange(longest, device=device) >= pads_B.unsqueeze(1)).long()
    sampling.generate(model, ids_BS, room, mask_BS, pad_token_id=pad, stopping_criteria=[EndOfTexts(texts)])
