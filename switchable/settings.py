"""The settings of switching: experts, router, and when to change between dense and sparse steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from switchable.errors import InputError
from switchable.recipes import RECIPES


def _option(default: Any, help_text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass(frozen=True)
class SwitchConfig:
    """How FFNs are cut into experts, how tokens choose them, and the schedule of dense and sparse steps."""

    recipe: str = _option(
        "early",
        "what fills in the settings of this section that are not given: early = these defaults, for machines on which "
        "sparse steps are what saves; late = dense steps multiply active neurons only, sparse ones come at the end; "
        "auto = late where dense steps can do that (ReLU or ReLU^2 in float32 on the CPU), else early",
        choices=RECIPES,
    )
    num_experts: int = _option(32, "experts per FFN; divides d_ff")
    experts_per_token: int = _option(
        6, "experts that each token computes in sparse mode; with mass_target, where each layer starts"
    )
    mass_target: float | None = _option(
        None,
        "share of the activation mass that the router's experts must catch: each layer's experts per token follow "
        "from it at every measurement; none: experts_per_token in every layer",
    )
    max_expert_fraction: float = _option(
        0.5, "with mass_target: a layer that needs a larger fraction of its experts stays dense"
    )
    structure: str = _option(
        "weights",
        "what neurons are grouped by: weights = rows of the input projection; coactivation = firing together on the "
        "probe; mixed = both",
        choices=("weights", "coactivation", "mixed"),
    )
    router: str = _option(
        "learned",
        "learned: trained in dense steps on each expert's share of the activation mass; "
        "weight_mean: mean of an expert's neurons, as the paper's authors do",
        choices=("learned", "weight_mean"),
    )
    router_objective: str = _option(
        "mass",
        "what the learned router predicts: mass = each expert's share of the activation mass; norm = its share of the "
        "lengths of what experts write; ranking = the experts_per_token experts of most mass, all alike",
        choices=("mass", "norm", "ranking"),
    )
    router_token_fraction: float = _option(0.5, "fraction of a dense step's tokens that train the router")
    router_sparse_fraction: float = _option(
        0.0625,
        "fraction of a sparse step's tokens that train the router too (unit gates); for them all neurons are computed, "
        "forward only, so use little; 0 = the router does not learn between dense steps",
    )
    router_gate_gradient: bool = _option(
        False,
        "let the router learn in sparse steps from what the experts chosen do to the loss too, by a straight-through "
        "gate; it unlearns the mass meanwhile",
    )
    router_noise: float = _option(
        0.0,
        "scale of Gumbel noise on the scores in sparse steps, so that experts near the border take turns; 0 = none, "
        "1 = drawn in proportion to the predicted mass",
    )
    activation_l1: float = _option(
        0.0, "penalty in dense steps: this times each FFN's sum of |activations|, mean over tokens (nats)"
    )
    activation_target: float = _option(
        0.0, "activation ratio down to which the penalty on activations is paid, per layer; 0 = always"
    )
    commitment: float = _option(
        0.0,
        "penalty in dense steps, in layers that take part: this times the share of the activation mass outside the "
        "router's K experts, mean over tokens (nats); neurons learn to fire where their expert is chosen",
    )
    active_below: float = _option(
        0.2,
        "in layers whose activation ratio is below this, dense steps multiply only the neurons that are active: the "
        "same function and gradient, faster (ReLU or ReLU^2, on the CPU); 0 = never",
    )
    expert_compute: str = _option("auto", "implementation of the experts by name; auto = fastest here")
    gate: str = _option(
        "unit",
        "factor of a selected expert's output: unit = 1, so that all experts together are the dense layer; softmax = "
        "K x softmax over the selected scores, as a mixture of experts has (there is no dense mode then)",
        choices=("unit", "softmax"),
    )
    load_balance: float = _option(
        0.0, "coefficient of the load-balance loss of sparse steps (Switch Transformer); 0 = none"
    )
    schedule: str = _option(
        "ssd",
        "ssd: dense, then alternating, then dense; dense: never sparse; static: dense, then sparse ever after; "
        "sparse: sparse from the first step",
        choices=("ssd", "dense", "static", "sparse"),
    )
    join: str = _option(
        "each",
        "each: a layer takes part in sparse steps as soon as it is sparse and stable itself; "
        "together: all layers, as soon as they are on average",
        choices=("each", "together"),
    )
    monitor_every: int = _option(50, "optimizer steps between measurements on the probe; 0 = never")
    monitor_growth: float = _option(
        1.0,
        "factor by which the steps done grow from one measurement to the next, at least: with 1.1, every "
        "monitor_every steps at first and every tenth of the run so far later on; 1 = always every monitor_every steps",
    )
    probe_tokens: int = _option(2048, "validation tokens on which everything is measured")
    min_dense_fraction: float = _option(0.1, "fraction of all steps, at the start, that are always dense")
    final_dense_fraction: float = _option(0.05, "fraction of all steps, at the end, that are always dense")
    stability_threshold: float = _option(
        0.1, "adjusted Rand index of successive structures from which a layer counts as stable; 0 = always"
    )
    max_activation_ratio: float = _option(
        0.3, "largest activation ratio at which a layer counts as sparse; others stay dense"
    )
    min_mass_caught: float = _option(
        0.6,
        "least share of the activation mass in the router's experts at which a layer counts as sparse; others stay "
        "dense",
    )
    sparse_steps: int = _option(7, "sparse steps in a row before the next return to dense")
    dense_steps: int = _option(1, "dense steps at each return")
    regroup: str = _option(
        "drift",
        "when layers that take part get a new structure: drift = see regroup_below; "
        "switch = at every change from dense to sparse",
        choices=("drift", "switch"),
    )
    regroup_below: float = _option(
        0.0, "a layer is regrouped when its structure's similarity to a fresh one falls below this; 0 = never"
    )

    def __post_init__(self) -> None:
        self._check_whole("num_experts", 1)
        self._check_whole("experts_per_token", 1)
        self._check_whole("monitor_every", 0)
        self._check_whole("probe_tokens", 1)
        self._check_whole("sparse_steps", 1)
        self._check_whole("dense_steps", 0)
        if self.experts_per_token > self.num_experts:
            raise InputError(
                f"experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}; "
                f"use 1 to {self.num_experts}"
            )
        names = (
            "max_expert_fraction",
            "min_dense_fraction",
            "final_dense_fraction",
            "router_token_fraction",
            "router_sparse_fraction",
            "activation_target",
            "active_below",
            "max_activation_ratio",
            "min_mass_caught",
        )
        for name in (*names, "stability_threshold", "regroup_below"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name}={getattr(self, name)} is out of range; use a number from 0 to 1")
        if not 1.0 <= self.monitor_growth <= 10.0:
            raise InputError(
                f"monitor_growth={self.monitor_growth} is out of range; use a number from 1 to 10, e.g. 1.1"
            )
        if self.mass_target is not None and not 0.0 < self.mass_target < 1.0:
            raise InputError(
                f"mass_target={self.mass_target} is out of range; use a number between 0 and 1, e.g. 0.95, or none"
            )
        if self.router_token_fraction == 0.0:
            raise InputError("router_token_fraction=0 would never train the router; use more than 0, up to 1")
        for name, usual in (("router_noise", "0.5"), ("activation_l1", "1e-4"), ("commitment", "0.016")):
            if getattr(self, name) < 0:
                raise InputError(
                    f"{name}={getattr(self, name)} is out of range; use 0 (none) or more, e.g. {usual}"
                )
        if self.load_balance < 0:
            raise InputError(
                f"load_balance={self.load_balance} is out of range; use 0 or more (0.01 is usual)"
            )
        if self.monitor_every == 0 and self.schedule in ("ssd", "static"):
            raise InputError(
                f"monitor_every=0 with schedule={self.schedule} would never find a layer to make sparse; measure every "
                "50 steps, say, or use schedule dense or sparse"
            )
        if self.gate == "softmax" and self.schedule != "sparse":
            raise InputError(
                f"gate=softmax with schedule={self.schedule} would train two different functions in dense and "
                "sparse steps; use gate unit, or schedule sparse"
            )

    def _check_whole(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise InputError(
                f"{name}={getattr(self, name)} is out of range; use a whole number of at least {least}"
            )
