"""What a run will need before it is started: memory per rank, traffic, checkpoints, the cost of a switch, the gain.

The model is built on torch's meta device, so parameters and FLOPs are counted, not estimated, whatever its family.
The rest is arithmetic on them; W ranks, A micro-batches per step, P parameters of 4 bytes:

    weights, gradients, moments     16 P, over W if sharded;   gathered: the largest unit (block or FFN), twice
    traffic per step and rank       ddp   2 (W-1)/W · 4 P                          (all-reduce of the gradients)
                                    fsdp  (W-1)/W · 4 P · (2 A + 1)                (two gathers, one reduce-scatter)
    checkpoint                      12 P  (weights and both moments)
    regrouping a layer              its weights and moments gathered once: (W-1)/W · 12 · FFN, sharded only
    FLOPs of the run                the run's own schedule, given what measurements will find

What it does not know: how much of a device's peak is reached (`utilization`, measured by any short run), and the
time of clustering, which runs on the CPU and is printed by every run as `wall_seconds_measure`.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from switchable.choices import costs_of, skips_here
from switchable.config import RunConfig, check
from switchable.errors import InputError, nearest
from switchable.ffn.active_training import LEAST_TOKENS
from switchable.ffn.convert import convert, layers_of
from switchable.sections import TrainConfig
from switchable.switching.monitor import LayerMeasures
from switchable.switching.schedule import Schedule
from switchable.switching.state import ScheduleState
from switchable.timing import processor, take_turns
from switchable.train.flops import StepFlops, count
from switchable.train.parallel import blocks_of, check_division
from switchable.train.setup import build_model, pick_device

PRODUCT = 1024  # rows and columns of the matrices that this machine's processor is measured with
TOKENS = {"eos_token_id": 0, "pad_token_id": 0}  # special tokens of a model that is only looked at
WEIGHT, MOMENTS = 4, 8  # bytes per parameter in float32: the weight (and the gradient); AdamW's two moments


@dataclass(frozen=True)
class Device:
    """What a rank computes on."""

    name: str
    flops: Mapping[str, float]  # peak of products by their precision, FLOPs per second
    memory: float  # bytes
    link: float | None
    """Bytes per second that a rank sends, while it receives as much, to the ranks of its own machine; None: unknown."""


DEVICES = {
    "a100": Device("a100", {"bfloat16": 312e12, "float32": 19.5e12}, memory=80e9, link=300e9),
    "h100": Device("h100", {"bfloat16": 989e12, "float32": 67e12}, memory=80e9, link=450e9),
    "h200": Device("h200", {"bfloat16": 989e12, "float32": 67e12}, memory=141e9, link=450e9),
}
"""Peaks of the makers' data sheets (SXM boards): without sparsity, float32 without TF32, NVLink in one direction."""


@dataclass(frozen=True)
class Plan:
    """The figures of a run; bytes are per rank, FLOPs of the whole step over all ranks, seconds estimates."""

    parameters: int  # of the model, without routers
    router_parameters: int
    state_bytes: int  # weights, gradients and moments that a rank holds
    gathered_bytes: int  # the most that is gathered at a time beside them: this unit and the next one
    traffic_bytes: float  # sent by a rank in a training step
    checkpoint_bytes: int  # on disk, all ranks together
    regroup_bytes: float  # received by a rank to regroup all layers once
    step_flops_dense: float  # a dense step, routers left out
    step_flops_sparse: float  # a sparse step in which all layers but the first take part
    sparse_fraction: float
    """Share of sparse steps, if layers after the first are sparse from `min_dense_fraction` on."""
    flops_ratio: float  # FLOPs of the run over those of all-dense training


