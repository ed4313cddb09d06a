"""Files and folders that are whole or not there: written under a temporary name, flushed to disk, renamed.

A reader never sees half of one. What a killed process leaves has a name that begins with `TEMPORARY`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from switchable.errors import InputError

TEMPORARY = ".tmp-"  # prefix of names that are not complete yet


def check_name(path: Path) -> None:
    """Raise InputError for a path that is not UTF-8: what writes tokenizers and weights cannot take it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        name = repr(str(path))
        raise InputError(f"the name {name} is not UTF-8; rename it, or choose another folder") from None


def temporary_name(path: Path) -> Path:
    """Return the name under which a file or folder is made."""
    return path.with_name(TEMPORARY + path.name)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Within the `with` block, write to the file given: it replaces `path` at the end, or is removed after an error."""
    temporary = temporary_name(path)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Within the `with` block, fill the folder given: it replaces `path` at the end, or is removed after an error."""
    temporary = temporary_name(path)
    remove(temporary)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        finish_folder(temporary, path)
    finally:
        remove(temporary)


def finish_folder(temporary: Path, path: Path) -> None:
    """Flush a folder with all its files to disk and rename it to `path`; what was there is removed after that."""
    for below in temporary.rglob("*"):
        # Some libraries make files for their owner alone. The folder was made by the umask.
        if below.is_file():
            below.chmod(temporary.stat().st_mode & 0o666)
        flush(below)
    flush(temporary)
    older = _put_aside(path)
    temporary.rename(path)
    flush(path.parent)
    remove(older)


def flush(path: Path) -> None:
    """Put a file's bytes, or the names in a folder, on the disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder. A folder is renamed first: nobody sees half of it under its own name."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path if path.name.startswith(TEMPORARY) else _put_aside(path), ignore_errors=True)


def _put_aside(path: Path) -> Path:
    """Return the temporary name that what is at a path, if anything is, has from now on."""
    aside = path.with_name(f"{TEMPORARY}old-{path.name}")
    remove(aside)
    if path.exists() or path.is_symlink():
        path.rename(aside)
    return aside


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all; in it, the bytes of file names that are not UTF-8 are spelled out."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def as_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON, in which there is no NaN: a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON (`as_json`), completely or not at all."""
    write_text(path, as_json(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the values of a file with one JSON value a line; a line that is not whole is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_apart(out: Path, sources: Iterable[Path | str]) -> None:
    """Raise InputError for an output that is, contains or lies in something that is read; links are followed."""
    written = out.resolve()
    for source in map(Path, sources):
        read = source.expanduser().resolve()
        if not read.exists():
            continue
        if written == read or read in written.parents or written in read.parents:
            relation = "is" if written == read else "lies in" if read in written.parents else "contains"
            raise InputError(f"{out} {relation} {source}, which is read; choose another place with --out")


def check_writable(path: Path) -> None:
    """Raise InputError for a path at which nothing can be made; folders on the way to it may be missing."""
    if not path.name:
        raise InputError(f"{str(path)!r} has no name of its own; choose another place with --out")
    try:
        place = next(above for above in path.absolute().parents if above.exists())
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            file.write(b"x")
    except OSError as error:
        why = error.strerror
        raise InputError(f"{path} cannot be written: {why}; choose another place with --out") from None


@contextmanager
def full_disk_told(what: str, remedy: str) -> Iterator[None]:
    """Within the `with` block a full disk becomes an InputError; other errors stay what they are."""
    try:
        yield
    except Exception as error:  # the Rust side of tokenizers raises a bare one
        if isinstance(error, InputError) or not is_no_space(error):
            raise
        raise InputError(f"no space left on the device while {what}; {remedy}") from None


def is_no_space(error: BaseException) -> bool:
    """Return whether an error says that the disk is full (libraries written in Rust say it as text)."""
    told = any(words in str(error) for words in ("os error 28", "No space left"))
    return told or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
