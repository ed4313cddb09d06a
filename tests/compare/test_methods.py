"""Each method is a few changes to one configuration; what is to be the same is the same to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from switchable import InputError
from switchable.compare.baselines import VARIANTS
from switchable.compare.methods import METHODS, check_methods, in_order, method_config, named
from switchable.compute.cpu.active.active import skips_idle_neurons
from switchable.config import RunConfig, changed, check, from_dict, load
from switchable.ffn.convert import is_router_parameter
from switchable.files import read_records
from switchable.train.pretrain import pretrain
from switchable.train.setup import set_up

GIVEN: dict[str, Any] = {
    "model": {"d_model": 16, "num_layers": 2, "num_heads": 2},
    "data": {"vocab_size": 300},
    "train": {"steps": 400, "batch_size": 4, "sequence_length": 16, "learning_rate": 2e-3, "threads": 1},
    "switch": {
        "num_experts": 8, "experts_per_token": 3, "monitor_every": 7, "stability_threshold": 0.4,
        "recipe": "early", "sparse_steps": 5, "max_activation_ratio": 0.25, "activation_l1": 1e-4,
        "min_dense_fraction": 0.7,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def given(corpus: Path) -> RunConfig:
    return from_dict(GIVEN | {"data": {"vocab_size": 300, "data": [str(corpus)]}})


def test_seeds_draw_the_same_weights_and_batches_whatever_the_method(
    given: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    jobs = {name: set_up(method_config(given, name, 5), cache, quiet=True) for name in METHODS}
    other = set_up(method_config(given, "ssd", 6), cache, quiet=True)
    first = jobs["dense"]
    weights = {n: p for n, p in first.model.named_parameters() if not is_router_parameter(n)}
    for name, job in jobs.items():
        own = {n: p for n, p in job.model.named_parameters() if not is_router_parameter(n)}
        assert own.keys() == weights.keys(), name
        assert all(torch.equal(own[n], weights[n]) for n in own), name
        for step in (0, 399):
            assert torch.equal(job.batch(step)["input_ids"], first.batch(step)["input_ids"]), name
    assert not torch.equal(other.batch(0)["input_ids"], first.batch(0)["input_ids"])
    assert not torch.equal(next(other.model.parameters()), next(first.model.parameters()))


def test_what_each_method_changes(given: RunConfig) -> None:
    found = {name: method_config(given, name, 3) for name in METHODS}
    for name, config in found.items():
        check(config)
        assert (config.model, config.data) == (given.model, given.data)
        assert config.train.seed == 3
        same = dataclasses.replace(
            config.train, seed=0, router_learning_rate=given.train.router_learning_rate
        )
        assert same == given.train, name
    assert found["ssd"].switch == given.switch
    assert found["static"].switch == given.switch  # its schedule is another one
    dense, active = found["dense"].switch, found["dense-active"].switch
    assert (dense.never_sparse, dense.num_experts, dense.monitor_every, dense.active_below) == (
        True,
        1,
        0,
        0.0,
    )
    for below, kept in ((1.0, 0.3), (0.1, 0.1)):  # recipe auto leaves it to the clock, unless it is given
        auto = load(None, {"recipe": "auto", "precision": "float32", "active_below": below})
        assert method_config(auto, "dense-active", 0).switch.active_below == kept
    assert (active.never_sparse, active.num_experts, active.active_below) == (
        True,
        1,
        given.switch.active_below,
    )
    assert active.monitor_every == given.switch.monitor_every > 0
    assert active.activation_l1 == given.switch.activation_l1 > 0
    assert found["dense-then-moe"].switch == dataclasses.replace(
        given.switch, recipe="dense", min_dense_fraction=1.0
    )
    paper, moe = found["ssd-paper"].switch, found["moe"].switch
    assert (paper.sparse_steps, paper.max_activation_ratio, paper.min_mass_caught) == (30, 1.0, 0.0)
    assert (paper.num_experts, paper.experts_per_token, paper.stability_threshold) == (8, 3, 0.4)
    assert (paper.min_dense_fraction, paper.final_dense_fraction, paper.activation_l1) == (0.1, 0.05, 0.0)
    assert (moe.num_experts, moe.experts_per_token) == (8, 3)
    assert VARIANTS["ssd-paper"].schedule(paper, 400).dense_steps == 10
    assert VARIANTS["moe"].schedule(moe, 400).initial(2).takes_part == (True, True)
    for name in ("moe", "ssd-paper"):
        assert found[name].train.router_learning_rate == given.train.learning_rate


def test_dense_active_is_the_cheaper_dense_model_of_the_readme(corpus: Path, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "switchable pretrain --recipe dense --activation-l1 1e-4 " in readme
    flags = {
        "data": [str(corpus)], "vocab_size": 300, "d_model": 64, "num_layers": 2, "steps": 24, "batch_size": 16,
        "sequence_length": 32, "learning_rate": 1e-2, "eval_tokens": 256, "probe_tokens": 128, "threads": 1,
        "monitor_every": 4, "log_every": 1, "precision": "float32",
    }  # fmt: skip
    configs = {
        "readme": load(None, flags | {"recipe": "dense", "activation_l1": 1e-4}),
        "method": method_config(load(None, flags | {"recipe": "late"}), "dense-active", 0),
    }
    # Where no layer is ever sparse, the number of experts decides nothing.
    differ = {line.partition(":")[0] for line in changed(*configs.values())}
    assert differ == {"switch.num_experts", "switch.experts_per_token"}
    found = {}
    for name, config in configs.items():
        summary = pretrain(config, tmp_path / name, tmp_path / "cache", quiet=True)
        records = read_records(tmp_path / name / "metrics.jsonl")
        losses = [(r["loss"], r["flops"]) for r in records if r["kind"] == "train"]
        found[name] = (losses, summary["val_loss_dense"], summary["flops"], summary["active_layers"])
        if skips_idle_neurons(64, "relu2", torch.float32, "cpu"):
            assert any(summary["active_layers"])
    assert found["readme"] == found["method"]
    assert len(found["readme"][0]) == 24


def test_tuning_the_recipe_leaves_the_others_alone(given: RunConfig) -> None:
    tuned = dataclasses.replace(
        given,
        switch=dataclasses.replace(
            given.switch, sparse_steps=9, router_token_fraction=0.25, final_dense_fraction=0.1
        ),
        train=dataclasses.replace(given.train, router_learning_rate=0.3),
    )
    for name in ("dense", "moe", "ssd-paper"):
        assert method_config(tuned, name, 0) == method_config(given, name, 0)
    more = dataclasses.replace(given.switch, num_experts=16)
    assert method_config(dataclasses.replace(given, switch=more), "dense", 0) == method_config(
        given, "dense", 0
    )


def test_a_factor_scales_the_steps_and_what_is_a_fraction_of_them(given: RunConfig) -> None:
    longer = method_config(given, "ssd-paper@1.5", 3)
    assert longer.train.steps == 600  # of 400
    assert longer.switch.sparse_steps == 45  # 7.5 %
    assert method_config(given, "dense@0.66", 0).train.steps == 264
    assert method_config(given, "dense@0.001", 0).train.steps == 1
    plain = method_config(given, "ssd", 3)
    assert method_config(given, "ssd@1", 3) == plain
    other = method_config(given, "ssd@2", 3)
    assert dataclasses.replace(other, train=dataclasses.replace(other.train, steps=400)) == plain
    assert named("moe@1.2").summary == METHODS["moe"].summary + "; 1.2 times the steps"
    assert in_order({"moe", "ssd@2", "ssd@0.5", "dense", "ssd"}) == [
        "dense",
        "ssd@0.5",
        "ssd",
        "ssd@2",
        "moe",
    ]


def test_longer_runs_see_the_same_batches_first(
    given: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    plain, longer = (set_up(method_config(given, name, 5), cache, quiet=True) for name in ("ssd", "ssd@1.5"))
    for step in (0, 399):
        assert torch.equal(plain.batch(step)["input_ids"], longer.batch(step)["input_ids"])


def test_unknown_methods_are_refused() -> None:
    assert check_methods(["ssd", "dense", "ssd"]) == ("ssd", "dense")
    with pytest.raises(InputError, match=r"method 'ssd-papr' is not known; did you mean 'ssd-paper'\?"):
        check_methods(["dense", "ssd-papr"])
    assert check_methods(["ssd@1.04", "dense@0.5"]) == ("ssd@1.04", "dense@0.5")
    for wrong in ("ssd@", "ssd@0", "ssd@0.0", "ssd@-1", "ssd@1e3", "ssd@101", "ssd@nan", "ssd@1@2"):
        with pytest.raises(InputError, match="after @ comes a factor of the steps above 0 and at most 100"):
            check_methods([wrong])
    with pytest.raises(InputError, match="goes on from a dense run and has no steps of its own"):
        check_methods(["dense-then-moe@2"])
    with pytest.raises(InputError, match="no method given"):
        check_methods([])
