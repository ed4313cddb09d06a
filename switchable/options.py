"""One setting of a configuration: its default, its help with the unit, and what is allowed.

    steps: int = option(500, "optimizer steps in all", least=1)

A configuration is a frozen dataclass of such fields that calls `check(self)` in its constructor; `build` makes one of
what YAML or flags give. So code, YAML and flags are refused alike, with the same words, before any work is done.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import types
import typing
from collections.abc import Sequence
from numbers import Number
from typing import Any, NamedTuple, TypeVar

from switchable.errors import InputError, nearest, shown

T = TypeVar("T")

LARGEST = 2**31 - 1  # of a whole number where nothing less is said: every library below takes it
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""What YAML and flags may say for them."""
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", tuple: "a tuple"}


def option(
    default: Any, help_text: str, *, choices: Sequence[str] = (), least: float | None = None,
    above: float | None = None, most: float | None = None, below: float | None = None, usual: str = "",
    metavar: str = "", advanced: bool = False, flag: bool = True,
) -> Any:  # fmt: skip
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


fraction = functools.partial(option, least=0, most=1, metavar="FRACTION")
"""Declare a field that is a share of something, 0 to 1, as `option` does."""


def check(config: Any, unset: object = dataclasses.MISSING) -> None:
    """Refuse values of the wrong type, not among the choices or out of range; a whole number will do for a fraction.

    `config` is a dataclass whose fields `option` declared; `unset` marks what was not given and is allowed everywhere.
    InputError names the field, what was given and what is allowed.
    """
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if value is not unset:
            object.__setattr__(config, f.name, checked(f.name, value, hints[f.name], **f.metadata))


def checked(name: str, value: Any, hint: Any, **allowed: Any) -> Any:
    """Return a value given for `name`, as a float where `hint`, the type that it must have, says so.

    `allowed` are choices and range, as `option` takes them. InputError says what was given and what is allowed.
    """
    if isinstance(value, Number) and hasattr(value, "item"):
        value = value.item()  # one of numpy's
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    hints = [h for h in (typing.get_args(hint) if union else (hint,)) if h is not type(None)]
    if value is None and type(None) in typing.get_args(hint):
        return None
    hint = next((h for h in hints if isinstance(value, typing.get_origin(h) or h)), hints[0])
    kind: Any = typing.get_origin(hint) or hint
    fits: bool = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (kind is not bool and isinstance(value, bool)):
        raise InputError(f"{name}={shown(value)} must be {KINDS.get(kind) or f'a {kind.__name__}'}")
    if kind is tuple:
        return tuple(checked(name, item, typing.get_args(hint)[0], **allowed) for item in value)
    known = allowed.get("choices")
    if known and value not in known:
        raise InputError(
            f"{name}={shown(value)} is not known; use one of {', '.join(known)}{nearest(str(value), known)}"
        )
    within = _Range(*(allowed.get(end) for end in _Range._fields))
    if kind in (int, float) and not within.holds(value, kind):
        use = f"{KINDS[kind]} {within}".strip()
        more = f", e.g. {allowed['usual']}" if allowed.get("usual") else ""
        raise InputError(f"{name}={shown(value)} is out of range; use {use}{more}")
    return float(value) if kind is float else value


class _Range(NamedTuple):
    """Which numbers are allowed; `above` and `below` do not belong to them."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def holds(self, value: float, kind: type) -> bool:
        least, above, most, below = self
        return (
            abs(value) <= sys.float_info.max  # which NaN is not
            and (kind is not int or most is not None or value <= LARGEST)
            and (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
            and (below is None or value < below)
        )

    def __str__(self) -> str:
        """Say it: "of at least 1", "from 0 to 1", and so on."""
        least, above, most, below = self
        if least is not None and most is not None:
            return f"from {least:.10g} to {most:.10g}"
        low = f"of at least {least:g}" if least is not None else "" if above is None else f"above {above:g}"
        high = f"at most {most:.10g}" if most is not None else f"below {below:g}" if below is not None else ""
        return " and ".join(part for part in (low, high) if part)


def build(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build a dataclass from the values that are its fields, coerced; InputError says where one is refused."""
    hints = typing.get_type_hints(cls)
    try:
        return cls(**{key: coerced(value, hints[key]) for key, value in values.items() if key in hints})
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def coerced(value: Any, hint: Any) -> Any:
    """Turn a YAML or flag value into a field's type (`1e-3`, which YAML reads as text, into a float), if it fits."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or value in ("none", "null"):
            return None
        return coerced(value, next(a for a in args if a is not type(None)))
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(coerced(item, args[0]) for item in items)
    if hint is bool:
        return BOOLS.get(str(value).lower(), value)
    if hint is str or isinstance(value, bool):
        return value
    try:
        number = hint(value)
    except (TypeError, ValueError, OverflowError):
        return value
    return number if isinstance(value, str) or number == value else value


def refuse_without_sparse(modes: Sequence[str], **given: object) -> None:
    """Raise InputError if a setting of sparse mode is given and sparse mode is not among the modes asked for."""
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value not in (None, ())]
    if names and "sparse" not in modes:
        raise InputError(
            f"{' and '.join(names)} would change nothing in dense mode; add --mode sparse, or leave it out"
        )


def refuse_more_than_memory(wanted: float, what: str) -> None:
    """Raise InputError if `what` takes more bytes than this machine has, before anything is allocated."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > memory:
        raise InputError(
            f"{what} takes at least {wanted / 1e9:,.3g} GB and this machine has {memory / 1e9:,.3g} GB; make it smaller"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """What jobs on a finished model are asked besides their own settings (`infer/precision.py`)."""

    precision: str | None = option(
        None,
        "of the multiplications; none: the run's, else the weights' (generate: always the weights')",
        choices=("float32", "bfloat16"),
    )

    def __post_init__(self) -> None:
        check(self)
