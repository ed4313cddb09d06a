"""An existing Hugging Face checkpoint becomes switchable; its dense function does not change.

    load -> (ReLU, train on) -> structure from the text -> routers calibrated on the text -> measured -> written

The text's training part gives structure and routers, its validation part the figures. The output folder is a
checkpoint like those of training (`store/checkpoint.py`): `switchable generate`, `eval` and `export` read it.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from switchable.adapt.calibrate import EPOCHS, calibrate
from switchable.adapt.config import AdaptConfig
from switchable.adapt.relufy import train_on, with_relu
from switchable.adapt.table import as_text, layer_rows, losses, sparse_losses
from switchable.data.batches import Batches, validation_batches
from switchable.data.config import DataConfig, ObjectiveConfig
from switchable.data.objectives import build_objective
from switchable.data.tokenizers import check_fits, load_tokenizer
from switchable.data.tokens import prepare
from switchable.errors import InputError
from switchable.ffn.agreement import families_of
from switchable.ffn.builders import model_of
from switchable.ffn.convert import convert, layers_of
from switchable.ffn.families import find_ffns
from switchable.ffn.ssd import facts_of
from switchable.ffn.table import row_of
from switchable.finite import check_finite
from switchable.infer.loss import objective_of_model, positions_of, validation_loss
from switchable.infer.precision import chosen_precision
from switchable.options import refuse_more_than_memory
from switchable.progress import progress_bar, say
from switchable.settings import SwitchConfig
from switchable.store.checkpoint import save
from switchable.store.export import check_output
from switchable.store.pretrained import load_config, load_pretrained
from switchable.store.rundir import RunDir
from switchable.structure.features import features
from switchable.structure.groups import cluster_layers
from switchable.switching.measures import Batch
from switchable.switching.monitor import watch
from switchable.switching.switch import group_anew
from switchable.train.optim import in_float32
from switchable.train.setup import model_inputs, pick_device, probe_inputs

COST_TOKENS = 20_480
"""Calibration tokens for the estimate of what a model without sparse activations would lose."""


@dataclasses.dataclass
class _Text:
    """The text as batches of model inputs."""

    train: Batches
    validation: list[Batch]
    device: torch.device

    def batch(self, index: int) -> Batch:
        """Return training batch `index`."""
        return model_inputs(self.train.batch(index), self.device)

    def probe(self, model: nn.Module, tokens: int) -> list[Batch]:
        """Return training batches of at least so many tokens together, without labels."""
        found: list[Batch] = []
        while not found or sum(b["input_ids"].numel() for b in found) < tokens:
            found += probe_inputs(model, [self.batch(len(found))], 1)
        return found


def adapt(
    source: Path, data: DataConfig, config: AdaptConfig, out: Path, cache: Path, overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Make a checkpoint switchable and write it to `out`, over a model that is there if `overwrite` allows it.

    The source is the folder of a Hugging Face checkpoint, or of a run (its final model). `cache` is for token files.
    The text's tokenizer is the checkpoint's by default. Returns the figures, as written to `conversion.json`; their
    table is on stderr.

    Raises:
        InputError: a model, text or setting that cannot be used, or activations that are not sparse.
    """
    begin = time.perf_counter()
    if config.threads:
        torch.set_num_threads(config.threads)
    if not source.is_dir():
        raise InputError(f"{source} does not exist; give the folder of a Hugging Face checkpoint")
    given, final = source, RunDir(source).final
    source = final if (final / "config.json").is_file() else source
    data = dataclasses.replace(data, tokenizer=data.tokenizer or str(source))
    check_output(out, overwrite, sources=(given, *data.sources))
    switch = SwitchConfig(num_experts=config.num_experts, experts_per_token=config.default_k)
    # What `convert` refuses is refused before the text is read: on a model without weights, where its type has a row.
    with torch.device("meta"):
        plain = model_of(load_config(source))
    if row_of(plain) is None:
        plain = load_pretrained(source)
    relu = with_relu(load_config(source), families_of(plain)[0][0]) if config.relufy else None
    convert(plain, switch)
    neurons = sum(layer.ssd.d_ff for layer in layers_of(plain))
    del plain
    for name, size in (("structure_tokens", neurons), ("calibration_tokens", 16)):
        tokens = getattr(config, name)
        refuse_more_than_memory(tokens * size, f"{name}={tokens}")
    device = pick_device(config.device)
    model = load_pretrained(source).to(device)
    text, tokenizer = _text(model, source, data, config, device, cache, quiet)
    _say_what(model, source, text, config, out, quiet)
    figures: dict[str, Any] = {"model": str(source), "out": str(out), "precision": chosen_precision(model)}
    if relu is not None:
        model = _relufy(model, source, relu, text, config, figures, quiet)
    say(str(convert(model, switch)), not quiet)
    _group(model, text, config, quiet)
    _choose_layers(model, text, config)
    _calibrate(model, text, config.calibration_tokens, config, quiet)
    probe = probe_inputs(model, text.validation, sys.maxsize)
    rows = layer_rows(model, progress_bar("measuring", "batch", show=not quiet, over=probe))
    found = losses(model, text.validation, not quiet)
    say(as_text(rows, found, config.num_experts), not quiet)
    figures |= {
        "ffns": len(rows),
        "num_experts": config.num_experts,
        "experts_per_token": config.default_k,
        "calibration_tokens": config.calibration_tokens,
        "layers": [dataclasses.asdict(row) for row in rows],
        "loss_dense": found.dense,
        "loss_sparse": found.sparse,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    save(out, model.to("cpu"), tokenizer=tokenizer, notes={"conversion.json": figures})
    return figures


def _say_what(
    model: PreTrainedModel, source: Path, text: _Text, config: AdaptConfig, out: Path, quiet: bool
) -> None:
    size = sum(parameter.numel() for parameter in model.parameters())
    relu = f"trained with ReLU for {config.relufy:,} steps, " if config.relufy else ""
    validated = sum(batch["input_ids"].numel() for batch in text.validation)
    what = f"a {type(model).__name__} of {size:,} parameters"
    say(f"model: {source}, {what}, in {chosen_precision(model)} on {text.device}", not quiet)
    say(
        f"conversion: {relu}neurons grouped by {config.structure} on {config.structure_tokens:,} tokens, routers "
        f"calibrated on {config.calibration_tokens:,}, losses measured on {validated:,}; writes to {out}",
        not quiet,
    )


def _text(
    model: PreTrainedModel, source: Path, data: DataConfig, config: AdaptConfig, device: torch.device, cache: Path,
    quiet: bool,
) -> tuple[_Text, PreTrainedTokenizerBase]:  # fmt: skip
    """Prepare the text for what the model predicts."""
    predicts = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if predicts is None or getattr(model, "main_input_name", "") != "input_ids":
        raise InputError(
            f"{source} is a {type(model).__name__}, which predicts no text; routers are calibrated on text with a "
            "language model. Convert such a model in Python: switchable.convert(model, config)"
        )
    length = min(config.sequence_length, positions_of(model) or config.sequence_length)
    rows = int(model.get_input_embeddings().weight.shape[0])
    check_fits(load_tokenizer(str(data.tokenizer)), rows, source)
    name = objective_of_model(model)
    prepared = prepare(data, cache, objective=name, progress=not quiet)
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    objective = build_objective(name, ObjectiveConfig(), tokenizer, length)
    train = Batches(prepared.train.path, objective, config.batch_size, config.seed)
    found = validation_batches(prepared.val.path, objective, config.batch_size, config.eval_tokens)
    return _Text(train, [model_inputs(batch, device) for batch in found], device), tokenizer


def _relufy(
    model: nn.Module, source: Path, relu: PreTrainedConfig, text: _Text, config: AdaptConfig, figures: dict[str, Any],
    quiet: bool,
) -> nn.Module:  # fmt: skip
    """Return the model with ReLU, as the config `relu` says, trained on."""
    before = validation_loss(model, text.validation, not quiet)
    model = load_pretrained(source, relu).to(text.device)
    family = families_of(model)[0][0]
    activation, *_ = facts_of(find_ffns(model, family)[0][1], family, "the FFN")
    if not activation.startswith("relu"):
        setting = family.activation_setting
        what = f"{setting} of the config does not set the activation, which stays {activation}"
        raise InputError(f"{what}; build the model with ReLU, train it on and convert that, without --relufy")
    swapped = validation_loss(model, text.validation, not quiet)
    with in_float32(model), progress_bar("training with ReLU", "step", config.relufy, not quiet) as bar:
        train_on(model, text.batch, config.relufy, config.relufy_learning_rate, bar.update)
    after = validation_loss(model, text.validation, not quiet)
    stages = f"{before:.4f} as it was, {swapped:.4f} with ReLU, {after:.4f} after {config.relufy} steps"
    say(f"loss, nats per token: {stages}", not quiet)
    found = {"loss_before": before, "loss_swapped": swapped, "loss_after": after}
    figures["relufy"] = {"steps": config.relufy, **found}
    return model


def _group(model: nn.Module, text: _Text, config: AdaptConfig, quiet: bool) -> None:
    """Put the neurons of every FFN in the order of the structure that the text shows."""
    layers = layers_of(model)
    probe = text.probe(model, config.structure_tokens)
    watches = watch(model, progress_bar("watching neurons", "batch", show=not quiet, over=probe))
    rows = [
        features(layer.ssd.reads_FD.detach(), seen.active_TF, config.structure)
        for layer, seen in zip(layers, watches, strict=True)
    ]
    labels = cluster_layers(rows, config.num_experts, random_state=config.seed, progress=not quiet)
    group_anew(layers, labels)


def _choose_layers(model: nn.Module, text: _Text, config: AdaptConfig) -> None:
    """Leave layers that are not sparse out of sparse mode; raise InputError, with the cost of it, if none is sparse."""
    layers = layers_of(model)
    rows = layer_rows(model, text.probe(model, config.structure_tokens // 2))
    for layer, row in zip(layers, rows, strict=True):
        layer.ssd.takes_part = row.activation_ratio <= config.max_activation_ratio
        limit = f"max_activation_ratio={config.max_activation_ratio:g}"
        layer.ssd.why_dense = f"activation ratio {row.activation_ratio:.3f}, above {limit}"
    if any(layer.ssd.takes_part for layer in layers):
        return
    for layer in layers:
        layer.ssd.takes_part = True
    if config.keep_activation:
        return
    _calibrate(model, text, min(COST_TOKENS, config.calibration_tokens), config, quiet=True)
    cost = losses(model, text.validation)
    least = min(row.activation_ratio for row in rows)
    raise InputError(
        f"the model's activations ({layers[0].ssd.settings.activation}) are not sparse: in each of its {len(layers)} "
        f"FFNs at least {100 * least:.0f} % of them are not zero (limit {100 * config.max_activation_ratio:.0f} %). "
        f"Cut into experts as it is, its loss, dense {cost.dense:.4f} nats per token, would be: {sparse_losses(cost)}. "
        "Train it on with ReLU first, e.g. --relufy 1000; or convert it all the same with --keep-activation"
    )


def _calibrate(model: nn.Module, text: _Text, tokens: int, config: AdaptConfig, quiet: bool) -> None:
    batches = text.probe(model, tokens)
    with progress_bar("calibrating routers", "batch", len(batches) * (1 + EPOCHS), not quiet) as bar:
        calibrate(model, batches, config.router_learning_rate, config.seed, bar.update)
    check_finite(model, "the model with its routers", "lower --router-learning-rate")
