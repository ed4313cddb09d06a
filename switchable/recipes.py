"""Recipes: complete tables of the settings of switching, by name. docs/recipe.md has what they were measured to do.

    early   sparse steps are what saves: alternate as soon as the structures are stable
    late    dense steps multiply active neurons only and cost no more than sparse ones: train dense, with a penalty that
            keeps few neurons active, and teach sparse mode at the end
    dense   never sparse, no router learns: plain training, for comparison
    auto    each layer does what was measured to be cheapest here: sparse steps join early where they cost clearly less
            than dense ones, else at the end, as in `late` (`switching/schedule.py`)

A recipe is what stands where nothing is given; a setting that is given changes that one and no other (`settings.py`).
"""

from __future__ import annotations

from typing import Any

AUTO = "auto"

LEAST_NEURONS, TILE_NEURONS = 8, 32
"""Of an expert: no smaller ones were measured; and where the hardware multiplies bfloat16 by tiles, so many rows."""

PENALISED = "relu2"
"""The activation with which a recipe's `activation_l1` was measured to cost nothing in the end; it is 0 with others."""

_EARLY: dict[str, Any] = {
    "num_experts": 32,
    "experts_per_token": 6,
    "mass_target": None,
    "sparse_steps": 7,
    "min_dense_fraction": 0.1,
    "final_dense_fraction": 0.05,
    "monitor_every": 50,
    "monitor_growth": 1.0,
    "stability_threshold": 0.15,
    "max_activation_ratio": 0.3,
    "min_mass_caught": 0.8,
    "router_token_fraction": 0.5,
    "active_below": 0.2,
    "activation_l1": 0.0,  # what a loop of one's own minimises is not changed unasked
}
_LATE = _EARLY | {
    "num_experts": 128,
    "experts_per_token": 21,
    "mass_target": 0.93,
    "sparse_steps": 3,
    "min_dense_fraction": 0.92,
    "final_dense_fraction": 0.0,
    "monitor_growth": 1.3,
    "stability_threshold": 0.0,  # a structure stands once its layer has joined
    "router_token_fraction": 0.125,
    "active_below": 0.3,
    "activation_l1": 1e-4,
}
_DENSE = _LATE | {"min_dense_fraction": 1.0, "router_token_fraction": 0.0, "activation_l1": 0.0}
_AUTO = _LATE | {
    "stability_threshold": 0.15,
    "active_below": 1.0,  # below what the clock says
}
RECIPES: dict[str, dict[str, Any]] = {AUTO: _AUTO, "early": _EARLY, "late": _LATE, "dense": _DENSE}
"""All settings of `SwitchConfig` but `recipe` and `backend`. `num_experts` is the most: a model whose FFNs would get
experts of fewer than `LEAST_NEURONS` neurons gets fewer, and `experts_per_token` keeps its share of them."""
