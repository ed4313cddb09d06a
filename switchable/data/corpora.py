"""Where text comes from: `documents(sources)` streams the documents of a corpus, one string each.

First room of TEXT -> TOKENS -> BATCHES. Only the document at hand is in memory, nothing is cleaned or
reordered, and every run sees the same order: sources as given, files of a folder by sorted path, records as
they stand. What a source may be:

    (nothing)                     the embedded default: the source text of the Python installation's library
    a file, any suffix            one document, or several cut at `document_separator`
    .txt.zst                      the same, compressed
    .jsonl, .jsonl.zst            one record per line, the text in `text_field`
    .parquet                      one record per row, the text in `text_field`
    a folder                      its .jsonl, .zst and .parquet files if it has any, else its text files
    owner/name[:config[:split]]   a Hugging Face dataset, streamed (extra `datasets`; split: `train`)

Documents of nothing but white space are skipped, and so are records whose text is null.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from switchable.data.readers import (
    jsonl_documents,
    parquet_documents,
    text_documents,
    text_of,
    unreadable,
)
from switchable.errors import InputError, nearest

STRUCTURED_SUFFIXES = (".jsonl", ".zst", ".parquet")
FILE_SUFFIXES = (*STRUCTURED_SUFFIXES, ".txt", ".md", ".json", ".csv", ".tsv", ".py", ".gz", ".text")
DATASET_NAME = re.compile(
    r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w.-]+))?(?::([\w.-]+))?"
)  # name, config, split
NOT_EMBEDDED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}  # folder names


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face Hub, as `owner/name[:config[:split]]` names it."""

    name: str
    config: str | None = None
    split: str = "train"


Item = Path | HubDataset


def documents(
    sources: str | Sequence[str] = (), text_field: str = "text", document_separator: str | None = None
) -> Iterator[str]:
    r"""Return an iterator over the documents of `sources`, in a fixed order.

    Args:
        sources: paths and dataset names as in this module's table; empty means the embedded default.
        text_field: field of a JSONL record, or column of a Parquet file or dataset, that holds the text.
        document_separator: text that stands between documents in plain-text files, for example "\n\n" (the
            two characters backslash and n are read as a line break, which also matches "\r\n").

    Raises:
        InputError: a source is missing (at once); while iterating: a file cannot be read, is not UTF-8 or not
            what its suffix says, a record is broken or has no text, there is no document at all.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    separator = _separator_pattern(document_separator)
    items = resolve(names)  # before the generator starts, so that a wrong name is told at once
    if not names:
        return _filled([_embedded_documents(items)], names)
    return _filled((_read(item, text_field, separator) for item in items), names)


def resolve(names: Sequence[str]) -> list[Item]:
    """Return the files and datasets that `names` stand for; InputError for a name that stands for nothing."""
    if not names:
        return list(embedded_files())
    return [item for name in names for item in _resolve_one(name)]


def signature(items: Iterable[Item]) -> list[list[str | int]]:
    """Return [name, size in bytes, modification time in ns] per file, to notice that a corpus has changed.

    A dataset of the Hub is known by its name only: it is taken for unchanged as long as that stays.
    """
    rows: list[list[str | int]] = []
    for item in items:
        if isinstance(item, HubDataset):
            rows.append([f"{item.name}:{item.config}:{item.split}", -1, 0])
        else:
            status = item.stat()
            rows.append([str(item.resolve()), status.st_size, status.st_mtime_ns])
    return rows


def embedded_files() -> list[Path]:
    """Return the *.py files of the running Python's standard library, sorted, without packages and tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NOT_EMBEDDED]  # os.walk skips the others
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


# --- names -> files and datasets ---


def _resolve_one(name: str) -> list[Item]:
    path = Path(name).expanduser()
    if path.is_dir():
        return list(_folder_files(path))
    if path.exists():
        return [path]
    match = DATASET_NAME.fullmatch(name)
    if match and path.suffix not in FILE_SUFFIXES and not path.parent.exists():
        return [HubDataset(match[1], match[2], match[3] or "train")]
    folder = path.parent
    known = os.listdir(folder) if folder.is_dir() else []
    where = "" if known else f", nor a folder {str(folder)!r}"
    raise InputError(
        f"no such file or folder: {name!r}{where}{nearest(path.name, known)}; "
        "give files, folders, or a Hugging Face dataset as owner/name[:config[:split]]"
    )


def _folder_files(folder: Path) -> list[Path]:
    """The structured files below `folder`, or all its text files if there is none; no hidden ones."""
    relative = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = [path for path in relative if not any(part.startswith(".") for part in path.parts)]
    structured = [folder / path for path in visible if path.name.endswith(STRUCTURED_SUFFIXES)]
    files = structured or [folder / path for path in visible if not _is_binary(folder / path)]
    if not files:
        raise InputError(
            f"empty corpus: the folder {str(folder)!r} holds no text, JSONL, zst or Parquet file; "
            "give another folder or the files themselves"
        )
    return files


def _is_binary(path: Path) -> bool:
    """Whether a file is not text at all: a NUL byte near its start, as git decides it."""
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(8192)
    except OSError as error:
        raise unreadable(path, error) from error


# --- one source -> its documents ---


def _filled(streams: Iterable[Iterator[str]], names: Sequence[str]) -> Iterator[str]:
    """All documents but blank ones; an error if there is none."""
    empty = True
    for stream in streams:
        for text in stream:
            if text and not text.isspace():
                empty = False
                yield text
    if empty:
        given = ", ".join(map(repr, names)) or "the embedded default (the Python library's source files)"
        raise InputError(f"empty corpus: no text in {given}; give files that hold some")


def _embedded_documents(files: Iterable[Item]) -> Iterator[str]:
    for path in files:
        assert isinstance(path, Path)
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few library files show other encodings on purpose


def _read(item: Item, text_field: str, separator: re.Pattern[str] | None) -> Iterator[str]:
    if isinstance(item, HubDataset):
        return _hub_documents(item, text_field)
    if item.suffix == ".parquet":
        return parquet_documents(item, text_field)
    if item.name.removesuffix(".zst").endswith(".jsonl"):
        return jsonl_documents(item, text_field)
    return text_documents(item, separator)


def _hub_documents(dataset: HubDataset, text_field: str) -> Iterator[str]:
    try:
        from datasets import load_dataset  # an optional extra
    except ImportError as error:
        raise InputError(
            f"no such file or folder: {dataset.name!r}; to read it as a Hugging Face dataset, install the "
            "extra: pip install 'switchable[datasets]'"
        ) from error
    where = f"dataset {dataset.name}, split {dataset.split}"
    try:
        rows = load_dataset(dataset.name, dataset.config, split=dataset.split, streaming=True)
        for row, record in enumerate(rows):
            yield text_of(record, text_field, f"{where}, row {row}")
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # not found, not reachable, no such config, a script
        raise InputError(
            f"{where}: no such local path, and the Hugging Face Hub did not give it ({error}); check the "
            "name (owner/name[:config[:split]]) and the connection, or give local files"
        ) from error


def _separator_pattern(separator: str | None) -> re.Pattern[str] | None:
    if separator is None:
        return None
    if not separator:
        raise InputError(r"document_separator is empty; give the text between documents, such as '\n\n'")
    text = separator.replace("\\n", "\n").replace("\\t", "\t").replace("\r\n", "\n")
    return re.compile(re.escape(text).replace("\\\n", "\r?\n"))
