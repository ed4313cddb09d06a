"""What text is read, how it becomes tokens, and what is predicted of it."""

from __future__ import annotations

from dataclasses import dataclass

from switchable.data import tokenizers
from switchable.errors import InputError
from switchable.options import check, option


@dataclass(frozen=True)
class DataConfig:
    """What text is read, how it is split and with which tokens: everything that decides the token files."""

    data: tuple[str, ...] = option(
        (),
        "files, folders or Hugging Face datasets (owner/name[:config[:split]]); none: the Python installation's own "
        "source files",
        metavar="PATH",
    )
    text_field: str = option("text", "field of a JSON record, or Parquet column, that holds the text")
    document_separator: str | None = option(
        None,
        r"text between the documents of a text file, as '\n\n'; none: a file is a document",
        metavar="TEXT",
    )
    val_fraction: float = option(
        0.05, "share of the documents kept for validation", above=0, below=1, usual="0.05", metavar="SHARE"
    )
    max_text_mb: float | None = option(
        None, "stop reading after this much text (MB of UTF-8); none: read it all", above=0, metavar="MB"
    )
    tokenizer: str | None = option(
        None,
        "folder of a tokenizer (Hugging Face form, or the files of GPT-2, BERT or T5); none: train a BPE",
        metavar="DIR",
    )
    vocab_size: int = option(4096, "tokens of the BPE trained here, special ones too", least=1, most=10**6)

    def __post_init__(self) -> None:
        given: object = self.data
        if not isinstance(given, list | tuple) or not all(isinstance(path, str) for path in given):
            raise InputError(f"data={given!r} must be a list of paths, e.g. ['my-texts']")
        object.__setattr__(self, "data", tuple(self.data))
        check(self)
        if self.tokenizer is None:
            tokenizers.check_vocab_size(self.vocab_size)

    @property
    def sources(self) -> tuple[str, ...]:
        """All that is read, by name."""
        return self.data if self.tokenizer is None else (*self.data, self.tokenizer)


@dataclass(frozen=True)
class ObjectiveConfig:
    """Details of what the model learns to predict; what it is follows from its family."""

    mask_fraction: float = option(
        0.15,
        "share of the tokens that is masked, or cut out in spans",
        above=0,
        below=1,
        usual="0.15",
        flag=False,
    )
    whole_words: bool = option(False, "masked: mask all tokens of a word or none of them", flag=False)
    mean_span_length: float = option(
        3.0, "span: mean length of the spans cut out (tokens)", least=1, most=1000, flag=False
    )

    def __post_init__(self) -> None:
        check(self)
