"""Folders with a manifest, by which damage is found.

    manifest.json     size and SHA-256 of each other file

A folder is filled under a temporary name, flushed to disk and renamed, so that it stands whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from switchable.errors import InputError
from switchable.files import read_json, sha256, write_json
from switchable.finite import not_finite
from switchable.store.tensorfile import TensorFile

MANIFEST = "manifest.json"


def seal(folder: Path, files: Mapping[str, Any]) -> None:
    """Write a folder's manifest with these entries."""
    write_json(folder / MANIFEST, {"format": 1, "files": dict(sorted(files.items()))})


def entry(path: Path) -> dict[str, Any]:
    """Return a file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def verify(folder: Path, skip: str = "") -> str | None:
    """Return None if a checkpoint, but for files that match `skip`, is whole and finite, else what is wrong with it."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = {
            name: (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
            if not fnmatch(name, skip)
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
    return _not_finite(folder / name for name in files if name.endswith("tensors"))


def check_whole(folder: Path, skip: str = "") -> None:
    """Raise InputError if a folder is not what its manifest says; see `verify`."""
    if (damage := verify(folder, skip)) is not None:
        raise InputError(f"{folder} is damaged ({damage}); give another checkpoint, or write it again")


def _not_finite(paths: Iterable[Path]) -> str | None:
    """Look at one tensor at a time, each in a file opened anew: the files may be larger than the memory."""
    for path in paths:
        for name in sorted(TensorFile(path).names):
            if (found := not_finite({name: TensorFile(path).mapped(name)})) is not None:
                return found
    return None
