"""All layers of a token in one call: bitwise what their calls give one by one."""

from __future__ import annotations

import pytest
import torch
from compute.machines import needs_instructions
from infer.test_decoding import NEW, PROMPTS, model_of, padded
from support import relative_error, threads

from switchable import set_mode
from switchable.compute.cpu.decode.linear import LinearCall
from switchable.compute.cpu.tasks import Chain
from switchable.infer.decoding.decoder import Decoder

pytestmark = needs_instructions
CHAINED = ("gpt2", "opt", "mistral, heads of 32")
"""Families of which every part of a layer is a compiled call, on processors with AVX-512 too."""


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["padded", "one"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", CHAINED)
def test_one_call_for_all_layers_is_bitwise_their_calls(
    name: str, weights: str, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both modes, the second one taken in the middle of a text."""
    modes = ["sparse"] * 4 + ["dense"] * 4 + ["sparse"] * 4
    found = []
    for chained in (True, False):
        model = model_of(name)
        decoder = Decoder(model, weights)
        if not chained:
            monkeypatch.setattr(decoder, "_chain_for", lambda _: None)
        ids_BS, _, pads_B = padded(prompts)
        set_mode(model, modes[0])
        logits = [decoder.begin(ids_BS, pads_B, ids_BS.shape[1] + NEW)]
        for mode in modes[1:]:
            set_mode(model, mode)
            logits.append(decoder.next(torch.arange(len(prompts)) + 5))
        assert (decoder.chain is not None and decoder.chain[1] is not None) == chained
        found.append(torch.stack(logits))
    assert torch.equal(*found)


def test_what_is_told_to_a_chain_counts_for_the_next_call() -> None:
    """Two runs, the second of what the first has written, with one thread and several."""
    weight_ND, x_TD, y_TN, z_TN = (
        torch.randn(32, 32),
        torch.randn(3, 32),
        torch.empty(3, 32),
        torch.empty(3, 32),
    )
    for count in (1, 2, 3):
        with threads(count):
            first, second = LinearCall(3, weight_ND, None, None), LinearCall(3, weight_ND, None, None)
            chain = Chain([first.told(x_TD, y_TN), second.told(y_TN, z_TN)])
            for _ in range(20):
                other_TN = torch.empty(3, 32)
                chain.tell(-1, y=other_TN)
                chain()
                assert relative_error(other_TN, x_TD @ weight_ND.t() @ weight_ND.t()) < 1e-6
