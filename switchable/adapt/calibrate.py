"""Routers learn from a trained model on a text: the model runs dense and unchanged, its routers alone are trained.

    for each piece of the text:
        one dense pass:  every FFN's input x and every expert's share of its activation mass are kept
        a few epochs:    cross-entropy of softmax(router(x)) against the share (`router.router_loss`), AdamW

The dense pass costs most of the time, so what it shows is used several times. It is kept in half precision, and a
piece of the text is as long as fits into a bounded memory. The learning rate falls to zero over the whole text.

Shapes: T tokens, D d_model, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from switchable.compute.estimate import expert_mass
from switchable.ffn.convert import in_mode, layers_of
from switchable.ffn.layer import SwitchableFFN
from switchable.ffn.router import mass_share, router_loss
from switchable.switching.measures import Batch, show

MEMORY_BYTES = 2**30
"""For what is kept of one piece of the text, all layers together."""
EPOCHS = 4
"""Times that a piece is gone through."""
MINIBATCH = 512
"""Tokens per step of a router."""


def calibrate(
    model: nn.Module,
    batches: Sequence[Batch],
    learning_rate: float,
    seed: int = 0,
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Train the routers of a converted model on model inputs without labels; nothing else changes, its modes neither.

    `learning_rate` is AdamW's at the start, `seed` orders the tokens, and `advance` is told of batches done: each
    counts once when it is shown to the model and once in every epoch.
    """
    layers = layers_of(model)
    pieces = list(_pieces(batches, layers))
    generator = torch.Generator().manual_seed(seed)
    routers = [p for layer in layers for p in layer.router.parameters()]
    optimizer = torch.optim.AdamW(routers, lr=learning_rate, weight_decay=0.0)
    done = 0
    with in_mode(model, "dense"):
        model.eval()
        for piece in pieces:
            seen = _lessons(model, piece, advance)
            for epoch in range(EPOCHS):
                share = (done + len(piece) * epoch / EPOCHS) / len(batches)
                optimizer.param_groups[0]["lr"] = learning_rate * (1 - share)
                _epoch(layers, seen, optimizer, generator)
                advance(len(piece))
            done += len(piece)


def _pieces(batches: Sequence[Batch], layers: Sequence[SwitchableFFN]) -> Iterator[Sequence[Batch]]:
    per_token = sum(2 * (layer.ssd.d_model + layer.ssd.num_experts) for layer in layers)
    tokens = max(batch["input_ids"].numel() for batch in batches)
    length = max(1, MEMORY_BYTES // (per_token * tokens))
    for start in range(0, len(batches), length):
        yield batches[start : start + length]


def _lessons(
    model: nn.Module, piece: Sequence[Batch], advance: Callable[[int], object]
) -> list[tuple[Tensor, Tensor]]:
    """Return of each layer its inputs x_TD and its experts' shares of the mass, share_TE, in half precision."""
    inputs: dict[SwitchableFFN, list[Tensor]] = {layer: [] for layer in layers_of(model)}
    shares: dict[SwitchableFFN, list[Tensor]] = {layer: [] for layer in inputs}

    def keep(layer: SwitchableFFN, x: Tensor) -> None:
        x_TD = x.reshape(-1, layer.ssd.d_model)
        mass_TE = expert_mass(layer.ssd.activations(x_TD), layer.ssd.weights.down_FD, layer.ssd.num_experts)
        inputs[layer].append(x_TD.to(torch.bfloat16))
        shares[layer].append(mass_share(mass_TE).half())

    for batch in piece:
        show(model, [batch], [keep] * len(inputs))
        advance(1)
    return [(torch.cat(inputs[layer]), torch.cat(shares[layer])) for layer in inputs]


def _epoch(
    layers: Sequence[SwitchableFFN],
    seen: Sequence[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    """Go once through what was recorded, all layers side by side."""
    orders = [torch.split(torch.randperm(len(x), generator=generator), MINIBATCH) for x, _ in seen]
    for step in range(max(len(order) for order in orders)):
        optimizer.zero_grad()
        for layer, (x_TD, share_TE), order in zip(layers, seen, orders, strict=True):
            if step < len(order):  # encoder and decoder see different numbers of tokens
                rows = order[step].to(x_TD.device)
                torch.autograd.backward(router_loss(layer.router(x_TD[rows].float()), share_TE[rows].float()))
        optimizer.step()
