"""The weights of one FFN, seen neuron by neuron, whatever layout its modules store them in.

Row i of every field belongs to neuron i. The fields are *views* of the model's own parameters, usually transposed
ones (`nn.Linear` stores `down` as [D, F], transformers' `Conv1D` stores `up` as [D, F]), so nothing is copied and
gradients flow to the parameters. Once the neurons stand in cluster order, expert e owns rows e·I to (e+1)·I.

Shapes: D d_model, F d_ff, E experts, I = F/E neurons per expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FFNWeights:
    """FFN(x) = act(x · upᵀ + up_bias) · down; gated: (act(x · gateᵀ + gate_bias) ⊙ (x · upᵀ + up_bias)) · down.

    The bias of the output projection is not here: it is added once, outside the experts, in both modes.
    """

    up_FD: Tensor
    """What each neuron reads: row i of the input projection."""
    down_FD: Tensor
    """What each neuron writes: column i of the output projection."""
    up_bias_F: Tensor | None = None
    """Bias of the input projection."""
    gate_FD: Tensor | None = None
    """Gate projection of a gated FFN (Llama type), else None."""
    gate_bias_F: Tensor | None = None
    """Bias of the gate projection."""
