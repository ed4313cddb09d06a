"""Files and folders that appear whole or not at all: written under a temporary name, flushed, renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"
"""Prefix of names that are not complete yet."""


def remove(path: Path) -> None:
    """Remove a file or a folder; a folder loses its name first, so that no half of it ever stands under it."""
    if path.is_dir() and not path.name.startswith(TEMPORARY):
        doomed = path.with_name(f"{TEMPORARY}old-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        path = doomed
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk: a new name in it survives a power cut from then on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, completely or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def is_no_space(error: BaseException) -> bool:
    """Return whether an error says that the disk is full (safetensors reports it as text)."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return (
        getattr(error, "errno", None) in codes or "os error 28" in str(error) or "No space left" in str(error)
    )
