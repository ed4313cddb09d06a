"""What a verb says first and last, that its next command works, and that none is silent while it works long."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from switchable import progress
from switchable.cli import main

SMALL = shlex.split(
    "--d-model 16 --num-layers 2 --num-heads 2 --vocab-size 400 --steps 12 --batch-size 4 --sequence-length 16 "
    "--eval-every 6 --checkpoint-every 5 --threads 1 --monitor-every 3 --num-experts 8 --experts-per-token 3 "
    "--stability-threshold 0 --set eval_tokens=256 probe_tokens=128 max_activation_ratio=1 min_mass_caught=0"
)
SPARSE = shlex.split("--recipe early --sparse-steps 2 --min-dense-fraction 0.25")
CONVERT = shlex.split("--num-experts 8 --calibration-tokens 2000 --eval-tokens 256 --keep-activation")

Runs = Callable[[str], tuple[Path, dict[str, Any]]]
Say = Callable[..., tuple[list[str], list[str]]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a verb that must succeed; return the lines of standard output and of standard error."""

    def run(*arguments: object) -> tuple[list[str], list[str]]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        lines = err.splitlines()
        # What is said while text is read and tokenized is tested with it, in tests/data.
        while lines and lines[0].startswith(("training a byte-level BPE", "read ")):
            del lines[0]
        return out.splitlines(), lines

    return run


def next_command(line: str) -> list[str]:
    """The command of a line `next: ...`."""
    assert line.startswith("next: ")
    return shlex.split(line.removeprefix("next: "))


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_pretrain(said: Say, corpus: Path, tmp_path: Path, family: str) -> None:
    given = ["--data", corpus, "--cache", tmp_path / "cache", "--out", tmp_path / "a run"]
    out, err = said("pretrain", *SMALL, *SPARSE, *given, "--family", family)
    (line,) = out
    figures = json.loads(line)
    assert figures == json.loads((tmp_path / "a run/summary.json").read_text())
    recipe, precision, speed, model, training, writes = err[:6]
    assert precision.startswith(
        "precision float32: it is what precision auto is here (an FFN of this model, "
    )
    assert speed.startswith("3 of 8 experts and their choice by 8 bits are ")
    assert " times as fast as a dense FFN here, forward and backward" in speed
    assert recipe.startswith(
        "recipe early: from step 3 on at the earliest 2 sparse steps to each dense one, experts chosen by products in "
        "8 bits, in the last steps by the router; changed: "
    )
    assert "sparse_steps=2, min_dense_fraction=0.25" in recipe
    layers = 4 if family == "t5" else 2
    vocabulary = json.loads((tmp_path / "a run/final/config.json").read_text())["vocab_size"]
    assert model == (
        f"model: {family}, {figures['parameters']:,} parameters, vocabulary of {vocabulary}; {layers} of {layers} "
        "FFNs are switchable: 8 experts of 8 neurons"
    )
    assert training.startswith("training: 12 steps of 64 tokens, 768 in all (")
    assert training.endswith("times the text); float32 on cpu, 1 CPU thread")
    assert writes.startswith(f"writes to {tmp_path / 'a run'}: a checkpoint every 5 steps, ")
    saved, loss, cost, then = err[-4:]
    for name in ("final", "summary.json", "report.html", "checkpoints", "snapshots"):
        assert name in saved
        assert (tmp_path / "a run" / name).exists()
    dense, sparse = (f"{figures[f'val_loss_{mode}']:.4f}" for mode in ("dense", "sparse"))
    assert f"{dense} in dense mode, {sparse} in sparse mode (with 3 of 8 experts per token in " in loss
    assert f", {figures['loss_unit']}: " in loss
    plain = figures["wall_seconds_train"] / figures["wall_ratio"]
    assert cost.startswith(
        f"cost: {figures['flops_ratio_nonembedding']:.2f} of the FLOPs of all-dense training "
    )
    assert f"({figures['flops_ratio']:.2f} with it)" in cost
    assert cost.endswith(f"would have taken {plain:,.1f} s.")
    text_out, _ = said(*next_command(then)[1:])
    assert text_out


def test_a_dense_run_says_why_it_has_no_sparse_mode(said: Say, corpus: Path, tmp_path: Path) -> None:
    given = ["--data", corpus, "--cache", tmp_path / "cache", "--out", tmp_path / "run"]
    _, err = said("pretrain", *SMALL, *given, "--recipe", "dense", "--activation-l1", "1e-4")
    assert err[0].startswith("recipe dense: no step is sparse; changed: ")
    assert "activation_l1=0.0001" in err[0]
    assert err[-3].endswith(" in dense mode; there is no sparse mode, because the recipe never trains one.")
    _, err = said("pretrain", "--out", tmp_path / "run", "--resume")
    assert err[3].startswith("goes on after step 12; writes to ")


