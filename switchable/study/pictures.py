"""The pictures of a study: what each shows, when it can be drawn, and how (`panels.py` draws one panel each).

pictures_of(study) -> list of PictureOf: a name, a caption, one panel or one per layer
write_files(...)   -> pictures/NAME.png, all layers side by side
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from switchable.study import panels
from switchable.study.canvas import Draw, draw_picture, write_picture
from switchable.study.result import Study

MAX_LAYERS = 16
"""Deeper models are shown at so many layers, evenly spaced; tables and study.json have them all."""


@dataclass(frozen=True)
class PictureOf:
    """A picture to draw."""

    name: str
    title: str
    caption: str
    panels: tuple[tuple[int | None, Draw], ...]  # each with the layer it is about; None: all of them

    @property
    def per_layer(self) -> bool:
        """Whether there is a panel for each layer."""
        return any(layer is not None for layer, _ in self.panels)

    @property
    def draws(self) -> list[Draw]:
        """All panels."""
        return [draw for _, draw in self.panels]


def shown_layers(study: Study) -> list[int]:
    """Return the layers of which there are pictures."""
    count = study.num_layers
    if count <= MAX_LAYERS:
        return list(range(count))
    return sorted({round(i * (count - 1) / (MAX_LAYERS - 1)) for i in range(MAX_LAYERS)})


def pictures_of(study: Study) -> list[PictureOf]:
    """Return the pictures that can be drawn from what a study has."""
    return [*_over_training(study), *_similarity(study), *_experts(study)]


def write_files(study: Study, folder: Path) -> list[str]:
    """Draw every picture into `folder` as PNG; return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = pictures_of(study)
    for picture in pictures:
        columns = min(4, math.ceil(len(picture.panels) ** 0.5)) if picture.per_layer else 1
        write_picture(draw_picture(picture.draws, columns), folder / f"{picture.name}.png")
    return [picture.name for picture in pictures]


def draw_curves(study: Study, path: Path) -> None:
    """Draw a run in one picture, from what it has recorded itself: loss, activation ratio, pattern."""
    draws: list[Draw] = [partial(panels.loss, study)] if study.records("train") else []
    rows: list[tuple[str, str, float | None]] = [
        ("activation_ratio", CURVES["activation_ratio"][2]["activation_ratio"], None),
        ("pattern_similarity", "active sets, overlap (Jaccard)", 1.02),
    ]
    draws += [_curve(study, *row) for row in rows if _points(study, row[0])]
    if draws:
        write_picture(draw_picture(draws), path)


def _points(study: Study, name: str) -> int:
    return max((len(steps) for steps, _ in study.series(name)), default=0)


AT_K = ("mass_caught", "load_imbalance", "routing_changed")  # measures that depend on K


def _curve(study: Study, name: str, label: str, top: float | None) -> Draw:
    return partial(panels.layer_lines, study, study.series(name), label, at_k=name in AT_K, top=top)


def _over_training(study: Study) -> list[PictureOf]:
    found = []
    if study.records("train"):
        caption = (
            "Above: the loss; where the background is coloured, some steps are sparse. "
            "Below: FLOPs spent so far, measuring included."
        )
        draws = (partial(panels.loss, study), partial(panels.flops, study))
        found.append(_one("loss", "Loss and computation", caption, *draws))
        if all("step_ways" in record for record in study.records("train")):  # older runs have none
            caption = (
                "Of the steps between two lines of the log, the share in which a layer was sparse, multiplied only its "
                "active neurons, or all. The table of changes says why."
            )
            found.append(_one("ways", "What each layer did", caption, partial(panels.ways, study)))
    return found + _curves(study, "activation_ratio", "neurons")


