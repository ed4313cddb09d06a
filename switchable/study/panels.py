"""One function per panel: it draws into the axes it is given and says what is to be read at each point."""

from __future__ import annotations

from functools import partial
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from switchable.study.canvas import (
    DENSE,
    MARKERS,
    SPARSE,
    TRAIN,
    Picture,
    legend_above,
    mark_regroupings,
    plain_axes,
    step_axis,
)
from switchable.study.result import Series, Study, sparse_spans

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
WAYS = {"sparse": SPARSE, "active": "#7fb8da", "dense": DENSE}
"""How a layer multiplies, from the upper edge of its strip down."""
SIMILARITY_LABELS = {"pattern": "Jaccard index", "coactivation": "correlation"}


def loss(study: Study, picture: Picture, axes: Axes) -> None:
    """Training and validation loss; sparse phases shaded."""
    train = study.records("train")
    steps = [r["step"] for r in train]
    _shade(study, axes)
    axes.plot(steps, [r["loss"] for r in train], color=TRAIN, lw=1, label="training")
    for mode, style in MODES.items():
        name, label = f"val_loss_{mode}", f"validation, {mode} mode"
        found = [(r["step"], r[name]) for r in study.records("eval") if r.get(name) is not None]
        if found:
            tell = partial("step {:,}: validation loss {:.4f} in {mode} mode".format, mode=mode)
            xs, ys = zip(*found, strict=True)
            picture.line(axes, xs, ys, tell, label=label, **style)
    for r in train:
        picture.hover(axes, r["step"], r["loss"], f"step {r['step']:,}: training loss {r['loss']:.4f}")
    axes.set_ylabel(f"loss ({study.summary.get('loss_unit', 'nats per token')})")
    step_axis(axes, study.span, study.regroupings())
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8)


def flops(study: Study, picture: Picture, axes: Axes) -> None:
    """FLOPs spent so far, and what the same steps would have cost all dense."""
    train = study.records("train")
    steps, spent = [r["step"] for r in train], [r["flops"] for r in train]
    _shade(study, axes)
    tell = "step {:,}: {:.3g} FLOPs spent".format
    picture.line(axes, steps, spent, tell, color=DENSE, marker=".", ms=3, lw=1.2, label="spent")
    if all_dense := study.summary.get("flops_all_dense"):
        per_step = all_dense / study.summary["steps"]
        dense = [s * per_step for s in steps]
        axes.plot(steps, dense, color=TRAIN, ls="--", label="the same steps all dense")
    axes.set_ylabel("computation (FLOPs)")
    axes.set_ylim(bottom=0.0)
    step_axis(axes, study.span, study.regroupings())
    axes.legend(handles=axes.get_lines(), fontsize=8)


def ways(study: Study, picture: Picture, axes: Axes) -> None:
    """A strip per layer: the shares of the steps that it made sparse, from active neurons, and dense."""
    train = study.records("train")
    steps = [0, *(r["step"] for r in train)]
    layers = range(len(train[-1]["step_ways"]))
    for layer in layers:
        made = [r["step_ways"][layer] for r in train]
        low = np.full(len(steps), layer - 0.42)
        for way, colour in WAYS.items():
            shares = [each.count(way[0]) / len(each) for each in made]
            high = low + 0.84 * np.array([shares[0], *shares])
            label = way if layer == 0 else None
            axes.fill_between(steps, low, high, step="pre", color=colour, lw=0, label=label)
            low = high
        for (start, end), each in zip(pairwise(steps), made, strict=True):
            told = ", ".join(f"{each.count(way[0])} {way}" for way in WAYS if way[0] in each)
            text = f"layer {layer}, steps {start + 1:,} to {end:,}: {told}"
            picture.hover(axes, (start + end) / 2, layer, text)
    plain_axes(axes)
    axes.set_axisbelow(True)
    mark_regroupings(axes, study.regroupings())
    axes.set_xlim(0, steps[-1])
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("layer")
    legend_above(axes)


def _shade(study: Study, axes: Axes) -> None:
    for start, end, share in sparse_spans(study.records("train")):
        label = f"sparse phase: {share:.0%} of its steps sparse"
        axes.axvspan(start, end, color=SPARSE, alpha=0.12, lw=0, label=label)


