"""Our decoding keeps the experts of a mass that the layer itself does, in a call of compiled code too."""

from __future__ import annotations

import pytest
import torch

from switchable import SwitchConfig, convert, set_mode
from switchable.ffn.builders import build_model
from switchable.ffn.convert import layers_of
from switchable.infer.decoding.decoder import Decoder, why_not


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("prompt", [3, 60])
@pytest.mark.parametrize("k", [4, 16])
def test_logits_with_a_mass_are_those_of_the_model(family: str, prompt: int, k: int) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_ff": 256, "num_layers": 2, "num_heads": 2, "max_positions": 64}
    model = build_model(family, sizes, "relu", 50, {"eos_token_id": 0}).eval()
    convert(model, SwitchConfig(num_experts=16, experts_per_token=4))
    with torch.no_grad():
        for layer in layers_of(model):
            layer.router.weight.normal_(std=0.3)  # some tokens need more experts than others
    ids_BS = torch.randint(1, 50, (1, prompt + 2))
    logits = {}
    for mass in (0.7, 1.0):
        set_mode(model, "sparse", k, mass)
        with torch.no_grad():
            logits[mass] = model(input_ids=ids_BS).logits[0, prompt - 1 : -1]
    assert (logits[0.7] - logits[1.0]).abs().max() > 1e-3
    assert why_not(model, "sparse") is None
    decoder = Decoder(model)
    for mass, true_SV in logits.items():  # one decoder, as the mode may change
        set_mode(decoder.model, "sparse", k, mass)
        found = [decoder.begin(ids_BS[:, :prompt], None, prompt + 2)]
        found += [decoder.next(ids_BS[:, place]) for place in (prompt, prompt + 1)]
        torch.testing.assert_close(torch.cat(found)[:2], true_SV[:2], rtol=1e-4, atol=1e-5)
