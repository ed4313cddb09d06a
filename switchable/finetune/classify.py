"""Fine-tune a switchable model on a GLUE task: transformers' sequence-classification head and Trainer.

    trained model -> the same body under a new head, switchable again, its routers put back
                  -> Trainer, in the mode asked for
                  -> accuracy and Matthews' correlation on the dev set, in dense mode and in sparse mode

In dense mode the routers of an SSD model learn along, as in pre-training, so that sparse mode stays usable.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from switchable.data import glue
from switchable.errors import InputError
from switchable.evaluation.scores import Score, accuracy, matthews
from switchable.evaluation.ways import Way, multiplying, ways
from switchable.ffn.convert import NOT_SWITCHABLE, layers_of, set_mode
from switchable.finetune.config import FinetuneConfig
from switchable.finite import check_finite
from switchable.infer.loss import positions_of
from switchable.infer.precision import multiplying_in
from switchable.memory import keep_freed_memory
from switchable.progress import progress_bar, say
from switchable.store import checkpoint
from switchable.store.export import check_output
from switchable.store.find import find_model, load_tokenizer_of, trained_precision
from switchable.store.load import load
from switchable.store.pretrained import load_config
from switchable.train.optim import in_float32
from switchable.train.setup import pick_device

METRICS = {"accuracy": accuracy, "matthews": matthews}


def finetune(
    run: Path, data: Path, config: FinetuneConfig, out: Path | None = None, overwrite: bool = False,
    quiet: bool = False,
) -> tuple[list[Score], dict[str, Any]]:  # fmt: skip
    """Fine-tune the model of a run or checkpoint on a task in GLUE's folder `data`, and score it on the dev set.

    The model and `results.json` are saved to `out`, if given, over a model that is there if `overwrite` allows it.
    Returns the scores, and the same with the settings as plain values. Raises InputError for missing data or model, an
    impossible mode or K, a tokenizer that does not fit, or `out` in use.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("fine-tuning needs accelerate: pip install 'switchable[finetune]'")
    if out is not None:
        check_output(out, overwrite, sources=(run, data))
    train, dev = (glue.examples(config.task, data, split) for split in ("train", "dev"))
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    transformers.set_seed(config.seed)
    model, tokenizer = load_classifier(run, len(glue.TASKS[config.task].labels))
    k = () if config.experts_per_token is None else (config.experts_per_token,)
    way = ways(model, (config.mode,), k if config.mode == "sparse" else ())[0]
    set_mode(model, way.mode, way.experts_per_token)
    can_be_sparse = any(layer.ssd.takes_part for layer in layers_of(model))
    scored = ways(model, (), k if can_be_sparse else ())  # an impossible K is refused before the training
    precision = config.precision or trained_precision(run) or "float32"
    trainer = _trainer(model, tokenizer, config, device, precision, quiet)
    trainer.train_dataset = _encode(train[: config.max_train_examples], tokenizer, model, config.max_length)
    say(
        f"{config.task}: {len(trainer.train_dataset):,} examples to train on, {len(dev):,} to score; {run} under a new "
        f"head, trained {way} for {config.epochs:g} epochs in {precision} on {device}; "
        f"writes to {out or 'nothing (no --out)'}",
        not quiet,
    )
    with redirect_stdout(sys.stderr):  # where Trainer prints what it logs
        with in_float32(model):
            outcome = trainer.train()
        check_finite(model, "the fine-tuned model", "lower --learning-rate")
        with in_float32(model):  # what was rounded back and will be saved, multiplied like before
            scores = _scores(trainer, _encode(dev, tokenizer, model, config.max_length), config.task, scored)
    result = {
        "model": str(run),
        "task": config.task,
        "trained": str(way),
        "precision": precision,
        "train_examples": len(trainer.train_dataset),
        "train_loss": outcome.training_loss,
        "seconds": outcome.metrics["train_runtime"],
        "seed": config.seed,
        "scores": [score.to_dict() for score in scores],
    }
    if out is not None:
        set_mode(model, "dense")
        checkpoint.save(out, model, tokenizer=tokenizer, notes={"results.json": result})
    return scores, result


