"""Recipes: settings of switching that go together, by name. docs/recipe.md has what they were measured to do.

    early   sparse steps are what saves: alternate as soon as the structures are stable. The plain defaults.
    late    dense steps multiply active neurons only and cost no more than sparse ones: train dense, with a penalty that
            keeps few neurons active, and teach sparse mode at the end.
    auto    late where dense steps can do that, early elsewhere.

A recipe fills in what the user left out; whatever they set stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from switchable.errors import divisors_near

RECIPES = ("auto", "early", "late")

MOST_EXPERTS = 128
LEAST_NEURONS = 8
"""Of an expert, in the recipe `late`: no more and no smaller ones were measured."""


def settings(name: str, given: Mapping[str, Any], d_ff: int, activation: str) -> dict[str, Any]:
    """Return the fields of `SwitchConfig` that are given, and those that a recipe fills in.

    Args:
        name: `"early"` or `"late"`.
        given: the fields that the user set, `num_experts` as a whole number.
        d_ff: neurons per FFN.
        activation: of the FFN; the strength of the penalty was measured for squared ReLU.
    """
    if name == "early" or d_ff < 1:  # which is refused later on
        return dict(given)
    # Who asks for dense training gets that, without a penalty.
    penalised = activation == "relu2" and given.get("schedule", "ssd") in ("ssd", "static")
    (experts,) = divisors_near(d_ff, min(MOST_EXPERTS, max(1, d_ff // LEAST_NEURONS)), count=1)
    filled: dict[str, Any] = {
        "num_experts": experts,
        "max_expert_fraction": 0.65,
        "min_dense_fraction": 0.92,
        "final_dense_fraction": 0.0,
        "stability_threshold": 0.0,  # a structure stands once its layer has joined
        "sparse_steps": 3,
        "dense_steps": 1,
        "router_token_fraction": 0.125,
        "monitor_growth": 1.3,
        "active_below": 0.3,
        "activation_l1": 1e-4 if penalised else 0.0,
        "activation_target": 0.12,
        **given,
    }
    if "experts_per_token" not in filled:  # who gives one wants that one, and no other for each layer
        filled["experts_per_token"] = max(1, filled["num_experts"] // 6)
        filled.setdefault("mass_target", 0.93)
    return filled


def fitting(d_model: int, activation: str, gated: bool, precision: str, device: str | None) -> str:
    """Return the recipe for a model and a machine: `"late"` where dense steps can multiply active neurons only.

    Args:
        d_model: width.
        activation: of the FFN.
        gated: whether the FFN has a gate.
        precision: `"float32"` or `"bfloat16"`, of the multiplications.
        device: torch device; None = cuda if there is one, else cpu.
    """
    import torch  # here: the settings of a run are read and checked before torch is loaded

    from switchable.compute.cpu.active.library import active_library
    from switchable.compute.cpu.llvm import this_machine
    from switchable.compute.cpu.sorted import FAST_ACTIVATIONS

    on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    possible = on_cpu and precision == "float32" and not gated and activation in FAST_ACTIVATIONS
    has_loops = possible and active_library(d_model, torch.float32, this_machine()) is not None
    return "late" if has_loops else "early"
