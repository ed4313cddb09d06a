"""Configuration: YAML and flags, types, and errors that name the nearest known key."""

from __future__ import annotations

from pathlib import Path

import pytest

from switchable import InputError
from switchable.config import RunConfig, changed, check, from_dict, load, to_dict


def test_flags_lie_over_yaml_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {d_model: 64}\ntrain: {learning_rate: 3e-4, steps: 7}\n")
    config = load(path, {"steps": "9", "data": ["a.txt", "b.txt"], "threads": "none"})
    assert (config.model.d_model, config.train.learning_rate, config.train.steps) == (64, 3e-4, 9)
    assert config.data.data == ("a.txt", "b.txt")
    assert config.train.threads is None
    assert config.train.batch_size == RunConfig().train.batch_size


def test_plain_form_round_trips() -> None:
    config = load(None, {"d_model": 32, "data": ["x"], "recipe": "early"})
    assert from_dict(to_dict(config)) == config
    assert changed(config, load(None, {"d_model": 48, "data": ["x"], "recipe": "early"})) == [
        "model.d_model: 32 -> 48"
    ]


def test_field_names_are_unique_over_all_sections() -> None:
    names = [key for fields in to_dict(RunConfig()).values() for key in fields]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {d_modl: 64}", r"section 'model': unknown key 'd_modl'; did you mean 'd_model'\?"),
        ("modle: {d_model: 64}", r"unknown section 'modle'; allowed: model, .*did you mean 'model'\?"),
        ("model: {d_model: wide}", r"d_model='wide' must be a whole number"),
        ("model: {d_model: 64.5}", r"d_model=64.5 must be a whole number"),
        ("model: {activation: gelu}", r"activation='gelu' is not known; use one of relu, relu2"),
        ("train: {steps: true}", r"steps=True must be a whole number"),
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


@pytest.mark.parametrize("sizes", [{"d_model": 0}, {"d_ff": 0}, {"d_ff": -8}])
def test_sizes_that_no_recipe_fits_are_refused_as_ever(sizes: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"(d_model|d_ff)=\S+ is out of range"):
        check(load(None, sizes))


def test_a_missing_file() -> None:
    with pytest.raises(InputError, match="does not exist"):
        load(Path("nowhere.yaml"), {})
