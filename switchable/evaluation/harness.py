"""lm-eval on the live model, in each way it can multiply.

sst2=PATH, lambada=PATH     our task file with local data (tasks.py): nothing is downloaded
hellaswag                   a task of lm-eval's own by its name, with the data that it fetches
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib.util
import io
import logging
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerBase

from switchable.data.tokenizers import added_tokens, end_of_text
from switchable.errors import InputError
from switchable.evaluation.scores import Score
from switchable.evaluation.tasks import NAMES, task_config
from switchable.evaluation.ways import Way, multiplying
from switchable.infer.loss import objective_of_model

LOCAL = [f"{name}=PATH" for name in NAMES]
RESAMPLES = 1000  # bootstrap resamples of lm-eval, for metrics whose standard error has no formula


def resolve_tasks(names: Sequence[str]) -> list[Any]:
    """Return tasks (`NAME=PATH`: one of our task files, `NAME`: lm-eval's) in lm-eval's form, before a model is loaded.

    Raises InputError without lm-eval, for a task unknown (the nearest names are listed) or named twice, or no data.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks need lm-eval: pip install 'switchable[eval]'")
    parts = [given.partition("=") for given in names]
    for name, count in Counter(name for name, _, _ in parts).items():
        if count > 1:
            raise InputError(f"task {name!r} is given {count} times; give each once")
    return [task_config(name, Path(path).expanduser()) if own else _known(name) for name, own, path in parts]


@functools.cache
def _manager(own: bool) -> Any:
    """Return lm-eval's manager of tasks, which knows its `own` ones only if told to: to read them takes seconds."""
    with quiet_harness():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_defaults=own)


def _known(name: str) -> str:
    known = set(_manager(own=True).all_tasks)
    if name in NAMES and name not in known:
        raise InputError(f"task {name!r} needs its data: --tasks {name}=PATH")
    if name not in known:
        close = difflib.get_close_matches(name, sorted({*known, *LOCAL}), n=5, cutoff=0.4)
        raise InputError(
            f"task {name!r} is not known to lm-eval; nearest: {', '.join(close) or 'none'}. "
            f"With local data: {', '.join(LOCAL)}"
        )
    return name


def task_scores(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Any], found_ways: Iterable[Way],
    batch_size: int, limit: int | None = None, show: bool = True,
) -> list[Score]:  # fmt: skip
    """Return every metric of every task of `resolve_tasks` in every way, of at most `limit` examples per task.

    The model is a converted causal or sequence-to-sequence model, and sees `batch_size` sequences at a time. With
    `show` lm-eval says how far it is. Raises InputError if it cannot run its own tasks.
    """
    scores: list[Score] = []
    with quiet_harness(show):
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        manager = _manager(own=any(isinstance(task, str) for task in tasks))
        live = HFLM(pretrained=model, batch_size=batch_size, **_tokenizing(model, tokenizer))
        for way in found_ways:
            with multiplying(model, way):
                try:
                    options = {"limit": limit, "bootstrap_iters": RESAMPLES, "log_samples": False}
                    found = lm_eval.simple_evaluate(live, tasks=list(tasks), task_manager=manager, **options)
                except InputError:  # a ValueError too
                    raise
                except (OSError, ValueError) as error:  # no data, or a group beside one of its own tasks
                    reason = " ".join(str(error).split())
                    local = f"tasks with local data: {', '.join(LOCAL)}"
                    raise InputError(f"lm-eval cannot run the tasks ({reason}); {local}") from error
            scores += _scores(found, way)
    return scores


def _tokenizing(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return lm-eval's settings with which a text begins as in training, and does not end before its answer."""
    if objective_of_model(model) != "causal":
        return {"tokenizer": tokenizer}
    leading, behind = added_tokens(tokenizer)
    if behind:
        tokenizer = copy.deepcopy(tokenizer)
        names = tokenizer.convert_ids_to_tokens(leading)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[*names, "$A"], special_tokens=list(zip(names, leading, strict=True))
        )
    return {"tokenizer": tokenizer, "prefix_token_id": leading[0] if leading else end_of_text(tokenizer).id}


def _scores(found: dict[str, Any], way: Way) -> list[Score]:
    scores = []
    for task, figures in found["results"].items():
        examples = int(found["n-samples"].get(task, {}).get("effective", 0))
        for key, value in figures.items():
            metric, comma, variant = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = figures.get(f"{metric}_stderr,{variant}")
            known = float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None
            shown = metric if variant == "none" else f"{metric} ({variant})"
            scores.append(Score(task, shown, way, float(value), known, examples))
    return scores


@contextmanager
def quiet_harness(show: bool = True) -> Iterator[None]:
    """Keep lm-eval's prints on stderr, or nowhere without `show`, and its log to errors; its level is put back."""
    out = sys.stderr if show else io.StringIO()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(out), redirect_stderr(out):
            yield
    finally:
        logger.setLevel(level)
