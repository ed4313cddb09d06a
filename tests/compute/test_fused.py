"""`fused`: compiled loops for every width of vector equal the reference, whatever the threads and chunks."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from compute.problems import TOLERANCE, Case, assert_equals_reference, outcome, problem, relative_error
from llvmlite import ir

from switchable.compute.cpu import code, limits, llvm, tasks
from switchable.compute.cpu.code import Code
from switchable.compute.cpu.experts import fused, packing
from switchable.compute.cpu.experts import library as fused_library
from switchable.compute.cpu.experts.dot import MOST_VECTORS, _split
from switchable.compute.cpu.experts.library import library
from switchable.compute.cpu.experts.packing import Packing, multiplied
from switchable.compute.cpu.experts.reorder import write_reorder
from switchable.compute.cpu.llvm import POINTER, Machine, Writer, this_machine
from switchable.errors import InputError

pytestmark = pytest.mark.skipif(
    this_machine() is None, reason="a processor without multiply-add instructions"
)
HERE = this_machine()
assert HERE is not None
NARROWER = {
    64: HERE,
    32: replace(HERE, vector_bytes=32, registers=16),
    16: replace(HERE, vector_bytes=16, registers=32),
}
MACHINES = {bytes_: machine for bytes_, machine in NARROWER.items() if bytes_ <= HERE.vector_bytes}
PLAIN = Case(width=64)
CASES = {
    "odd sizes": PLAIN,
    "one vector": replace(PLAIN, width=16),
    "three vectors": replace(PLAIN, width=48),
    "no bias": replace(PLAIN, bias=False),
    "relu2": replace(PLAIN, activation="relu2"),
    "relu2, no bias": replace(PLAIN, activation="relu2", bias=False),
    "stored as nn.Linear": replace(PLAIN, stored="linear"),
    "stored as Conv1D": replace(PLAIN, stored="conv"),
    "strided input": replace(PLAIN, strided=True),
    "one token": replace(PLAIN, tokens=1),
    "no token": replace(PLAIN, tokens=0),
    "an expert with no token": replace(PLAIN, routing="late", chosen=2),
    "all tokens on one expert": replace(PLAIN, routing="one", chosen=1),
    "one expert": replace(PLAIN, experts=1, chosen=1),
    "all experts": replace(PLAIN, chosen=5),
    "several chunks": replace(PLAIN, tokens=1300),
    "experts of one neuron": replace(PLAIN, neurons=1),
    "experts of eight neurons": replace(PLAIN, neurons=8, tokens=200),
    "copied columns": replace(PLAIN, neurons=26, width=128, tokens=1300),
    "copied columns, hardly a tile of tokens": replace(PLAIN, neurons=26, width=128, tokens=9),
}
GATED = {
    f"gated, {name}": replace(CASES[name], gated=True)
    for name in (
        *("odd sizes", "no bias", "relu2", "no token", "an expert with no token", "all tokens on one expert"),
        *("several chunks", "experts of one neuron", "copied columns"),
    )
}


@pytest.fixture(params=MACHINES.values(), ids=[f"{bytes_} bytes" for bytes_ in MACHINES])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with narrower vectors than this one has, which runs the same instructions."""
    found: Machine = request.param
    monkeypatch.setattr(fused, "this_machine", lambda: found)
    monkeypatch.setattr(limits, "this_machine", lambda: found)
    return found


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # bfloat16: `test_half.py`
@pytest.mark.parametrize("case", [*CASES.values(), *GATED.values()], ids=[*CASES, *GATED])
@pytest.mark.usefixtures("machine")
def test_equals_the_reference(case: Case, dtype: torch.dtype) -> None:
    assert_equals_reference(replace(case, dtype=dtype), "fused")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_experts_of_several_vectors(machine: Machine, dtype: torch.dtype) -> None:
    """Of more than a tile has, the last one not full."""
    neurons = (MOST_VECTORS + 2) * machine.vector_bytes // dtype.itemsize - 1
    assert_equals_reference(replace(PLAIN, neurons=neurons, tokens=200, dtype=dtype), "fused")


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_columns_copied_in_two_pieces(
    machine: Machine, dtype: torch.dtype, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(PLAIN, neurons=28, width=128, tokens=40, dtype=dtype, gated=gated)
    sizes = Packing(case.width, case.neurons, multiplied(case.width, case.neurons, dtype, machine), machine)
    block = case.neurons // sizes.terms * sizes.scatter_columns * machine.vector_bytes
    monkeypatch.setattr(packing, "FIRST_LEVEL_CACHE", block - 1)
    assert sizes.scatter_pieces == 2
    assert_equals_reference(case, "fused")


@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("neurons", [8, 12, 24, 96])
@pytest.mark.parametrize("width", [48, 96])
def test_gated_is_as_exact_as_the_dense_layer(width: int, neurons: int, activation: str) -> None:
    """In float32; `test_half.py` asks the same of bfloat16."""
    case = Case(301, width, neurons, experts=8, activation=activation, gated=True)
    true = outcome(problem(case, exact=True), "reference")
    dense, ours = (outcome(problem(case), backend) for backend in ("masked", "fused"))
    for name, wanted in true.items():
        assert relative_error(ours[name], wanted) <= 1.5 * relative_error(dense[name], wanted), name


@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gate_of_zero_is_closed(dtype: torch.dtype, activation: str) -> None:
    """Every third neuron's gate is exactly zero: neither it nor what it lets through gets a gradient, as in torch."""
    found = problem(Case(65, 64, 12, dtype=dtype, activation=activation, gated=True))
    with torch.no_grad():
        for name in ("gate", "gate_bias"):
            found.leaves[name][::3] = 0
    got, true = (outcome(found, backend) for backend in ("fused", "masked"))
    for name in ("up", "down", "bias", "gate", "gate_bias"):
        assert got[name][::3].eq(0).all()
        assert true[name][::3].eq(0).all()
        assert got[name][1::3].ne(0).any()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_chunks_change_no_bit(
    dtype: torch.dtype, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tokens=1100, width=64, neurons=24, experts=8, dtype=dtype, gated=gated)
    true = outcome(problem(case), "fused")
    for threads, chunk, openmp in (
        (2, 512, True),
        (2, 512, True),
        (1, 512, True),
        (2, 7, True),
        (2, 100, False),
    ):
        torch.set_num_threads(threads)
        monkeypatch.setattr(fused_library, "CHUNK_TOKENS", chunk)
        if not openmp:
            monkeypatch.setattr(tasks, "_openmp", lambda: None)
        got = outcome(problem(case), "fused")
        assert all(torch.equal(got[name], true[name]) for name in true), (threads, chunk, openmp)


@pytest.mark.parametrize(
    ("leaf", "gated"),
    [
        *((leaf, False) for leaf in ("x", "up", "down", "bias")),
        *((leaf, True) for leaf in ("x", "up", "down", "bias", "gate", "gate_bias")),
    ],
)
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_the_gradient_of_one_tensor_alone(leaf: str, gated: bool, activation: str) -> None:
    found = problem(replace(PLAIN, activation=activation, gated=gated))
    for name, tensor in found.leaves.items():
        tensor.requires_grad_(name == leaf)
    ours, true = (
        torch.autograd.grad(found.run(name).sum(), found.leaves[leaf])[0] for name in ("fused", "reference")
    )
    assert relative_error(ours, true) < TOLERANCE[torch.float32]


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    found = problem(PLAIN)
    (grad,) = torch.autograd.grad(found.run("fused").square().sum(), found.leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_what_memory_held_before_is_in_no_gradient(gated: bool) -> None:
    found = problem(
        replace(PLAIN, routing="late", chosen=2, gated=gated)
    )  # experts without a token among them
    true = outcome(found, "reference")
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.zeros(1).new_empty(9).isnan().all()
        got = outcome(problem(found.case), "fused")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
    for name in true:  # a NaN is not less than anything
        assert relative_error(got[name], true[name]) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_nan_stays_nan(gated: bool) -> None:
    found = problem(replace(PLAIN, gated=gated))
    with torch.no_grad():
        found.leaves["x"][3] = torch.nan
        y_TD = found.run("fused")
    assert y_TD[3].isnan().all()
    assert not y_TD[:3].isnan().any()


@pytest.mark.parametrize(("bad", "named"), [(5, "0 to 5"), (-1, "-1 to 4")])
def test_an_id_outside_the_experts_is_refused(bad: int, named: str) -> None:
    found = problem(replace(PLAIN, tokens=40))
    found.ids[3, 1] = bad
    with pytest.raises(InputError, match=rf"expert ids must be in 0\.\.4; found {named}"):
        found.run("fused")


def test_pairs_stand_by_chunk_and_then_by_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_library, "CHUNK_TOKENS", 2)
    loops = library(16, 4, False, torch.float32, HERE)
    pairs = loops.sort(torch.tensor([[2, 0], [0, 1], [1, 2]]), 3)
    assert pairs.chunks == 2
    # Tokens 0 and 1: expert 0 has both, expert 1 token 1, expert 2 token 0; token 2 has experts 1 and 2.
    assert pairs.tokens_P[:6].tolist() == [0, 1, 1, 0, 2, 2]
    assert pairs.order_P.tolist() == [1, 2, 3, 0, 4, 5]
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


def test_large_experts_take_no_longer_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(fused_library, "Code", lambda module, _: written.append(len(str(module))))
    for neurons in (344, 1024):
        fused_library.Library(Packing(64, neurons, torch.float32, HERE), gated=False)
    small, large = written
    assert large < 1.1 * small


def test_weights_are_reordered_as_the_loops_read_them() -> None:
    def reordered(neurons: int, width: int, lanes: int) -> list[float]:
        packing = Packing(width, neurons, torch.float32, replace(HERE, vector_bytes=4 * lanes))
        module = ir.Module("reorder")
        write_reorder(Writer(module, "reorder", [POINTER, POINTER], wide=False, lanes=lanes), packing)
        built = Code(module, HERE)
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
    with torch.no_grad():
        problem(Case(width=80, neurons=3)).run("fused")
    # Three functions of eight: pairs in order, `up` with a bias, `down`.
    assert [text.split('"')[1] for text in found] == ["sort", "dot_bias_relu", "scatter"]
    problem(Case(width=80, neurons=3)).run("fused").sum().backward()
    assert len(found) == 6  # the slope of ReLU, and the gradients of weights and bias


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


@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_calls_do_not_write_over_each_others_results(activation: str, gated: bool) -> None:
    """Memory is kept from call to call: what a call returned, or saved for its backward pass, must not lie there."""
    first = problem(replace(PLAIN, activation=activation, gated=gated))
    other = problem(replace(PLAIN, activation=activation, gated=gated))
    with torch.no_grad():
        other.leaves["x"].mul_(-3)
    y_TD, other_TD = first.run("fused"), other.run("fused")
    grads = torch.autograd.grad(y_TD.sum(), list(first.leaves.values()))
    torch.autograd.grad(other_TD.sum(), list(other.leaves.values()))
    true_TD = first.run("reference")
    true = torch.autograd.grad(true_TD.sum(), list(first.leaves.values()))
    for ours, wanted in zip((y_TD, *grads), (true_TD, *true), strict=True):
        assert relative_error(ours, wanted) < TOLERANCE[torch.float32]


def test_machines_by_their_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
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
