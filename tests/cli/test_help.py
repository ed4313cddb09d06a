"""What is answered at once: help, typing errors and settings, before anything slow is loaded."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from switchable.cli.flags import default_cache
from switchable.config import load, to_dict


def help_of(verb: str) -> str:
    """The help of a verb, each flag's text in one line."""
    text = subprocess.run(
        [sys.executable, "-m", "switchable", verb, "--help"], capture_output=True, text=True, check=True
    ).stdout
    return re.sub(r"\n {20,}", " ", text)


def test_help_states_the_defaults_of_a_run_started_without_flags() -> None:
    sections = to_dict(load(None, {"precision": "float32"}))
    config = {name: value for values in sections.values() for name, value in values.items()}
    help_text = help_of("pretrain")
    flags = re.findall(r"(?m)^  --([a-z0-9-]+)(.*)$", help_text)
    assert len(flags) <= 50
    seen = set()
    for flag, text in flags:
        name = flag.replace("-", "_")
        if name not in config:
            continue  # of the verb, not of the run
        seen.add(name)
        said = re.search(r"\(default:? (?:the recipe's; in float32 auto's is )?(.*)\)$", text.strip())
        if name in ("recipe", "precision"):
            assert said is not None
            assert said[1] == "auto"
        elif said is None:
            assert config[name] in (None, [], ()), name
        else:
            assert said[1] == str(config[name]), name
    (others,) = re.findall(r"(?m)^  --set .*YAML file: (.*)$", help_text)
    assert seen | set(others.split(", ")) == set(config)


@pytest.mark.parametrize("arguments", [["pretrain", "--bad"], ["pretrain", "--steps", "many"], ["--help"]])
def test_typing_errors_are_answered_before_torch_is_loaded(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom switchable.cli import main\n"
        f"try:\n    code = main({arguments!r})\nexcept SystemExit as error:\n    code = error.code\n"
        "assert 'torch' not in sys.modules and 'llvmlite' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (0 if "--help" in arguments else 2), done.stderr


def test_reading_settings_compiles_no_kernel() -> None:
    code = (
        "from llvmlite import binding\nfrom switchable.config import load\n"
        "def fail(*_): raise AssertionError('compiled')\nbinding.create_mcjit_compiler = fail\n"
        "print(load(None, {'precision': 'float32'}).switch.recipe)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_token_files_lie_in_the_users_cache_or_among_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/somebody")
    assert default_cache() == Path("/somebody/.cache/switchable")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where nobody knows the user
    assert default_cache() == Path(tempfile.gettempdir()) / "switchable"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_cache() == Path("/cache/switchable")
