"""Loops that others wrote: replicated, sharded and compiled models, adapters, accelerate: each works or is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from support import tiny_gpt2
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from switchable import Controller, Family, InputError, SwitchConfig, convert, set_mode
from switchable.compute.choose import BACKENDS
from switchable.ffn.convert import layers_of

CONFIG = SwitchConfig(
    num_experts=8, experts_per_token=3, monitor_every=4, monitor_growth=1.0, min_dense_fraction=0.4,
    stability_threshold=0.0, max_activation_ratio=1.0, min_mass_caught=0.0, sparse_steps=2, final_dense_fraction=0.2,
)  # fmt: skip
STEPS = 16
IDS = torch.randint(0, 61, (8, 24), generator=torch.Generator().manual_seed(5))
MODES = "ddddddssdssdsddd"


class NanoGPT(nn.Module):
    """Its input is called `idx`, and it names what it gives its FFNs."""

    class FFN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.act = nn.Linear(16, 64), nn.Linear(64, 16, bias=False), nn.ReLU()

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(hidden_states)))

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head, self.in_place = nn.Embedding(61, 16), nn.Linear(16, 61), in_place
        self.ffns = nn.ModuleList(NanoGPT.FFN() for _ in range(2))

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tokens(idx)
        for ffn in self.ffns:
            y = ffn(hidden_states=x)
            if self.in_place:
                y += x
            x = y if self.in_place else x + y
        return self.head(x)


FAMILY = Family(ffn="FFN", up="fc1", down="fc2")


class Result:
    """Losses and modes of a loop, and how often neurons moved."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.modes, self.moved = "", 0


