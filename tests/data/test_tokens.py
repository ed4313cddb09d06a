"""`prepare`: the split, the token files; done once, by one process, whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from texts import TEXTS, config_for, documents_in, write_jsonl

from switchable.data import corpora, split, tokenizers, tokens
from switchable.data.batches import token_array
from switchable.data.config import DataConfig
from switchable.data.tokens import load_prepared, prepare
from switchable.errors import InputError


def hash_of(text: str) -> int:
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16)


# --- the split ---


def test_split_is_by_hash_and_complete(source: Path, tmp_path: Path) -> None:
    data = prepare(config_for(source, val_fraction=0.2), tmp_path / "cache")
    train, val = documents_in(data, data.train), documents_in(data, data.val)
    assert val == [text for text in TEXTS if hash_of(text) / 2**64 < 0.2]
    assert train == [text for text in TEXTS if hash_of(text) / 2**64 >= 0.2]
    assert 20 <= len(val) <= 60


def test_equal_documents_share_a_side(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "s.jsonl", TEXTS[:50] * 3)
    data = prepare(config_for(source, val_fraction=0.5), tmp_path / "cache")
    train, val = documents_in(data, data.train), documents_in(data, data.val)
    assert len(train) + len(val) == 150
    assert not set(train) & set(val)


@pytest.mark.parametrize(("val_fraction", "lowest_n"), [(1e-9, 1), (0.999999, 2)])
def test_no_side_is_empty(tmp_path: Path, val_fraction: float, lowest_n: int) -> None:
    texts = ["one", "two", "three", "two"]
    in_order = sorted(set(texts), key=hash_of)
    source = write_jsonl(tmp_path / "s.jsonl", texts)
    data = prepare(config_for(source, val_fraction=val_fraction), tmp_path / "cache")
    assert set(documents_in(data, data.val)) == set(in_order[:lowest_n])
    assert set(documents_in(data, data.train)) == set(in_order[lowest_n:])


def test_one_document_corpus(tmp_path: Path) -> None:
    source = tmp_path / "book.txt"
    source.write_text("chapter one\n\nchapter two\n\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"a single document, but .*--document-separator '\\n\\n'"):
        prepare(config_for(source), tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == [f"{lock_of(config_for(source))}"]
    data = prepare(config_for(source, document_separator=r"\n\n"), tmp_path / "cache")
    assert (data.train.documents, data.val.documents) == (1, 1)
    same = write_jsonl(tmp_path / "same.jsonl", ["again"] * 5)
    with pytest.raises(InputError, match="5 documents, all the same"):
        prepare(config_for(same), tmp_path / "cache")
    with pytest.raises(InputError, match="a single document in the first 1e-06 MB"):
        prepare(config_for(write_jsonl(tmp_path / "s.jsonl", TEXTS), max_text_mb=1e-6), tmp_path / "cache")


def lock_of(config: DataConfig) -> str:
    return f".{tokens._fingerprint(config, 'causal')}.lock"


# --- what is written ---


def test_meta_counts_what_is_there(source: Path, tmp_path: Path) -> None:
    data = prepare(config_for(source), tmp_path / "cache")
    meta = json.loads((data.folder / "meta.json").read_text(encoding="utf-8"))
    for side, part in (("train", data.train), ("val", data.val)):
        documents = documents_in(data, part)
        raw = part.path.read_bytes()
        assert meta["splits"][side] == {
            "documents": len(documents),
            "text_bytes": sum(len(text.encode()) for text in documents),
            "tokens": len(raw) // 2,
            "sha256": hashlib.sha256(raw).hexdigest(),
        }
    assert data.dtype == meta["dtype"] == "uint16"
    assert data.vocab_size == meta["vocab_size"] == 300
    assert (data.end_of_text.token, data.end_of_text.id, data.end_of_text.kind) == ("<|endoftext|>", 0, "eos")
    assert meta["settings"]["val_fraction"] == 0.05
    assert len(token_array(data.train.path)) == data.train.tokens
    assert len(token_array(data.val.path)) == data.val.tokens
    assert data == load_prepared(data.folder)


def test_same_input_same_bytes(source: Path, tmp_path: Path) -> None:
    one, two = (prepare(config_for(source), tmp_path / name) for name in ("a", "b"))
    assert (one.train.sha256, one.val.sha256, one.fingerprint) == (
        two.train.sha256,
        two.val.sha256,
        two.fingerprint,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (one.tokenizer_path / name).read_bytes() == (two.tokenizer_path / name).read_bytes()


def test_max_text_mb_stops_after_the_document_that_fills_it(source: Path, tmp_path: Path) -> None:
    limit = sum(len(text.encode()) for text in TEXTS[:30]) - 5
    data = prepare(config_for(source, max_text_mb=limit / 1e6), tmp_path / "cache")
    assert data.train.documents + data.val.documents == 30


def test_bpe_is_trained_on_a_bounded_sample_of_training_documents(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    train_bpe = tokenizers.train_bpe

    def spy(texts: Iterator[str], vocab_size: int, objective: str) -> Any:
        seen.extend(texts)
        return train_bpe(seen, vocab_size, objective)

    monkeypatch.setattr(tokenizers, "train_bpe", spy)
    prepare(config_for(source, val_fraction=0.5), tmp_path / "a")
    assert sorted(seen) == sorted(text for text in TEXTS if hash_of(text) >= 2**63)
    seen.clear()
    monkeypatch.setattr(split, "SAMPLE_BYTES", 2000)
    prepare(config_for(source, val_fraction=0.5), tmp_path / "b")
    by_hash = sorted(TEXTS, key=hash_of, reverse=True)
    assert sorted(seen) == sorted(by_hash[: len(seen)])
    sizes = [len(text.encode()) for text in by_hash[: len(seen)]]
    assert sum(sizes) >= 2000 > sum(sizes[:-1])


def test_source_that_changes_while_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = iter([TEXTS, TEXTS[:-1]])
    monkeypatch.setattr(corpora, "documents", lambda *_: iter(next(passes)))
    with pytest.raises(InputError, match="the text changed while it was read"):
        prepare(config_for(source), tmp_path / "cache")


# --- done once, whole or not at all ---


def forbid_building(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_build", lambda *_: pytest.fail("built again"))


def test_done_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepare(config_for(source), tmp_path / "cache")
    with monkeypatch.context() as patch:
        forbid_building(patch)
        assert prepare(config_for(source), tmp_path / "cache") == data
    changed = [config_for(source, vocab_size=301), config_for(source, val_fraction=0.06)]
    write_jsonl(tmp_path / "other.jsonl", TEXTS)
    changed.append(config_for(tmp_path / "other.jsonl"))
    os.utime(source, ns=(1, 1))
    changed.append(config_for(source))
    assert len({data.fingerprint, *(tokens._fingerprint(c, "causal") for c in changed)}) == 5


@pytest.mark.parametrize(
    "damage", ["cut train.bin", "no val.bin", "cut meta.json", "no meta.json", "odd meta.json"]
)
def test_damaged_cache(source: Path, tmp_path: Path, damage: str) -> None:
    data = prepare(config_for(source), tmp_path / "cache")
    how, name = damage.split()
    path = data.folder / name
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif how == "odd":
        path.write_text('{"splits": 5}', encoding="utf-8")
    else:
        path.unlink()
    with pytest.raises(InputError) as caught:
        prepare(config_for(source), tmp_path / "cache")
    assert str(path) in str(caught.value)
    assert f"delete the folder {str(data.folder)!r}" in str(caught.value)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    written: list[int] = []

    def failing(writer: Any, _: str, ids: Any) -> None:
        written.append(writer._file.write(ids.tobytes()))
        if sum(written) > 1500:
            writer._file.flush()
            raise error

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(tokens._SplitWriter, "write", failing)
        expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected) as caught:
            prepare(config_for(source), cache)
    if expected is InputError:
        assert "no space left on the device: 0.0 MB were written" in str(caught.value)
        assert str(cache) in str(caught.value)
    assert os.listdir(cache) == [lock_of(config_for(source))]
    assert prepare(config_for(source), cache).train.documents > 0


def test_cache_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot write in .*file.*give another folder"):
        prepare(config_for(source), tmp_path / "file")


SCRIPT = """
import os, sys, time
from switchable.data import tokens
build, mode = tokens._build, sys.argv[1]
if mode == "twice":
    os.fork()  # the import is the slow part: two processes share it
