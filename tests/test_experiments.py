"""The experiments: every question's settings are valid, and the figures are those of a hand-made pair of runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from experiments import ending
from experiments.recipe import QUESTIONS, compare, configure, folder_name, line
from experiments.twins import report, table
from switchable.config import check, from_dict, read_yaml, to_dict
from switchable.errors import InputError

BASE = from_dict(read_yaml(Path(__file__).parents[1] / "experiments/recipe.yaml"), "recipe.yaml")
SUMMARY = {
    "val_loss_dense": 3.25,
    "val_loss_sparse": 3.5,
    "flops_nonembedding": 6.0,
    "sparse_fraction": 0.5,
    "sparse_layers": [0, 1],
    "experts_per_token": [6, 8],
    "experts": {"num_experts": 32},
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_variant_is_a_possible_configuration_of_its_own(question: str) -> None:
    configs = [configure(BASE, settings, seed=3) for settings in QUESTIONS[question].values()]
    for config in configs:
        check(config)
        assert config.train.seed == 3
    assert len(set(configs)) == len(configs)  # a setting that no section knows would change nothing


@pytest.mark.parametrize("variant", ending.VARIANTS)
def test_every_ending_is_a_possible_configuration(variant: str) -> None:
    settings = ending.VARIANTS[variant]
    changed = configure(BASE, settings, seed=0)
    check(changed)
    assert {name: getattr(changed.switch, name) for name in settings} == settings


def test_an_ending_by_hand() -> None:
    figures = ending.figures(SUMMARY | {"val_loss_dense": 3.0}, 3.25)
    assert list(figures.values()) == [3.0, 3.5, 3.25, (1 + 0.25) / 2, 0.5]
    assert ending.line("a", [figures, figures | {"loss_dense": 4.0}]).split() == [
        *["a", "3.5000", "3.5000", "3.2500", "62.5%", "50.0%"]
    ]
    without = figures | {"loss_sparse": None}
    assert ending.line("a", [without]).split() == ["a", "3.0000", "—", "3.2500", "62.5%", "50.0%"]


def test_a_fork_is_the_run_at_its_checkpoint_with_other_settings(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (10, 20):
        checkpoint = run / f"checkpoints/step-{step:06}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_text(str(step))
    (run / "tokenizer").mkdir()
    for name in ("metrics.jsonl", "probe.safetensors"):
        (run / name).write_text(name)
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(BASE)))
    left = tmp_path / "out/.tmp-fork"
    left.mkdir(parents=True)
    (left / "half").write_text("of a fork that was interrupted")
    ending.fork(run, 10, {"min_dense_fraction": 0.92}, tmp_path / "out/fork")
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    files = ("checkpoints/step-000010/weights", "config.yaml", "metrics.jsonl", "probe.safetensors")
    assert found == {f"fork/{file}" for file in files}
    changed = from_dict(read_yaml(tmp_path / "out/fork/config.yaml"), "the fork")
    assert changed == configure(BASE, {"min_dense_fraction": 0.92}, BASE.train.seed) != BASE
    with pytest.raises(InputError, match="no checkpoint of step 30; it has: 10, 20"):
        ending.fork(run, 30, {}, tmp_path / "out/other")


def test_steps_are_a_factor() -> None:
    assert configure(BASE, {"steps": 1.25}, seed=0).train.steps == 1875


def test_a_variant_against_its_dense_run() -> None:
    dense = {"val_loss_dense": 3.0, "flops_nonembedding": 8.0}
    figures = compare(SUMMARY, dense)
    assert figures == {
        "delta_dense": 0.25,
        "delta_sparse": 0.5,
        "flops_ratio_nonembedding": 0.75,
        "sparse_fraction": 0.5,
        "expert_fraction": (1 + 0.25) / 2,
    }
    assert line("a", figures).split() == ["a", "+0.2500", "+0.5000", "0.750", "50.0%", "62.5%"]
    assert compare(SUMMARY | {"val_loss_sparse": None}, dense)["delta_sparse"] is None


def test_twins_by_hand_and_without_a_sparse_mode() -> None:
    figures = report({"dense_dense": [0.5, 0.7], "ssd_dense": [0.6, 1.0], "ssd_sparse": [0.5, None]})
    # Above by 0.1 and 0.3: their deviation is sqrt(0.02), that of their mean sqrt(0.02 / 2).
    assert figures["ssd_dense_above"] == pytest.approx({"mean": 0.2, "stderr": 0.1})
    assert json.loads(json.dumps(figures, allow_nan=False))["ssd_sparse_above"] is None
    assert [line.split() for line in table({"sst2": figures})][1] == [
        *["sst2", "0.6000", "+0.2000", "±", "0.1000", "never", "sparse"]
    ]


def test_every_variant_has_a_folder_of_its_own_whose_name_any_file_system_takes() -> None:
    variants = [settings for variants in QUESTIONS.values() for settings in variants.values()]
    different = {json.dumps(settings, sort_keys=True) for settings in variants}
    names = {folder_name(settings, seed) for settings in variants for seed in (0, 1)}
    assert len(names) == 2 * len(different)
    assert max(map(len, names)) <= 200
    assert folder_name({}, 3) == "default_s3"
    assert folder_name({"sparse_steps": 15, "num_experts": 8}, 0) == "num_experts=8_sparse_steps=15_s0"
