"""Which experts a token needs, by products in 8 bits: by hand, and beside the mass of the true activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from switchable.compute import estimate
from switchable.compute.call import FFNWeights
from switchable.compute.estimate import estimated_mass, expert_mass, in_float32, product


def weights(d_model: int, d_ff: int, gated: bool, dtype: torch.dtype = torch.float32) -> FFNWeights:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    gate = normal(d_ff, d_model) if gated else None
    return FFNWeights(normal(d_ff, d_model), normal(d_ff, d_model), normal(d_ff), gate, None)


def test_by_hand() -> None:
    # Rows whose largest number is 127 or 254 are rounded to whole numbers and to even ones: here nothing is lost.
    x_TD = torch.tensor([[127.0, 1.0], [0.0, 0.0], [-254.0, 4.0]])
    up_FD = torch.tensor([[127.0, 0.0], [0.0, 127.0], [0.0, 254.0], [-127.0, 1.0]])
    down_FD = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])  # norms 5, 1, 2, 1
    given = FFNWeights(up_FD, down_FD, torch.tensor([0.0, 1.0, 0.0, 0.0]))
    # The first token gives 127², 127 + 1, 254 and 0; the second the bias; the third 508 + 1, 1,016 and 254·127 + 4.
    expected = [[5 * 127**2 + 128, 2 * 254], [1.0, 0.0], [509, 2 * 1016 + 254 * 127 + 4]]
    torch.testing.assert_close(estimated_mass(x_TD, given, "relu", 2), torch.tensor(expected).float())
    # Gated: the third neuron's 254 under the ReLU, times what the others' rows make of the first token.
    gated = FFNWeights(up_FD[[2, 1]], down_FD[:2], None, up_FD[[2, 3]], None)
    torch.testing.assert_close(
        estimated_mass(x_TD[:1], gated, "relu", 2), torch.tensor([[5.0 * 254**2, 0.0]])
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu"])
def test_it_catches_what_the_best_experts_hold(gated: bool, dtype: torch.dtype, activation: str) -> None:
    torch.manual_seed(0)
    given, x_TD = weights(64, 256, gated), torch.randn(600, 64)
    mass_TE = expert_mass(given.activations(x_TD, activation), given.down_FD, 32)
    half = FFNWeights(*(None if each is None else each.to(dtype) for each in vars(given).values()))
    found_TE = estimated_mass(x_TD.to(dtype), half, activation, 32)
    assert found_TE.dtype == torch.float32
    caught = mass_TE.gather(1, found_TE.topk(8).indices).sum() / mass_TE.topk(8).values.sum()
    assert caught > 0.998
    assert (found_TE - mass_TE).norm() < 0.03 * mass_TE.norm()


def test_a_tokens_row_depends_on_that_token_alone_whoever_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    given, x_TD = weights(48, 128, gated=True), torch.randn(3, 200, 48).view(600, 48)
    whole_TE = estimated_mass(x_TD, given, "relu2", 16)
    assert len(x_TD) > estimate.AT_ONCE
    for some in (slice(0, 1), slice(255, 258), slice(599, 600), slice(0, 0)):
        assert torch.equal(estimated_mass(x_TD[some], given, "relu2", 16), whole_TE[some])

    on_another_device = [torch.zeros(20, 48, dtype=torch.int8, device="meta")] * 2
    assert product(*on_another_device).dtype == torch.float32
    monkeypatch.setattr(estimate, "product", in_float32)
    torch.testing.assert_close(estimated_mass(x_TD, given, "relu2", 16), whole_TE)


def test_products_are_exact_whatever_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of the largest numbers, which do not fit into 16 bits, as some processors add them up."""
    rows = torch.tensor([[127] * 96, [-127] * 96, [127, -127] * 48], dtype=torch.int8)
    wanted = rows.double() @ rows.double().t()
    assert torch.equal(product(rows, rows).double(), wanted)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.int() @ b.int()).clamp(-(2**15), 2**15 - 1))
    estimate._is_exact_on_cpu.cache_clear()
    assert torch.equal(product(rows, rows).double(), wanted)
    estimate._is_exact_on_cpu.cache_clear()
