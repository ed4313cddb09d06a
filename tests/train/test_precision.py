"""The ways of computing a step that change its cost and not what is learned: bfloat16, recomputing, compiling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from train.test_loop import in_two_parts, small, weights

from switchable.switching import monitor
from switchable.train import setup
from switchable.train.pretrain import pretrain


def losses(corpus: Path, folder: Path, **train: Any) -> list[float]:
    """Train 20 steps across several switches; return the training losses (nats per token)."""
    figures = pretrain(small(corpus, train=train), folder / "run", folder.parent / "cache", quiet=True)
    assert figures["switches"] == 10
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(corpus, tmp_path_factory.mktemp("precision") / "plain")


def test_bfloat16_learns_the_same_to_its_precision(corpus: Path, tmp_path: Path, plain: list[float]) -> None:
    found = losses(corpus, tmp_path / "half", precision="bfloat16")
    assert found == pytest.approx(plain, rel=1e-2)  # 8 bits of mantissa: 2^-8 is 4e-3
    assert found != plain  # it was not computed in float32


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_probe_is_measured_in_the_runs_precision(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    seen: dict[str, set[bool]] = {"probe": set(), "grouping": set()}

    def noting(what: str, call: Any) -> Any:
        def noted(*args: Any, **keywords: Any) -> Any:
            seen[what].add(torch.is_autocast_enabled("cpu"))
            return call(*args, **keywords)

        return noted

    monkeypatch.setattr(monitor, "watch", noting("probe", monitor.watch))
    monkeypatch.setattr(monitor, "cluster_layers", noting("grouping", monitor.cluster_layers))
    losses(corpus, tmp_path / precision, precision=precision)
    assert seen == {"probe": {precision == "bfloat16"}, "grouping": {False}}


def test_bfloat16_resumes_bitwise(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(corpus, train={"precision": "bfloat16"}, model={"d_model": 64, "d_ff": 256})
    pretrain(config, tmp_path / "whole/run", tmp_path / "cache", quiet=True)
    in_two_parts(config, tmp_path, monkeypatch)
    whole, parts = (weights(tmp_path / run / "checkpoints/step-000020") for run in ("whole/run", "run"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("precision", "longest", "expected"),
    [("bfloat16", 16, "eager"), ("bfloat16", 15, "sdpa"), ("float32", 16, "sdpa")],
)
def test_attention_is_multiplied_by_what_is_faster(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, longest: int, expected: str
) -> None:
    monkeypatch.setattr(setup, "LONGEST_EAGER", longest)
    job = setup.set_up(small(corpus, train={"precision": precision}), tmp_path / "cache", quiet=True)
    assert job.model.config._attn_implementation == expected
    batch = job.batch(0)
    with torch.no_grad():
        losses = [float(job.model(**batch).loss)]
        job.model.set_attn_implementation("sdpa" if expected == "eager" else "eager")
        losses.append(float(job.model(**batch).loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_recomputing_activations_changes_no_bit(corpus: Path, tmp_path: Path, plain: list[float]) -> None:
    assert losses(corpus, tmp_path / "again", activation_checkpointing=True) == plain


@pytest.mark.filterwarnings("ignore")  # dynamo and inductor warn of their own insides
@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile on a CPU needs a C++ compiler",
)
def test_compiled_blocks_learn_the_same_in_both_modes(
    corpus: Path, tmp_path: Path, plain: list[float]
) -> None:
    assert losses(corpus, tmp_path / "compiled", compile=True) == pytest.approx(plain, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile on a CPU needs a C++ compiler",
)
@pytest.mark.parametrize("switch", [{"mass_target": 0.5}, {"recipe": "late", "mass_target": 0.9}], ids=str)
def test_compiled_blocks_measure_as_plain_ones_do(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], switch: dict[str, Any]
) -> None:
    def measured(**train: Any) -> list[Any]:
        out = tmp_path / str(len(train))
        pretrain(small(corpus, train=train, switch=switch), out, tmp_path / "cache", quiet=True)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [
            (line["experts_per_token"], line["takes_part"]) for line in lines if line["kind"] == "measure"
        ]

    assert measured(compile=True) == measured()
    # Observers and the compiler of our own loops are not traced.
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "recompile_limit" not in said
