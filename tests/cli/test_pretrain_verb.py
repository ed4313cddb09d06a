"""`switchable pretrain` as a user meets it: what a run leaves, and what wrong input does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cli.commands import Command, refused, run


def test_a_run_leaves_what_it_promises(base: Path) -> None:
    left = {p.name for p in (base / "run").iterdir()}
    promised = {
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "final",
        "curves.png",
        "summary.json",
    }
    assert promised <= left
    assert (base / "run/curves.png").read_bytes().startswith(b"\x89PNG")
    assert any((base / "run/tensorboard").glob("events.*"))
    assert not list((base / "run").rglob(".tmp-*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere.txt"], ["nowhere.txt"]),
        (["--num-experts", "10"], ["num_experts=10 does not divide d_ff=64", "use one of"]),
        (["--experts-per-token", "9"], ["experts_per_token=9", "use 1 to 8"]),
        (
            ["--sequence-length", "64", "--set", "max_positions=32"],
            ["sequence_length=64", "max_positions=32"],
        ),
        (["--set", "beta3=0.9"], ["no setting 'beta3'", "did you mean 'beta2'"]),
        (["--set", "beta2"], ["give NAME=VALUE"]),
        (["--set", "beta2=1.5"], ["beta2=1.5 is out of range"]),
        (["--seed", "-1"], ["seed=-1 is out of range"]),
        (["--step", "3"], ["'--step' is not known; did you mean '--steps'?"]),
        (["--schedule", "dense"], ["'--schedule' is gone; use recipe dense"]),
        (["--steps", "many"], ["steps='many' must be a whole number"]),
        (["--optimizer", "adam"], ["optimizer='adam'", "adamw"]),
        (["--device", "tpu9"], ["device='tpu9'"]),
        (["--device", "meta"], ["device='meta' cannot be used"]),
        (["--batch-size", "100000"], ["shorter than one batch"]),
        (["--out", "small.yaml"], ["small.yaml", "output folder"]),
        (["--backend", "fuesd"], ["'fuesd'", "did you mean 'fused'"]),
        (["--num-heads", "3"], ["num_heads=3 does not divide d_model=16"]),
    ],
)
def test_wrong_settings(
    here: Command, base: Path, corpus: Path, arguments: list[str], words: list[str]
) -> None:
    given = arguments if "--data" in arguments else ["--data", str(corpus), *arguments]
    out = [] if "--out" in arguments else ["--out", "refused"]
    refused(here("pretrain", "small.yaml", *given, *out), *words)
    assert not (base / "refused/config.yaml").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ["empty"]),
        ("one.txt", b"just one document", ["one-document corpus", "--document-separator"]),
        ("latin.txt", b"caf\xe9", ["UTF-8"]),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', ["broken.jsonl", "line 2"]),
    ],
)
def test_wrong_text(here: Command, base: Path, name: str, content: bytes, words: list[str]) -> None:
    (base / name).write_bytes(content)
    refused(here("pretrain", "small.yaml", "--data", name, "--out", "refused"), *words)


def test_an_unknown_key_names_the_nearest(here: Command, base: Path) -> None:
    (base / "wrong.yaml").write_text("train: {learning_rat: 1}\n")
    refused(here("pretrain", "wrong.yaml"), "'learning_rat'", "did you mean 'learning_rate'?")


def test_a_folder_that_holds_a_run_is_not_overwritten(here: Command, base: Path, corpus: Path) -> None:
    before = (base / "run/summary.json").read_text()
    done = here("pretrain", "small.yaml", "--data", str(corpus), "--out", "run")
    refused(done, "holds a run already", "--resume", "--overwrite")
    assert (base / "run/summary.json").read_text() == before


def test_names_that_are_not_utf8(here: Command, base: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    folder = tmp_path / odd
    folder.mkdir()
    for i in range(30):
        Path(folder, os.fsdecode(b"\xff") + f"{i}.txt").write_text(f"document {i} " + "with words " * 50)
    for place in ("--out", "--cache"):
        command = ["small.yaml", "--data", str(folder), "--out", "odd", place, odd]
        refused(here("pretrain", *command), r"the name 'caf\udce9' is not UTF-8")
    assert not (base / "odd").exists()
    done = run(base, "pretrain", "small.yaml", "--data", str(folder), "--out", "odd")
    assert done.returncode == 0, done.stderr
    assert r"caf\udce9" in (base / "odd/report.html").read_text(encoding="utf-8")
    done = run(base, "pretrain", "--out", "odd", "--resume")  # its configuration names the folder
    assert done.returncode == 0, done.stderr


def test_flags_may_mend_a_file(here: Command, base: Path) -> None:
    (base / "odd.yaml").write_text("model: {d_model: 90}\n")  # which 4 heads do not divide
    flags = ("--num-heads", "9", "--precision", "float32", "--data", "nowhere.txt")
    refused(here("pretrain", "odd.yaml", *flags, "--out", "refused"), "nowhere.txt")
