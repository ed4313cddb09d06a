"""Adapters beside the FFNs train and switch; on an FFN they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations.loops import CONFIG, IDS, MODES, STEPS, loop
from support import tiny_gpt2

from switchable import Controller, InputError, convert, set_mode


def _adapted(targets: list[str], **more: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(
        r=4, target_modules=targets, fan_in_fan_out=True, init_lora_weights=False, **more
    ), peft.get_peft_model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("first", ["PEFT", "convert"])
def test_adapters_beside_the_ffns_train_and_switch(first: str) -> None:
    lora, wrap = _adapted(["c_attn"], modules_to_save=["router"] if first == "convert" else None)
    model: Any = tiny_gpt2()
    if first == "PEFT":
        model = wrap(model, lora)
        convert(model, CONFIG)
    else:
        convert(model, CONFIG)
        model = wrap(model, lora)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    found = loop(model)
    assert found.modes == MODES
    assert any(
        not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before and "router" in n
    )
    with torch.no_grad():
        dense = model.eval()(input_ids=IDS).logits
        set_mode(model, "sparse", 8)
        torch.testing.assert_close(model(input_ids=IDS).logits, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_on_an_ffn_are_refused_before_training() -> None:
    lora, wrap = _adapted(["c_fc"], modules_to_save=["router"])
    model: Any = tiny_gpt2()
    convert(model, CONFIG)
    with pytest.raises(InputError, match=r"c_fc is a Linear, which sparse mode passes by; merge it"):
        Controller(wrap(model, lora), IDS, STEPS, CONFIG)
    lora, wrap = _adapted(["c_fc"])
    with pytest.raises(InputError, match=r"c_fc .* is an adapter; merge it"):
        convert(wrap(tiny_gpt2(), lora), CONFIG)
