"""Text from tokens as they come: shown piece by piece, and ended before a stop string.

    tokens  ->  whole characters  ->  what cannot be the beginning of a stop string  ->  shown

A token may be half a character, and the text of a token may depend on the one before it. So the last tokens are decoded
together with those before, and what is new is passed on once its characters are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

HALF = "\ufffd"
"""What a tokenizer writes for a part of a character."""


class GrowingText:
    """The text of one sequence.

    Args:
        tokenizer: what its tokens belong to.
        prompt: its first tokens, in which no stop string is looked for.
        stop: strings at which it ends; they are not part of it.
        ends: tokens at which it ends.
        show: gets each piece of text as soon as it is certain.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        ends: Sequence[int] = (),
        show: Callable[[str], object] = lambda _: None,
    ):
        self.tokenizer, self.stop, self.ends, self.show = tokenizer, stop, frozenset(ends), show
        self.ids, self.prompt = list(prompt), len(prompt)
        self.text = self._decode(0)
        self.seen, self.before = len(self.ids), 0
        """Tokens whose text is in `text`; those from `before` on are decoded with the next ones."""
        self.shown, self.first = 0, len(self.text)
        self.done = False
        self._show(len(self.text))

    @property
    def new_tokens(self) -> int:
        """How many there are behind the prompt."""
        return len(self.ids) - self.prompt

    def put(self, token: int) -> bool:
        """Take the next token, and return whether the text has ended."""
        if not self.done:
            self.ids.append(token)
            self._grow(last=token in self.ends)
            self.done = self.done or token in self.ends
        return self.done

    def close(self) -> str:
        """Show what was held back, and return the text."""
        self._grow(last=True)
        self._show(len(self.text))
        return self.text

    def _grow(self, last: bool) -> None:
        old = self._decode(self.before, self.seen)
        new = self._decode(self.before)
        if len(new) <= len(old) or (new.endswith(HALF) and not last):
            return
        self.text += new[len(old) :]
        self.before, self.seen = self.seen, len(self.ids)
        found = [place for place in (self.text.find(each, self.first) for each in self.stop) if place >= 0]
        if found:
            self.text, self.done = self.text[: min(found)], True
        self._show(len(self.text) if self.done else len(self.text) - self._held())

    def _held(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        own = self.text[self.first :]
        sizes = (size for each in self.stop for size in range(1, len(each)) if own.endswith(each[:size]))
        return max(sizes, default=0)

    def _show(self, end: int) -> None:
        if end > self.shown:
            self.show(self.text[self.shown : end])
            self.shown = end

    def _decode(self, first: int, after: int | None = None) -> str:
        return str(self.tokenizer.decode(self.ids[first:after], skip_special_tokens=True))


def padded(texts: Sequence[GrowingText], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Return the tokens of texts [B, S], the shorter ones behind padding, and how much each has of it [B]."""
    longest = max(len(text.ids) for text in texts)
    pads = [longest - len(text.ids) for text in texts]
    ids_BS = torch.tensor([[pad] * more + text.ids for more, text in zip(pads, texts, strict=True)])
    return ids_BS, torch.tensor(pads)


class EndOfTexts(StoppingCriteria):  # type: ignore[misc]
    """Tells transformers' `generate` which texts have ended, and shows them."""

    def __init__(self, texts: Sequence[GrowingText]):
        self.texts = texts

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002 - transformers' interface
        """Return whether each sequence has ended, after its last token."""
        ended = [text.put(token) for text, token in zip(self.texts, input_ids[:, -1].tolist(), strict=True)]
        return torch.tensor(ended, device=input_ids.device)
