"""Freed memory stays with the process, unless the user or another C library has it otherwise."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from support import small_run

from switchable import memory
from switchable.train import setup

FAULTS = """
import resource, torch
from switchable.memory import keep_freed_memory
kept = keep_freed_memory() if {keep} else False
def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(megabytes * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(64)
print(kept, faults(60))  # glibc wants a little room to align a block
"""


def has_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def faults(keep: bool) -> tuple[bool, int]:
    """Whether memory is kept, and the page faults of 60 MiB after 64 were freed."""
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", FAULTS.format(keep=keep)], cwd=root, capture_output=True, text=True, check=True
    )
    kept, count = run.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(not has_glibc(), reason="another C library than glibc")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    kept, count = faults(keep=True)
    assert kept
    assert count < 100  # 15,360 pages of 4 KiB
    assert faults(keep=False)[1] > count


@pytest.mark.parametrize("name", memory.USERS_OWN)
def test_what_the_user_set_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert not memory.keep_freed_memory()


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in memory.USERS_OWN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert not memory.keep_freed_memory()


def test_training_on_the_cpu_keeps_it(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(setup, "keep_freed_memory", lambda: calls.append("kept"))
    setup.set_up(small_run(corpus, "gpt2"), tmp_path, quiet=True)
    assert calls == ["kept"]
