"""Objectives and their tokenizers: special tokens, words and sentinels that they need, trained here or others'."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from support import shared

from switchable.data import tokenizers
from switchable.data.config import DataConfig, ObjectiveConfig
from switchable.data.objectives import SpanCorruption, build_objective
from switchable.data.objectives.words import word_parts
from switchable.data.tokens import prepare
from switchable.errors import InputError

TEXT = ["the cat sat on the mat and saw one red dog run over the hill " * 20, "don't stop, unbelievable!"]


def test_words_of_a_vocabulary() -> None:
    bpe = tokenizers.train_bpe(TEXT, 400, "masked")
    ids = np.array([bpe("the mat, don't\nunbelievable 12x", add_special_tokens=False)["input_ids"]])
    starts = word_parts(bpe).starts(ids)[0]
    pieces = [
        bpe.decode(ids[0][a:b].tolist())
        for a, b in zip(np.flatnonzero(starts), [*np.flatnonzero(starts)[1:], None], strict=True)
    ]
    assert "".join(pieces) == "the mat, don't\nunbelievable 12x"
    assert [p.strip() for p in pieces if p.strip()] == ["the", "mat", ",", "don", "'t", "unbelievable", "12x"]


def test_tokenizers_trained_here_have_what_the_objective_wants() -> None:
    bert = tokenizers.train_bpe(TEXT, 320, "masked")
    assert (bert.pad_token_id, bert.cls_token_id, bert.sep_token_id, bert.mask_token_id) == (0, 1, 2, 3)
    assert bert("cat", "dog")["input_ids"].count(2) == 2
    assert tokenizers.end_of_text(bert).id == 2
    assert build_objective("masked", ObjectiveConfig(), bert, 32).window == 30
    t5 = tokenizers.train_bpe(TEXT, 400, "span")
    assert (t5.pad_token_id, t5.eos_token_id) == (0, 1)
    assert t5("cat <extra_id_0>")["input_ids"][-2:] == [t5.convert_tokens_to_ids("<extra_id_0>"), 1]
    built = build_objective("span", ObjectiveConfig(), t5, 128)
    assert isinstance(built, SpanCorruption)
    assert built.sentinels.tolist() == [2 + i for i in range(built.lengths.spans)]
    with pytest.raises(InputError, match=r"256 bytes and 102 special token\(s\) need 358"):
        tokenizers.train_bpe(TEXT, 357, "span")


def test_tokenizers_without_the_special_tokens_are_refused() -> None:
    gpt = tokenizers.train_bpe(TEXT, 300)
    with pytest.raises(InputError, match="no mask token, which objective=masked needs"):
        build_objective("masked", ObjectiveConfig(), gpt, 32)
    with pytest.raises(InputError, match=r"cuts 2 spans .* the tokenizer has no sentinels"):
        build_objective("span", ObjectiveConfig(), gpt, 32)
    t5 = tokenizers.train_bpe(TEXT, 400, "span")
    with pytest.raises(InputError, match="has 100 sentinels"):
        build_objective("span", ObjectiveConfig(), t5, 2048)
    with pytest.raises(InputError, match="too short"):
        build_objective("span", ObjectiveConfig(), t5, 2)
    with pytest.raises(InputError, match="no room for text"):
        build_objective("masked", ObjectiveConfig(), tokenizers.train_bpe(TEXT, 320, "masked"), 3)


def test_berts_vocabulary() -> None:
    bert = tokenizers.load_tokenizer(shared("tokenizer_bert_base_uncased"))
    assert (bert.mask_token_id, tokenizers.vocabulary_size(bert)) == (103, 30_522)
    assert bert("Hello world! UNBELIEVABLE")["input_ids"] == [101, 7592, 2088, 999, 23653, 102]
    ids = np.array([bert("unaffordable hills, don't", add_special_tokens=False)["input_ids"]])
    words = bert.convert_ids_to_tokens(ids[0][~word_parts(bert).starts(ids)[0]].tolist())
    assert words
    assert all(word.startswith("##") for word in words)


def test_t5s_vocabulary() -> None:
    pytest.importorskip("sentencepiece")
    t5 = tokenizers.load_tokenizer(shared("tokenizer_t5"))
    assert tokenizers.vocabulary_size(t5) == 32_100
    assert t5("Hello world! <extra_id_0>")["input_ids"] == [8774, 296, 55, 32_099, 1]
    built = build_objective("span", ObjectiveConfig(), t5, 512)
    assert isinstance(built, SpanCorruption)
    assert built.sentinels[:3].tolist() == [32_099, 32_098, 32_097]


def test_vocabulary_with_capitals_is_not_lower_cased(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nCat\ncat\n")
    assert tokenizers.load_tokenizer(tmp_path)("Cat cat")["input_ids"] == [2, 5, 6, 3]
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ncat\n")
    assert tokenizers.load_tokenizer(tmp_path)("Cat cat")["input_ids"] == [2, 5, 5, 3]


def test_t5s_vocabulary_without_sentencepiece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'switchable\[sentencepiece\]'"):
        tokenizers.load_tokenizer(tmp_path)


def test_tokens_are_prepared_once_per_set_of_special_tokens(corpus: Path, tmp_path: Path) -> None:
    config = DataConfig((str(corpus),), vocab_size=400)
    folders = {name: prepare(config, tmp_path, objective=name) for name in ("causal", "masked", "span")}
    assert len({data.folder for data in folders.values()}) == 3
    assert prepare(config, tmp_path).folder == folders["causal"].folder
    assert [data.end_of_text.token for data in folders.values()] == ["<|endoftext|>", "</s>", "</s>"]
    given = DataConfig((str(corpus),), tokenizer=str(folders["masked"].tokenizer_path))
    assert prepare(given, tmp_path, objective="masked").folder == prepare(given, tmp_path).folder


def test_a_tokenizer_too_large_for_the_model() -> None:
    with pytest.raises(InputError, match=r"the tokenizer of here has 300 tokens, but .* only 299"):
        tokenizers.check_fits(tokenizers.train_bpe(TEXT, 300), 299, "here")
