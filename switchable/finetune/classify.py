"""Fine-tune a switchable model on a GLUE task: transformers' sequence-classification head and Trainer.

    trained model -> the same body under a new head, switchable again, its routers put back
                  -> Trainer, in the mode asked for
                  -> accuracy and Matthews' correlation on the dev set, in dense mode and in sparse mode

In dense mode the routers of an SSD model learn along, as in pre-training, so that sparse mode stays usable.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from switchable.data import glue
from switchable.data.tokenizers import check_fits
from switchable.errors import InputError
from switchable.evaluation.scores import Score, accuracy, matthews
from switchable.evaluation.ways import Way, going, ways
from switchable.ffn.convert import convert, layers_of, set_mode
from switchable.finetune.config import FinetuneConfig
from switchable.infer.load import find_model, load_tokenizer_of
from switchable.switching.config import SwitchConfig
from switchable.train import checkpoint
from switchable.train.rundir import write_json
from switchable.train.setup import pick_device

METRICS = {"accuracy": accuracy, "matthews": matthews}


def finetune(
    run: Path,
    data: Path,
    config: FinetuneConfig,
    out: Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> tuple[list[Score], dict[str, Any]]:
    """Fine-tune a run's model and score it on the dev set.

    Args:
        run: folder of a run or a checkpoint.
        data: GLUE's folder.
        config: the settings.
        out: where to save the fine-tuned model and `results.json`; None: nowhere.
        overwrite: replace a model that is there.
        quiet: show no progress.

    Returns:
        The scores, and the same with the settings as plain values.

    Raises:
        InputError: missing data or model, an impossible mode or K, a tokenizer that does not fit, or `out` in use.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("fine-tuning needs accelerate: pip install 'switchable[finetune]'")
    if out is not None and (out / "config.json").exists() and not overwrite:
        raise InputError(f"{out} holds a model already; replace it with --overwrite or choose another --out")
    train, dev = (glue.examples(config.task, data, split) for split in ("train", "dev"))
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    transformers.set_seed(config.seed)
    model, tokenizer = load_classifier(run, len(glue.TASKS[config.task].labels))
    way = _training_way(model, config)
    trainer = _trainer(model, tokenizer, config, device, quiet)
    trainer.train_dataset = _encode(train[: config.max_train_examples], tokenizer, model, config.max_length)
    set_mode(model, way.mode, way.experts_per_token)
    with redirect_stdout(sys.stderr):  # where Trainer prints what it logs
        outcome = trainer.train()
        scores = _scores(trainer, _encode(dev, tokenizer, model, config.max_length), config)
    result = {
        "model": str(run),
        "task": config.task,
        "trained": str(way),
        "train_examples": len(trainer.train_dataset),
        "train_loss": outcome.training_loss,
        "seconds": outcome.metrics["train_runtime"],
        "seed": config.seed,
        "scores": [score.to_dict() for score in scores],
    }
    if out is not None:
        set_mode(model, "dense")
        checkpoint.save(out, model, tokenizer=tokenizer)
        write_json(out / "results.json", result)
    return scores, result


