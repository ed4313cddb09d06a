"""Recipes are complete tables; they choose themselves by what the machine can do; what is gone is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from switchable import SwitchConfig, convert
from switchable.cli import main
from switchable.compute.cpu.active.active import skips_idle_neurons
from switchable.compute.cpu.llvm import this_machine
from switchable.config import check, from_dict, load, read_stored, to_dict
from switchable.errors import InputError
from switchable.ffn.convert import layers_of
from switchable.gone import GONE
from switchable.recipes import RECIPES
from switchable.settings import BY_RECIPE, settled

FIELDS = [f.name for f in dataclasses.fields(SwitchConfig)]


def late(d_ff: int = 256, activation: str = "relu2", **given: Any) -> SwitchConfig:
    return settled(SwitchConfig("late", **given), d_ff, activation)


def test_a_recipe_has_a_value_for_every_setting() -> None:
    for table in RECIPES.values():
        assert {*table, "recipe", "backend"} == set(FIELDS)
    assert len(FIELDS) <= 16


def test_what_is_given_stands_and_the_recipe_fills_in_the_rest() -> None:
    config = late(sparse_steps=9)
    # d_ff = 256: 32 experts of 8 neurons, 21 of 128 of them to start with.
    assert (config.num_experts, config.experts_per_token, config.mass_target) == (32, 5, 0.93)
    assert (config.min_dense_fraction, config.activation_l1, config.sparse_steps) == (0.92, 1e-4, 9)
    for name in RECIPES:
        complete = settled(SwitchConfig(name), 1024, "relu2")
        assert {n: getattr(complete, n) for n in RECIPES[name]} == RECIPES[name]
        assert settled(complete, 1024, "relu2") == complete


def test_the_library_does_what_the_flag_does() -> None:
    for name in RECIPES:
        model = {"d_model": 64, "activation": "relu"}
        assert (
            settled(SwitchConfig(name), 256, "relu")
            == from_dict({"model": model, "switch": {"recipe": name}}).switch
        )


@pytest.mark.parametrize(
    ("d_ff", "experts", "chosen"), [(1024, 128, 21), (4096, 128, 21), (100, 10, 1), (4, 1, 1), (24, 3, 1)]
)
def test_experts_of_eight_neurons_but_never_more_than_128(d_ff: int, experts: int, chosen: int) -> None:
    config = late(d_ff)
    assert (config.num_experts, config.experts_per_token) == (experts, chosen)


def test_giving_one_setting_drops_no_other() -> None:
    complete = late(1024)
    for name, value in {
        "experts_per_token": 3,
        "num_experts": 64,
        "mass_target": None,
        "sparse_steps": 2,
    }.items():
        config = late(1024, **{name: value})
        others = [other for other in FIELDS if other not in (name, "experts_per_token")]
        assert getattr(config, name) == value
        assert [getattr(config, other) for other in others] == [getattr(complete, other) for other in others]
    assert late(1024, num_experts=64).experts_per_token == 10  # keeps its share of the experts


def test_penalties_are_for_what_they_were_measured_on() -> None:
    assert (late().activation_l1, late(activation="relu").activation_l1) == (1e-4, 0.0)
    assert late(activation="relu", activation_l1=1e-5).activation_l1 == 1e-5
    assert settled(SwitchConfig("dense"), 256, "relu2").activation_l1 == 0.0
    assert settled(SwitchConfig("auto"), 256, "relu2").activation_l1 == 1e-4


def test_what_depends_on_the_model_waits_for_it(make_gpt2: Any) -> None:
    config = SwitchConfig("auto")
    assert config.num_experts is BY_RECIPE
    assert pickle.loads(pickle.dumps(config)) == config
    model = make_gpt2("relu2")
    convert(model, config)
    own = layers_of(model)[0].ssd.settings.config
    assert (own.recipe, own.num_experts) == ("auto", 8)  # d_ff = 64


def test_where_dense_steps_can_leave_out_neurons() -> None:
    assert skips_idle_neurons(64, "relu2", torch.float32, "cpu") == (this_machine() is not None)
    assert not skips_idle_neurons(64, "silu", torch.float32, "cpu")
    machine = this_machine()
    assert skips_idle_neurons(64, "relu2", torch.bfloat16, "cpu") == (machine is not None and machine.pairs)
    assert not skips_idle_neurons(64, "relu2", torch.float16, "cpu")
    assert not skips_idle_neurons(64, "relu2", torch.float32, "cuda")


def test_what_is_read_from_files_and_flags_has_recipe_auto() -> None:
    config = load(None, {"num_experts": 16, "precision": "float32"})
    assert (config.switch.recipe, config.switch.num_experts) == ("auto", 16)
    assert from_dict(to_dict(config)) == config  # as saved and read again


def test_the_recipes_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split()[1:5] for line in lines[1 : 1 + len(RECIPES["early"])]}
    assert table["num_experts"] == ["128", "32", "128", "128"]
    assert table["mass_target"] == ["0.93", "none", "0.93", "0.93"]
    assert set(RECIPES["early"]) <= set(table)
    assert main(["recipes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipes"] == RECIPES


@pytest.mark.parametrize("name", sorted(GONE))
def test_settings_that_are_gone_say_what_replaces_them(name: str, tmp_path: Path) -> None:
    section = "objective" if name == "objective" else "switch"
    (tmp_path / "old.yaml").write_text(f"{section}: {{{name}: 1}}")
    with pytest.raises(InputError, match=f"{name} is gone; "):
        load(tmp_path / "old.yaml", {})


def stored(tmp_path: Path, **switch: Any) -> Path:
    """A config.yaml as version 0.1 wrote it, with some settings of switching changed."""
    import yaml

    old = {
        "recipe": "early", "num_experts": 8, "experts_per_token": 3, "mass_target": None, "max_expert_fraction": 0.5,
        "structure": "weights", "router": "learned", "router_objective": "mass", "router_token_fraction": 0.5,
        "router_sparse_fraction": 0.0625, "router_gate_gradient": False, "router_noise": 0.0, "activation_l1": 0.0,
        "activation_target": 0.0, "commitment": 0.0, "active_below": 0.2, "expert_compute": "eager", "gate": "unit",
        "load_balance": 0.0, "schedule": "ssd", "join": "each", "monitor_every": 3, "monitor_growth": 1.0,
        "probe_tokens": 77, "min_dense_fraction": 0.15, "final_dense_fraction": 0.2, "stability_threshold": 0.0,
        "max_activation_ratio": 1.0, "min_mass_caught": 0.0, "sparse_steps": 2, "dense_steps": 1, "regroup": "drift",
        "regroup_below": 0.0,
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    objective = {"objective": None, "mask_fraction": 0.15, "whole_words": False, "mean_span_length": 3.0}
    path.write_text(
        yaml.safe_dump({"model": {"d_model": 16}, "objective": objective, "switch": old | switch})
    )
    return path


def test_a_run_of_version_0_1_is_read_if_it_asks_for_nothing_that_is_gone(tmp_path: Path) -> None:
    config = read_stored(stored(tmp_path))
    check(config)
    assert (config.switch.backend, config.train.probe_tokens, config.switch.sparse_steps) == (
        "reference",
        77,
        2,
    )
    assert read_stored(stored(tmp_path, expert_compute="sorted")).switch.backend == "auto"  # is gone
    dense = read_stored(stored(tmp_path, schedule="dense")).switch
    assert (dense.recipe, dense.never_sparse) == ("dense", True)
    for name, value in {
        "router_noise": 0.5, "gate": "softmax", "schedule": "static", "regroup_below": 1.0, "dense_steps": 5,
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=f"{name}={value!r} is gone .*open this run with switchable 0.1"):
            read_stored(stored(tmp_path, **{name: value}))
    with pytest.raises(InputError, match=r"activation_target=0\.0 is gone"):
        read_stored(stored(tmp_path, activation_l1=1e-4))  # was paid in every layer
