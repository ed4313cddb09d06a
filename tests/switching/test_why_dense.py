"""Sparse mode that was asked for and is not there says so, and why: value, limit, layer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from switchable import Controller, InputError, SwitchConfig, load, set_mode
from switchable.cli import main
from switchable.compare.report import _why_dense, warnings
from switchable.data.tokenizers import train_bpe
from switchable.ffn.builders import build_model
from switchable.ffn.convert import convert, layers_of, shown_mode, why_dense
from switchable.store.checkpoint import save
from switchable.store.export import export

NOT_SPARSE: dict[str, Any] = {
    "num_experts": 8, "experts_per_token": 3, "monitor_every": 2, "min_dense_fraction": 0.25,
    "stability_threshold": 0.0, "max_activation_ratio": 0.01, "min_mass_caught": 0.0,
}  # fmt: skip


def train(model: nn.Module, tokens: Tensor, steps: int = 4) -> Controller:
    """The README's loop."""
    config = SwitchConfig(**NOT_SPARSE)
    controller = Controller(model, tokens, total_steps=4, config=config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(steps):
        controller.step(optimizer)
    return controller


def test_a_loop_that_stays_dense_says_so_at_its_end(
    switchable_gpt2: nn.Module, tokens: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        controller = train(switchable_gpt2, tokens, 3)
        assert not caplog.records
        controller.step(torch.optim.SGD(switchable_gpt2.parameters(), lr=0.0))
    said = controller.why_dense()
    assert said is not None
    assert caplog.messages == [f"there is no sparse mode: {said}"]
    measured = layers_of(switchable_gpt2)[0].ssd.why_dense
    assert measured.startswith("at step 2: activation ratio 0.")
    assert measured.endswith(", above max_activation_ratio=0.01")
    assert f"transformer.h.0.mlp: {measured}" in said
    assert said.startswith("2 of 2 FFNs stay dense (")
    with pytest.raises(InputError, match=r"no sparse mode: 2 of 2 FFNs .*max_activation_ratio=0\.01"):
        set_mode(switchable_gpt2, "sparse")


def test_before_any_measurement_and_after_a_resume(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    controller = Controller(switchable_gpt2, tokens, total_steps=100)
    assert "no measurement was due yet" in str(controller.why_dense())
    kept = train(switchable_gpt2, tokens)
    again = Controller(switchable_gpt2, tokens, total_steps=4, config=SwitchConfig(**NOT_SPARSE))
    again.load_state_dict(kept.state_dict())
    assert "activation ratio" in str(again.why_dense())
    old = {k: v for k, v in kept.state_dict().items() if k != "why_dense"}  # as version 0.1 wrote it
    again.load_state_dict(old)
    assert "does not say why" in str(again.why_dense())


def test_every_layer_takes_part(switchable_gpt2: nn.Module) -> None:
    assert why_dense(switchable_gpt2) is None
    assert shown_mode(switchable_gpt2, "sparse") == "sparse mode, K=3 of 8 experts"
    layers_of(switchable_gpt2)[0].ssd.experts_per_token = 5
    assert shown_mode(switchable_gpt2, "sparse") == "sparse mode, K=(5, 3) of 8 experts"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with a tokenizer whose first layer stays dense."""
    tokenizer = train_bpe(["the cat sat on a mat and saw one red dog run"] * 4, 300)
    sizes = {"d_model": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "max_positions": 32}
    torch.manual_seed(0)
    model = build_model("gpt2", sizes, "relu", 300, {"eos_token_id": 0})
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3))
    first = layers_of(model)[0].ssd
    first.takes_part, first.why_dense = False, "activation ratio 0.620, above max_activation_ratio=0.3"
    save(tmp_path / "ours", model, tokenizer=tokenizer)
    return tmp_path / "ours"


def test_generate_says_mode_k_and_speed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(folder), "--prompt", "the cat", "--max-new-tokens", "5"]
    assert main(arguments) == 0
    assert capsys.readouterr().err.startswith("dense mode, in float32: 5 tokens, ")
    assert main([*arguments, "--mode", "sparse"]) == 0
    said = capsys.readouterr().err
    assert said.startswith(
        "sparse mode, K=3 of 8 experts; 1 of 2 FFNs stay dense (transformer.h.0.mlp: activation ratio 0.620, above "
        "max_activation_ratio=0.3), in float32: 5 tokens, "
    )
    assert said.endswith(" tokens/s\n")


def test_eval_shows_the_models_own_k(folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = next(corpus.iterdir())
    assert main(["eval", str(folder), "--data", str(text), "--threads", "1", "--experts-per-token", "6"]) == 0
    said = capsys.readouterr()
    assert (
        "reading 1 x text file\nthe model's own: sparse mode, K=3 of 8 experts; 1 of 2 FFNs stay dense"
        in said.err
    )
    assert said.out.splitlines()[0].split() == [
        "task", "metric", "examples", "dense", "sparse", "K=6", "sparse", "K=3"
    ]  # fmt: skip


def test_without_a_sparse_mode_nothing_pretends_to_be_sparse(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load(folder)
    for layer in layers_of(model):
        layer.ssd.takes_part = False
    save(tmp_path / "dense", model, tokenizer=tokenizer)
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 9)
    dense = str(tmp_path / "dense")
    for arguments in (
        ["generate", dense, "--mode", "sparse"],
        ["export", dense, "--to", "sparse", "--out", str(tmp_path / "out")],
        ["bench", dense],
        ["eval", dense, "--mode", "sparse", "--data", str(tmp_path / "text.txt")],
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        # Export says what it is going to do first.
        assert said.count("\n") == 1 + (arguments[0] == "export")
        assert "no sparse mode: 2 of 2 FFNs stay dense (transformer.h.0.mlp: activation ratio 0.620" in said
    assert not (tmp_path / "out").exists()


def test_plain_checkpoints_open_dense(
    folder: Path,
    tmp_path: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain, text = tmp_path / "plain", str(next(corpus.iterdir()))
    export(folder, "dense", plain)
    for arguments in (
        ["generate", str(plain), "--prompt", "the cat", "--max-new-tokens", "3"],
        ["eval", str(plain), "--data", text, "--threads", "1"],
        ["export", str(plain), "--to", "dense", "--out", str(tmp_path / "again")],
    ):
        caplog.clear()
        assert main(arguments) == 0, capsys.readouterr().err
        assert caplog.messages == [
            f"{plain} is a plain dense model; make it switchable with: switchable convert {plain} --data TEXT --out DIR"
        ]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["to"] == "dense"
    for refused in (["generate", str(plain), "--mode", "sparse"], ["bench", str(plain)]):
        assert main(refused) == 2
        assert "convert it first" in capsys.readouterr().err


def test_a_prompt_that_is_not_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = b"the caf\xe9".decode("utf-8", "surrogateescape")  # as Python reads it from the command line
    assert main(["generate", str(folder), "--prompt", prompt]) == 2
    said = capsys.readouterr().err
    assert "the prompt is not UTF-8 behind its first 7 characters" in said
    assert said.count("\n") == 1


def test_a_comparison_says_which_run_has_no_sparse_mode() -> None:
    summary = {
        "why_dense": "2 of 2 FFNs stay dense (x)",
        "sparse_layers": [0, 0],
        "experts": {"min_dense_fraction": 0.1},
    }
    assert _why_dense(summary) == "2 of 2 FFNs stay dense (x)"
    assert _why_dense(summary | {"sparse_layers": [0, 1]}) is None
    assert _why_dense(summary | {"experts": {"min_dense_fraction": 1}}) is None
    found = {"seeds": [0], "ran_with": [], "why_dense": {0: "2 of 2 FFNs stay dense (x)"}}
    dense = {"seeds": [0], "ran_with": [], "why_dense": {}}
    assert warnings({"dense": dense, "ssd": found}) == [
        "ssd, seed 0, has no sparse mode: 2 of 2 FFNs stay dense (x)"
    ]
