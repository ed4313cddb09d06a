"""Token files are prepared once, by one process, whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from texts import TEXTS, config_for, documents_in, hash_of, lock_of, write_jsonl

from switchable.data import tokens
from switchable.data.tokens import prepare
from switchable.errors import InputError


def forbid_building(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_build", lambda *_: pytest.fail("built again"))


def test_done_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepare(config_for(source), tmp_path / "cache")
    with monkeypatch.context() as patch:
        forbid_building(patch)
        assert prepare(config_for(source), tmp_path / "cache") == data
    changed = [config_for(source, vocab_size=301), config_for(source, val_fraction=0.06)]
    write_jsonl(tmp_path / "other.jsonl", TEXTS)
    changed.append(config_for(tmp_path / "other.jsonl"))
    os.utime(source, ns=(1, 1))
    changed.append(config_for(source))
    assert len({data.fingerprint, *(tokens._fingerprint(c, "causal") for c in changed)}) == 5


@pytest.mark.parametrize(
    "damage", ["cut train.bin", "no val.bin", "cut meta.json", "no meta.json", "odd meta.json"]
)
def test_damaged_cache(source: Path, tmp_path: Path, damage: str) -> None:
    data = prepare(config_for(source), tmp_path / "cache")
    how, name = damage.split()
    path = data.folder / name
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif how == "odd":
        path.write_text('{"splits": 5}', encoding="utf-8")
    else:
        path.unlink()
    with pytest.raises(InputError) as caught:
        prepare(config_for(source), tmp_path / "cache")
    assert str(path) in str(caught.value)
    assert f"delete the folder {str(data.folder)!r}" in str(caught.value)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    written: list[int] = []

    def failing(writer: Any, _: str, ids: Any) -> None:
        written.append(writer._file.write(ids.tobytes()))
        if sum(written) > 1500:
            writer._file.flush()
            raise error

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(tokens._SplitWriter, "write", failing)
        expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected) as caught:
            prepare(config_for(source), cache)
    if expected is InputError:
        assert "no space left on the device: 0.0 MB were written" in str(caught.value)
        assert str(cache) in str(caught.value)
    assert os.listdir(cache) == [lock_of(config_for(source))]
    assert prepare(config_for(source), cache).train.documents > 0


def test_cache_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot write in .*file.*give another folder"):
        prepare(config_for(source), tmp_path / "file")


SCRIPT = """
import os, sys, time
from switchable.data import tokens
build, mode = tokens._build, sys.argv[1]
if mode == "twice":
    os.fork()  # the import is the slow part: two processes share it
def slow(config, folder, *rest):
    print("building", flush=True)
    (folder / "train.bin").write_bytes(b"half a file")
    time.sleep(60 if mode == "hang" else 1)
    build(config, folder, *rest)
tokens._build = slow
config = tokens.DataConfig(data=(sys.argv[2],), vocab_size=300)
print(tokens.prepare(config, sys.argv[3]).train.sha256, flush=True)
"""


def start(mode: str, source: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, mode, str(source), str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once(source: Path, tmp_path: Path) -> None:
    process = start("twice", source, tmp_path / "cache")
    output = process.communicate(timeout=120)[0].split()  # until both have ended
    sha256 = prepare(config_for(source), tmp_path / "cache").train.sha256
    assert output == ["building", sha256, sha256]


def test_killed_in_the_middle(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = start("hang", source, cache)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    name = tokens._fingerprint(config_for(source), "causal")
    deadline = time.monotonic() + 30
    while not (cache / f".tmp-{name}" / "train.bin").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (cache / name).exists()
    data = prepare(
        config_for(source), cache
    )  # the lock went with the process, the leftovers are cleared away
    assert sorted(os.listdir(cache)) == [f".{name}.lock", name]
    assert documents_in(data, data.val) == [text for text in TEXTS if hash_of(text) / 2**64 < 0.05]
