"""Folders with a manifest: whole and unchanged, or found not to be.

    manifest.json     size and SHA-256 of each other file

A folder is filled under a temporary name, flushed to disk and renamed, so that it stands whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from switchable.errors import InputError
from switchable.files import TEMPORARY, is_no_space, remove, sync_folder, write_json

MANIFEST = "manifest.json"


@contextmanager
def full_disk_told(folder: Path, remedy: str) -> Iterator[None]:
    """Within the `with` block a full disk is told as the user's affair; anything else stays the bug it is."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_no_space(error):
            raise
        raise InputError(
            f"no space left on the device while saving {folder}; nothing was damaged and {remedy}"
        ) from None


def seal(folder: Path, files: Mapping[str, Any]) -> None:
    """Flush every file of a folder to disk and write its manifest, with these entries."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    write_json(folder / MANIFEST, {"format": 1, "files": dict(sorted(files.items()))})
    sync_folder(folder)


@contextmanager
def whole_folder(folder: Path, remedy: str) -> Iterator[Path]:
    """Give the `with` block a new folder to fill, which takes the place of `folder` at its end, or is removed.

    Args:
        folder: where it shall stand; an older one is replaced.
        remedy: what to do when the disk is full, for the message.

    Raises:
        InputError: no space left on the device. What was there before is untouched.
    """
    temporary = folder.with_name(TEMPORARY + folder.name)
    remove(temporary)
    try:
        with full_disk_told(folder, remedy):
            temporary.mkdir(parents=True)
            yield temporary
            remove(folder)
            temporary.rename(folder)
    finally:
        remove(temporary)


def entry(path: Path) -> dict[str, Any]:
    """Return a file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> str | None:
    """Return None if a checkpoint is whole, else what is wrong with it, in a few words."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {
            name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()
        }
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, (size, checksum) in files.items():
        path = folder / name
        if Path(name).name != name:
            return f"{MANIFEST} names a file outside the folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if sha256(path) != checksum:
            return f"{name} does not have its checksum"
    return None
