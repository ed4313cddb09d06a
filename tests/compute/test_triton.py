"""The CUDA paths compute what `eager` computes: outputs and every gradient, at odd sizes, against float64.

Without a GPU the kernels run in Triton's interpreter. It must be chosen before triton is imported, and no
other test may see it, so `test_in_interpreter` runs this file once more in a process of its own: there, and
where there is a GPU, `TestKernels` is collected.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from switchable.compute import choose as experts
from switchable.compute.call import FFNWeights
from switchable.compute.choose import ExpertCall, ExpertCompute
from switchable.compute.cuda.grouped_mm import torch_grouped_mm
from switchable.compute.cuda.triton.path import triton_atomic, triton_ffn
from switchable.compute.reference import eager
from switchable.errors import InputError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_GPU = torch.cuda.is_available() and HAS_TRITON and not INTERPRETED
DEVICE = "cuda" if HAS_GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """One problem; the defaults are the plainest one."""

    tokens: int = 19
    width: int = 37  # D
    neurons: int = 21  # I
    experts: int = 4
    chosen: int = 2  # K
    dtype: torch.dtype = torch.float32
    activation: str = "relu"
    gates: str = "unit"  # none, unit, real
    bias: bool = True
    stored: str = "FD DF"  # memory layout of up and of down: nn.Linear's is FD DF, Conv1D's DF FD
    routing: str = "random"  # random, one (all tokens on the first K), late (none on the first two)
    strided: bool = False


@dataclass
class Problem:
    x: Tensor
    up: Tensor
    down: Tensor
    bias: Tensor | None
    gates: Tensor | None
    ids: Tensor
    case: Case
    gate_FD: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.up, self.down, self.bias, self.gates) if t is not None]

    def weights(self) -> FFNWeights:
        up_stored, down_stored = self.case.stored.split()
        up_FD = self.up if up_stored == "FD" else self.up.t()
        return FFNWeights(up_FD, self.down if down_stored == "FD" else self.down.t(), self.bias, self.gate_FD)

    def run(self, compute: ExpertCompute) -> Tensor:
        case, unit = self.case, self.case.gates == "unit"
        return compute(
            ExpertCall(self.x, self.weights(), self.ids, self.gates, case.experts, case.activation, unit)
        )


def choose(case: Case, generator: torch.Generator) -> Tensor:
    scores = torch.rand(case.tokens, case.experts, generator=generator)
    if case.routing == "one":
        scores[:, : case.chosen] += 1
    if case.routing == "late":
        scores[:, :2] -= 1
    return scores.topk(case.chosen).indices


def problem(case: Case, device: str = DEVICE, *, exact: bool = False) -> Problem:
    """Build the case's tensors; `exact` gives the same numbers in float64 on the CPU."""
    generator = torch.Generator().manual_seed(1)
    rand = partial(torch.randn, generator=generator)
    ids = choose(case, generator)
    d, f = case.width, case.experts * case.neurons

    def leaf(t: Tensor, dtype: torch.dtype = case.dtype) -> Tensor:
        t = t.to(dtype)
        return (t.double() if exact else t.to(device)).requires_grad_()

    x = leaf(rand(case.tokens, 2 * d)[:, ::2]) if case.strided else leaf(rand(case.tokens, d))
    up, down = (leaf(rand((f, d) if s == "FD" else (d, f)) / d**0.5) for s in case.stored.split())
    bias = leaf(rand(f)) if case.bias else None
    factors = torch.ones(ids.shape) if case.gates == "unit" else rand(ids.shape)
    gates = None if case.gates == "none" else leaf(factors, torch.float32)
    return Problem(x, up, down, bias, gates, ids.to(device), case)


def outcome(p: Problem, compute: ExpertCompute) -> list[Tensor]:
    """Return the output and the gradients of all leaves for a fixed gradient of the output."""
    y = p.run(compute)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(p.case.dtype)
    return [y, *torch.autograd.grad(y, p.leaves(), grad.to(y.device, y.dtype))]


def assert_close(case: Case, compute: ExpertCompute, device: str = DEVICE) -> None:
    got = outcome(problem(case, device), compute)
    for found, true in zip(got, outcome(problem(case, "cpu", exact=True), eager), strict=True):
        assert found.shape == true.shape
        error = (found.double().cpu() - true).norm() / true.norm().clamp_min(1e-30)
        assert error < TOLERANCE[case.dtype], f"relative error {error:.1e} in {tuple(true.shape)}"


