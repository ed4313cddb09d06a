"""Text -> token ids: a byte-level BPE trained on the spot, or any tokenizer given as a folder.

The BPE is GPT-2's recipe (Radford et al. 2019; Sennrich et al. 2016): 256 byte symbols, the special tokens of the
objective, then the most frequent pair of symbols is merged until the vocabulary is full. Any UTF-8 text comes back
unchanged, and the same documents give the same vocabulary for any number of threads.

Text is text: where a document spells out a special token such as `<|endoftext|>`, its characters are encoded, never the
special token's id. Folders are in Hugging Face form; no network, no code from them.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from switchable.data.encoding import encode
from switchable.errors import InputError, nearest
from switchable.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS: dict[str, dict[str, str]] = {
    "causal": {"eos_token": END_OF_TEXT},
    "masked": {
        "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "eos_token": "</s>", "mask_token": "<mask>",
    },
    "span": {"pad_token": "<pad>", "eos_token": "</s>"},
}  # fmt: skip
"""The special tokens of a tokenizer trained here, by the objective it is for; ids count from 0 in this order."""
SENTINELS = [f"<extra_id_{i}>" for i in range(100)]  # for `span`, behind the others; T5's number of them
TEMPLATES = {
    "masked": ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"),
    "span": ("$A </s>", "$A </s> $B </s>"),
}  # what a tokenizer trained here puts around one text and around two
SHOWS_RULES = (
    "Hello, WORLD! don't I'LL we've 12 345 1,234.56 2026-11-29  two   spaces\ttab\n\n  new line \r\n(snake_case)="
    "CamelCase naïve e\u0301 Straße ﬁ Ａ 日本語 हिन्दी \u00a0\u2028😀👩‍👩‍👧 https://a.b/c?d=e&f ----- $x^2$ x1y22z333 "
)
"""A text on which tokenizers with other rules (digits, contractions, case, accents, spaces) differ."""
WORD_CHARS = 250
"""Longer words are trained on in pieces: the trainer's time grows with the square of a word's length."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model",
)  # fmt: skip
"""What a folder may hold of a tokenizer; a checkpoint's holds much else."""


class EndOfText(NamedTuple):
    """The token that follows every document: its text, its id, and which special token it is."""

    token: str
    id: int
    kind: str


