"""What the names of a corpus stand for: files, each with its form and packing, and what is left out and why.

    form                      told by the name (before .gz .bz2 .xz .zst)     else by the first bytes
    text                      .txt .text .md                                  whatever is none of the others
    JSON lines, JSON array    .jsonl .ndjson .json; the first byte says which  a line that is an object, "[{"
    Parquet                   .parquet .pq                                    "PAR1"

How a file is packed is told by its name or its first bytes. What holds NUL bytes is not text. In a folder with JSON
or Parquet files, other files than .txt and .text are taken for notes about them, and left out.
"""

from __future__ import annotations

import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from switchable.data.packing import PACKINGS, opened, packing_of, unreadable
from switchable.errors import InputError, nearest

FORMS = {
    ".txt": "text", ".text": "text", ".md": "text", ".parquet": "Parquet", ".pq": "Parquet",
    ".jsonl": "JSON lines", ".ndjson": "JSON lines", ".json": "JSON lines",
}  # fmt: skip
OTHER_SUFFIXES = (".csv", ".tsv", ".py")  # of names that are no datasets
OWNER_NAME, MORE = r"([A-Za-z0-9][\w.-]*/[\w.-]+)", r"(?::([\w.-]+))?"
DATASET_NAME = re.compile(OWNER_NAME + MORE + MORE)  # name, config, split
NOT_EMBEDDED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}  # folder names
HEAD_BYTES = 8192  # of a file that are looked at
NAMED = 8  # files that a line names at most


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face Hub, as `owner/name[:config[:split]]` names it."""

    name: str
    config: str | None = None
    split: str = "train"
    kind: ClassVar[str] = "Hugging Face dataset"


@dataclass(frozen=True)
class SourceFile:
    """A file to read."""

    path: Path
    form: str  # `"text"`, `"JSON lines"`, `"JSON array"` or `"Parquet"`
    packing: str = ""  # suffix of how it is packed, as `".gz"`; empty: it is not

    @property
    def kind(self) -> str:
        """What to call it."""
        return f"{self.form} file" + (f" ({self.packing})" if self.packing else "")


Item = SourceFile | HubDataset


@dataclass
class Sources:
    """What the names of a corpus stand for."""

    items: list[Item] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # files that were found but are not read, and why

    def __str__(self) -> str:
        """Return what is read and what is skipped."""
        kinds = Counter(item.kind for item in self.items)
        read = ", ".join(f"{count:,} x {kind}" for kind, count in kinds.items())
        if not self.skipped:
            return read
        named = [f"{path!r} ({why})" for path, why in list(self.skipped.items())[:NAMED]]
        more = [f"{len(self.skipped) - NAMED:,} more"] if len(self.skipped) > NAMED else []
        return f"{read}; skipped: {', '.join(named + more)}"


def resolve(names: Sequence[str]) -> Sources:
    """Return the files and datasets that `names` stand for; InputError for a name that stands for nothing."""
    if not names:
        return Sources([SourceFile(path, "text") for path in embedded_files()])
    found = Sources()
    for name in names:
        _resolve_one(name, found)
    return found


def signature(items: Iterable[Item]) -> list[list[str | int]]:
    """Return [name, size in bytes, modification time in ns] per file, to notice that a corpus has changed.

    A dataset of the Hub is known by its name only: it is taken for unchanged as long as that stays.
    """
    return [
        [f"{item.name}:{item.config}:{item.split}", -1, 0]
        if isinstance(item, HubDataset)
        else file_signature(item.path)
        for item in items
    ]


def file_signature(path: Path) -> list[str | int]:
    """Return [name, size in bytes, modification time in ns] of a file."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def embedded_files() -> list[Path]:
    """Return the *.py files of the running Python's standard library, sorted, without packages and tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NOT_EMBEDDED]  # os.walk skips the others
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _resolve_one(name: str, found: Sources) -> None:
    path = Path(name).expanduser()
    match = DATASET_NAME.fullmatch(name)
    if path.is_dir():
        _resolve_folder(path, found)
    elif path.exists():
        found.items.append(look_at(path))
    elif match and not path.parent.exists() and path.suffix not in (*FORMS, *PACKINGS, *OTHER_SUFFIXES):
        found.items.append(HubDataset(match[1], match[2], match[3] or "train"))
    else:
        folder = path.parent
        known = os.listdir(folder) if folder.is_dir() else []
        where = "" if known else f", nor a folder {str(folder)!r}"
        raise InputError(
            f"no such file or folder: {name!r}{where}{nearest(path.name, known)}; "
            "give files, folders, or a Hugging Face dataset as owner/name[:config[:split]]"
        )


def _resolve_folder(folder: Path, found: Sources) -> None:
    """Add what is to read below a folder, by sorted path, and note what is not."""
    files: list[SourceFile] = []
    skipped: dict[str, str] = {}
    for path in _below(folder):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            skipped[str(path)] = "hidden"
            continue
        try:
            files.append(look_at(path))
        except NotText as why:
            skipped[str(path)] = why.reason
    if any(file.form != "text" for file in files):
        notes = {f.path for f in files if f.form == "text" and _suffix(f.path) not in (".txt", ".text")}
        skipped |= {str(f.path): "beside JSON or Parquet only .txt is read" for f in files if f.path in notes}
        files = [f for f in files if f.path not in notes]
    if not files:
        raise InputError(
            f"empty corpus: the folder {str(folder)!r} holds no text, JSON lines or Parquet file"
            f"{Sources([], skipped)!s}; give another folder or the files themselves"
        )
    found.items += files
    found.skipped |= skipped


def _below(root: Path) -> list[Path]:
    """The files below a folder, and what a walk does not enter, sorted."""

    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename), error) from error

    paths: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        closed = [name for name in subfolders if name.startswith(".") or Path(folder, name).is_symlink()]
        paths += [Path(folder, name) for name in (*names, *closed)]
        subfolders[:] = [name for name in subfolders if name not in closed]
    return sorted(paths)


class NotText(InputError):
    """A file that no reader reads."""

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{path}: {reason}; give UTF-8 text, JSON lines or Parquet, packed or not")


def _suffix(path: Path) -> str:
    """The suffix that tells the form."""
    return Path(path.stem if path.suffix in PACKINGS else path.name).suffix.lower()


def look_at(path: Path) -> SourceFile:
    """Return what a file is; NotText if it is none of the forms, InputError if it cannot be read or unpacked."""
    if not path.is_file():  # a pipe gives its text once, and text is read several times
        raise NotText(path, "not a file")
    packing = packing_of(path)
    with opened(path, packing) as file:
        head = file.read(HEAD_BYTES)
    named = FORMS.get(_suffix(path))
    if named == "Parquet" or (named is None and head.startswith(b"PAR1")):
        return SourceFile(path, "Parquet", packing)
    if b"\0" in head:
        utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise NotText(path, "UTF-16, convert it (iconv)" if utf16 else "not text but binary, or an archive")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if named == "text" or (named is None and not _is_json(start)):
        return SourceFile(path, "text", packing)
    line, _, more = start.partition(b"\n")
    alone = _suffix(path) == ".json" and line.startswith(b"{") and len(head) < HEAD_BYTES and not more.strip()
    if alone or line.strip() == b"{":
        raise NotText(path, "one JSON object, no records")
    return SourceFile(path, "JSON array" if start.startswith(b"[") else "JSON lines", packing)


def _is_json(start: bytes) -> bool:
    """Whether a file begins with a line that is a JSON object, or with an array of objects."""
    line, end, _ = start.partition(b"\n")
    if re.match(rb'\[\s*\{\s*"', start):
        return True
    if not end and len(start) > HEAD_BYTES - 200:  # the line is longer than what we look at
        return re.match(rb'\{\s*"', start) is not None
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
