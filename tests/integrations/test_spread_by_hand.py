"""Models that their owners replicate or shard over ranks train as in one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from integrations.loops import CONFIG, IDS, MODES, loop, trained_alone
from launch import run_ranks
from support import tiny_gpt2
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from switchable import Controller, convert
from switchable.ffn.convert import layers_of


def _wrapped(model: nn.Module, how: str) -> nn.Module:
    """The model as its owner would spread it over ranks, by hand."""
    if how == "ddp":
        return DistributedDataParallel(model)
    layers = layers_of(model)
    if how == "routers apart":  # which are float32, in a model of another precision
        layers = [layer.router for layer in layers]  # type: ignore[misc]
    if how in ("ffns and blocks", "routers apart"):
        for layer in layers:
            fully_shard(layer)
    if how != "root":
        for block in model.transformer.h:  # type: ignore[union-attr]
            fully_shard(block)
    return fully_shard(model)


def _rank(how: str, dtype: torch.dtype, losses: list[float]) -> int:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = tiny_gpt2(dtype=dtype)
    convert(model, CONFIG, neuron_major=how == "ddp")
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    found = loop(_wrapped(model, how), rows)
    mean = torch.tensor(found.losses)
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, torch.tensor(losses), rtol=1e-4, atol=1e-4)
    assert found.modes == MODES
    assert found.moved > 0
    dist.destroy_process_group()
    return 0


@pytest.mark.parametrize("how", ["ddp", "blocks", "ffns and blocks", "root", "routers apart"])
def test_a_model_spread_over_ranks_by_hand_trains_as_in_one_process(tmp_path: Path, how: str) -> None:
    dtype = torch.float64 if how == "routers apart" else torch.float32
    losses = trained_alone(dtype).losses
    for code, error in run_ranks(2, _rank, how, dtype, losses, log=tmp_path):
        assert code == 0, error


def test_a_sharded_model_that_was_evaluated_before_a_step_is_regrouped_all_the_same(tmp_path: Path) -> None:
    """After a pass without gradients the root's parameters stay whole: they are not the ones that train."""
    for code, error in run_ranks(1, _evaluated, log=tmp_path):
        assert code == 0, error


def _evaluated() -> int:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    model = tiny_gpt2()
    convert(model, CONFIG, neuron_major=False)
    fully_shard(model)
    config = dataclasses.replace(CONFIG, monitor_every=1)
    controller, optimizer = Controller(model, IDS, 20, config), torch.optim.AdamW(model.parameters())
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    with torch.no_grad():
        before = model.eval()(input_ids=IDS).logits
    measured = controller.step(optimizer)
    assert measured is not None
    assert any(perm is not None for perm in measured.permutations)
    names = {id(p) for p in model.parameters()}
    assert all(id(p) in names for group in optimizer.param_groups for p in group["params"])
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()
    return 0
