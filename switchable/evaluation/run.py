"""One evaluation from the user's request to scores: check the tasks -> load the model -> text, tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from switchable.config import RunConfig
from switchable.data import corpora
from switchable.data.config import DataConfig
from switchable.data.objectives import build_objective
from switchable.data.split import hashed_documents
from switchable.errors import InputError
from switchable.evaluation.config import EvalConfig
from switchable.evaluation.harness import resolve_tasks, task_scores
from switchable.evaluation.scores import Score
from switchable.evaluation.text import text_scores, tokenise
from switchable.evaluation.ways import Way, ways
from switchable.infer.loss import objective_of_model
from switchable.store.load import load_with_tokenizer, run_config
from switchable.train.setup import pick_device


def evaluate(folder: Path, config: EvalConfig, data: DataConfig) -> list[Score]:
    """Return the scores of a run's or checkpoint's model, on tasks and on the text of `data`, if there is any.

    Raises:
        InputError: an unknown task, missing data, an impossible mode or K, or a model that cannot be evaluated so.
    """
    tasks = resolve_tasks(config.tasks) if config.tasks else []
    corpora.resolve(data.data)  # missing files are named before anything is loaded
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    model, tokenizer = load_with_tokenizer(folder)
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise InputError(
            f"{folder} holds a {type(model).__name__}, which predicts no text; give a language model. "
            "What finetune measured is in the results.json of its --out"
        )
    found_ways = ways(model, config.mode, config.experts_per_token)
    if tasks and objective_of_model(model) == "masked":
        raise InputError(
            "a masked language model gives no probability of a text, which tasks need; "
            "fine-tune it (switchable finetune), or evaluate it on text with --data"
        )
    model.to(device)
    scores = _on_text(folder, config, data, model, tokenizer, found_ways) if data.data else []
    if tasks:
        scores += task_scores(model, tokenizer, tasks, found_ways, config.batch_size, config.limit)
    return scores


def _on_text(
    folder: Path,
    config: EvalConfig,
    data: DataConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    found: list[Way],
) -> list[Score]:
    text = tokenise((document for document, _, _ in hashed_documents(data)), tokenizer)
    trained = run_config(folder) or RunConfig()
    # The training's sequence length, or what the model can hold.
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    length = config.sequence_length or min(trained.train.sequence_length, positions)
    if length > positions:
        raise InputError(
            f"sequence_length={length} is longer than the model's {positions} positions; use 2 to {positions}"
        )
    objective = build_objective(objective_of_model(model), trained.objective, tokenizer, length)
    return text_scores(model, text, objective, length, found, config.batch_size)
