"""A score with its standard error; many of them as a table and as JSON.

Standard errors are over the evaluated examples (or windows of text): how much the score would change with another
sample of them. They say nothing of other seeds of training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import accuracy_score, matthews_corrcoef

from switchable.evaluation.ways import Way

RESAMPLES = 10_000


@dataclass(frozen=True)
class Score:
    """One figure."""

    task: str
    metric: str
    way: Way
    value: float
    stderr: float | None  # standard error over the examples; None where there is none to give
    examples: int

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON."""
        rest = {"value": self.value, "stderr": self.stderr, "examples": self.examples}
        return {"task": self.task, "metric": self.metric, **dataclasses.asdict(self.way), **rest}


def table(scores: Sequence[Score]) -> str:
    """Return the scores as text: a line per task and metric, a column per way, value ± standard error."""
    columns = list(dict.fromkeys(str(score.way) for score in scores))
    lines: dict[tuple[str, str, int], dict[str, str]] = {}
    for score in scores:
        shown = _number(score.value) + ("" if score.stderr is None else f" ± {_number(score.stderr)}")
        lines.setdefault((score.task, score.metric, score.examples), {})[str(score.way)] = shown
    rows = [["task", "metric", "examples", *columns]]
    rows += [[t, m, f"{n:,}", *(cells.get(c, "") for c in columns)] for (t, m, n), cells in lines.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def accuracy(predicted: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Return the share that is right, p, and its standard error, sqrt(p (1 - p) / n)."""
    share = float(accuracy_score(labels, predicted))
    return share, math.sqrt(share * (1 - share) / len(labels))


def matthews(predicted: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Return Matthews' correlation coefficient of two classes and its standard error, by the bootstrap.

    The coefficient depends on the four counts of the confusion matrix only, so resampling the examples is drawing
    these counts from a multinomial distribution.
    """
    counts = np.bincount(2 * labels + predicted, minlength=4)
    drawn = np.random.default_rng(0).multinomial(len(labels), counts / len(labels), RESAMPLES).astype(float)
    tn, fp, fn, tp = drawn.T
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    resampled = np.where(product > 0, tp * tn - fp * fn, 0.0) / np.sqrt(np.where(product > 0, product, 1.0))
    return float(matthews_corrcoef(labels, predicted)), float(resampled.std(ddof=1))
