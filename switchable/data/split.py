"""First pass over a corpus: which documents are for validation, and a sample for the tokenizer.

The split is by content: with h the first 64 bits of blake2b of a document's UTF-8 text, it is a validation
document when h < val_fraction · 2^64. Equal documents thus share a side, and adding documents moves none. The
tokenizer's sample is the documents with the largest h: training documents, spread evenly over the corpus.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from switchable.data import corpora
from switchable.data.config import DataConfig
from switchable.errors import InputError
from switchable.progress import progress_bar

SAMPLE_BYTES = 10_000_000  # of text that the BPE is trained on


@dataclass
class Scan:
    """What the first pass learns."""

    documents: int = 0
    text_bytes: int = 0
    threshold: int = 0  # documents whose hash is below are validation documents
    sample: list[tuple[int, int, str]] = field(default_factory=list)
    """(hash, bytes, text), a heap with the smallest hash on top: the documents with the largest hashes."""


def hashed_documents(config: DataConfig) -> Iterator[tuple[str, int, int]]:
    """Yield (document, its hash, its UTF-8 bytes), until there are `max_text_mb` of text."""
    left = float("inf") if config.max_text_mb is None else config.max_text_mb * 1e6
    for text in corpora.documents(config.data, config.text_field, config.document_separator):
        encoded = text.encode()
        yield text, int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big"), len(encoded)
        left -= len(encoded)
        if left <= 0:
            return


def scan_corpus(config: DataConfig, progress: bool) -> Scan:
    """Read the corpus once; InputError if there are no two different documents."""
    found = Scan()
    lowest, highest, sampled = 1 << 64, -1, 0
    limit = None if config.max_text_mb is None else config.max_text_mb * 1e6
    with progress_bar("reading text", "B", limit, progress) as bar:
        for text, h, size in hashed_documents(config):
            found.documents += 1
            found.text_bytes += size
            lowest, highest = min(lowest, h), max(highest, h)
            bar.update(size)
            if config.tokenizer is None and (sampled < SAMPLE_BYTES or h > found.sample[0][0]):
                heapq.heappush(found.sample, (h, size, text[:SAMPLE_BYTES]))
                sampled += size
                while sampled - found.sample[0][1] >= SAMPLE_BYTES:
                    sampled -= heapq.heappop(found.sample)[1]
    if lowest == highest:
        what = "a single document" if found.documents == 1 else f"{found.documents:,} documents, all the same"
        cap = "" if config.max_text_mb is None else f" in the first {config.max_text_mb} MB"
        raise InputError(
            f"one-document corpus: {what}{cap}, but training and validation need one each; give more text, "
            r"or cut it into documents, at blank lines for example: --document-separator '\n\n'"
        )
    # Neither side may be empty: the smallest hash is always validation, the largest always training.
    found.threshold = min(max(int(config.val_fraction * 2**64), lowest + 1), highest)
    return found
