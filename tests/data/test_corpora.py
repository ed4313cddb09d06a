"""What `documents` yields from every kind of source."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import jsonl, message, write_zst

from switchable.data import packing
from switchable.data.corpora import documents
from switchable.data.sources import HubDataset, embedded_files, resolve, signature

SHARED = Path(os.environ.get("SWITCHABLE_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
def test_text_file_is_one_document_whose_lines_end_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(packing, "CHUNK_BYTES", chunk)
    path = tmp_path / "a.anything"
    path.write_bytes("\ufefffirst\r\nsecond é\rthird\n\r\n\u2028fourth\r".encode())
    assert list(documents(str(path))) == ["first\nsecond é\nthird\n\n\u2028fourth\n"]


def test_lines_of_records_end_alike(tmp_path: Path) -> None:
    text = "\ufeffone\r\ntwo\rthree\u2028"
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n")
    pq.write_table(pa.table({"text": [text]}), tmp_path / "b.parquet")
    assert list(documents(str(tmp_path))) == ["one\ntwo\nthree\u2028"] * 2


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}  # fmt: skip
RECORDS = json.dumps([{"text": "one"}, {"text": "two"}])


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "two"]}), sink)
    return sink.getvalue()


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize(
    ("data", "suffixes"),
    [
        (b"one\n\ntwo", (".txt", ".text", ".md", ".log", "")),
        (jsonl("one", "two"), (".jsonl", ".ndjson", ".json", ".log", "")),
        (RECORDS.encode(), (".jsonl", ".ndjson", ".json", ".log", "")),
        (json.dumps(json.loads(RECORDS), indent=2).encode(), (".json", "")),
        (parquet(), (".parquet", ".pq", "")),
    ],
)
def test_every_form_under_every_name_and_packing(
    tmp_path: Path, data: bytes, suffixes: tuple[str, ...], packing: str
) -> None:
    for suffix in suffixes:
        for named in (packing, ""):  # the packing is known by the first bytes too
            path = tmp_path / f"a{suffix}{named}"
            path.write_bytes(PACKERS[packing](data))
            assert list(documents(str(path), document_separator="\n\n")) == ["one", "two"], path


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
def test_packed_files_put_one_after_the_other_are_read_whole(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(PACKERS[packing](jsonl("one")) + PACKERS[packing](jsonl("two")))
    assert list(documents(str(path))) == ["one", "two"]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_array_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(packing, "CHUNK_BYTES", chunk)
    path = tmp_path / "a.json"
    path.write_bytes('[ {"text": "öne ]"}\n,{"n": [1, {}], "text": "t,w{o"} ]\n'.encode())
    assert list(documents(str(path))) == ["öne ]", "t,w{o"]
    path.write_bytes(b"[]")
    assert "empty corpus" in message(str(path))
    for broken in (
        b'[{"text": "x"}',
        b'[{"text": "x"},]',
        b'[{"text": "x"} {"text": "y"}]',
        b'[{"text": "x"}]]',
    ):
        path.write_bytes(broken)
        assert f"{path}, after record 1: not valid JSON" in message(str(path))
    path.write_bytes(b'["x"]')
    assert f"{path}, record 1: str, not an object" in message(str(path))


def test_file_names_need_not_be_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for suffix, pack in PACKERS.items():
        Path(os.fsdecode(folder + b"/\xff.jsonl") + suffix).write_bytes(pack(jsonl(suffix or "plain")))
    Path(os.fsdecode(folder + b"/\xff.parquet")).write_bytes(parquet())
    found = sorted(documents(os.fsdecode(folder)))
    assert found == sorted(["plain", *list(PACKERS)[1:], "one", "two"])


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1 << 20])
@pytest.mark.parametrize("separator", ["\n\n", "\\n\\n", "\r\n\r\n"])
def test_document_separator_across_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, separator: str
) -> None:
    monkeypatch.setattr(packing, "CHUNK_BYTES", chunk)
    path = tmp_path / "a.txt"
    path.write_bytes(
        "öne\n\n\n\ntwo\nlines\r\n\r\nthree €".encode()
    )  # "\n\n\n\n": an empty document, skipped
    assert list(documents([str(path)], document_separator=separator)) == ["öne", "two\nlines", "three €"]


def test_separator_is_literal_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a.b<|end.|>c|d<|endx|>", encoding="utf-8")
    assert list(documents([str(path)], document_separator="<|end.|>")) == ["a.b", "c|d<|endx|>"]


def test_jsonl_and_zst(tmp_path: Path) -> None:
    plain = tmp_path / "a.jsonl"
    plain.write_bytes(b"\xef\xbb\xbf" + jsonl("one", "  ") + b"\n" + b'{"text": null}\n' + jsonl("t\u00e9\n"))
    assert list(documents([str(plain)])) == ["one", "té\n"]
    packed = write_zst(tmp_path / "b.jsonl.zst", jsonl("three", "four", key="body"))
    assert list(documents([str(packed)], text_field="body")) == ["three", "four"]
    text = write_zst(tmp_path / "c.txt.zst", b"five\n\nsix")
    assert list(documents([str(text)])) == ["five\n\nsix"]
    assert list(documents([str(text)], document_separator="\n\n")) == ["five", "six"]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": range(600), "text": [f"doc {i}" for i in range(600)]}), path)
    assert list(documents([str(path)])) == [f"doc {i}" for i in range(600)]


def test_folder_is_sorted_and_everything_in_it_is_read_or_named(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    for name in ("b.txt", "a.md", "sub/c", ".hidden/x", ".y"):
        (tmp_path / name).write_text(f"in {name}", encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    assert list(documents([str(tmp_path)])) == ["in a.md", "in b.txt", "in sub/c"]
    (tmp_path / "config.json").write_text('{\n  "a": 1\n}\n', encoding="utf-8")
    skipped = {".hidden": "hidden", ".y": "hidden", "link": "not a file"}
    skipped |= {
        "image.png": "not text but binary, or an archive",
        "config.json": "one JSON object, no records",
    }
    found = resolve([str(tmp_path)])
    assert found.skipped == {str(tmp_path / name): why for name, why in skipped.items()}
    assert str(found).startswith("3 x text file; skipped: '")
    assert "image.png' (not text but binary" in str(found)
    (tmp_path / "sub" / "d.jsonl").write_bytes(jsonl("a record"))
    assert list(documents([str(tmp_path)])) == ["in b.txt", "a record"]
    notes = {"a.md", "sub/c"}
    assert set(resolve([str(tmp_path)]).skipped) == {str(tmp_path / name) for name in notes | set(skipped)}


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"name\0\0\0content")
    assert f"{path}: not text but binary, or an archive; give UTF-8 text" in message(str(path))
    path.write_bytes("text".encode("utf-16"))
    assert "UTF-16, convert it (iconv)" in message(str(path))
    for settings in ('{\n"text": "x"}', '{"a": 1}\n'):
        (tmp_path / "a.json").write_text(settings, encoding="utf-8")
        assert "one JSON object, no records" in message(str(tmp_path / "a.json"))


def test_sources_keep_their_order(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert list(documents([str(tmp_path / "b"), str(tmp_path / "a")])) == ["b", "a"]


def test_embedded_default() -> None:
    files = embedded_files()
    names = [path.as_posix() for path in files]
    assert files == embedded_files()
    assert len(files) > 300
    assert any(name.endswith("/json/decoder.py") for name in names)
    assert not any("/site-packages/" in name or "/test/" in name or "/tests/" in name for name in names)
    texts = documents()
    first = next(texts)
    assert first == files[0].read_text(encoding="utf-8") or not files[0].stat().st_size


def test_embedded_default_skips_what_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_bytes(b"# \xe9\n")
    (tmp_path / "b.py").write_bytes(b"pass\n")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert list(documents()) == ["pass\n"]


def test_signature_notices_a_change(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one", encoding="utf-8")
    before = signature(resolve([str(path)]).items)
    assert before == [[str(path.resolve()), 3, path.stat().st_mtime_ns]]
    path.write_text("three", encoding="utf-8")
    assert signature(resolve([str(path)]).items) != before


def test_real_wikipedia_shard() -> None:
    folder = SHARED / "enwiki2015_core"
    if not folder.exists():
        pytest.skip(f"no {folder}: set SWITCHABLE_DATA to the folder of shared data")
    assert next(documents([str(folder)])).startswith("Anarchism\n\nAnarchism is a political philosophy")


# --- Hugging Face datasets ---


class FakeHub:
    def __init__(self, rows: list[dict[str, Any]] | Exception) -> None:
        self.rows, self.calls = rows, []  # type: ignore[var-annotated]

    def load_dataset(self, *args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        self.calls.append((args, kwargs))
        if isinstance(self.rows, Exception):
            raise self.rows
        return iter(self.rows)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = types.ModuleType("datasets")
        module.load_dataset = self.load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)


def test_dataset_name_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub([{"text": "one"}, {"text": "two"}])
    hub.install(monkeypatch)
    assert list(documents(["some-owner/some.data:config-1:validation"])) == ["one", "two"]
    assert hub.calls == [(("some-owner/some.data", "config-1"), {"split": "validation", "streaming": True})]
    assert resolve(["some-owner/data"]).items == [HubDataset("some-owner/data", None, "train")]


def test_dataset_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub([{"content": "one"}]).install(monkeypatch)
    assert "no field 'text'" in (said := message(["o/d"]))
    assert "row 0" in said
    assert "'content'" in said
    for error in (ConnectionError("Couldn't reach 'o/d'"), ValueError("BuilderConfig 'x' not found")):
        FakeHub(error).install(monkeypatch)
        assert str(error) in (said := message(["o/d:x"]))
        assert "check the name" in said
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    assert "pip install 'switchable[datasets]'" in message(["o/d"])
