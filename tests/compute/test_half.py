"""`fused` in half precision: as exact as torch's dense layer in it, with bfloat16 weights and under autocast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from compute.emulated_amx import EMULATED, always_in_tiles
from compute.problems import Case, Problem, problem
from support import relative_error
from torch import Tensor

from switchable.compute.cpu.experts import fused
from switchable.compute.cpu.experts.packing import multiplied
from switchable.compute.cpu.llvm import this_machine

pytestmark = pytest.mark.skipif(
    this_machine() is None, reason="a processor without multiply-add instructions"
)
HERE = this_machine()
assert HERE is not None
MACHINES = {"as it is": HERE, "no product of pairs": replace(HERE, pairs=False)}
if HERE.pairs:
    MACHINES["32 bytes"] = replace(HERE, vector_bytes=32, registers=16)
    MACHINES["AMX, emulated"] = replace(HERE, amx=EMULATED)
if HERE.amx:
    MACHINES["pairs without AMX"] = replace(HERE, amx=None)
PLAIN = Case(tokens=301, width=96, neurons=24, experts=8)
CASES = {
    "odd number of tokens": PLAIN,
    "one token": replace(PLAIN, tokens=1),
    "no token": replace(PLAIN, tokens=0),
    "width no multiple of 32": replace(PLAIN, width=48),
    "odd number of neurons": replace(PLAIN, neurons=7),
    "experts of 8": replace(PLAIN, neurons=8),
    "experts of 12": replace(PLAIN, neurons=12, bias=False),
    "experts of 52": replace(PLAIN, neurons=52),
    "several chunks": replace(PLAIN, tokens=1301),
    "experts with hundreds of tokens": replace(PLAIN, tokens=701, neurons=52, experts=4),
    "hardly a tile of tokens": replace(PLAIN, tokens=9),
    "one expert": replace(PLAIN, experts=1, chosen=1),
    "all experts": replace(PLAIN, chosen=8),
    "relu2": replace(PLAIN, activation="relu2"),
    "an expert with no token": replace(PLAIN, routing="late", chosen=2),
    "all tokens on one expert": replace(PLAIN, routing="one", chosen=1),
    "stored as nn.Linear": replace(PLAIN, stored="linear"),
    "stored as Conv1D": replace(PLAIN, stored="conv"),
    "strided input": replace(PLAIN, strided=True),
}
CASES |= {f"gated, {name}": replace(case, gated=True) for name, case in CASES.items()}
CASES |= {
    "gated, relu2, experts of 12": replace(PLAIN, gated=True, activation="relu2", neurons=12, bias=False),
    "gated, relu2, width no multiple of 32": replace(PLAIN, gated=True, activation="relu2", width=48),
}


def half(case: Case, dtype: torch.dtype) -> Problem:
    """A case whose numbers are bfloat16's, whatever they are stored in."""
    found = problem(replace(case, dtype=torch.bfloat16))
    if dtype == torch.bfloat16:
        return found
    with torch.no_grad():
        leaves = {name: leaf.to(dtype).requires_grad_() for name, leaf in found.leaves.items()}
    x = leaves["x"]
    return Problem(found.case, x[:, ::2] if case.strided else x, found.ids, leaves)


def results(found: Problem, backend: str, autocast: bool) -> dict[str, Tensor]:
    """The output and all gradients, for a gradient of the output that bfloat16 has."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y_TD = found.run(backend)
    dy_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(y_TD.dtype)
    grads = torch.autograd.grad(y_TD, list(found.leaves.values()), dy_TD)
    assert y_TD.dtype == found.x.dtype
    return {"y": y_TD.detach(), **dict(zip(found.leaves, grads, strict=True))}


@pytest.fixture(params=MACHINES.values(), ids=MACHINES)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This machine, or one that lacks an instruction or wide vectors."""
    monkeypatch.setattr(fused, "this_machine", lambda: request.param)
    always_in_tiles(monkeypatch)
    yield
    assert EMULATED.faults == 0


def assert_as_exact_as_dense(case: Case, autocast: bool, backend: str) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    true = results(half(case, torch.float64), "reference", autocast=False)
    dense = results(half(case, dtype), "masked", autocast)
    ours = results(half(case, dtype), backend, autocast)
    for name, wanted in true.items():
        assert ours[name].dtype == dtype
        most = 1.5 * relative_error(dense[name], wanted)
        assert relative_error(ours[name], wanted) <= most, name


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_it_is_as_exact_as_the_dense_layer_in_bfloat16(case: Case, autocast: bool) -> None:
    assert_as_exact_as_dense(case, autocast, "fused")


@pytest.mark.parametrize("neurons", [7, 8, 12, 24, 96])
@pytest.mark.parametrize("gated", [False, True])
def test_one_token_without_gradients_by_decode_too(gated: bool, neurons: int) -> None:
    case = replace(PLAIN, tokens=1, neurons=neurons, gated=gated)
    with torch.no_grad():
        true = half(case, torch.float64).run("reference")
        dense, ours = (half(case, torch.bfloat16).run(backend) for backend in ("masked", "decode"))
    # One token's errors are few: by chance dense's may be half of what they are on average.
    assert relative_error(ours, true) <= 3 * max(relative_error(dense, true), 2**-9)


def test_pairs_are_multiplied_where_they_fill_vectors_and_rows() -> None:
    able = replace(HERE, vector_bytes=64, pairs=True)
    half, whole = torch.bfloat16, torch.float32
    assert multiplied(96, 24, half, able) == half
    assert multiplied(48, 24, half, able) == whole
    assert multiplied(48, 24, half, replace(able, vector_bytes=32)) == half
    assert multiplied(96, 7, half, able) == whole
    assert multiplied(96, 24, half, replace(able, pairs=False)) == whole
    assert multiplied(96, 24, torch.float16, able) == whole
    assert multiplied(96, 24, whole, able) == whole
    assert multiplied(96, 24, torch.float64, able) == torch.float64


@pytest.mark.usefixtures("machine")
def test_nan_stays_in_its_row_and_reaches_the_gradients() -> None:
    found = half(replace(PLAIN, chosen=8, bias=False), torch.bfloat16)
    with torch.no_grad():
        found.x[299:] = torch.nan  # the last pair of tokens, and a half one
    got = results(found, "fused", autocast=False)
    assert got["y"][299:].isnan().all()
    assert not got["y"][:299].isnan().any()
    assert got["up"].isnan().all()


def test_each_weights_gradient_has_the_precision_of_that_weight() -> None:
    found = problem(replace(PLAIN, dtype=torch.float32))
    found.leaves["down"] = found.leaves["down"].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD = found.run("fused")
    up, down = torch.autograd.grad(y_TD.float().square().sum(), [found.leaves["up"], found.leaves["down"]])
    assert (up.dtype, down.dtype) == (torch.float32, torch.bfloat16)
    assert not torch.equal(up, up.bfloat16().float())
