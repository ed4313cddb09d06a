"""The argument parser of all verbs: errors in one line, the nearest flag named."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from switchable.errors import nearest
from switchable.gone import GONE


class Parser(argparse.ArgumentParser):
    """An `argparse` parser of many flags."""

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
