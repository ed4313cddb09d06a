"""`switchable pretrain --resume`: after a signal and after damage; refused where settings or text have changed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from cli.commands import Command, refused, run, start


def test_resume_with_other_settings_is_refused(here: Command) -> None:
    refused(here("pretrain", "--out", "run", "--resume", "--d-model", "32"), "model.d_model: 16 -> 32")
    refused(here("pretrain", "--out", "nothing", "--resume"), "no run to resume")
    refused(
        here("pretrain", "--out", "run", "--resume-from", "step-7"),
        "no checkpoint 'step-7'",
        "step-000004",
    )


def test_resume_with_changed_text_is_refused(here: Command, tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " + "with words " * 50)
    first = here("pretrain", "small.yaml", "--data", str(tmp_path), "--out", "changing")
    assert first.returncode == 0, first.stderr
    (tmp_path / "0.txt").write_text("something else " * 50)
    refused(
        here("pretrain", "--out", "changing", "--resume", "--quiet"),
        "changed since",
        " documents, ",
        "; now ",
    )


def test_a_damaged_checkpoint_is_named_and_the_good_one_used_when_asked_for(
    here: Command, base: Path, corpus: Path
) -> None:
    done = here("pretrain", "small.yaml", "--data", str(corpus), "--out", "damaged")
    assert done.returncode == 0, done.stderr
    newest = base / "damaged/checkpoints/step-000012/model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-9] ^= 1
    newest.write_bytes(bytes(content))
    said = here("pretrain", "--out", "damaged", "--resume")
    refused(said, "model.safetensors does not have its checksum", "--resume-from step-000008")
    again = run(base, "pretrain", "--out", "damaged", "--resume", "--resume-from", "step-000008")
    assert again.returncode == 0, again.stderr
    first, second = (json.loads(r.stdout.splitlines()[-1]) for r in (done, again))
    assert second["val_loss_sparse"] == first["val_loss_sparse"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(
    here: Command, base: Path, corpus: Path, signum: int, code: int
) -> None:
    out = f"stopped{signum}"
    process = start(
        base, "pretrain", "small.yaml", "--data", str(corpus), "--out", out, "--steps", "100000",
        "--checkpoint-every", "100000",
    )  # fmt: skip
    metrics = base / out / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    refused(here("pretrain", "small.yaml", "--data", str(corpus), "--out", out), "in use by another run")
    process.send_signal(signum)
    _, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert f"go on with: switchable pretrain --out {out} --resume" in err
    assert len(list((base / out / "checkpoints").glob("step-*"))) == 1
