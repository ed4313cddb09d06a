"""One function per panel: it draws into the axes it is given and says what is to be read at each point."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from switchable.study.canvas import (
    DENSE,
    SPARSE,
    TRAIN,
    Picture,
    layer_style,
    legend_above,
    plain_axes,
    step_axis,
)
from switchable.study.measures import QUANTILES
from switchable.study.records import sparse_spans
from switchable.study.result import Series, Study

LEGEND_LAYERS = 8
MODES: dict[str, dict[str, Any]] = {
    "dense": {"marker": "o", "color": DENSE, "ls": "-", "ms": 4},
    "sparse": {"marker": "s", "color": SPARSE, "ls": "--", "mfc": "none", "ms": 7},
}
CHOICES: dict[str, dict[str, Any]] = {
    "best K": {"color": DENSE, "ls": "-", "marker": "^"},
    "router's K": {"color": SPARSE, "ls": "-", "marker": "o"},
    "random K": {"color": TRAIN, "ls": "--"},
}
SIMILARITY_LABELS = {
    "pattern": "Jaccard index",
    "coactivation": "correlation",
    "structure": "adjusted Rand index",
}


def loss(study: Study, picture: Picture, axes: Axes) -> None:
    """Training and validation loss; sparse phases shaded."""
    train, evaluated = study.records("train"), study.records("eval")
    steps = [r["step"] for r in train]
    _shade(study, axes)
    axes.plot(steps, [r["loss"] for r in train], color=TRAIN, lw=1, label="training")
    for mode, style in MODES.items():
        points = [
            (r["step"], r[f"val_loss_{mode}"]) for r in evaluated if r.get(f"val_loss_{mode}") is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"validation, {mode} mode", **style)
        for step, value in points:
            picture.hover(axes, step, value, f"step {step:,}: validation loss {value:.4f} in {mode} mode")
    for r in train:
        picture.hover(axes, r["step"], r["loss"], f"step {r['step']:,}: training loss {r['loss']:.4f}")
    axes.set_ylabel("loss (nats per token)")
    _finish(axes, steps)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8)


def flops(study: Study, picture: Picture, axes: Axes) -> None:
    """FLOPs spent so far, and what the same steps would have cost all dense."""
    train = study.records("train")
    steps, spent = [r["step"] for r in train], [r["flops"] for r in train]
    _shade(study, axes)
    lines = axes.plot(steps, spent, color=DENSE, marker=".", ms=3, lw=1.2, label="spent")
    all_dense = study.summary.get("flops_all_dense")
    if all_dense:
        per_step = all_dense / study.summary["steps"]
        lines += axes.plot(
            steps, [s * per_step for s in steps], color=TRAIN, ls="--", label="the same steps all dense"
        )
    for step, value in zip(steps, spent, strict=True):
        picture.hover(axes, step, value, f"step {step:,}: {value:.3g} FLOPs spent")
    axes.set_ylabel("computation (FLOPs)")
    _finish(axes, steps)
    axes.legend(handles=lines, fontsize=8)


def _shade(study: Study, axes: Axes) -> None:
    for start, end, share in sparse_spans(study.records("train")):
        label = f"sparse phase: {share:.0%} of its steps sparse"
        axes.axvspan(start, end, color=SPARSE, alpha=0.12, lw=0, label=label)


def over_steps(study: Study, name: str, label: str, picture: Picture, axes: Axes) -> None:
    """A measure over training, a line per layer."""
    _layer_lines(study.series(name), label, picture, axes)


def neighbours(series: Series, picture: Picture, axes: Axes) -> None:
    """Similarity of each pattern to the one before, a line per layer."""
    _layer_lines(series, "Jaccard index with the one before", picture, axes)
    axes.set_ylim(0.0, 1.02)


def changes(study: Study, part: int, picture: Picture, axes: Axes) -> None:
    """Tokens whose set of experts changed (part 0), experts replaced (part 1), a line per layer."""
    steps = [float(s) for s in study.steps[1:]]
    series = [(steps, [layers[i][part] for layers in study.changes]) for i in range(study.num_layers)]
    label = ("tokens with another set (share)", "experts replaced (share)")[part]
    _layer_lines(series, label, picture, axes)
    axes.set_ylim(-0.02, 1.02)


def _layer_lines(series: Series, label: str, picture: Picture, axes: Axes) -> None:
    all_steps: list[float] = []
    for i, (steps, values) in enumerate(series):
        axes.plot(steps, values, **_line(i, len(series)))
        all_steps += steps
        for step, value in zip(steps, values, strict=True):
            picture.hover(axes, step, value, f"layer {i}, step {step:,.0f}: {value:.4g}")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _finish(axes, sorted(set(all_steps)))
    legend_above(axes)


def _line(i: int, count: int) -> dict[str, Any]:
    """Return a layer's style and its name in the legend, which of many layers has the first and the last."""
    named = count <= LEGEND_LAYERS or i in (0, count - 1)
    return {"label": f"layer {i}" if named else None, **layer_style(i, count)}


def _finish(axes: Axes, steps: list[float]) -> None:
    plain_axes(axes)
    step_axis(axes, steps)


