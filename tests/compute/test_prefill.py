"""Many tokens without gradients in one call: what training computes, with a router's choice and a bias as well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from compute.emulated_amx import EMULATED, always_in_tiles
from compute.machines import MACHINES, needs_instructions
from compute.problems import Case, problem
from support import relative_error, threads
from torch import Tensor

from switchable.compute.cpu.experts import fused
from switchable.compute.cpu.experts.fused import prepare_prefill
from switchable.compute.cpu.experts.packing import Packing, multiplied
from switchable.compute.cpu.experts.prefill import Prefill
from switchable.compute.cpu.llvm import Machine, this_machine

pytestmark = needs_instructions
HERE = this_machine()
HALF = torch.bfloat16
MULTIPLIED = [torch.float32, *([HALF] if HERE is not None and HERE.pairs else [])]
"""Dtypes of calls that need no conversion first."""
PLAIN = Case(tokens=75, width=96, neurons=12, experts=8)
CASES = {
    "plain": PLAIN,
    "relu2, no bias": replace(PLAIN, activation="relu2", bias=False),
    "gated": replace(PLAIN, gated=True),
    "gated, relu2, no bias": replace(PLAIN, gated=True, activation="relu2", bias=False),
    "no token": replace(PLAIN, tokens=0),
    "odd number of neurons, an expert without tokens": replace(PLAIN, neurons=7, routing="late", chosen=2),
    "ragged": replace(PLAIN, ragged=True),
    "several chunks": replace(PLAIN, tokens=1301),
}
OTHERS = {f"{size} bytes": machine for size, machine in MACHINES.items()}
if HERE is not None and HERE.pairs:
    OTHERS |= {
        "no product of pairs": replace(HERE, pairs=False),
        "AMX, emulated": replace(HERE, amx=EMULATED),
    }


@pytest.fixture(params=OTHERS.values(), ids=OTHERS)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setattr(fused, "this_machine", lambda: request.param)
    always_in_tiles(monkeypatch)
    yield request.param
    assert EMULATED.faults == 0


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("machine")
def test_given_ids(case: Case, dtype: torch.dtype) -> None:
    found = problem(replace(case, dtype=dtype))
    with torch.no_grad():
        ours = found.run("fused")
    training = found.run("fused").detach()
    if dtype == HALF and case.tokens:  # squares and products with a gate are rounded once less
        true = problem(found.case, exact=True).run("reference")
        assert relative_error(ours, true) <= 1.1 * relative_error(training, true)
    else:
        assert torch.equal(ours, training)


def routed(
    case: Case, router: tuple[Tensor, Tensor], start_D: Tensor | None, mass: float = 1.0, count: int = 1
) -> Tensor | None:
    call = problem(case).call
    with torch.no_grad(), threads(count):
        prefill = prepare_prefill(call, router, start_D, mass=mass)
        return None if prefill is None else prefill(call.x_TD.detach())


def router_of(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias of a router, and what y begins with."""
    generator = torch.Generator().manual_seed(3)
    sizes = ((case.experts, case.width), (case.experts,), (case.width,))
    router_ED, router_E, start_D = (torch.randn(*size, generator=generator).to(dtype) for size in sizes)
    return router_ED, router_E, start_D


@pytest.mark.parametrize("mass", [1.0, 0.6])
@pytest.mark.parametrize("router_dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_router_chooses_and_a_bias_is_added(
    bias: bool, dtype: torch.dtype, router_dtype: torch.dtype, mass: float, machine: Machine
) -> None:
    case = replace(PLAIN, dtype=dtype)
    router_ED, router_E, start_D = router_of(case, router_dtype)
    start = start_D.to(dtype) if bias else None
    y_TD = routed(case, (router_ED, router_E), start, mass)
    if multiplied(case.width, case.neurons, dtype, machine) != dtype:  # it would have to be converted first
        assert y_TD is None
        return
    exact = problem(case, exact=True)
    # A router's weight is rounded to what is multiplied, as elsewhere where it only chooses.
    scores_TE = exact.x @ router_ED.to(dtype).double().t() + router_E.double()
    chosen = scores_TE.topk(case.chosen)
    share_TK = (chosen.values - scores_TE.logsumexp(1, keepdim=True)).exp()
    dropped = share_TK.cumsum(1) - share_TK >= mass
    exact.ids = chosen.indices.masked_fill(dropped, case.experts)
    exact.case = replace(case, ragged=True)
    want_TD = exact.run("reference") + (0 if start is None else start.double())
    assert y_TD is not None
    assert relative_error(y_TD, want_TD) < (4e-3 if dtype == HALF else 1e-6)


@pytest.mark.parametrize("dtype", MULTIPLIED, ids=str)
def test_threads_and_chunks_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(PLAIN, dtype=dtype)
    *router, start_D = router_of(case, dtype)
    alone = routed(case, (router[0], router[1]), start_D)
    assert alone is not None
    for count in (1, 2, 3, 5):
        for most in (512, 20, 7):
            monkeypatch.setattr(Packing, "chunk_tokens", most)
            again = routed(case, (router[0], router[1]), start_D, count=count)
            assert again is not None
            assert torch.equal(again, alone), (count, most)


def test_what_there_is_no_code_for() -> None:
    def given(case: Case) -> Prefill | None:
        router_ED, router_E, start_D = router_of(case, torch.float32)
        with torch.no_grad():
            return prepare_prefill(problem(case).call, (router_ED, router_E), start_D, mass=1.0)

    assert given(PLAIN) is not None
    for change in (
        {"width": 13},
        {"activation": "gelu"},
        {"dtype": torch.float64},
        {"dtype": torch.float16},
        {"stored": "linear"},
        {"stored": "conv"},
        {"activation": "silu", "gated": True},
    ):
        assert given(replace(PLAIN, **change)) is None, change


@pytest.mark.parametrize("dtype", MULTIPLIED, ids=str)
def test_a_token_that_is_nan_stays_alone(dtype: torch.dtype) -> None:
    case = replace(PLAIN, dtype=dtype)
    found, (router_ED, router_E, start_D) = problem(case), router_of(case, dtype)
    with torch.no_grad():
        found.x[5] = torch.nan
        prefill = prepare_prefill(found.call, (router_ED, router_E), start_D, mass=1.0)
        assert prefill is not None
        y_TD = prefill(found.x.detach())
    assert y_TD[5].isnan().all()
    assert not y_TD[[4, 6]].isnan().any()
