"""How the next token is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from switchable.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    max_new_tokens: int = 100
    """Tokens to write at most."""
    temperature: float = 0.8
    """0 = always the most probable token."""
    top_k: int = 50
    """Draw among so many most probable tokens; 0 = all."""
    seed: int = 0
    """Random seed of the draw."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(
                f"max_new_tokens={self.max_new_tokens} is out of range; use a whole number of at least 1"
            )
        if not self.temperature >= 0:
            raise InputError(
                f"temperature={self.temperature} is out of range; use 0 (most probable token) or more"
            )
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k} is out of range; use 0 (all tokens) or more")

    def draw(self, logits_NV: Tensor) -> Tensor:
        """Return a token for each of N rows of logits."""
        if self.temperature == 0:
            return logits_NV.argmax(-1)
        if self.top_k:
            least_N1 = logits_NV.topk(min(self.top_k, logits_NV.shape[1])).values[:, -1:]
            logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -torch.inf)
        return torch.multinomial((logits_NV / self.temperature).softmax(-1), 1)[:, 0]

    def generate(self, model: Any, input_ids_1S: Tensor, most: int, **options: Any) -> Tensor:
        """Return the tokens that transformers' `generate` writes, `most` new ones at most, with its KV cache."""
        choice: dict[str, Any] = {"do_sample": False}
        if self.temperature != 0:
            choice = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k}
        written = model.generate(
            input_ids=input_ids_1S,
            attention_mask=torch.ones_like(input_ids_1S),
            max_new_tokens=most,
            use_cache=True,
            **choice,
            **options,
        )
        return cast(Tensor, written[0])
