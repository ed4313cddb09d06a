"""Errors meant for the user of the library or of the command line.

The rule of this code base: an error that a user can cause says *what was given*, *what is allowed* and *what to
do*. Such errors are `InputError`s; the command line prints them in a line or two and leaves with exit code 2.
Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class InputError(ValueError):
    """A wrong input: the message says what was given, what is allowed and what to do."""


def shown(value: object) -> str:
    """Return a value as a message shows it: a very long one is cut short."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"(a number of {value.bit_length()} bits)"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def divisors_near(n: int, wanted: int, count: int = 6) -> list[int]:
    """Return up to `count` divisors of `n` closest to `wanted`, ascending: the values to suggest to a user."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted(sorted({*small, *(n // d for d in small)}, key=lambda d: (abs(d - wanted), d))[:count])
