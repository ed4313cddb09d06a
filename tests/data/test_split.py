"""The split: by the hash of a document, complete, and neither side empty."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from texts import TEXTS, config_for, documents_in, hash_of, lock_of, write_jsonl

from switchable.data.tokens import prepare
from switchable.errors import InputError


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
