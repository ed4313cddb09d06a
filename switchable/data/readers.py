"""What is in a file: its documents, whatever form it has. InputError says where it is not what it should be."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from switchable.errors import InputError, nearest

CHUNK_BYTES = 1 << 20


def open_file(path: Path) -> IO[bytes]:
    """Open a file, decompressed."""
    if path.suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), CHUNK_BYTES)
    return path.open("rb")


def text_documents(path: Path, separator: re.Pattern[str] | None) -> Iterator[str]:
    """Yield a text file as one document, or cut at a separator."""
    if separator is None:
        yield "".join(_decoded(path))
        return
    rest = ""
    for text in _decoded(path):
        # A separator may straddle two chunks, but never begins before the tail that has not been searched.
        start = max(0, len(rest) - 2 * len(separator.pattern))
        rest += text
        begin = 0
        for match in separator.finditer(rest, start):
            yield rest[begin : match.start()]
            begin = match.end()
        rest = rest[begin:]
    yield rest


def _decoded(path: Path) -> Iterator[str]:
    """The text of a file chunk by chunk, without a byte-order mark; InputError where it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, first = 0, True
    try:
        with open_file(path) as file:
            while True:
                chunk = file.read(CHUNK_BYTES)
                pending = len(decoder.getstate()[0])  # bytes of a character cut by the last chunk
                try:
                    text = decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, error, offset - pending) from error
                yield text.removeprefix("\ufeff") if first else text
                offset, first = offset + len(chunk), False
                if not chunk:
                    return
    except OSError as error:
        raise unreadable(path, error) from error


def jsonl_documents(path: Path, text_field: str) -> Iterator[str]:
    """Yield the text of each record."""
    offset = 0
    try:
        with open_file(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield _jsonl_text(path, number, offset, line, text_field)
                offset += len(line)
    except OSError as error:
        raise unreadable(path, error) from error


def _jsonl_text(path: Path, number: int, offset: int, line: bytes, text_field: str) -> str:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error, offset) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error}); correct or remove this line") from error
    if not isinstance(record, dict):
        raise InputError(f'{where}: {type(record).__name__}, not an object; write {{"{text_field}": "..."}}')
    text = text_of(record, text_field, where)
    if b"\\u" in line:  # only an escape can write half a surrogate pair, which no UTF-8 text holds
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: half a surrogate pair, not UTF-8 text; correct this line") from error
    return text


def text_of(record: dict[str, Any], text_field: str, where: str) -> str:
    """Return the text of a record, empty where it is null."""
    if text_field not in record:
        raise InputError(
            f"{where}: no field {text_field!r}{nearest(text_field, record)}; it has "
            f"{', '.join(map(repr, record)) or 'none'}; name the field of the text (--text-field)"
        )
    text = record[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(
            f"{where}: field {text_field!r} holds {type(text).__name__}; name one of text (--text-field)"
        )
    return text


def parquet_documents(path: Path, text_field: str) -> Iterator[str]:
    """Yield the text of each row."""
    row = 0
    try:
        with closing(pq.ParquetFile(path)) as file:
            text_of(dict.fromkeys(file.schema_arrow.names, ""), text_field, str(path))
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0):
                    yield text_of({text_field: value.as_py()}, text_field, f"{path}, row {row}")
                    row += 1
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{path}, row {row}", error, 0) from error
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> InputError:
    """Return the error to raise for a file that cannot be read."""
    if isinstance(error, OSError) and error.errno is not None:
        return InputError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions")
    return InputError(f"{path}: truncated, damaged or not what its suffix says ({error}); fetch it again")


def _not_utf8(where: str | Path, error: UnicodeDecodeError, offset: int) -> InputError:
    return InputError(
        f"{where}: byte {error.object[error.start]:#04x} at offset {offset + error.start} is not UTF-8 text; "
        "convert the file to UTF-8 (iconv) or leave it out"
    )
