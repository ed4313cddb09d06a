"""What is masked and cut: shares and shapes by hand; a pure function of (seed, row)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from switchable.config import check, from_dict, objective_of
from switchable.data.batches import Batches, validation_batches
from switchable.data.objectives import MaskedLM, Objective, SpanCorruption
from switchable.data.objectives.chance import uniforms
from switchable.data.objectives.spans import lengths, window_for
from switchable.data.objectives.words import WordParts
from switchable.errors import InputError

SPECIAL = np.arange(300) < 5


def masked(window: int = 98, fraction: float = 0.15, words: WordParts | None = None) -> MaskedLM:
    return MaskedLM(window, fraction, mask_id=4, special_V=SPECIAL, around=(1, 2), words=words)


def spans(window: int = 113) -> SpanCorruption:
    found = lengths(window, 0.15, 3.0)
    return SpanCorruption(window, found, np.arange(200, 200 + found.spans), eos_id=1)


def windows(rows: int, length: int, start: int = 5) -> np.ndarray:
    return start + np.arange(rows * length, dtype=np.int64).reshape(rows, length) % 190


def rows(count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + count)


# --- masked ---


def test_masked_by_hand() -> None:
    """15 % of 98 ordinary tokens are 15 (14.7 rounded): 80 % of them hidden, 10 % random, 10 % kept."""
    ids = windows(400, 98)
    out = masked()(ids, rows(400), seed=3)
    inputs, labels = out["input_ids"], out["labels"]
    assert inputs.shape == labels.shape == (400, 100)
    assert (inputs[:, 0] == 1).all()
    assert (inputs[:, -1] == 2).all()
    chosen = labels != -100
    assert (chosen.sum(1) == 15).all()
    assert not chosen[:, [0, -1]].any()  # [CLS] and [SEP]
    text = np.pad(ids, ((0, 0), (1, 1)), constant_values=((0, 0), (1, 2)))
    assert (labels[chosen] == text[chosen]).all()
    assert (inputs[~chosen] == text[~chosen]).all()
    hidden = (inputs[chosen] == 4).mean()
    kept = (inputs[chosen] == text[chosen]).mean()
    # 6,000 tokens: four standard errors of a share of 0.8 are 0.021, of 0.1 are 0.016.
    assert hidden == pytest.approx(0.8, abs=0.021)
    assert kept == pytest.approx(0.1 + 0.1 / 295, abs=0.016)
    swapped = inputs[chosen & (inputs != 4) & (inputs != text)]
    assert swapped.min() >= 5  # never a special token
    assert len(np.unique(swapped)) > 200


def test_special_tokens_are_never_masked() -> None:
    ids = windows(50, 98)
    ids[:, ::2] = 2
    out = masked()(ids, rows(50), seed=0)
    assert (out["labels"][:, 1::2][:, :49] == -100).all()
    assert ((out["labels"] != -100).sum(1) == 7).all()  # 15 % of 49 are 7.35
    ids[:] = 3
    assert (masked()(ids, rows(50), seed=0)["labels"] == -100).all()


def test_whole_words_are_masked_whole() -> None:
    # Ids 200 and above go on with the word before them: words of 1, 2 and 3 tokens in turns.
    parts = WordParts(np.arange(300) >= 200, np.arange(300) >= 5)
    word = [10, 11, 201, 12, 202, 203]
    ids = np.array([word * 16] * 200, np.int64)
    objective = MaskedLM(96, 0.15, 4, SPECIAL, None, parts)
    chosen = objective(ids, rows(200), seed=1)["labels"] != -100
    one, two, three = chosen[:, 0::6], chosen[:, 1::6], chosen[:, 3::6]
    assert (two == chosen[:, 2::6]).all()
    assert (three == chosen[:, 4::6]).all()
    assert (three == chosen[:, 5::6]).all()
    assert one.any()
    assert two.any()
    assert three.any()
    counts = chosen.sum(1)  # at most 14 (15 % of 96), and no more than two tokens short of it
    assert counts.max() == 14
    assert counts.min() >= 12
    alone = MaskedLM(6, 0.15, 4, SPECIAL, None, parts)  # a share of one token, and words too long for it
    lonely = alone(np.array([[11, 201, 12, 202, 203, 204]] * 20), rows(20), 0)["labels"] != -100
    assert set(lonely.sum(1).tolist()) == {2, 4}


# --- spans ---


def test_lengths_by_hand() -> None:
    """T5's own: inputs of 512 tokens come from 568 tokens of text and leave labels of 114."""
    assert window_for(512, 0.15, 3.0) == 568
    found = lengths(568, 0.15, 3.0)
    assert (found.noise, found.spans, found.inputs, found.labels) == (85, 28, 512, 114)
    for sequence_length in range(4, 200):
        found = lengths(window_for(sequence_length, 0.15, 3.0), 0.15, 3.0)
        assert found.inputs == sequence_length
    assert window_for(3, 0.15, 3.0) == 2  # one token kept, its sentinel and the end
    assert window_for(2, 0.15, 3.0) == 0


