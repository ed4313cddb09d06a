"""How the loops of `fused` are made: pairs in order, experts cut into vectors, and no more compiled than is called."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace

import pytest
import torch
from compute.machines import HERE, needs_instructions
from compute.problems import Case, problem
from llvmlite import ir

from switchable.compute.cpu import code, llvm, tasks
from switchable.compute.cpu.code import Code
from switchable.compute.cpu.experts.dot import _split
from switchable.compute.cpu.experts.library import Library, library
from switchable.compute.cpu.experts.packing import Packing
from switchable.compute.cpu.experts.reorder import write_reorder
from switchable.compute.cpu.llvm import POINTER, Machine, Writer

pytestmark = needs_instructions


def test_pairs_stand_by_chunk_and_then_by_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packing, "chunk_tokens", 2)
    loops = library(16, 4, torch.float32, HERE)
    pairs = loops.sort(torch.tensor([[2, 0], [0, 1], [1, 2]]), 3)
    assert pairs.chunks == 2
    # Tokens 0 and 1: expert 0 has both, expert 1 token 1, expert 2 token 0; token 2 has experts 1 and 2.
    assert pairs.tokens_P[:6].tolist() == [0, 1, 1, 0, 2, 2]
    assert pairs.starts.tolist() == [0, 2, 3, 4, 4, 4, 5, 6]


def test_how_experts_are_cut_into_vectors() -> None:
    wide = Machine("", "", vector_bytes=64, registers=32)

    def cut(neurons: int, width: int = 256) -> tuple[int, int]:
        packing = Packing(width, neurons, torch.float32, wide)
        return packing.inputs_per_vector, packing.vectors

    assert cut(96) == (1, 6)
    assert cut(8) == (2, 1)  # 16 lanes hold two numbers of a token for 8 neurons
    assert cut(4) == (4, 1)
    assert cut(12) == (4, 3)
    assert cut(17) == (4, 5)
    assert cut(24) == (2, 3)
    assert [_split(vectors, 3) for vectors in (1, 4, 7, 12, 13, 15)] == [
        (0, [(0, 1)]),
        (0, [(0, 2), (2, 2)]),
        (0, [(0, 2), (2, 2), (4, 3)]),
        (0, [(0, 3), (3, 3), (6, 3), (9, 3)]),
        (9, [(9, 2), (11, 2)]),
        (9, [(9, 3), (12, 3)]),
    ]
    assert Packing(256, 96, torch.float32, wide).scatter_columns == 4  # of 16 vectors
    assert Packing(144, 96, torch.float32, wide).scatter_columns == 3  # of 9
    assert Packing(256, 8, torch.bfloat16, wide).steps == 64  # of two words of two numbers
    assert Packing(272, 96, torch.float64, replace(wide, registers=16, vector_bytes=32)).scatter_columns == 2


@pytest.mark.parametrize("name", ["dot_relu", "scatter", "weights", "bias"])
def test_large_experts_take_no_longer_to_compile(name: str) -> None:
    small, large = (
        len(str(Library(Packing(64, neurons, torch.float32, HERE))._written(name))) for neurons in (344, 1024)
    )
    assert large < (1.1 if HERE.vector_bytes == 64 else 1.2) * small


def test_weights_are_reordered_as_the_loops_read_them() -> None:
    def reordered(neurons: int, width: int, lanes: int) -> list[float]:
        packing = Packing(width, neurons, torch.float32, replace(HERE, vector_bytes=4 * lanes))
        module = ir.Module("reorder")
        write_reorder(Writer(module, "reorder", [POINTER, POINTER], wide=False, lanes=lanes), packing)
        built = Code(lambda _: module, HERE)
        weights = torch.arange(1.0, neurons * width + 1)
        packed = torch.empty(packing.vectors * packing.steps * lanes)
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(built.address("reorder"))
        call(weights.data_ptr(), packed.data_ptr())
        return packed.tolist()

    # Four lanes for four neurons: one number of each after the other.
    assert reordered(4, 4, 4) == [1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 4, 8, 12, 16]
    # Four lanes for two neurons: two numbers of each.
    assert reordered(2, 4, 4) == [1, 2, 5, 6, 3, 4, 7, 8]
    # Four lanes for one neuron: four numbers of it.
    assert reordered(1, 8, 4) == [1, 2, 3, 4, 5, 6, 7, 8]
    # Sixteen lanes hold two numbers of eight neurons, of which there are five.
    rows = [[16 * neuron + column for neuron in range(5) for column in (c, c + 1)] for c in range(1, 17, 2)]
    assert reordered(5, 16, 16) == [number for row in rows for number in (*row, *[0] * 6)]


def test_what_a_call_does_not_need_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    compiled = code._compiled

    def noted(text: str, machine: Machine) -> object:
        found.append(text)
        return compiled(text, machine)

    monkeypatch.setattr(code, "_compiled", noted)
    y_TD = problem(Case(width=80, neurons=3)).run("fused")
    # Three functions: pairs in order, `up` with a bias, `down`.
    defined = [re.findall(r'define void @"(\w+)"', text) for text in found]
    assert [names[-1] for names in defined] == ["sort", "dot_bias_relu_by_chunk_expert", "scatter_expert"]
    y_TD.sum().backward()
    assert len(found) == 6  # the slope of ReLU, and the gradients of weights and bias
    with torch.no_grad():
        problem(Case(width=80, neurons=3)).run("fused")
    assert len(found) == 7


def test_memory_is_kept_and_grows_with_what_is_asked_for() -> None:
    scratch = tasks.Scratch()
    first = scratch("a", (2, 3), torch.float32)
    assert first.shape == (2, 3)
    assert scratch("a", (5,), torch.float32).data_ptr() == first.data_ptr()
    assert scratch("b", (2, 3), torch.float32).data_ptr() != first.data_ptr()
    more = scratch("a", (7,), torch.float32)
    assert more.data_ptr() != first.data_ptr()
    assert scratch("a", (2, 3), torch.float32).data_ptr() == more.data_ptr()
    assert scratch("a", (2,), torch.float64).dtype == torch.float64


def test_machines_by_their_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)

    class Features(dict[str, bool]):
        def flatten(self) -> str:
            return ",".join(self)

    def found(processor: str, *names: str) -> Machine | None:
        monkeypatch.setattr(llvm.platform, "machine", lambda: processor)
        monkeypatch.setattr(llvm.llvm, "get_host_cpu_features", lambda: Features(dict.fromkeys(names, True)))
        return llvm.this_machine.__wrapped__()

    def shape(machine: Machine | None) -> tuple[int, int] | None:
        return None if machine is None else (machine.vector_bytes, machine.registers)

    assert shape(found("x86_64", "avx", "avx2", "fma", "avx512f")) == (64, 32)
    assert shape(found("AMD64", "avx", "avx2", "fma")) == (32, 16)
    assert shape(found("x86_64", "sse2")) is None
    assert not found("x86_64", "avx512f", "avx512bw").pairs
    assert found("x86_64", "avx512f", "avx512bf16").pairs
    assert shape(found("arm64", "neon")) == (16, 32)