PLAIN = Case()
SMALL = Case(tokens=5, width=20, neurons=9, experts=3)
CASES = {
    "plain": PLAIN,
    "real gates": replace(PLAIN, gates="real"),
    "no gates, no bias": replace(PLAIN, gates="none", bias=False),
    "relu2, real gates": replace(PLAIN, activation="relu2", gates="real"),
    "relu2, no bias": replace(PLAIN, activation="relu2", bias=False, stored="DF FD"),
    "stored DF FD": replace(PLAIN, stored="DF FD"),
    "stored FD FD": replace(PLAIN, stored="FD FD", gates="real"),
    "strided x": replace(PLAIN, strided=True),
    "one token": replace(PLAIN, tokens=1, chosen=3),
    "one expert": replace(PLAIN, experts=1, chosen=1, neurons=40),
    "all tokens on one expert": replace(PLAIN, chosen=1, routing="one", gates="real"),
    "experts with no token": replace(PLAIN, experts=5, routing="late"),
    "whole blocks": replace(PLAIN, tokens=16, width=32, neurons=32),
    "all experts": replace(PLAIN, experts=3, chosen=3, width=5, neurons=3),
    "bfloat16": replace(PLAIN, dtype=torch.bfloat16, gates="real"),
    "bfloat16 relu2": replace(PLAIN, dtype=torch.bfloat16, activation="relu2"),
    "float16": replace(PLAIN, dtype=torch.float16),
}


# Only Triton 3.9 says that a default will change.
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
class TestKernels:
    """Everything that launches a kernel."""

    __test__ = INTERPRETED or HAS_GPU

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
    def test_equals_eager(self, case: Case) -> None:
        assert_close(case, triton_ffn)

    def test_atomic_equals_eager(self) -> None:
        assert_close(replace(SMALL, gates="real"), triton_atomic)

    def test_every_element_is_written(self) -> None:
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        try:
            assert_close(replace(SMALL, experts=5, routing="late", gates="real"), triton_ffn)
        finally:
            torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("stored", ["FD DF", "DF FD"])
    def test_gradients_have_the_layout_of_the_parameters(self, stored: str) -> None:
        _, _, up, down, *_ = outcome(problem(replace(SMALL, stored=stored)), triton_ffn)
        assert up.is_contiguous()
        assert down.is_contiguous()

    def test_repeated_calls_give_identical_bits(self) -> None:
        p = problem(SMALL)
        assert all(
            torch.equal(a, b) for a, b in zip(outcome(p, triton_ffn), outcome(p, triton_ffn), strict=True)
        )

    @pytest.mark.parametrize("only", ["x", "up", "down", "bias", "gates"])
    def test_gradient_of_one_input_alone(self, only: str) -> None:
        p = problem(replace(SMALL, gates="real"))
        for leaf in p.leaves():
            leaf.requires_grad_(leaf is getattr(p, only))
        y = p.run(triton_ffn)
        expanded = torch.autograd.grad(y.sum(), getattr(p, only))[0]  # a gradient with strides of zero
        torch.testing.assert_close(expanded, torch.autograd.grad(p.run(eager).sum(), getattr(p, only))[0])

    def test_without_gradients(self) -> None:
        p = problem(SMALL)
        with torch.no_grad():
            torch.testing.assert_close(p.run(triton_ffn), p.run(eager))

    @pytest.mark.parametrize(("experts", "rows"), [(3, 7), (16, 1100), (300, 50)])
    def test_sort_is_stable(self, experts: int, rows: int) -> None:
        from switchable.compute.cuda.triton.sort import sort_by_expert

        ids = torch.randint(experts, (rows, 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
        order, position, ends = sort_by_expert(ids, experts)
        assert torch.equal(order.long(), ids.flatten().sort(stable=True).indices)
        assert torch.equal(position.long(), order.argsort())
        assert torch.equal(ends.long(), ids.flatten().bincount(minlength=experts).cumsum(0))

    def test_compiled(self) -> None:
        p = problem(SMALL)
        backend = "inductor" if HAS_GPU else "aot_eager"
        compiled = torch.compile(partial(p.run, triton_ffn), fullgraph=True, backend=backend)
        torch.testing.assert_close(outcome(p, lambda *_, **__: compiled()), outcome(p, triton_ffn))

    def test_operators_are_well_formed(self) -> None:
        p = problem(SMALL)
        up, down = p.up, p.down.detach().t().requires_grad_()
        arguments = (p.x, up, down, p.bias, p.ids, p.gates, 3, False, False, False)
        torch.library.opcheck(torch.ops.switchable.sparse_ffn.default, arguments)

    def test_autocast(self) -> None:
        p = problem(SMALL)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = p.run(triton_ffn)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, p.run(eager), rtol=0.1, atol=0.05)
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), p.leaves()))

    def test_mixed_dtypes_are_refused(self) -> None:
        p = problem(SMALL)
        p.x = p.x.bfloat16()
        with pytest.raises(InputError, match=r"torch\.bfloat16, torch\.float32"):
            p.run(triton_ffn)


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device and triton")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
class TestOnGPU:
    """What only a GPU can show."""

    BIG = Case(512, 256, 128, 8, 2, torch.bfloat16, gates="unit")

    @pytest.mark.parametrize("stored", ["FD DF", "DF FD"])
    @pytest.mark.parametrize("compute", [triton_ffn, triton_atomic, torch_grouped_mm])
    def test_equals_eager(self, compute: ExpertCompute, stored: str) -> None:
        assert_close(replace(self.BIG, stored=stored), compute, "cuda")

    def test_no_host_sync(self) -> None:
        p = problem(self.BIG, "cuda")
        outcome(p, triton_ffn)  # compiles and tunes
        grad = torch.ones_like(p.x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(p.run(triton_ffn), p.leaves(), grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("tokens", [1, 16])
    def test_cuda_graph_of_decoding(self, tokens: int) -> None:
        p = problem(replace(self.BIG, tokens=tokens), "cuda")
        with torch.no_grad():
            p.run(triton_ffn)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = p.run(triton_ffn)
            for _ in range(2):  # other tokens, other experts
                p.x.normal_()
                p.ids.copy_(torch.rand(tokens, 8, device="cuda").topk(2).indices)
                graph.replay()
                assert torch.equal(y, p.run(triton_ffn))


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed; pip install --no-deps triton")
def test_in_interpreter() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "TestKernels"]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "gelu"},
        {"dtype": torch.float64},
        {"tokens": 0},
        {"gates": "none", "activation": "silu"},
    ],
    ids=str,
)
def test_what_the_kernels_do_not_cover_goes_to_eager(change: dict[str, Any]) -> None:
    p = problem(replace(PLAIN, **change), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(outcome(p, triton_ffn), outcome(p, eager), strict=True))


