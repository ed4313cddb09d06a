"""How the next token is drawn."""

from __future__ import annotations

from dataclasses import dataclass

from switchable.options import check, option


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Raises:
        InputError: a value is out of range.
    """

    max_new_tokens: int = option(100, "tokens to write at most", least=1)
    temperature: float = option(0.8, "0 = always the most probable token", least=0)
    top_k: int = option(50, "draw among so many most probable tokens; 0 = all", least=0)
    seed: int = option(0, "random seed of the draw", least=0, most=2**63 - 1)

    def __post_init__(self) -> None:
        check(self)
