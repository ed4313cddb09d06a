"""Our task files for lm-eval, with data from local files: `task_config("lambada", path)`.

A file `tasks/NAME.yaml` is a task of lm-eval (prompt, answer, metrics) without its data; the data come from a path
that the user gives:

    lambada           a .jsonl with {"text": ...} per line, or the folder of lambada_test.jsonl
    sst2, cola, rte   GLUE's folder (data/glue.py)

The prompts are ours: scores are comparable among models evaluated with them, not with published ones.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from switchable.data import glue
from switchable.data.readers import documents_of
from switchable.data.sources import look_at
from switchable.errors import InputError, nearest

LAMBADA_FILE = "lambada_test.jsonl"
NAMES = ("lambada", *glue.TASKS)


def task_config(name: str, path: Path) -> dict[str, Any]:
    """Return a task in lm-eval's form, with its data; InputError: unknown task, or its data are not at the path."""
    if name not in NAMES:
        raise InputError(
            f"task {name!r} has no task file here; those with local data are {', '.join(NAMES)}{nearest(name, NAMES)}"
        )
    documents = _lambada(path) if name == "lambada" else _glue(name, path)
    text = (resources.files("switchable.evaluation") / "tasks" / f"{name}.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text)

    def dataset(**_: object) -> dict[str, Any]:
        from datasets import Dataset  # slow to import

        return {"test": Dataset.from_list(documents)}

    return config | {"task": name, "test_split": "test", "custom_dataset": dataset}


def _glue(name: str, path: Path) -> list[dict[str, Any]]:
    names = ("sentence",) if len(glue.TASKS[name].texts) == 1 else ("sentence1", "sentence2")
    found = glue.examples(name, path, "dev")
    return [dict(zip(names, each.texts, strict=True)) | {"label": each.label} for each in found]


def _lambada(path: Path) -> list[dict[str, Any]]:
    file = path / LAMBADA_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"no LAMBADA data at {file}; give {LAMBADA_FILE} or its folder")
    documents = []
    for number, text in enumerate(documents_of(look_at(file)), 1):
        context, space, word = text.strip().rpartition(" ")
        if not space:
            raise InputError(f"{file}, record {number}: a single word has nothing to predict it from")
        documents.append({"context": context, "word": word})
    return documents