def load_classifier(run: Path, num_labels: int) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Return the model of a run under a new classification head, switchable, with its routers; and its tokenizer.

    Raises:
        InputError: no model there, a damaged one, no tokenizer, or no classification head for this kind of model.
    """
    chosen = find_model(run)
    damage = checkpoint.verify(chosen)
    if damage is not None:
        raise InputError(f"{chosen} is damaged ({damage}); name another checkpoint of the run")
    tokenizer = load_tokenizer_of(chosen)
    if tokenizer is None:
        raise InputError(f"{run} holds no tokenizer; give the folder of the run instead")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    settings = AutoConfig.from_pretrained(
        chosen, local_files_only=True, num_labels=num_labels, pad_token_id=tokenizer.pad_token_id
    )
    try:
        with _quiet_transformers():
            model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
                chosen, config=settings, local_files_only=True
            )
    except ValueError as error:
        kind = getattr(settings, "model_type", "?")
        raise InputError(f"transformers has no classification head for {kind}: {error}") from None
    check_fits(tokenizer, model.get_input_embeddings().weight.shape[0], chosen)  # type: ignore[operator]
    _switch_on(model, chosen)
    return model, tokenizer


def _switch_on(model: nn.Module, chosen: Path) -> None:
    """Make a classifier switchable as the model in `chosen` is: the same experts, K, routers."""
    described = json.loads((chosen / "switchable.json").read_text(encoding="utf-8"))
    stored = described["layers"]
    can_be_sparse = any(layer["takes_part"] for layer in stored.values())
    schedule = "ssd" if can_be_sparse else "dense"  # the routers of an all-dense model have nothing to learn
    convert(model, SwitchConfig(num_experts=described["num_experts"], experts_per_token=1, schedule=schedule))
    routers = load_file(chosen / "switchable.safetensors")
    owners = {key.rpartition(".router.")[0] for key in routers}
    places = {id(module): name for name, module in model.named_modules()}
    for layer in layers_of(model):
        settings = stored[_alike(layer.name, stored, chosen)]
        layer.set_experts_per_token(settings["experts_per_token"])
        layer.takes_part = settings["takes_part"]
        prefix = f"{_alike(places[id(layer)], owners, chosen)}.router."
        layer.router.load_state_dict(
            {key.removeprefix(prefix): value for key, value in routers.items() if key.startswith(prefix)}
        )


def _alike(name: str, names: Iterable[str], chosen: Path) -> str:
    """Find a module's name in the model before: a classifier may hold the body in a part (T5: `transformer.`)."""
    for other in names:
        if name == other or name.endswith(f".{other}") or other.endswith(f".{name}"):
            return other
    raise InputError(f"{chosen} has no router for {name}; it has {', '.join(names)}")


def _training_way(model: nn.Module, config: FinetuneConfig) -> Way:
    k = () if config.experts_per_token is None else (config.experts_per_token,)
    return ways(model, (config.mode,), k if config.mode == "sparse" else ())[0]


def _trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: FinetuneConfig,
    device: torch.device,
    quiet: bool,
) -> Trainer:
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
        disable_tqdm=quiet,
    )
    trainer = Trainer(model=model, args=arguments, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.remove_callback(PrinterCallback)
    return trainer


def _encode(
    found: Sequence[glue.Example], tokenizer: PreTrainedTokenizerBase, model: Any, max_length: int
) -> list[dict[str, Any]]:
    """Return examples as model inputs with `labels`, not padded."""
    positions = getattr(model.config, "max_position_embeddings", None) or max_length
    texts = [example.texts for example in found]
    if not tokenizer.num_special_tokens_to_add(pair=True):  # nothing would stand between the two
        texts = [("\n".join(pair),) for pair in texts]
    encoded = tokenizer(
        *map(list, zip(*texts, strict=True)),
        truncation=True,
        max_length=min(max_length, positions),
        padding=False,
    )
    accepted = [name for name in encoded if name in tokenizer.model_input_names]
    return [
        {name: encoded[name][i] for name in accepted} | {"labels": example.label}
        for i, example in enumerate(found)
    ]


def _scores(trainer: Trainer, dev: list[dict[str, Any]], config: FinetuneConfig) -> list[Score]:
    """Score the dev set in every way; the task's own metric first."""
    first = glue.TASKS[config.task].metric
    labels = np.array([example["labels"] for example in dev])
    scores: list[Score] = []
    model = trainer.model
    can_be_sparse = any(layer.takes_part for layer in layers_of(model))
    k = () if config.experts_per_token is None or not can_be_sparse else (config.experts_per_token,)
    for way in ways(model, (), k):
        with going(model, way):
            logits = trainer.predict(dev).predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        for name in sorted(METRICS, key=lambda metric: metric != first):
            value, stderr = METRICS[name](logits.argmax(-1), labels)
            scores.append(Score(config.task, name, way, value, stderr, len(dev)))
    return scores


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers from listing the weights that a new head does not find; its settings are put back."""
    level = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
