"""GLUE's classification tasks from local files: `examples("sst2", folder, "dev")`.

The folder is GLUE's own: SST-2/, CoLA/ and RTE/ with train.tsv and dev.tsv, or one of these itself. Nothing is
downloaded. The files are plain tab-separated values: quotes are text.

Source: Wang et al. 2018 (GLUE).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from switchable.errors import InputError, nearest


@dataclass(frozen=True)
class GlueTask:
    """How a task's files look, and how it is scored."""

    folder: str
    header: bool  # whether the first line names the columns
    texts: tuple[int, ...]  # columns that hold the text or the pair of texts
    label: int  # column that holds the label
    labels: tuple[str, ...]  # what the label may be; its place here is its number
    metric: str  # `"accuracy"` or `"matthews"`: the metric that GLUE reports


TASKS = {
    "sst2": GlueTask("SST-2", True, (0,), 1, ("0", "1"), "accuracy"),
    "cola": GlueTask("CoLA", False, (3,), 1, ("0", "1"), "matthews"),
    "rte": GlueTask("RTE", True, (1, 2), 3, ("entailment", "not_entailment"), "accuracy"),
}


@dataclass(frozen=True)
class Example:
    """A text or a pair of texts, and its label."""

    texts: tuple[str, ...]
    label: int


def examples(task: str, folder: Path, split: str) -> list[Example]:
    """Return the examples of a task's split (`"train"` or `"dev"`), in the order of the file.

    Raises InputError for an unknown task, a missing file, or a line that does not have the task's form.
    """
    if task not in TASKS:
        raise InputError(f"task {task!r} is not known; use one of {', '.join(TASKS)}{nearest(task, TASKS)}")
    described = TASKS[task]
    path = _file(described, folder, split, task)
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # other line ends may stand in a text
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from None
    found = [
        _example(described, line, path, number)
        for number, line in enumerate(lines, 1)
        if line.strip() and not (described.header and number == 1)
    ]
    if not found:
        raise InputError(f"{path} holds no examples")
    return found


def _file(task: GlueTask, folder: Path, split: str, name: str) -> Path:
    places = [folder / task.folder / f"{split}.tsv", folder / f"{split}.tsv"]
    for place in places:
        if place.is_file():
            return place
    raise InputError(
        f"no {split}.tsv of {name} in {folder} (looked for {places[0]} and {places[1]}); "
        "give the folder that holds GLUE's folders"
    )


def _example(task: GlueTask, line: str, path: Path, number: int) -> Example:
    columns = line.split("\t")
    if len(columns) <= max(*task.texts, task.label):
        raise InputError(f"{path}, line {number}: {len(columns)} columns, but the task has more")
    if (label := columns[task.label].strip()) not in task.labels:
        raise InputError(f"{path}, line {number}: label {label!r} is not one of {', '.join(task.labels)}")
    return Example(tuple(columns[i].strip() for i in task.texts), task.labels.index(label))