def train_bpe(texts: Iterable[str], vocab_size: int, objective: str = "causal") -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on `texts`, with the special tokens that an objective wants (`SPECIAL_TOKENS`).

    The trainer holds the texts in memory as word counts. `vocab_size` are tokens, special ones included; a small corpus
    may give fewer. Raises InputError if there is no room for all bytes and the special tokens.
    """
    check_vocab_size(vocab_size, objective)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast  # takes seconds to import, and only some verbs need it

    special = special_tokens(objective)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((piece for text in texts for piece in _without_long_words(text)), trainer)
    if objective in TEMPLATES:
        single, pair = TEMPLATES[objective]
        ids = list(zip(special, range(len(special)), strict=True))
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=SENTINELS if objective == "span" else None,
        **SPECIAL_TOKENS[objective],
    )


def _without_long_words(text: str) -> Iterator[str]:
    """Cut a text within its very long words and very long white space."""
    start = 0
    for run in re.finditer(rf"\S{{{WORD_CHARS}}}|\s{{{WORD_CHARS}}}", text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def special_tokens(objective: str) -> list[str]:
    """Return the special tokens of a tokenizer trained here for an objective, in the order of their ids."""
    return [*dict.fromkeys(SPECIAL_TOKENS[objective].values()), *(SENTINELS if objective == "span" else [])]


def check_vocab_size(vocab_size: int, objective: str = "causal") -> None:
    """Raise InputError if a byte-level BPE of this vocabulary (tokens) has no room for all bytes."""
    special = len(special_tokens(objective))
    if vocab_size < 256 + special:
        raise InputError(
            f"vocab_size={vocab_size} is too small for a byte-level BPE: 256 bytes and {special} special token(s) need "
            f"{256 + special}; use more (default 4096)"
        )


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, offline and without running code from it.

    The folder is in Hugging Face form (as `save_pretrained` writes it), or holds the files of GPT-2 (`vocab.json`,
    `merges.txt`), BERT (`vocab.txt`; lower-cased if no word in it has a capital) or T5 (`spiece.model`). Where there is
    a `tokenizer.json`, its ids count: some classes of transformers build parts of it anew, by their own rules.

    Raises:
        InputError: no such folder, no tokenizer in it, one that cannot be read, or a package for it is missing.
    """
    path = Path(folder).expanduser()
    present = {file.name for file in tokenizer_files(path)}
    import transformers  # each class is loaded where it is named

    options: dict[str, object] = {}
    if present & {"tokenizer.json", "tokenizer_config.json"}:
        loader = transformers.AutoTokenizer
    elif {"vocab.json", "merges.txt"} <= present:
        loader = transformers.GPT2Tokenizer
    elif "vocab.txt" in present:
        words = (path / "vocab.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        lower = all(word == word.lower() for word in words if not word.startswith("["))
        loader, options = transformers.BertTokenizer, {"do_lower_case": lower}
    elif "spiece.model" in present:
        if importlib.util.find_spec("sentencepiece") is None:
            raise InputError(
                f"reading {path / 'spiece.model'} needs the package sentencepiece: "
                "pip install 'switchable[sentencepiece]'"
            )
        loader = transformers.T5Tokenizer
    else:
        raise InputError(
            f"no tokenizer in the folder {str(path)!r}; give one with tokenizer.json (from save_pretrained), "
            "GPT-2's vocab.json and merges.txt, BERT's vocab.txt or T5's spiece.model"
        )
    try:
        options |= {"local_files_only": True, "trust_remote_code": False}
        for kind in (loader, transformers.PreTrainedTokenizerFast):
            tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(str(path), **options)
            if _follows(tokenizer, path / "tokenizer.json"):
                return tokenizer
    except Exception as error:
        # The Rust side raises a bare Exception for a broken file; the Python side, any of these.
        expected = (OSError, ValueError, KeyError, TypeError, ImportError)
        if type(error) is not Exception and not isinstance(error, expected):
            raise
        first_line = str(error).strip().partition("\n")[0]
        raise InputError(
            f"the tokenizer in {str(path)!r} cannot be loaded ({first_line}); "
            "save it again with save_pretrained"
        ) from error
    raise InputError(
        f"transformers reads the tokenizer in {str(path)!r} so that it gives other tokens than its tokenizer.json; "
        'set "tokenizer_class" in its tokenizer_config.json to one that fits'
    )


def _follows(tokenizer: PreTrainedTokenizerBase, file: Path) -> bool:
    """Whether a tokenizer gives the ids of its `tokenizer.json`, if there is one, on a text that shows the rules."""
    (ids,) = encode(tokenizer, [SHOWS_RULES])
    if not file.is_file():
        if len(set(ids.tolist())) < 2 and not set(TOKENIZER_FILES[4:]) & set(os.listdir(file.parent)):
            raise ValueError("its vocabulary is missing, e.g. tokenizer.json")
        return True
    from tokenizers import Tokenizer

    own = Tokenizer.from_buffer(file.read_bytes())
    own.no_truncation()
    own.no_padding()
    return bool(own.encode(SHOWS_RULES, add_special_tokens=False).ids == ids.tolist())


def without_copies(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """Return a folder's tokenizer without the copies of its vocabulary that some classes keep: of GPT-2's 24 MB.

    It is read from `tokenizer.json` alone, and taken if texts show no difference.
    """
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        return tokenizer
    other = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)

    def shown(own: PreTrainedTokenizerBase) -> list[Any]:
        each = [own(SHOWS_RULES, add_special_tokens=special)["input_ids"] for special in (False, True)]
        texts = [own.decode(ids, skip_special_tokens=skip) for ids in each for skip in (False, True)]
        return [each, texts, len(own), own.special_tokens_map, own.all_special_ids]

    return other if shown(other) == shown(tokenizer) else tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer under names that transformers 4 and tools made for it know; transformers 5 writes its own."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, config)


def tokenizer_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the files that define a folder's tokenizer, sorted; InputError if there is no such folder."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        known = [entry.name for entry in path.parent.glob("*") if entry.is_dir()]
        raise InputError(
            f"no such tokenizer folder: {str(folder)!r}{nearest(path.name, known)}; give a local folder "
            "(nothing is downloaded), or none to train a byte-level BPE"
        )
    return sorted(path / name for name in TOKENIZER_FILES if (path / name).is_file())


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> EndOfText:
    """Return the token to put after each document: the tokenizer's eos, or else its sep, or else its bos."""
    for kind in ("eos", "sep", "bos"):
        token, number = getattr(tokenizer, f"{kind}_token"), getattr(tokenizer, f"{kind}_token_id")
        if token is not None and number is not None:
            return EndOfText(str(token), int(number), kind)
    raise InputError(
        "the tokenizer has no token to end a document with (no eos, sep or bos); "
        'set one in its folder, e.g. "eos_token": "</s>" in tokenizer_config.json'
    )


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and behind a text by itself.

    Before it, a causal model was trained with them (Llama's and Gemma's bos); a prompt must not end in those behind it.
    """
    text, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    places = range(len(whole) - len(text) + 1)
    first = next((i for i in places if whole[i : i + len(text)] == text), 0)
    return list(whole[:first]), list(whole[first + len(text) :])


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many rows an embedding needs: the largest token id plus one, and no less than all tokens."""
    ids: Iterable[int] = tokenizer.get_vocab().values()
    return max(len(tokenizer), 1 + max(ids))


def check_fits(tokenizer: PreTrainedTokenizerBase, rows: int, where: object) -> None:
    """Raise InputError for a tokenizer with more tokens than a model's embedding has rows."""
    if vocabulary_size(tokenizer) > rows:
        raise InputError(
            f"the tokenizer of {where} has {vocabulary_size(tokenizer):,} tokens, but the model's vocabulary only "
            f"{rows:,}: they do not belong together; put the model's own tokenizer there"
        )
