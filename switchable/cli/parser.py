"""The argument parser of all verbs: no abbreviations, the nearest flag named, help filled in when it is printed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from switchable.errors import nearest
from switchable.gone import GONE

RECIPES_VALUE = re.compile(r"@recipe:(\w+)@")
"""Stands in a help text for what recipe `auto` gives a setting: found out when help is printed."""


class Parser(argparse.ArgumentParser):
    """An `argparse` parser that takes flags as they are written."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **(keywords | {"allow_abbrev": False}))

    def format_help(self) -> str:
        """Return the help text."""
        text = super().format_help()
        if not RECIPES_VALUE.search(text):
            return text
        values = _recipe_here()
        return RECIPES_VALUE.sub(lambda found: str(values[found[1]]), text)

    def error(self, message: str) -> NoReturn:
        """End the process with one line: the flags are many, and help lists them."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def refuse_unknown(self, arguments: Sequence[str]) -> NoReturn:
        """End the process because of arguments that no flag takes."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        name = arguments[0].partition("=")[0]
        setting = name.removeprefix("--").replace("-", "_")
        why = f" is not known{nearest(name, flags)}"
        if setting in GONE:
            why = f" is gone; {GONE[setting].instead}"
        self.error(f"{arguments[0]!r}{why}")


def _recipe_here() -> dict[str, Any]:
    """Return what recipe `auto` gives the default model, by setting."""
    import dataclasses

    from switchable.config import load

    return dataclasses.asdict(load(None, {"precision": "float32"}).switch)
