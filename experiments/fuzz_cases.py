"""What `experiments.fuzz` tries: every numeric field of a configuration, every numeric flag, and values."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from switchable.adapt.config import AdaptConfig
from switchable.cli import build_parser
from switchable.cli.flags import RESERVED
from switchable.coercion import build
from switchable.data.config import DataConfig, ObjectiveConfig
from switchable.errors import InputError
from switchable.evaluation.config import EvalConfig
from switchable.finetune.config import FinetuneConfig
from switchable.infer.sampling import Sampling
from switchable.sections import ModelConfig, TrainConfig
from switchable.settings import BY_RECIPE, SwitchConfig
from switchable.study.config import StudyConfig

CLASSES = (
    ModelConfig, DataConfig, ObjectiveConfig, TrainConfig, SwitchConfig, AdaptConfig, EvalConfig, FinetuneConfig,
    StudyConfig, Sampling,
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    -1, 0, 1, 1e-300, math.nan, math.inf, -math.inf, 1e30, 2**31 - 1, 2**60, 10**400, 2.5, True, "many", [1],
)  # fmt: skip
TEXTS = (
    "-1",
    "0",
    "1",
    "1e-300",
    "nan",
    "inf",
    "-inf",
    "1e30",
    str(2**31 - 1),
    str(2**60),
    str(10**400),
    "2.5",
)


def numeric_fields(cls: type) -> dict[str, Any]:
    """The fields of a configuration that hold numbers, and their types."""
    hints = typing.get_type_hints(cls)
    return {name: hint for name, hint in hints.items() if {"int", "float"} & set(_names(hint))}


def _names(hint: Any) -> Iterator[str]:
    yield getattr(hint, "__name__", "")
    for part in typing.get_args(hint):
        yield from _names(part)


def constructed(cls: type, name: str, value: Any, as_text: bool) -> str | None:
    """What is wrong with how a class takes a value: None if it is refused, or kept as a number that can be used."""
    try:
        made = build(cls, {name: value}, "the flags") if as_text else cls(**{name: value})
    except InputError as error:
        return None if len(str(error)) < 400 else f"a message of {len(str(error))} characters"
    except (ArithmeticError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    kept = getattr(made, name)
    for number in kept if isinstance(kept, tuple) else (kept,):
        if number not in (None, BY_RECIPE) and not (
            isinstance(number, (int, float)) and math.isfinite(number)
        ):
            return f"it keeps {number!r}"
    return None


def constructors() -> tuple[int, list[str]]:
    """Try every field of every class; return how many were tried, and what failed."""
    tried, failures = 0, []
    for cls in CLASSES:
        for name in numeric_fields(cls):
            for as_text, values in ((False, NUMBERS), (True, (*TEXTS, *NUMBERS))):
                for value in values:
                    tried += 1
                    wrong = constructed(cls, name, value, as_text)
                    if wrong is not None:
                        failures.append(f"{cls.__name__}({name}={str(value)[:20]}): {wrong}")
    return tried, failures


@dataclass(frozen=True)
class Case:
    """One call of the command line."""

    verb: str
    flag: str
    """The flag, or the setting behind `--set`."""
    value: str
    arguments: tuple[str, ...]


def cases(only: Sequence[str] = (), values: Sequence[str] = TEXTS) -> Iterator[Case]:
    """Every numeric flag of the verbs with every value."""
    fields = {name for cls in CLASSES for name in numeric_fields(cls)}
    hidden = [
        f.name
        for cls in (ModelConfig, DataConfig, ObjectiveConfig, TrainConfig, SwitchConfig)
        for f in dataclasses.fields(cls)
        if not f.metadata["flag"] and f.name in numeric_fields(cls)
    ]
    for verb, parser in build_parser()[1].items():
        if only and verb not in only:
            continue
        for action in parser._actions:
            setting = action.dest.removeprefix(RESERVED)
            own = action.type in (int, float) or (verb == "compare" and action.dest in ("jobs", "seeds"))
            if own or (verb != "compare" and action.dest != setting and setting in fields):
                for value in values:
                    flag = action.option_strings[0]
                    yield Case(verb, flag, value, (f"{flag}={value}",))
            if action.dest == "set" and verb in ("pretrain", "plan", "prepare"):
                for name in hidden:
                    for value in values:
                        yield Case(verb, name, value, ("--set", f"{name}={value}"))
