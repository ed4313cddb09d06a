"""Text from models that fill blanks: masks (BERT) and spans (T5).

masked    "the <mask> sat"               each mask becomes the token that the model finds there
span      "the <extra_id_0> sat"         each sentinel becomes the span that the decoder writes for it;
                                         a prompt without one is continued: one is put at its end
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from switchable.data.objectives.spans import sentinel_ids
from switchable.data.tokenizers import added_tokens, end_of_text
from switchable.errors import InputError
from switchable.infer.sampling import Sampling


def check_prompt(
    objective: str, tokenizer: PreTrainedTokenizerBase, prompt: str, positions: int | None
) -> None:
    """Refuse a prompt that is not text, has no blank for a masked language model, or is too long for the model.

    Raises:
        InputError: says where it stops being text, what the mask token is, or how many tokens there may be.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the prompt is not UTF-8 behind its first {error.start} characters ({prompt!a}); give it in UTF-8"
        ) from None
    if objective == "masked" and str(tokenizer.mask_token) not in prompt:
        raise InputError(
            f"a masked language model fills blanks and does not continue text; put {tokenizer.mask_token} "
            f"into the prompt, not only {prompt!r}"
        )
    if objective == "span" or positions is None:
        return
    ids = prompt_ids(tokenizer, prompt) if objective == "causal" else tokenizer(prompt)["input_ids"]
    tokens, most = len(ids), positions - (objective == "causal")
    if tokens > most:
        answer = ": there is no room for an answer" if objective == "causal" else ""
        raise InputError(
            f"the prompt has {tokens} tokens and the model {positions} positions{answer}; "
            f"use a prompt of at most {most} tokens"
        )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return a prompt's tokens for a causal model: with what goes before a text, without what goes behind it."""
    leading, _ = added_tokens(tokenizer)
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if ids[: len(leading)] != leading:
        ids = [*leading, *ids]
    return ids or [end_of_text(tokenizer).id]


@torch.no_grad()
def fill_masks(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling
) -> tuple[str, int]:
    """Return the prompt with a token in place of each mask, all drawn at once, and their number."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=next(model.parameters()).device)
    masked = ids == tokenizer.mask_token_id
    logits_NV = model(input_ids=ids).logits[masked].float()
    logits_NV[:, tokenizer.all_special_ids] = -torch.inf
    ids[masked] = sampling.draw(logits_NV)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True)), int(masked.sum())


def fill_spans(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling
) -> tuple[str, int]:
    """Return the prompt with a span of text in place of each sentinel, and the number of tokens written.

    Args:
        model: an encoder-decoder model.
        tokenizer: its tokenizer, with sentinels.
        prompt: text, with or without sentinels.
        sampling: how tokens are drawn, and how many at most, sentinels included.

    Raises:
        InputError: the tokenizer has no sentinels.
    """
    if not (sentinels := sentinel_ids(tokenizer)):
        raise InputError("the tokenizer has no sentinels (<extra_id_0> ...): the model has no blanks to fill")
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not set(ids) & set(sentinels):
        ids = [*ids, sentinels[0]]
    input_ids = torch.tensor([[*ids, tokenizer.eos_token_id]], device=next(model.parameters()).device)
    written = sampling.generate(model, input_ids, sampling.max_new_tokens)[0].tolist()
    spans = dict(_spans(written[1:], sentinels, {tokenizer.eos_token_id, tokenizer.pad_token_id}))
    filled = [token for i in ids for token in (spans.get(i, []) if i in sentinels else [i])]
    return str(tokenizer.decode(filled, skip_special_tokens=True)), len(written) - 1


def _spans(
    written: Sequence[int], sentinels: Sequence[int], ends: set[int | None]
) -> Iterator[tuple[int, list[int]]]:
    """Yield (sentinel, the tokens after it) of a decoder's output; what comes before any belongs to the first."""
    sentinel, span = sentinels[0], list[int]()
    for token in written:
        if token in ends:
            break
        if token in sentinels:
            if span:
                yield sentinel, span
            sentinel, span = token, []
        else:
            span.append(token)
    yield sentinel, span
