"""Configuration: YAML and flags, types, and errors that name the nearest known key."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path

import pytest

from switchable import InputError, SwitchConfig
from switchable.adapt.config import AdaptConfig
from switchable.config import RunConfig, changed, check, from_dict, load, read_stored, to_dict
from switchable.data.config import DataConfig, ObjectiveConfig
from switchable.errors import divisors_near
from switchable.evaluation.config import EvalConfig
from switchable.finetune.config import FinetuneConfig
from switchable.infer.sampling import Sampling
from switchable.sections import ModelConfig, TrainConfig
from switchable.study.config import StudyConfig
from switchable.train.pretrain import pretrain


def test_flags_lie_over_yaml_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {d_model: 64}\ntrain: {learning_rate: 3e-4, steps: 7}\n")
    config = load(path, {"steps": "9", "data": ["a.txt", "b.txt"], "threads": "none"})
    assert (config.model.d_model, config.train.learning_rate, config.train.steps) == (64, 3e-4, 9)
    assert config.data.data == ("a.txt", "b.txt")
    assert config.train.threads is None
    assert config.train.batch_size == RunConfig().train.batch_size


def test_plain_form_round_trips() -> None:
    config = load(
        None, {"d_model": 32, "data": ["x"], "recipe": "early", "num_experts": 8, "precision": "float32"}
    )
    assert from_dict(to_dict(config)) == config
    assert changed(
        config,
        load(
            None, {"d_model": 48, "data": ["x"], "recipe": "early", "num_experts": 8, "precision": "float32"}
        ),
    ) == ["model.d_model: 32 -> 48"]


def test_field_names_are_unique_over_all_sections() -> None:
    names = [key for fields in to_dict(RunConfig()).values() for key in fields]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {d_modl: 64}", r"section 'model': unknown key 'd_modl'; did you mean 'd_model'\?"),
        ("modle: {d_model: 64}", r"unknown section 'modle'; allowed: model, .*did you mean 'model'\?"),
        ("3: {d_model: 64}", r"unknown section 3; allowed: model, "),
        ("model: {d_model: wide}", r"d_model='wide' must be a whole number"),
        ("model: {d_model: 64.5}", r"d_model=64.5 must be a whole number"),
        ("model: {activation: gelu}", r"activation='gelu' is not known; use one of relu, relu2"),
        ("model: {family: gpt3}", r"family='gpt3' is not known; use one of gpt2, .*did you mean 'gpt2'\\?"),
        ("model: {num_heads: 3}", r"num_heads=3 does not divide d_model=256; use one of 1, 2, 4"),
        ("train: {learning_rate: .nan}", r"learning_rate=nan is out of range; use a number above 0"),
        ("train: {steps: true}", r"steps=True must be a whole number"),
        ("train: {steps: .inf}", r"steps=inf must be a whole number"),
        ("train: {steps: 1e30}", r"steps='1e30' must be a whole number"),
        ("train: {steps: 3000000000}", r"steps=3000000000 is out of range"),
        ("train: {steps: " + "9" * 5000 + "}", r"not readable YAML: .*5000 digits"),
        ("[" * 3000, r"not readable YAML"),
        ("train: {steps: 2024-13-01}", r"not readable YAML|must be a whole number"),
        (
            "train: {steps: '" + "9" * 5000 + "'}",
            r"steps='9{79}... \(5002 characters\) must be a whole number",
        ),
        ("train: {weight_decay: -0.1}", r"weight_decay=-0.1 is out of range; use a number from 0 to 1000"),
        (
            "train: {learning_rate: " + "9" * 400 + "}",
            r"learning_rate=\(a number of 1329 bits\) is out of range",
        ),
        ("model: 3", r"section 'model' must hold"),
        ("switch: 3", r"section 'switch' must hold"),
        ("switch: {num_experts: many}", r"section 'switch': num_experts='many' must be a whole number"),
        ("switch: {recipe: 3}", r"section 'switch': recipe=3 must be text"),
        ("- a", r"must hold sections"),
        ("a: [", r"not readable YAML"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load(path, {"num_experts": "8"} if text == "switch: 3" else {})


def test_a_stored_configuration_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: 3")
    with pytest.raises(InputError, match="section 'model' must hold `key: value` lines, not 3"):
        read_stored(path)


def wrong_values(cls: type) -> list[tuple[str, object]]:
    """For every field of a configuration, values that it must refuse."""
    found: list[tuple[str, object]] = []
    for f in dataclasses.fields(cls):
        kind = str(typing.get_type_hints(cls)[f.name])
        found.append((f.name, object()))
        if f.metadata["choices"]:
            found.append((f.name, "no-such-choice"))
        if "int" in kind or "float" in kind:
            limits = [f.metadata[name] for name in ("least", "above")] + [
                f.metadata["most"],
                f.metadata["below"],
            ]
            assert any(limit is not None for limit in limits), f"{f.name} has no limits"
            found += [(f.name, value) for value in ("1", True, math.nan, math.inf, -math.inf, -1, 10**400)]
            if "int" in kind:
                found += [(f.name, 2.5), (f.name, 2**64)]
            if "tuple" in kind:
                found = [(name, (value,) if name == f.name else value) for name, value in found]
    return found


CLASSES = (
    ModelConfig, TrainConfig, DataConfig, ObjectiveConfig, SwitchConfig, AdaptConfig, FinetuneConfig, EvalConfig,
    StudyConfig, Sampling,
)  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "name", "value"), [(cls, name, value) for cls in CLASSES for name, value in wrong_values(cls)]
)
def test_every_class_refuses_wrong_values_in_its_constructor(cls: type, name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{name}="):
        cls(**{name: value})


def test_a_missing_file() -> None:
    with pytest.raises(InputError, match="does not exist"):
        load(Path("nowhere.yaml"), {})


def test_a_whole_number_given_for_a_fraction_is_kept_as_one() -> None:
    kept = TrainConfig(weight_decay=0).weight_decay
    assert (type(kept), kept) == (float, 0.0)
    assert Sampling(seed=2**63 - 1).seed == 2**63 - 1


def test_a_model_larger_than_the_memory_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    # 40 blocks of 4 * 65,536^2 + 2 * 65,536 * 262,144 weights, 300 + 16 embeddings of 65,536, 4 bytes each
    given = {"d_model": 65_536, "num_layers": 40, "sequence_length": 16, "vocab_size": 300}
    config = load(None, {**given, "recipe": "early"})
    with pytest.raises(InputError, match=r"at least 8\.25e\+03 GB and this machine has"):
        pretrain(config, tmp_path / "run", tmp_path / "cache")
    assert not list(tmp_path.iterdir())
    check(config)  # what `switchable plan` may look at


@pytest.mark.parametrize(("n", "wanted", "near"), [(12, 5, [3, 4, 6]), (2**24, 3, [1, 2, 4]), (7, 7, [1, 7])])
def test_divisors_by_hand(n: int, wanted: int, near: list[int]) -> None:
    assert divisors_near(n, wanted, count=3) == near
