"""What a run will need before it is started: memory per rank, traffic, checkpoints, the cost of a switch, the gain.

The model is built on torch's meta device, so parameters and FLOPs are counted, not estimated, whatever its family.
The rest is arithmetic on them; W ranks, A micro-batches per step, P parameters of 4 bytes:

    weights, gradients, moments     16 P, over W if sharded;   gathered: the largest unit (block or FFN), twice
    traffic per step and rank       ddp   2 (W-1)/W · 4 P                          (all-reduce of the gradients)
                                    fsdp  (W-1)/W · 4 P · (2 A + 1)                (two gathers, one reduce-scatter)
    checkpoint                      12 P  (weights and both moments)
    regrouping a layer              its weights and moments gathered once: (W-1)/W · 12 · FFN, sharded only
    gain                            FLOPs of all-dense training / FLOPs with sparse steps

What it does not know: how much of a device's peak is reached (`utilization`, measured by any short run), and the
time of clustering, which runs on the CPU and is printed by every run as `wall_seconds_measure`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from switchable.config import RunConfig, check
from switchable.errors import InputError, nearest
from switchable.ffn.convert import convert, layers_of
from switchable.switching.schedule import Schedule
from switchable.train.flops import count
from switchable.train.parallel import blocks_of, check_division
from switchable.train.setup import build_model

TOKENS = {"eos_token_id": 0, "pad_token_id": 0}
"""Special tokens of a model that is only looked at."""
WEIGHT, MOMENTS = 4, 8
"""Bytes per parameter in float32: the weight (and the gradient); AdamW's two moments."""


@dataclass(frozen=True)
class Device:
    """What a rank computes on."""

    flops: float
    """Peak of dense bfloat16 products, FLOPs per second."""
    memory: float
    """Bytes."""
    link: float
    """Bytes per second that a rank sends, while it receives as much, to the ranks of its own machine."""


DEVICES = {
    "a100": Device(flops=312e12, memory=80e9, link=300e9),
    "h100": Device(flops=989e12, memory=80e9, link=450e9),
    "h200": Device(flops=989e12, memory=141e9, link=450e9),
}
"""Peaks of the makers' data sheets (SXM boards): bfloat16 without sparsity, NVLink in one direction."""


@dataclass(frozen=True)
class Plan:
    """The figures of a run; bytes are per rank, FLOPs of the whole step over all ranks, seconds estimates."""

    parameters: int
    """Of the model, without routers."""
    router_parameters: int
    state_bytes: int
    """Weights, gradients and moments that a rank holds."""
    gathered_bytes: int
    """The most that is gathered at a time beside them: this unit and the next one."""
    traffic_bytes: float
    """Sent by a rank in a training step."""
    checkpoint_bytes: int
    """On disk, all ranks together."""
    regroup_bytes: float
    """Received by a rank to regroup all layers once."""
    step_flops_dense: float
    """A dense step, routers left out."""
    step_flops_sparse: float
    """A sparse step in which all layers but the first take part."""
    flops_ratio: float
    """All-dense FLOPs over the run's, if layers after the first are sparse from `min_dense_fraction` on."""


def plan(config: RunConfig, vocab_size: int, world_size: int) -> Plan:
    """Work out a run.

    Args:
        config: the run.
        vocab_size: rows of the embedding.
        world_size: number of ranks.

    Raises:
        InputError: settings that cannot work.
    """
    check(config)
    check_division(config.train, world_size)
    train, switch = config.train, config.switch
    rows = train.batch_size // world_size // train.gradient_accumulation_steps
    with torch.device("meta"):
        model = build_model(config.model, train.sequence_length, vocab_size, TOKENS)
    convert(model, switch)
    model.config.pad_token_id = None  # else transformers looks for padding in the ids, which have no values
    ids = torch.zeros(rows, train.sequence_length, dtype=torch.int64, device="meta")
    flops = count(model, {"input_ids": ids, "labels": ids}).times(train.batch_size // rows)
    layers = layers_of(model)
    routers = sum(_size(layer.router) for layer in layers)
    every, ffn = _size(model), sum(_ffn_parameters(layer) for layer in layers)
    sharded = world_size > 1 and train.parallel == "fsdp"
    others = (world_size - 1) / world_size
    passes = 2 * train.gradient_accumulation_steps + 1 if sharded else 2
    sparse = flops.step([None, *([switch.experts_per_token] * (len(layers) - 1))])
    dense = flops.step([None] * len(layers))
    share = sparse_share(config)
    return Plan(
        parameters=every - routers,
        router_parameters=routers,
        state_bytes=(2 * WEIGHT + MOMENTS) * (-(-every // world_size) if sharded else every),
        gathered_bytes=2 * WEIGHT * max(_units(model)) if sharded else 0,
        traffic_bytes=others * WEIGHT * every * passes,
        checkpoint_bytes=(WEIGHT + MOMENTS) * every,
        regroup_bytes=others * (WEIGHT + MOMENTS) * ffn if sharded else 0.0,
        step_flops_dense=flops.dense,
        step_flops_sparse=sparse,
        flops_ratio=flops.dense / (share * sparse + (1 - share) * dense),
    )


def sparse_share(config: RunConfig) -> float:
    """Return the share of steps that are sparse if the layers are stable as soon as they may be."""
    switch = config.switch
    alternating = max(0.0, 1 - switch.min_dense_fraction - switch.final_dense_fraction)
    return alternating * switch.sparse_steps / (switch.sparse_steps + Schedule.dense_steps)


def estimates(
    found: Plan, config: RunConfig, world_size: int, device: Device, utilization: float
) -> dict[str, float]:
    """Return seconds per step and what follows from them.

    Args:
        found: the plan.
        config: its run.
        world_size: number of ranks.
        device: what each computes on.
        utilization: share of the peak that products reach in practice, 0 to 1.
    """
    rate = world_size * device.flops * utilization
    seconds = found.step_flops_dense / rate
    return {
        "seconds_per_dense_step": seconds,
        "seconds_per_sparse_step": found.step_flops_sparse / rate,
        "seconds_of_traffic": found.traffic_bytes / device.link,
        "seconds_to_regroup": found.regroup_bytes / device.link,
        "days_all_dense": seconds * config.train.steps / 86400,
        "days": seconds * config.train.steps / found.flops_ratio / 86400,
        "memory_left_for_activations": device.memory - found.state_bytes - found.gathered_bytes,
    }


def device_named(name: str) -> Device:
    """Return a row of DEVICES.

    Raises:
        InputError: there is none of that name.
    """
    if name not in DEVICES:
        raise InputError(
            f"gpu={name!r} is not known{nearest(name, DEVICES)}; use one of {', '.join(DEVICES)}"
        )
    return DEVICES[name]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _ffn_parameters(layer: Any) -> int:
    """Parameters of an FFN that move with its neurons: the projections, without the output's bias."""
    weights = layer.ssd.weights
    tensors = (weights.up_FD, weights.down_FD, weights.up_bias_F, weights.gate_FD, weights.gate_bias_F)
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


def _units(model: nn.Module) -> list[int]:
    """Parameters of what FSDP gathers at a time: each FFN, each block without its FFNs, and the rest."""
    seen: set[int] = set()
    sizes = []
    for unit in (*layers_of(model), *blocks_of(model), model):
        own = [p for p in unit.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        sizes.append(sum(p.numel() for p in own))
    return sizes
