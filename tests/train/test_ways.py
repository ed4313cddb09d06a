"""What a run says its layers multiply is what they multiply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from train.test_loop import small

from switchable.compute.cpu.llvm import this_machine
from switchable.ffn.ssd import SSD
from switchable.files import read_records
from switchable.train.pretrain import pretrain

EVERY = "dense steps multiply every neuron: idle ones are left out on a CPU, of 512 tokens or more at once"
LEFT_OUT = {
    "float32": ({}, 0.0, ""),
    "bfloat16, a half active": (
        {"precision": "bfloat16"},
        0.0,
        "leave out idle neurons where fewer than 0.2",
    ),
    "few tokens": ({"gradient_accumulation_steps": 2}, 0.0, EVERY),
    "dropout": ({}, 1e-9, EVERY),
}
"""Settings of a run with `active_below` 1, a dropout, and what it says where its layers multiply every neuron."""


@pytest.mark.skipif(this_machine() is None, reason="no loops for this processor")
@pytest.mark.parametrize(("train", "drops", "why"), LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_what_a_run_says_its_layers_multiply_is_what_they_multiply(
    train: dict[str, Any],
    drops: float,
    why: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    way, machine = "dense" if why else "active", this_machine()
    if "precision" in train and machine is not None and not machine.pairs:
        why = EVERY
    if drops:  # what is built for a run drops nothing out
        monkeypatch.setattr(SSD, "hidden_dropout", drops)
    config = small(
        corpus,
        model={"d_model": 32},
        train={"batch_size": 32, "steps": 8} | train,
        switch={"recipe": "late", "active_below": 1.0, "min_dense_fraction": 1.0, "activation_l1": 0.0},
    )
    figures = pretrain(config, tmp_path / "run", tmp_path / "cache")
    records = read_records(tmp_path / "run/metrics.jsonl")
    found = {tuple(r["layer_ways"]) for r in records if r["kind"] == "train" and r["step"] > 3}
    assert found == {(way, way)}
    assert [(r["from"], r["to"]) for r in records if r["kind"] == "change"] == [("dense", way)] * 2 * (
        way == "active"
    )
    assert figures["active_layers"] == [int(way == "active")] * 2
    ratios = [each["activation_ratio"] for r in records if r["kind"] == "measure" for each in r["layers"]]
    assert all(0.2 < ratio < 1 for ratio in ratios)
    assert why in capsys.readouterr().err
