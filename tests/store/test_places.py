"""Where is written: never over what is read, refused before any work, and told in a line when the disk is full."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import small_run

from switchable import InputError
from switchable.cli import main
from switchable.config import to_dict
from switchable.files import check_apart, check_writable, whole_folder
from switchable.store.folders import verify
from switchable.store.rundir import RunDir

Trained = Callable[[str], tuple[Path, dict[str, Any]]]


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_read_is_never_where_is_written(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a", target_is_directory=True)
    for out, source, relation in (
        ("a", "a", "is"),
        ("link", "a", "is"),
        ("a", "link/b", "contains"),
        ("link/b/new", "a", "lies in"),
        ("a/../a/b/new", "link", "lies in"),
    ):
        with pytest.raises(
            InputError, match=rf"{out} {relation} .*{source}, which is read; choose another place"
        ):
            check_apart(tmp_path / out, [str(tmp_path / source)])
    for out, source in (("ab", "a"), ("new", "a"), ("a", "nothing/there"), ("c/a", "a")):
        check_apart(tmp_path / out, [tmp_path / source])


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    with whole_folder(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
    assert files(tmp_path) == {"link/new": b""}


def test_what_is_replaced_is_deleted_when_the_new_is_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    rmtree, seen = shutil.rmtree, []

    def noting(path: Path, **how: Any) -> None:
        seen.append(files(tmp_path))
        rmtree(path, **how)

    monkeypatch.setattr(shutil, "rmtree", noting)
    with whole_folder(tmp_path / "model") as folder:
        (folder / "new").touch()
    assert seen == [{"model/new": b"", ".tmp-old-model/old": b""}]
    assert files(tmp_path) == {"model/new": b""}


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A finished run of our own."""
    return Path(shutil.copytree(trained("gpt2")[0], tmp_path / "run"))


@pytest.mark.parametrize("out", ["run", "run/final", "run/checkpoints", "run/new", ".", "link/final"])
@pytest.mark.parametrize("verb", ["export", "convert", "finetune"])
def test_no_verb_replaces_what_it_reads(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, out: str
) -> None:
    (tmp_path / "link").symlink_to(run, target_is_directory=True)
    (tmp_path / "config.json").write_text("{}")  # the folder above looks like a model that may be replaced
    before = files(run)
    flags = {
        "export": ["--to", "dense"], "convert": ["--data", str(corpus), "--cache", str(tmp_path / "cache")],
        "finetune": ["--data", str(corpus)],
    }[verb]  # fmt: skip
    assert main([verb, str(run), "--out", str(tmp_path / out), "--overwrite", *flags]) == 2
    assert "which is read; choose another place with --out" in capsys.readouterr().err
    assert files(run) == before
    assert verify(RunDir(run).final) is None


