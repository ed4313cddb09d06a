"""`fused`: compiled loops for every width of vector equal the reference, whatever the threads and chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from compute.machines import machine_seen_by, needs_instructions
from compute.problems import TOLERANCE, Case, assert_equals_reference, outcome, problem
from support import relative_error

from switchable.compute.cpu import limits, tasks
from switchable.compute.cpu.experts import fused, packing
from switchable.compute.cpu.experts.dot import MOST_VECTORS
from switchable.compute.cpu.experts.packing import Packing, multiplied
from switchable.compute.cpu.llvm import Machine
from switchable.errors import InputError

pytestmark = needs_instructions
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


machine = machine_seen_by(fused, limits)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_columns_copied_in_two_pieces(
    machine: Machine, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gated: the loops that copy are the same, and only here do they add to what another call has written."""
    case = replace(PLAIN, neurons=28, width=128, tokens=40, dtype=dtype, gated=True)
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
        monkeypatch.setattr(Packing, "chunk_tokens", chunk)
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
