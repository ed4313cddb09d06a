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
from switchable.errors import InputError
from switchable.infer.loss import positions_of
from switchable.infer.sampling import Sampling


def check_prompt(objective: str, tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """Refuse a prompt without a blank for a masked language model.

    Raises:
        InputError: says what the mask token is.
    """
    if objective == "masked" and str(tokenizer.mask_token) not in prompt:
        raise InputError(
            f"a masked language model fills blanks and does not continue text; put {tokenizer.mask_token} "
            f"into the prompt, not only {prompt!r}"
        )


@torch.no_grad()
def fill_masks(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling) -> str:
    """Return the prompt with a token in place of each mask, all drawn at once.

    Raises:
        InputError: the prompt has no mask, or more tokens than the model has positions.
    """
    check_prompt("masked", tokenizer, prompt)
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=device)
    positions = positions_of(model)
    if positions is not None and ids.shape[1] > positions:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens and the model {positions} positions; shorten it"
        )
    masked = ids == tokenizer.mask_token_id
    logits_NV = model(input_ids=ids).logits[masked].float()
    logits_NV[:, tokenizer.all_special_ids] = -torch.inf
    ids[masked] = sampling.draw(logits_NV)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def fill_spans(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling) -> str:
    """Return the prompt with a span of text in place of each sentinel.

    Args:
        model: an encoder-decoder model.
        tokenizer: its tokenizer, with sentinels.
        prompt: text, with or without sentinels.
        sampling: how tokens are drawn, and how many at most, sentinels included.

    Raises:
        InputError: the tokenizer has no sentinels.
    """
    sentinels = sentinel_ids(tokenizer)
    if not sentinels:
        raise InputError(
            "the tokenizer has no sentinels (<extra_id_0>, ...): this model has no blanks to fill"
        )
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not set(ids) & set(sentinels):
        ids = [*ids, sentinels[0]]
    input_ids = torch.tensor([[*ids, tokenizer.eos_token_id]], device=next(model.parameters()).device)
    written = sampling.generate(model, input_ids, sampling.max_new_tokens).tolist()
    spans = dict(_spans(written[1:], sentinels, {tokenizer.eos_token_id, tokenizer.pad_token_id}))
    filled = [token for i in ids for token in (spans.get(i, []) if i in sentinels else [i])]
    return str(tokenizer.decode(filled, skip_special_tokens=True))


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