def test_quiet_is_quiet(said: Say, corpus: Path, tmp_path: Path) -> None:
    given = ["--data", corpus, "--cache", tmp_path / "cache", "--out", tmp_path / "run", "--quiet"]
    out, err = said("pretrain", *SMALL, *given)
    assert len(out) == 1
    assert err == []


def test_a_terminal_is_told_the_file_instead_of_the_json(
    said: Say, trained: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = trained("gpt2")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out, err = said("study", run, "--out", tmp_path / "study")
    assert out == []
    assert err[-1] == f"figures: {tmp_path / 'study/study.json'}"
    assert json.loads((tmp_path / "study/study.json").read_text())["findings"]
    out, err = said("export", run, "--to", "dense", "--out", tmp_path / "dense")
    assert out == []
    assert err[-1] == "figures: the lines above"


def test_convert(said: Say, trained: Runs, corpus: Path, tmp_path: Path) -> None:
    run, _ = trained("gpt2")
    out, err = said(
        "convert", run / "final", "--data", corpus, "--cache", tmp_path / "cache", "--out", tmp_path / "converted",
        *CONVERT,
    )  # fmt: skip
    figures = json.loads(out[-1])
    assert figures == json.loads((tmp_path / "converted/conversion.json").read_text())
    assert err[0].startswith(f"model: {run / 'final'}, a GPT2LMHeadModel of ")
    assert err[1].startswith(
        "conversion: neurons grouped by coactivation on 8,192 tokens, routers calibrated on 2,"
    )
    loss, saved, then = err[-3:]
    assert loss.startswith(f"loss, nats per token: dense {figures['loss_dense']:.4f}; K/E = 1/8 ")
    assert saved.startswith(f"saved in {tmp_path / 'converted'}: ")
    said(*next_command(then)[1:])
    assert (tmp_path / "converted-sparse/config.json").is_file()


def test_export(said: Say, trained: Runs, tmp_path: Path) -> None:
    run, _ = trained("gpt2")
    out, err = said("export", run, "--to", "dense", "--out", tmp_path / "it's dense")
    figures = json.loads(out[-1])
    assert err[0].startswith(f"dense export of {run} to {tmp_path}/it's dense: a plain checkpoint")
    assert err[1].endswith(
        f": {figures['parameters']:,} parameters, {figures['bytes'] / 1e6:,.1f} MB in 1 file(s)"
    )
    subprocess.run([sys.executable, *next_command(err[2])[1:]], check=True, capture_output=True)
    _, err = said("export", run, "--to", "sparse", "--out", tmp_path / "sparse")
    said(*next_command(err[2])[1:], "--seconds", "0.01", "--tokens", "4")


def test_compare_takes_the_configurations_threads_and_sums_up(
    said: Say, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text("train: {threads: 1}\n")
    given = [a for a in SMALL if a not in ("--threads",)]
    given.remove("1")
    out, err = said(
        "compare", tmp_path / "small.yaml", *given, *SPARSE, "--data", corpus, "--cache", tmp_path / "cache",
        "--out", tmp_path / "compared",
    )  # fmt: skip
    figures = json.loads(out[-1])
    assert err[0] == (
        "comparison: dense, ssd with seed 0: 2 runs, of 12 steps where NAME@FACTOR does not say otherwise, 1 at a time "
        f"with 1 CPU thread each; writes to {tmp_path / 'compared'}"
    )
    saved, ssd, then = err[-3:]
    assert "compare.md (the table)" in saved
    assert ssd.startswith(
        f"ssd against dense, seeds 0: loss {figures['delta_dense']:+.4f} nats in dense mode, "
    )
    assert ssd.endswith(f"{figures['wall_ratio']:.3f} of the wall-clock.")
    said(*next_command(then)[1:], "--out", tmp_path / "study")


def test_no_job_is_silent_while_it_works_long(
    said: Say, trained: Runs, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    cache = ["--cache", tmp_path / "cache"]
    run, _ = trained("gpt2")
    jobs: dict[tuple[str, ...], list[Any]] = {
        ("dense ", "validating:"): ["pretrain", *SMALL, "--data", corpus, *cache, "--out", tmp_path / "run"],
        ("tokenizing:", "text, dense:", "text, sparse K=3:"): ["eval", run, "--data", corpus],
        ("watching neurons:", "calibrating routers:", "measuring:", "validating:"): [
            "convert", run / "final", "--data", corpus, *cache, "--out", tmp_path / "converted", *CONVERT
        ],
        ("measuring:", "comparing:"): ["study", run, "--overwrite", "--out", tmp_path / "study"],
    }  # fmt: skip
    for names, job in jobs.items():
        _, err = said(*job)
        for name in names:
            assert any(line.startswith(name) for line in err), (name, err)
        if job[0] != "pretrain":  # there the bar of the clustering appears all the same
            _, err = said(*job, "--quiet", *(["--overwrite"] if job[0] == "convert" else []))
            assert err == []
