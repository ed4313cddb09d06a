"""Optimizer state in 8 bits moves with its neurons, to its own rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny_gpt2
from switching.training import structures, train
from torch import Tensor, nn

from switchable import SwitchConfig, convert
from switchable.ffn.convert import layers_of
from switchable.ffn.layout import neuron_parameters
from switchable.switching.optimizers import check_state
from switchable.switching.packed import BLOCK, packed_in
from switchable.switching.switch import regroup

TABLE = torch.linspace(-1, 1, 256)
STEP = 2 / 255


def _read(codes: Tensor, table: Tensor, scales: Tensor) -> Tensor:
    return table[codes.long()] * scales.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)


def test_codes_with_a_table_and_scales_by_hand() -> None:
    """Two rows of 256 have a scale each. Moved by columns they keep it; moved by rows the scales go with them."""
    codes = torch.full((2, 256), 255, dtype=torch.uint8)
    codes[0, 0] = 0
    entries: dict[str, Any] = {
        "state1": codes,
        "qmap1": TABLE.clone(),
        "absmax1": torch.tensor([2.0, 0.5]),
        "step": 3,
    }
    found = packed_in(entries, torch.empty(2, 256))
    assert found.keys() == {"state1", "qmap1", "absmax1"}
    move = found["state1"]
    assert move is not None
    move(codes, 1, torch.arange(256).flip(0))
    assert codes[0].tolist() == [255] * 255 + [0]  # of which 0 stands for -1 · 2
    assert entries["absmax1"].tolist() == [2.0, 0.5]
    move(codes, 0, torch.tensor([1, 0]))
    assert codes[1].tolist() == [255] * 255 + [0]
    assert entries["absmax1"].tolist() == [0.5, 2.0]
    torch.testing.assert_close(entries["qmap1"], TABLE)


def test_a_last_block_may_be_shorter_and_a_block_may_be_zero() -> None:
    numbers = torch.cat([torch.zeros(BLOCK), torch.tensor([4.0, -1.0])])
    scales = torch.tensor([0.0, 4.0])
    codes = torch.bucketize(numbers / torch.tensor([1.0] * BLOCK + [4.0] * 2), (TABLE[1:] + TABLE[:-1]) / 2)
    entries: dict[str, Any] = {"state2": codes.to(torch.uint8), "qmap2": TABLE, "absmax2": scales}
    move = packed_in(entries, numbers)["state2"]
    assert move is not None
    move(entries["state2"], 0, torch.arange(BLOCK + 2).flip(0))
    assert scales.tolist() == pytest.approx([4.0, STEP / 2 * 4.0], abs=0.1)
    read = _read(entries["state2"], TABLE, scales)
    assert read[:2].tolist() == pytest.approx([-1.0, 4.0], abs=2 * STEP * 4.0)


class _Codes(Tensor):
    """Numbers of a type that rounds what is written: to 1/64, as a library's own would to its codes."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor)

    def copy_(self, other: Tensor, *_: Any, **__: Any) -> Tensor:
        self.as_subclass(Tensor).copy_((other * 64).round() / 64)
        return self


class _Momentum(torch.optim.Optimizer):
    """SGD with its moments in 8 bits, kept as a library does."""

    def __init__(self, model: nn.Module, kept: Callable[[Tensor], dict[str, Tensor]]) -> None:
        super().__init__(model.parameters(), {})
        self.kept = kept

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state.update(self.kept(p.grad))
            p.sub_(self.moment(p), alpha=0.1)

    def moment(self, p: Tensor) -> Tensor:
        codes, *rest = self.state[p].values()
        return _read(codes, *rest) if rest else codes.dequantize()


def _with_a_table(gradient: Tensor) -> dict[str, Tensor]:
    blocks = nn.functional.pad(gradient.flatten(), (0, -gradient.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    codes = torch.bucketize(blocks / scales.clamp_min(1e-30)[:, None], (TABLE[1:] + TABLE[:-1]) / 2)
    codes = codes.flatten()[: gradient.numel()].view(gradient.shape).to(torch.uint8)
    return {"state1": codes.contiguous(), "qmap1": TABLE, "absmax1": scales}


def _of_a_type(gradient: Tensor) -> dict[str, Tensor]:
    moment = torch.zeros(gradient.shape).as_subclass(_Codes)
    moment.copy_(gradient)
    return {"moment": moment}


@pytest.mark.parametrize(("kept", "rounding"), [(_with_a_table, STEP), (_of_a_type, 0.0)])
def test_moments_move_with_the_neurons(
    tokens: Tensor, kept: Callable[[Tensor], dict[str, Tensor]], rounding: float
) -> None:
    """256 neurons, as many as a table has entries: it is none of theirs."""
    model = tiny_gpt2(width=64)
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3), neuron_major=False)
    optimizer = _Momentum(model, kept)
    train(model, [optimizer], tokens, 1)
    check_state(layers_of(model), [optimizer])
    before = {id(p): optimizer.moment(p).clone() for p in model.parameters()}
    perms = regroup(layers_of(model), structures(model), [optimizer])
    for layer, perm in zip(layers_of(model), perms, strict=True):
        assert perm is not None
        for p, dim in neuron_parameters(layer):
            wanted = before[id(p)].index_select(dim, perm)
            most = rounding * float(wanted.abs().max()) + 1e-7
            torch.testing.assert_close(optimizer.moment(p), wanted, rtol=0, atol=most)
    torch.testing.assert_close(TABLE, torch.linspace(-1, 1, 256))
