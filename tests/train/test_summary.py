"""The figures of a run are named once: the docs' table is made from their declaration."""

from __future__ import annotations

from pathlib import Path

from switchable.compare.figures import OWN
from switchable.compare.report import ROWS
from switchable.train.figures import FIGURES, label


def test_the_docs_have_the_table() -> None:
    docs = (Path(__file__).parents[2] / "docs/method.md").read_text()
    rows = [
        f"| `{key}` | {m['unit']} | {'; '.join(part for part in (m['name'], m['more']) if part)} |"
        for key, m in FIGURES.items()
    ]
    table = "\n".join(["| key | unit | meaning |", "|---|---|---|", *rows]) + "\n"
    assert table in docs, f"put this table into docs/method.md:\n{table}"


def test_the_comparison_calls_figures_as_the_summary_does() -> None:
    shared = set(OWN) & set(FIGURES)
    assert {"val_loss_dense", "flops", "sparse_fraction"} <= shared
    assert all(ROWS[name][0] == label(name) for name in shared - {"flops_nonembedding", "wall_seconds"})
    assert label("wall_seconds_train") == "wall-clock of training (seconds)"
