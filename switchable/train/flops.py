"""Floating-point operations of a training step, in both modes.

The dense model is *counted* (torch's FlopCounterMode over one real forward and backward, attention decomposed into
its matmuls), so any architecture is covered. What a sparse step saves is then exact arithmetic, per token and layer,
forward + backward = 3 x forward, a multiply-add being 2 operations:

    choosing by products in 8 bits     (P - 1) · 2·D·F / 2  +  r · (2 · 2·D·E + 2·F)     such a product counts half
    dense FFN      3 · 2·P·D·F             P projections: 2, of a gated FFN 3
    sparse FFN     3 · 2·P·D·(K/E)·F  +  router 2·D·E, and what it learns there
    active neurons     2·D·F + (3·P - 1) · 2·D·a·F     a = share of the activations that are not zero, as counted there
    router learning in a dense step    r · (2 · 2·D·E + 2·F)     r = share of the tokens that train it

Measuring on the probe costs a forward pass each time and is counted too; clustering (well under 0.1 %) is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from switchable.ffn.convert import kept_modes
from switchable.ffn.layer import ESTIMATED_TOKEN_FRACTION, SPARSE_TOKEN_FRACTION, SwitchableFFN


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimizer step of `tokens` tokens, forward and backward."""

    tokens: int
    dense: float  # the plain dense model, without any router
    head: float  # the part of `dense` spent in the output head
    ffn_dense: tuple[float, ...]  # per layer: its dense FFN
    expert: tuple[float, ...]  # per layer: one of its experts, computed for every token
    router: tuple[float, ...]  # per layer: its router in a sparse step
    router_learning: tuple[float, ...]  # per layer: training the router in a dense step
    estimate: tuple[float, ...]
    """Per layer: what stands for `router` where experts are chosen by products in 8 bits."""
    ffn_input: tuple[float, ...]
    """Per layer: the part of `ffn_dense` spent in the input projection, and the gate if there is one."""

    def times(self, number: int) -> StepFlops:
        """Return the FLOPs of a step of so many batches like the one counted."""
        more: dict[str, Any] = {
            name: tuple(flops * number for flops in value) if isinstance(value, tuple) else value * number
            for name, value in vars(self).items()
        }
        return StepFlops(**more)

    def step(
        self,
        experts: Sequence[int | None],
        active: Sequence[float | None] | None = None,
        estimates: bool = False,
    ) -> float:
        """Return the FLOPs of a step, given each layer's experts per token (None where it is dense).

        `estimates` says that these are chosen by products in 8 bits, each of which counts half.
        `active` is the share of the activations that was not zero, of each layer that multiplied only active neurons;
        None for the others. Left out, there are no such layers.
        """
        total = self.dense
        shares = active or [None] * len(experts)
        layers = (
            self.ffn_dense,
            self.ffn_input,
            self.expert,
            self.estimate if estimates else self.router,
            self.router_learning,
        )
        for k, share, dense, read, expert, router, learning in zip(experts, shares, *layers, strict=True):
            if k is not None:
                total += k * expert + router - dense
            else:
                product = (dense - read) / 3  # of the output projection's three; all products are of one size
                total += learning - (0.0 if share is None else (1 - share) * (dense - product))
        return total

    def measurement(self, probe_tokens: int) -> float:
        """Return the FLOPs of one measurement: a dense forward, each input projection once more."""
        return (self.dense + sum(self.ffn_input)) / 3 * probe_tokens / self.tokens


def count(model: nn.Module, batch: Mapping[str, Tensor]) -> StepFlops:
    """Count a step of a converted model on a batch (`input_ids` [B, S], labels); modes are kept, gradients cleared."""
    counter, plain = FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH)
    output = model.get_output_embeddings()  # type: ignore[operator]
    heads = [output] if isinstance(output, nn.Linear) else []
    with kept_modes(model) as layers, _rows_seen([*layers, *heads]) as rows, counter, plain:
        for layer in layers:
            layer.ssd.mode, layer.ssd.router_learns = "dense", False
        model.eval()  # activation checkpointing would compute forward passes twice: that is no work of the model
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    # Encoder and decoder of one model see different numbers of tokens.
    each = list(zip(layers, rows, strict=False))
    return StepFlops(
        tokens=batch["input_ids"].numel(),
        dense=float(counter.get_total_flops()),
        head=sum(6.0 * head.weight.numel() * n for head, n in zip(heads, rows[len(layers) :], strict=True)),
        ffn_dense=tuple(ffn_dense(layer) * n for layer, n in each),
        expert=tuple(ffn_dense(layer) / layer.ssd.num_experts * n for layer, n in each),
        router=tuple(router_sparse(layer) * n for layer, n in each),
        router_learning=tuple(router_learning(layer) * n for layer, n in each),
        estimate=tuple(estimate(layer) * n for layer, n in each),
        ffn_input=tuple(ffn_dense(layer) * (1 - 1 / projections(layer)) * n for layer, n in each),
    )


def projections(layer: SwitchableFFN) -> int:
    """Return the number of an FFN's projections: up and down, and the gate if there is one."""
    return 2 if layer.ssd.gate_projection is None else 3


def ffn_dense(layer: SwitchableFFN) -> float:
    """Return the FLOPs per token, forward and backward, of a layer in dense mode."""
    return 3.0 * 2 * projections(layer) * layer.ssd.d_model * layer.ssd.d_ff


def router_sparse(layer: SwitchableFFN) -> float:
    """Return the FLOPs per token of a layer's router in a sparse step, its learning there included."""
    forward = layer.router_passes * 2 * layer.ssd.d_model * layer.ssd.num_experts
    if not layer.ssd.router_learns:
        return forward
    return forward + SPARSE_TOKEN_FRACTION * (_inputs(layer) + _router_loss(layer))


def estimate(layer: SwitchableFFN) -> float:
    """Return the FLOPs per token of choosing experts by products in 8 bits, and of what the router learns from them."""
    learning = ESTIMATED_TOKEN_FRACTION * _router_loss(layer) if layer.ssd.router_learns else 0.0
    return _inputs(layer) / 2 + learning


def _inputs(layer: SwitchableFFN) -> float:
    """Return the FLOPs per token of an FFN's products before the activation, forward."""
    return 2.0 * (projections(layer) - 1) * layer.ssd.d_model * layer.ssd.d_ff


def router_learning(layer: SwitchableFFN) -> float:
    """Return the FLOPs per token of a dense step that train the layer's router, 0 if it does not learn there."""
    if not layer.ssd.router_learns:
        return 0.0
    return layer.ssd.settings.config.router_token_fraction * _router_loss(layer)


def _router_loss(layer: SwitchableFFN) -> float:
    """Return the FLOPs of the router's loss, both passes, per token that it learns from."""
    return 4.0 * layer.ssd.d_model * layer.ssd.num_experts + 2.0 * layer.ssd.d_ff


@contextmanager
def _rows_seen(modules: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Within the `with` block, count the rows (tokens) that each module is given."""
    rows = [0] * len(modules)

    def see(place: int, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows[place] += args[0].shape[:-1].numel()

    hooks = [module.register_forward_pre_hook(partial(see, place)) for place, module in enumerate(modules)]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()
