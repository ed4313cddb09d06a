"""What the schedule decides on: a no-grad pass over fixed probe tokens, apart from training.

The training forward holds no measuring code; the layers are watched through hooks that live for this pass only. What is
measured is defined in `measures.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from switchable.ffn.convert import layers_of
from switchable.ffn.layer import SwitchableFFN
from switchable.ranks import from_main, gathered
from switchable.structure.features import weight_features
from switchable.structure.groups import cluster_layers, groups_layer
from switchable.switching.measures import Inputs, LayerSums, Precision, jaccard, pack, routes_changed, show


@dataclass(frozen=True)
class LayerMeasures:
    """The measures of one layer at one step; all are shares or ratios without unit."""

    activation_ratio: float
    """Share of neurons whose activation is not zero, 0 to 1."""
    mass_caught: float
    """Share of the activation mass in the router's K experts, 0 to 1."""
    mass_by_k: tuple[float, ...]
    """The same for the router's first 1, 2, ..., E experts."""
    best_by_k: tuple[float, ...]
    """The same for each token's best 1, 2, ..., E experts."""
    mass_best: float
    """Share of the activation mass in the best K experts, 0 to 1."""
    load_imbalance: float
    """Load of the busiest expert over the mean load, 1 to E."""
    experts_per_token: int
    """The K of this measurement: the layer's before it, from which the schedule may give it another."""
    dead: float = 0.0
    """Share of neurons that fire on no token of the probe, 0 to 1."""
    always_on: float = 0.0
    """Share of neurons that fire on every token of the probe, 0 to 1."""
    pattern_similarity: float | None = None
    """Jaccard index of the sets of active neurons now and last time, mean over tokens, 0 to 1; None the first time."""
    routing_changed: float | None = None
    """Share of tokens whose set of K experts is another than last time, 0 to 1; None at first and if K was another."""

    @property
    def estimated(self) -> LayerMeasures:
        """The measures as they are when products in 8 bits choose, which catch what the best experts hold."""
        return replace(self, mass_by_k=self.best_by_k, mass_caught=self.mass_best)


@dataclass(frozen=True)
class Found:
    """What a measurement finds and the next one compares with, for one layer."""

    labels_F: Tensor
    """The best structure, for the neurons in their present order."""
    pattern_TW: Tensor
    """Which neurons fire on which tokens (`measures.pack`)."""
    route_TK: Tensor
    """The experts chosen for each token."""


class Watch(LayerSums):
    """What one layer does on the probe: the sums, and what of each token is compared with the next measurement."""

    def __init__(self, layer: SwitchableFFN) -> None:
        super().__init__(layer)
        self._active: list[Tensor] = []
        self._routes: list[Tensor] = []

    def add_tokens(self, layer: SwitchableFFN, x_TD: Tensor, hidden_TF: Tensor, active_TF: Tensor) -> Tensor:
        """Take in tokens, and keep which neurons were active on each, and which experts were chosen."""
        route_TK = super().add_tokens(layer, x_TD, hidden_TF, active_TF)
        self._active.append(active_TF)
        self._routes.append(route_TK.cpu())
        return route_TK

    @property
    def active_TF(self) -> Tensor:
        """Which neurons fired on which tokens (a byte each), in their present order."""
        return torch.cat(self._active)

    @property
    def route_TK(self) -> Tensor:
        """The experts chosen for each token, on the CPU."""
        return torch.cat(self._routes)


def watch(model: nn.Module, probe: Iterable[Inputs]) -> list[Watch]:
    """Run the probe through the model in dense, evaluation mode; return what each switchable FFN did."""
    watches = [Watch(layer) for layer in layers_of(model)]
    show(model, probe, [each.add for each in watches])
    return watches


def measure(
    model: nn.Module,
    probe: Sequence[Inputs],
    last: Sequence[Found | None],
    random_state: int,
    fresh: bool = True,
    precision: Precision = nullcontext,
) -> tuple[list[LayerMeasures], list[Found]]:
    """Measure every switchable FFN on the probe and find its present structure.

    Every rank runs the whole probe (rank 0's figures count), and finds the structure of its share of the layers.

    `last` is what was found last time per layer, labels for the neurons in their present order; or None. With `fresh`
    the structure is found from scratch too, and taken if it is better by a margin, as the paper's authors do; otherwise
    from last time's alone, which takes a fraction of the time. `random_state` is the seed of the clustering. The probe
    is multiplied in the context `precision`: a loop's autocast.

    Returns measures per layer, and what was found: the best structures now (labels for the neurons in their present
    order), patterns and routes, on the CPU.
    """
    layers = layers_of(model)
    with precision():
        watches = watch(model, probe)
    rows: list[Tensor | None] = []
    for i, layer in enumerate(layers):
        with gathered(*layer.ssd.holders):  # one layer at a time; the rank that groups it needs its rows
            rows.append(weight_features(layer.ssd.reads_FD.detach()) if groups_layer(i) else None)
    warm = [None if before is None else before.labels_F for before in last]
    experts = layers[0].ssd.num_experts
    labels = cluster_layers(rows, experts, warm=warm, random_state=random_state, fresh=fresh)
    found = [
        Found(labels_F.cpu(), pack(seen.active_TF, layer.ssd.neuron_ids_F), seen.route_TK)
        for labels_F, seen, layer in zip(labels, watches, layers, strict=True)
    ]
    return from_main([_measures(*each) for each in zip(watches, last, found, strict=True)]), found


def _measures(seen: Watch, last: Found | None, found: Found) -> LayerMeasures:
    return LayerMeasures(
        activation_ratio=seen.activation_ratio,
        mass_caught=seen.mass_caught,
        mass_by_k=tuple(seen.mass_router),
        best_by_k=tuple(seen.mass_best),
        mass_best=seen.mass_best_k,
        load_imbalance=seen.load_imbalance,
        experts_per_token=seen.chosen,
        dead=seen.dead,
        always_on=seen.always_on,
        pattern_similarity=None if last is None else jaccard(last.pattern_TW, found.pattern_TW),
        routing_changed=None if last is None else routes_changed(last.route_TK, found.route_TK),
    )