@pytest.mark.parametrize("out", ["run", "run/final", "run/checkpoints/step-000020/study"])
def test_a_study_is_not_written_into_what_is_studied(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    before = files(run)
    assert main(["study", str(run), "--out", str(tmp_path / out)]) == 2
    assert "which is read; choose another place with --out" in capsys.readouterr().err
    assert main(["study", str(run / "final"), "--out", str(run / "final" / "x")]) == 2
    assert files(run) == before


@pytest.mark.parametrize("verb", ["export", "finetune"])
def test_no_verb_replaces_what_is_not_a_model(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all my work")
    flags = ["--to", "dense"] if verb == "export" else ["--data", str(corpus)]
    assert main([verb, str(run), "--out", str(tmp_path / "mine"), "--overwrite", *flags]) == 2
    assert "does not hold a model" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all my work"


@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("text", "lies in"),
        ("text/run", "lies in"),
        ("mine", "holds no run .* but tokenizer, which a run would replace"),
    ],
)
def test_a_run_replaces_neither_its_text_nor_what_is_no_run(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, told: str
) -> None:
    shutil.copytree(corpus, tmp_path / "text")
    (tmp_path / "mine" / "tokenizer").mkdir(parents=True)
    (tmp_path / "mine" / "tokenizer" / "thesis.txt").write_text("all my work")
    before = files(tmp_path)
    config = to_dict(small_run(tmp_path / "text"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [str(tmp_path / "run.yaml"), "--cache", str(tmp_path / "cache"), "--quiet"]
    assert main(["pretrain", *command, "--out", str(tmp_path / out), "--overwrite"]) == 2
    assert re.search(told, capsys.readouterr().err)
    after = files(tmp_path)
    assert before.items() <= after.items()
    assert not [name for name in after if name.startswith("cache")]  # before any work
    if out != "mine":
        assert main(["compare", *command, "--out", str(tmp_path / out)]) == 2
        assert "which is read; choose another place with --out" in capsys.readouterr().err


def test_a_start_that_was_killed_is_started_again_with_overwrite(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path / "run")
    rundir.acquire()
    rundir.begin("model: {}\n")
    rundir.tokenizer.mkdir()
    with pytest.raises(InputError, match="holds a run already"):
        rundir.refuse_to_replace(False, [])
    rundir.refuse_to_replace(True, [])
    with pytest.raises(InputError, match=r"tokenizer (is|contains) .*which is read"):
        rundir.refuse_to_replace(True, [rundir.tokenizer])
    rundir.begin("model: {}\n")
    assert sorted(path.name for path in rundir.path.iterdir()) == ["config.yaml", "run.lock"]


def test_where_nothing_can_be_made_is_found_before_any_work(
    run: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").mkdir()
    check_writable(tmp_path / "new" / "deeper" / "file")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr("switchable.store.load.load_pretrained", lambda *_: pytest.fail("work was begun"))
    text = ["--data", str(corpus)]
    for verb in (
        ["eval", str(run), *text], ["study", str(run)], ["export", str(run), "--to", "dense"],
        ["finetune", str(run), *text], ["convert", str(run), *text], ["compare", str(run / "config.yaml")],
    ):  # fmt: skip
        if verb[0] != "compare":  # which makes a folder for each run in --out
            assert main([*verb, "--out", "."]) == 2
            assert "'.' has no name of its own" in capsys.readouterr().err
        for out in (tmp_path / "file" / "x", Path("/proc/nothing/x")):
            assert main([*verb, "--out", str(out)]) == 2, (verb, out)
            assert f"{out}" in (said := capsys.readouterr().err)
            assert "cannot be written: " in said, verb


def test_eval_writes_into_a_folder_that_is_not_there_and_over_older_scores_only(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(next(iter(sorted(corpus.iterdir())))), "--mode", "dense"]
    for _ in range(2):
        assert main(["eval", str(run), *flags, "--out", str(tmp_path / "new" / "deep" / "e.json")]) == 0
    assert "scores" in (tmp_path / "new" / "deep" / "e.json").read_text()
    before = files(run)
    for out in (run, run / "summary.json", run / "config.yaml"):
        assert main(["eval", str(run), *flags, "--out", str(out)]) == 2
        assert "does not hold scores" in capsys.readouterr().err
    assert files(run) == before


ON_SMALL_DISKS = """
import contextlib, io, json, subprocess, sys
from switchable.cli import main
disk, commands = sys.argv[1], json.loads(sys.argv[2])
for kilobytes, command in commands:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "x", disk], check=True)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main([*command, disk + "/x"])
    subprocess.run(["umount", "--lazy", disk], check=True)
    print(json.dumps([code, said.getvalue()]))
"""


def on_small_disks(disk: Path, commands: list[tuple[int, list[str]]]) -> list[tuple[int, str]]:
    """Give commands, each with a disk of so many kB at `disk`, where it writes; return exit codes and what was said."""
    alone = ["unshare", "--map-root-user", "--mount"]
    probe = [*alone, "mount", "-t", "tmpfs", "x", disk]
    if shutil.which("unshare") is None or subprocess.run(probe, check=False).returncode:
        pytest.skip("no small disk can be mounted here (unshare, tmpfs)")
    script = [sys.executable, "-c", ON_SMALL_DISKS, disk, json.dumps(commands)]
    done = subprocess.run([*alone, *script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr  # nor of a thread, or when the process ends
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def test_a_full_disk_ends_every_verb_in_one_line(
    run: Path, corpus: Path, tmp_path: Path, trained: Trained
) -> None:
    disk, cache = tmp_path / "disk", trained("gpt2")[0].parent / "cache"
    disk.mkdir()
    text = ["--data", str(corpus), "--cache", str(cache), "--quiet"]
    commands = [
        (4, ["pretrain", str(run / "config.yaml"), "--cache", str(cache), "--quiet", "--out"]),  # the set-up
        (120, ["pretrain", str(run / "config.yaml"), "--cache", str(cache), "--quiet", "--out"]),  # a checkpoint
        (20, ["export", str(run), "--to", "sparse", "--out"]),
        (60, ["study", str(run), "--quiet", "--out"]),
        (60, ["convert", str(run), *text, "--num-experts", "8", "--eval-tokens", "512", "--structure-tokens", "512",
              "--calibration-tokens", "512", "--keep-activation", "--out"]),
        (8, ["prepare", str(run / "config.yaml"), "--quiet", "--cache"]),
    ]  # fmt: skip
    for (_, command), (code, said) in zip(commands, on_small_disks(disk, commands), strict=True):
        assert code == 2, (command, said)
        assert re.search("no space left on (the )?device", said.lower())
        # Export says what it is going to do first; the others are quiet.
        assert len(said.splitlines()) == 1 + (command[0] == "export"), said
