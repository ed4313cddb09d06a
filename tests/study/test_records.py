"""A run's own records: what is shaded, and that its picture is drawn from metrics of any length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.image import imread

from switchable.files import read_records
from switchable.study.pictures import draw_curves
from switchable.study.result import Study, sparse_spans


def line(step: int, share: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "sparse_fraction": share, "loss": 5.0 / step}


def test_sparse_spans_by_hand() -> None:
    train = [line(10, 0.0), line(20, 0.5), line(30, 0.75), line(40, 0.0), line(45, 1.0)]
    assert sparse_spans(train) == [(10, 30, 0.625), (40, 45, 1.0)]
    assert sparse_spans([]) == []


def layer(value: float) -> dict[str, float]:
    return {"activation_ratio": value, "pattern_similarity": value}


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [line(s, 0.75 if s > 30 else 0.0) for s in range(10, 110, 10)]
    records += [{"kind": "measure", "step": s, "layers": [layer(0.4), layer(0.1)]} for s in (25, 50, 75)]
    records += [{"kind": "eval", "step": 50, "val_loss_dense": 2.0, "val_loss_sparse": None}]
    records += [{"kind": "eval", "step": 100, "val_loss_dense": 1.9, "val_loss_sparse": 1.95}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join(json.dumps(r) for r in records) + '\n{"kind": "tra')
    assert len(read_records(metrics)) == len(records)
    draw_curves(Study("a run", metrics=read_records(metrics)), tmp_path / "curves.png")
    pixels = imread(tmp_path / "curves.png")
    assert pixels.shape[:2] == (1485, 660)
    assert pixels.std() > 0.05


def test_a_run_without_measurements_is_drawn_too(tmp_path: Path) -> None:
    draw_curves(Study("a run", metrics=[line(1, 0.0)]), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
