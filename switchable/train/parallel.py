"""One training step on several processes: torch's DDP or FSDP2 around the same model, and nothing else changes.

    gradient of the batch = mean over ranks of sums over micro-batches of  weight · gradient of their mean loss

    ddp     every rank holds the whole model; gradients are averaged while the backward pass runs
    fsdp    every rank holds its rows of every parameter, gradient and moment; each block's parameters, and each
            FFN's, are gathered for its own forward and backward only

Backends are gloo for CPUs and NCCL for GPUs. In a single process there is neither wrapper nor communication.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from switchable import ranks
from switchable.config import RunConfig, to_dict
from switchable.errors import InputError
from switchable.ffn.convert import layers_of
from switchable.ffn.layer import SwitchableFFN
from switchable.ffn.layout import store_by_row
from switchable.infer.loss import shifts_labels
from switchable.sections import TrainConfig
from switchable.train.meeting import meet
from switchable.versions import versions

Batch = Mapping[str, Tensor]

GRACE = 0.1  # seconds that gloo's threads are given to finish before their group is destroyed


@contextmanager
def process_group(rank_timeout: float) -> Iterator[None]:
    """Within the `with` block the ranks that torchrun (or what sets its variables) started can talk to one another.

    A rank waits `rank_timeout` seconds for the others before it gives up; InputError if they do not come at the start.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        store, rank, world_size = meet(rank_timeout)
        backend, timeout = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(seconds=rank_timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the {os.environ['WORLD_SIZE']} processes did not find one another within {rank_timeout:g} s "
            f"({str(error).splitlines()[0]}); check that all were started, and MASTER_ADDR and MASTER_PORT"
        ) from None
    try:
        yield
    finally:
        # gloo's threads need the interpreter's lock to free the last tensors they sent. A DDP wrapper that outlives
        # this block would free the group while it holds that lock, and wait for those threads for ever.
        time.sleep(GRACE)
        dist.destroy_process_group()


def run_facts(config: RunConfig) -> dict[str, Any]:
    """Return what must be the same on every rank, by name: settings and versions of what computes."""
    facts: dict[str, Any] = {f"version of {package}": version for package, version in versions().items()}
    for section, values in to_dict(config).items():
        facts |= {f"{section}.{key}": value for key, value in values.items()}
    return facts


