"""A model whose weights have been rounded to a width, and which is used like any other.

What `Decoder` does to 8 bits is done here in wider numbers, for what it does not do: losses, tasks, other families.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from switchable.compute.cpu.decode.rows import quantised
from switchable.ffn.convert import layers_of
from switchable.ffn.families import PROJECTIONS, neuron_dim
from switchable.ffn.router import Router
from switchable.infer.decoding.matrices import WIDTHS


def round_weights(model: nn.Module, width: str) -> None:
    """Round a model's weights to a key of `WIDTHS`, in place. Routers keep theirs: a choice must not hang on it."""
    if width == "int8":
        round_to_8_bits(model)
        return
    kept = [(p, p.data) for layer in layers_of(model) for p in layer.router.parameters()]
    model.to(WIDTHS[width])
    for parameter, numbers in kept:
        parameter.data = numbers


@torch.no_grad()
def round_to_8_bits(model: nn.Module) -> None:
    """Round projections, token embeddings and the head, in place: a scale per row, of an FFN's matrices per neuron."""
    by_neuron = {}
    for ssd in (layer.ssd for layer in layers_of(model)):
        by_neuron[ssd.down_projection] = neuron_dim(ssd.down_projection, output=True)
    for module in matrices_of(model):
        weight = module.weight
        turned = by_neuron.get(module, int(isinstance(module, Conv1D))) == 1
        rows_ND, scale_N = quantised(weight.t() if turned else weight)
        near_ND = rows_ND * scale_N.unsqueeze(1)
        weight.copy_(near_ND.t() if turned else near_ND)


def matrices_of(model: nn.Module) -> Iterator[nn.Linear]:
    """Yield projections, token embeddings, the head: what is rounded to 8 bits; of the same weight the first."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    done = set[Tensor]()
    for module in model.modules():
        is_projection = isinstance(module, PROJECTIONS) and not isinstance(module, Router)
        if (is_projection or module is embeddings) and module.weight not in done:
            done.add(cast(Tensor, module.weight))
            yield cast(nn.Linear, module)
