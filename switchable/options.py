"""One setting of a configuration: its default, its help with the unit, and what is allowed.

    steps: int = option(500, "optimizer steps in all", least=1)

A configuration is a frozen dataclass of such fields that calls `check(self)` in its constructor. So code, YAML and
flags are refused alike, with the same words, before any work is done.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from typing import Any

from switchable.errors import InputError, nearest


def option(
    default: Any,
    help_text: str,
    *,
    choices: Sequence[str] = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    usual: str = "",
    metavar: str = "",
    advanced: bool = False,
    flag: bool = True,
) -> Any:
    """Declare a field.

    Args:
        default: its value where nothing is given.
        help_text: what it is, with its unit.
        choices: all values of a setting that is text.
        least, above, most, below: the range of a number; `above` and `below` do not belong to it.
        usual: a value to suggest when one is refused.
        metavar: how help calls the value.
        advanced: whether help lists it apart from what most users need.
        flag: whether it is a flag of its own; else it is a line of YAML, or `--set NAME=VALUE`.
    """
    facts = {"help": help_text, "choices": tuple(choices), "least": least, "above": above, "most": most}
    facts |= {"below": below, "usual": usual, "metavar": metavar, "advanced": advanced, "flag": flag}
    return dataclasses.field(default=default, metadata=facts)


def check(config: Any, unset: object = None) -> None:
    """Refuse values of a configuration that are of the wrong type, not among the choices or out of range.

    Args:
        config: a dataclass whose fields `option` declared.
        unset: a value that is allowed everywhere: it marks what was not given.

    Raises:
        InputError: names the field, what was given and what is allowed.
    """
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value, optional, kind = getattr(config, f.name), *_unwrapped(hints[f.name])
        if (value is None and optional) or (unset is not None and value is unset):
            continue
        _check_type(f.name, value, kind)
        if f.metadata.get("choices") and value not in f.metadata["choices"]:
            known = f.metadata["choices"]
            raise InputError(
                f"{f.name}={value!r} is not known; use one of {', '.join(known)}{nearest(str(value), known)}"
            )
        if kind in (int, float):
            _check_range(f, value, kind)


def _unwrapped(hint: Any) -> tuple[bool, Any]:
    """Return whether a type allows None, and the type without it (of a generic type, its origin)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return True, typing.get_origin(kinds[0]) or kinds[0]
    return False, typing.get_origin(hint) or hint


def _check_type(name: str, value: Any, kind: Any) -> None:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return
    fits = isinstance(value, kind) if isinstance(kind, type) else True
    if not fits or (kind is not bool and isinstance(value, bool)):
        wanted = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(
            kind, str(kind)
        )
        raise InputError(f"{name}={value!r} must be {wanted}")


def _check_range(f: dataclasses.Field[Any], value: float, kind: type) -> None:
    m = f.metadata
    inside = (
        math.isfinite(value)
        and (m.get("least") is None or value >= m["least"])
        and (m.get("above") is None or value > m["above"])
        and (m.get("most") is None or value <= m["most"])
        and (m.get("below") is None or value < m["below"])
    )
    if not inside:
        raise InputError(f"{f.name}={value:g} is out of range; use {_range(m, kind)}{_usual(m)}")


def _usual(m: Any) -> str:
    return f", e.g. {m['usual']}" if m.get("usual") else ""


def _range(m: Any, kind: type) -> str:
    """Say which numbers are allowed: "a whole number of at least 1", "a number from 0 to 1", and so on."""
    number = "a whole number" if kind is int else "a number"
    least, above, most, below = (m.get(name) for name in ("least", "above", "most", "below"))
    if least is not None and most is not None:
        return f"{number} from {least:g} to {most:g}"
    low = f"of at least {least:g}" if least is not None else f"above {above:g}" if above is not None else ""
    high = f"at most {most:g}" if most is not None else f"below {below:g}" if below is not None else ""
    return " ".join((number, " and ".join(part for part in (low, high) if part))).strip()
