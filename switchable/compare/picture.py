"""A comparison in one picture: validation loss (best mode) against tokens, FLOPs, seconds and CPU seconds of training.

Each method has a colour of its own from a set that colour-blind eyes can tell apart (Okabe and Ito), a marker and a
dash pattern, so that it can be told in grey too; markers are hollow where a method has other than the configuration's
steps. Seeds are thin lines; the dotted line is dense's mean final loss.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchable.compare.figures import Validation
from switchable.compare.methods import in_order, steps_factor
from switchable.files import whole_file
from switchable.study.canvas import plain_axes

STYLES: dict[str, tuple[str, str, str]] = {
    "dense": ("#000000", "o", "-"),
    "dense-active": ("#999999", "P", "--"),
    "ssd": ("#d55e00", "s", "-"),
    "ssd-paper": ("#0072b2", "^", "--"),
    "static": ("#009e73", "D", ":"),
    "moe": ("#cc79a7", "v", "-."),
    "dense-then-moe": ("#56b4e9", "X", "--"),
}
"""Method -> colour, marker, line style."""

AXES = {
    "tokens": "training tokens",
    "flops": "training FLOPs",
    "seconds": "seconds of training",
    "cpu_seconds": "CPU seconds of training",
}


def draw_comparison(curves: Mapping[tuple[str, int], Sequence[Validation]], picture: Path) -> None:
    """Draw the validations of every run, by method and seed, into a PNG file."""
    figure = Figure(figsize=(16, 4.6), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    goals = [points[-1].loss for (method, _), points in curves.items() if method == "dense"]
    for axes, (axis, label) in zip(panels, AXES.items(), strict=True):
        for method in in_order({name for name, _ in curves}):
            seeds = [points for (name, _), points in sorted(curves.items()) if name == method]
            _draw_method(axes, seeds, method, axis)
        if goals:
            axes.axhline(statistics.fmean(goals), color="#555555", lw=0.8, ls=":")
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        plain_axes(axes)
    panels[0].set_ylabel("validation loss, best mode (nats per token)")
    panels[0].set_ylim(*loss_limits(list(curves.values())))
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    with whole_file(picture) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def loss_limits(curves: Sequence[Sequence[Validation]]) -> tuple[float, float]:
    """Return the losses to show: from the lowest up to where the runs were after a quarter of their validations.

    What comes before is the same steep descent for all; with it, the differences would be too small to see.
    """
    low = min((point.loss for points in curves for point in points), default=0.0)
    high = max((points[len(points) // 4].loss for points in curves if points), default=1.0)
    margin = 0.04 * max(high - low, 1e-3)
    return low - margin, high + margin


def _draw_method(axes: Axes, curves: Sequence[Sequence[Validation]], method: str, axis: str) -> None:
    colour, marker, style = STYLES[method.partition("@")[0]]
    face = colour if steps_factor(method) == 1 else "white"
    look: Any = {"color": colour, "marker": marker, "ls": style, "mfc": face}
    for i, points in enumerate(curves):
        costs, losses = [getattr(point, axis) for point in points], [point.loss for point in points]
        label = method if i == 0 else None
        axes.plot(costs, losses, label=label, ms=3.5, lw=1.2, alpha=0.85, **look)
