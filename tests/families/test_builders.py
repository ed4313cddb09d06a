"""Models from scratch: the sizes asked for, all FFNs switchable, a training step in both modes, both ways round."""

from __future__ import annotations

import pytest
import torch

from switchable import InputError, SwitchConfig, convert, set_mode
from switchable.ffn.builders import BUILDERS, build_model
from switchable.ffn.convert import layers_of

SIZES = {"d_model": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "max_positions": 24}
TOKENS = {"eos_token_id": 1, "pad_token_id": 2}


@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("family", BUILDERS)
def test_it_trains_in_both_modes(family: str, activation: str) -> None:
    torch.manual_seed(0)
    model = build_model(family, SIZES, activation, 61, TOKENS)
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3))
    layers = layers_of(model)
    assert len(layers) == (4 if family == "t5" else 2)
    assert {(layer.ssd.d_model, layer.ssd.d_ff, layer.ssd.settings.activation) for layer in layers} == {
        (16, 64, activation)
    }
    ids = torch.randint(3, 61, (2, SIZES["max_positions"]))
    for mode in ("dense", "sparse"):
        set_mode(model, mode)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert torch.isfinite(loss)
    assert all(layer.router.weight.grad is not None for layer in layers)
    assert model.config.vocab_size == 61
    assert model.config.eos_token_id == 1
    assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_gpt2_says_its_positions_under_the_name_that_other_tools_read() -> None:
    sizes = {"d_model": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "max_positions": 32}
    config = build_model("gpt2", sizes, "relu", 61, {"eos_token_id": 0, "pad_token_id": 0}).config.to_dict()
    assert (config["n_positions"], config["n_ctx"]) == (32, 32)


def test_an_unknown_family() -> None:
    with pytest.raises(InputError, match=r"family='brt' cannot be pre-trained.*did you mean 'bert'"):
        build_model("brt", SIZES, "relu", 61, TOKENS)