def heat_map(study: Study, kind: str, layer: int | None, picture: Picture, axes: Axes) -> None:
    """Similarity of all pairs of checkpoints, in one layer or as the mean over layers."""
    matrix = study.mean_pairs(kind) if layer is None else study.pairs[kind][layer]
    where = "mean over layers" if layer is None else f"layer {layer}"
    image = axes.imshow(
        matrix, vmin=min(0.0, float(np.nanmin(matrix))), vmax=1.0, cmap="cividis", origin="lower"
    )
    count = len(study.steps)
    axes.set_yticks(*_step_ticks(study, axes, 12, 60), fontsize=8)
    axes.set_ylabel("optimizer step")
    axes.set_title(where)
    picture.figure.colorbar(image, ax=axes, label=SIMILARITY_LABELS[kind], shrink=0.9)
    for i in range(count):
        for j in range(count):
            text = f"{where}, steps {study.steps[j]:,} and {study.steps[i]:,}: {matrix[i, j]:.3f}"
            picture.hover(axes, j, i, text)
            if count <= 8 and np.isfinite(matrix[i, j]):
                ink = "white" if matrix[i, j] < 0.6 else "black"
                axes.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=7, color=ink)


def _step_ticks(study: Study, axes: Axes, most: int, rotation: int) -> tuple[list[int], list[str]]:
    """Name the checkpoints on the x axis, `most` of them at most; return the places and names."""
    ticks = list(range(0, len(study.steps), max(1, -(-len(study.steps) // most))))
    names = [f"{study.steps[i]:,}" for i in ticks]
    axes.set_xticks(ticks, names, rotation=rotation, fontsize=8)
    axes.set_xlabel("optimizer step")
    return ticks, names


def mass(study: Study, layer: int, picture: Picture, axes: Axes) -> None:
    """Activation mass caught against K; the K in use marked."""
    result, shape = study.results[-1][layer], study.layers[layer]
    experts = list(range(1, shape.num_experts + 1))
    curves = (result.mass_best, result.mass_router, result.mass_random)
    for (name, style), values in zip(CHOICES.items(), curves, strict=True):
        axes.plot(experts, values, ms=3, lw=1.2, label=name, **style)
        for k, value in zip(experts, values, strict=True):
            picture.hover(
                axes, k, value, f"layer {layer}, {name} = {k} of {shape.num_experts}: {value:.1%} of the mass"
            )
    k = shape.experts_per_token
    axes.axvline(k, color="black", lw=1, ls=":")
    axes.annotate(f"K = {k}", (k, 0.02), xytext=(3, 0), textcoords="offset points", fontsize=8)
    axes.set_xlabel("K (experts per token)")
    axes.set_ylabel("share of the activation mass")
    axes.set_ylim(0, 1.02)
    axes.set_title(f"layer {layer}")
    plain_axes(axes)
    axes.legend(fontsize=8, loc="lower right")


def load(study: Study, layer: int, picture: Picture, axes: Axes) -> None:
    """Load of each expert at each checkpoint, sorted by the last."""
    loads = np.array([layers[layer].load for layers in study.results])
    order = np.argsort(-loads[-1], kind="stable")
    relative = loads[:, order].T * loads.shape[1]
    image = axes.imshow(
        relative, aspect="auto", cmap="cividis", vmin=0.0, vmax=max(2.0, float(relative.max()))
    )
    _step_ticks(study, axes, 10, 45)
    axes.set_ylabel("expert, busiest first")
    axes.set_title(f"layer {layer}")
    picture.figure.colorbar(image, ax=axes, label="load (1 = equal share)", shrink=0.9)
    for i, expert in enumerate(order):
        for j, step in enumerate(study.steps):
            picture.hover(
                axes, j, i, f"layer {layer}, expert {expert}, step {step:,}: load {relative[i, j]:.2f}"
            )


def spread(study: Study, picture: Picture, axes: Axes) -> None:
    """Distribution of the activation ratio over tokens, a box per layer."""
    low, first, middle, third, high = (QUANTILES.index(q) for q in (0.05, 0.25, 0.5, 0.75, 0.95))
    for i, result in enumerate(study.results[-1]):
        q = result.ratio_quantiles
        color = layer_style(i, study.num_layers)["color"]
        axes.plot([i, i], [q[low], q[high]], color=color, lw=1.5)
        axes.bar(i, q[third] - q[first], bottom=q[first], width=0.5, color=color, alpha=0.45)
        axes.plot([i - 0.25, i + 0.25], [q[middle]] * 2, color="black", lw=1.5)
        text = (
            f"layer {i}: median {q[middle]:.3f}, middle half {q[first]:.3f} to {q[third]:.3f}, "
            f"middle nine tenths {q[low]:.3f} to {q[high]:.3f}"
        )
        picture.hover(axes, i, q[middle], text)
    axes.set_xlabel("layer")
    axes.set_ylabel("activation ratio (share of neurons)")
    axes.set_ylim(bottom=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain_axes(axes)


def bands(study: Study, field: str, label: str, picture: Picture, axes: Axes) -> None:
    """Activation ratio per band of positions or frequencies, a line per layer."""
    names = max((list(getattr(layer, field)) for layer in study.results[-1]), key=len)
    for i, result in enumerate(study.results[-1]):
        values = getattr(result, field)
        places = [names.index(name) for name in values if name in names]
        axes.plot(places, list(values.values()), **_line(i, study.num_layers))
        for place, (name, value) in zip(places, values.items(), strict=True):
            picture.hover(axes, place, value, f"layer {i}, {name}: {value:.4f}")
    axes.set_xticks(range(len(names)), names, rotation=45 if len(names) > 6 else 0, fontsize=8)
    axes.set_xlabel(label)
    axes.set_ylabel("activation ratio (share of neurons)")
    axes.set_ylim(bottom=0.0)
    plain_axes(axes)
    legend_above(axes)