def test_spans_put_back_are_the_text() -> None:
    objective, ids = spans(), windows(64, 113)
    out = objective(ids, rows(64), seed=5)
    inputs, labels = out["input_ids"], out["labels"]
    found = objective.lengths  # 113 · 0.15 = 16.95 -> 17 tokens in 6 spans
    assert (found.noise, found.spans) == (17, 6)
    assert inputs.shape == (64, 96 + 6 + 1)
    assert labels.shape == (64, 17 + 6 + 1)
    assert (inputs[:, -1] == 1).all()
    assert (labels[:, -1] == 1).all()
    for text, row, label in zip(ids, inputs, labels, strict=True):
        cut: dict[int, list[int]] = {}
        for token in label[:-1]:
            if token >= 200:
                cut[int(token)] = []
            else:
                cut[list(cut)[-1]].append(int(token))
        assert list(cut) == [200, 201, 202, 203, 204, 205]
        assert all(cut.values())
        restored = [t for token in row[:-1].tolist() for t in cut.get(token, [token])]
        assert restored == text.tolist()
    cut_at = objective.choose(rows(3000), 0)
    assert not cut_at[:, 0].any()
    assert cut_at[:, -1].all()  # T5's rows begin with text that stays and end with text that is cut
    assert cut_at.mean() == pytest.approx(17 / 113)


# --- pure functions of seed and row ---


@pytest.mark.parametrize("objective", [masked(), spans()], ids=["masked", "span"])
def test_pure_function_of_seed_and_row(objective: Objective) -> None:
    ids = windows(8, objective.window)
    whole = objective(ids, rows(8, 16), seed=7)
    again = objective(ids[2:5], rows(3, 18), seed=7)
    for name, array in whole.items():
        assert (array[2:5] == again[name]).all()
    for other in (objective(ids, rows(8, 17), 7), objective(ids, rows(8, 16), 8)):
        assert (other["input_ids"] != whole["input_ids"]).any()


@pytest.mark.parametrize("objective", [masked(), spans()], ids=["masked", "span"])
def test_ranks_share_one_batch(objective: Objective) -> None:
    tokens = (5 + np.arange(5000) % 150).astype(np.uint16)
    whole = Batches(tokens, objective, batch_size=8, seed=2)
    for index in (0, 3):
        expected = whole.batch(index)
        parts = [Batches(tokens, objective, 8, 2, rank, 4).batch(index) for rank in range(4)]
        for name, tensor in expected.items():
            assert tensor.dtype == torch.int64
            assert torch.equal(torch.stack([p[name] for p in parts], 1).flatten(0, 1), tensor)
    checked = validation_batches(tokens, objective, 8, 3000)
    halves = [validation_batches(tokens, objective, 8, 3000, rank, 2) for rank in range(2)]
    for i, batch in enumerate(checked):
        for name, tensor in batch.items():
            assert torch.equal(torch.stack([h[i][name] for h in halves], 1).flatten(0, 1), tensor)


def test_masks_are_frozen() -> None:
    """A run must resume on the same masks after an upgrade of NumPy or of this package."""
    found = masked(18)(windows(2, 18), rows(2, 40), seed=7)["input_ids"]
    assert found.tolist() == FROZEN_MASKED
    small = SpanCorruption(14, lengths(14, 0.3, 2.0), np.array([200, 201]), 1)
    assert small(windows(2, 14), rows(2, 40), seed=7)["labels"].tolist() == FROZEN_SPANS
    assert uniforms(7, rows(1, 40), 2)[0].tolist() == pytest.approx(FROZEN_UNIFORMS, abs=1e-12)


FROZEN_MASKED = [
    [1, 4, 6, 4, 8, 9, 10, 11, 12, 13, 14, 15, 16, 4, 18, 19, 20, 21, 22, 2],
    [1, 23, 24, 25, 4, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 4, 38, 4, 40, 2],
]
FROZEN_SPANS = [[200, 9, 10, 201, 17, 18, 1], [200, 24, 25, 201, 31, 32, 1]]
FROZEN_UNIFORMS = [0.9621529014137123, 0.0805319127313433]


# --- settings ---


@pytest.mark.parametrize(
    ("family", "expected"), [("gpt2", "causal"), ("bert", "masked"), ("roberta", "masked"), ("t5", "span")]
)
def test_the_objective_is_the_familys(family: str, expected: str) -> None:
    config = from_dict({"model": {"family": family}})
    assert objective_of(config) == expected
    check(config)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"objective": {"mask_fraction": 1.5}}, "mask_fraction=1.5"),
        ({"objective": {"mean_span_length": 0}}, "mean_span_length=0"),
        ({"objective": {"whole_words": True}}, "whole_words is for masked models"),
        ({"model": {"family": "t5"}, "data": {"vocab_size": 300}}, "need 358"),
    ],
)
def test_wrong_settings(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check(from_dict(given))
