"""The source that tests of tokens and tokenizers read."""

from __future__ import annotations

from pathlib import Path

import pytest
from texts import TEXTS, write_jsonl


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "source.jsonl", TEXTS)
