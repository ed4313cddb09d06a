"""`switchable compare` as a user meets it: interrupted, gone on with, shared with another process, and refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from switchable.cli import main
from switchable.store.rundir import RunDir

SMALL = """
model: {d_model: 16, num_layers: 2, num_heads: 2}
data: {vocab_size: 300}
train: {steps: 150, batch_size: 4, sequence_length: 16, log_every: 1, eval_every: 50, checkpoint_every: 1000,
        eval_tokens: 256}
switch: {recipe: early, num_experts: 8, experts_per_token: 3, monitor_every: 10,
         stability_threshold: 0.0, max_activation_ratio: 1.0, min_mass_caught: 0.0, sparse_steps: 2}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.yaml."""
    base = tmp_path_factory.mktemp("compare-cli")
    (base / "small.yaml").write_text(SMALL)
    return base


def arguments(base: Path, corpus: Path, *more: str) -> list[str]:
    out = [] if "--out" in more else ["--out", str(base / "out")]
    return [
        "compare", str(base / "small.yaml"), "--data", str(corpus), "--cache", str(base / "cache"), *out, *more
    ]  # fmt: skip


def started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "switchable", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_stopped_gone_on_with_and_finished(
    base: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(
        base, corpus, "--methods", "dense", "ssd", "--jobs", str(min(2, len(os.sched_getaffinity(0))))
    )
    first = started(command)
    metrics = base / "out/dense-s0/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGINT)  # Ctrl-C: the whole foreground group gets it
    out, err = first.communicate(timeout=300)
    assert first.returncode == 130, err
    assert "Traceback" not in err
    assert "stopped; go on with: switchable compare " in err
    assert " --methods dense ssd " in err
    dense = RunDir(base / "out/dense-s0")
    assert not dense.in_use()
    assert not RunDir(base / "out/ssd-s0").in_use()
    assert len(dense.steps()) == 1
    assert out == ""

    dense.acquire()  # another process takes over the dense run ...
    second = started(command)
    assert second.stderr is not None
    for line in second.stderr:
        if "dense-s0: another process is training it; waiting for it" in line:
            break
    dense.release()  # ... and dies
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    figures = json.loads(out.splitlines()[-1])
    assert figures["methods"]["dense"]["sparse_fraction"] == 0
    assert figures["methods"]["ssd"]["sparse_fraction"] > 0.4
    assert figures["delta_dense"] == pytest.approx(
        figures["methods"]["ssd"]["val_loss_dense"] - figures["methods"]["dense"]["val_loss_dense"]
    )

    capsys.readouterr()
    assert main(arguments(base, corpus, "--methods", "ssd")) == 0  # nothing is trained again
    again = capsys.readouterr()
    assert json.loads(again.out.splitlines()[-1]) == figures  # dense is there, so the table has it
    assert "finished already: ssd-s0" in again.err
    assert {"compare.json", "compare.md", "compare.png"} <= {p.name for p in (base / "out").iterdir()}


def test_a_run_that_fails_is_named_with_its_reason(
    base: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--methods", "dense-then-moe", "--out", str(base / "failing"), "--learning-rate", "1000")
    assert main(arguments(base, corpus, *more)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    # Weights or the loss are not finite first, as the processor rounds.
    assert re.match(
        r"switchable compare: 2 of 2 runs failed \(dense-s0: (training diverged: |the loss became )", said
    )
    assert "dense-then-moe-s0: it goes on from dense-s0, which failed" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--methods", "sdd"], ["method 'sdd' is not known", "did you mean 'ssd'"]),
        (["--methods", "ssd@two"], ["'ssd@two': after @ comes a factor", "e.g. ssd@1.04"]),
        (["--seeds", "0", "-1"], ["--seeds=-1 is out of range; use a whole number of at least 0"]),
        (["--jobs", "0"], ["--jobs=0 is out of range; use a whole number from 1 to "]),
        (["--jobs", "999"], ["--jobs=999 is out of range"]),
        (["--num-experts", "10"], ["num_experts=10 does not divide d_ff=64"]),
        (["--monitor-every", "0"], ["monitor_every=0 would never find"]),
        (["--out", "SMALL"], ["small.yaml/compare.json cannot be written: Not a directory"]),
    ],
)
def test_wrong_input(
    base: Path, corpus: Path, more: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = [str(base / "small.yaml") if word == "SMALL" else word for word in more]
    if "--out" not in more:
        more += ["--out", str(base / "refused")]
    assert main(arguments(base, corpus, *more)) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    for word in words:
        assert word in said
    assert not (base / "refused").exists()


def test_a_configuration_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 2
    assert "no configuration given; name a YAML file" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml does not exist" in capsys.readouterr().err


def test_help_names_the_methods(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["compare", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for method in ("dense", "ssd", "ssd-paper", "static", "moe", "dense-then-moe"):
        assert f"\n  {method} " in text