def loop(call: nn.Module, part: slice = slice(None), optimizer: Any = None) -> Result:
    """Train a converted model, wrapped or not, on a part of each batch."""
    found, controller = Result(), Controller(call, IDS, STEPS, CONFIG)
    optimizer = optimizer or torch.optim.AdamW([p for p in call.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        found.modes += controller.mode[0]
        ids = torch.randint(0, 61, (4, 24), generator=torch.Generator().manual_seed(step))[part]
        call.train()
        loss = call(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        measured = controller.step(optimizer)
        found.moved += 0 if measured is None else sum(perm is not None for perm in measured.permutations)
        found.losses.append(float(loss.detach()))
    return found


@cache
def trained_alone(dtype: torch.dtype) -> Result:
    model = tiny_gpt2(dtype=dtype)
    convert(model, CONFIG)
    found = loop(model)
    assert (found.modes, found.moved > 0) == (MODES, True)
    return found


@pytest.fixture(scope="module")
def alone() -> Result:
    return trained_alone(torch.float32)


@pytest.mark.parametrize("probe", ["tensor", "mapping", "two tensors"])
def test_the_probe_is_what_the_model_takes(probe: str) -> None:
    model = NanoGPT()
    convert(model, CONFIG, FAMILY)
    given = {"tensor": IDS, "mapping": {"idx": IDS}, "two tensors": [IDS[:4], IDS[4:]]}[probe]
    controller = Controller(model, given, 8, dataclasses.replace(CONFIG, monitor_every=1))
    assert controller.probe_tokens == IDS.numel()
    model(IDS).square().mean().backward()
    measured = controller.step(torch.optim.AdamW(model.parameters()))
    assert measured is not None
    assert 0 < measured.layers[1].activation_ratio < 1


def test_a_measurement_leaves_alone_what_its_owner_keeps_from_training() -> None:
    model = tiny_gpt2()
    convert(model, CONFIG)
    model.train()
    frozen: nn.Module = model.transformer.wte.eval()  # type: ignore[union-attr, operator]
    Controller(model, IDS, STEPS, CONFIG)
    assert (model.training, frozen.training) == (True, False)


class _Skips(NanoGPT):
    def forward(self, idx: Tensor) -> Tensor:
        return self.ffns[0](hidden_states=self.tokens(idx))


@pytest.mark.parametrize(
    ("model", "probe", "message"),
    [
        (NanoGPT, {"input_ids": IDS}, r"NanoGPT fails with the probe \(TypeError: .*'input_ids'"),
        (NanoGPT, IDS + 61, r"NanoGPT fails with the probe \(IndexError: index out of range"),
        (NanoGPT, IDS.float(), r"fails with the probe \(RuntimeError: Expected tensor .* Long"),
        (_Skips, IDS, r"the probe does not come to ffns\.1"),
    ],
)
def test_a_probe_that_does_not_fit_is_refused_at_once(
    model: Callable[[], nn.Module], probe: Any, message: str
) -> None:
    made = model()
    convert(made, CONFIG, FAMILY, example_inputs=IDS)
    with pytest.raises(InputError, match=message):
        Controller(made, probe, 20, CONFIG)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("backend", ["auto", *sorted(set(BACKENDS) - {"decode", "triton"})])
def test_models_may_add_in_place_to_what_an_ffn_returns(backend: str, mode: str) -> None:
    """As Falcon's parallel blocks do: output and gradients are those of an addition out of place."""
    found = []
    for in_place in (True, False):
        model = NanoGPT(in_place)
        convert(model, dataclasses.replace(CONFIG, backend=backend, activation_l1=1e-3), FAMILY)
        set_mode(model.train(), mode)
        y = model(IDS)
        y.square().mean().backward()
        found.append([y, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_trains_as_an_uncompiled_one(alone: Result, whole: bool) -> None:
    model = tiny_gpt2()
    convert(model, CONFIG)
    call: Any = torch.compile(model, backend="aot_eager") if whole else model
    if not whole:
        for block in model.transformer.h:  # type: ignore[union-attr]
            block.compile(backend="aot_eager")
    found = loop(call)
    assert found.modes == alone.modes
    torch.testing.assert_close(found.losses, alone.losses, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_accelerate_trains_as_the_plain_loop(alone: Result) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_gpt2()
    convert(model, CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prepared, wrapped = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    found = loop(prepared, optimizer=wrapped)
    assert found.modes == alone.modes
    assert found.losses == alone.losses


def test_what_wants_contiguous_parameters_gets_them_where_the_layout_gains_nothing() -> None:
    report = {}
    for recipe in ("dense", "early"):
        model = tiny_gpt2()
        report[recipe] = str(convert(model, SwitchConfig(num_experts=8, experts_per_token=3, recipe=recipe)))
        contiguous = all(p.is_contiguous() for p in model.parameters())
        assert contiguous == (recipe == "dense")
    assert report["dense"] == "2 of 2 FFNs are switchable: 8 experts of 8 neurons"
    assert report["early"].endswith("convert(..., neuron_major=False))")


def test_a_schedule_free_wrapper_needs_contiguous_parameters_and_then_follows() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    model = tiny_gpt2()
    convert(model, CONFIG, neuron_major=False)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper = schedulefree.ScheduleFreeWrapper(sgd, momentum=0.9)
    wrapper.train()
    found = loop(model, optimizer=wrapper)
    assert found.modes == MODES
    assert found.moved > 0


def _adapted(targets: list[str], **more: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(
        r=4, target_modules=targets, fan_in_fan_out=True, init_lora_weights=False, **more
    ), peft.get_peft_model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("first", ["PEFT", "convert"])
def test_adapters_beside_the_ffns_train_and_switch(first: str) -> None:
    lora, wrap = _adapted(["c_attn"], modules_to_save=["router"] if first == "convert" else None)
    model: Any = tiny_gpt2()
    if first == "PEFT":
        model = wrap(model, lora)
        convert(model, CONFIG)
    else:
        convert(model, CONFIG)
        model = wrap(model, lora)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    found = loop(model)
    assert found.modes == MODES
    assert any(
        not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before and "router" in n
    )
    with torch.no_grad():
        dense = model.eval()(input_ids=IDS).logits
        set_mode(model, "sparse", 8)
        torch.testing.assert_close(model(input_ids=IDS).logits, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_on_an_ffn_are_refused_before_training() -> None:
    lora, wrap = _adapted(["c_fc"], modules_to_save=["router"])
    model: Any = tiny_gpt2()
    convert(model, CONFIG)
    with pytest.raises(InputError, match=r"c_fc is a Linear, which sparse mode passes by; merge it"):
        Controller(wrap(model, lora), IDS, STEPS, CONFIG)
    lora, wrap = _adapted(["c_fc"])
    with pytest.raises(InputError, match=r"c_fc .* is an adapter; merge it"):
        convert(wrap(tiny_gpt2(), lora), CONFIG)
