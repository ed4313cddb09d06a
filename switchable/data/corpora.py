"""Where text comes from: `documents(sources)` streams the documents of a corpus, one string each.

Only the document at hand is in memory, nothing but line ends is changed, and every run sees the same order: sources as
given, files of a folder by sorted path, records as they stand. What a source may be:

    (nothing)                     the embedded default: the source text of the Python installation's library
    a text file                   one document, or several cut at `document_separator`
    JSON lines, a JSON array      one record per object, the text in `text_field`
    Parquet                       one record per row, the text in `text_field`
    a folder                      all such files in it (`sources.py` tells the forms)
    owner/name[:config[:split]]   a Hugging Face dataset, streamed (extra `datasets`; split: `train`)

Documents of nothing but white space are skipped, and so are records whose text is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from switchable.data.readers import documents_of, text_of
from switchable.data.sources import HubDataset, Item, SourceFile, resolve
from switchable.errors import InputError


def documents(
    sources: str | Sequence[str] = (), text_field: str = "text", document_separator: str | None = None
) -> Iterator[str]:
    r"""Return an iterator over the documents of `sources`, in a fixed order.

    Args:
        sources: paths and dataset names as in this module's table; empty means the embedded default.
        text_field: field of a JSON record, or column of a Parquet file or dataset, that holds the text.
        document_separator: text that stands between documents in plain-text files, for example "\n\n" (the
            two characters backslash and n are read as a line break, which is any of \n, \r\n and \r).

    Raises:
        InputError: a source is missing, or not text (at once); while iterating: a file cannot be read, is not UTF-8 or
            not what its name says, a record is broken or has no text, there is no document at all.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    separator = _separator(document_separator)
    items = resolve(names).items  # before the generator starts, so that a wrong name is told at once
    if not names:
        return _filled([_embedded_documents(items)], names)
    return _filled((_read(item, text_field, separator) for item in items), names)


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
    for file in files:
        assert isinstance(file, SourceFile)
        with suppress(UnicodeDecodeError):  # a few library files show other encodings on purpose
            yield file.path.read_text(encoding="utf-8")


def _read(item: Item, text_field: str, separator: str | None) -> Iterator[str]:
    if isinstance(item, HubDataset):
        return _hub_documents(item, text_field)
    return documents_of(item, text_field, separator)


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


def _separator(given: str | None) -> str | None:
    if given is None:
        return None
    if not given:
        raise InputError(r"document_separator is empty; give the text between documents, such as '\n\n'")
    return given.replace("\\n", "\n").replace("\\t", "\t").replace("\r\n", "\n").replace("\r", "\n")
