"""`active` in bfloat16: as exact as torch's dense layer in it, with bfloat16 weights and under autocast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compute.test_active import Case, leaves, weights_of
from support import relative_error
from torch import Tensor
from torch.nn.functional import linear

from switchable.compute.cpu.active import active as module
from switchable.compute.cpu.active.active import active, has_active
from switchable.compute.cpu.llvm import Machine, this_machine

HERE = this_machine()
if HERE is None or not HERE.pairs:
    pytest.skip("a processor that multiplies no pairs of bfloat16", allow_module_level=True)
assert HERE is not None
MACHINES = {"as it is": HERE, "32 bytes": replace(HERE, vector_bytes=32, registers=16)}
PLAIN = Case(tokens=301, width=96, neurons=181)
CASES = {
    "odd sizes": PLAIN,
    "one token": replace(PLAIN, tokens=1),
    "no token": replace(PLAIN, tokens=0),
    "several chunks": replace(PLAIN, tokens=1301, width=64),
    "fifteen vectors of words": replace(PLAIN, width=480),
    "relu2": replace(PLAIN, activation="relu2"),
    "no bias": replace(PLAIN, bias=False, shift=0.0),
    "none active": replace(PLAIN, shift=-100.0),
    "all active": replace(PLAIN, shift=100.0),
    "gated": replace(PLAIN, gated=True),
    "gated, relu2, no bias": replace(PLAIN, gated=True, activation="relu2", bias=False, shift=0.0),
    "stored as nn.Linear": replace(PLAIN, stored="linear"),
    "stored by neuron": replace(PLAIN, stored="neurons"),
    "strided input": replace(PLAIN, strided=True),
}


def half(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """A case whose numbers are bfloat16's, whatever they are stored in."""
    found = leaves(case, torch.bfloat16)
    return {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in found.items()}


def outcome(way: str, case: Case, dtype: torch.dtype, *, autocast: bool = False) -> dict[str, Tensor]:
    """The output and all gradients, for a gradient of the output that bfloat16 has."""
    found = half(case, dtype)
    x_TD, weights = found["x"][:, :: 1 + case.strided], weights_of(case, found)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if way == "dense":
            y_TD = linear(weights.activations(x_TD, case.activation), weights.down_FD.t())
        else:
            assert has_active(x_TD, weights, case.activation)
            y_TD = active(x_TD, weights, case.activation).y_TD
            assert y_TD.dtype == dtype
    dy_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(y_TD.dtype)
    return {
        "y": y_TD,
        **dict(zip(found, torch.autograd.grad(y_TD, list(found.values()), dy_TD), strict=True)),
    }


@pytest.fixture(params=MACHINES.values(), ids=MACHINES)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This machine, or one with narrower vectors."""
    found: Machine = request.param
    monkeypatch.setattr(module, "this_machine", lambda: found)
    return found


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_it_is_as_exact_as_the_dense_layer_in_bfloat16(case: Case, autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    true = outcome("dense", case, torch.float64)
    dense = outcome("dense", case, dtype, autocast=autocast)
    ours = outcome("active", case, dtype, autocast=autocast)
    for name, wanted in true.items():
        assert ours[name].dtype == dtype, name
        most = 1.5 * relative_error(dense[name], wanted)
        assert relative_error(ours[name], wanted) <= most, name


@pytest.mark.parametrize("gated", [False, True])
def test_threads_and_repetition_do_not_change_a_bit(gated: bool) -> None:
    case, before = replace(PLAIN, tokens=1300, gated=gated), torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(outcome("active", case, torch.bfloat16))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_the_mass_is_added_up_in_float32() -> None:
    case = replace(PLAIN, neurons=180)
    found = half(case, torch.bfloat16)
    weights = weights_of(case, found)
    mass_TE = active(found["x"], weights, "relu", num_experts=5).mass_TE
    assert mass_TE is not None
    hidden_TF = weights.activations(found["x"], "relu").float()
    wanted_TE = (hidden_TF * weights.down_FD.float().norm(dim=1)).view(len(hidden_TF), 5, -1).sum(-1)
    torch.testing.assert_close(mass_TE, wanted_TE)


def test_a_number_that_is_none_reaches_the_output() -> None:
    found = half(PLAIN, torch.bfloat16)
    with torch.no_grad():
        found["x"][3, 5] = torch.nan
    y_TD = active(found["x"], weights_of(PLAIN, found), "relu").y_TD
    assert y_TD[3].isnan().all()
    assert y_TD[[0, 1, 2, 4]].isfinite().all()


def test_where_bfloat16_has_no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x_TD = weights_of(PLAIN, half(PLAIN, torch.bfloat16)), torch.zeros(4, 96)
    assert has_active(x_TD.bfloat16(), weights, "relu")
    assert not has_active(x_TD, weights, "relu")  # float32 and bfloat16: torch refuses them too
    with torch.autocast("cpu", torch.bfloat16):
        assert has_active(x_TD, weights, "relu")
        assert not has_active(torch.zeros(4, 48), weights, "relu")  # no whole pairs of vectors
    monkeypatch.setattr(module, "this_machine", lambda: replace(HERE, pairs=False))
    assert not has_active(x_TD.bfloat16(), weights, "relu")
    with torch.autocast("cpu", torch.bfloat16):
        assert not has_active(x_TD, weights, "relu")
