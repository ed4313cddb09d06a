"""Scores and standard errors by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from switchable.evaluation.scores import Score, accuracy, matthews, table
from switchable.evaluation.ways import Way


def test_accuracy() -> None:
    labels = np.array([0, 1, 1, 0, 1])
    assert accuracy(np.array([0, 1, 0, 0, 1]), labels) == pytest.approx((0.8, math.sqrt(0.8 * 0.2 / 5)))
    assert accuracy(labels, labels) == (1.0, 0.0)


def test_matthews() -> None:
    # 30 true positives, 20 true negatives, 10 of each mistake: (30·20 - 10·10) / sqrt(40·40·30·30)
    labels = np.array([1] * 40 + [0] * 30)
    predicted = np.array([1] * 30 + [0] * 10 + [1] * 10 + [0] * 20)
    value, stderr = matthews(predicted, labels)
    assert value == pytest.approx(500 / 1200)
    # Resampling the examples one by one, the slow way.
    rng = np.random.default_rng(1)
    slow = []
    for _ in range(2000):
        pick = rng.integers(0, 70, 70)
        slow.append(np.corrcoef(predicted[pick], labels[pick])[0, 1])
    assert stderr == pytest.approx(np.std(slow), rel=0.1)
    assert matthews(np.ones(70, int), labels) == (0.0, 0.0)  # one class only: no correlation


def test_table() -> None:
    scores = [
        Score("sst2", "accuracy", Way("dense"), 0.81234, 0.0133, 872),
        Score("sst2", "accuracy", Way("sparse", 6), 0.8, 0.0134, 872),
        Score("text", "perplexity", Way("dense"), 123456.7, None, 1000),
    ]
    assert table(scores).splitlines() == [
        "task  metric      examples  dense            sparse K=6",
        "sst2  accuracy    872       0.8123 ± 0.0133  0.8000 ± 0.0134",
        "text  perplexity  1,000     1.235e+05",
    ]
    assert scores[1].to_dict() == {
        "task": "sst2", "metric": "accuracy", "mode": "sparse", "experts_per_token": 6, "mass": 1.0,
        "value": 0.8, "stderr": 0.0134, "examples": 872,
    }  # fmt: skip
