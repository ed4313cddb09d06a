"""How a verb ends: what came of it, the command to give next, and its figures as one JSON line for programs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from switchable.files import as_json, read_json
from switchable.progress import say


def finish(
    figures: Mapping[str, Any], place: object, *said: str, then: Sequence[object] = (), show: bool = True
) -> None:
    """Say some sentences and the next command (both if `show`), and print figures as JSON on standard output.

    A terminal is told the `place` where they stand instead; without one (None) it gets them too.
    """
    for line in said:
        say(line, show)
    if then:
        say(f"next: {shlex.join(map(str, then))}", show)
    if place is not None and sys.stdout.isatty():
        say(f"figures: {place}")
    else:
        print(as_json(figures))


def opened_by_transformers(folder: Path) -> list[str]:
    """Return the command that opens a plain Hugging Face folder."""
    (kind,) = read_json(folder / "config.json")["architectures"]
    return ["python", "-c", f'import transformers; transformers.{kind}.from_pretrained("{folder}")']
