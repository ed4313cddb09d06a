"""Every backend computes what the reference computes, outputs and all gradients, or says why it cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compute.problems import (
    TOLERANCE,
    Case,
    assert_equals_reference,
    assert_mixed_dtypes_need_autocast,
    outcome,
    problem,
    relative_error,
)

from switchable.compute.choose import BACKENDS, expert_ffn
from switchable.compute.cpu.decode import decode
from switchable.errors import InputError

PLAIN = Case()
WIDE = Case(width=64, neurons=8)
"""Sizes that every backend for the CPU has code for."""
CASES = {
    "odd sizes": PLAIN,
    "no bias": replace(PLAIN, bias=False),
    "relu2": replace(PLAIN, activation="relu2"),
    "gelu": replace(PLAIN, activation="gelu"),
    "gated silu": replace(PLAIN, activation="silu", gated=True),
    "gated relu": replace(PLAIN, gated=True),
    "stored as nn.Linear": replace(PLAIN, stored="linear"),
    "stored as Conv1D": replace(PLAIN, stored="conv"),
    "strided input": replace(PLAIN, strided=True),
    "one token": replace(PLAIN, tokens=1),
    "two tokens": replace(PLAIN, tokens=2, chosen=2, experts=8),
    "no token": replace(PLAIN, tokens=0),
    "an expert with no token": replace(PLAIN, routing="late", chosen=2),
    "all tokens on one expert": replace(PLAIN, routing="one", chosen=1),
    "one expert": replace(PLAIN, experts=1, chosen=1),
    "all experts": replace(PLAIN, chosen=5),
    "many tokens": replace(PLAIN, tokens=700),
    "float64": replace(PLAIN, dtype=torch.float64),
    "bfloat16": replace(PLAIN, dtype=torch.bfloat16),
    "float16": replace(PLAIN, dtype=torch.float16),
    "whole vectors": WIDE,
    "whole vectors, gated silu": replace(WIDE, activation="silu", gated=True),
    "whole vectors, gated relu": replace(WIDE, gated=True),
    "whole vectors, no bias": replace(WIDE, bias=False),
    "whole vectors, many tokens": replace(WIDE, tokens=700),
    "fewer experts": replace(PLAIN, ragged=True),
    "fewer experts, gated relu": replace(PLAIN, ragged=True, gated=True),
    "fewer experts, one token": replace(PLAIN, ragged=True, tokens=1, experts=8),
    "whole vectors, fewer experts": replace(WIDE, ragged=True),
    "whole vectors, fewer experts, gated relu": replace(WIDE, ragged=True, gated=True),
    "whole vectors, fewer experts, bfloat16": replace(WIDE, ragged=True, dtype=torch.bfloat16, tokens=90),
    "whole vectors, fewer experts, many tokens": replace(WIDE, ragged=True, tokens=1300),
    "whole vectors, fewer experts, on one": replace(WIDE, ragged=True, tokens=90, routing="one"),
}
REFUSALS = {
    ("fused", "gelu"): "computes the activations relu and relu2, not gelu",
    ("fused", "whole vectors, gated silu"): "computes the activations relu and relu2, not silu",
    ("decode", "whole vectors"): "computes no gradients",
    ("grouped_mm", "odd sizes"): "needs multiples of 4, and d_model is 13, neurons per expert 7",
    ("grouped_mm", "float64"): "float64",
    (
        "grouped_mm",
        "whole vectors, fewer experts",
    ): "computes no gradients where tokens have different numbers",
    ("triton", "whole vectors"): "CUDA",
}
"""Whole sentences of some backends; that every other refusal is one is tested below."""


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_reference_or_refuses(case: Case, backend: str) -> None:
    reason = None if backend == "auto" else BACKENDS[backend].supports(problem(case).call)
    if reason is None:
        assert_equals_reference(case, backend)
        return
    with pytest.raises(InputError) as refusal:
        problem(case).run(backend)
    assert str(refusal.value).startswith(f"backend {backend!r} {reason}; use 'auto', which takes '")


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_reference_without_gradients(case: Case, backend: str) -> None:
    found = problem(case)
    with torch.no_grad():
        if backend != "auto" and BACKENDS[backend].supports(found.call) is not None:
            pytest.skip("a refusal, which the test above looks at")
        got, true = found.run(backend), problem(case, exact=True).run("reference")
    assert got.shape == true.shape
    assert got.dtype == case.dtype
    assert relative_error(got, true) < TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    ("backend", "able"),
    [
        ("reference", set(CASES)),
        ("masked", set(CASES)),
        ("fused", {name for name in CASES if name != "gelu" and "silu" not in name}),
        ("grouped_mm", {name for name in CASES if name.startswith("whole") and "fewer" not in name}),
    ],
)
def test_what_each_backend_is_able_to_do(backend: str, able: set[str]) -> None:
    found = {name for name, case in CASES.items() if BACKENDS[backend].supports(problem(case).call) is None}
    assert found == able


def test_decode_is_for_tokens_without_gradients_that_leave_most_experts_alone() -> None:
    def reason(case: Case) -> str | None:
        return BACKENDS["decode"].supports(problem(case).call)

    few = replace(PLAIN, tokens=2, chosen=2, experts=8)
    with torch.no_grad():
        for case in (
            few,
            replace(few, gated=True),
            replace(few, activation="gelu"),
            replace(WIDE, tokens=64),
        ):
            assert reason(case) is None, case
        assert reason(replace(WIDE, tokens=65)) == (
            "reads the rows of chosen experts, and 65 tokens together choose most of them"
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert reason(few) == "does not compute under autocast"
    assert reason(few) == "computes no gradients"


@pytest.mark.parametrize(("names", "reason"), REFUSALS.items(), ids=str)
def test_a_backend_that_cannot_do_a_call_says_why(names: tuple[str, str], reason: str) -> None:
    backend, case = names
    if backend == "triton" and BACKENDS["triton"].supports(problem(CASES[case]).call) is None:
        pytest.skip("Triton's interpreter runs on the CPU")
    with pytest.raises(InputError, match=rf"^backend '{backend}' .*{reason}.*; use 'auto', which takes '"):
        problem(CASES[case]).run(backend)


def test_a_processor_without_loops_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchable.compute.cpu.limits.this_machine", lambda: None)
    with pytest.raises(InputError, match=r"'fused' needs a processor with .* 'auto', which takes 'masked'"):
        problem(replace(WIDE, tokens=70)).run("fused")
    assert_equals_reference(replace(WIDE, tokens=70), "auto")


def test_fused_wants_one_dtype_unless_autocast_converts_them() -> None:
    assert_mixed_dtypes_need_autocast(WIDE, BACKENDS["fused"])


def test_at_most_eight_names_and_an_unknown_one_is_answered_with_them() -> None:
    assert all(name == backend.name for name, backend in BACKENDS.items())
    assert len(BACKENDS) + 1 <= 8  # and `auto`
    known = "auto, reference, fused, decode, masked, grouped_mm, triton"
    with pytest.raises(InputError, match=rf"'fusd' is not known; use one of {known}.*did you mean 'fused'"):
        expert_ffn(problem(PLAIN).call, "fusd")


@pytest.mark.parametrize("backend", ["fused", "decode"])
@pytest.mark.parametrize("threads", [1, 2])
def test_repeated_calls_give_identical_bits(backend: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = Case(tokens=1 if backend == "decode" else 900, width=64, neurons=32, experts=8)
        found = problem(case)
        if backend == "decode":
            with torch.no_grad():
                assert torch.equal(found.run("decode"), found.run("decode"))
            return
        first, second = outcome(found, "fused"), outcome(found, "fused")
        assert all(torch.equal(first[name], second[name]) for name in first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["auto", "fused", "masked", "reference", "grouped_mm"])
def test_autocast_computes_in_the_dtype_of_a_linear_layer(backend: str) -> None:
    case = Case(tokens=19, width=16, neurons=8)
    found = problem(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD = found.run(backend)
        grads = torch.autograd.grad(y_TD.sum(), list(found.leaves.values()))
    true = problem(case, exact=True).run("reference")
    assert y_TD.dtype == torch.float32
    assert 1e-6 < relative_error(y_TD, true) < TOLERANCE[torch.bfloat16]
    assert all(grad.dtype == torch.float32 for grad in grads)


# torch.compile looks at `.grad` of what a graph break hands over, and hides the warning unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("case", [replace(PLAIN, tokens=2), replace(WIDE, tokens=70)], ids=["few", "many"])
@pytest.mark.parametrize("grad", [True, False])
def test_under_torch_compile(case: Case, grad: bool) -> None:
    found = problem(case)
    compiled = torch.compile(found.run, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for name in ("auto", *BACKENDS):
            # Where it is traced, torch's own product takes bfloat16 alone.
            if name != "grouped_mm" and (name == "auto" or BACKENDS[name].supports(found.call) is None):
                torch.testing.assert_close(compiled(name), found.run("reference"))


def test_decode_under_torch_compile() -> None:
    found = problem(replace(WIDE, tokens=2))
    with torch.no_grad():
        compiled = torch.compile(found.run, backend="aot_eager")
        torch.testing.assert_close(compiled("decode"), found.run("reference"))


@pytest.mark.parametrize("leaf", ["x", "up", "down", "bias"])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_the_gradient_of_one_tensor_alone(leaf: str, activation: str) -> None:
    found = problem(replace(PLAIN, activation=activation))
    for name, tensor in found.leaves.items():
        tensor.requires_grad_(name == leaf)
    y_TD, true_TD = found.run("fused"), found.run("reference")
    # The gradient of a sum has strides of zero.
    ours, true = (torch.autograd.grad(y.sum(), found.leaves[leaf])[0] for y in (y_TD, true_TD))
    torch.testing.assert_close(ours, true)


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    found = problem(PLAIN)
    (grad,) = torch.autograd.grad(found.run("fused").square().sum(), found.leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_neurons_that_all_stay_silent_give_zero() -> None:
    found = problem(Case(tokens=1, width=64, neurons=128, experts=64, chosen=40))
    with torch.no_grad():
        found.leaves["bias"].fill_(-1e6)
        assert torch.equal(found.run("decode"), torch.zeros(1, 64))
        assert torch.equal(found.run("fused"), torch.zeros(1, 64))


@pytest.mark.parametrize("limit", [0, 2**30])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_experts_too_large_to_gather_are_multiplied_where_they_are(
    limit: int, activation: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "COPIED_UP_BYTES", limit)
    monkeypatch.setattr(decode, "COPIED_DOWN_BYTES", limit)
    found = problem(Case(tokens=2, experts=16, activation=activation, bias=bias))
    with torch.no_grad():
        torch.testing.assert_close(found.run("decode"), found.run("reference"))


def test_no_gradient_reaches_an_expert_that_was_not_chosen() -> None:
    grads = outcome(problem(replace(PLAIN, routing="late", chosen=2)), "fused")
    for name in ("up", "down", "bias"):
        per_expert = grads[name].view(5, -1).abs().amax(1)
        assert (per_expert[:2] == 0).all()
        assert (per_expert[2:] > 0).all()
