"""Floating-point operations of a training step, in both modes.

The dense model is *counted* (torch's FlopCounterMode over one real forward and backward, attention decomposed into
its matmuls), so any architecture is covered. What a sparse step saves is then exact arithmetic, per token and layer,
forward + backward = 3 x forward, a multiply-add being 2 operations:

    dense FFN      3 · 4·D·F              (6·D·F per token forward for a gated FFN)
    sparse FFN     3 · 4·D·(K/E)·F  +  router 2 · 2·D·E (its input gets no gradient; 3 · 2·D·E with softmax gates)
    router learning in a dense step    r · (2 · 2·D·E + 2·F)     r = share of the tokens that train it

Measuring on the probe costs a forward pass each time and is counted too; clustering (well under 0.1 %) is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from switchable.ffn.convert import kept_modes
from switchable.ffn.layer import SwitchableFFN


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimizer step of `tokens` tokens, forward and backward."""

    tokens: int
    dense: float
    """The plain dense model, without any router."""
    head: float
    """The part of `dense` spent in the output head, which embeds no knowledge of FFNs."""
    ffn_dense: tuple[float, ...]
    """Per layer: its dense FFN."""
    expert: tuple[float, ...]
    """Per layer: one of its experts, computed for every token."""
    router: tuple[float, ...]
    """Per layer: its router in a sparse step."""
    router_learning: tuple[float, ...]
    """Per layer: training the router in a dense step."""

    def step(self, experts_per_token: Sequence[int | None]) -> float:
        """Return the FLOPs of a step, given each layer's experts per token; None where it is dense."""
        total = self.dense
        for k, dense, expert, router, learning in zip(
            experts_per_token, self.ffn_dense, self.expert, self.router, self.router_learning, strict=True
        ):
            total += learning if k is None else k * expert + router - dense
        return total

    def measurement(self, probe_tokens: int) -> float:
        """Return the FLOPs of one measurement: a dense forward, each input projection once more."""
        return (self.dense + sum(self.ffn_dense) / 2) / 3 * probe_tokens / self.tokens


def count(model: nn.Module, batch: Mapping[str, Tensor]) -> StepFlops:
    """Count a step of a converted model on a batch; its gradients are cleared afterwards.

    Args:
        model: a converted model; its modes are kept.
        batch: model inputs with `input_ids` [B, S] and labels.
    """
    counter = FlopCounterMode(display=False)
    with kept_modes(model) as layers, counter, sdpa_kernel(SDPBackend.MATH):
        for layer in layers:
            layer.mode, layer.router_learns = "dense", False
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    tokens = batch["input_ids"].numel()
    return StepFlops(
        tokens=tokens,
        dense=float(counter.get_total_flops()),
        head=_head(model, tokens),
        ffn_dense=tuple(3.0 * 4 * layer.d_model * layer.d_ff * tokens for layer in layers),
        expert=tuple(3.0 * 4 * layer.d_model * layer.d_ff / layer.num_experts * tokens for layer in layers),
        router=tuple(router_sparse(layer) * tokens for layer in layers),
        router_learning=tuple(router_learning(layer) * tokens for layer in layers),
    )


def router_sparse(layer: SwitchableFFN) -> float:
    """Return the FLOPs per token of a layer's router in a sparse step."""
    passes = 3.0 if layer.gate == "softmax" else 2.0
    return passes * 2 * layer.d_model * layer.num_experts


def router_learning(layer: SwitchableFFN) -> float:
    """Return the FLOPs per token of a dense step that train the layer's router, 0 if it does not learn there."""
    if not layer.router_learns:
        return 0.0
    return layer.router_token_fraction * (4.0 * layer.d_model * layer.num_experts + 2.0 * layer.d_ff)


def _head(model: nn.Module, tokens: int) -> float:
    find = getattr(model, "get_output_embeddings", None)
    weight = getattr(find() if callable(find) else None, "weight", None)
    return 6.0 * weight.numel() * tokens if isinstance(weight, Tensor) else 0.0