def check_division(config: TrainConfig, world_size: int) -> None:
    """Raise InputError for a batch that cannot be shared out, and for Muon, which needs whole matrices, with shares."""
    if world_size > 1 and config.parallel == "fsdp" and config.optimizer == "muon":
        raise InputError("optimizer=muon needs whole matrices, parallel=fsdp holds rows; use ddp, or adamw")
    parts = config.gradient_accumulation_steps
    if config.batch_size % (world_size * parts):
        nearest = -(-config.batch_size // (world_size * parts)) * world_size * parts
        raise InputError(
            f"batch_size={config.batch_size} does not divide among {world_size} processes x {parts} "
            f"gradient_accumulation_steps; use a multiple of {world_size * parts}, e.g. {nearest}"
        )


def distribute(model: nn.Module, config: TrainConfig) -> None:
    """Checkpoint activations, compile and shard a model in place, as configured; its optimizer is built afterwards."""
    blocks = blocks_of(model)
    if config.activation_checkpointing:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    if config.compile:
        for block in blocks:
            block.compile()
    if ranks.running() and config.parallel == "fsdp":
        for layer in layers_of(model):
            # FSDP2 cuts contiguous parameters only, and cannot attach its backward pass to a view.
            store_by_row(layer)
            layer.register_forward_hook(lambda _, _args, y: y.clone() if y._is_view() else y)
        # Sharded again after each use. FFNs are units of their own, so that a switch gathers one at a time.
        for unit in (*layers_of(model), *blocks, model):
            fully_shard(unit, reshard_after_forward=True)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the Transformer blocks: of every switchable FFN, the outermost element of a `ModuleList` around it."""
    found: dict[nn.Module, None] = {}  # in order, each once
    for layer in layers_of(model):
        way: list[nn.Module] = [model]  # from the model down to the FFN
        for part in layer.ssd.name.split("."):
            way.append(way[-1].get_submodule(part))
        elements = (module for parent, module in pairwise(way) if isinstance(parent, nn.ModuleList))
        found[next(elements, way[-1])] = None
    return list(found)


class Replica:
    """The prepared model as the training step calls it: with its parallelism, micro-batches and precision."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.model, self._config, self._device = model, config, device
        self._wrapped = model
        self._expected: list[SwitchableFFN] = []
        if ranks.running() and config.parallel == "ddp":
            # A router that does not learn is one whose gradient DDP must not wait for.
            self._expected = [layer for layer in layers_of(model) if layer.ssd.router_learns]
            some_idle = len(self._expected) < len(layers_of(model))
            here = [device.index] if device.type == "cuda" else None
            self._wrapped = DistributedDataParallel(
                model, device_ids=here, find_unused_parameters=some_idle, gradient_as_bucket_view=True
            )

    def forward_backward(self, batch: Batch) -> Tensor:
        """Add the gradients of this rank's part of a batch [B / ranks, S], averaged over ranks; return its loss."""
        rows = len(batch["labels"]) // self._config.gradient_accumulation_steps
        pieces = split(batch, rows)
        total = torch.zeros((), device=self._device, dtype=torch.float64)
        for i, (piece, weight) in enumerate(zip(pieces, self._weights(pieces), strict=True)):
            with self._gradients_shared(last=i == len(pieces) - 1):
                with self.autocast():
                    loss = self._wrapped(**piece).loss * weight
                loss.backward()
            total = total + loss.detach()
        idle = [layer.router for layer in self._expected if not layer.ssd.router_learns]
        if idle:  # these learned when DDP was set up: it waits for a gradient
            torch.autograd.backward([0 * p.sum() for router in idle for p in router.parameters()])
        return total

    def _weights(self, pieces: list[Batch]) -> Tensor:
        """Return what each piece's mean loss counts, so that the mean over ranks of their sum is that of the batch.

        A piece counts by the tokens it predicts: fewer or more in each where they are drawn at random (masks, spans).
        """
        first = 1 if shifts_labels(self.model) else 0
        counts = torch.stack([(piece["labels"][:, first:] != -100).sum() for piece in pieces]).double()
        total = counts.sum()
        if ranks.running():
            dist.all_reduce(total)
        return counts * ranks.world_size() / total

    def autocast(self) -> torch.autocast:
        """Return the context in which the model multiplies in the configured precision."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.precision == "bfloat16")

    @contextmanager
    def _gradients_shared(self, last: bool) -> Iterator[None]:
        """Ranks exchange gradients once per step, in the backward pass of the last micro-batch."""
        if isinstance(self._wrapped, FSDPModule):
            self._wrapped.set_requires_gradient_sync(last)
        quiet = isinstance(self._wrapped, DistributedDataParallel) and not last
        with self._wrapped.no_sync() if quiet else nullcontext():  # type: ignore[operator]
            yield


def split(batch: Batch, rows: int) -> list[Batch]:
    """Cut a batch into pieces of at most `rows` rows; what is not a tensor goes into each."""
    return [
        {k: v[i : i + rows] if isinstance(v, Tensor) else v for k, v in batch.items()}
        for i in range(0, len(batch["input_ids"]), rows)
    ]


class StopVote:
    """Lets the ranks agree, while a step runs, whether to stop after it: all must stop after the same step."""

    def __init__(self) -> None:
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._work: dist.Work | None = None

    def open(self, signum: int | None) -> None:
        """Cast this rank's vote: the number of the signal that came, or None."""
        if ranks.running():
            self._flag.fill_(signum or 0)
            self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, async_op=True)

    def close(self, signum: int | None) -> int | None:
        """Return the signal that any rank had got when the vote was opened; alone, the one that has come by now."""
        if self._work is None:
            return signum
        self._work.wait()
        self._work = None
        return int(self._flag) or None
