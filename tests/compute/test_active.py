"""`active`: a dense layer's outputs and gradients, from its active neurons alone, for every width of vector."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from compute.machines import machine_seen_by, needs_instructions
from compute.problems import TOLERANCE
from support import relative_error
from torch import Tensor

from switchable.compute.call import FFNWeights
from switchable.compute.cpu.active import active as module
from switchable.compute.cpu.active import library as active_library
from switchable.compute.cpu.active.active import active, has_active
from switchable.compute.estimate import expert_mass

pytestmark = needs_instructions


@dataclass(frozen=True)
class Case:
    tokens: int = 29
    width: int = 64
    neurons: int = 45
    shift: float = -1.0  # of the bias: how few are active
    bias: bool = True
    gated: bool = False
    activation: str = "relu"
    stored: str = (
        "conv"  # which of the weights is a transposed view: conv (up), linear (down), neurons (none)
    )
    strided: bool = False


CASES = {
    "odd sizes": Case(),
    "one vector": Case(width=16),
    "three vectors": Case(width=48),
    "squared": Case(activation="relu2"),
    "no bias": Case(bias=False),
    "gated": Case(gated=True),
    "gated, squared, no bias, strided input": Case(
        gated=True, activation="relu2", bias=False, shift=0.0, strided=True
    ),
    "gated, several chunks": Case(gated=True, tokens=1300),
    "stored as nn.Linear": Case(stored="linear"),
    "stored by neuron": Case(stored="neurons"),
    "strided input": Case(strided=True),
    "one token": Case(tokens=1),
    "no token": Case(tokens=0),
    "nothing active": Case(shift=-100.0),
    "all active": Case(shift=100.0),
    "one neuron": Case(neurons=1, shift=0.0),
    "several chunks": Case(tokens=1300),
}


machine = machine_seen_by(module)


def leaves(case: Case, dtype: torch.dtype, exact: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def leaf(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = (torch.randn(*size, generator=generator) * scale + shift).to(dtype)
        return (values.double() if exact else values).requires_grad_()

    width, neurons = case.width, case.neurons
    up, down = ((width, neurons) if case.stored == kind else (neurons, width) for kind in ("conv", "linear"))
    found = {
        "x": leaf(case.tokens, width * (1 + case.strided)),
        "up": leaf(*up, scale=width**-0.5),
        "down": leaf(*down, scale=neurons**-0.5),
    }
    found |= {"bias": leaf(neurons, shift=case.shift)} if case.bias else {}
    found |= {"gate": leaf(*up, scale=width**-0.5)} if case.gated else {}
    return found | ({"gate_bias": leaf(neurons, shift=case.shift)} if case.gated and case.bias else {})


def weights_of(case: Case, found: dict[str, Tensor]) -> FFNWeights:
    up, down, gate = found["up"], found["down"], found.get("gate")
    transposed = case.stored == "conv"
    return FFNWeights(
        up.t() if transposed else up,
        down.t() if case.stored == "linear" else down,
        found.get("bias"),
        gate.t() if gate is not None and transposed else gate,
        found.get("gate_bias"),
    )


def dense(case: Case, found: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    weights, x_TD = weights_of(case, found), found["x"][:, :: 1 + case.strided]
    hidden_TF = weights.activations(x_TD, case.activation)
    return hidden_TF @ weights.down_FD, hidden_TF


def with_gradients(y_TD: Tensor, found: dict[str, Tensor]) -> dict[str, Tensor]:
    dy_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(2)).to(y_TD.dtype)
    return {
        "y": y_TD,
        **dict(zip(found, torch.autograd.grad(y_TD, list(found.values()), dy_TD), strict=True)),
    }


def ours(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    found = leaves(case, dtype)
    out = active(found["x"][:, :: 1 + case.strided], weights_of(case, found), case.activation)
    return with_gradients(out.y_TD, found)


def assert_equals_dense(case: Case, dtype: torch.dtype) -> None:
    exact = leaves(case, dtype, exact=True)
    true, got = with_gradients(dense(case, exact)[0], exact), ours(case, dtype)
    for name, wanted in true.items():
        assert got[name].shape == wanted.shape, name
        error = relative_error(got[name], wanted)
        assert error < TOLERANCE[dtype], f"relative error {error:.1e} in {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.usefixtures("machine")
def test_equals_the_dense_layer(case: Case, dtype: torch.dtype) -> None:
    assert_equals_dense(case, dtype)


def test_several_blocks_of_neurons_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tokens=700)
    whole = ours(case, torch.float32)
    monkeypatch.setattr(active_library, "BLOCK_BYTES", 7 * case.width * 4)
    assert_equals_dense(case, torch.float32)
    for name, value in ours(case, torch.float32).items():
        assert torch.equal(value, whole[name]), name


def test_threads_do_not_change_a_bit() -> None:
    case, before = Case(tokens=1300), torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ours(case, torch.float32))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("gated", [False, True])
def test_counts_what_is_active_and_adds_up_each_experts_mass(gated: bool) -> None:
    case = Case(tokens=600, neurons=40, gated=gated)
    found = leaves(case, torch.float64)
    out = active(found["x"], weights_of(case, found), case.activation, num_experts=5)
    _, hidden_TF = dense(case, found)
    assert out.entries == int((hidden_TF != 0).sum())
    assert out.mass_TE is not None
    assert not out.mass_TE.requires_grad
    wanted_TE = expert_mass(hidden_TF, weights_of(case, found).down_FD, 5)  # in float32
    torch.testing.assert_close(out.mass_TE.float(), wanted_TE)


@pytest.mark.parametrize("gated", [False, True])
def test_a_penalty_is_that_on_the_amount_of_the_activations(gated: bool) -> None:
    case = Case(gated=gated)
    found = leaves(case, torch.float64)
    y_TD, hidden_TF = dense(case, found)
    loss = y_TD.square().sum() + 0.3 * hidden_TF.abs().sum()
    wanted = torch.autograd.grad(loss, list(found.values()))
    ours_TD = active(found["x"], weights_of(case, found), case.activation, penalty=lambda: 0.3).y_TD
    torch.testing.assert_close(torch.autograd.grad(ours_TD.square().sum(), list(found.values())), wanted)


def test_a_number_that_is_none_reaches_the_output() -> None:
    found = leaves(Case(), torch.float32)
    with torch.no_grad():
        found["x"][3, 5] = torch.nan
    y_TD = active(found["x"], weights_of(Case(), found), "relu").y_TD
    assert y_TD[3].isnan().all()
    assert y_TD[[0, 1, 2, 4]].isfinite().all()


def test_where_there_are_no_loops() -> None:
    x_TD, weights = torch.zeros(4, 64), weights_of(Case(), leaves(Case(), torch.float32))
    assert has_active(x_TD, weights, "relu")
    assert not has_active(x_TD, weights, "gelu")
    assert not has_active(x_TD.bfloat16(), weights, "relu")
    assert not has_active(x_TD.double(), weights, "relu")
    assert has_active(x_TD, replace(weights, gate_FD=weights.up_FD), "relu")
    assert not has_active(torch.zeros(4, 61), weights, "relu")
    with torch.autocast("cpu", torch.float16):
        assert not has_active(x_TD, weights, "relu")
