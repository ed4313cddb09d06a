"""What the schedule decides on: a no-grad pass over fixed probe tokens, apart from training.

Per layer, over all probe tokens t:

    activation ratio    share of (token, neuron) pairs with a_i(t) ≠ 0
    mass caught         Σ mass of the K experts chosen / Σ mass of all,   mass_e = Σ_{i in e} |a_i| ‖down_i‖
                        by the router, and by the best possible choice
    load imbalance      busiest expert's share of the choices x E (1 = all alike)
    dead, always on     share of neurons that fire on no token, and on every token
    pattern similarity  Jaccard index of the sets of active neurons now and last time, mean over the tokens
    routing changed     share of tokens whose set of K experts is not last time's
    similarity          adjusted Rand index of the best structure now and last time's, and of it and the one in use

The training forward holds no measuring code; the layers are watched through hooks that live for this pass only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from switchable.ffn.convert import kept_modes, layers_of, set_mode
from switchable.ffn.layer import SwitchableFFN
from switchable.ffn.router import expert_mass
from switchable.ranks import from_main, gathered
from switchable.structure.features import weight_features
from switchable.structure.groups import cluster_layers, groups_layer, similarity
from switchable.switching.patterns import jaccard, pack, routes_changed
from switchable.switching.switch import current_structure

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerMeasures:
    """The measures of one layer at one step; all are shares or ratios without unit."""

    activation_ratio: float
    """Share of neurons whose activation is not zero, 0 to 1."""
    mass_caught: float
    """Share of the activation mass in the router's K experts, 0 to 1."""
    mass_by_k: tuple[float, ...]
    """The same for the router's first 1, 2, ..., E experts."""
    mass_best: float
    """Share of the activation mass in the best K experts, 0 to 1."""
    load_imbalance: float
    """Load of the busiest expert over the mean load, 1 to E."""
    similarity: float
    """Adjusted Rand index of the best structure now and the best one last time, -0.5 to 1; 0 the first time."""
    similarity_in_use: float
    """Adjusted Rand index of the best structure now and the one in use, -0.5 to 1."""
    dead: float = 0.0
    """Share of neurons that fire on no token of the probe, 0 to 1."""
    always_on: float = 0.0
    """Share of neurons that fire on every token of the probe, 0 to 1."""
    pattern_similarity: float | None = None
    """Jaccard index of the sets of active neurons now and last time, mean over tokens, 0 to 1; None the first time."""
    routing_changed: float | None = None
    """Share of tokens whose set of K experts is another than last time, 0 to 1; None the first time."""


@dataclass(frozen=True)
class Found:
    """What a measurement finds and the next one compares with, for one layer."""

    labels_F: Tensor
    """The best structure, for the neurons in their present order."""
    pattern_TW: Tensor
    """Which neurons fire on which tokens (`patterns.pack`)."""
    route_TK: Tensor
    """The experts chosen for each token."""


class Observer(Protocol):
    """Sees the input of one layer, a batch of the probe at a time."""

    def add(self, layer: SwitchableFFN, x: Tensor) -> None:
        """Take in the layer's input `x`, [B, S, D] or [T, D]."""


class _Tally:
    """Sums over the probe for one layer."""

    def __init__(self) -> None:
        self._active: list[Tensor] = []
        self._routes: list[Tensor] = []
        self.tokens = 0
        self.active = self.best = self.mass = torch.zeros((), dtype=torch.float64)
        self.caught_E: Tensor | None = None
        self.load_E: Tensor | None = None

    def add(self, layer: SwitchableFFN, x: Tensor) -> None:
        x_TD = x.reshape(-1, layer.ssd.d_model)
        hidden_TF = layer.ssd.activations(x_TD)
        mass_TE = expert_mass(hidden_TF, layer.ssd.weights.down_FD, layer.ssd.num_experts)
        ranked_TE = layer.router(x_TD).argsort(dim=-1, descending=True)
        ids_TK = ranked_TE[:, : layer.ssd.experts_per_token]
        active_TF = hidden_TF != 0
        self._active.append(active_TF)
        self._routes.append(ids_TK.cpu())
        self.tokens += x_TD.shape[0]
        # One host sync per layer and probe batch: the sums are kept in float64 on the host.
        sums = torch.stack(
            [
                active_TF.count_nonzero().double(),
                mass_TE.topk(layer.ssd.experts_per_token, dim=-1).values.sum(dtype=torch.float64),
                mass_TE.sum(dtype=torch.float64),
            ]
        ).cpu()
        self.active, self.best, self.mass = self.active + sums[0], self.best + sums[1], self.mass + sums[2]
        caught_E = mass_TE.gather(1, ranked_TE).sum(dim=0, dtype=torch.float64).cumsum(0).cpu()
        self.caught_E = caught_E if self.caught_E is None else self.caught_E + caught_E
        load_E = torch.bincount(ids_TK.reshape(-1), minlength=layer.ssd.num_experts).cpu()
        self.load_E = load_E if self.load_E is None else self.load_E + load_E

    @property
    def active_TF(self) -> Tensor:
        """Which neurons fired on which tokens (a byte each), in their present order."""
        return torch.cat(self._active)

    @property
    def route_TK(self) -> Tensor:
        """The experts chosen for each token, on the CPU."""
        return torch.cat(self._routes)


