"""What a switchable layer does differently without gradients: a few tokens in one call, dense where that is faster.

Shapes: B batch, S sequence, D d_model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from switchable.ffn.experts.autotune import resolve
from switchable.ffn.experts.few import MOST_TOKENS, FewCall, prepared, takes
from switchable.ffn.experts.shape import Shape

if TYPE_CHECKING:
    from switchable.ffn.layer import SwitchableFFN


def few_tokens_of(layer: SwitchableFFN, x_BSD: Tensor) -> Tensor | None:
    """Return a sparse layer's output, bias included, from one call of compiled code; None where it does not apply.

    Then `layer` computes it step by step: with gradients, many tokens, real gates, under `torch.compile` or autocast,
    and where an implementation was asked for by name. What is looked up for a call serves the next ones, as long as
    the weights stay where they are: Python takes as long as the multiplications otherwise.
    """
    if (
        torch.is_grad_enabled()
        or layer.training
        or layer.expert_compute != "auto"
        or layer.expert_gate != "unit"
        or layer.family.gate is not None
        or x_BSD.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or x_BSD.numel() > MOST_TOKENS * layer.d_model
    ):
        return None
    x_BSD, kept = x_BSD.contiguous(), layer.kept_call
    if not takes(x_BSD):
        return None
    tokens = x_BSD.numel() // layer.d_model
    up, down, router = layer.up_projection, layer.down_projection, layer.router
    tensors = (up.weight, down.weight, up.bias, down.bias, router.weight, router.bias)
    key = (
        tokens,
        layer.experts_per_token,
        torch.get_num_threads(),
        *(None if t is None else t.data_ptr() for t in tensors),
        *((t.dtype, t.stride()) for t in tensors[:2]),
    )
    if kept.key != key:
        kept.key, kept.call = key, _prepared(layer, tokens)
    return None if kept.call is None else kept.call(x_BSD)


def _prepared(layer: SwitchableFFN, tokens: int) -> FewCall | None:
    return prepared(
        tokens,
        layer.weights,
        (layer.router.weight, layer.router.bias),
        layer.num_experts,
        layer.experts_per_token,
        activation=layer.act_name,
        start_D=layer.down_projection.bias,
    )


def dense_is_faster(layer: SwitchableFFN, x_BSD: Tensor) -> bool:
    """Whether this machine's table says so; always False where gradients are wanted or the FFN is gated."""
    if torch.is_grad_enabled() or layer.gate_projection is not None:  # the table is of FFNs without a gate
        return False
    tokens, dtype, device = x_BSD.numel() // layer.d_model, x_BSD.dtype, x_BSD.device.type
    question = (tokens, layer.experts_per_token, dtype, device, torch.get_num_threads())
    if question not in layer.dense_wins:
        shape = Shape(
            tokens=tokens,
            d_model=layer.d_model,
            d_ff=layer.d_ff,
            num_experts=layer.num_experts,
            experts_per_token=layer.experts_per_token,
            activation=layer.act_name,
            dtype=dtype,
            device=device,
            training=False,
        )
        layer.dense_wins[question] = resolve(shape) == "dense"
    return layer.dense_wins[question]
