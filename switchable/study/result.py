"""What a study found, as plain data: what pictures, tables and sentences are made of, and `study.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from switchable.study.measures import LayerStudy

Series = list[tuple[list[float], list[float]]]  # per layer: steps and values


@dataclass(frozen=True)
class LayerShape:
    """What a layer is."""

    name: str
    d_model: int
    d_ff: int
    num_experts: int
    activation: str


@dataclass
class Study:
    """The result of studying a run, a series of checkpoints or one model."""

    title: str
    layers: list[LayerShape] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)  # optimizer steps of the checkpoints, ascending
    results: list[list[LayerStudy]] = field(default_factory=list)  # per checkpoint, per layer
    pairs: dict[str, list[npt.NDArray[np.float64]]] = field(default_factory=dict)
    """Per kind of similarity, per layer: a matrix [checkpoints, checkpoints]."""
    metrics: list[dict[str, Any]] = field(default_factory=list)  # the run's own records (`metrics.jsonl`)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)  # tokens measured on, and where they are from
    notes: list[str] = field(default_factory=list)  # what the reader must know: samples, what was left out
    problems: list[str] = field(default_factory=list)  # what could not be shown, and why

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Return the run's records of a kind (`train`, `measure`, `change`, `eval`, `costs`)."""
        return [record for record in self.metrics if record.get("kind") == kind]

    @property
    def num_layers(self) -> int:
        """FFNs of the model."""
        measured = self.records("measure")
        return len(self.layers) or (len(measured[0]["layers"]) if measured else 0)

    def series(self, name: str) -> Series:
        """Return a measure over training: at the checkpoints, and where the run itself measured it."""
        recorded = [(r["step"], [layer.get(name) for layer in r["layers"]]) for r in self.records("measure")]
        return self._over_training(name, recorded)

    def experts_in_use(self) -> Series:
        """Return the K of each layer from each checkpoint and each of the run's measurements on."""
        recorded = [(r["step"], r["experts_per_token"]) for r in self.records("measure")]
        return self._over_training("experts_per_token", recorded)

    def _over_training(self, name: str, recorded: Sequence[tuple[float, Sequence[float | None]]]) -> Series:
        """Put together what the run recorded, a value per layer and step, and what was measured at its checkpoints."""
        studied = zip(self.steps, self.results, strict=True)
        measured = [(step, [getattr(layer, name, None) for layer in layers]) for step, layers in studied]
        found: list[dict[float, float]] = [{} for _ in range(self.num_layers)]
        for step, values in (*recorded, *measured):
            for by_step, value in zip(found, values, strict=True):
                if value is not None:
                    by_step[step] = value
        return [(sorted(by_step), [by_step[step] for step in sorted(by_step)]) for by_step in found]

    def regroupings(self, layer: int | None = None) -> list[int]:
        """Return the steps at which the neurons of a layer were regrouped; None: of any layer."""
        measured = [(r["step"], r["regrouped"]) for r in self.records("measure")]
        return [step for step, moved in measured if (any(moved) if layer is None else moved[layer])]

    @property
    def span(self) -> list[int]:
        """All steps of which there is something, ascending: every axis of steps shows them."""
        return sorted({r["step"] for r in self.metrics if r["kind"] != "costs"} | set(self.steps))

    def mean_pairs(self, kind: str) -> npt.NDArray[np.float64]:
        """Return a similarity's mean over the layers in which it is defined."""
        stacked = np.stack(self.pairs[kind])
        known = ~np.isnan(stacked)
        total = np.where(known, stacked, 0.0).sum(axis=0)
        return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)

    def neighbours(self, kind: str) -> Series:
        """Return, per layer, the similarity of each checkpoint to the one before."""
        steps = [float(s) for s in self.steps[1:]]
        return [(steps, [float(v) for v in np.diagonal(m, offset=1)]) for m in self.pairs[kind]]

    def to_json(self) -> dict[str, Any]:
        """Return everything but the run's own records as plain values."""
        plain = dataclasses.asdict(dataclasses.replace(self, metrics=[]))
        del plain["metrics"]
        return plain | {"pairs": {kind: [m.tolist() for m in found] for kind, found in self.pairs.items()}}


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
