"""Flags made from the config dataclasses, so that there is one list of settings; and those that verbs share."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import tempfile
import typing
from collections.abc import Container
from pathlib import Path
from typing import Any, TypeVar

from switchable.errors import InputError, nearest
from switchable.gone import refuse_gone
from switchable.options import build
from switchable.settings import BY_RECIPE

T = TypeVar("T")
RESERVED = "config."  # prefix of the names under which settings stand among the parsed arguments
METAVARS: dict[Any, str] = {int: "N", str: "NAME", bool: "BOOL"}
"""How help calls a value of a type, where the field says nothing else."""


def add_common(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of every verb that reads a configuration."""
    verb.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="YAML file; flags override it")
    add_cache(verb)


def add_cache(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of every verb that prepares text."""
    files = "folder for token files (default %(default)s)"
    verb.add_argument("--cache", type=Path, metavar="DIR", default=default_cache(), help=files)
    verb.add_argument("--quiet", action="store_true", help="show no progress")


def add_out(
    verb: argparse.ArgumentParser, text: str, default: str | None = None, required: bool = False
) -> None:
    """Add the argument of every verb that writes a folder."""
    place = None if default is None else Path(default)
    shown = "" if default is None else f" (default {default})"
    verb.add_argument("--out", type=Path, metavar="DIR", default=place, required=required, help=text + shown)


def add_texts(verb: argparse.ArgumentParser, field: str, text: str, **more: Any) -> None:
    """Add a flag for texts, one or several, to a verb whose other flags are settings."""
    verb.add_argument(f"--{field}", dest=f"{RESERVED}{field}", default=argparse.SUPPRESS, help=text, **more)


def default_cache() -> Path:
    """Return where token files are kept: `$XDG_CACHE_HOME/switchable`, else `~/.cache/switchable`.

    A user without a home, as in a container, has them among temporary files.
    """
    known = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(tempfile.gettempdir() if known.startswith("~") else known) / "switchable"


def add_config_flags(
    verb: argparse.ArgumentParser, only: Container[str] | None = None, skip: Container[str] = ()
) -> None:
    """Add flags for the settings of a run: the usual ones by section, rarer ones under "advanced", and `--set`."""
    from switchable.config import sections

    wanted = {name: cls for name, cls in sections().items() if only is None or name in only}
    for name, cls in wanted.items():
        if any(f.metadata["flag"] for f in dataclasses.fields(cls)):
            add_dataclass_flags(verb.add_argument_group(name), cls, skip, advanced=False)
    rare = verb.add_argument_group("advanced")
    for cls in wanted.values():
        add_dataclass_flags(rare, cls, skip, advanced=True)
    others = [f.name for cls in wanted.values() for f in dataclasses.fields(cls) if not f.metadata["flag"]]
    which = f"any other setting of the YAML file: {', '.join(others)}"
    # Given twice, both count.
    rare.add_argument("--set", action="extend", nargs="+", default=[], metavar="NAME=VALUE", help=which)


def add_dataclass_flags(
    group: Any, cls: type, skip: Container[str] = (), advanced: bool | None = None
) -> None:
    """Add a flag for each field that has one: all, or only those that are (or are not) `advanced`; but for `skip`."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if f.name in skip or not f.metadata["flag"] or advanced not in (None, f.metadata["advanced"]):
            continue
        hint, switch = hints[f.name], hints[f.name] is bool
        kind = next((each for each in (hint, *typing.get_args(hint)) if each in METAVARS), None)
        group.add_argument(
            f"--{f.name.replace('_', '-')}",
            dest=f"{RESERVED}{f.name}",
            default=argparse.SUPPRESS,
            nargs="+" if typing.get_origin(hint) is tuple else "?" if switch else None,
            const=True if switch else None,
            metavar=f.metadata["metavar"] or METAVARS.get(kind, "VALUE"),
            help=_help(f),
        )


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the config fields that were given, as flags or by `--set`, by name.

    Raises InputError for `--set` without a value, or with a name that is not known.
    """
    from switchable.config import sections

    flags = {name: value for name, value in vars(args).items() if name.startswith(RESERVED)}
    found = {name.removeprefix(RESERVED): value for name, value in flags.items()}
    for text in getattr(args, "set", []):
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise InputError(f"--set {text!r}: give NAME=VALUE, e.g. --set beta2=0.99")
        known = [f.name for cls in sections().values() for f in dataclasses.fields(cls)]
        if name not in known:
            refuse_gone(name, "--set")
            raise InputError(f"--set {text!r}: there is no setting {name!r}{nearest(name, known)}")
        found[name] = value
    return found


def given(cls: type[T], args: argparse.Namespace) -> T:
    """Return a config dataclass made of the flags that were given; InputError as it refuses one."""
    return build(cls, given_flags(args), "the flags")


@functools.cache
def _auto() -> dict[str, Any]:
    """Return what recipe `auto` gives the default model, by setting."""
    from switchable.config import load

    return dataclasses.asdict(load(None, {"precision": "float32"}).switch)


def _help(f: dataclasses.Field[Any]) -> str:
    text = str(f.metadata["help"]).replace("%", "%%")
    choices = f.metadata["choices"]
    named = f" [{', '.join(choices)}]" if choices else ""
    if f.name in ("recipe", "precision") and f.default is not None:
        return f"{text}{named} (default auto)"
    if f.default is BY_RECIPE:
        return f"{text}{named} (default: the recipe's; in float32 auto's is {_auto()[f.name]})"
    values = f.default if isinstance(f.default, tuple) else () if f.default is None else (f.default,)
    shown = f" (default {' '.join(map(str, values))})" if values else ""
    return f"{text}{named}{shown}"
