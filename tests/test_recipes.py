"""Recipes fill in what is left out, and choose themselves by what the machine can do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from switchable.compute.cpu.active.library import active_library
from switchable.compute.cpu.llvm import this_machine
from switchable.config import from_dict, load, to_dict
from switchable.errors import InputError
from switchable.recipes import fitting, settings
from switchable.settings import SwitchConfig


def switch_of(switch: dict[str, Any], **model: Any) -> SwitchConfig:
    return from_dict({"model": model, "switch": switch}).switch


def test_what_is_given_stands_and_the_recipe_fills_in_the_rest() -> None:
    late = switch_of({"recipe": "late", "sparse_steps": 9}, d_model=64)
    # d_ff = 256: 32 experts of 8 neurons, a sixth of them to start with.
    assert (late.num_experts, late.experts_per_token, late.mass_target) == (32, 5, 0.93)
    assert (late.min_dense_fraction, late.activation_l1, late.sparse_steps) == (0.92, 1e-4, 9)
    assert late.recipe == "late"
    assert switch_of({"recipe": "early"}) == switch_of({}) == SwitchConfig()


@pytest.mark.parametrize(
    ("d_ff", "experts", "chosen"), [(1024, 128, 21), (4096, 128, 21), (100, 10, 1), (4, 1, 1), (24, 3, 1)]
)
def test_experts_of_eight_neurons_but_never_more_than_128(d_ff: int, experts: int, chosen: int) -> None:
    filled = settings("late", {}, d_ff, "relu2")
    assert (filled["num_experts"], filled["experts_per_token"]) == (experts, chosen)
    SwitchConfig(**filled)


def test_who_gives_the_experts_per_token_gets_them_in_every_layer() -> None:
    fixed = switch_of({"recipe": "late", "num_experts": 16, "experts_per_token": 4})
    assert (fixed.num_experts, fixed.experts_per_token, fixed.mass_target) == (16, 4, None)
    few = switch_of({"recipe": "late", "num_experts": 4})
    assert (few.experts_per_token, few.mass_target) == (1, 0.93)


def test_penalties_are_for_what_they_were_measured_on() -> None:
    def penalty(activation: str, **switch: Any) -> float:
        return switch_of({"recipe": "late", **switch}, activation=activation).activation_l1

    assert penalty("relu2") == penalty("relu2", schedule="static") == 1e-4
    assert penalty("relu") == penalty("relu2", schedule="dense") == 0.0  # dense training is dense training
    assert penalty("relu", activation_l1=1e-5) == 1e-5


def test_auto_is_late_where_dense_steps_can_leave_out_neurons() -> None:
    loops = active_library(64, torch.float32, this_machine()) is not None
    assert fitting(64, "relu2", False, "float32", "cpu") == ("late" if loops else "early")
    assert fitting(64, "relu2", True, "float32", "cpu") == "early"  # a gate
    assert fitting(64, "silu", False, "float32", "cpu") == "early"
    assert fitting(64, "relu2", False, "bfloat16", "cpu") == "early"
    assert fitting(64, "relu2", False, "float32", "cuda") == "early"


def test_what_is_read_from_files_and_flags_chooses_by_the_machine() -> None:
    here = "early" if torch.cuda.is_available() else fitting(256, "relu2", False, "float32", None)
    config = load(None, {"num_experts": 16})
    assert (config.switch.recipe, config.switch.num_experts) == (here, 16)
    assert from_dict(to_dict(config)) == config  # as saved and read again
    assert load(None, {"recipe": "early"}).switch == SwitchConfig()
    assert load(None, {"family": "llama"}).switch.recipe == "early"


def test_unknown_recipes_are_refused() -> None:
    with pytest.raises(InputError, match="recipe='later' is not known; use one of auto, early, late"):
        switch_of({"recipe": "later"})
