"""From what YAML and flags give to a config dataclass, whose own checks refuse what does not fit."""

from __future__ import annotations

import types
import typing
from typing import Any, TypeVar

from switchable.errors import InputError

T = TypeVar("T")

BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


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
