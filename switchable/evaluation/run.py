"""One evaluation from the user's request to scores: check the tasks -> load the model -> text, tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from switchable.config import RunConfig
from switchable.data import corpora
from switchable.data.config import DataConfig
from switchable.data.objectives import build_objective
from switchable.data.split import hashed_documents
from switchable.errors import InputError
from switchable.evaluation.harness import resolve_tasks, task_scores
from switchable.evaluation.scores import Score
from switchable.evaluation.text import text_scores, tokenise
from switchable.evaluation.ways import Way, ways
from switchable.infer.loss import objective_of_model
from switchable.store.load import load_with_tokenizer, run_config
from switchable.train.setup import pick_device


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate, on what, how."""

    folder: Path
    """Of a run or a checkpoint."""
    tasks: tuple[str, ...] = ()
    """`NAME=PATH` or names of lm-eval's tasks."""
    data: tuple[str, ...] = ()
    """Text files, folders or datasets."""
    text_field: str = "text"
    document_separator: str | None = None
    max_text_mb: float | None = None
    modes: tuple[str, ...] = ()
    """`"dense"`, `"sparse"`; empty: both, if the model can."""
    experts_per_token: tuple[int, ...] = ()
    """Values of K; empty: the model's own."""
    batch_size: int = 8
    """Sequences at a time."""
    sequence_length: int | None = None
    """Tokens in a window of text; None: as in training."""
    limit: int | None = None
    """Examples per task at most."""
    device: str | None = None
    threads: int | None = None


def evaluate(request: EvalRequest) -> list[Score]:
    """Return the scores of a request.

    Raises:
        InputError: an unknown task, missing data, an impossible mode or K, or a model that cannot be evaluated so.
    """
    tasks = resolve_tasks(request.tasks) if request.tasks else []
    corpora.resolve(request.data)  # missing files are named before anything is loaded
    if request.threads:
        torch.set_num_threads(request.threads)
    device = pick_device(request.device)
    model, tokenizer = load_with_tokenizer(request.folder)
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise InputError(
            f"{request.folder} holds a {type(model).__name__}, which predicts no text; give a language model. "
            "What finetune measured is in the results.json of its --out"
        )
    found_ways = ways(model, request.modes, request.experts_per_token)
    objective = objective_of_model(model)
    if tasks and objective == "masked":
        raise InputError(
            "a masked language model gives no probability of a text, which tasks need; "
            "fine-tune it (switchable finetune), or evaluate it on text with --data"
        )
    model.to(device)
    scores = _on_text(request, model, tokenizer, objective, found_ways) if request.data else []
    if tasks:
        scores += task_scores(model, tokenizer, tasks, found_ways, request.batch_size, request.limit)
    return scores


def _on_text(
    request: EvalRequest,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    objective: str,
    found_ways: list[Way],
) -> list[Score]:
    data = DataConfig(
        request.data,
        text_field=request.text_field,
        document_separator=request.document_separator,
        max_text_mb=request.max_text_mb,
    )
    text = tokenise((document for document, _, _ in hashed_documents(data)), tokenizer)
    config = run_config(request.folder) or RunConfig()
    length = request.sequence_length or _length(config, model)
    built = build_objective(objective, config.objective, tokenizer, length)
    return text_scores(model, text, built, length, found_ways, request.batch_size)


def _length(config: RunConfig, model: Any) -> int:
    """The training's sequence length, or what the model can hold."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(config.train.sequence_length, positions) if positions else config.train.sequence_length