@contextmanager
def observed(model: nn.Module, observers: Sequence[Observer]) -> Iterator[None]:
    """Within the `with` block every switchable FFN shows its input to its observer, before it multiplies."""
    layers = layers_of(model)

    def hook_for(observer: Observer, layer: SwitchableFFN):  # type: ignore[no-untyped-def]
        return lambda _module, args: observer.add(layer, args[0])

    hooks = [
        layer.register_forward_pre_hook(hook_for(observer, layer))
        for observer, layer in zip(observers, layers, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def watch(model: nn.Module, probe: Sequence[Batch]) -> list[_Tally]:
    """Run the probe through the model in dense, evaluation mode and sum up what each switchable FFN does."""
    tallies = [_Tally() for _ in layers_of(model)]
    with kept_modes(model), observed(model, tallies):
        set_mode(model, "dense")
        model.eval()
        for batch in probe:
            model(**batch)
    return tallies


def measure(
    model: nn.Module,
    probe: Sequence[Batch],
    last: Sequence[Found | None],
    random_state: int,
    fresh: bool = True,
) -> tuple[list[LayerMeasures], list[Found]]:
    """Measure every switchable FFN on the probe and find its present structure.

    Every rank runs the whole probe (rank 0's figures count), and finds the structure of its share of the layers.

    Args:
        model: a converted model.
        probe: fixed batches of model inputs.
        last: what was found last time per layer, labels for the neurons in their present order; or None.
        random_state: seed of the clustering.
        fresh: find the structure from scratch too, and take it if it is better by a margin, as the paper's authors do;
            otherwise from last time's alone, which takes a fraction of the time.

    Returns:
        Measures per layer, and what was found: the best structures now (labels for the neurons in their present
        order), patterns and routes, on the CPU.
    """
    layers = layers_of(model)
    tallies = watch(model, probe)
    rows = [_features_here(i, layer) for i, layer in enumerate(layers)]
    warm = [None if before is None else before.labels_F for before in last]
    labels = cluster_layers(
        rows, layers[0].ssd.num_experts, warm=warm, random_state=random_state, fresh=fresh
    )
    found = [
        Found(labels_F.cpu(), pack(tally.active_TF, layer.ssd.neuron_ids_F), tally.route_TK)
        for labels_F, tally, layer in zip(labels, tallies, layers, strict=True)
    ]
    measures = [_summarise(*each) for each in zip(tallies, layers, last, found, strict=True)]
    return from_main(measures), found


def _features_here(index: int, layer: SwitchableFFN) -> Tensor | None:
    """Return what a layer's neurons are grouped by, on the rank that groups it; one layer is gathered at a time."""
    with gathered(*layer.ssd.holders):
        return weight_features(layer.ssd.reads_FD.detach()) if groups_layer(index) else None


def _summarise(tally: _Tally, layer: SwitchableFFN, last: Found | None, found: Found) -> LayerMeasures:
    assert tally.load_E is not None, "the probe never reached the layer"
    assert tally.caught_E is not None
    mass = max(float(tally.mass), torch.finfo(torch.float64).tiny)
    active_TF = tally.active_TF
    return LayerMeasures(
        activation_ratio=float(tally.active) / (tally.tokens * layer.ssd.d_ff),
        mass_caught=float(tally.caught_E[layer.ssd.experts_per_token - 1]) / mass,
        mass_by_k=tuple((tally.caught_E / mass).tolist()),
        mass_best=float(tally.best) / mass,
        load_imbalance=float(tally.load_E.max() / tally.load_E.double().mean()),
        similarity=0.0 if last is None else similarity(last.labels_F, found.labels_F),
        similarity_in_use=similarity(current_structure(layer), found.labels_F),
        dead=float((~active_TF.any(dim=0)).double().mean()),
        always_on=float(active_TF.all(dim=0).double().mean()),
        pattern_similarity=None if last is None else jaccard(last.pattern_TW, found.pattern_TW),
        routing_changed=None if last is None else routes_changed(last.route_TK, found.route_TK)[0],
    )