def plan(config: RunConfig, vocab_size: int, world_size: int, activation_ratio: float) -> Plan:
    """Work out a run of `world_size` ranks whose embedding has `vocab_size` rows; InputError if it cannot work.

    `activation_ratio` (0 to 1) is what the monitor will find in every layer from its first measurement on.
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
    # What moves with an FFN's neurons: the projections, without the output's bias.
    every, ffn = _size(model), sum(t.numel() for layer in layers for t in layer.ssd.weights.tensors)
    sharded = world_size > 1 and train.parallel == "fsdp"
    others = (world_size - 1) / world_size
    passes = 2 * train.gradient_accumulation_steps + 1 if sharded else 2
    schedule = Schedule(switch, train.steps)
    estimates = schedule.estimates_at(schedule.joins_from)
    sparse = flops.step([None, *([switch.experts_per_token] * (len(layers) - 1))], estimates=estimates)
    spent, sparse_steps = _schedule(config, flops, len(layers), activation_ratio, ids.numel())
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
        sparse_fraction=sparse_steps / train.steps,
        flops_ratio=spent / (flops.dense * train.steps),
    )


def _schedule(
    config: RunConfig, flops: StepFlops, layers: int, ratio: float, micro_tokens: int
) -> tuple[float, int]:
    """Go through the changes of the run's schedule with one result of all measurements; return FLOPs and sparse steps.

    All layers have the activation ratio `ratio`, and all but the first catch enough of the mass with the settings' K.
    """
    train, switch = config.train, config.switch
    few, every = switch.experts_per_token, switch.num_experts
    measures = [_measured(ratio, 0.0, every, every), *[_measured(ratio, 1.0, few, every)] * (layers - 1)]
    schedule, batch = Schedule(switch, train.steps), train.batch_size * train.sequence_length
    schedule.skips = lambda _layer, share: (
        micro_tokens >= LEAST_TOKENS and skips_here(config.model, train, share)
    )
    if schedule.weighs:
        schedule.costs = (costs_of(config.model, train, every),) * layers
    probe = -(-train.probe_tokens // batch) * batch

    def cost(mode: str, state: ScheduleState) -> float:
        parts = zip(state.takes_part, state.experts_per_token, strict=True)
        shares = [ratio if active else None for active in state.multiplies_active]
        return flops.step(
            [k if part and mode == "sparse" else None for part, k in parts], shares, state.estimates
        )

    state, done, spent, sparse_steps = schedule.initial(layers), 0, 0.0, 0

    def advance(end: int) -> None:
        """Take the steps up to `end` in the state that the schedule is in."""
        nonlocal done, spent, sparse_steps
        sparse = schedule.sparse_until(end, state) - schedule.sparse_until(done, state)
        spent += sparse * cost("sparse", state) + (end - done - sparse) * cost("dense", state)
        spent += (schedule.measured_until(end) - schedule.measured_until(done)) * flops.measurement(probe)
        done, sparse_steps = end, sparse_steps + sparse

    # Equal measurements decide alike up to these steps: once one changes nothing, the next ones do not either.
    changes = schedule.joins_from, schedule.dense_until, schedule.routed_from, schedule.dense_from
    for end in (*(step - 1 for step in sorted(changes)), train.steps):
        before: ScheduleState | None = None
        while done < end and state != before:
            measured = schedule.measured_until
            due = done + 1 + bisect_right(range(done + 1, end + 1), measured(done), key=measured)
            advance(min(due, end))
            before = state
            if due <= end:
                state = schedule.decide(due, state, measures).state
        advance(max(done, end))
    return spent, sparse_steps


def _measured(ratio: float, caught: float, enough: int, experts: int) -> LayerMeasures:
    by_k = (0.0,) * (enough - 1) + (1.0,) * (experts - enough + 1)
    return LayerMeasures(
        ratio, caught, by_k, by_k, 1.0, 1.0, experts_per_token=enough, pattern_similarity=1.0
    )


def estimates(
    found: Plan, config: RunConfig, world_size: int, device: Device, utilization: float
) -> dict[str, float | None]:
    """Return seconds per step on `world_size` such devices, and what follows from them.

    `utilization` is the share of the peak that products reach in practice, 0 to 1.
    """
    rate = world_size * device.flops[config.train.precision] * utilization
    link = device.link or math.inf if world_size == 1 else device.link
    seconds = found.step_flops_dense / rate
    return {
        "seconds_per_dense_step": seconds,
        "seconds_per_sparse_step": found.step_flops_sparse / rate,
        "seconds_of_traffic": None if link is None else found.traffic_bytes / link,
        "seconds_to_regroup": None if link is None else found.regroup_bytes / link,
        "seconds_all_dense": seconds * config.train.steps,
        "seconds_of_run": seconds * config.train.steps * found.flops_ratio,
        "memory_left_for_activations": device.memory - found.state_bytes - found.gathered_bytes,
    }


def device_named(name: str) -> Device:
    """Return a row of DEVICES; InputError if there is none of that name."""
    if name not in DEVICES:
        known = ", ".join(DEVICES)
        raise InputError(f"gpu={name!r} is not known{nearest(name, DEVICES)}; use one of {known}")
    return DEVICES[name]


def device_here(train: TrainConfig, world_size: int) -> Device:
    """Return what a rank has if the run is made on this machine: a GPU of its own, or its share of the processor.

    How fast the processor multiplies is measured, in the run's precision, for a second. InputError for an unknown GPU.
    """
    if pick_device(train.device).type == "cuda":
        name = torch.cuda.get_device_name()
        known = next((device for key, device in DEVICES.items() if key in name.lower()), None)
        if known is None:
            raise InputError(
                f"nothing is known of this machine's {name}; plan for one of {', '.join(DEVICES)} with --gpu"
            )
        return known
    if train.threads:
        torch.set_num_threads(train.threads)
    a = torch.ones(PRODUCT, PRODUCT, dtype=getattr(torch, train.precision))
    seconds = take_turns({"product": lambda: a @ a}, 1.0).median("product")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rate = {train.precision: 2 * PRODUCT**3 / seconds / world_size}
    name = f"{processor()}, {torch.get_num_threads()} threads"
    return Device(name, rate, memory / world_size, link=None)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _units(model: nn.Module) -> list[int]:
    """Parameters of what FSDP gathers at a time: each FFN, each block without its FFNs, and the rest."""
    seen: set[int] = set()
    sizes = []
    for unit in (*layers_of(model), *blocks_of(model), model):
        own = [p for p in unit.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        sizes.append(sum(p.numel() for p in own))
    return sizes
