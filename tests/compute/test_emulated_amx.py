"""AMX, emulated: one tile's product is what Intel's manual says, and the processor's where it has them."""

from __future__ import annotations

import ctypes

import pytest
import torch
from compute.emulated_amx import EMULATED, EmulatedAMX
from llvmlite import ir
from torch import Tensor

from switchable.compute.cpu import llvm
from switchable.compute.cpu.amx import AMX
from switchable.compute.cpu.code import Code
from switchable.compute.cpu.llvm import POINTER, Writer, this_machine
from switchable.compute.cpu.tasks import ENTRY

HERE = this_machine()
pytestmark = pytest.mark.skipif(HERE is None or not HERE.pairs, reason="a processor without AVX512-BF16")
HALF = torch.bfloat16


def tile_product(amx: AMX | EmulatedAMX, total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left · right by one instruction, [16, 16]; left is [16, 32], right [16, 16, 2]."""
    assert HERE is not None
    module = ir.Module("one")
    w = Writer(module, "product", [POINTER], wide=False, lanes=16)
    tensors = total.clone(), left.contiguous(), right.contiguous()
    addresses = [w.b.inttoptr(llvm.i64(tensor.data_ptr()), POINTER) for tensor in tensors]
    amx.configure(w.b)
    for tile, address in enumerate(addresses):
        amx.load(w.b, tile, address, 64)
    amx.multiply_add(w.b, 0, 1, 2)
    amx.store(w.b, 0, addresses[0], 64)
    amx.release(w.b)
    w.b.ret_void()
    built = Code(lambda _: module, HERE)
    ENTRY(built.address("product"))(ctypes.c_void_p())
    return tensors[0]


def some_tiles() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(16, 32, generator=generator).to(HALF) for _ in range(2))
    return torch.randn(16, 16, generator=generator), left, right.view(16, 16, 2)


def test_the_emulated_product_is_that_of_matrices() -> None:
    total, left, right = some_tiles()
    matrix = right.transpose(1, 2).reshape(32, 16)  # a row of `right` holds two rows of the matrix
    wanted = total.double() + left.double() @ matrix.double()
    torch.testing.assert_close(
        tile_product(EMULATED, total, left, right).double(), wanted, rtol=1e-5, atol=1e-5
    )


def test_the_emulated_product_adds_even_and_odd_terms_apart_and_has_no_denormals() -> None:
    total, left, right = torch.zeros(16, 16), torch.zeros(16, 32).to(HALF), torch.zeros(16, 16, 2).to(HALF)
    left[0, :4] = torch.tensor([2.0**24, 1, -(2.0**24), 1]).to(HALF)
    left[1, 0], left[2, :2] = 2.0**-130, 2.0**-70
    right[:] = 1
    got = tile_product(EMULATED, total, left, right)
    assert got[0].tolist() == [2.0] * 16  # one after the other, 2^24 + 1 - 2^24 + 1 would be 1
    assert got[1].tolist() == [0.0] * 16
    assert got[2].tolist() == [2.0**-69] * 16
    right[:] = 2.0**-70
    assert tile_product(EMULATED, total, left, right)[2].tolist() == [0.0] * 16  # 2^-139


def test_the_emulation_counts_what_a_processor_would_refuse() -> None:
    amx, module = EmulatedAMX(), ir.Module("wrong")
    w = Writer(module, "wrong", [POINTER], wide=False, lanes=16)
    amx.zero(w.b, 0)  # not configured
    amx.configure(w.b)
    amx.configure(w.b)
    amx.release(w.b)
    amx.release(w.b)
    w.b.ret_void()
    assert HERE is not None
    built = Code(lambda _: module, HERE)
    ENTRY(built.address("wrong"))(ctypes.c_void_p())
    assert amx.faults == 3


@pytest.mark.skipif(HERE is None or HERE.amx is None, reason="no AMX here: its own instructions cannot run")
def test_the_processor_s_product_is_the_emulated_one() -> None:
    tiles = some_tiles()
    torch.testing.assert_close(
        tile_product(AMX(), *tiles), tile_product(EMULATED, *tiles), rtol=1e-6, atol=1e-6
    )
