"""Span corruption: cut spans out of the text, leave a sentinel in place of each, and write out what was cut.

    text      Thank you for inviting me to your party last week
    inputs    Thank you <extra_id_0> me to your party <extra_id_1> week </s>
    labels    <extra_id_0> for inviting <extra_id_1> last </s>

15 % of the text is cut, in spans of 3 tokens on average. Number and total length of spans are the same for every row,
so that all inputs have exactly `sequence_length` tokens and all labels one length too, without padding; how much text
that takes (more than `sequence_length`) is computed beforehand. Where the spans lie is drawn uniformly from all ways
to cut the two kinds of text into as many parts.

Source: Raffel et al. 2020 (T5), section 3.1.4; lengths as their published code computes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from switchable.arrays import Bools, Floats, Ints
from switchable.data.config import ObjectiveConfig
from switchable.data.objectives.chance import uniforms
from switchable.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTINEL = "<extra_id_{}>"


@dataclass(frozen=True)
class Lengths:
    """What a window of text becomes; all in tokens but `spans`."""

    noise: int  # tokens cut out
    spans: int
    inputs: int  # text left, one sentinel per span, and the end of sequence
    labels: int  # text cut out, one sentinel per span, and the end of sequence


def lengths(window: int, fraction: float, mean_span_length: float) -> Lengths:
    """Return what a window of text (tokens, at least 2) becomes."""
    noise = min(max(round(window * fraction), 1), window - 1)
    spans = min(max(round(noise / mean_span_length), 1), noise, window - noise)
    return Lengths(noise, spans, window - noise + spans + 1, noise + spans + 1)


def window_for(sequence_length: int, fraction: float, mean_span_length: float) -> int:
    """Return the most text (tokens) whose inputs have at most `sequence_length` tokens; 0 if none has."""
    window = 1
    while lengths(window + 1, fraction, mean_span_length).inputs <= sequence_length:
        window += 1
    return window if window > 1 else 0


@dataclass(frozen=True)
class SpanCorruption:
    """T5's objective on windows of W tokens."""

    window: int  # tokens of text in a sequence
    lengths: Lengths
    sentinels: Ints  # ids of the sentinels, the first span's first
    eos_id: int  # end of sequence, of inputs and labels
    name: ClassVar[str] = "span"
    unit: ClassVar[str] = "nats per token of the spans"

    @classmethod
    def build(
        cls, config: ObjectiveConfig, tokenizer: PreTrainedTokenizerBase, sequence_length: int
    ) -> SpanCorruption:
        """Return the objective for a tokenizer.

        InputError: it has too few sentinels or no end of sequence, or the sequence is too short.
        """
        if (window := window_for(sequence_length, config.mask_fraction, config.mean_span_length)) == 0:
            raise InputError(f"sequence_length={sequence_length} is too short for spans; use 16 or more")
        found = lengths(window, config.mask_fraction, config.mean_span_length)
        sentinels = sentinel_ids(tokenizer)
        if len(sentinels) < found.spans:
            have = f"{len(sentinels)} sentinels" if sentinels else "no sentinels"
            raise InputError(
                f"objective=span cuts {found.spans} spans out of sequences of {sequence_length} tokens, but the "
                f"tokenizer has {have} ({SENTINEL.format(0)}, {SENTINEL.format(1)}, ...); "
                "give one that has (T5's, say), or none to train one here, or use a shorter sequence_length"
            )
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end of sequence (eos), which objective=span needs")
        return cls(window, found, np.array(sentinels[: found.spans], np.int64), int(tokenizer.eos_token_id))

    def __call__(self, ids_BW: Ints, rows_B: Ints, seed: int) -> dict[str, Ints]:
        """Return `input_ids` [B, inputs] and `labels` [B, labels]."""
        noise_BW = self.choose(rows_B, seed)
        return {"input_ids": self._replace(ids_BW, noise_BW), "labels": self._replace(ids_BW, ~noise_BW)}

    def choose(self, rows_B: Ints, seed: int) -> Bools:
        """Return which tokens are cut out: [B, W]; every row begins with text that stays."""
        spans, kept = self.lengths.spans, self.window - self.lengths.noise
        drawn = uniforms(seed, rows_B, self.window - 2)
        lengths_B2K = np.stack(
            [_compositions(drawn[:, : kept - 1], spans), _compositions(drawn[:, kept - 1 :], spans)], axis=2
        ).reshape(len(rows_B), 2 * spans)
        stops = np.cumsum(lengths_B2K, axis=1)[:, :-1]
        turns_BW = np.zeros((len(rows_B), self.window), np.int64)
        np.put_along_axis(turns_BW, stops, 1, 1)  # kept and cut text take turns
        chosen: Bools = np.cumsum(turns_BW, axis=1) % 2 == 1
        return chosen

    def _replace(self, ids_BW: Ints, gone_BW: Bools) -> Ints:
        """Put a sentinel in place of every run of tokens that are gone, and the end of sequence behind all."""
        first_BW = gone_BW.copy()
        first_BW[:, 1:] &= ~gone_BW[:, :-1]
        span_BW = np.maximum(np.cumsum(first_BW, axis=1) - 1, 0)
        with_sentinels_BW = np.where(first_BW, self.sentinels[span_BW], ids_BW)
        # As many in every row, since spans and their total length are.
        left = with_sentinels_BW[first_BW | ~gone_BW].reshape(len(ids_BW), -1)
        return np.pad(left, ((0, 0), (0, 1)), constant_values=self.eos_id)


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of `<extra_id_0>`, `<extra_id_1>`, ... as far as the tokenizer has them."""
    vocabulary = tokenizer.get_vocab()
    found: list[int] = []
    while SENTINEL.format(len(found)) in vocabulary:
        found.append(vocabulary[SENTINEL.format(len(found))])
    return found


def _compositions(drawn_BN: Floats, parts: int) -> Ints:
    """Cut N + 1 things into non-empty parts, at the places with the smallest numbers: lengths [B, parts]."""
    places = drawn_BN.shape[1]
    cuts = np.sort(np.argsort(drawn_BN, axis=1, kind="stable")[:, : parts - 1], axis=1) + 1
    bounds = np.pad(cuts, ((0, 0), (1, 1)), constant_values=((0, 0), (0, places + 1)))
    return bounds[:, 1:] - bounds[:, :-1]