def load_classifier(run: Path, num_labels: int) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Return the model of a run under a new classification head, switchable, with its routers; and its tokenizer.

    InputError: no model there, a damaged one, no tokenizer, or no classification head for this kind of model.
    """
    folder = find_model(run)
    settings, tokenizer = load_config(folder), load_tokenizer_of(folder)
    if tokenizer is None:
        raise InputError(f"{run} holds no tokenizer; give the folder of the run instead")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if type(settings) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(f"transformers has no classification head for {settings.model_type}")
    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(settings)]
    model, _ = load(run, kind, num_labels=num_labels, pad_token_id=tokenizer.pad_token_id)
    if not (layers := layers_of(model)):
        raise InputError(NOT_SWITCHABLE)
    for layer in layers:
        # The routers of a model that was trained all dense have nothing to learn.
        layer.ssd.router_learns = any(each.ssd.takes_part for each in layers)
    return model, tokenizer


def _trainer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: FinetuneConfig, device: torch.device,
    precision: str, quiet: bool,
) -> Trainer:  # fmt: skip
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written: no checkpoints, no logs
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=0.01,
        warmup_steps=0.06,
        lr_scheduler_type="linear",
        num_train_epochs=config.epochs,
        seed=config.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = _Trainer(model=model, args=arguments, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.precision = precision
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Progress(not quiet))
    return trainer


class _Trainer(Trainer):  # type: ignore[misc]
    """Multiplies in `precision`, in training and in scoring."""

    precision: str

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        return multiplying_in(self.model, self.precision)


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Says how far Trainer is, as every job of ours does: its own bars fill a log."""

    def __init__(self, show: bool) -> None:
        self._show = show
        self._bar: Any = None

    def on_train_begin(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        self._bar = progress_bar("fine-tuning", "step", state.max_steps, self._show)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._bar.update()

    def on_prediction_step(self, *_: Any, eval_dataloader: Any, **__: Any) -> None:
        if self._bar is None:
            self._bar = progress_bar("scoring", "batch", len(eval_dataloader), self._show)
        self._bar.update()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._bar.close()
        self._bar = None

    on_predict = on_train_end


def _encode(
    found: Sequence[glue.Example], tokenizer: PreTrainedTokenizerBase, model: Any, max_length: int
) -> list[dict[str, Any]]:
    """Return examples as model inputs with `labels`, not padded."""
    texts = [example.texts for example in found]
    if not tokenizer.num_special_tokens_to_add(pair=True):  # nothing would stand between the two
        texts = [("\n".join(pair),) for pair in texts]
    columns = list(map(list, zip(*texts, strict=True)))
    least = tokenizer.num_special_tokens_to_add(pair=len(columns) == 2) + len(columns)
    if max_length < least:
        raise InputError(f"max_length={max_length} leaves no room for a text; use at least {least}")
    longest = min(max_length, positions_of(model) or max_length)
    encoded = tokenizer(*columns, truncation=True, max_length=longest, padding=False)
    # GPT-2 would add the embeddings of tokens 0 and 1 for them, RoBERTa has no second one.
    has_types = getattr(model.config, "type_vocab_size", 0) > 1
    accepted = [name for name in tokenizer.model_input_names if name != "token_type_ids" or has_types]
    return [
        {name: encoded[name][i] for name in accepted} | {"labels": example.label}
        for i, example in enumerate(found)
    ]


def _scores(trainer: Trainer, dev: list[dict[str, Any]], task: str, found_ways: Sequence[Way]) -> list[Score]:
    """Score the dev set in every way; the task's own metric first."""
    labels = np.array([example["labels"] for example in dev])
    scores: list[Score] = []
    for way in found_ways:
        with multiplying(trainer.model, way):
            logits = trainer.predict(dev).predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        for name in sorted(METRICS, key=lambda metric: metric != glue.TASKS[task].metric):
            value, stderr = METRICS[name](logits.argmax(-1), labels)
            scores.append(Score(task, name, way, value, stderr, len(dev)))
    return scores
