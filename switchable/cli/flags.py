"""Flags made from the config dataclasses, so that there is one list of settings; and those that verbs share."""

from __future__ import annotations

import argparse
import dataclasses
import os
import typing
from collections.abc import Container
from pathlib import Path
from typing import Any


def add_common(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of every verb that reads a configuration."""
    verb.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="YAML file; flags override it")
    verb.add_argument(
        "--cache", type=Path, default=default_cache(), help="folder for token files (default %(default)s)"
    )
    verb.add_argument("--quiet", action="store_true", help="show no progress")


def default_cache() -> Path:
    """Return where token files are kept: `$XDG_CACHE_HOME/switchable`, else `~/.cache/switchable`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "switchable"


def add_config_flags(
    verb: argparse.ArgumentParser, only: Container[str] | None = None, skip: Container[str] = ()
) -> None:
    """Add one flag per config field, its help with unit and default; what is not given is not set."""
    from switchable.config import sections

    for section, cls in sections().items():
        if only is not None and section not in only:
            continue
        add_dataclass_flags(verb.add_argument_group(section), cls, skip)


def add_dataclass_flags(group: Any, cls: type, skip: Container[str] = ()) -> None:
    """Add one flag per field of a config dataclass to a group of arguments."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if f.name in skip:
            continue
        many = typing.get_origin(hints[f.name]) is tuple
        group.add_argument(
            f"--{f.name.replace('_', '-')}",
            dest=f"config.{f.name}",
            default=argparse.SUPPRESS,
            nargs="+" if many else "?" if hints[f.name] is bool else None,
            const=True if hints[f.name] is bool else None,
            metavar=f.name.split("_")[-1].upper(),
            help=_help(f),
        )


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the config fields that were given as flags, by name."""
    return {
        key.removeprefix("config."): value for key, value in vars(args).items() if key.startswith("config.")
    }


def _help(f: dataclasses.Field[Any]) -> str:
    text = str(f.metadata["help"]).replace("%", "%%")
    choices = f.metadata.get("choices")
    named = f" [{', '.join(map(str, choices))}]" if choices else ""
    shown = "" if f.default in (None, ()) else f" (default {f.default})"
    return f"{text}{named}{shown}"
