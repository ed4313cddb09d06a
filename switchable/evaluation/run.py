"""One evaluation from the user's request to scores: check the tasks -> load the model -> text, tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from switchable.config import RunConfig
from switchable.data import sources
from switchable.data.config import DataConfig
from switchable.data.objectives import build_objective
from switchable.data.split import hashed_documents, scan_corpus
from switchable.errors import InputError
from switchable.evaluation.config import EvalConfig
from switchable.evaluation.harness import resolve_tasks, task_scores
from switchable.evaluation.scores import Score
from switchable.evaluation.speed import Speed, speeds
from switchable.evaluation.text import text_scores, tokenise
from switchable.evaluation.ways import ways
from switchable.ffn.convert import layers_of, shown_mode
from switchable.infer.decoding.rounded import round_weights
from switchable.infer.generate import width_of
from switchable.infer.loss import objective_of_model, positions_of
from switchable.infer.precision import chosen_precision, multiplying_in
from switchable.progress import progress_bar, say
from switchable.store.find import find_model, run_config, trained_precision
from switchable.store.load import load_with_tokenizer
from switchable.train.setup import pick_device

MASS = 0.9  # that speed is measured with, besides all K experts, where none is given


class Evaluation(NamedTuple):
    """What an evaluation found."""

    scores: list[Score]
    precision: str  # of the multiplications
    weights: str  # their width
    speeds: list[Speed]  # how fast it writes in each way, if that was asked for


def evaluate(folder: Path, config: EvalConfig, data: DataConfig, show: bool = False) -> Evaluation:
    """Return the scores of a folder's model, on tasks and on the text of `data`, if there is any.

    Without tasks and text it is a run's own validation text: as many tokens as its training used. With `show` say in
    what precision it multiplies, what the model's own sparse mode is, and how far the work is. Raises InputError
    without anything to evaluate on, for an unknown task, missing data, an impossible mode or K, or a model that cannot
    be evaluated so.
    """
    tasks = resolve_tasks(config.tasks) if config.tasks else []
    trained, most_tokens = run_config(find_model(folder)), None
    if not data.data and (config.speed or not tasks):
        if trained is None:
            give = "give text with --data, or tasks, e.g. --tasks lambada=PATH"
            raise InputError(f"nothing to evaluate on; {give}")
        data, most_tokens = trained.data, trained.train.eval_tokens
    trained = trained or RunConfig()
    has_text = most_tokens is not None or bool(data.data)
    sources.resolve(data.data)  # missing files are named before anything is loaded
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    model, tokenizer = load_with_tokenizer(folder)
    if model.get_output_embeddings() is None:
        raise InputError(
            f"{folder} holds a {type(model).__name__}, which predicts no text; give a language model. "
            "What finetune measured is in the results.json of its --out"
        )
    can_be_sparse = any(way.mode == "sparse" for way in ways(model, config.mode))
    masses = config.mass or ((MASS,) if config.speed and can_be_sparse else ())
    found_ways = ways(model, config.mode, config.experts_per_token, masses)
    if config.speed and objective_of_model(model) != "causal":
        raise InputError("speed is that of writing, which this model does not; leave out --speed")
    length = _window(model, config.sequence_length, trained.train.sequence_length)
    if tasks and objective_of_model(model) == "masked":
        raise InputError(
            "a masked language model gives no probability of a text, which tasks need; "
            "fine-tune it (switchable finetune), or evaluate it on text with --data"
        )
    precision = chosen_precision(model, config.precision, trained_precision(folder))
    if config.weights is not None:
        round_weights(model, config.weights)
    weights = config.weights or str(next(model.parameters()).dtype).removeprefix("torch.")
    rounded = "" if config.weights is None else f", weights in {weights}"
    say(f"{folder}: multiplies in {precision} on {device}{rounded}", show)
    if has_text:
        say(f"reading {sources.resolve(data.data)}", show)
    if layers_of(model):
        say(f"the model's own: {shown_mode(model, 'sparse')}", show)
    model.to(device)
    scores: list[Score] = []
    found_speeds: list[Speed] = []
    if has_text:
        below = 2**64 if most_tokens is None else scan_corpus(data, show).threshold
        documents = progress_bar("tokenizing", "document", show=show, over=hashed_documents(data))
        text = tokenise((document for document, h, _ in documents if h < below), tokenizer, most_tokens)
        objective = build_objective(objective_of_model(model), trained.objective, tokenizer, length)
        with multiplying_in(model, precision):
            scores = text_scores(model, text, objective, length, found_ways, config.batch_size, show)
    if tasks:
        with multiplying_in(model, precision):
            scores += task_scores(model, tokenizer, tasks, found_ways, config.batch_size, config.limit, show)
    if config.speed:
        width = config.weights or width_of(precision)
        found_speeds, how = speeds(model, text.ids.tolist(), found_ways, scores, width)
        say(f"speed: {how}", show)
    return Evaluation(scores, precision, weights, found_speeds)


def _window(model: Any, wished: int | None, trained: int) -> int:
    """Return how many tokens of text the model sees at once: those asked for, or the training's that it can hold."""
    if (positions := positions_of(model)) is None:
        return wished or trained
    if wished is not None and wished > positions:
        most = f"the {positions} positions of the model"
        raise InputError(f"sequence_length={wished} is more than {most}; use fewer")
    return wished or min(trained, positions)
