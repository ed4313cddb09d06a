"""A finished run with snapshots, and the verb that studies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from study.runs import SMALL

from switchable.cli import main
from switchable.config import from_dict
from switchable.study.report import write_run_report
from switchable.train.pretrain import pretrain


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("study")
    config = from_dict(SMALL | {"data": {"vocab_size": 300, "data": [str(corpus)]}})
    pretrain(config, base / "run", base / "cache", quiet=True)
    write_run_report(base / "run")
    return base / "run"


@pytest.fixture
def study_of(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run the verb; returns exit code, the JSON line (empty if none) and what is on stderr."""

    def run(*arguments: str | Path) -> tuple[int, dict[str, Any], str]:
        code = main(["study", *map(str, arguments), "--out", str(tmp_path / "out"), "--quiet"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else {}, err

    return run
