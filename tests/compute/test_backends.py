"""Every way of computing the experts computes what the reference computes: outputs and all gradients, odd sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compute.problems import TOLERANCE, Case, assert_equals_eager, outcome, problem, relative_error

from switchable.compute.choose import IMPLEMENTATIONS, FFNWeights, expert_ffn
from switchable.errors import InputError

PLAIN = Case()
CASES = {
    "odd sizes": PLAIN,
    "unit gates": replace(PLAIN, gates="unit"),
    "no gates, no bias": replace(PLAIN, gates="none", bias=False),
    "relu2": replace(PLAIN, activation="relu2"),
    "relu2, unit gates": replace(PLAIN, activation="relu2", gates="unit"),
    "gelu": replace(PLAIN, activation="gelu"),
    "gated silu": replace(PLAIN, activation="silu", gated=True),
    "gated relu": replace(PLAIN, gated=True, gates="unit"),
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
}


@pytest.mark.parametrize("implementation", ["sorted", "decode", "masked", "batched_mm", "eager"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_reference(case: Case, implementation: str) -> None:
    if implementation == "batched_mm" and case.tokens == 0:
        pytest.skip("transformers' forward takes no empty batch")
    assert_equals_eager(case, implementation)


@pytest.mark.parametrize("implementation", ["sorted", "decode", "masked"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_reference_without_gradients(case: Case, implementation: str) -> None:
    with torch.no_grad():
        got, true = problem(case).run(implementation), problem(case, exact=True).run("eager")
    assert got.shape == true.shape
    assert got.dtype == case.dtype
    assert relative_error(got, true) < TOLERANCE[case.dtype]


GROUPED = Case(tokens=19, width=16, neurons=8)


@pytest.mark.parametrize(
    "case",
    [GROUPED, replace(GROUPED, gated=True, activation="silu"), replace(GROUPED, bias=False, gates="none")],
    ids=["plain", "gated", "no gates, no bias"],
)
def test_grouped_mm_equals_the_reference(case: Case) -> None:
    assert_equals_eager(case, "grouped_mm")


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"neurons": 7}, {"width": 13}], ids=str)
def test_grouped_mm_says_what_it_cannot_multiply(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"grouped_mm cannot multiply d_model=.*use 'sorted' or 'eager'"):
        problem(replace(GROUPED, **change)).run("grouped_mm")


@pytest.mark.parametrize("implementation", ["sorted", "decode"])
@pytest.mark.parametrize("threads", [1, 2])
def test_repeated_calls_give_identical_bits(implementation: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = Case(tokens=1 if implementation == "decode" else 900, width=64, neurons=32, experts=8)
        found = problem(case)
        if implementation == "decode":
            with torch.no_grad():
                assert torch.equal(found.run("decode"), found.run("decode"))
            return
        first, second = outcome(found, "sorted"), outcome(found, "sorted")
        assert all(torch.equal(first[name], second[name]) for name in first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", ["sorted", "decode", "torch_grouped_mm"])
def test_autocast_computes_in_the_dtype_of_a_linear_layer(implementation: str) -> None:
    found = problem(replace(GROUPED, gates="unit"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD = found.run(implementation)
        grads = torch.autograd.grad(y_TD.sum(), list(found.leaves.values()))
    true = problem(replace(GROUPED, gates="unit"), exact=True).run("eager")
    assert y_TD.dtype == torch.float32
    assert 1e-6 < relative_error(y_TD, true) < TOLERANCE[torch.bfloat16]
    assert all(grad.dtype == torch.float32 for grad in grads)


# torch.compile looks at `.grad` of what a graph break hands over, and hides the warning unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("implementation", ["sorted", "decode", "auto"])
@pytest.mark.parametrize("grad", [True, False])
def test_under_torch_compile(implementation: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    autotune = "switchable.compute.autotune.resolve"
    monkeypatch.setattr(autotune, lambda *_args, **_kw: "sorted")
    found = problem(replace(PLAIN, tokens=2))
    compiled = torch.compile(found.run, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(implementation), found.run("eager"))


@pytest.mark.parametrize("leaf", ["x", "up", "down", "bias", "gates"])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_the_gradient_of_one_tensor_alone(leaf: str, activation: str) -> None:
    found = problem(replace(PLAIN, activation=activation))
    for name, tensor in found.leaves.items():
        tensor.requires_grad_(name == leaf)
    y_TD, true_TD = found.run("sorted"), found.run("eager")
    # The gradient of a sum has strides of zero.
    ours, true = (torch.autograd.grad(y.sum(), found.leaves[leaf])[0] for y in (y_TD, true_TD))
    torch.testing.assert_close(ours, true)


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    found = problem(PLAIN)
    (grad,) = torch.autograd.grad(found.run("sorted").square().sum(), found.leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_neurons_that_all_stay_silent_give_zero() -> None:
    found = problem(Case(tokens=1, width=64, neurons=128, experts=64, chosen=40, gates="none"))
    with torch.no_grad():
        found.leaves["bias"].fill_(-1e6)
        assert torch.equal(found.run("decode"), torch.zeros(1, 64))
        assert torch.equal(found.run("sorted"), torch.zeros(1, 64))


def test_experts_too_large_to_gather_are_multiplied_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    decode = sys.modules["switchable.compute.cpu.decode.decode"]
    for limit in (0, 2**30):
        monkeypatch.setattr(decode, "COPIED_UP_BYTES", limit)
        monkeypatch.setattr(decode, "COPIED_DOWN_BYTES", limit)
        for activation in ("relu", "gelu"):
            for bias in (True, False):
                case = Case(tokens=2, experts=16, activation=activation, bias=bias)
                with torch.no_grad():
                    torch.testing.assert_close(problem(case).run("decode"), problem(case).run("eager"))


def test_no_gradient_reaches_an_expert_that_was_not_chosen() -> None:
    grads = outcome(problem(replace(PLAIN, routing="late", chosen=2)), "sorted")
    for name in ("up", "down", "bias"):
        per_expert = grads[name].view(5, -1).abs().amax(1)
        assert (per_expert[:2] == 0).all()
        assert (per_expert[2:] > 0).all()


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    weights = FFNWeights(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(
        InputError, match=r"'sortd' is not known; use one of eager, fused, sorted, .*did you mean"
    ):
        expert_ffn(
            torch.zeros(1, 2),
            weights,
            torch.zeros(1, 1, dtype=torch.long),
            num_experts=2,
            implementation="sortd",
        )
    assert set(IMPLEMENTATIONS) >= {"eager", "grouped_mm", "batched_mm", "auto"}