def test_gated_ffns_go_to_eager() -> None:
    p = problem(PLAIN, "cpu")
    p.gate_FD = torch.randn(p.up.shape)
    assert torch.equal(p.run(triton_ffn), p.run(eager))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_a_tensor_on_the_cpu_is_refused() -> None:
    with pytest.raises(InputError, match="needs a CUDA device, and x is on cpu; use 'eager' or 'auto'"):
        problem(PLAIN, "cpu").run(triton_ffn)


def test_missing_triton_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "triton_launch",
        "triton_kernels",
        "triton_tuning",
        "routing",
    ):  # forget what others imported
        monkeypatch.delitem(sys.modules, f"{experts.__name__}.{name}", raising=False)
        monkeypatch.delattr(experts, name, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # lets CPU tensors pass
    with pytest.raises(InputError, match="needs triton; pip install triton, or use 'eager'"):
        problem(PLAIN, "cpu").run(triton_ffn)


GROUPED = Case(tokens=19, width=24, neurons=16)
GROUPED_CASES = {
    "plain": GROUPED,
    "real gates, Conv1D": replace(GROUPED, gates="real", stored="DF FD"),
    "no gates, no bias, gelu": replace(GROUPED, gates="none", bias=False, activation="gelu"),
    "experts with no token": replace(GROUPED, experts=5, routing="late"),
    "one token, bfloat16": replace(GROUPED, tokens=1, dtype=torch.bfloat16),
    "odd sizes, to eager": PLAIN,
    "no tokens, to eager": replace(GROUPED, tokens=0),
}


@pytest.mark.skipif(INTERPRETED, reason="needs no kernel of ours")
@pytest.mark.parametrize("case", GROUPED_CASES.values(), ids=GROUPED_CASES.keys())
def test_torch_grouped_mm_equals_eager(case: Case) -> None:
    assert_close(case, torch_grouped_mm, "cpu")


@pytest.mark.skipif(INTERPRETED, reason="needs no kernel of ours")
def test_torch_grouped_mm_gated_and_autocast() -> None:
    p = problem(GROUPED, "cpu")
    p.gate_FD = torch.randn(p.up.shape)
    torch.testing.assert_close(p.run(torch_grouped_mm), p.run(eager))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = p.run(torch_grouped_mm)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, p.run(eager), rtol=0.1, atol=0.1)
