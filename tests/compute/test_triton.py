"""The Triton kernels compute what the reference computes: outputs and every gradient, at odd sizes, against float64.

Without a GPU the kernels run in Triton's interpreter. It must be chosen before triton is imported, and no other test
may see it, so `test_in_interpreter` runs this file once more in a process of its own: there, and where there is a GPU,
`TestKernels` is collected.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compute.problems import (
    TOLERANCE,
    Case,
    Problem,
    assert_mixed_dtypes_need_autocast,
    problem,
    relative_error,
)
from torch import Tensor

from switchable.compute.call import Backend
from switchable.compute.cuda.grouped_mm import GROUPED_MM
from switchable.compute.cuda.triton import TRITON, path
from switchable.compute.reference import reference

HAS_GPU = torch.cuda.is_available() and path.HAS_TRITON and not path.INTERPRETED
DEVICE = "cuda" if HAS_GPU else "cpu"
ROOT = Path(__file__).parents[2]

PLAIN = Case(tokens=19, width=37, neurons=21, experts=4, chosen=2, stored="linear")
SMALL = Case(tokens=5, width=20, neurons=9, experts=3, chosen=2, stored="linear")
CASES = {
    "plain": PLAIN,
    "no bias": replace(PLAIN, bias=False),
    "relu2": replace(PLAIN, activation="relu2"),
    "relu2, no bias": replace(PLAIN, activation="relu2", bias=False, stored="conv"),
    "stored as Conv1D": replace(PLAIN, stored="conv"),
    "stored neuron by neuron": replace(PLAIN, stored="neurons"),
    "strided input": replace(PLAIN, strided=True),
    "one token": replace(PLAIN, tokens=1, chosen=3),
    "one expert": replace(PLAIN, experts=1, chosen=1, neurons=40),
    "all tokens on one expert": replace(PLAIN, chosen=1, routing="one"),
    "experts with no token": replace(PLAIN, experts=5, routing="late"),
    "whole blocks": replace(PLAIN, tokens=16, width=32, neurons=32),
    "all experts": replace(PLAIN, experts=3, chosen=3, width=5, neurons=3),
    "bfloat16": replace(PLAIN, dtype=torch.bfloat16),
    "bfloat16, relu2": replace(PLAIN, dtype=torch.bfloat16, activation="relu2"),
    "float16": replace(PLAIN, dtype=torch.float16),
}


def placed(case: Case) -> Problem:
    """Return the case's tensors where the kernels run."""
    found = problem(case)
    found.leaves = {name: leaf.detach().to(DEVICE).requires_grad_() for name, leaf in found.leaves.items()}
    x = found.leaves["x"]
    found.x, found.ids = x[:, ::2] if case.strided else x, found.ids.to(DEVICE)
    return found


def run(found: Problem, backend: Backend = TRITON) -> Tensor:
    assert backend.supports(found.call) is None
    return backend.run(found.call)


