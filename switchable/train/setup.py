"""From a configuration to everything a run needs: data, model, optimizer, controller.

Settings are checked first (`config.check`), before any work is done. Every rank builds the same model from the same
seed. Then the model is divided among the ranks (`parallel.py`), and last it gets its optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from switchable import ranks
from switchable.config import RunConfig, check, objective_of
from switchable.data.batches import Batches, validation_batches
from switchable.data.objectives import build_objective
from switchable.data.tokenizers import load_tokenizer
from switchable.data.tokens import PreparedData, prepare
from switchable.errors import InputError
from switchable.ffn import builders
from switchable.ffn.convert import ConversionReport, convert, layers_of
from switchable.ffn.layer import SwitchableFFN
from switchable.infer.fill import check_prompt
from switchable.infer.loss import positions_of
from switchable.memory import keep_freed_memory
from switchable.sections import ModelConfig, TrainConfig, d_ff
from switchable.switching.controller import Controller
from switchable.switching.schedule import Schedule
from switchable.train.optim import build_optimizer
from switchable.train.parallel import Batch, Replica, check_division, distribute, split

LONGEST_EAGER = 512
"""Tokens of a sequence up to which attention is multiplied by plain products in bfloat16 on a CPU: forward and backward
2.2 to 4.5 times as fast as torch's fused one with 128 and 256. A rule, so that a run goes on bitwise anywhere; with
longer sequences the matrices of all pairs would take more memory than the rest of the block."""


@dataclass(frozen=True)
class Variant:
    """What a run is made of besides its configuration; the baselines of a comparison exchange parts."""

    layer: type[SwitchableFFN] = SwitchableFFN
    schedule: type[Schedule] = Schedule
    controller: type[Controller] = Controller


SSD = Variant()


@dataclass
class Job:
    """Everything a training loop needs."""

    config: RunConfig
    model: nn.Module
    replica: Replica  # the model as the training step calls it; `model` itself elsewhere
    report: ConversionReport
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    batches: Batches
    validation: list[Batch]
    optimizer: torch.optim.Optimizer
    controller: Controller
    device: torch.device

    def batch(self, step: int) -> Batch:
        """Return this rank's part of the model inputs of step `step` (counted from 0)."""
        return model_inputs(self.batches.batch(step), self.device)

    @property
    def parameters(self) -> int:
        """Parameters of the model, routers included."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def objective(self) -> str:
        """What the model learns: `"causal"`, `"masked"` or `"span"`."""
        return self.batches.objective.name


def set_up(
    config: RunConfig, cache: Path, quiet: bool = False, variant: Variant = SSD, tokens: str | None = None
) -> Job:
    """Prepare the data and build model, optimizer and controller at step 0; InputError for unusable settings or data.

    `variant` is what a baseline exchanges, `tokens` the checksum of the training tokens, if they are known (`prepare`).
    """
    check(config)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    # What a user can get wrong is refused in here, before ranks wait for one another.
    parts = ranks.together(lambda: _build(config, cache, quiet, variant, tokens))
    model, train = parts.model, config.train
    distribute(model, train)
    probe = vars(parts).pop("probe")
    replica = Replica(model, train, parts.device)
    controller = variant.controller(
        model, probe, train.steps, config.switch, train.seed, variant.schedule, precision=replica.autocast
    )
    controller.tokens = micro_rows(train) * train.sequence_length
    return Job(
        **vars(parts),
        config=config,
        replica=replica,
        optimizer=build_optimizer(model, train),
        controller=controller,
    )


def _build(
    config: RunConfig, cache: Path, quiet: bool, variant: Variant, tokens: str | None
) -> SimpleNamespace:
    """Return the parts of a job that are made before the model is divided among the ranks, and the probe."""
    train, rank, world = config.train, ranks.rank(), ranks.world_size()
    check_division(train, world)
    device = pick_device(train.device)
    if device.type == "cpu":
        keep_freed_memory()
    name = objective_of(config)
    data = prepare(config.data, cache, objective=name, progress=not quiet, known=tokens)
    tokenizer = load_tokenizer(data.tokenizer_path)
    objective = build_objective(name, config.objective, tokenizer, train.sequence_length)
    batches = Batches(data.train.path, objective, train.batch_size, train.seed, rank, world)

    def validation(rank: int, world: int) -> list[Batch]:
        found = validation_batches(data.val.path, objective, train.batch_size, train.eval_tokens, rank, world)
        return [model_inputs(batch, device) for batch in found]

    torch.manual_seed(train.seed)
    model = build_model(
        config.model, train.sequence_length, data.vocab_size, _special_tokens(data, tokenizer)
    ).to(device)
    if device.type == "cpu" and train.precision == "bfloat16" and train.sequence_length <= LONGEST_EAGER:
        model.set_attn_implementation("eager")
    if train.sample_prompt is not None:
        check_prompt(name, tokenizer, train.sample_prompt, positions_of(model))
    report = convert(model, config.switch, layer_type=variant.layer)
    layers_of(model)[0].ssd.loss_scale.routers = 1.0  # `clip_gradients` leaves routers out
    # The same probe on every rank, whole; all of it in pieces that fit where a micro-batch fits.
    probe = probe_inputs(model, validation(0, 1), train.probe_tokens)
    rows = micro_rows(train)
    parts = SimpleNamespace(device=device, tokenizer=tokenizer, data=data, batches=batches, model=model)
    parts.report = report
    parts.validation = [piece for batch in validation(rank, world) for piece in split(batch, rows)]
    parts.probe = [piece for batch in probe for piece in split(batch, rows)]
    return parts


def micro_rows(train: TrainConfig) -> int:
    """Return the sequences that a process computes at a time."""
    return train.batch_size // ranks.world_size() // train.gradient_accumulation_steps


def build_model(
    model: ModelConfig, sequence_length: int, vocab_size: int, tokens: Mapping[str, int]
) -> PreTrainedModel:
    """Return a transformers model with random weights (drawn from torch's global generator).

    `sequence_length` is its positions, unless `max_positions` is set, `vocab_size` the rows of its embedding; of the
    special tokens see `builders.build_model`.
    """
    sizes = {
        "d_model": model.d_model,
        "d_ff": d_ff(model),
        "num_layers": model.num_layers,
        "num_heads": model.num_heads,
        "max_positions": model.max_positions or sequence_length,
    }
    return builders.build_model(model.family, sizes, model.activation, vocab_size, tokens)


def _special_tokens(data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    own = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
    tokens = {name: int(number) for name, number in own.items() if number is not None}
    return tokens | {"eos_token_id": data.end_of_text.id}


def pick_device(name: str | None) -> torch.device:
    """Return the device asked for, or the best there is; InputError if torch does not know it or it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device == torch.device("cuda"):
            device = torch.device("cuda", torch.cuda.current_device())  # each rank its own
        torch.zeros(1, device=device).item()  # refused on `meta`, which has no memory
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"device={name!r} cannot be used: {why}; use cpu or cuda") from None
    return device


def model_inputs(batch: Batch, device: torch.device) -> Batch:
    """Return a batch on a device, without a cache of keys and values, for which training has no use."""
    inputs: dict[str, Any] = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    return inputs | {"use_cache": False}


def probe_inputs(model: PreTrainedModel, validation: list[Batch], tokens: int) -> list[Batch]:
    """Return the first validation batches with at least `tokens` tokens together, without the loss.

    A decoder gets its inputs, which it otherwise makes of the labels.
    """
    probe: list[Batch] = []
    seen = 0
    for batch in validation:
        if seen >= tokens:
            break
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if model.config.is_encoder_decoder:
            shift = model.prepare_decoder_input_ids_from_labels  # transformers' name for it
            inputs["decoder_input_ids"] = shift(labels=batch["labels"])
        probe.append(inputs)
        seen += batch["input_ids"].numel()
    return probe
