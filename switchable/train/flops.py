"""Floating-point operations of a training step, in both modes.

The dense model is *counted* (torch's FlopCounterMode over one real forward and backward, attention decomposed into
its matmuls), so any architecture is covered. What a sparse step saves is then exact arithmetic, per token and layer,
forward + backward = 3 x forward, a multiply-add being 2 operations:

    dense FFN      3 · 4·D·F              (6·D·F per token forward for a gated FFN)
    sparse FFN     3 · 4·D·(K/E)·F  +  router 2 · 2·D·E (its input gets no gradient)
    router learning in a dense step    r · (2 · 2·D·E + 2·F)     r = share of the tokens that train it

Measuring on the probe costs a forward pass each time and is counted too; clustering (well under 0.1 %) is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from switchable.ffn.convert import kept_modes, layers_of
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
    ffn_sparse: tuple[float, ...]
    """Per layer: K experts and the router."""
    router_learning: tuple[float, ...]
    """Per layer: training the router in a dense step."""

    def step(self, sparse_layers: tuple[bool, ...]) -> float:
        """Return the FLOPs of a step in which the given layers are sparse and the others dense."""
        total = self.dense
        for is_sparse, dense, sparse, learning in zip(
            sparse_layers, self.ffn_dense, self.ffn_sparse, self.router_learning, strict=True
        ):
            total += sparse - dense if is_sparse else learning
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
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    watched = [*layers_of(model), *([head] if isinstance(head, nn.Linear) else [])]
    with (
        _tokens_seen(watched) as seen,
        kept_modes(model) as layers,
        counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        for layer in layers:
            layer.mode, layer.router_learns = "dense", False
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    pairs = list(zip(layers_of(model), seen, strict=False))
    return StepFlops(
        tokens=batch["input_ids"].numel(),
        dense=float(counter.get_total_flops()),
        head=6.0 * head.weight.numel() * seen[-1] if isinstance(head, nn.Linear) else 0.0,
        ffn_dense=tuple(3.0 * 4 * layer.d_model * layer.d_ff * tokens for layer, tokens in pairs),
        ffn_sparse=tuple(ffn_sparse(layer) * tokens for layer, tokens in pairs),
        router_learning=tuple(router_learning(layer) * tokens for layer, tokens in pairs),
    )


@contextmanager
def _tokens_seen(modules: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Count the tokens that pass through each module within the block: encoder and decoder see different ones."""
    seen = [0] * len(modules)

    def hook_for(i: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def count_tokens(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[i] += inputs[0].shape[:-1].numel()

        return count_tokens

    hooks = [module.register_forward_pre_hook(hook_for(i)) for i, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def ffn_sparse(layer: SwitchableFFN) -> float:
    """Return the FLOPs per token, forward and backward, of a layer in sparse mode."""
    neurons = layer.d_ff // layer.num_experts * layer.experts_per_token
    return 3.0 * 4 * layer.d_model * neurons + 4.0 * layer.d_model * layer.num_experts


def router_learning(layer: SwitchableFFN) -> float:
    """Return the FLOPs per token of a dense step that train the layer's router, 0 if it does not learn there."""
    if not layer.router_learns:
        return 0.0
    return layer.router_token_fraction * (4.0 * layer.d_model * layer.num_experts + 2.0 * layer.d_ff)
