"""What the machine at hand decides for a run: the precision, and where leaving out idle neurons pays.

    precision auto   bfloat16 where this machine multiplies the model's FFNs clearly faster in it (CUDA: if it has it)

It is settled when a configuration is made, and is in it from then on. What has to be timed is timed once in a process.
A choice is returned with its reason, half a sentence. What is asked for by name is done, faster or not. Recipe `auto`
weighs what a run measures (`switching/costs.py`).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from switchable.compute.cpu.active.active import skips_idle_neurons
from switchable.compute.cpu.limits import has_tiles
from switchable.compute.measured import CLEARLY, FFN, Costs, Line, active_break_even, bfloat16_speedup, costs
from switchable.recipes import AUTO, LEAST_NEURONS, RECIPES, TILE_NEURONS
from switchable.sections import BUILDABLE, ModelConfig, TrainConfig, d_ff
from switchable.settings import SwitchConfig, is_set

MOST_TIMED = 2**29
"""Weights of an FFN that is timed on a CPU: a larger one takes minutes, and more memory than many a machine has."""


def chosen(model: ModelConfig, train: TrainConfig, switch: SwitchConfig) -> tuple[TrainConfig, SwitchConfig]:
    """Return the settings with a name for precision `auto`, and with the limit below which active neurons pay."""
    if train.precision == AUTO:
        train = replace(train, precision=auto_precision(model, train)[0])
    if not is_set(switch.active_below) and switch.recipe != AUTO:
        switch = replace(switch, active_below=active_limit(model, train, switch.recipe))
    return train, switch


def device_of(train: TrainConfig) -> str:
    """Return the type of device that a run computes on."""
    return train.device.split(":")[0] if train.device else "cuda" if torch.cuda.is_available() else "cpu"


def timed_ffn(model: ModelConfig, train: TrainConfig) -> FFN | None:
    """Return an FFN of the run for the clock; None if it is too large, or if the device is not here."""
    device = device_of(train)
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        return None
    tokens = train.batch_size * train.sequence_length // train.gradient_accumulation_steps
    gated = BUILDABLE[model.family].gated
    if device == "cpu" and (3 if gated else 2) * model.d_model * d_ff(model) > MOST_TIMED:
        return None
    return FFN(model.d_model, d_ff(model), model.activation, gated, tokens, device, train.threads)


def auto_precision(model: ModelConfig, train: TrainConfig) -> tuple[str, str]:
    """Return what precision `auto` is here, and why."""
    ffn, device = timed_ffn(model, train), device_of(train)
    if ffn is None and device == "cpu":
        return "float32", f"an FFN of this size, more than {MOST_TIMED:,} weights, is not timed"
    if ffn is None or device == "cuda":
        has = device == "cuda" and (ffn is None or torch.cuda.is_bf16_supported(including_emulation=False))
        unknown = ("float32", f"{device} is not known to have bfloat16")
        return ("bfloat16", "the GPU has it") if has else unknown
    speedup = bfloat16_speedup(ffn)
    return "bfloat16" if speedup >= CLEARLY else "float32", (
        f"an FFN of this model, dense, is {speedup:.2f} times as fast in bfloat16 as in float32 here"
    )


def active_limit(model: ModelConfig, train: TrainConfig, recipe: str) -> float:
    """Return `active_below` where it is not given: the recipe's is float32's, in bfloat16 it is at most what pays here.

    In steps of 0.05, so that a busy machine seldom makes another run of the same settings.
    """
    ffn, limit = timed_ffn(model, train), RECIPES[recipe]["active_below"]
    if ffn is None or train.precision == "float32" or not skips_here(model, train):
        return float(limit)
    return float(min(limit, math.floor(20 * active_break_even(ffn, train.precision)) / 20))


def least_neurons(train: TrainConfig) -> int:
    """Return how many neurons an expert of a run has at least."""
    tiles = train.precision == "bfloat16" and (device_of(train) != "cpu" or has_tiles())
    return TILE_NEURONS if tiles else LEAST_NEURONS


def skips_here(model: ModelConfig, train: TrainConfig, share: float = 0.0) -> bool:
    """Return whether dense steps of a run leave out idle neurons with such a share of active ones; nothing is timed."""
    dtype = getattr(torch, train.precision)
    return skips_idle_neurons(model.d_model, model.activation, dtype, device_of(train), share)


def costs_of(model: ModelConfig, train: TrainConfig, num_experts: int) -> Costs:
    """Return what a layer of a run costs here, or where the device is not here, its FLOPs: no neuron is left out."""
    if (ffn := timed_ffn(model, train)) is not None:
        return costs(ffn, num_experts, train.precision, skips_here(model, train))
    products = 3 if BUILDABLE[model.family].gated else 2
    router = num_experts / (3 * products * d_ff(model))  # 2·D·E of 6·D·F FLOPs for each product
    return Costs(train.batch_size * train.sequence_length, 1.0, None, Line(router, 1.0))
