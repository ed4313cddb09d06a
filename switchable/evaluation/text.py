"""Loss of a model on text: per predicted token, and for causal models per byte of text.

A causal model reads the documents one after the other, each followed by the end of text, in windows that overlap by
one token, so that every token is predicted exactly once:

    bits per byte = total loss / ln 2 / UTF-8 bytes            perplexity = exp(total loss / tokens)

Neither depends on how the text is cut into tokens in the first case; both depend on the window's length, because a
window's first tokens have little before them. Masked and span models are measured on what their objective hides, the
same places every time: a loss per predicted token, from which no bits per byte follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from switchable.data.batches import validation_batches
from switchable.data.encoding import encode
from switchable.data.objectives import Objective
from switchable.data.tokenizers import end_of_text
from switchable.errors import InputError
from switchable.evaluation.scores import Score
from switchable.evaluation.ways import Way, multiplying
from switchable.infer.loss import shifts_labels
from switchable.progress import progress_bar

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class TokenisedText:
    """Documents as tokens."""

    ids: npt.NDArray[np.int64]  # an end of text, then each document and its end of text: [tokens + 1]
    text_bytes: int  # UTF-8 bytes of the documents


def tokenise(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, most_tokens: int | None = None
) -> TokenisedText:
    """Return documents as tokens, so many whole ones that there are `most_tokens`; InputError if there is no text."""
    end = np.array([end_of_text(tokenizer).id], np.int64)
    pieces, text_bytes, tokens = [end], 0, 0
    for text in documents:
        (ids,) = encode(tokenizer, [text])
        pieces += [ids.astype(np.int64), end]
        text_bytes += len(text.encode())
        tokens += len(ids) + 1
        if most_tokens is not None and tokens >= most_tokens:
            break
    if text_bytes == 0:
        raise InputError("there is no text to evaluate on; give other files")
    return TokenisedText(np.concatenate(pieces), text_bytes)


def text_scores(
    model: nn.Module, text: TokenisedText, objective: Objective, sequence_length: int, found_ways: Iterable[Way],
    batch_size: int, progress: bool = False,
) -> list[Score]:  # fmt: skip
    """Return the loss (nats per predicted token) in each way; of causal models perplexity and bits per byte too.

    A window of a causal model has `sequence_length` tokens; `batch_size` windows are computed at a time.
    """
    causal = objective.name == "causal"
    if causal:
        leading = getattr(objective, "leading", ())
        batches = list(overlapping_windows(text.ids, sequence_length, batch_size, leading))
    else:
        batches = validation_batches(text.ids[1:], objective, batch_size, len(text.ids))
    scores = []
    for way in found_ways:
        with multiplying(model, way):
            bar = progress_bar(f"text, {way}", "batch", show=progress, over=batches)
            nats, tokens = _per_window(model, bar)
        loss, stderr = float(nats.sum() / tokens.sum()), _ratio_stderr(nats, tokens)
        found = {f"loss ({objective.unit})": (loss, stderr)}
        if causal:
            perplexity = math.exp(min(loss, 700.0))
            per_byte = float(tokens.sum()) / math.log(2) / text.text_bytes
            found["perplexity"] = (perplexity, perplexity * stderr)
            found["bits per byte"] = (loss * per_byte, stderr * per_byte)
        scores += [
            Score("text", metric, way, value, None if math.isnan(error) else error, len(nats))
            for metric, (value, error) in found.items()
        ]
    return scores


def overlapping_windows(
    ids: npt.NDArray[np.int64], sequence_length: int, batch_size: int, leading: Sequence[int] = ()
) -> Iterator[Batch]:
    """Yield `input_ids` and `labels` [B, S] such that every token but the first is predicted once.

    The token before a window's first predicted one is in it, or in place of that the model's begin of text, `leading`.
    """
    step = sequence_length - (len(leading) or 1)
    starts = list(range(0, len(ids) - 1, step))
    for first in range(0, len(starts), batch_size):
        rows = [
            np.concatenate([leading or ids[start : start + 1], ids[start + 1 : start + 1 + step]])
            for start in starts[first : first + batch_size]
        ]
        inputs = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        labels = torch.full_like(inputs, -100)
        for i, row in enumerate(rows):
            inputs[i, : len(row)] = labels[i, : len(row)] = torch.from_numpy(row)
        labels[:, : len(leading)] = -100
        yield {"input_ids": inputs, "labels": labels}


@torch.no_grad()
def _per_window(
    model: nn.Module, batches: Iterable[Batch]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the loss (nats) and the number of predicted tokens of every window."""
    first = 1 if shifts_labels(model) else 0
    device = next(model.parameters()).device
    nats, tokens = [], []
    for batch in batches:
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        # An encoder-decoder model makes its decoder's inputs of the labels.
        logits = model(**inputs).logits if first == 0 else model(input_ids=inputs["input_ids"]).logits[:, :-1]
        labels = inputs["labels"][:, first:]
        losses = functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        nats.append(losses.double().sum(1).cpu().numpy())
        tokens.append((labels != -100).sum(1).double().cpu().numpy())
    return np.concatenate(nats), np.concatenate(tokens)


def _ratio_stderr(nats: npt.NDArray[np.float64], tokens: npt.NDArray[np.float64]) -> float:
    """Return the standard error of sum(nats) / sum(tokens) over windows; NaN of one."""
    if len(nats) < 2:
        return math.nan
    residuals = nats - tokens * (nats.sum() / tokens.sum())
    return float(residuals.std(ddof=1) / tokens.mean() / math.sqrt(len(nats)))
