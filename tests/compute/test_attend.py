"""Attention of one new token in one call: what torch makes of the same numbers, for every width of vector."""

from __future__ import annotations

import pytest
import torch
from compute.machines import machine_seen_by, needs_instructions
from support import relative_error
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from switchable.compute.cpu.decode import attend
from switchable.compute.cpu.decode.attend import SPARE, AttendCall

pytestmark = needs_instructions
B, G, SHARED, P, C = 3, 2, 2, 20, 64
H, END = G * SHARED, 11
machine = machine_seen_by(attend)


def turned_by_hand(x_BHC: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    """The first numbers of each head, a half with the other."""
    own, rest = x_BHC[..., :turned], x_BHC[..., turned:]
    other = torch.cat([own[..., turned // 2 :], own[..., : turned // 2]], dim=-1)
    return torch.cat([own * cos[:, 0] + other * sin[:, 0], rest], dim=-1)


def attended(q_BHC: Tensor, cache: Tensor, first_B: Tensor) -> Tensor:
    places = torch.arange(END)
    mask = (places >= first_B.unsqueeze(1)).view(B, 1, 1, END)
    keys, values = (each[:, :, :END].float() for each in cache)
    y = scaled_dot_product_attention(q_BHC.unsqueeze(2), keys, values, attn_mask=mask, enable_gqa=True)
    return y.reshape(B, -1)


@pytest.mark.parametrize("threads_worth", [0, 2**30], ids=["threads", "one thread"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("places", [1, B], ids=["one place for all", "a place each"])
@pytest.mark.parametrize("turned", [None, 0, 32, 64])
@pytest.mark.usefixtures("machine")
def test_it_is_torchs(
    turned: int | None, places: int, dtype: torch.dtype, threads_worth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attend, "WORTH_THREADS", threads_worth)
    torch.manual_seed(0)
    cache = torch.randn(2, B, G, P, C).to(dtype)
    given_BNC, first_B = torch.randn(B, H + 2 * G, C), torch.tensor([0, 3, 9])
    angles = torch.rand(2, places, 1, 1, turned or 0)
    expected, q_BHC = cache.clone(), given_BNC[:, :H]
    if turned is not None:
        q_BHC = turned_by_hand(q_BHC, *angles, turned)
        expected[0, :, :, END - 1] = turned_by_hand(given_BNC[:, H:-G], *angles, turned).to(dtype)
        expected[1, :, :, END - 1] = given_BNC[:, -G:].to(dtype)
    call = AttendCall(cache, H, first_B, torch.empty(B * G, P + SPARE), turned)
    y_BN = call(given_BNC, END, (angles[0], angles[1]) if turned else None)
    torch.testing.assert_close(cache, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    assert relative_error(y_BN, attended(q_BHC, cache, first_B)) < 1e-5