CURVES: dict[str, tuple[str, str, dict[str, str], float | None]] = {
    "activation_ratio": (
        "How many neurons a token needs",
        "Share of a layer's neurons that are active on a token, mean over the probe.",
        {"activation_ratio": "activation ratio (share of neurons)"},
        None,
    ),
    "neurons": (
        "Dead and always-on neurons",
        "Share of a layer's neurons active on no token of the probe (above) and on every token (below).",
        {"dead": "dead neurons (share)", "always_on": "always-on neurons (share)"},
        1.02,
    ),
    "load_imbalance": (
        "Imbalance of the load",
        "Load of the busiest expert over the mean load; no line joins measurements of different K.",
        {"load_imbalance": "busiest over mean"},
        None,
    ),
    "routing": (
        "Tokens that change experts",
        "Share of tokens whose set of experts is not that of the measurement before, where K is the same.",
        {"routing_changed": "tokens with another set (share)"},
        1.02,
    ),
}
"""By name: title and caption of a picture, its panels (measure -> label of the axis), and where their y axes end."""


def _one(name: str, title: str, caption: str, *draws: Draw) -> PictureOf:
    return PictureOf(name, title, caption, tuple((None, draw) for draw in draws))


def _curves(study: Study, *names: str) -> list[PictureOf]:
    """Return those of the pictures that have more than a point to show."""
    found = []
    for name in names:
        title, caption, labels, top = CURVES[name]
        if _points(study, next(iter(labels))) > 1:
            found.append(_one(name, title, caption, *(_curve(study, *row, top) for row in labels.items())))
    return found


def _per_layer(study: Study, name: str, title: str, caption: str, draw: Callable[..., None]) -> PictureOf:
    return PictureOf(name, title, caption, tuple((i, partial(draw, study, i)) for i in shown_layers(study)))


SIMILARITY_CAPTIONS = {
    "pattern": (
        "Same neurons, same tokens?",
        "Jaccard index of the sets of neurons that are active on the same tokens at two checkpoints: 1 is the same "
        "set. A pattern that had settled would be dark only at the start and light ever after.",
    ),
    "coactivation": (
        "Same neurons firing together?",
        "Correlation of the co-activation matrices of two checkpoints: which neurons fire together.",
    ),
}


def _similarity(study: Study) -> list[PictureOf]:
    found = []
    for kind in study.pairs:
        maps = [None, *shown_layers(study)]  # the mean over layers first
        shown = tuple((layer, partial(panels.heat_map, study, kind, layer)) for layer in maps)
        found.append(PictureOf(f"similarity_{kind}", *SIMILARITY_CAPTIONS[kind], shown))
    if study.pairs and len(study.steps) > 2:
        series, what = study.neighbours("pattern"), "checkpoint"
    elif _points(study, "pattern_similarity") > 1:
        series, what = study.series("pattern_similarity"), "measurement"
    else:
        return found
    caption = f"Jaccard index of the active sets at a {what} and the one before."
    label = "Jaccard index with the one before"
    draw = partial(panels.layer_lines, study, series, label, top=1.02)
    return [*found, _one("pattern_change", "Does the pattern keep changing?", caption, draw)]


def _experts(study: Study) -> list[PictureOf]:
    found = []
    if study.results:
        caption = (
            "Share of the activation mass in K experts: the best ones of each token, those the router chooses, and "
            "any K drawn at random. The line marks the layer's own K; at the last checkpoint."
        )
        found.append(_per_layer(study, "mass", "How concentrated the activation is", caption, panels.mass))
        caption = (
            "Share of the router's choices that fall on each expert, times the number of experts: 1 is an equal "
            "share. Experts are sorted by their load at the last checkpoint."
        )
        found.append(_per_layer(study, "load", "Expert load over time", caption, panels.load))
    if _points(study, "mass_caught") > 1:
        caption = (
            "The K of each layer (above), and the share of the activation mass in so many experts of its router "
            "(below); no line joins measurements of different K."
        )
        ks = partial(panels.layer_lines, study, study.experts_in_use(), "K (experts per token)")
        caught = _curve(study, "mass_caught", "share of the mass", 1.02)
        found.append(_one("experts", "What the router catches", caption, ks, caught))
    return found + _curves(study, "load_imbalance", "routing")
