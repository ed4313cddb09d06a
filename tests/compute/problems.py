"""Small problems for expert compute: tensors, a choice of experts, and what must come out."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from support import relative_error
from torch import Tensor

from switchable.compute.call import Backend, ExpertCall, FFNWeights
from switchable.compute.choose import expert_ffn

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """One problem; the defaults are odd sizes in everything that may be odd."""

    tokens: int = 29
    width: int = 13  # D
    neurons: int = 7  # I
    experts: int = 5  # E
    chosen: int = 3  # K
    dtype: torch.dtype = torch.float32
    activation: str = "relu"
    bias: bool = True
    gated: bool = False
    routing: str = "random"  # random, one (all tokens on the first K), late (none on the first two)
    stored: str = "neurons"  # neurons (both [F, D] in memory), linear (down is not), conv (up is not)
    strided: bool = False  # the input
    ragged: bool = False  # tokens have 1 to K experts


@dataclass
class Problem:
    """The tensors of a case."""

    case: Case
    x: Tensor
    ids: Tensor
    leaves: dict[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> FFNWeights:
        get = self.leaves.get
        up_FD, down_FD = self.leaves["up"], self.leaves["down"]
        up_FD = up_FD.t() if self.case.stored == "conv" else up_FD
        down_FD = down_FD.t() if self.case.stored == "linear" else down_FD
        return FFNWeights(up_FD, down_FD, get("bias"), get("gate"), get("gate_bias"))

    @property
    def call(self) -> ExpertCall:
        case = self.case
        return ExpertCall(self.x, self.weights, self.ids, case.experts, case.activation, case.ragged)

    def run(self, backend: str) -> Tensor:
        return expert_ffn(self.call, backend)


def problem(case: Case, *, exact: bool = False) -> Problem:
    """Build a case's tensors; `exact` gives the same numbers in float64."""
    generator = torch.Generator().manual_seed(1)
    rand = partial(torch.randn, generator=generator)
    neurons = case.experts * case.neurons

    def leaf(*size: int, scale: float = 1.0) -> Tensor:
        values = (rand(*size) * scale).to(case.dtype)
        return (values.double() if exact else values).requires_grad_()

    scores_TE = torch.rand(case.tokens, case.experts, generator=generator)
    if case.routing == "one":
        scores_TE[:, : case.chosen] += 1
    if case.routing == "late":
        scores_TE[:, :2] -= 1
    ids_TK = scores_TE.topk(case.chosen).indices
    if case.ragged:
        left_out_TK = torch.rand(ids_TK.shape, generator=generator) < 0.5
        left_out_TK[:, 0] = False
        ids_TK = ids_TK.masked_fill(left_out_TK, case.experts)
    x = leaf(case.tokens, 2 * case.width if case.strided else case.width)
    found = Problem(case, x[:, ::2] if case.strided else x, ids_TK)
    up, down = (
        (case.width, neurons) if case.stored == kind else (neurons, case.width) for kind in ("conv", "linear")
    )
    found.leaves = {"x": x, "up": leaf(*up, scale=case.width**-0.5), "down": leaf(*down, scale=neurons**-0.5)}
    if case.bias:
        found.leaves["bias"] = leaf(neurons)
    if case.gated:
        found.leaves |= {"gate": leaf(neurons, case.width), "gate_bias": leaf(neurons)}
    return found


def outcome(found: Problem, backend: str) -> dict[str, Tensor]:
    """Return the output and the gradients of all leaves, for a fixed gradient of the output."""
    y_TD = found.run(backend)
    dy_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(2)).to(y_TD.dtype)
    grads = torch.autograd.grad(y_TD, list(found.leaves.values()), dy_TD)
    return {"y": y_TD.detach(), **dict(zip(found.leaves, grads, strict=True))}


def assert_equals_reference(case: Case, backend: str) -> None:
    """Compare the output and every gradient with the reference in float64."""
    got = outcome(problem(case), backend)
    true = outcome(problem(case, exact=True), "reference")
    for name, wanted in true.items():
        assert got[name].shape == wanted.shape, name
        error = relative_error(got[name], wanted)
        assert error < TOLERANCE[case.dtype], f"relative error {error:.1e} in {name}"


def assert_mixed_dtypes_need_autocast(case: Case, backend: Backend) -> None:
    """Check that a backend refuses mixed dtypes, says which, and takes them where autocast converts them."""
    found = problem(case)
    found.x = found.x.bfloat16()
    reason = (
        "wants one dtype, and input and weights have bfloat16, float32; convert them, or use torch.autocast"
    )
    assert backend.supports(found.call) == reason
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert backend.supports(found.call) is None
