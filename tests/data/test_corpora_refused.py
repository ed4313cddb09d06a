"""What `documents` says when a source is unusable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import jsonl, message, write_zst

from switchable.data import packing
from switchable.data.corpora import documents
from switchable.errors import InputError


def test_missing_file_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "articles.jsonl").write_bytes(jsonl("x"))
    with pytest.raises(
        InputError, match=r"no such file or folder: '.*artcles.jsonl'; did you mean 'articles.json"
    ):
        documents([str(tmp_path / "artcles.jsonl")])  # at once, not at the first document
    assert "nor a folder" in message([str(tmp_path / "nowhere" / "a.txt")])


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert f"{tmp_path / 'pipe'}: not a file; give UTF-8 text" in message([str(tmp_path / "pipe")])
    (tmp_path / "a.txt").write_text("text")
    assert list(documents([str(tmp_path)])) == ["text"]


@pytest.mark.parametrize("name", ["missing", "data/missing.txt", "./owner/name", "tests/missing", "a/b/c"])
def test_not_every_name_is_a_dataset(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "no such file or folder" in message([name])


@pytest.mark.parametrize("chunk", [1, 4, 1 << 20])
def test_not_utf8_names_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(packing, "CHUNK_BYTES", chunk)
    path = tmp_path / "latin1.txt"
    path.write_bytes("ab€cd".encode() + b"\xe9 rest")  # 1 + 1 + 3 + 1 + 1 bytes before it
    said = message([str(path)])
    assert "latin1.txt: byte 0xe9 at offset 7 is not UTF-8" in said
    assert "iconv" in said
    path.write_bytes(b"\xef\xbb\xbfabc\xe9")
    assert "byte 0xe9 at offset 6" in message([str(path)])  # the mark counts
    path.write_bytes(b"abc\xe2\x82")  # cut in the middle of a character
    assert "byte 0xe2 at offset 3" in message([str(path)])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "x"', "line 3: not valid JSON"),
        (b"[" * 100_000, "line 3: not valid JSON"),
        (b'{"txt": "x"}', "line 3: no field 'text'; did you mean 'txt'?; it has 'txt'"),
        (b'["x"]', "line 3: list, not an object"),
        (b'{"text": 5}', "line 3: field 'text' holds int"),
        (b'{"text": "\\ud800"}', "line 3: half a surrogate pair"),
        (b'{"text": "\xff"}', "line 3: byte 0xff at offset 51"),
    ],
)
def test_broken_jsonl_line(tmp_path: Path, line: bytes, says: str) -> None:
    for path in (tmp_path / "a.jsonl", tmp_path / "a.jsonl.zst"):
        data = (
            jsonl("good") + b"\n" + line + b"\n"
        )  # 25 + 1 bytes before the line, the offset counts from there
        says_here = says.replace("51", str(len(jsonl("good")) + 1 + line.find(b"\xff")))
        write_zst(path, data) if path.suffix == ".zst" else path.write_bytes(data)
        assert f"{path}, {says_here}" in message([str(path)])


def test_escaped_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00"}\n')
    assert list(documents([str(path)])) == ["😀"]


def test_truncated_and_foreign_zst(tmp_path: Path) -> None:
    whole = write_zst(tmp_path / "whole.jsonl.zst", jsonl(*(f"document {i * 7919}" for i in range(2000))))
    cut = tmp_path / "cut.jsonl.zst"
    cut.write_bytes(whole.read_bytes()[:-100])
    assert "cut.jsonl.zst: truncated, damaged" in message([str(cut)])
    cut.write_bytes(b"this is no zstd")
    assert "cut.jsonl.zst: truncated, damaged or not what its suffix says" in message([str(cut)])


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "number": [1]}), path)
    assert "no field 'text'; it has 'body', 'number'" in message([str(path)])
    assert "row 0: field 'number' holds int" in message([str(path)], text_field="number")
    path.write_bytes(path.read_bytes()[:-20])
    assert "a.parquet: truncated, damaged" in message([str(path)])
    not_utf8 = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\x02\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"text": not_utf8}), path)
    assert "row 0: byte 0xff at offset 1" in message([str(path)])


def test_empty_corpus(tmp_path: Path) -> None:
    path = tmp_path / "blank.txt"
    path.write_text(" \n\n", encoding="utf-8")
    assert "empty corpus: no text in" in message([str(path)])
    (tmp_path / "folder").mkdir()
    assert "empty corpus: the folder" in message([str(tmp_path / "folder")])


def test_empty_separator(tmp_path: Path) -> None:
    assert "document_separator is empty" in message([str(tmp_path)], document_separator="")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x", encoding="utf-8")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "a.txt: cannot be read (Permission denied)" in message([str(path)])
