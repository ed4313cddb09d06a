"""The settings of `switchable study`."""

from __future__ import annotations

from dataclasses import dataclass

from switchable.options import Precision, option


@dataclass(frozen=True)
class StudyConfig(Precision):
    """What a user may choose."""

    text: tuple[str, ...] | None = option(None, "text to measure on; empty: Python's own files", flag=False)
    tokenizer: str | None = option(None, "folder of the models' tokenizer, if not with them", metavar="DIR")
    probe_tokens: int | None = option(None, "tokens to measure on; none: the run's probe, or 2048", least=1)
    sequence_length: int = option(256, "tokens per sequence, at most the model's positions", least=2)
    num_experts: int | None = option(None, "experts if a model has none; none: near 32", least=1, metavar="E")
    experts_per_token: int | None = option(
        None, "experts per token; none: the run's, or 3/16 of them", least=1, metavar="K"
    )
    device: str | None = option(None, "torch device; none: cuda if there is one, else cpu")
