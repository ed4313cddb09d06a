"""How the next token is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from switchable.options import check, option

LEAST_TEMPERATURE = 1e-4
"""Below it logits divided by it may overflow, and the most probable token is all that is ever drawn."""


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

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < LEAST_TEMPERATURE

    def draw(self, logits_NV: Tensor) -> Tensor:
        """Return a token for each of N rows of logits."""
        if self.greedy:
            return logits_NV.argmax(-1)
        if self.top_k:
            least_N1 = logits_NV.topk(min(self.top_k, logits_NV.shape[1])).values[:, -1:]
            logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -torch.inf)
        return torch.multinomial((logits_NV / self.temperature).softmax(-1), 1)[:, 0]

    def generate(
        self,
        model: Any,
        input_ids_BS: Tensor,
        most: int,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Return the tokens that transformers' `generate` writes, `most` new ones at most, with its KV cache."""
        choice: dict[str, Any] = {"do_sample": False}
        if not self.greedy:
            choice = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k}
        written = model.generate(
            input_ids=input_ids_BS,
            attention_mask=torch.ones_like(input_ids_BS) if attention_mask is None else attention_mask,
            max_new_tokens=most,
            use_cache=True,
            **choice,
            **options,
        )
        return cast(Tensor, written)
