"""Where in a run's records (`metrics.jsonl`) the steps were sparse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def sparse_spans(train: Sequence[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """Return (first step, last step, share of sparse steps) of every stretch of lines that had sparse steps.

    Neighbouring lines with sparse steps are one stretch; its share is the mean over its steps.
    """
    spans: list[tuple[float, float, float]] = []
    before, joined = 0.0, False
    for record in train:
        step, share = float(record["step"]), float(record["sparse_fraction"])
        if share > 0 and joined:
            start, end, mean = spans[-1]
            spans[-1] = (start, step, (mean * (end - start) + share * (step - end)) / (step - start))
        elif share > 0:
            spans.append((before, step, share))
        before, joined = step, share > 0
    return spans
