"""Documents -> two flat token files and their `meta.json`: `prepare(config, cache_dir)`.

Two streaming passes over the corpus, in bounded memory:

1. scan: hash every document, find the split's threshold, keep a sample for the tokenizer (`split.py`);
2. tokenize: write each document's tokens and one end of text to `train.bin` or `val.bin`.

The result lies in `cache_dir/<fingerprint>/`. It is made under a temporary name and renamed when whole, all under a
lock: a folder of that name is complete, however many processes started at once or died on the way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from switchable.data import sources, tokenizers
from switchable.data.config import DataConfig
from switchable.data.encoding import encode
from switchable.data.split import Scan, hashed_documents, scan_corpus
from switchable.errors import InputError
from switchable.files import check_name, is_no_space, read_json, whole_folder, write_json
from switchable.progress import progress_bar, say

FORMAT = 2  # of the folder's contents; raise it and older folders are not used any more


@dataclass(frozen=True)
class Split:
    """One side of the corpus: how much text there is, and the file that holds its tokens."""

    path: Path
    documents: int
    text_bytes: int  # UTF-8 bytes of the documents, ends of text not counted
    tokens: int  # tokens in the file, one end of text per document included
    sha256: str  # of the token file


@dataclass(frozen=True)
class PreparedData:
    """A corpus as tokens on disk; everything here is read from the folder's `meta.json`."""

    folder: Path
    fingerprint: str  # of every setting, and of the source files' names, sizes and times
    train: Split
    val: Split
    vocab_size: int  # rows that an embedding needs; may be less than asked for when the corpus is small
    dtype: str  # of the token files: `uint16` or `uint32`
    tokenizer_path: Path  # for `AutoTokenizer.from_pretrained`
    end_of_text: tokenizers.EndOfText
    read: str  # what was read, and what was skipped

    def __str__(self) -> str:
        """Return what was read, skipped, and set aside for validation."""
        train, val = (
            f"{side.tokens:,} tokens in {side.documents:,} document{'s' * (side.documents > 1)}"
            for side in (self.train, self.val)
        )
        megabytes = (self.train.text_bytes + self.val.text_bytes) / 1e6
        return f"read {self.read}; {megabytes:,.1f} MB of text: {train} to train on; {val} set aside for validation"


def prepare(
    config: DataConfig, cache_dir: str | os.PathLike[str], *, objective: str = "causal", progress: bool = True,
    known: str | None = None,
) -> PreparedData:  # fmt: skip
    """Make the token files of `config` under `cache_dir`, unless they are there; return where they are.

    Any number of processes may call this at once: one works, the others wait and use its result.

    Args:
        config: the corpus, its split and its tokenizer.
        cache_dir: folder for the results of all configurations, created if missing.
        objective: what the tokens are for; decides the special tokens of a tokenizer trained here.
        progress: say how far the work is, and what was read.
        known: checksum of the training tokens; where they lie in the cache, the text itself need not be there any more.

    Raises:
        InputError: unusable source or tokenizer; fewer than two different documents; a folder that cannot be
            written in, or no space left there (what was written is removed); damaged files in the cache.
    """
    check_name(Path(cache_dir))
    try:
        folder = Path(cache_dir) / _fingerprint(config, objective)
    except InputError as missing:
        found = None if known is None else find_prepared(cache_dir, known)
        if found is None:
            raise
        say(f"{missing}; going on with the tokens in {found.folder}", progress)
        return found
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder, progress):
                if not folder.exists():
                    _make(config, folder, objective, progress)
        except OSError as error:
            raise InputError(f"cannot write in {folder.parent} ({error}); give another folder") from error
    data = load_prepared(folder)
    say(str(data), progress)
    return data


def find_prepared(cache_dir: str | os.PathLike[str], sha256: str) -> PreparedData | None:
    """Return the folder of the cache whose training tokens have a checksum, if it is there and whole."""
    for meta in sorted(Path(cache_dir).glob("[!.]*/meta.json")):
        with suppress(InputError):
            data = load_prepared(meta.parent)
            if data.train.sha256 == sha256:
                return data
    return None


def load_prepared(folder: str | os.PathLike[str]) -> PreparedData:
    """Read the folder of a finished `prepare`; InputError naming the file if one is missing or damaged."""
    path = Path(folder)
    remedy = f"delete the folder {str(path)!r} and start again"
    try:
        meta = read_json(path / "meta.json")
        train, val = (Split(path / f"{side}.bin", **meta["splits"][side]) for side in ("train", "val"))
        end = tokenizers.EndOfText(**meta["end_of_text"])
        data = PreparedData(
            path, meta["fingerprint"], train, val, meta["vocab_size"], meta["dtype"], path / "tokenizer", end,
            meta.get("read", "by an earlier version"),
        )  # fmt: skip
        item_bytes = np.dtype(data.dtype).itemsize
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / 'meta.json'}: missing or damaged ({error}); {remedy}") from error
    for split in (train, val):
        size = split.path.stat().st_size if split.path.exists() else 0
        if size != split.tokens * item_bytes:
            raise InputError(
                f"{split.path}: damaged, {size:,} bytes instead of {split.tokens * item_bytes:,}; {remedy}"
            )
    return data


