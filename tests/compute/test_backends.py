"""Every way of computing the experts computes what the reference computes: outputs and all gradients, odd sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compute.problems import TOLERANCE, Case, assert_equals_reference, outcome, problem, relative_error

from switchable.compute.call import ExpertCall, FFNWeights
from switchable.compute.choose import BACKENDS, choose, expert_ffn
from switchable.compute.cpu.decode import decode
from switchable.compute.cpu.llvm import this_machine
from switchable.errors import InputError

PLAIN = Case()
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
}


@pytest.mark.parametrize("backend", ["sorted", "masked", "reference", "auto"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_reference(case: Case, backend: str) -> None:
    if backend != "auto" and BACKENDS[backend].supports(problem(case).call) is not None:
        with pytest.raises(InputError, match=f"backend '{backend}' .*use 'auto'"):
            problem(case).run(backend)
        return
    assert_equals_reference(case, backend)


@pytest.mark.parametrize("backend", ["sorted", "decode", "masked", "auto"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_reference_without_gradients(case: Case, backend: str) -> None:
    with torch.no_grad():
        if backend != "auto" and BACKENDS[backend].supports(problem(case).call) is not None:
            return
        got, true = problem(case).run(backend), problem(case, exact=True).run("reference")
    assert got.shape == true.shape
    assert got.dtype == case.dtype
    assert relative_error(got, true) < TOLERANCE[case.dtype]


LARGE = Case(tokens=128, width=64, neurons=32, experts=8)
NAMES = {  # what `auto` is for a call: by hand, from the rule
    "training": (LARGE, True, "fused"),
    "training, thick experts": (replace(LARGE, neurons=512), True, "sorted"),
    "training, bfloat16": (replace(LARGE, dtype=torch.bfloat16, tokens=2048), True, "sorted"),
    "training, few tokens": (replace(LARGE, tokens=8), True, "masked"),
    "training, many tokens, odd width": (replace(LARGE, width=63, tokens=4096), True, "sorted"),
    "training, gelu": (replace(LARGE, activation="gelu", tokens=4096), True, "reference"),
    "training, gated": (replace(LARGE, gated=True), True, "reference"),
    "prefill": (LARGE, False, "fused"),
    "one token": (replace(LARGE, tokens=1), False, "decode"),
    "63 tokens": (replace(LARGE, tokens=63), False, "decode"),
    "64 tokens": (replace(LARGE, tokens=64), False, "fused"),
    "one token, gelu": (replace(LARGE, tokens=1, activation="gelu"), False, "decode"),
    "16 tokens, gelu": (replace(LARGE, tokens=16, activation="gelu"), False, "masked"),
}


@pytest.mark.skipif(this_machine() is None, reason="no compiled loops for this processor")
@pytest.mark.parametrize(("case", "learns", "name"), NAMES.values(), ids=NAMES.keys())
def test_what_auto_chooses(case: Case, learns: bool, name: str) -> None:
    with torch.set_grad_enabled(learns):
        assert choose(problem(case).call).name == name
        if name != "decode" and not learns:
            with torch.autocast("cpu", torch.bfloat16):
                assert choose(problem(case).call).name in ("sorted", "masked", "reference")


REASONS = {  # of each backend, calls that it cannot do
    "sorted": ({"gated": True}, "does not compute gated FFNs"),
    "fused": ({"dtype": torch.bfloat16}, "multiplies float32 and float64, not bfloat16"),
    "fused, width": ({"width": 13}, "needs a d_model that is a multiple of"),
    "fused, activation": ({"activation": "gelu"}, "computes the activations relu and relu2, not gelu"),
    "decode": ({}, "computes no gradients"),
    "grouped_mm": ({"width": 13}, "."),
    "triton": ({"activation": "gelu"}, "."),
}


@pytest.mark.skipif(this_machine() is None, reason="no compiled loops for this processor")
@pytest.mark.parametrize("key", REASONS)
def test_a_backend_that_cannot_do_a_call_says_why_and_no_other_does_it(key: str) -> None:
    name, (change, reason) = key.partition(",")[0], REASONS[key]
    with pytest.raises(InputError, match=f"backend '{name}' .*{reason}.*use 'auto', which takes '"):
        problem(replace(LARGE, **change)).run(name)  # type: ignore[arg-type]


def test_asking_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr("switchable.compute.cpu.llvm.llvm.create_mcjit_compiler", fail)
    for case in (replace(LARGE, width=80, neurons=24), replace(LARGE, tokens=1, width=80)):
        for learns in (True, False):
            with torch.set_grad_enabled(learns):
                call = problem(case).call
                for backend in BACKENDS.values():
                    backend.supports(call)
                choose(call)


def test_the_table_is_short() -> None:
    assert len(BACKENDS) + 1 <= 8  # with `auto`


@pytest.mark.parametrize("backend", ["sorted", "decode"])
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
        first, second = outcome(found, "sorted"), outcome(found, "sorted")
        assert all(torch.equal(first[name], second[name]) for name in first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["sorted", "grouped_mm", "auto"])
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
@pytest.mark.parametrize("backend", ["sorted", "auto"])
@pytest.mark.parametrize("grad", [True, False])
def test_under_torch_compile(backend: str, grad: bool) -> None:
    found = problem(replace(PLAIN, tokens=2))
    compiled = torch.compile(found.run, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(backend), found.run("reference"))


@pytest.mark.parametrize("leaf", ["x", "up", "down", "bias"])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_the_gradient_of_one_tensor_alone(leaf: str, activation: str) -> None:
    found = problem(replace(PLAIN, activation=activation))
    for name, tensor in found.leaves.items():
        tensor.requires_grad_(name == leaf)
    y_TD, true_TD = found.run("sorted"), found.run("reference")
    # The gradient of a sum has strides of zero.
    ours, true = (torch.autograd.grad(y.sum(), found.leaves[leaf])[0] for y in (y_TD, true_TD))
    torch.testing.assert_close(ours, true)


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    found = problem(PLAIN)
    (grad,) = torch.autograd.grad(found.run("sorted").square().sum(), found.leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_neurons_that_all_stay_silent_give_zero() -> None:
    found = problem(Case(tokens=1, width=64, neurons=128, experts=64, chosen=40))
    with torch.no_grad():
        found.leaves["bias"].fill_(-1e6)
        assert torch.equal(found.run("decode"), torch.zeros(1, 64))
        assert torch.equal(found.run("sorted"), torch.zeros(1, 64))


def test_experts_too_large_to_gather_are_multiplied_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (0, 2**30):
        monkeypatch.setattr(decode, "COPIED_UP_BYTES", limit)
        monkeypatch.setattr(decode, "COPIED_DOWN_BYTES", limit)
        for activation in ("relu", "gelu"):
            for bias in (True, False):
                case = Case(tokens=2, experts=16, activation=activation, bias=bias)
                with torch.no_grad():
                    torch.testing.assert_close(problem(case).run("decode"), problem(case).run("reference"))


def test_no_gradient_reaches_an_expert_that_was_not_chosen() -> None:
    grads = outcome(problem(replace(PLAIN, routing="late", chosen=2)), "sorted")
    for name in ("up", "down", "bias"):
        per_expert = grads[name].view(5, -1).abs().amax(1)
        assert (per_expert[:2] == 0).all()
        assert (per_expert[2:] > 0).all()


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    weights = FFNWeights(torch.zeros(4, 2), torch.zeros(4, 2))
    call = ExpertCall(torch.zeros(1, 2), weights, torch.zeros(1, 1, dtype=torch.long), 2, "relu")
    known = "auto, reference, fused, sorted, decode, masked, grouped_mm, triton"
    with pytest.raises(InputError, match=f"'sortd' is not known; use one of {known}; did you mean 'sorted'"):
        expert_ffn(call, "sortd")
