"""What the benchmarks share: a random GPT-2 type model with switchable FFNs, and the parity check of decoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from switchable.ffn.builders import build_model
from switchable.ffn.convert import convert, kept_modes, layers_of, set_mode
from switchable.settings import SwitchConfig


def random_gpt2(
    d_model: int, num_layers: int, vocab_size: int, positions: int, num_experts: int, k: int
) -> nn.Module:
    """Return a converted GPT-2 with F = 4 D and random weights; routers do not learn in dense steps."""
    torch.manual_seed(0)
    sizes = {
        "d_model": d_model,
        "d_ff": 4 * d_model,
        "num_layers": num_layers,
        "num_heads": d_model // 64,
        "max_positions": positions,
    }
    model = build_model("gpt2", sizes, "relu", vocab_size, {"eos_token_id": 0})
    convert(model, SwitchConfig(num_experts=num_experts, experts_per_token=k))
    for layer in layers_of(model):
        layer.ssd.router_learns = False  # a plain dense step has no router
    return model


@torch.no_grad()
def decoding_parity_error(model: nn.Module, ids_BS: Tensor) -> float:
    """Return the relative difference of logits without gradients, token by token, all experts on against dense."""
    with kept_modes(model):
        logits = {}
        for mode in ("dense", "sparse"):
            set_mode(model, mode, layers_of(model)[0].ssd.num_experts if mode == "sparse" else None)
            logits[mode] = torch.cat(
                [model(input_ids=ids_B1, use_cache=False).logits for ids_B1 in ids_BS.split(1, dim=1)], dim=1
            )
    return float((logits["sparse"] - logits["dense"]).norm() / logits["dense"].norm())