def slow(config, folder, *rest):
    print("building", flush=True)
    (folder / "train.bin").write_bytes(b"half a file")
    time.sleep(60 if mode == "hang" else 1)
    build(config, folder, *rest)
tokens._build = slow
config = tokens.DataConfig(data=(sys.argv[2],), vocab_size=300)
print(tokens.prepare(config, sys.argv[3]).train.sha256, flush=True)
"""


def start(mode: str, source: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, mode, str(source), str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once(source: Path, tmp_path: Path) -> None:
    process = start("twice", source, tmp_path / "cache")
    output = process.communicate(timeout=120)[0].split()  # until both have ended
    sha256 = prepare(config_for(source), tmp_path / "cache").train.sha256
    assert output == ["building", sha256, sha256]


def test_killed_in_the_middle(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = start("hang", source, cache)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    name = tokens._fingerprint(config_for(source), "causal")
    deadline = time.monotonic() + 30
    while not (cache / f".tmp-{name}" / "train.bin").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (cache / name).exists()
    data = prepare(
        config_for(source), cache
    )  # the lock went with the process, the leftovers are cleared away
    assert sorted(os.listdir(cache)) == [f".{name}.lock", name]
    assert documents_in(data, data.val) == [text for text in TEXTS if hash_of(text) / 2**64 < 0.05]


# --- the configuration ---


def test_config_fields_have_help_and_are_checked() -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(DataConfig))
    assert DataConfig(data=["a", "b"]).data == ("a", "b")  # type: ignore[arg-type]
    for settings, says in (
        ({"data": "a.txt"}, "must be a list of paths"),
        ({"val_fraction": 0.0}, "val_fraction=0.0 is out of range"),
        ({"max_text_mb": 0}, "max_text_mb=0 is out of range"),
        ({"vocab_size": 256}, "need 257"),
    ):
        with pytest.raises(InputError, match=says):
            DataConfig(**settings)  # type: ignore[arg-type]
    assert DataConfig(vocab_size=5, tokenizer="given").vocab_size == 5  # not used then


# --- what is said ---


def test_what_was_read_is_said_the_second_time_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "a.ndjson", TEXTS[:100])
    (folder / "b.txt").write_text("é " * 600_000, encoding="utf-8")
    (folder / "c.png").write_bytes(b"\0")
    for training in ("training a byte-level BPE of 300 tokens\n", ""):
        data = prepare(config_for(folder), tmp_path / "cache")
        size = sum(len(text.encode()) for text in TEXTS[:100]) + 3 * 600_000
        assert capsys.readouterr().err == (
            f"{training}read {str(folder)!r}: 1 x JSON lines file, 1 x text file; skipped: {str(folder / 'c.png')!r} "
            f"(not text but binary, or an archive); {size / 1e6:.1f} MB of text: {data.train.tokens:,} tokens in "
            f"{data.train.documents} documents to train on; {data.val.tokens} tokens in {data.val.documents} documents "
            "set aside for validation\n"
        )
    assert data.train.documents + data.val.documents == 101
    prepare(config_for(folder), tmp_path / "cache", progress=False)
    assert capsys.readouterr().err == ""


def test_the_same_words_are_the_same_tokens_whatever_ends_their_lines(tmp_path: Path) -> None:
    text = "the first line\nthe second line\n\nthe third\n"
    found = set()
    for name, end in (("lf", "\n"), ("crlf", "\r\n"), ("cr", "\r")):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.txt").write_bytes((text * (i + 1)).replace("\n", end).encode())
        found.add(prepare(config_for(tmp_path / name), tmp_path / "cache").train.sha256)
    assert len(found) == 1