# --- once per corpus: lock, make, rename ---


def _fingerprint(config: DataConfig, objective: str) -> str:
    """16 hex digits that change with every setting and with the name, size or time of a file that is read."""
    files = [] if config.tokenizer is None else tokenizers.tokenizer_files(config.tokenizer)
    known: dict[str, Any] = {
        "format": FORMAT,
        "settings": dataclasses.asdict(config)
        | {"tokenizer": [sources.file_signature(file) for file in files]},
        "sources": sources.signature(sources.resolve(config.data).items),
    }
    if config.tokenizer is None and objective != "causal":
        known["objective"] = objective
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def _locked(folder: Path, progress: bool) -> AbstractContextManager[Any]:
    """The lock of a result, taken; released when the `with` block or the process ends, however it ends."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process to prepare {folder}", progress)
        return lock.acquire()


def _make(config: DataConfig, folder: Path, objective: str, progress: bool) -> None:
    with whole_folder(folder) as partial:
        try:
            _build(config, partial, folder.name, objective, progress)
        except Exception as error:
            if not is_no_space(error):
                raise
            written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
            raise InputError(
                f"no space left on the device: {written / 1e6:.1f} MB were written in {folder.parent} and "
                "removed again; free some space, give another folder, or read less (--max-text-mb)"
            ) from error


def _build(config: DataConfig, folder: Path, fingerprint: str, objective: str, progress: bool) -> None:
    scan = scan_corpus(config, progress)
    if config.tokenizer is None:
        say(f"training a byte-level BPE of {config.vocab_size:,} tokens", progress)
        sample = (text for h, _, text in sorted(scan.sample) if h >= scan.threshold)
        trained = tokenizers.train_bpe(sample, config.vocab_size, objective)
        tokenizers.save_tokenizer(trained, folder / "tokenizer")
    else:
        tokenizers.save_tokenizer(tokenizers.load_tokenizer(config.tokenizer), folder / "tokenizer")
    scan.sample.clear()
    tokenizer = tokenizers.load_tokenizer(folder / "tokenizer")  # the one that others will load
    end = tokenizers.end_of_text(tokenizer)
    vocab_size = tokenizers.vocabulary_size(tokenizer)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    files = (folder / f"{side}.bin" for side in ("train", "val"))
    with ExitStack() as open_files, progress_bar("tokenizing", "B", scan.text_bytes, progress) as bar:
        train, val = (_SplitWriter(open_files.enter_context(path.open("wb"))) for path in files)
        _tokenize(config, scan, tokenizer, np.array([end.id], dtype), (train, val), bar)
    where = ", ".join(map(repr, config.data)) or "the Python installation's own source files (no --data)"
    cap = "" if config.max_text_mb is None else f", up to {config.max_text_mb:g} MB"
    meta = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "settings": dataclasses.asdict(config),
        "read": f"{where}{cap}: {sources.resolve(config.data)}",
        "splits": {"train": train.summary(), "val": val.summary()},
        "vocab_size": vocab_size,
        "dtype": dtype,
        "end_of_text": end._asdict(),
    }
    write_json(folder / "meta.json", meta)


# --- second pass: tokens ---


class _SplitWriter:
    """Writes one token file and counts what goes in."""

    def __init__(self, file: IO[bytes]) -> None:
        self.documents = self.text_bytes = self.tokens = 0
        self._file, self._digest = file, hashlib.sha256()

    def write(self, text_bytes: int, ids: npt.NDArray[np.integer[Any]]) -> None:
        data = ids.tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.documents += 1
        self.text_bytes += text_bytes
        self.tokens += len(ids)

    def summary(self) -> dict[str, Any]:
        counts = {"documents": self.documents, "text_bytes": self.text_bytes, "tokens": self.tokens}
        return counts | {"sha256": self._digest.hexdigest()}


def _tokenize(
    config: DataConfig, scan: Scan, tokenizer: Any, end_1: npt.NDArray[Any], sides: tuple[_SplitWriter, _SplitWriter],
    bar: Any,
) -> None:  # fmt: skip
    """Write every document, and the end of text after it, to its side; `sides` are (train, val)."""
    train, val = sides
    ahead, documents = itertools.tee(hashed_documents(config))
    encoded = encode(tokenizer, (text for text, _, _ in ahead), end_1.dtype)
    for (_, h, size), ids in zip(documents, encoded, strict=True):
        (val if h < scan.threshold else train).write(size, np.append(ids, end_1))
        bar.update(size)
    counts = train.documents + val.documents, train.text_bytes + val.text_bytes
    if counts != (scan.documents, scan.text_bytes):
        raise InputError("the text changed while it was read; start again when nothing writes to it any more")