def outcome(found: Problem, y_TD: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradients of all leaves, for a fixed gradient of the output."""
    dy_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(2)).to(found.case.dtype)
    grads = torch.autograd.grad(y_TD, list(found.leaves.values()), dy_TD.to(y_TD))
    return {"y": y_TD.detach(), **dict(zip(found.leaves, grads, strict=True))}


def assert_equals_reference(case: Case, backend: Backend = TRITON) -> None:
    found, exact = placed(case), problem(case, exact=True)
    got, true = outcome(found, run(found, backend)), outcome(exact, reference(exact.call))
    for name, wanted in true.items():
        assert got[name].shape == wanted.shape, name
        error = relative_error(got[name].cpu(), wanted)
        assert error < TOLERANCE[case.dtype], f"relative error {error:.1e} in {name}"


# Only Triton 3.9 says that a default will change.
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
class TestKernels:
    """Everything that launches a kernel."""

    __test__ = path.INTERPRETED or HAS_GPU

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
    def test_equals_the_reference(self, case: Case) -> None:
        assert_equals_reference(case)

    def test_every_element_is_written(self) -> None:
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        try:
            assert_equals_reference(replace(SMALL, experts=5, routing="late"))
        finally:
            torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("stored", ["neurons", "linear", "conv"])
    def test_gradients_have_the_layout_of_the_parameters(self, stored: str) -> None:
        found = placed(replace(SMALL, stored=stored))
        got = outcome(found, run(found))
        assert got["up"].is_contiguous()
        assert got["down"].is_contiguous()

    def test_repeated_calls_give_identical_bits(self) -> None:
        found = placed(SMALL)
        first, second = outcome(found, run(found)), outcome(found, run(found))
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize("only", ["x", "up", "down", "bias"])
    def test_the_gradient_of_one_tensor_alone(self, only: str) -> None:
        found = placed(SMALL)
        for name, leaf in found.leaves.items():
            leaf.requires_grad_(name == only)
        # The gradient of a sum has strides of zero.
        ours, true = (
            torch.autograd.grad(y_TD.sum(), found.leaves[only])[0]
            for y_TD in (run(found), reference(found.call))
        )
        torch.testing.assert_close(ours, true)

    def test_without_gradients(self) -> None:
        found = placed(SMALL)
        with torch.no_grad():
            torch.testing.assert_close(run(found), reference(found.call))

    def test_nan_gets_through(self) -> None:
        found = placed(SMALL)
        with torch.no_grad():
            found.x[0] = torch.nan
            y_TD = run(found)
        assert y_TD[0].isnan().all()
        assert y_TD[1:].isfinite().all()

    def test_under_torch_compile(self) -> None:
        found = placed(SMALL)
        compiled = torch.compile(run, fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager")
        torch.testing.assert_close(outcome(found, compiled(found)), outcome(found, run(found)))

    @pytest.mark.parametrize("bias", [True, False])
    def test_operators_are_well_formed(self, bias: bool) -> None:
        found = placed(replace(SMALL, bias=bias))
        down = found.leaves["down"].detach().t().requires_grad_()
        arguments = (found.x, found.leaves["up"], down, found.leaves.get("bias"), found.ids, 3, False)
        torch.library.opcheck(torch.ops.switchable.sparse_ffn.default, arguments)

    def test_autocast(self) -> None:
        found = placed(SMALL)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            got = outcome(found, run(found))
        torch.testing.assert_close(got["y"], reference(found.call).detach(), rtol=0.1, atol=0.05)
        assert {tensor.dtype for tensor in got.values()} == {torch.float32}


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device and triton")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
class TestOnGPU:
    """What only a GPU can show."""

    BIG = Case(512, 256, 128, 8, 2, torch.bfloat16, stored="linear")

    @pytest.mark.parametrize("stored", ["linear", "conv"])
    @pytest.mark.parametrize("backend", [TRITON, GROUPED_MM], ids=lambda backend: backend.name)
    def test_equals_the_reference(self, backend: Backend, stored: str) -> None:
        assert_equals_reference(replace(self.BIG, stored=stored), backend)

    @pytest.mark.parametrize("backend", [TRITON, GROUPED_MM], ids=lambda backend: backend.name)
    def test_no_host_sync(self, backend: Backend) -> None:
        found = placed(self.BIG)
        outcome(found, run(found, backend))  # compiles and tunes
        grad = torch.ones_like(found.x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(run(found, backend), list(found.leaves.values()), grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("tokens", [1, 16])
    def test_cuda_graph_of_decoding(self, tokens: int) -> None:
        found = placed(replace(self.BIG, tokens=tokens))
        with torch.no_grad():
            run(found)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y_TD = run(found)
            for _ in range(2):  # other tokens, other experts
                found.x.normal_()
                found.ids.copy_(torch.rand(tokens, 8, device="cuda").topk(2).indices)
                graph.replay()
                assert torch.equal(y_TD, run(found))


@pytest.mark.skipif(path.INTERPRETED, reason="this is the process with the interpreter")
@pytest.mark.skipif(not path.HAS_TRITON, reason="triton is not installed; pip install --no-deps triton")
def test_in_interpreter() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "TestKernels"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "gated": ({"gated": True}, "has no kernels for gated FFNs"),
    "activation": ({"activation": "gelu"}, "has kernels for relu and relu2, not for gelu"),
    "empty": ({"tokens": 0}, "needs at least one token"),
    "dtype": ({"dtype": torch.float64}, "computes in bfloat16, float16, float32 on cpu, not in float64"),
}


@pytest.mark.parametrize("key", REASONS)
def test_it_says_what_it_cannot_compute(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, reason = REASONS[key]
    monkeypatch.setattr(path, "INTERPRETED", True)  # lets CPU tensors pass
    monkeypatch.setattr(path, "HAS_TRITON", True)
    assert TRITON.supports(problem(PLAIN).call) is None
    assert TRITON.supports(problem(replace(PLAIN, **change)).call) == reason


def test_it_says_that_dtypes_are_mixed_unless_autocast_converts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path, "INTERPRETED", True)
    monkeypatch.setattr(path, "HAS_TRITON", True)
    assert_mixed_dtypes_need_autocast(PLAIN, TRITON)


@pytest.mark.skipif(path.INTERPRETED, reason="the interpreter takes CPU tensors")
def test_it_says_that_it_needs_a_gpu() -> None:
    reason = TRITON.supports(problem(PLAIN).call)
    assert reason is not None
    assert reason.startswith("needs a CUDA device, and the input is on cpu")


def test_it_says_that_triton_is_missing() -> None:
    program = """
import sys
sys.modules["triton"] = None
from compute.problems import Case, problem
from switchable.compute.cuda.triton import TRITON
print(TRITON.supports(problem(Case()).call))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "needs triton, which is not installed; pip install triton"
