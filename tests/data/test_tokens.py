"""`prepare`: what is written, and what is said of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from texts import TEXTS, config_for, documents_in, hash_of, write_jsonl

from switchable.data import corpora, split, tokenizers
from switchable.data.batches import token_array
from switchable.data.config import DataConfig
from switchable.data.tokens import load_prepared, prepare
from switchable.errors import InputError


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
