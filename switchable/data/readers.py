"""What is in a file: `documents_of(file, ...)`, whatever form it has.

Line ends become \\n (from \\r\\n and \\r), and a byte-order mark is dropped: the same words are the same tokens.
InputError says where a file is not what it should be.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from switchable.data import packing
from switchable.data.packing import opened
from switchable.data.sources import SourceFile
from switchable.errors import InputError, nearest

BEFORE_A_RECORD = re.compile(r"\s*[\[,]\s*(?=\S)")  # of a JSON array
END_OF_ARRAY = re.compile(r"\s*(\[\s*)?\]\s*")


def documents_of(file: SourceFile, text_field: str = "text", separator: str | None = None) -> Iterator[str]:
    """Yield the documents of a file: records' `text_field`, or text cut at `separator`."""
    if file.form == "text":
        return text_documents(file, separator)
    records = {"JSON lines": _lines, "JSON array": _array, "Parquet": _rows}[file.form]
    return (text_of(record, text_field, where) for where, record in records(file, text_field))


def text_documents(file: SourceFile, separator: str | None) -> Iterator[str]:
    """Yield a text file as one document, or cut at a separator."""
    if separator is None:
        yield "".join(_decoded(file))
        return
    rest = ""
    for text in _decoded(file):
        # A separator may straddle two chunks, but never begins before the tail that has not been searched.
        start, begin = max(0, len(rest) - len(separator) + 1), 0
        rest += text
        while (end := rest.find(separator, start)) >= 0:
            yield rest[begin:end]
            start = begin = end + len(separator)
        rest = rest[begin:]
    yield rest


def _decoded(file: SourceFile) -> Iterator[str]:
    """The text of a file chunk by chunk; InputError where it is not UTF-8."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    end = 0
    with opened(file.path, file.packing) as stream:
        while True:
            chunk = stream.read(packing.CHUNK_BYTES)
            end += len(chunk)
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(file.path, error, end) from error
            if not chunk:
                return


def _lines(file: SourceFile, _: str) -> Iterator[tuple[str, Any]]:
    """The records of JSON lines, and where each is. Only \\n ends a line: other line ends may stand in a string."""
    end = 0
    with opened(file.path, file.packing) as stream:
        for number, line in enumerate(stream, start=1):
            where, end = f"{file.path}, line {number}", end + len(line)
            if line.isspace():
                continue
            try:
                yield where, json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise _not_utf8(where, error, end) from error
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not valid JSON ({error}); correct or remove this line") from error


def _array(file: SourceFile, _: str) -> Iterator[tuple[str, Any]]:
    """The records of a JSON array, and where each is; in memory are one of them and a chunk of the file."""
    decode = json.JSONDecoder().raw_decode
    rest, number, wanted = "", 0, 0
    problem: Exception | str = "it does not end with ]"
    for text in chain(_decoded(file), [""]):
        rest += text
        if text and len(rest) < wanted:
            continue
        begin = 0
        while match := BEFORE_A_RECORD.match(rest, begin):
            try:
                record, begin = decode(rest, match.end())
            except (ValueError, RecursionError) as error:
                problem = error  # perhaps only cut off: look again when there is twice as much
                break
            number += 1
            yield f"{file.path}, record {number}", record
        rest = rest[begin:]
        wanted = 2 * len(rest)
    if not END_OF_ARRAY.fullmatch(rest):
        raise InputError(f"{file.path}, after record {number}: not valid JSON ({problem}); correct the file")


def _rows(file: SourceFile, text_field: str) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file, of which only the text is read, and where each is."""
    row = 0
    try:
        with opened(file.path, file.packing) as stream:
            source = pa.BufferReader(stream.read()) if file.packing else stream
            with closing(pq.ParquetFile(source)) as table:
                text_of(dict.fromkeys(table.schema_arrow.names, ""), text_field, str(file.path))
                for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                    for value in batch.column(0):
                        yield f"{file.path}, row {row}", {text_field: value.as_py()}
                        row += 1
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{file.path}, row {row}", error, len(error.object)) from error


def text_of(record: Any, text_field: str, where: str) -> str:
    """Return the text of a record, empty where it is null."""
    if not isinstance(record, dict):
        raise InputError(f'{where}: {type(record).__name__}, not an object; write {{"{text_field}": "..."}}')
    if text_field not in record:
        raise InputError(
            f"{where}: no field {text_field!r}{nearest(text_field, record)}; it has "
            f"{', '.join(map(repr, record)) or 'none'}; name the field of the text (--text-field)"
        )
    if (text := record[text_field]) is None:
        return ""
    if not isinstance(text, str):
        raise InputError(
            f"{where}: field {text_field!r} holds {type(text).__name__}; name one of text (--text-field)"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a surrogate pair, not UTF-8 text; correct it") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _not_utf8(where: str | Path, error: UnicodeDecodeError, end: int) -> InputError:
    """Return the error to raise; `end` is the offset in the file at which the decoded bytes end."""
    offset = end - len(error.object) + error.start
    return InputError(
        f"{where}: byte {error.object[error.start]:#04x} at offset {offset} is not UTF-8 text; "
        "convert the file to UTF-8 (iconv) or leave it out"
    )
