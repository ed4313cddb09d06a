"""Torch's grouped product computes what the reference computes: outputs and every gradient, here on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compute.problems import (
    TOLERANCE,
    Case,
    assert_mixed_dtypes_need_autocast,
    outcome,
    problem,
    relative_error,
)

from switchable.compute.cuda.grouped_mm import GROUPED_MM
from switchable.compute.cuda.sort import sort_by_expert

PLAIN = Case(tokens=19, width=24, neurons=16)
CASES = {
    "plain": PLAIN,
    "no bias, gelu": replace(PLAIN, bias=False, activation="gelu"),
    "gated": replace(PLAIN, activation="silu", gated=True),
    "gated, no bias": replace(PLAIN, gated=True, bias=False),
    "stored as nn.Linear": replace(PLAIN, stored="linear"),
    "stored as Conv1D": replace(PLAIN, stored="conv"),
    "strided input": replace(PLAIN, strided=True),
    "experts with no token": replace(PLAIN, routing="late"),
    "all tokens on one expert": replace(PLAIN, chosen=1, routing="one"),
    "one token, bfloat16": replace(PLAIN, tokens=1, dtype=torch.bfloat16),
    "float16": replace(PLAIN, dtype=torch.float16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_reference(case: Case) -> None:
    assert GROUPED_MM.supports(problem(case).call) is None
    got, true = outcome(problem(case), "grouped_mm"), outcome(problem(case, exact=True), "reference")
    for name, wanted in true.items():
        assert got[name].shape == wanted.shape, name
        assert relative_error(got[name], wanted) < TOLERANCE[case.dtype], name


def test_pairs_are_sorted_by_expert_and_stay_in_order_within() -> None:
    order, position, ends = sort_by_expert(torch.tensor([[2, 0], [0, 1], [3, 2]]), 5)
    assert order.tolist() == [1, 2, 3, 0, 5, 4]  # experts 0 0 1 2 2 3
    assert position.tolist() == [3, 0, 1, 2, 5, 4]
    assert ends.tolist() == [2, 3, 5, 6, 6]  # expert 4 has none
    assert {each.dtype for each in (order, position, ends)} == {torch.int32}


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"width": 22}, "needs multiples of 4, and d_model is 22, neurons per expert 16"),
    "neurons": ({"neurons": 6}, "needs multiples of 4, and d_model is 24, neurons per expert 6"),
    "16 bits": (
        {"dtype": torch.bfloat16, "neurons": 12},
        "needs multiples of 8, and d_model is 24, neurons per expert 12",
    ),
    "empty": ({"tokens": 0}, "needs at least one token"),
    "dtype": ({"dtype": torch.float64}, "computes in bfloat16, float16, float32 on cpu, not in float64"),
}


@pytest.mark.parametrize("key", REASONS)
def test_it_says_what_it_cannot_compute(key: str) -> None:
    change, reason = REASONS[key]
    assert GROUPED_MM.supports(problem(replace(PLAIN, **change)).call) == reason


def test_it_says_that_dtypes_are_mixed_unless_autocast_converts_them() -> None:
    assert_mixed_dtypes_need_autocast(PLAIN, GROUPED_MM)


def test_on_cuda_it_computes_in_bfloat16_alone() -> None:
    # A tensor without memory that says it is on a GPU: nothing is read by `supports`.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        found = problem(PLAIN)
        found.x = torch.empty(19, 24, device="cuda")
    assert GROUPED_MM.supports(found.call) == "computes in bfloat16 on cuda, not in float32"


def test_autocast_computes_in_its_dtype_and_gradients_keep_theirs() -> None:
    found = problem(PLAIN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outcome(found, "grouped_mm")
    true = outcome(problem(PLAIN, exact=True), "reference")
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}
    assert 1e-6 < relative_error(got["y"], true["y"]) < TOLERANCE[torch.bfloat16]
