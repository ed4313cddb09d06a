"""Errors meant for the user of the library or of the command line.

The rule of this code base: an error that a user can cause says *what was given*, *what is allowed* and *what to
do*. Such errors are `InputError`s; the command line prints them in a line or two and leaves with exit code 2.
Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A wrong input: the message says what was given, what is allowed and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def divisors_near(n: int, wanted: int, count: int = 6) -> list[int]:
    """Return up to `count` divisors of `n` closest to `wanted`, ascending: the values to suggest to a user."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:count])
