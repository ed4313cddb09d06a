"""Everything that one pass over the probe tells about every FFN of a model; docs/measures.md has the equations.

Sums are exact and kept in float64; of what grows with the tokens only one number per token and one bit per token and
neuron is kept, so that memory is bounded whatever the model's width and depth. The layers are watched through hooks,
the model is left as it was.

    probe -> measure_model(model) -> per layer: LayerStudy (numbers, goes into the report)
                                              + pattern (bits, compared between checkpoints by similarity.py)

What counts as an active neuron: a_i ≠ 0 for ReLU and its kin. Other activations are never exactly zero; there a neuron
is active on a token if it is among the fewest that give 99 % of the output (`needed_neurons`).

Shapes: B batch, S sequence, T tokens, D d_model, F d_ff, E experts, K experts per token.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from switchable.ffn.convert import layers_of
from switchable.ffn.layer import SwitchableFFN
from switchable.store.probe import Probe
from switchable.switching.measures import LayerSums, pack, show

EXACT_ZEROS = ("relu", "relu2", "relu6")
"""Activations (names in `ACT2FN`) that are exactly zero for an inactive neuron."""
OUTPUT_SHARE = 0.99
SAMPLED_TOKENS = 512  # tokens on which `needed_neurons` is found where it does not define what is active
AT_ONCE = 1024  # tokens whose activations are in memory at once
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class LayerStudy:
    """The measures of one layer of one checkpoint; shares are 0 to 1."""

    experts_per_token: int  # the layer's own K at this checkpoint
    takes_part: bool  # whether the layer is sparse in sparse mode
    activation_ratio: float  # mean over tokens of the share of neurons that are active
    ratio_quantiles: list[float]
    """Quantiles (`QUANTILES`) over tokens of the share of neurons that are active."""
    dead: float  # share of neurons active on no token
    always_on: float  # share of neurons active on every token
    needed: float  # mean share of neurons that give 99 % of a token's output
    mass_best: list[float]
    """Share of the activation mass in the best 1, 2, ... E experts of each token."""
    mass_router: list[float]
    """The same for the router's first 1, 2, ... E experts."""
    load: list[float]  # share of all choices (K per token) that fell on each expert
    load_imbalance: float  # load of the busiest expert over the mean load, 1 to E/K

    @property
    def mass_random(self) -> list[float]:
        """The same for experts drawn at random, on average: K/E."""
        experts = len(self.load)
        return [(k + 1) / experts for k in range(experts)]

    @property
    def mass_caught(self) -> float:
        """Share of the activation mass in the router's K experts."""
        return self.mass_router[self.experts_per_token - 1]

    @property
    def mass_best_k(self) -> float:
        """Share of the activation mass in the best K experts."""
        return self.mass_best[self.experts_per_token - 1]


def measure_model(
    model: nn.Module, probe: Probe, pattern_tokens: int | None = None
) -> list[tuple[LayerStudy, Tensor]]:
    """Measure every switchable FFN of a converted model on a probe, in one pass without gradients; modes are kept.

    Returns of each FFN its measures, and which neurons are active on which tokens, in the neurons' first order, packed
    (`switching.measures.pack`): of `pattern_tokens` tokens at most, evenly spaced; None: of all.
    """
    layers = layers_of(model)
    meters = [_Meter(layer, probe.tokens, pattern_tokens) for layer in layers]
    device = next(model.parameters()).device
    batches = ({key: value.to(device) for key, value in batch.items()} for batch in probe.batches)
    show(model, batches, [meter.add for meter in meters])
    return [meter.result(layer) for meter, layer in zip(meters, layers, strict=True)]


