"""Token after token of one or more sequences, until each has ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from switchable.infer.decoding.decoder import Decoder
from switchable.infer.sampling import Sampling
from switchable.infer.text import GrowingText, padded

KNOWN = {
    "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache",
    "do_sample", "temperature", "top_k", "max_length", "max_new_tokens", "output_attentions", "output_hidden_states",
}  # fmt: skip
"""Settings of a generation config that change nothing here: we give our own, or they do not touch the tokens."""
OF_DRAWING = {"top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
"""Those that change nothing where the most probable token is taken."""


def why_not_written(model: Any, sampling: Sampling) -> str | None:
    """Return None, or which settings of a model's generation config our loop does not know: words that follow "it"."""
    config = getattr(model, "generation_config", None)
    given = {} if config is None else config.to_diff_dict()
    unknown = sorted({name for name, value in given.items() if value is not None} - KNOWN)
    if sampling.greedy:
        unknown = [name for name in unknown if name not in OF_DRAWING]
    return f"asks for {', '.join(unknown)} in its generation config" if unknown else None


def ends_of(model: nn.Module) -> list[int]:
    """Return the tokens at which a model's texts end."""
    found: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if found is None else [found] if isinstance(found, int) else list(found)


@torch.inference_mode()
def decode(decoder: Decoder, texts: Sequence[GrowingText], most: int, sampling: Sampling) -> None:
    """Continue texts, each by `most` tokens at most, all together: prompts are padded on the left.

    Raises:
        InputError: the longest prompt and `most` are more than the model has positions.
    """
    ids_BS, pads_B = padded(texts)
    logits_BV = decoder.begin(ids_BS, pads_B, ids_BS.shape[1] + most)
    for left in range(most, 0, -1):
        tokens_B = sampling.draw(logits_BV)
        ended = [text.put(token) for text, token in zip(texts, tokens_B.tolist(), strict=True)]
        if all(ended) or left == 1:
            return
        logits_BV = decoder.next(tokens_B)
