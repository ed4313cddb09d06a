"""A model whose matrices have been rounded to 8 bits, as `Decoder` does, and which is used like any other.

For what a decoder does not do: losses, tasks, families that it does not know.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from switchable.compute.cpu.decode.rows import quantised
from switchable.ffn.convert import layers_of
from switchable.ffn.families import PROJECTIONS, neuron_dim
from switchable.ffn.router import Router


@torch.no_grad()
def round_to_8_bits(model: nn.Module) -> None:
    """Round projections, token embeddings and the head, in place: a scale per row, of an FFN's matrices per neuron."""
    by_neuron = {}
    for ssd in (layer.ssd for layer in layers_of(model)):
        by_neuron[ssd.down_projection] = neuron_dim(ssd.down_projection, output=True)
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    done = set[Tensor]()
    for module in model.modules():
        is_projection = isinstance(module, PROJECTIONS) and not isinstance(module, Router)
        if not is_projection and module is not embeddings:
            continue
        weight: Tensor = module.weight  # type: ignore[assignment]
        if weight in done:
            continue
        done.add(weight)
        turned = by_neuron.get(cast(nn.Linear, module), int(isinstance(module, Conv1D))) == 1
        rows_ND, scale_N = quantised(weight.t() if turned else weight)
        near_ND = rows_ND * scale_N.unsqueeze(1)
        weight.copy_(near_ND.t() if turned else near_ND)
