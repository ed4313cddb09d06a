"""A run in one picture: loss with the sparse phases shaded, activation ratio and similarity per layer.

Drawn from `metrics.jsonl` alone. Colours are ordered by lightness (readable in grey and by colour-blind eyes) and
every layer has a marker of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MARKERS = "osD^vPX*<>"
DENSE, SPARSE, TRAIN = "#00334e", "#d55e00", "#9aa5ad"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file; a last line that is still being written is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw the picture of a run.

    Args:
        metrics: the run's `metrics.jsonl`.
        picture: PNG file to write.
    """
    records = read_metrics(metrics)
    train = [r for r in records if r["kind"] == "train"]
    measured = [r for r in records if r["kind"] == "measure"]
    evaluated = [r for r in records if r["kind"] == "eval"]
    figure = Figure(figsize=(9, 10), layout="constrained")
    FigureCanvasAgg(figure)
    loss, ratio, similarity = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    for axes in (loss, ratio, similarity):
        _shade(axes, train)
        axes.grid(visible=True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _draw_loss(loss, train, evaluated)
    _draw_layers(ratio, measured, "activation_ratio", "activation ratio")
    _draw_layers(similarity, measured[1:], "similarity", "similarity of structures (ARI)")
    similarity.set_ylim(-0.05, 1.05)
    similarity.set_xlabel("optimizer step")
    ratio.set_ylim(bottom=0.0)
    if measured:
        lines = ratio.get_lines()
        ratio.legend(
            handles=lines,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=len(lines),
            fontsize=8,
            frameon=False,
        )
    figure.savefig(picture, dpi=120, format="png")


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


def _shade(axes: Axes, train: Sequence[dict[str, Any]]) -> None:
    for start, end, share in sparse_spans(train):
        axes.axvspan(
            start, end, color=SPARSE, alpha=0.10, lw=0, label=f"sparse phase: {share:.0%} of its steps sparse"
        )


def _draw_loss(axes: Axes, train: Sequence[dict[str, Any]], evaluated: Sequence[dict[str, Any]]) -> None:
    axes.plot([r["step"] for r in train], [r["loss"] for r in train], color=TRAIN, lw=1, label="training")
    dense = [(r["step"], r["val_loss_dense"]) for r in evaluated if r["val_loss_dense"] is not None]
    if dense:
        axes.plot(*zip(*dense, strict=True), "o-", color=DENSE, label="validation, dense mode")
    sparse = [(r["step"], r["val_loss_sparse"]) for r in evaluated if r["val_loss_sparse"] is not None]
    if sparse:
        axes.plot(
            *zip(*sparse, strict=True), "s--", color=SPARSE, mfc="none", ms=9, label="validation, sparse mode"
        )
    axes.set_ylabel("loss (nats per token)")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), loc="upper right")


def _draw_layers(axes: Axes, measured: Sequence[dict[str, Any]], key: str, label: str) -> None:
    layers = len(measured[0]["layers"]) if measured else 0
    for i in range(layers):
        axes.plot(
            [r["step"] for r in measured],
            [r["layers"][i][key] for r in measured],
            marker=MARKERS[i % len(MARKERS)],
            ms=4,
            color=colormaps["viridis"](0.9 * i / max(1, layers - 1)),
            label=f"layer {i}",
        )
    axes.set_ylabel(label)
