"""`switchable bench`: its table from known times, what it measures of each layer, and answers to wrong input."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from support import tiny_gpt2
from torch import nn

from switchable import SwitchConfig, convert
from switchable.cli import main
from switchable.evaluation import bench
from switchable.ffn.convert import layers_of
from switchable.ffn.ssd import SSD
from switchable.store.checkpoint import save
from switchable.timing import Times


@pytest.fixture
def model() -> nn.Module:
    """Of three layers, the last of which has no sparse mode."""
    found = tiny_gpt2(layers=3)
    convert(found, SwitchConfig(num_experts=8, experts_per_token=3))
    layers = layers_of(found)
    layers[1].ssd.set_experts_per_token(2)
    layers[2].ssd.takes_part = False
    return found


@pytest.fixture
def folder(model: nn.Module, tmp_path: Path) -> Path:
    save(tmp_path / "model", model)
    return tmp_path / "model"


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense takes 6 ms and sparse 2, 3 and 6 ms; every contender is called once."""

    def take_turns(contenders: Mapping[str, Callable[[], object]], _seconds: float) -> Times:
        for call in contenders.values():
            call()
        return Times({"dense": [0.006] * 3, "sparse": [0.002, 0.003, 0.006]})

    monkeypatch.setattr(bench, "take_turns", take_turns)


@pytest.mark.usefixtures("known_times")
@pytest.mark.parametrize("training", [[], ["--training"]], ids=["inference", "training"])
def test_a_line_for_each_layer_with_its_own_k(
    folder: Path, training: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(folder), "--tokens", "1", "600", *training]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "float32, forward" + " and backward" * bool(training)
    assert (
        lines[2]
        == "1 of 3 FFNs stay dense (transformer.h.2.mlp: the model's folder does not say why): not timed"
    )
    rows = [line.split() for line in lines[4:-1]]
    first, second = "transformer.h.0.mlp", "transformer.h.1.mlp"
    assert [row[:3] for row in rows] == [
        [first, "3", "1"], [first, "3", "600"], [second, "2", "1"], [second, "2", "600"],
    ]  # fmt: skip
    assert rows[0][3:] == ["6.000", "ms", "3.000", "ms", "2.00x"]
    document = json.loads(lines[-1])
    assert set(document) == {"model", "machine", "precision", "training", "layers"}
    assert set(document["machine"]) == {"processor", "threads", "torch"}
    assert document["training"] == bool(training)
    assert [row["experts_per_token"] for row in document["layers"]] == [3, 3, 2, 2]
    assert document["layers"][0]["speedup"] == 2.0


def test_one_k_for_all_layers_and_real_times(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(folder), "--tokens", "2", "--experts-per-token", "8", "--seconds", "0.01"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["layers"]
    assert [(row["experts_per_token"], row["num_experts"]) for row in rows] == [(8, 8)] * 2
    assert all(row["seconds_dense"] > 0 and row["seconds_sparse"] > 0 for row in rows)


@pytest.mark.usefixtures("known_times")
def test_dense_is_the_plain_layer_and_the_model_stays_as_it_was(model: nn.Module) -> None:
    seen = []
    layer = layers_of(model)[0]
    layer.register_forward_hook(lambda *_: seen.append((layer.ssd.mode, layer.ssd.router_learns)))
    bench.measure(model.eval(), [4], None, training=True, seconds=0.0)
    assert seen == [("dense", False), ("sparse", True)]
    assert layer.ssd.mode == "dense"
    assert layer.ssd.router_learns
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.usefixtures("known_times")
@pytest.mark.parametrize(
    ("trained", "flags", "expected"),
    [
        ("bfloat16", [], "bfloat16"), ("float32", [], "float32"), ("bfloat16", ["--precision", "float32"], "float32"),
        (None, [], "float32"), (None, ["--precision", "bfloat16"], "bfloat16"),
    ],
)  # fmt: skip
def test_layers_are_multiplied_in_the_runs_precision_unless_told_otherwise(
    model: nn.Module,
    tmp_path: Path,
    trained: str | None,
    flags: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(tmp_path / "final", model)
    if trained:
        (tmp_path / "config.yaml").write_text(f"train: {{precision: {trained}}}\n")
    seen = set()
    multiply = SSD.activations

    def activations(self: SSD, x: torch.Tensor) -> torch.Tensor:
        hidden = multiply(self, x)
        if x.shape[-2] == 600:  # not while the model is loaded
            seen.add(hidden.dtype)
        return hidden

    monkeypatch.setattr(SSD, "activations", activations)
    assert main(["bench", str(tmp_path / "final"), "--tokens", "600", *flags]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert json.loads(shown[-1])["precision"] == expected
    assert shown[1] == f"{expected}, forward"
    assert seen == {getattr(torch, expected)}


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--tokens", "0"], "tokens=0 is out of range"),
        (["--seconds", "0"], "seconds=0.0 is out of range"),
        (["--experts-per-token", "9"], "experts_per_token=9 is out of range; use a whole number from 1 to 8"),
    ],
)
def test_impossible_sizes_are_answered_in_one_line(
    folder: Path, arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert answer in error
    assert error.count("\n") == 1


def test_folders_without_a_model_and_models_without_sparse_layers(
    model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    for layer in layers_of(model):
        layer.ssd.takes_part = False
    save(tmp_path / "dense", model)
    assert main(["bench", str(tmp_path / "dense")]) == 2
    assert "no sparse mode: 3 of 3 FFNs stay dense" in capsys.readouterr().err
