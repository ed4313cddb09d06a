"""The study of checkpoints that others wrote: a series, a single model, and all that can be wrong with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families.models import make
from study.runs import names
from support import tiny_gpt2
from torch import nn

from switchable import InputError
from switchable.data.tokenizers import train_bpe
from switchable.ffn.builders import build_model
from switchable.study.config import StudyConfig
from switchable.study.series import listed_sources
from switchable.study.study import study_checkpoints


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Three plain checkpoints as transformers saves them, with a tokenizer, and one of another shape."""
    base = tmp_path_factory.mktemp("series")
    tokenizer = train_bpe([p.read_text() for p in sorted(corpus.iterdir())[:3]], 260)
    for step in (100, 20, 3):
        model = resized(tiny_gpt2())
        with torch.no_grad():
            for block in model.transformer.h:
                block.mlp.c_fc.weight.add_(0.003 * step * torch.randn(block.mlp.c_fc.weight.shape))
        model.save_pretrained(base / f"step{step}")
    resized(tiny_gpt2(layers=3)).save_pretrained(base / "other7")
    tokenizer.save_pretrained(base)
    return base


def resized(model: nn.Module) -> Any:
    any_model: Any = model
    any_model.resize_token_embeddings(300)
    return any_model


def settings(text: Path, **changes: Any) -> StudyConfig:
    return StudyConfig(text=(str(text),), **changes)


def test_plain_checkpoints_are_studied_and_stay_as_they_are(series: Path, corpus: Path) -> None:
    before = {p: p.read_bytes() for p in series.rglob("*") if p.is_file()}
    study = study_checkpoints([f"{series}/step*"], settings(corpus, probe_tokens=256, num_experts=16))
    assert (study.problems, study.steps) == ([], [3, 20, 100])
    assert (study.layers[0].num_experts, study.results[0][0].experts_per_token) == (16, 3)
    assert study.probe["tokens"] == 256
    pattern = study.pairs["pattern"][0]
    assert pattern[0][1] > pattern[0][2]  # further apart, less alike: neurons are compared with themselves
    assert {p: p.read_bytes() for p in series.rglob("*") if p.is_file()} == before
    assert "similarity_pattern" in names(study)
    assert "loss" not in names(study)


def test_checkpoints_of_another_shape_and_broken_ones_are_left_out(
    series: Path, corpus: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "step500"
    shutil.copytree(series / "step20", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    given = [str(f) for f in (series / "step3", series / "other7", series / "step20", broken)]
    study = study_checkpoints(given, settings(corpus, tokenizer=str(series)))
    assert study.steps == [3, 20]
    assert "other7 has 3 FFNs, the first checkpoint 2" in study.problems[0]
    assert "step500/model.safetensors is missing or damaged" in study.problems[1]
    with pytest.raises(
        InputError, match=r"none of 1 checkpoints can be studied; .*step500/model\.safetensors is"
    ):
        study_checkpoints([str(broken)], settings(corpus, tokenizer=str(series)))


def test_one_model_of_another_activation_is_studied(
    series: Path, corpus: Path, study_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resized(tiny_gpt2("gelu_new")).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    code, printed, err = study_of(
        tmp_path / "model", "--text", corpus, "--tokenizer", series, "--sequence-length", 16
    )
    assert (code, err) == (0, "")
    assert len(printed["findings"]) == 3
    assert not {"similarity_pattern", "activation_ratio"} & set(printed["pictures"])
    assert "gelu_new is never exactly zero" in (tmp_path / "out/report.html").read_text()


def test_names_that_tell_the_same_step_twice_are_taken_in_their_order(series: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "first-v2", tmp_path / "second-v2"]
    for folder in folders:
        shutil.copytree(series / "step3", folder)
    found = listed_sources([str(folder) for folder in folders])
    assert found == dict(enumerate(folders))
    assert list(listed_sources([f"{series}/step*"])) == [3, 20, 100]


def test_a_model_that_reads_no_text_is_refused(series: Path, corpus: Path, tmp_path: Path) -> None:
    make("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(InputError, match="vit is a ViTForImageClassification, which reads no text"):
        study_checkpoints([str(tmp_path / "vit")], settings(corpus, tokenizer=str(series)))


def test_too_little_text_is_refused(series: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(InputError, match="measuring needs at least 64 tokens"):
        study_checkpoints([f"{series}/step*"], settings(tmp_path / "short.txt"))


@pytest.mark.parametrize(("family", "ffns"), [("bert", 2), ("t5", 4), ("llama", 2), ("opt", 2)])
def test_models_of_other_families_are_studied(
    family: str, ffns: int, series: Path, corpus: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "max_positions": 32}
    build_model(family, sizes, "relu", 300, {"eos_token_id": 0, "pad_token_id": 1}).save_pretrained(
        tmp_path / "model"
    )  # type: ignore[operator]
    study = study_checkpoints(
        [str(tmp_path / "model")],
        settings(corpus, tokenizer=str(series), sequence_length=32, probe_tokens=256),
    )
    assert study.problems == []
    assert [(shape.d_ff, shape.num_experts) for shape in study.layers] == [(48, 24)] * ffns
    for layer in study.results[0]:
        assert layer.experts_per_token == 4
        assert 0.2 < layer.activation_ratio < 0.8  # random weights: about half the neurons, gated or not
        assert layer.mass_router[-1] == pytest.approx(1.0)