def layer_lines(
    study: Study, series: Series, label: str, picture: Picture, axes: Axes, at_k: bool = False,
    top: float | None = None,
) -> None:  # fmt: skip
    """A measure over training, a line per layer; with `at_k` no line joins measurements of different K."""
    chosen = [dict(zip(*each, strict=True)) for each in study.series("experts_per_token")] if at_k else []
    for i, (steps, values) in enumerate(series):
        style = _layer_style(i, len(series))
        k_at = chosen[i] if at_k else {}
        for k, points in groupby(zip(steps, values, strict=True), key=lambda point: k_at.get(point[0])):
            which = f"layer {i}" if k is None else f"layer {i}, K = {k:.0f}"
            tell = partial("{which}, step {:,.0f}: {:.4g}".format, which=which)
            xs, ys = zip(*points, strict=True)
            picture.line(axes, xs, ys, tell, **style)
            style["label"] = None
    axes.set_ylabel(label)
    axes.set_ylim(top=top)
    axes.set_ylim(min(0.0, *(v for _, vs in series for v in vs), 0.0) - 0.02 * axes.get_ylim()[1])
    step_axis(axes, study.span, study.regroupings())
    legend_above(axes)


def _layer_style(i: int, count: int) -> dict[str, Any]:
    """Return a layer's colour (dark to light), marker and name in the legend: of many, only the first and the last."""
    named = count <= LEGEND_LAYERS or i in (0, count - 1)
    colour = colormaps["viridis"](0.9 * i / max(1, count - 1))
    look = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "ms": 4, "lw": 1.2}
    return look | {"label": f"layer {i}" if named else None}


def heat_map(study: Study, kind: str, layer: int | None, picture: Picture, axes: Axes) -> None:
    """Similarity of all pairs of checkpoints, in one layer or as the mean over layers."""
    matrix = study.mean_pairs(kind) if layer is None else study.pairs[kind][layer]
    where = "mean over layers" if layer is None else f"layer {layer}"
    low, count = min(0.0, *(float(np.nanmin(m)) for m in study.pairs[kind])), len(study.steps)
    image = axes.imshow(matrix, vmin=low, vmax=1.0, cmap="cividis", origin="lower")
    axes.set_yticks(*_step_ticks(study, axes, 12, 60, layer), fontsize=8)
    axes.set_ylabel("optimizer step")
    axes.set_title(where)
    picture.figure.colorbar(image, ax=axes, label=SIMILARITY_LABELS[kind], shrink=0.9)
    for i in range(count):
        for j in range(count):
            text = f"{where}, steps {study.steps[j]:,} and {study.steps[i]:,}: {matrix[i, j]:z.3f}"
            picture.hover(axes, j, i, text)
            if count <= 8 and np.isfinite(matrix[i, j]):
                ink = "white" if matrix[i, j] < 0.6 else "black"
                axes.text(j, i, f"{matrix[i, j]:z.2f}", ha="center", va="center", fontsize=7, color=ink)


def _step_ticks(
    study: Study, axes: Axes, most: int, rotation: int, layer: int | None
) -> tuple[list[int], list[str]]:
    """Name the checkpoints on the x axis, `most` at most, and mark regroupings in between; return places and names."""
    steps = study.regroupings(layer)
    between = enumerate(pairwise(study.steps))
    mark_regroupings(axes, [n + 0.5 for n, (a, b) in between if any(a < step <= b for step in steps)])
    ticks = list(range(0, len(study.steps), max(1, -(-len(study.steps) // most))))
    names = [f"{study.steps[i]:,}" for i in ticks]
    axes.set_xticks(ticks, names, rotation=rotation, fontsize=8)
    axes.set_xlabel("optimizer step")
    return ticks, names


def mass(study: Study, layer: int, picture: Picture, axes: Axes) -> None:
    """Activation mass caught against K; the K in use marked."""
    result, shape = study.results[-1][layer], study.layers[layer]
    experts, k = list(range(1, shape.num_experts + 1)), result.experts_per_token
    curves = (result.mass_best, result.mass_router, result.mass_random)
    for (name, style), values in zip(CHOICES.items(), curves, strict=True):
        what = f"layer {layer}, {name} = {{}} of {shape.num_experts}: {{:.1%}} of the mass"
        picture.line(axes, experts, values, what.format, ms=3, lw=1.2, label=name, **style)
    axes.axvline(k, color="black", lw=1, ls=":")
    used = f"K = {k}" if result.takes_part else f"K = {k} (layer is dense)"
    axes.annotate(used, (k, 0.02), xytext=(3, 0), textcoords="offset points", fontsize=8)
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
    most = max(2.0, *(layer.load_imbalance for layers in study.results for layer in layers))
    image = axes.imshow(relative, aspect="auto", cmap="cividis", vmin=0.0, vmax=most)
    _step_ticks(study, axes, 10, 45, layer)
    axes.set_ylabel("expert, busiest first")
    axes.set_title(f"layer {layer}")
    picture.figure.colorbar(image, ax=axes, label="load (1 = equal share)", shrink=0.9)
    for i, expert in enumerate(order):
        for j, step in enumerate(study.steps):
            text = f"layer {layer}, expert {expert}, step {step:,}: load {relative[i, j]:.2f}"
            picture.hover(axes, j, i, text)
