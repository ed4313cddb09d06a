"""`switchable bench`: the table it prints, hand-computed from known times, and what it answers to impossible sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from switchable.cli import main
from switchable.compute import autotune, stopwatch
from switchable.compute.shape import Shape


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Shape]:
    """Dense takes 6 ms; sparse 2 ms for one token, 4 ms when measured again, and 12 ms for more."""
    measured: list[Shape] = []

    def measure(shape: Shape) -> dict[str, float]:
        measured.append(shape)
        sparse = 0.012 if shape.tokens > 1 else 0.004 if shape in measured[:-1] else 0.002
        return {"dense": 0.006, "masked" if shape.training else "decode": sparse}

    monkeypatch.setattr(stopwatch, "measure", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    autotune._table.cache_clear()
    return measured


SIZES = ["--d-model", "16", "--num-experts", "8", "--tokens", "1", "4"]


def test_the_table_and_its_last_line(known_times: list[Shape], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SIZES, "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == [
        "16",
        "64",
        "8",
        "2",
        "1",
        "infer",
        "6.000",
        "ms",
        "2.000",
        "ms",
        "3.00x",
        "decode",
        "1.50x",
    ]
    assert lines[3].split()[-3:] == ["0.50x", "dense", "1.00x"]
    assert lines[4].split()[-2:] == ["3.00x", "masked"]  # in training sparse is asked for
    document = json.loads(lines[-1])
    assert [row["speedup"] for row in document["rows"]] == pytest.approx([3.0, 0.5, 3.0, 0.5])
    assert document["worst_auto_speedup"] == 1.0
    assert len(known_times) == 5


def test_what_is_known_is_measured_again_only_if_asked(
    known_times: list[Shape], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["bench", *SIZES, "--inference-only"])
    main(["bench", *SIZES, "--inference-only"])
    assert len(known_times) == 2
    main(["bench", *SIZES, "--inference-only", "--again"])
    assert len(known_times) == 4
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["speedup"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--d-model", "16", "--num-experts", "7"], "num_experts=7 does not divide d_ff=64; use one of"),
        (
            ["--d-model", "16", "--num-experts", "4", "--experts-per-token", "5"],
            "experts_per_token=5 is more than",
        ),
        (["--activation", "rellu"], "'rellu' is not known; did you mean 'relu'"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_impossible_sizes_are_answered(
    arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", *arguments]) == 2
    assert answer in capsys.readouterr().err
