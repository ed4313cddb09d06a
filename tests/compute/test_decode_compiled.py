"""A few tokens in one call: the layer's output to rounding, for every width of vector and any threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compute.machines import machine_seen_by, needs_instructions
from compute.problems import Case, problem
from support import relative_error, threads
from torch import Tensor

from switchable.compute.cpu import limits, tasks
from switchable.compute.cpu.decode import compiled
from switchable.compute.cpu.decode.compiled import DecodeCall, prepare_call
from switchable.errors import InputError

pytestmark = needs_instructions
PLAIN = Case(width=64, neurons=7, experts=6, tokens=3)
CASES = {
    "three tokens": PLAIN,
    "one token": replace(PLAIN, tokens=1),
    "64 tokens": replace(PLAIN, tokens=64),
    "all experts": replace(PLAIN, chosen=6),
    "one expert": replace(PLAIN, experts=1, chosen=1),
    "an expert for all": replace(PLAIN, routing="one", chosen=1),
    "no bias": replace(PLAIN, bias=False),
    "relu2": replace(PLAIN, activation="relu2"),
    "one vector": replace(PLAIN, width=16),
    "experts of twenty neurons": replace(PLAIN, neurons=20),
    "many experts": replace(PLAIN, experts=48, neurons=2, chosen=9),
    "bfloat16": replace(PLAIN, dtype=torch.bfloat16),
}
CASES |= {
    f"gated, {name}": replace(CASES[name], gated=True)
    for name in ("three tokens", "64 tokens", "no bias", "relu2", "experts of twenty neurons", "bfloat16")
}


MOST_ERROR = {torch.float32: 1e-6, torch.bfloat16: 3e-3}
"""Relative: in bfloat16 what comes out is rounded, and nothing before it."""
machine = machine_seen_by(compiled, limits)


@pytest.fixture
def always_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "WORTH_THREADS", 0)


def output(
    case: Case, choice: Tensor | tuple[Tensor, Tensor], start_D: Tensor | None = None, count: int = 1
) -> Tensor:
    found, sizes = problem(case), (case.experts, case.chosen)
    with torch.no_grad(), threads(count):
        call = prepare_call(
            case.tokens, found.weights, choice, *sizes, activation=case.activation, start_D=start_D
        )
        assert call is not None
        return call(found.x.detach())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.usefixtures("machine", "always_in_threads")
def test_given_ids(case: Case, count: int) -> None:
    true_TD = problem(case, exact=True).run("reference")
    assert relative_error(output(case, problem(case).ids, count=count), true_TD) < MOST_ERROR[case.dtype]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.usefixtures("machine", "always_in_threads")
def test_a_router_chooses_and_a_bias_is_added(case: Case, count: int) -> None:
    generator = torch.Generator().manual_seed(3)
    router_ED, router_E, start_D = (
        torch.randn(*size, generator=generator).to(case.dtype)
        for size in ((case.experts, case.width), (case.experts,), (case.width,))
    )
    exact = problem(case, exact=True)
    scores_TE = exact.x @ router_ED.double().t() + router_E.double()
    exact.ids = scores_TE.topk(case.chosen).indices
    y_TD = output(case, (router_ED, router_E), start_D, count)
    assert relative_error(y_TD, exact.run("reference") + start_D) < MOST_ERROR[case.dtype]


@pytest.mark.parametrize("others", ["torch's threads", "Python's"])
@pytest.mark.usefixtures("always_in_threads")
def test_stages_wait_for_each_other(others: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of threads, more than there are cores as well: every call gives the same bits."""
    if others == "Python's":
        monkeypatch.setattr(tasks, "_openmp", lambda: None)
    alone_TD = output(PLAIN, problem(PLAIN).ids)
    for count in (1, 2, 3, 5):
        for _ in range(50):
            assert torch.equal(output(PLAIN, problem(PLAIN).ids, count=count), alone_TD), count


def test_what_there_is_no_code_for() -> None:
    def given(case: Case) -> DecodeCall | None:
        found, sizes = problem(case), (case.experts, case.chosen)
        with torch.no_grad():
            return prepare_call(case.tokens, found.weights, found.ids, *sizes, activation=case.activation)

    assert given(PLAIN) is not None
    for change in (
        {"tokens": 0},
        {"tokens": 65},
        {"width": 13},
        {"activation": "gelu"},
        {"dtype": torch.float64},
        {"stored": "linear"},
        {"activation": "silu", "gated": True},
    ):
        assert given(replace(PLAIN, **change)) is None, change


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_a_neuron_that_is_nan_reaches_the_output(gated: bool) -> None:
    found = problem(replace(PLAIN, gated=gated))
    with torch.no_grad():
        found.x[1] = torch.nan
        y_TD = found.run("decode")
    assert y_TD[1].isnan().all()
    assert not y_TD[[0, 2]].isnan().any()


def test_a_token_without_experts_gives_zero() -> None:
    found = problem(replace(PLAIN, ragged=True))
    found.ids[1] = 6
    with torch.no_grad():
        y_TD = found.run("decode")
        torch.testing.assert_close(y_TD, found.run("reference"))
    assert y_TD[1].eq(0).all()


@pytest.mark.parametrize("ragged", [False, True])
def test_an_id_outside_the_experts_is_refused(ragged: bool) -> None:
    found = problem(replace(PLAIN, ragged=ragged))
    most = 6 if ragged else 5  # a seventh stands for none
    found.ids[1, 1] = most + 1
    refusal = rf"expert ids must be in 0\.\.{most}; found 0 to {most + 1}"
    with torch.no_grad(), pytest.raises(InputError, match=refusal):
        found.run("decode")