def needed_neurons(hidden_TF: Tensor, down_FD: Tensor) -> tuple[Tensor, Tensor]:
    """Find how many neurons of each token give `OUTPUT_SHARE` of its output: up to a relative error of 1 %.

    Neurons are taken in the order of |a_i| · ‖down_i‖, the length of what they add to the output; the error is that of
    the sum of the others, ‖Σ a_i down_i‖ / ‖output‖ (CETT, Zhang et al. 2024, arXiv 2402.03804). The number is found by
    bisection, per token: so many are enough, and one less is not. (The error need not fall with every neuron added
    where activations have both signs, so that fewer may be enough by chance.)

    The output projection's bias is left out. Returns needed_T, int64, and which neurons these are, bool [T, F].
    """
    hidden_TF, down_FD = hidden_TF.float(), down_FD.float()
    strength_TF = hidden_TF.abs() * down_FD.norm(dim=1)
    sorted_TF, order_TF = strength_TF.sort(dim=1, descending=True, stable=True)
    place_TF = torch.empty_like(order_TF).scatter_(
        1, order_TF, torch.arange(order_TF.shape[1], device=order_TF.device).expand_as(order_TF)
    )
    allowed_T = (1 - OUTPUT_SHARE) * (hidden_TF @ down_FD).norm(dim=1)
    high_T = (sorted_TF > 0).sum(dim=1)  # enough: nothing is left out
    low_T = torch.full_like(high_T, -1)  # not enough
    while bool((open_T := high_T - low_T > 1).any()):
        middle_T = (low_T + high_T) // 2
        rest_TF = hidden_TF * (place_TF >= middle_T[:, None])
        enough_T = (rest_TF @ down_FD).norm(dim=1) <= allowed_T
        high_T = torch.where(open_T & enough_T, middle_T, high_T)
        low_T = torch.where(open_T & ~enough_T, middle_T, low_T)
    return high_T, place_TF < high_T[:, None]


class _Meter:
    """Takes in one layer's inputs, a batch at a time."""

    def __init__(self, layer: SwitchableFFN, tokens: int, pattern_tokens: int | None) -> None:
        self.sums = LayerSums(layer)
        self.pattern_every = 1 if pattern_tokens is None else max(1, -(-tokens // pattern_tokens))
        self.sample_every = max(1, tokens // SAMPLED_TOKENS)
        # A piece per call, for each token: its active share, needed neurons and pattern.
        self.kept: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, layer: SwitchableFFN, x: Tensor) -> None:
        for piece_TD in torch.split(x.reshape(-1, layer.ssd.d_model), AT_ONCE):
            self._add_piece(layer, piece_TD)

    def _add_piece(self, layer: SwitchableFFN, x_TD: Tensor) -> None:
        hidden_TF = layer.ssd.activations(x_TD)
        down_FD = layer.ssd.weights.down_FD
        if layer.ssd.settings.activation in EXACT_ZEROS:
            active_TF = hidden_TF != 0
            picked = self._every(self.sample_every, len(x_TD))
            needed_T, _ = needed_neurons(hidden_TF[picked], down_FD)
        else:
            needed_T, active_TF = needed_neurons(hidden_TF, down_FD)
        self.kept["needed"].append(needed_T.cpu())
        self.kept["ratios"].append(active_TF.double().mean(dim=1).cpu())
        picked = self._every(self.pattern_every, len(x_TD))
        self.kept["patterns"].append(pack(active_TF[picked], layer.ssd.neuron_ids_F))
        self.sums.add_tokens(layer, x_TD, hidden_TF, active_TF)

    def _every(self, every: int, count: int) -> slice:
        """The tokens among the next `count` whose number is a multiple of `every`."""
        return slice(-self.sums.tokens % every, count, every)

    def result(self, layer: SwitchableFFN) -> tuple[LayerStudy, Tensor]:
        sums, load_E = self.sums, self.sums.load_E.double()
        assert sums.tokens, "the probe never reached the layer"
        ratio_T = torch.cat(self.kept["ratios"])
        quantiles = torch.quantile(ratio_T, torch.tensor(QUANTILES, dtype=torch.float64))
        study = LayerStudy(
            experts_per_token=sums.chosen,
            takes_part=layer.ssd.takes_part,
            activation_ratio=float(ratio_T.mean()),
            ratio_quantiles=quantiles.tolist(),
            dead=sums.dead,
            always_on=sums.always_on,
            needed=float(torch.cat(self.kept["needed"]).double().mean()) / layer.ssd.d_ff,
            mass_best=sums.mass_best,
            mass_router=sums.mass_router,
            load=(load_E / load_E.sum()).tolist(),
            load_imbalance=sums.load_imbalance,
        )
        return study, torch.cat(self.kept["patterns"])
