"""Few tokens with weights of 16 and 8 bits: what float32 makes of the same numbers, for every width of vector."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from compute.machines import machine_seen_by, needs_instructions
from compute.problems import Case, problem
from support import Holder, relative_error
from torch import Tensor
from torch.nn.functional import linear

from switchable.compute.call import ExpertCall, FFNWeights
from switchable.compute.cpu import limits
from switchable.compute.cpu.decode import compiled
from switchable.compute.cpu.decode import linear as compiled_linear
from switchable.compute.cpu.decode.compiled import prepare_call
from switchable.compute.cpu.decode.linear import LinearCall
from switchable.compute.cpu.decode.norm import Norm
from switchable.compute.cpu.decode.rows import quantised
from switchable.compute.reference import reference
from switchable.errors import InputError

pytestmark = needs_instructions
WIDTHS = (torch.float32, torch.bfloat16, torch.int8)


machine = machine_seen_by(compiled, compiled_linear, limits)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    before = torch.get_num_threads()
    monkeypatch.setattr(compiled, "WORTH_THREADS", 0)
    monkeypatch.setattr(compiled_linear, "TASK_BYTES", 64)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def narrowed(weight_ND: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """A matrix in some width, its scales, and the same numbers in float32."""
    if dtype == torch.int8:
        rows_ND, scale_N = quantised(weight_ND)
        return rows_ND, scale_N, rows_ND * scale_N.unsqueeze(1)
    return weight_ND.to(dtype), None, weight_ND.to(dtype).float()


def test_eight_bits_are_the_nearest_of_255_steps_between_a_row_s_largest_numbers() -> None:
    rows, scale = quantised(torch.tensor([[1.27, -0.004, 0.006, 0.5], [0, 0, 0, 0]]))
    assert rows.tolist() == [[127, 0, 1, 50], [0, 0, 0, 0]]
    assert scale.tolist() == pytest.approx([0.01, 0])


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 7])
@pytest.mark.usefixtures("machine", "threads")
def test_a_linear_map_is_torchs(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    x_TD, weight_ND, bias_N, start_TN = (
        torch.randn(*s) for s in ((tokens, 48), (23, 48), (23,), (tokens, 23))
    )
    own, scale, same = narrowed(weight_ND, dtype)
    want = linear(x_TD, same)
    assert relative_error(LinearCall(tokens, own, scale, None)(x_TD), want) < 1e-6
    assert relative_error(LinearCall(tokens, own, scale, bias_N)(x_TD), want + bias_N) < 1e-6
    both = LinearCall(tokens, own, scale, bias_N, adds=True)(x_TD, start_TN)
    assert relative_error(both, want + bias_N + start_TN) < 1e-6


NORMS = {
    "LayerNorm": {"is_rms": False, "has_bias": True},
    "without a bias": {"is_rms": False, "has_bias": False},
    "RMSNorm": {"is_rms": True, "has_bias": False},
}


def norm_of(width: int, is_rms: bool, has_bias: bool) -> Norm:
    weight_D, bias_D = torch.randn(2, width)
    return Norm(weight_D, bias_D if has_bias else None, 0.1, is_rms=is_rms)


@pytest.mark.parametrize("kind", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.usefixtures("machine", "threads")
def test_a_norm_before_a_linear_map(tokens: int, kind: dict[str, bool]) -> None:
    torch.manual_seed(0)
    x_TD, weight_ND, norm = torch.randn(tokens, 48) + 3, torch.randn(23, 48), norm_of(48, **kind)
    found = LinearCall(tokens, weight_ND, None, None, norm=norm)(x_TD)
    assert relative_error(found, linear(norm(x_TD), weight_ND)) < 1e-6


@pytest.mark.parametrize("kind", NORMS.values(), ids=NORMS)
@pytest.mark.usefixtures("machine", "threads")
def test_a_norm_before_experts_and_their_router(kind: dict[str, bool]) -> None:
    case = Case(width=64, neurons=9, experts=6, tokens=5)
    found, norm = problem(case), norm_of(64, **kind)
    x_TD, add_TD = found.x.detach() + 3, torch.randn(5, 64)
    router_ED, router_E = torch.randn(6, 64), torch.randn(6)
    with torch.no_grad():
        ids_TK = linear(norm(x_TD), router_ED, router_E).topk(3).indices
        want = reference(ExpertCall(norm(x_TD), found.weights, ids_TK, 6, "relu")) + add_TD
        call = prepare_call(
            5, found.weights, (router_ED, router_E), 6, 3, activation="relu", adds=True, norm=norm
        )
    assert call is not None
    assert relative_error(call(x_TD, add_TD), want) < 1e-6


def test_a_tensor_without_memory_of_its_own_is_refused() -> None:
    with pytest.raises(InputError, match="reads memory; a Holder has none of its own"):
        LinearCall(1, Holder(torch.randn(16, 64)), None, None)


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("machine", "threads")
def test_experts_are_the_reference_s(dtype: torch.dtype, activation: str, gated: bool, bias: bool) -> None:
    case = Case(width=64, neurons=9, experts=6, tokens=3)
    case = replace(case, activation=activation, gated=gated, bias=bias)
    found = problem(case)
    matrices = {"up": found.weights.up_FD, "down": found.weights.down_FD, "gate": found.weights.gate_FD}
    own = {n: narrowed(m.detach(), dtype) for n, m in matrices.items() if m is not None}
    weights = FFNWeights(
        own["up"][0],
        own["down"][0],
        found.weights.up_bias_F,
        own["gate"][0] if gated else None,
        found.weights.gate_bias_F,
    )
    same = replace(weights, **{f"{name}_FD": each[2] for name, each in own.items()})
    scales = {f"{name}_scale": each[1] for name, each in own.items() if each[1] is not None}
    x_TD, add_TD = found.x.detach(), torch.randn(3, 64)
    with torch.no_grad():
        want = reference(ExpertCall(x_TD, same, found.ids, case.experts, activation))
        call = prepare_call(
            3, weights, found.ids, case.experts, case.chosen, activation=activation, scales=scales, adds=True
        )
    assert call is not None
    assert relative_error(call(x_TD, add_TD), want + add_TD) < 1e-6
