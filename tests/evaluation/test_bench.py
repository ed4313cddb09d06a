"""`switchable bench`: its table from known times, what it measures of each layer, and answers to wrong input."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support import tiny_gpt2
from torch import nn

from switchable import SwitchConfig, convert
from switchable.cli import main
from switchable.evaluation import bench
from switchable.ffn.convert import layers_of
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
    assert lines[0].endswith("float32")
    rows = [line.split() for line in lines[2:-1]]
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


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--tokens", "0"], "tokens=0 is out of range"),
        (["--seconds", "0"], "seconds=0.0 is out of range"),
        (["--experts-per-token", "9"], "experts_per_token=9 is not possible with the 8 experts"),
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
    assert "no layer of this model takes part in sparse mode" in capsys.readouterr().err
