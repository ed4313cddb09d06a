"""Text -> token ids: a byte-level BPE trained on the spot, or any tokenizer given as a folder.

Used by `tokens.py`. The BPE is GPT-2's recipe (Radford et al. 2019; Sennrich et al. 2016): 256 byte symbols,
one special token, then the most frequent pair of symbols is merged until the vocabulary is full. Any UTF-8
text comes back unchanged, and the same documents give the same vocabulary for any number of threads.

Text is text: where a document spells out a special token such as `<|endoftext|>`, its characters are encoded,
never the special token's id, so that the only ends of text in a token file are those that we put there.
Everything is read from and saved to a folder in Hugging Face form; no network, no code from the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from switchable.errors import InputError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # 256 bytes and the end of text
PIECE_CHARS = 200_000  # longer texts are encoded in pieces, so that memory stays bounded
BATCH_CHARS = 2_000_000  # of text encoded at once
TOKENIZER_FILES = (  # what a folder may hold of a tokenizer; a checkpoint folder holds much else
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
)


class EndOfText(NamedTuple):
    """The token that follows every document: its text, its id, and which special token it is."""

    token: str
    id: int
    kind: str


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on `texts`; the only special token is `<|endoftext|>`, with id 0.

    Args:
        texts: documents to train on; they are held in memory by the trainer as word counts.
        vocab_size: tokens in the vocabulary, the special one included; a small corpus may give fewer.

    Raises:
        InputError: `vocab_size` has no room for all bytes and the special token.
    """
    check_vocab_size(vocab_size)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast  # takes seconds to import, and only some verbs need it

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def check_vocab_size(vocab_size: int) -> None:
    """Raise InputError if a byte-level BPE of this vocabulary (tokens) has no room for all bytes."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"vocab_size={vocab_size} is too small for a byte-level BPE: 256 bytes and the end of text need "
            f"{MIN_VOCAB_SIZE}; use more (default 4096)"
        )


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, offline and without running code from it.

    The folder is in Hugging Face form (as `save_pretrained` writes it), or holds GPT-2's two files.

    Raises:
        InputError: no such folder, no tokenizer in it, or one that cannot be read.
    """
    path = Path(folder).expanduser()
    present = {file.name for file in tokenizer_files(path)}
    from transformers import AutoTokenizer, GPT2Tokenizer

    if present & {"tokenizer.json", "tokenizer_config.json"}:
        loader = AutoTokenizer
    elif {"vocab.json", "merges.txt"} <= present:
        loader = GPT2Tokenizer
    else:
        raise InputError(
            f"no tokenizer in the folder {str(path)!r}; give one with tokenizer.json (from save_pretrained) "
            "or with GPT-2's vocab.json and merges.txt"
        )
    try:
        return loader.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
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


def tokenizer_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the files that define a folder's tokenizer, sorted; InputError if there is no such folder."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        known = (
            [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        )
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


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many rows an embedding needs: the largest token id plus one, and no less than all tokens."""
    ids: Iterable[int] = tokenizer.get_vocab().values()
    return max(len(tokenizer), 1 + max(ids))


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], dtype: npt.DTypeLike = np.int64
) -> list[npt.NDArray[np.integer]]:
    """Return the token ids of each text, without any special token and without truncation or padding."""
    encoded: list[list[npt.NDArray[np.integer]]] = [[] for _ in texts]
    owners: list[int] = []
    pieces: list[str] = []

    def flush() -> None:
        for owner, ids in zip(owners, _encode(tokenizer, pieces), strict=True):
            encoded[owner].append(np.array(ids, dtype))
        owners.clear()
        pieces.clear()

    waiting = 0
    for owner, text in enumerate(texts):
        for piece in _pieces(text):
            owners.append(owner)
            pieces.append(piece)
            waiting += len(piece)
            if waiting >= BATCH_CHARS:
                flush()
                waiting = 0
    flush()
    return [np.concatenate(parts) for parts in encoded]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python
        yield from tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        return
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # spelled-out special tokens are text
    yield from (row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False))


def _pieces(text: str) -> Iterator[str]:
    """Cut a very long text after a line break, or else before a space: tokens hardly ever reach across."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        limit = start + PIECE_CHARS
        line = text.rfind("\n", max(start, limit - 9_000), limit)
        word = text.rfind(" ", max(start, limit - 500), limit)
        cut = line + 1 if line >= 0 else word if word > start else limit
        yield text[start:cut]
        start = cut
    yield text[start:]
