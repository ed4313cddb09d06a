"""The tokenizer trained here, those given, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from support import shared
from texts import config_for, documents_in, save_word_tokenizer, write_jsonl
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer

from switchable.data import encoding, tokenizers
from switchable.data.batches import token_array
from switchable.data.tokens import prepare
from switchable.errors import InputError


def strange_texts() -> list[str]:
    rng = random.Random(0)
    anything = [chr(c) for c in range(0x11000) if not 0xD800 <= c < 0xE000]
    texts = ["".join(rng.choices(anything, k=300)) for _ in range(40)]
    return [
        *texts,
        "a <|endoftext|> b<|endoftext|>",
        " leading,  double , trailing  ",
        "tabs\t\r\n\r\n\n don't n't . ! ? ' s\x00\x7f\u200b\ufeff",
        "👩‍👩‍👧 \U0010ffff é e\u0301 ﬁ Ａ",
    ]


def test_bpe_round_trip_of_any_text(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepare(config_for(source), tmp_path / "cache")
    tokenizer = tokenizers.load_tokenizer(data.tokenizer_path)
    texts = strange_texts()
    for piece in (encoding.PIECE_CHARS, 7):  # 7: documents cut in pieces, several batches
        monkeypatch.setattr(encoding, "PIECE_CHARS", piece)
        monkeypatch.setattr(encoding, "BATCH_CHARS", 10 * piece)
        for text, ids in zip(texts, encoding.encode(tokenizer, texts), strict=True):
            assert tokenizer.decode(ids.tolist()) == text
            assert data.end_of_text.id not in ids  # spelled out in a document, it is text


def test_a_tokenizer_written_in_python_encodes_batches_that_end_with_the_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARS", 3)
    for texts in (["abc"], ["ab", "c", "", "def"], [""], []):
        found = encoding.encode(ByT5Tokenizer(), texts)
        assert [ids.tolist() for ids in found] == [[byte + 3 for byte in text.encode()] for text in texts]


def test_pieces_prefer_line_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE_CHARS", 10)
    assert list(encoding._pieces("ab cd\nef gh ij")) == ["ab cd\n", "ef gh ij"]
    assert list(encoding._pieces("abcd efghijklm")) == ["abcd", " efghijklm"]
    assert list(encoding._pieces(" bcdefghijklm")) == [" bcdefghij", "klm"]
    assert list(encoding._pieces("abcdefghijklmn")) == ["abcdefghij", "klmn"]
    assert list(encoding._pieces("")) == [""]


def test_vocabulary_of_a_small_corpus(tmp_path: Path) -> None:
    data = prepare(
        config_for(write_jsonl(tmp_path / "s.jsonl", ["aa", "bb"]), vocab_size=5000), tmp_path / "c"
    )
    assert 257 <= data.vocab_size < 270


def test_gpt2_files() -> None:
    folder = shared("tokenizer_gpt2")
    tokenizer = tokenizers.load_tokenizer(folder)
    (ids,) = encoding.encode(tokenizer, ["Hello world"])
    assert ids.tolist() == [15496, 995]
    assert tokenizers.end_of_text(tokenizer) == ("<|endoftext|>", 50256, "eos")
    assert tokenizers.vocabulary_size(tokenizer) == 50257


def test_given_tokenizer_is_copied_beside_the_tokens(source: Path, tmp_path: Path) -> None:
    bpe = prepare(config_for(source), tmp_path / "cache").tokenizer_path
    data = prepare(config_for(source, tokenizer=str(bpe)), tmp_path / "cache")
    assert data.tokenizer_path != bpe
    assert documents_in(data, data.val) == documents_in(
        data, prepare(config_for(source), tmp_path / "cache").val
    )


def test_large_vocabulary_is_uint32_and_truncation_is_off(tmp_path: Path) -> None:
    folder = save_word_tokenizer(tmp_path / "words", 70_000, sep_token="</s>")
    source = write_jsonl(tmp_path / "s.jsonl", ["w69999 w3 w4 w65536 nonsense", "w5 <s> w6"])
    data = prepare(config_for(source, tokenizer=str(folder)), tmp_path / "cache")
    assert (data.dtype, data.vocab_size, data.end_of_text) == ("uint32", 70_000, ("</s>", 2, "sep"))
    both = sorted(token_array(data.train.path).tolist() + token_array(data.val.path).tolist())
    assert 69_999 in both
    assert 65_536 in both
    assert both.count(2) == 2
    assert data.train.tokens + data.val.tokens == 5 + 1 + 5 + 1  # "<s>" is split into "<", "s", ">" as text


def test_tokenizer_errors(source: Path, tmp_path: Path) -> None:
    (tmp_path / "my_tokenizer").mkdir()
    for folder, says in (
        (tmp_path / "my_tokeniser", r"no such tokenizer folder: .*did you mean 'my_tokenizer'"),
        (tmp_path / "my_tokenizer", r"no tokenizer in the folder .*vocab.json and merges.txt"),
        (
            save_word_tokenizer(tmp_path / "endless"),
            r"no token to end a document with \(no eos, sep or bos\)",
        ),
    ):
        with pytest.raises(InputError, match=says):
            prepare(config_for(source, tokenizer=str(folder)), tmp_path / "cache")
    broken = save_word_tokenizer(tmp_path / "broken", eos_token="</s>")
    whole = (broken / "tokenizer.json").read_text(encoding="utf-8")
    for text in (whole[:-200], "[]", ""):
        (broken / "tokenizer.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"broken' cannot be loaded .*save it again"):
            prepare(config_for(source, tokenizer=str(broken)), tmp_path / "cache")


def test_a_class_that_transformers_builds_by_its_own_rules(tmp_path: Path) -> None:
    trained = tokenizers.train_bpe(["12 123 1234 12345 hello"] * 5, 280)
    split = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")  # each digit a token
    trained.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trained.save_pretrained(str(tmp_path / "a"))
    settings = tmp_path / "a" / "tokenizer_config.json"
    own = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json")).encode("12345 hello").ids
    assert len(own) > 5
    for name in ("GPT2Tokenizer", "RobertaTokenizer", "TokenizersBackend"):
        settings.write_text(
            json.dumps({"tokenizer_class": name, "eos_token": "<|endoftext|>"}), encoding="utf-8"
        )
        if name == "GPT2Tokenizer":  # transformers itself gives other ids
            assert AutoTokenizer.from_pretrained(str(tmp_path / "a"))("12345 hello")["input_ids"] != own
        tokenizer = tokenizers.load_tokenizer(tmp_path / "a")
        assert [ids.tolist() for ids in encoding.encode(tokenizer, ["12345 hello"])] == [own]
        assert tokenizers.end_of_text(tokenizer).token == "<|endoftext|>"
        tokenizer.save_pretrained(str(tmp_path / "b"))  # as a run keeps it: transformers reads that alike
        assert AutoTokenizer.from_pretrained(str(tmp_path / "b"))("12345 hello")["input_ids"] == own


def test_a_class_that_cannot_give_the_ids_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizers.train_bpe(["one two"], 300).save_pretrained(str(tmp_path))
    monkeypatch.setattr(tokenizers, "_follows", lambda *_: False)
    with pytest.raises(InputError, match=r"so that it gives other tokens than its tokenizer\.json; set"):
        tokenizers.load_tokenizer(tmp_path)


def test_long_words_are_trained_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "WORD_CHARS", 4)
    for text, pieces in (
        ("ab abcdefghi", ["ab abcd", "efgh", "i"]),
        ("a      b", ["a    ", "  b"]),
        ("ab cde\n", ["ab cde\n"]),
        ("abcd", ["abcd", ""]),
    ):
        assert list(tokenizers._without_long_words(text)) == pieces


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "BertTokenizer", "TokenizersBackend"])
def test_a_tokenizer_without_its_vocabulary_is_refused(kind: str, tmp_path: Path) -> None:
    settings = {"tokenizer_class": kind, "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot be loaded .*save it again with save_pretrained"):
        tokenizers.load_tokenizer(tmp_path)


def test_a_tokenizer_without_copies_is_taken_where_texts_show_no_difference(tmp_path: Path) -> None:
    tokenizers.train_bpe(["hello there, hello again"] * 3, 280).save_pretrained(str(tmp_path))
    settings = tmp_path / "tokenizer_config.json"
    known = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps(known | {"tokenizer_class": "GPT2Tokenizer"}), encoding="utf-8")
    own = tokenizers.load_tokenizer(tmp_path)
    assert type(own).__name__ == "GPT2Tokenizer"
    assert (
        tokenizers.without_copies(own, tmp_path) is own
    )  # its class has a bos of which the file says nothing
    own.save_pretrained(str(tmp_path))
    slim = tokenizers.without_copies(own, tmp_path)
    assert type(slim).__name__ == "TokenizersBackend"
    text = "hello, there 12\n"
    assert slim(text)["input_ids"] == own(text)["input_ids"]
    own.add_special_tokens({"eos_token": "<|another|>"})
    assert tokenizers.without_copies(own, tmp_path) is own
