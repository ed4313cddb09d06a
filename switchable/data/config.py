"""What text is read, how it becomes tokens, and what is predicted of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from switchable.data import tokenizers
from switchable.errors import InputError


@dataclass(frozen=True)
class DataConfig:
    """What text is read, how it is split and with which tokens: everything that decides the token files."""

    data: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "files, folders or Hugging Face datasets (owner/name[:config[:split]]); "
            "none: the Python installation's own source files"
        },
    )
    text_field: str = field(
        default="text", metadata={"help": "field of a JSONL record, or Parquet column, that holds the text"}
    )
    document_separator: str | None = field(
        default=None,
        metadata={
            "help": r"text between the documents of a text file, as '\n\n'; none: a file is a document"
        },
    )
    val_fraction: float = field(
        default=0.05, metadata={"help": "share of the documents kept for validation (fraction, 0 to 1)"}
    )
    max_text_mb: float | None = field(
        default=None, metadata={"help": "stop reading after this much text (MB of UTF-8); none: read it all"}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "folder of a tokenizer (Hugging Face form, or the files of GPT-2, BERT or T5); none: train a BPE"
        },
    )
    vocab_size: int = field(
        default=4096, metadata={"help": "vocabulary of the BPE trained here (tokens, special ones included)"}
    )

    def __post_init__(self) -> None:
        given: object = self.data
        if isinstance(given, str):
            raise InputError(f"data={given!r} is one string; give a list of paths: [{given!r}]")
        object.__setattr__(self, "data", tuple(self.data))
        if not 0 < self.val_fraction < 1:
            raise InputError(f"val_fraction={self.val_fraction} is not between 0 and 1; use 0.05, say")
        if self.max_text_mb is not None:
            object.__setattr__(self, "max_text_mb", float(self.max_text_mb))
            if not self.max_text_mb > 0:
                raise InputError(
                    f"max_text_mb={self.max_text_mb} is not above 0; leave it out to read it all"
                )
        if self.tokenizer is None:
            tokenizers.check_vocab_size(self.vocab_size)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model learns to predict."""

    objective: str | None = field(
        default=None,
        metadata={
            "help": "causal: the next token (GPT); masked: hidden tokens (BERT); span: spans cut out (T5); "
            "default: that of the model's family",
            "choices": ("causal", "masked", "span"),
        },
    )
    mask_fraction: float = field(
        default=0.15, metadata={"help": "share of the tokens that is masked, or cut out in spans (0 to 1)"}
    )
    whole_words: bool = field(
        default=False, metadata={"help": "masked: mask all tokens of a word or none of them"}
    )
    mean_span_length: float = field(
        default=3.0, metadata={"help": "span: mean length of the spans cut out (tokens)"}
    )

    def __post_init__(self) -> None:
        if not 0 < self.mask_fraction < 1:
            raise InputError(f"mask_fraction={self.mask_fraction} is not between 0 and 1; use 0.15, say")
        if not self.mean_span_length >= 1:
            raise InputError(f"mean_span_length={self.mean_span_length} is below 1 token; use 3, say")
