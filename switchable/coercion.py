"""From what YAML and flags give to a dataclass: numbers, text, lists, choices; what does not fit is refused."""

from __future__ import annotations

import types
import typing
from typing import Any, TypeVar

from switchable.errors import InputError, shown

T = TypeVar("T")


def build(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build a dataclass from the values that are its fields, coerced to their types; InputError for what is refused."""
    hints = typing.get_type_hints(cls)
    return cls(
        **{key: coerce(value, hints[key], f"{where}: {key}") for key, value in values.items() if key in hints}
    )


def coerce(value: Any, hint: Any, where: str) -> Any:
    """Turn a YAML or flag value into the field's type (`1e-3`, which YAML reads as text, into a float, and so on).

    Raises InputError if it does not fit.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or value in ("none", "null"):
            return None
        return coerce(value, next(a for a in args if a is not type(None)), where)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(coerce(item, args[0], where) for item in items)
    if hint is bool:
        return _coerce_bool(value, where)
    if hint is str and not isinstance(value, str):
        raise InputError(f"{where}={shown(value)} must be text")
    if isinstance(value, bool):
        raise InputError(f"{where}={shown(value)} must be {_article(hint)}")
    try:
        number = hint(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}={shown(value)} must be {_article(hint)}") from None
    if hint is int and isinstance(value, float) and value != number:
        raise InputError(f"{where}={shown(value)} must be a whole number")
    return number


def _coerce_bool(value: Any, where: str) -> bool:
    named = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() in named:
        return named[str(value).lower()]
    raise InputError(f"{where}={shown(value)} must be true or false")


def _article(hint: type) -> str:
    return {"int": "a whole number", "float": "a number", "str": "text"}.get(hint.__name__, hint.__name__)
